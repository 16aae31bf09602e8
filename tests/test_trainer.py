"""What the three trainings share: the optimizer's step, resuming, several processes, compiling."""

import contextlib
import copy
import dataclasses
import types

import pytest
import torch
from accelerate import Accelerator

import graphs
from conftest import RecordingAccelerator, clip_of, first, tiny_model
from gradients import first_gradients, run_in_two_processes
from ldm_minimal import (
    EMA,
    CaptionedImages,
    Muon,
    PatchDiscriminator,
    TrainConfig,
    Trainer,
    compile_blocks,
    ldm,
    save_state,
    train_autoencoder,
    train_clip,
    train_denoiser,
)
from ldm_minimal.metrics import VGGFeatures, published_lpips

close = torch.testing.assert_close
QUIET = contextlib.nullcontext()
TRAININGS = {"clip": train_clip, "autoencoder": train_autoencoder, "denoiser": train_denoiser}


def start(name, model, data, config, **options):
    """The training called `name` of a whole model."""
    trained = clip_of(model) if name == "clip" else model
    return TRAININGS[name](trained, data, config, **options)


# ---- one step of the optimizer -----------------------------------------------------------------


def test_learning_rate_warms_up_then_falls_to_a_fiftieth():
    config = TrainConfig(steps=1000, batch_size=1, learning_rate=2.0, warmup_steps=100)
    rates = [config.lr(step) for step in range(1001)]
    assert rates[0] == pytest.approx(0.02)
    assert max(rates) == pytest.approx(2.0)
    assert rates[1000] == pytest.approx(0.04)
    assert rates[550] == pytest.approx(2 * 0.51)  # half way down
    assert all(a < b for a, b in zip(rates[:99], rates[1:100]))
    assert all(a > b for a, b in zip(rates[100:], rates[101:]))
    constant = dataclasses.replace(config, warmup_steps=0, final_lr=1.0)
    assert {constant.lr(step) for step in (0, 500, 1000)} == {2.0}


def test_update_uses_the_steps_rate_and_clips_the_gradient():
    layer = torch.nn.Linear(2, 1, bias=False)
    config = TrainConfig(steps=10, batch_size=1, learning_rate=0.5, warmup_steps=5)
    trainer = Trainer(layer, config, Accelerator())
    norms = []

    def before_step(*_):
        norms.append(layer.weight.grad.norm().item())

    trainer.optimizers[0].optimizer.register_step_pre_hook(before_step)
    trainer.backward(1000 * trainer.net(torch.ones(1, 2)).sum())
    trainer.update(1)
    assert norms == [pytest.approx(1.0, rel=1e-4)]
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.2)


def test_a_small_gradient_is_not_clipped_and_none_is_left_for_the_next_step():
    layer = torch.nn.Linear(2, 1, bias=False)
    trainer = Trainer(layer, TrainConfig(steps=10, batch_size=1, learning_rate=0.0), Accelerator())
    gradients = []

    def before_step(*_):
        gradients.append(layer.weight.grad.flatten().tolist())

    trainer.optimizers[0].optimizer.register_step_pre_hook(before_step)
    for step in range(3):
        trainer.backward(trainer.net(torch.tensor([[0.1, 0.2]])).sum())
        trainer.update(step)
    assert gradients == [pytest.approx([0.1, 0.2])] * 3


def test_the_optimizer_is_adamw_with_the_papers_numbers():
    """One step of AdamW by hand: betas 0.9 and 0.99, weight decay 0.01, eps 1e-8."""
    layer = torch.nn.Linear(2, 1, bias=False)
    weight = layer.weight.detach().clone()
    config = TrainConfig(steps=10, batch_size=1, learning_rate=0.5, warmup_steps=1)
    trainer = Trainer(layer, config, Accelerator())
    first_moment = second_moment = torch.zeros(1, 2)
    for step in range(3):
        gradient = torch.tensor([[0.1 * (step + 1), -0.3]])
        trainer.backward((gradient * trainer.net.weight).sum())
        trainer.update(step)
        first_moment = 0.9 * first_moment + 0.1 * gradient
        second_moment = 0.99 * second_moment + 0.01 * gradient**2
        mean = first_moment / (1 - 0.9 ** (step + 1))
        square = second_moment / (1 - 0.99 ** (step + 1))
        rate = config.lr(step)
        weight = weight * (1 - 0.01 * rate) - rate * mean / (square.sqrt() + 1e-8)
    close(layer.weight.detach(), weight)


def few_steps_of_adamw_and_muon(scaler):
    """The weights after three steps with small gradients; scaler: of the loss, as in fp16."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    accelerator = Accelerator()
    accelerator.scaler = scaler

    def unscale_gradients():  # what accelerate does for mixed_precision="fp16", on a GPU only
        for optimizer in accelerator._optimizers:
            scaler.unscale_(optimizer.optimizer)

    if scaler is not None:
        accelerator.unscale_gradients = unscale_gradients
    config = TrainConfig(steps=3, batch_size=1, learning_rate=0.1, warmup_steps=0, muon=True)
    trainer = Trainer(net, config, accelerator)
    assert len(trainer.optimizers) == 2
    x = torch.arange(8.0).sin().view(2, 4)
    for step in range(3):
        trainer.backward(1e-3 * (trainer.net(x) ** 3).sum())
        trainer.update(step)
    return [weight.detach() for weight in net.parameters()]


def test_scaling_the_loss_changes_nothing_with_two_optimizers():
    """Each gradient is unscaled once, and the scale is updated once a step, not once for each."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    scaled = few_steps_of_adamw_and_muon(scaler)
    close(scaled, few_steps_of_adamw_and_muon(None), atol=1e-5, rtol=1e-5)
    assert scaler.state_dict()["_growth_tracker"] == 3


@pytest.mark.parametrize("shape", [(24, 24), (8, 32), (32, 8), (8, 3, 2, 2)])
def test_muon_steps_along_the_gradients_orthogonal_factor(shape):
    """One step moves W by lr 0.2 sqrt(max(rows, columns)) times about U V^T of the gradient.

    The kernel of a convolution is a matrix with a row for each channel that comes out.
    """
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(shape))
    before = weight.detach().flatten(1).clone()
    weight.grad = torch.randn(shape) * 1e-3
    u, s, vh = torch.linalg.svd(weight.grad.flatten(1), full_matrices=False)
    Muon([weight], lr=0.1, weight_decay=0.5).step()
    moved = before * (1 - 0.1 * 0.5) - weight.detach().flatten(1)
    step = moved / (0.1 * 0.2 * max(before.shape) ** 0.5)
    inside = u.T @ step @ vh.T
    singular_values = inside.diagonal()
    assert singular_values[s > 0.05 * s.max()].min() > 0.6
    assert singular_values.max() < 1.3
    assert (inside - singular_values.diag()).abs().max() < 1e-3
    close(u @ inside @ vh, step, rtol=0, atol=1e-4)  # nothing outside the gradient's own space


def test_muon_is_torchs_but_for_bfloat16():
    """Four steps with other gradients, and other shapes, each time."""
    torch.manual_seed(0)
    shapes = [(16, 16), (48, 16), (16, 48), (16, 16)]
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(weight.detach().clone()) for weight in ours]
    start = [weight.detach().clone() for weight in ours]
    optimizers = [
        Muon(ours, lr=0.02, weight_decay=0.1),
        torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    ]
    for _ in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b, before in zip(ours, theirs, start, strict=True):
        assert (a - b).norm() < 0.02 * (b - before).norm()


def test_muon_leaves_alone_what_has_no_gradient():
    weight = torch.nn.Parameter(torch.ones(2, 2))
    Muon([weight], lr=1.0).step()
    assert torch.equal(weight.detach(), torch.ones(2, 2))


def test_with_muon_adamw_keeps_embeddings_and_vectors(tiny):
    config = TrainConfig(steps=1, batch_size=8, learning_rate=1e-3, muon=True)
    clip = clip_of(tiny)
    trainer = Trainer(clip, config, Accelerator(), part=clip.text_encoder, part_lr_scale=0.5)
    adamw, muon = trainer.optimizers
    assert isinstance(adamw.optimizer, torch.optim.AdamW)
    assert isinstance(muon.optimizer, Muon)
    names = {id(p): name for name, p in clip.named_parameters()}
    held = [names[id(p)] for group in muon.param_groups for p in group["params"]]
    kinds = {torch.nn.Linear, torch.nn.Conv2d}
    layers = [name for name, layer in clip.named_modules() if type(layer) in kinds]
    assert sorted(held) == sorted(f"{name}.weight" for name in layers)
    others = [names[id(p)] for group in adamw.param_groups for p in group["params"]]
    assert sorted(held + others) == sorted(names.values())
    assert [group["lr_scale"] for group in muon.param_groups] == [1.0, 0.5]
    in_text = {names[id(p)] for p in muon.param_groups[1]["params"]}
    assert in_text == {name for name in held if name.startswith("text_encoder")}


@pytest.mark.parametrize(("options", "share"), [({}, 0.1), ({"text_lr_scale": 0.5}, 0.5)])
def test_the_text_tower_learns_at_its_own_rate(tiny, data, options, share):
    """Adam's first step moves each weight by the rate, whatever its gradient."""
    clip = clip_of(tiny)
    before = copy.deepcopy(clip)
    config = TrainConfig(steps=1, batch_size=8, learning_rate=1e-3, warmup_steps=1)
    next(train_clip(clip, data, config, **options))

    def largest_move(part, part_before):
        moves = [(p - q).abs().max() for p, q in zip(part.parameters(), part_before.parameters())]
        return max(moves).item()

    image_move = largest_move(clip.image_encoder, before.image_encoder)
    text_move = largest_move(clip.text_encoder, before.text_encoder)
    assert image_move == pytest.approx(1e-3, rel=0.05)
    assert text_move == pytest.approx(share * 1e-3, rel=0.05)


def test_a_batch_needs_enough_pairs(tiny, data):
    rows = [{"text": text} for text in data.captions]
    for i in range(6):
        rows[i]["pair"] = i // 2
    few_pairs = CaptionedImages(data.images, data.captions, rows)
    config = TrainConfig(steps=1, batch_size=8, learning_rate=1e-3)
    with pytest.raises(ValueError, match="batch_size is 8; allowed is up to 6"):
        next(train_clip(clip_of(tiny), few_pairs, config))


def test_without_an_image_encoder_the_autoencoder_needs_a_perceptual_distance(tiny, data):
    tiny.image_encoder = None
    config = TrainConfig(steps=1, batch_size=8, learning_rate=1e-3)
    with pytest.raises(ValueError, match="perceptual is None, and the model has no image encoder"):
        next(train_autoencoder(tiny, data, config))


@pytest.mark.parametrize("muon", [False, True])
def test_the_discriminator_has_a_constant_rate_of_its_own(muon, tiny, data):
    """AdamW's first step moves each weight by the rate; here it comes late in the schedule."""
    tiny.config = dataclasses.replace(
        tiny.config,
        discriminator_start=3,
        discriminator_head_start=0,
        discriminator_learning_rate=2e-3,
    )
    discriminator = PatchDiscriminator(8, 1)
    before = copy.deepcopy(discriminator)
    config = TrainConfig(steps=4, batch_size=8, learning_rate=1e-2, warmup_steps=1, muon=muon)
    list(train_autoencoder(tiny, data, config, discriminator=discriminator))
    moves = [(p - q).abs().max() for p, q in zip(discriminator.parameters(), before.parameters())]
    assert max(moves).item() == pytest.approx(2e-3, rel=0.05)


def test_the_discriminator_learns_by_muon_where_the_config_says_so(tiny, data):
    """Muon's step is almost orthogonal: all of its singular values are about the same."""
    tiny.config = dataclasses.replace(
        tiny.config,
        discriminator_start=0,
        discriminator_head_start=0,
        discriminator_learning_rate=1e-2,
        discriminator_muon=True,
    )
    discriminator = PatchDiscriminator(8, 1)
    before = copy.deepcopy(discriminator)
    config = TrainConfig(steps=1, batch_size=8, learning_rate=1e-3)
    list(train_autoencoder(tiny, data, config, discriminator=discriminator))
    for weight, old in zip(discriminator.parameters(), before.parameters()):
        if weight.ndim == 4:
            decayed = old * (1 - 1e-2 * 0.01)
            step = (weight - decayed).detach().flatten(1) / 1e-2
            values = torch.linalg.svdvals(step) / (0.2 * max(step.shape) ** 0.5)
            assert values.min() > 0.5 and values.max() < 1.35


def test_ema_follows_its_definition():
    module = torch.nn.Linear(3, 3)
    ema = EMA(module, decay=0.9)
    expected = module.weight.detach().clone()
    generator = torch.Generator().manual_seed(0)
    for step in range(200):
        with torch.no_grad():
            module.weight.add_(torch.randn(3, 3, generator=generator))
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * module.weight.detach()
        ema.update(module, step)
    close(ema.module.weight, expected)
    assert not ema.module.weight.requires_grad


# ---- repeatable, and resumed -------------------------------------------------------------------

SIX_STEPS = TrainConfig(steps=6, batch_size=8, learning_rate=3e-3, warmup_steps=2)


def trained(
    name, tiny, data, *, muon=False, seed=0, torch_seed=7, save_at=None, folder=None, resume=False
):
    """Train a copy of `tiny`; returns its weights, and {step: losses}.

    torch_seed: of the discriminator's first weights, which a resumed training does not need.
    """
    model = copy.deepcopy(tiny)
    model.config = dataclasses.replace(
        model.config, discriminator_start=2, discriminator_head_start=1, discriminator_muon=muon
    )
    torch.manual_seed(torch_seed)
    accelerator = Accelerator()
    resume_from = folder if resume else None
    options = {"seed": seed, "accelerator": accelerator, "resume_from": resume_from}
    losses = {}
    config = dataclasses.replace(SIX_STEPS, muon=muon)
    for step, step_losses in start(name, model, data, config, **options):
        losses[step] = {key: loss.item() for key, loss in step_losses.items()}
        if step == save_at:
            save_state(accelerator, folder, step)
    return torch.cat([p.detach().flatten() for p in model.parameters()]), losses


@pytest.mark.parametrize("name", TRAININGS)
def test_a_seed_decides_everything(name, tiny, data):
    weights, losses = trained(name, tiny, data)
    again, losses_again = trained(name, tiny, data)
    other, _ = trained(name, tiny, data, seed=1)
    assert torch.equal(weights, again)
    assert losses == losses_again
    assert not torch.equal(weights, other)


@pytest.mark.parametrize("name", TRAININGS)
@pytest.mark.parametrize(("save_at", "muon"), [(1, False), (4, False), (4, True)])
def test_a_resumed_training_is_the_same_training_bit_for_bit(
    name, save_at, muon, tiny, data, tmp_path
):
    """Saved after a step, it goes on with the next: none is done twice, and none left out."""
    options = {"muon": muon, "folder": tmp_path / "state"}
    weights, losses = trained(name, tiny, data, save_at=save_at, **options)
    resumed, rest = trained(name, tiny, data, torch_seed=8, resume=True, **options)
    assert list(losses) == [1, 2, 3, 4, 5, 6]
    assert rest == {step: losses[step] for step in range(save_at + 1, 7)}
    assert torch.equal(resumed, weights)


def test_a_state_saved_after_the_last_step_needs_no_further_step(tiny, data, tmp_path):
    """A kill may fall between the last step and the end: the average is still put in place."""
    weights, _ = trained("denoiser", tiny, data, save_at=6, folder=tmp_path / "state")
    resumed, rest = trained("denoiser", tiny, data, folder=tmp_path / "state", resume=True)
    assert rest == {}
    assert torch.equal(resumed, weights)


def test_a_state_whose_saving_was_killed_is_none(tiny, data, tmp_path, monkeypatch):
    """Old and new files side by side would go on as a mixture, without an error."""
    trained("clip", tiny, data, save_at=4, folder=tmp_path / "state")

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Accelerator, "save_state", killed)
    with pytest.raises(KeyboardInterrupt):
        save_state(Accelerator(), tmp_path / "state", 5)
    with pytest.raises(ValueError, match="holds no state of this training"):
        trained("clip", tiny, data, folder=tmp_path / "state", resume=True)


def test_one_accelerator_serves_one_training_after_the_other(tiny, data, tmp_path):
    """Its state is that of the training that runs, not of those before."""
    accelerator = Accelerator()
    config = TrainConfig(steps=1, batch_size=8, learning_rate=1e-3)
    sizes = []
    for name in ("denoiser", "clip", "clip"):
        folder = tmp_path / f"{len(sizes)}"
        for step, _ in start(name, tiny, data, config, accelerator=accelerator):
            save_state(accelerator, folder, step)
        sizes.append({path.name: path.stat().st_size for path in folder.iterdir()})
    assert sizes[1] == sizes[2]
    assert sizes[0] != sizes[1]


def test_each_training_has_randomness_of_its_own():
    first_numbers = set()
    for training in ("clip", "autoencoder", "scale_factor", "denoiser"):
        for seed in (0, 1):
            for step in (0, 1):
                generator = ldm._step_generator(seed, training, step)
                first_numbers.add(torch.rand(1, generator=generator).item())
    assert len(first_numbers) == 4 * 2 * 2


# ---- two processes -----------------------------------------------------------------------------


def test_processes_and_their_parts_share_the_batch_out_in_order():
    config = TrainConfig(steps=1, batch_size=12, learning_rate=1e-3, grad_accum_steps=2)
    trainer = Trainer(torch.nn.Linear(2, 1), config, Accelerator())
    rows, letters = torch.arange(12), torch.arange(12) + 100
    parts = []
    for process_index in range(3):
        trainer.accelerator = types.SimpleNamespace(
            num_processes=3,
            process_index=process_index,
            device=torch.device("cpu"),
            accumulate=contextlib.nullcontext,
        )
        parts += list(trainer.micro_batches(rows, letters))
    assert len(parts) == 6
    assert [part[0].tolist() for part in parts] == rows.view(6, 2).tolist()
    assert [part[1].tolist() for part in parts] == letters.view(6, 2).tolist()


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one(folder, data, tmp_path):
    """Also where each computes its half in two parts. Gradients are compared before clipping."""
    expected = first_gradients(data, RecordingAccelerator())
    result = run_in_two_processes(folder, tmp_path / "gradients.pt")
    assert result["processes"] == 2
    for name, gradient in expected.items():
        assert gradient.norm() > 1e-3
        for ours in (result["whole"][name], result["in two parts"][name]):
            assert ((ours - gradient).norm() / gradient.norm()).item() <= 1e-5, name


# ---- recorded ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, parts", [("clip", 1), *((n, p) for n in ("autoencoder", "denoiser") for p in (1, 2))]
)
def test_a_recorded_training_is_the_same_training(name, parts, data, monkeypatch):
    """A GPU runs a CUDA graph of a step's operators; here a tape of the same operators."""
    muon = parts == 1
    config = TrainConfig(9, 8, 1e-3, warmup_steps=1, grad_accum_steps=parts, muon=muon)
    curves, weights, tapes = [], [], []
    for recorded in (False, True):
        model = tiny_model(data)
        model.config = dataclasses.replace(
            model.config, discriminator_start=1, discriminator_head_start=4
        )
        torch.manual_seed(0)  # of the discriminator's first weights
        if recorded:
            tapes = graphs.pretend(monkeypatch, ldm)
        curve = []
        for _, losses in start(name, model, data, config):
            curve.append({key: loss.item() for key, loss in losses.items()})
        curves.append(curve)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    # Of the autoencoder: its step without the discriminator, the discriminator's, and with it.
    calls = [5, 8, 4] if name == "autoencoder" else [9]
    if muon:
        calls.append(9)
    replays = [count * parts - 3 for count in calls]
    assert sorted(tape.replays for tape in tapes) == sorted(replays)
    for ours, expected in zip(curves[1], curves[0]):
        assert ours == pytest.approx(expected, rel=1e-5, abs=1e-6)
    close(weights[1], weights[0], rtol=1e-4, atol=1e-5)


def test_a_recorded_step_makes_no_tensor_of_python_numbers(data, monkeypatch):
    """On a GPU that is a copy, which no graph records. Here with the published form of LPIPS."""
    tapes = graphs.pretend(monkeypatch, ldm)
    config = TrainConfig(steps=5, batch_size=4, learning_rate=1e-3)
    list(train_autoencoder(tiny_model(data), data, config, perceptual=random_lpips()))
    assert [tape.replays for tape in tapes] == [2]


def test_what_cannot_be_recorded_is_launched_kernel_by_kernel(data, monkeypatch):
    def careless(x, y):
        return (x - y).square().mean(dim=(1, 2, 3)) * torch.tensor(2.0)

    config = TrainConfig(steps=6, batch_size=4, learning_rate=1e-3, warmup_steps=1)
    curves = []
    for recorded in (False, True):
        model = tiny_model(data)
        if recorded:
            graphs.pretend(monkeypatch, ldm)
        training = train_autoencoder(model, data, config, perceptual=careless)
        with pytest.warns(UserWarning, match="slower: a tensor of Python") if recorded else QUIET:
            curves.append([losses["l1"].item() for _, losses in training])
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)


def random_lpips():
    """The published LPIPS with random weights, on few enough pixels to be quick."""
    vgg, channels = {}, 3
    for level, width in zip(VGGFeatures.LEVELS, (64, 128, 256, 512, 512)):
        for number in level:
            vgg[f"features.{number}.weight"] = torch.randn(width, channels, 3, 3) / 30
            vgg[f"features.{number}.bias"] = torch.zeros(width)
            channels = width
    widths = enumerate((64, 128, 256, 512, 512))
    return published_lpips(
        vgg, {f"lin{i}.model.1.weight": torch.rand(1, w, 1, 1) for i, w in widths}
    )


# ---- compiled ----------------------------------------------------------------------------------


def course(model, data):
    """The losses of two steps of all three trainings, one after the other."""
    config = TrainConfig(steps=2, batch_size=4, learning_rate=1e-3, warmup_steps=1)
    model.config = dataclasses.replace(
        model.config, discriminator_start=1, discriminator_head_start=0
    )
    torch.manual_seed(0)  # of the discriminator's first weights
    curves = {}
    for name in TRAININGS:
        for step, losses in start(name, model, data, config):
            for key, loss in losses.items():
                curves[f"{name}, step {step}, {key}"] = loss.item()
    return curves


@pytest.mark.slow
def test_training_with_compiled_blocks_is_the_same_training(data, monkeypatch):
    """All of compiling but the writing of kernels: each block traced whole, there and back.

    With fullgraph=True, a block that cannot be traced in one piece is an error.
    """
    compiled = []
    compile_module = torch.nn.Module.compile

    def compile_whole(module, **options):
        compiled.append(type(module).__name__)
        compile_module(module, backend="aot_eager", fullgraph=True, **options)

    few = first(data, 4)  # one batch: captions of one length, so each block is traced once
    expected = course(tiny_model(few), few)
    monkeypatch.setattr(torch.nn.Module, "compile", compile_whole)
    model = tiny_model(few)
    compile_blocks(model)
    torch._dynamo.utils.counters.clear()
    try:
        curves = course(model, few)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    finally:
        torch._dynamo.reset()
    assert set(compiled) == {"ResBlock", "AttentionBlock", "TextBlock", "TransformerBlock"}
    assert graphs >= 4, "nothing was compiled"
    assert curves == pytest.approx(expected, rel=1e-3, abs=1e-4)
