"""On a GPU: half precision, loss scaling, resuming, two processes, compiled blocks.

Without a GPU these tests are collected and skipped. Their code can be rehearsed on the CPU, which
tells nothing about GPUs:

    LDM_REHEARSE=1 python -m pytest tests/gpu
"""

import copy
import dataclasses
import os

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

import graphs
from conftest import RecordingAccelerator, clip_of, first, randomise, seeded, tiny_model
from gradients import first_gradients, run_in_two_processes
from ldm_minimal import (
    SHAPES,
    Autoencoder,
    TextEncoder,
    TrainConfig,
    Trainer,
    UNet,
    compile_blocks,
    ldm,
    save_state,
    train_autoencoder,
    train_clip,
    train_denoiser,
)

pytestmark = pytest.mark.gpu
REHEARSE = os.environ.get("LDM_REHEARSE") == "1"
TRAININGS = {"clip": train_clip, "autoencoder": train_autoencoder, "denoiser": train_denoiser}
PROMPTS = ["a red circle", "a small blue star"]


@pytest.fixture(autouse=True)
def device(monkeypatch):
    """The GPU, and an accelerate that takes it; or the CPU, where the tests are only rehearsed."""
    if not torch.cuda.is_available() and not REHEARSE:
        pytest.skip("there is no CUDA device; LDM_REHEARSE=1 rehearses this test on the CPU")
    if not REHEARSE:
        monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    AcceleratorState._reset_state(reset_partial_state=True)
    if REHEARSE:
        graphs.pretend(monkeypatch, ldm)
    yield torch.device("cpu" if REHEARSE else "cuda")
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(params=["bf16", "fp16"])
def precision(request):
    """Mixed precision of a training. On the CPU accelerate has no fp16: bf16 rehearses it."""
    return "bf16" if REHEARSE else request.param


def relative_error(ours, expected):
    ours, expected = ours.float().cpu(), expected.float().cpu()
    return ((ours - expected).norm() / expected.norm()).item()


# ---- half precision ----------------------------------------------------------------------------

# The relative error of a whole network's output against float32 on the CPU. In float32 a GPU's
# convolutions round their inputs to TF32, to 10 bits like fp16.
TOLERANCES = {torch.float32: 0.01, torch.float16: 0.02, torch.bfloat16: 0.1}


def unet_and_inputs():
    unet = randomise(UNet(SHAPES.unet), seeded())
    z, t = torch.randn(4, 4, 8, 8, generator=seeded(1)), torch.tensor([0, 250, 500, 999])
    return unet, (z, t, torch.randn(4, 77, 96, generator=seeded(2)))


def autoencoder_and_inputs():
    autoencoder = randomise(Autoencoder(SHAPES.autoencoder), seeded())
    return autoencoder, (torch.rand(4, 3, 32, 32, generator=seeded(1)) * 2 - 1,)


def text_encoder_and_inputs():
    text_encoder = randomise(TextEncoder(SHAPES.text), seeded())
    return text_encoder, (torch.randint(768, (4, 77), generator=seeded(1)),)


def run_network(network, inputs, device, dtype):
    """The output of a copy of the network; floating-point inputs are in its precision."""
    network = copy.deepcopy(network).eval().to(device, dtype)
    moved = []
    for value in inputs:
        value = value.to(device)
        moved.append(value.to(dtype) if value.is_floating_point() else value)
    with torch.no_grad():
        output = network(*moved)
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("dtype", TOLERANCES, ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(
    "build", [unet_and_inputs, autoencoder_and_inputs, text_encoder_and_inputs]
)
def test_networks_agree_with_float32_on_the_cpu(build, dtype, device):
    network, inputs = build()
    expected = run_network(network, inputs, "cpu", torch.float32)
    ours = run_network(network, inputs, device, dtype)
    assert ours.device.type == device.type
    assert ours.dtype == dtype
    assert expected.std() > 0.1
    error = relative_error(ours, expected)
    print(f"relative error {error:.1e}")
    assert error < TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_in_half_precision_draws(dtype, device, data):
    model = tiny_model(data)
    expected = model.generate(PROMPTS, steps=8, guidance=2.0, generator=seeded())
    model.to(device, dtype)
    x = model.generate(PROMPTS, steps=8, guidance=2.0, generator=seeded())
    assert x.device.type == device.type
    difference = (x.cpu() - expected).abs().mean().item()
    print(f"mean difference of pixels {difference:.1e}")
    assert difference < 0.05


# ---- training ----------------------------------------------------------------------------------

# Few images, so that a few steps are enough to learn them.
SHORT = {
    "clip": TrainConfig(steps=60, batch_size=8, learning_rate=1e-2, warmup_steps=5),
    "autoencoder": TrainConfig(steps=60, batch_size=8, learning_rate=3e-3, warmup_steps=5),
    "denoiser": TrainConfig(steps=60, batch_size=8, learning_rate=6e-3, warmup_steps=5),
}
LOSS = {"clip": "clip", "autoencoder": "l1", "denoiser": "mse"}


def start(name, model, data, config, **options):
    """The training called `name` of a whole model."""
    trained = clip_of(model) if name == "clip" else model
    return TRAININGS[name](trained, data, config, **options)


def mean(values):
    return sum(values) / len(values)


@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_in_mixed_precision_learns(name, precision, device, data):
    few, model = first(data, 8), tiny_model(data)
    torch.nn.init.zeros_(model.unet.conv_out.weight)
    accelerator = Accelerator(mixed_precision=precision)
    assert accelerator.device.type == device.type
    assert REHEARSE or (accelerator.scaler is not None) == (precision == "fp16")
    curves = {}
    for _, losses in start(name, model, few, SHORT[name], accelerator=accelerator):
        for key, loss in losses.items():
            curves.setdefault(key, []).append(loss.item())
    for key, curve in curves.items():
        assert torch.tensor(curve).isfinite().all(), key
    if name == "autoencoder":  # it joined in the middle
        assert len(curves["discriminator"]) == 40
    curve = curves[LOSS[name]]
    print(f"{LOSS[name]} {mean(curve[:5]):.3f} -> {mean(curve[-15:]):.3f}")
    assert mean(curve[-15:]) < 0.7 * mean(curve[:5])
    # A training of CLIP leaves the rest of the model on the CPU.
    weights = torch.cat([p.detach().flatten().cpu() for p in model.parameters()])
    assert weights.isfinite().all()
    assert weights.dtype == torch.float32


def test_a_model_trained_here_draws_the_same_on_the_cpu(device, data):
    model = tiny_model(data)
    config = TrainConfig(steps=10, batch_size=8, learning_rate=1e-3)
    list(train_denoiser(model, data, config, accelerator=Accelerator()))
    assert model.device.type == device.type
    x = model.generate(PROMPTS, steps=10, generator=seeded())
    expected = copy.deepcopy(model).cpu().generate(PROMPTS, steps=10, generator=seeded())
    assert x.isfinite().all()
    assert (x.cpu() - expected).abs().mean() < 0.02


@pytest.mark.parametrize("name", TRAININGS)
def test_a_resumed_training_goes_on_as_if_it_had_not_stopped(
    name, precision, device, data, tmp_path
):
    """A GPU adds in no fixed order, so the losses are equal within a tolerance only."""
    config = TrainConfig(steps=6, batch_size=8, learning_rate=1e-3, warmup_steps=1)
    curves = []
    for resume_from in (None, tmp_path):
        model = tiny_model(data)
        model.config = dataclasses.replace(
            model.config, discriminator_start=2, discriminator_head_start=1
        )
        torch.manual_seed(0)  # of the discriminator's first weights
        accelerator = Accelerator(mixed_precision=precision)
        options = {"accelerator": accelerator, "resume_from": resume_from}
        curve = {}
        for step, losses in start(name, model, data, config, **options):
            curve[step] = losses[LOSS[name]].item()
            if step == 3 and resume_from is None:
                save_state(accelerator, tmp_path, step)
        curves.append(curve)
    whole, rest = curves
    assert list(rest) == [4, 5, 6]
    assert rest == pytest.approx({step: whole[step] for step in rest}, rel=0.02)


def test_two_processes_on_one_gpu_have_the_gradients_of_one(device, folder, data, tmp_path):
    expected = first_gradients(data, RecordingAccelerator())
    result = run_in_two_processes(folder, tmp_path / "gradients.pt", device.type)
    assert result["processes"] == 2
    assert result["device"] == device.type
    for name, gradient in expected.items():
        for ours in (result["whole"][name], result["in two parts"][name]):
            assert relative_error(ours, gradient) < 0.01, name


# ---- recorded as a CUDA graph ------------------------------------------------------------------


@pytest.fixture
def recorded(monkeypatch):
    """How many CUDA graphs were recorded; a rehearsal records tapes."""
    if REHEARSE:
        return graphs.pretend(monkeypatch, ldm)
    made = []
    record = ldm._Recorded._record

    def counted(self, batch):
        record(self, batch)
        if self.graph is not None:
            made.append(self.graph)

    monkeypatch.setattr(ldm._Recorded, "_record", counted)
    return made


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("name", TRAININGS)
def test_a_recorded_training_is_the_same_training(
    name, parts, precision, data, recorded, monkeypatch
):
    muon = parts == 1
    # In fp16 the scaler leaves out some of the first steps of the optimizers.
    config = TrainConfig(20, 8, 1e-3, warmup_steps=1, grad_accum_steps=parts, muon=muon)
    curves = []
    for records in (False, True):
        monkeypatch.setattr(Trainer, "records", records)
        model = tiny_model(data)
        model.config = dataclasses.replace(
            model.config, discriminator_start=1, discriminator_head_start=4
        )
        torch.manual_seed(0)  # of the discriminator's first weights
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(mixed_precision=precision)
        training = start(name, model, data, config, accelerator=accelerator)
        curves.append([losses[LOSS[name]].item() for _, losses in training])
    assert len(recorded) == (3 if name == "autoencoder" else 1) + muon
    # Rounding grows from step to step: only the first are near each other.
    assert curves[1][:9] == pytest.approx(curves[0][:9], rel=0.03)


def test_what_cannot_be_recorded_is_launched_kernel_by_kernel(device, data, monkeypatch):
    def careless(x, y):
        copied = torch.tensor(2.0, device=x.device)  # from the CPU, for which the CPU waits
        return (x - y).square().mean(dim=(1, 2, 3)) * copied

    config = TrainConfig(steps=6, batch_size=8, learning_rate=1e-3, warmup_steps=1)
    curves = []
    for records in (False, True):
        monkeypatch.setattr(Trainer, "records", records)
        training = train_autoencoder(tiny_model(data), data, config, perceptual=careless)
        if records:
            with pytest.warns(UserWarning, match="no CUDA graph, so training is slower"):
                curves.append([losses["l1"].item() for _, losses in training])
        else:
            curves.append([losses["l1"].item() for _, losses in training])
    assert curves[1] == pytest.approx(curves[0], rel=0.03)


# ---- compiled ----------------------------------------------------------------------------------


@pytest.fixture
def compiler(monkeypatch):
    """Inductor on a GPU. A rehearsal traces the blocks and writes no kernels."""
    if REHEARSE:
        compile_module = torch.nn.Module.compile

        def compile_without_kernels(module, **options):
            compile_module(module, backend="aot_eager", **options)

        monkeypatch.setattr(torch.nn.Module, "compile", compile_without_kernels)
    yield
    torch._dynamo.reset()


def test_compiled_blocks_draw_the_same_image(device, data, compiler):
    model = tiny_model(data).to(device)
    expected = model.generate(PROMPTS, steps=8, generator=seeded())
    compile_blocks(model)
    x = model.generate(PROMPTS, steps=8, generator=seeded())
    assert (x - expected).abs().mean() < 0.02


@pytest.mark.parametrize("name", TRAININGS)
def test_training_with_compiled_blocks_is_the_same_training(name, device, data, compiler):
    config = TrainConfig(steps=3, batch_size=8, learning_rate=1e-3, warmup_steps=1)
    few = first(data, 8)  # one batch: captions of one length, so each block is traced once
    curves = []
    for compiled in (False, True):
        model = tiny_model(data)
        model.config = dataclasses.replace(
            model.config, discriminator_start=1, discriminator_head_start=0
        )
        torch.manual_seed(0)  # of the discriminator's first weights
        if compiled:
            compile_blocks(model)
        accelerator = Accelerator(mixed_precision="bf16")
        training = start(name, model, few, config, accelerator=accelerator)
        curves.append([losses[LOSS[name]].item() for _, losses in training])
    assert curves[1] == pytest.approx(curves[0], rel=0.05)
