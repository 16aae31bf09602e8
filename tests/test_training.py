"""The three trainings: each learns, each is repeatable, and two processes compute what one does."""

import copy
import dataclasses
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import ROOT, TINY, tiny_model

from ldm_minimal import (CLIP, EMA, Gaussian, Stage, Trainee, encode_all, measure_scale_factor, train_autoencoder, train_clip,
                         ldm, train_denoiser)


def first(data, count):
    """The first `count` pictures as a data set of their own."""
    few = copy.copy(data)
    few.images, few.captions, few.rows = data.images[:count], data.captions[:count], data.rows[:count]
    return few


def clip_of(model):
    return CLIP(model.tokenizer, model.text_encoder, model.image_encoder)


def losses(training, name):
    return [step_losses[name].item() for _, step_losses in training]


# ---- each stage overfits one batch ----

def test_clip_tells_eight_pictures_apart(tiny, data):
    few, clip = first(data, 8), clip_of(tiny)
    curve = losses(train_clip(clip, few, Stage(80, 8, 1e-2, 5)), "clip")
    assert curve[0] > 1.5 and curve[-1] < 0.1  # log 8 = 2.08 is chance
    with torch.no_grad():
        images, texts, _ = clip(few.pictures(slice(0, 8)), clip.tokenizer(few.captions))
    assert (images @ texts.T).argmax(dim=1).tolist() == list(range(8))


def test_the_text_tower_learns_at_a_tenth_of_the_rate(tiny, data):
    """Adam's first step moves a weight by the rate, whatever its gradient: the largest moves show both rates."""
    clip = clip_of(tiny)
    before = copy.deepcopy(clip)
    next(train_clip(clip, data, Stage(1, 8, 1e-3, warmup=1)))
    moved = lambda part: max((p - q).abs().max().item() for p, q in zip(  # noqa: E731
        getattr(clip, part).parameters(), getattr(before, part).parameters()))
    assert moved("image_encoder") == pytest.approx(1e-3, rel=0.05)
    assert moved("text_encoder") == pytest.approx(1e-4, rel=0.05)


@pytest.mark.parametrize("train", [train_autoencoder, train_denoiser])
def test_a_batch_in_parts_is_the_same_step(train, data):
    """Gradients of four parts add up to those of the whole: but for the last digits, the weights are the same after three steps."""
    models, logs = [], []
    for parts in (1, 4):
        model = tiny_model(data)
        model.config = dataclasses.replace(model.config, adversarial_start=1, adversarial_weight=0.0)  # its weight is each part's own
        torch.manual_seed(0)
        logs.append([{k: v.item() for k, v in step.items()} for _, step in train(model, data, Stage(3, 8, 1e-3, 1, parts))])
        models.append(model)
    trained = "autoencoder" if train is train_autoencoder else "unet"
    for (name, one), four in zip(getattr(models[0], trained).named_parameters(), getattr(models[1], trained).parameters()):
        torch.testing.assert_close(one, four, rtol=0, atol=2e-4, msg=lambda m: f"{name}: {m}")  # noqa: B023  Adam turns tiny gradients into whole steps
    for one, four in zip(*logs):
        assert {k: pytest.approx(v, rel=1e-3, abs=1e-4) for k, v in one.items() if k != "weight"} == {k: v for k, v in four.items() if k != "weight"}


def test_autoencoder_restores_eight_pictures(tiny, data):
    few = first(data, 8)
    x = few.pictures(slice(0, 8))
    with torch.no_grad():
        before = (tiny.autoencoder(x)[0] - x).square().mean().item()
    curve = [parts for _, parts in train_autoencoder(tiny, few, Stage(150, 8, 3e-3, 5))]
    with torch.no_grad():
        after = (tiny.autoencoder(x)[0] - x).square().mean().item()
    assert after < before / 10
    # The discriminator joins at step adversarial_start, not one step earlier.
    assert ["adversarial" in parts for parts in curve] == [step >= TINY.adversarial_start for step in range(150)]


def test_denoiser_learns_eight_latents(tiny, data):
    few, stage = first(data, 8), Stage(150, 8, 3e-3, 5)
    torch.nn.init.zeros_(tiny.unet.conv_out.weight)
    measure_scale_factor(tiny, few)
    curve = losses(train_denoiser(tiny, few, stage), "mse")
    assert 0.8 < sum(curve[:3]) / 3 < 1.2  # it starts by predicting no noise: E eps^2 = 1
    assert sum(curve[-20:]) / 20 < 0.5


@pytest.mark.parametrize("clip", [None, 1e9, 1.0])
def test_errors_weigh_the_clipped_signal_to_noise_ratio(tiny, data, clip, monkeypatch):
    """With a U-Net that predicts no noise the error of a picture is the mean of its eps^2: the loss is known beforehand."""
    tiny.config = dataclasses.replace(tiny.config, snr_clip=clip)
    torch.nn.init.zeros_(tiny.unet.conv_out.weight)
    torch.nn.init.zeros_(tiny.unet.conv_out.bias)
    seen, backward = [], Trainee.backward
    monkeypatch.setattr(Trainee, "backward", lambda self, loss: seen.append(loss.item()) or backward(self, loss))
    _, losses = next(train_denoiser(tiny, data, Stage(1, 16, 1e-3), seed=3))
    random = ldm._step_generator(3, 3, 0)
    torch.randperm(len(data), generator=random)
    t = torch.randint(tiny.schedule.T, (16,), generator=random)
    torch.rand(16, generator=random)
    error = torch.randn(2, 16, 4, 8, 8, generator=random)[1].square().mean(dim=(1, 2, 3))
    ratio = tiny.schedule.alpha_bars[t] / (1 - tiny.schedule.alpha_bars[t])
    weight = torch.minimum(ratio, torch.tensor(clip)) / ratio if clip else torch.ones(16)
    assert seen[0] == pytest.approx((weight * error).mean().item(), rel=1e-5)
    assert losses["mse"].item() == pytest.approx(error.mean().item(), rel=1e-5)


def test_scale_factor_gives_unit_variance(tiny, data):
    tiny.config = dataclasses.replace(tiny.config, scale_factor=None)
    with pytest.raises(ValueError, match="scale_factor is not measured"):
        tiny.scale_factor
    factor = measure_scale_factor(tiny, data)
    posterior = Gaussian(encode_all(tiny, data))
    z = factor * posterior.sample(torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(1)))
    assert z.std().item() == pytest.approx(1, abs=0.01)
    assert tiny.config.scale_factor == factor


# ---- the parts ----

def test_learning_rate_warms_up_then_falls_to_a_fiftieth():
    stage = Stage(steps=1000, batch=1, learning_rate=2.0, warmup=100)
    rates = [stage.rate(step) for step in range(1001)]
    assert rates[0] == pytest.approx(0.02) and max(rates) == pytest.approx(2.0) and rates[1000] == pytest.approx(0.04)
    assert all(a < b for a, b in zip(rates[:99], rates[1:100])) and all(a > b for a, b in zip(rates[100:], rates[101:]))


def test_trainee_uses_the_rate_and_clips_the_gradient():
    layer = torch.nn.Linear(2, 1, bias=False)
    trainee = Trainee(layer, Stage(10, 1, 0.5, warmup=5), Accelerator())
    seen = []
    trainee.optimizer.optimizer.register_step_pre_hook(lambda *_: seen.append(layer.weight.grad.norm().item()))
    trainee.backward(1000 * trainee.net(torch.ones(1, 2)).sum())
    trainee.step(1)
    assert seen == [pytest.approx(1.0, rel=1e-4)]
    assert trainee.optimizer.param_groups[0]["lr"] == pytest.approx(0.2)


def test_ema_follows_its_definition():
    module = torch.nn.Linear(3, 3)
    ema, expected = EMA(module, decay=0.9), module.weight.detach().clone()
    for step in range(200):
        with torch.no_grad():
            module.weight.add_(torch.randn(3, 3, generator=torch.Generator().manual_seed(step)))
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * module.weight.detach()
        ema.update(module, step)
    torch.testing.assert_close(ema.module.weight, expected)
    assert not ema.module.weight.requires_grad


def test_denoiser_ends_with_the_averaged_weights(tiny, data):
    seen = {}
    training = train_denoiser(tiny, data, Stage(5, 8, 3e-3, 1), resume=lambda parts: seen.update(parts) or 0)
    for step, _ in training:
        if step == 5:
            raw = tiny.unet.conv_in.weight.detach().clone()
    torch.testing.assert_close(tiny.unet.conv_in.weight, seen["ema"].conv_in.weight, rtol=0, atol=0)
    assert not torch.equal(tiny.unet.conv_in.weight, raw)


def test_caption_dropout_decides_what_the_unet_is_told(tiny, data):
    """With every caption dropped the context is that of the empty caption; with none dropped it never is."""
    empty = tiny.embed([""])
    for dropout, dropped in [(1.0, True), (0.0, False)]:
        model, seen = copy.deepcopy(tiny), []
        model.unet.register_forward_pre_hook(lambda module, args: seen.append(args[2]))
        next(train_denoiser(model, data, Stage(1, 8, 1e-3), caption_dropout=dropout))
        same = [F.mse_loss(context, empty[0]).item() < 1e-6 for context in seen[0]]
        assert same == [dropped] * 8


def test_only_its_own_part_is_trained(tiny, data):
    before = {name: value.clone() for name, value in tiny.state_dict().items()}
    parts = {"autoencoder": lambda m: train_autoencoder(m, data, Stage(2, 8, 1e-2)),
             "unet": lambda m: train_denoiser(m, data, Stage(2, 8, 1e-2))}
    for part, training in parts.items():
        model = copy.deepcopy(tiny)
        list(training(model))
        changed = {name.split(".")[0] for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert changed == {part}


# ---- repeatable ----

TRAININGS = {
    "clip": lambda m, data, seed, resume: train_clip(clip_of(m), data, Stage(6, 8, 3e-3, 2), seed=seed, resume=resume),
    "autoencoder": lambda m, data, seed, resume: train_autoencoder(m, data, Stage(6, 8, 3e-3, 2), seed=seed, resume=resume),
    "denoiser": lambda m, data, seed, resume: train_denoiser(m, data, Stage(6, 8, 3e-3, 2), seed=seed, resume=resume),
}


def weights_after(name, tiny, data, seed=0, stop=None, state=None):
    """Train a copy of `tiny`, from `state` if given; returns its weights, and the state after `stop` steps."""
    model, parts, kept = copy.deepcopy(tiny), {}, None
    model.config = dataclasses.replace(model.config, adversarial_start=2)
    torch.manual_seed(7)  # of the discriminator's first weights

    def resume(stateful):
        parts.update(stateful)
        for key, value in (state or {}).items():
            stateful[key].load_state_dict(copy.deepcopy(value))
        return stop if state else 0
    for step, _ in TRAININGS[name](model, data, seed, resume):
        if step == stop:
            kept = copy.deepcopy({key: part.state_dict() for key, part in parts.items()})
    return torch.cat([p.detach().flatten() for p in model.parameters()]), kept


@pytest.mark.parametrize("name", TRAININGS)
def test_a_seed_decides_everything_and_a_resumed_run_is_the_same_run(name, tiny, data):
    whole, state = weights_after(name, tiny, data, stop=3)
    again, _ = weights_after(name, tiny, data)
    resumed, _ = weights_after(name, tiny, data, stop=3, state=state)
    other, _ = weights_after(name, tiny, data, seed=1)
    assert torch.equal(whole, again) and torch.equal(whole, resumed)
    assert not torch.equal(whole, other)


def test_a_batch_larger_than_the_data_is_refused(tiny, data):
    with pytest.raises(ValueError, match="batch is 16; allowed are .* up to the 8 pictures"):
        next(train_denoiser(tiny, first(data, 8), Stage(1, 16, 1e-3)))


# ---- compiled ----

@pytest.mark.slow
def test_compiled_training_is_the_same_training(data):
    """All of `--compile` but the writing of kernels: the networks traced, forwards and backwards, through all stages."""
    def course(backend):
        AcceleratorState._reset_state(True)  # else a second Accelerator is the first once more
        model, accelerator = tiny_model(data), Accelerator(cpu=True, dynamo_backend=backend)
        model.config = dataclasses.replace(model.config, adversarial_start=1)
        torch.manual_seed(0)
        kept = [losses(train_clip(clip_of(model), data, Stage(3, 8, 1e-3, 1), accelerator=accelerator), "clip")]
        steps = [step for _, step in train_autoencoder(model, data, Stage(3, 4, 1e-3, 1), accelerator=accelerator)]
        kept += [[step[name].item() for step in steps if name in step] for name in ("l1", "weight")]
        return kept + [losses(train_denoiser(model, data, Stage(3, 4, 1e-3, 1), accelerator=accelerator), "mse")]

    try:
        eager = course(None)
        torch._dynamo.utils.counters.clear()
        compiled = course("aot_eager")
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 4, "nothing was compiled"
    finally:
        AcceleratorState._reset_state(True)
        torch._dynamo.reset()
    for before, now in zip(eager, compiled):
        assert now == pytest.approx(before, rel=1e-3)


# ---- two processes ----

def gradients(folder, out, processes):
    """The gradients of one step of each training on a global batch of 8, shared by `processes`, from tests/gradients.py."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    command = (launch if processes > 1 else [sys.executable]) + [str(ROOT / "tests" / "gradients.py"), str(folder), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(out, weights_only=True)


def test_two_processes_have_the_gradients_of_one(folder, tmp_path):
    one, two = gradients(folder, tmp_path / "one.pt", 1), gradients(folder, tmp_path / "two.pt", 2)
    assert one["processes"] == 1 and two["processes"] == 2
    for name in ("denoiser", "clip"):
        assert one[name].norm() > 1e-3
        assert (one[name] - two[name]).norm() <= 1e-5 * one[name].norm(), name
