"""The three trainings: each learns, and each step is what the book says it is."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F

from conftest import RecordingAccelerator, clip_of, first, seeded, tiny_model
from ldm_minimal import (
    EMA,
    CaptionedImages,
    Gaussian,
    PatchDiscriminator,
    PerceptualLoss,
    TrainConfig,
    autoencoder_loss,
    clip_loss,
    discriminator_loss,
    embed_all,
    encode_all,
    ldm,
    measure_scale_factor,
    train_autoencoder,
    train_clip,
    train_denoiser,
)

close = torch.testing.assert_close
ONE_STEP = TrainConfig(steps=1, batch_size=8, learning_rate=1e-3, warmup_steps=1)


def losses_of(training, name):
    return [losses[name].item() for _, losses in training]


def flat_gradient(loss, module):
    gradients = torch.autograd.grad(loss, list(module.parameters()))
    return torch.cat([gradient.flatten() for gradient in gradients])


def relative_error(ours, expected):
    return ((ours - expected).norm() / expected.norm()).item()


# ---- each training overfits one batch ----------------------------------------------------------


def test_clip_tells_eight_images_apart(tiny, data):
    few, clip = first(data, 8), clip_of(tiny)
    config = TrainConfig(steps=80, batch_size=8, learning_rate=1e-2, warmup_steps=5)
    curve = losses_of(train_clip(clip, few, config), "clip")
    assert curve[0] > 1.5  # log 8 = 2.08 is chance
    assert curve[-1] < 0.1
    with torch.no_grad():
        images, texts, _ = clip(few.batch(slice(0, 8)), clip.tokenizer(few.captions))
    assert (images @ texts.T).argmax(dim=1).tolist() == list(range(8))


def test_autoencoder_restores_eight_images(tiny, data):
    few = first(data, 8)
    x = few.batch(slice(0, 8))
    config = TrainConfig(steps=60, batch_size=8, learning_rate=3e-3, warmup_steps=5)

    @torch.no_grad()
    def error():
        return (tiny.autoencoder(x)[0] - x).square().mean().item()

    before = error()
    steps = [terms for _, terms in train_autoencoder(tiny, few, config)]
    assert error() < before / 8  # seeds 0 and 1: a 17th
    # The discriminator joins at step 20, not one step earlier, and is heard three steps later.
    assert ["discriminator" in terms for terms in steps] == [False] * 20 + [True] * 40
    assert ["adversarial" in terms for terms in steps] == [False] * 23 + [True] * 37


@pytest.mark.slow
def test_denoiser_learns_eight_latents(tiny, data):
    few = first(data, 8)
    config = TrainConfig(steps=60, batch_size=8, learning_rate=6e-3, warmup_steps=5)
    torch.nn.init.zeros_(tiny.unet.conv_out.weight)
    measure_scale_factor(tiny, few)
    curve = losses_of(train_denoiser(tiny, few, config), "mse")
    assert 0.8 < sum(curve[:3]) / 3 < 1.2  # it starts by predicting no noise: E eps^2 = 1
    assert sum(curve[-15:]) / 15 < 0.5  # seeds 0 and 1: 0.28 and 0.31


def test_only_its_own_part_is_trained(tiny, data):
    before = {name: value.clone() for name, value in tiny.state_dict().items()}
    config = TrainConfig(steps=2, batch_size=8, learning_rate=1e-2)
    for train, part in ((train_autoencoder, "autoencoder"), (train_denoiser, "unet")):
        model = copy.deepcopy(tiny)
        list(train(model, data, config))
        changed = set()
        for name, value in model.state_dict().items():
            if not torch.equal(value, before[name]):
                changed.add(name.split(".")[0])
        assert changed == {part}


# ---- one step, by hand -------------------------------------------------------------------------
# The gradient of the first step, before it is clipped, against plain code that draws the same
# numbers in the same order.


@pytest.mark.parametrize("paired", [False, True])
def test_a_step_of_clip_by_hand(tiny, data, paired):
    rows = [{"text": text, "pair": i // 2} for i, text in enumerate(data.captions)]
    data = CaptionedImages(data.images, data.captions, rows if paired else None)
    clip, expected = clip_of(tiny), clip_of(copy.deepcopy(tiny))
    accelerator = RecordingAccelerator()
    training = train_clip(clip, data, ONE_STEP, seed=3, accelerator=accelerator)
    _, losses = next(training)

    generator = ldm._step_generator(3, "clip", 0)
    if paired:
        pairs = torch.randperm(len(data) // 2, generator=generator)[:4].tolist()
        rows = [row for pair in pairs for row in (2 * pair, 2 * pair + 1)]
    else:
        rows = torch.randperm(len(data), generator=generator)[:8].tolist()
    x = data.images[rows].float() / 127.5 - 1
    tokens = tiny.tokenizer([data.captions[i] for i in rows])
    loss = clip_loss(
        F.normalize(expected.image_encoder(x), dim=-1), expected.text_features(tokens), 1 / 0.07
    )
    assert losses["clip"].item() == pytest.approx(loss.item(), rel=1e-4)
    scale = expected.image_encoder.logit_scale  # it is learnt, too: its own part of the gradient
    images, texts, _ = expected(x, tokens)
    gradient = flat_gradient(clip_loss(images, texts, scale.exp()), expected)
    assert relative_error(accelerator.gradients[0], gradient) < 1e-3


@pytest.mark.parametrize(("start", "head_start"), [(0, 0), (0, 1), (1, 0)])
@pytest.mark.parametrize("limit", [1e4, 0.01])
def test_a_step_of_the_autoencoder_by_hand(tiny, data, start, head_start, limit):
    tiny.config = dataclasses.replace(
        tiny.config,
        discriminator_start=start,
        discriminator_head_start=head_start,
        adversarial_limit=limit,
        kl_weight=0.03,
        perceptual_weight=0.2,
        adversarial_weight=0.7,
    )
    expected, discriminator = copy.deepcopy(tiny), PatchDiscriminator(8, 1)
    expected_discriminator = copy.deepcopy(discriminator)
    accelerator = RecordingAccelerator()
    options = {"discriminator": discriminator, "seed": 3, "accelerator": accelerator}
    _, terms = next(train_autoencoder(tiny, data, ONE_STEP, **options))

    generator = ldm._step_generator(3, "autoencoder", 0)
    rows = torch.randperm(len(data), generator=generator)[:8]
    eps = torch.randn(8, 4, 8, 8, generator=generator)
    x = data.images[rows].float() / 127.5 - 1
    autoencoder = expected.autoencoder
    posterior = autoencoder.encode(x)
    x_hat = autoencoder.decode(posterior.mean + (posterior.logvar / 2).exp() * eps)
    joined = start == 0
    heard = start + head_start == 0
    loss, expected_terms = autoencoder_loss(
        x,
        x_hat,
        posterior,
        PerceptualLoss(expected.image_encoder.features),
        expected_discriminator if heard else None,
        autoencoder.decoder[-1].weight,
        adversarial_limit=limit,
        kl_weight=0.03,
        perceptual_weight=0.2,
        adversarial_weight=0.7,
    )
    gradients = [flat_gradient(loss, autoencoder)]
    if joined:
        real, restored = expected_discriminator(x), expected_discriminator(x_hat.detach())
        their_loss = discriminator_loss(real, restored)
        expected_terms["discriminator"] = their_loss.detach()
        gradients.append(flat_gradient(their_loss, expected_discriminator))
    assert len(accelerator.gradients) == len(gradients)
    for ours, expected_gradient in zip(accelerator.gradients, gradients):
        assert relative_error(ours, expected_gradient) < 1e-3
    assert terms.keys() == expected_terms.keys()
    for name, term in terms.items():
        assert term.item() == pytest.approx(expected_terms[name].item(), rel=1e-3), name


@pytest.mark.parametrize("snr_clip", [None, 1e9, 1.0])
def test_a_step_of_the_denoiser_by_hand(tiny, data, snr_clip):
    tiny.config = dataclasses.replace(tiny.config, snr_clip=snr_clip)
    expected = copy.deepcopy(tiny)
    accelerator = RecordingAccelerator()
    options = {"caption_dropout": 0.5, "seed": 3, "accelerator": accelerator}
    _, losses = next(train_denoiser(tiny, data, ONE_STEP, **options))

    generator = ldm._step_generator(3, "denoiser", 0)
    rows = torch.randperm(len(data), generator=generator)[:8]
    t = torch.randint(1000, (8,), generator=generator)
    dropped = torch.rand(8, generator=generator) < 0.5
    eps_posterior, eps = torch.randn(2, 8, 4, 8, 8, generator=generator)
    captions = []
    for row, drop in zip(rows, dropped):
        captions.append("" if drop else data.captions[row])
    with torch.no_grad():
        context = expected.embed(captions)
        posterior = expected.autoencoder.encode(data.images[rows].float() / 127.5 - 1)
    z = 0.5 * (posterior.mean + (posterior.logvar / 2).exp() * eps_posterior)
    a = expected.schedule.alpha_bars[t].float()
    per_image = a.view(-1, 1, 1, 1)
    z_t = per_image.sqrt() * z + (1 - per_image).sqrt() * eps
    error = (expected.unet(z_t, t, context) - eps).square().mean(dim=(1, 2, 3))
    snr = a / (1 - a)
    weight = torch.ones(8) if snr_clip is None else snr.clamp(max=snr_clip) / snr
    gradient = flat_gradient((weight * error).mean(), expected.unet)
    # Contexts are kept in half precision, which has three digits.
    assert relative_error(accelerator.gradients[0], gradient) < 1e-2
    assert losses["mse"].item() == pytest.approx(error.mean().item(), rel=1e-3)


@pytest.mark.parametrize("train", [train_autoencoder, train_denoiser])
def test_a_batch_in_parts_is_the_same_step(train, data):
    """Gradients of a batch computed in four parts are those of the whole, averaged, not summed.

    Rounding of real CPUs and threads makes a relative error of at most 1.1e-6, artificial noise
    5.9e-6. Gradients that are summed make 3, and a loss wrong by 0.1 % makes 1e-3.
    """
    recorded, losses = [], []
    for grad_accum_steps in (1, 4):
        model = tiny_model(data)
        # The adaptive weight is each part's own, so the adversarial loss is left out of the sum.
        model.config = dataclasses.replace(
            model.config, discriminator_start=0, discriminator_head_start=0, adversarial_weight=0.0
        )
        torch.manual_seed(0)  # of the discriminator's first weights
        accelerator = RecordingAccelerator()
        config = dataclasses.replace(ONE_STEP, grad_accum_steps=grad_accum_steps)
        _, step_losses = next(train(model, data, config, accelerator=accelerator))
        step_losses.pop("weight", None)
        recorded.append(accelerator.gradients)
        losses.append({name: loss.item() for name, loss in step_losses.items()})
    whole, in_parts = recorded
    assert len(whole) == len(in_parts) == (2 if train is train_autoencoder else 1)
    for of_whole, of_parts in zip(whole, in_parts):
        assert of_whole.norm() > 1e-3
        assert relative_error(of_parts, of_whole) < 1e-4
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


# ---- what each network is given ----------------------------------------------------------------


def inputs_of(module, training):
    """What the module is called with, a tuple for each call, while the training runs."""
    seen = []

    def called(module, inputs):
        seen.append(inputs)

    hook = module.register_forward_pre_hook(called)
    list(training)
    hook.remove()
    return seen


@pytest.mark.parametrize("name", ["clip", "autoencoder", "denoiser"])
def test_every_step_draws_its_batch_and_its_noise_anew(name, tiny, data):
    config = TrainConfig(steps=3, batch_size=8, learning_rate=1e-9)
    if name == "clip":
        seen = inputs_of(tiny.image_encoder, train_clip(clip_of(tiny), data, config))
    elif name == "autoencoder":
        seen = inputs_of(tiny.autoencoder, train_autoencoder(tiny, data, config))
    else:
        seen = inputs_of(tiny.unet, train_denoiser(tiny, data, config))
    steps = list(zip(*seen))  # for each input of the network, its values at the three steps
    assert len(seen) == 3
    for values in steps:
        for i in range(3):
            for j in range(i):
                assert not torch.equal(values[i], values[j])


def test_the_denoiser_is_trained_on_scaled_latents(tiny, data):
    """One image many times, so that its latent is known; with a large factor z_t is nearly z."""
    repeated = CaptionedImages(data.images[:1].repeat(8, 1, 1, 1), data.captions[:1] * 8)
    tiny.config = dataclasses.replace(tiny.config, scale_factor=1e4)
    torch.nn.init.constant_(tiny.autoencoder.to_moments.bias[4:], -30.0)  # no spread: z is the mean
    with torch.no_grad():
        mean = tiny.autoencoder.encode(repeated.batch(slice(0, 1))).mean[0]
    ((z_t, t, _),) = inputs_of(tiny.unet, train_denoiser(tiny, repeated, ONE_STEP))
    for i in range(8):
        signal = tiny.schedule.alpha_bars[t[i]].sqrt().item()
        assert relative_error(z_t[i], signal * 1e4 * mean) < 0.01 / signal


def test_caption_dropout_replaces_captions_by_the_empty_one(tiny, data):
    """Each image keeps its own caption or gets the empty one; what is shown is in its caption."""
    same_image = CaptionedImages(data.images[:1].repeat(24, 1, 1, 1), data.captions[:24])
    config = dataclasses.replace(ONE_STEP, batch_size=24)
    with torch.no_grad():
        empty = tiny.embed([""])[0]
        own = tiny.embed(same_image.captions)
    for dropout in (0.0, 0.5, 1.0):
        model = copy.deepcopy(tiny)
        training = train_denoiser(model, same_image, config, caption_dropout=dropout)
        ((_, _, contexts),) = inputs_of(model.unet, training)
        is_empty = [torch.allclose(context, empty, atol=2e-3) for context in contexts]
        is_a_caption = [bool((own - c).abs().amax(dim=(1, 2)).min() < 2e-3) for c in contexts]
        assert all(a != b for a, b in zip(is_empty, is_a_caption))
        if dropout == 0.5:
            assert 4 <= sum(is_empty) <= 20  # of 24; outside once in 2,500 seeds
        else:
            assert sum(is_empty) == 24 * dropout


class Brightness(torch.nn.Module):
    """A discriminator with one weight: its logit is weight x the image's mean."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return self.weight * x.mean(dim=(1, 2, 3))


def test_the_discriminator_learns_that_data_are_real(tiny):
    """Data are white, with mean 1; so what is restored has a lower mean, m.

    The loss is (relu(1 - weight) + relu(1 + weight m)) / 2, and its gradient m / 2 for weight 2.
    Whatever the autoencoder's own step left in the discriminator's gradient would be added to it.
    """
    white = CaptionedImages(torch.full((8, 3, 16, 16), 255, dtype=torch.uint8), ["white"] * 8)
    tiny.config = dataclasses.replace(
        tiny.config, discriminator_start=0, discriminator_head_start=0
    )
    discriminator, accelerator = Brightness(), RecordingAccelerator()
    options = {"discriminator": discriminator, "accelerator": accelerator}
    seen = inputs_of(discriminator, train_autoencoder(tiny, white, ONE_STEP, **options))
    (x_hat,), (pair,) = seen
    m = x_hat.mean().item()
    assert -0.5 < m < 0.9
    assert torch.equal(pair[8:], x_hat)
    assert accelerator.gradients[1].item() == pytest.approx(m / 2, rel=1e-4)


def test_the_perceptual_loss_compares_features_of_the_models_own_image_encoder(tiny, data):
    """And its weights, which are not trained here, get no gradient."""
    list(train_autoencoder(tiny, data, ONE_STEP))
    assert all(p.grad is None for p in tiny.image_encoder.parameters())
    assert not any(p.requires_grad for p in tiny.image_encoder.parameters())


# ---- the frozen parts, computed once -----------------------------------------------------------


@torch.no_grad()
def test_encode_all_gives_means_then_log_variances(tiny, data):
    posterior = tiny.autoencoder.encode(data.batch(slice(0, 12)))
    moments = encode_all(tiny, data, count=12, batch_size=5)
    assert moments.shape == (12, 8, 8, 8)
    close(Gaussian(moments).mean, posterior.mean, atol=1e-4, rtol=0)
    close(Gaussian(moments).logvar, posterior.logvar, atol=1e-4, rtol=0)
    assert len(encode_all(tiny, data)) == len(data)


@torch.no_grad()
def test_embed_all_gives_each_caption_its_context(tiny, data):
    contexts, empty = embed_all(tiny, data.captions[:12], batch_size=5)
    assert contexts.dtype == torch.float16
    close(contexts.float(), tiny.embed(data.captions[:12]), atol=2e-3, rtol=0)
    close(empty, tiny.embed([""]))


def test_scale_factor_gives_unit_variance(tiny, data):
    """Of samples: their variance is that of the means plus the mean variance."""
    torch.nn.init.constant_(tiny.autoencoder.to_moments.bias[4:], 0.0)  # both count
    tiny.config = dataclasses.replace(tiny.config, scale_factor=None)
    with pytest.raises(ValueError, match="scale_factor is not measured"):
        _ = tiny.scale_factor
    factor = measure_scale_factor(tiny, data)
    assert tiny.config.scale_factor == factor
    posterior = Gaussian(encode_all(tiny, data))
    variance = posterior.mean.var() + posterior.logvar.exp().mean()
    assert posterior.mean.var() < 0.95 * variance
    assert factor == pytest.approx(variance.item() ** -0.5, rel=0.01)
    z = factor * posterior.sample(torch.randn(posterior.mean.shape, generator=seeded(1)))
    assert z.std().item() == pytest.approx(1, abs=0.01)


# ---- the average of the denoiser's weights -----------------------------------------------------


def test_the_average_follows_each_step_of_the_optimizer(tiny, data):
    """After one step it is 0.1 of the weights before and 0.9 of those after: decay 1 / 10."""
    before = tiny.unet.conv_in.weight.detach().clone()
    ema = EMA(tiny.unet)
    next(train_denoiser(tiny, data, ONE_STEP, ema=ema))
    after = tiny.unet.conv_in.weight.detach()
    assert (after - before).abs().max() > 1e-4
    close(ema.module.conv_in.weight, 0.1 * before + 0.9 * after, rtol=0, atol=1e-7)


def test_denoiser_ends_with_the_averaged_weights(tiny, data):
    ema = EMA(tiny.unet)
    config = TrainConfig(steps=5, batch_size=8, learning_rate=3e-3, warmup_steps=1)
    for step, _ in train_denoiser(tiny, data, config, ema=ema):
        if step == 5:
            raw = tiny.unet.conv_in.weight.detach().clone()
    assert torch.equal(tiny.unet.conv_in.weight, ema.module.conv_in.weight)
    assert not torch.equal(tiny.unet.conv_in.weight, raw)


# ---- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize("train", [train_clip, train_autoencoder, train_denoiser])
def test_a_batch_larger_than_the_data_is_refused(train, tiny, data):
    module = clip_of(tiny) if train is train_clip else tiny
    config = dataclasses.replace(ONE_STEP, batch_size=16)
    with pytest.raises(ValueError, match="batch_size is 16; allowed are .* up to the 8 images"):
        next(train(module, first(data, 8), config))


def test_a_batch_that_cannot_be_cut_into_its_parts_is_refused(tiny, data):
    config = dataclasses.replace(ONE_STEP, grad_accum_steps=3)
    with pytest.raises(ValueError, match="batch_size is 8; allowed are multiples of 3"):
        next(train_denoiser(tiny, data, config))


def test_clip_takes_its_batch_whole(tiny, data):
    """Each image meets all captions of its batch: parts of it would be another loss."""
    config = dataclasses.replace(ONE_STEP, grad_accum_steps=4)
    (seen,) = inputs_of(tiny.image_encoder, train_clip(clip_of(tiny), data, config))
    assert len(seen[0]) == 8
