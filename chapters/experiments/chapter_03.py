"""Chapter 3: autoencoders that differ in one term of the loss, or in the weight of one."""

import dataclasses
from functools import partial

import torch
from accelerate import Accelerator
from torch import nn

import common
from book import load_data, load_evaluator, load_model, load_recipe
from ldm_minimal import NAMED_SIZES as TODAY
from ldm_minimal import (
    Autoencoder,
    PatchDiscriminator,
    PerceptualLoss,
    autoencoder_loss,
    discriminator_loss,
    train_autoencoder,
)
from ldm_minimal.metrics import load_lpips, prompt_accuracy, psnr

SHAPES = load_recipe()  # of version 1; today's is TODAY["shapes"]


# The chapter shows this definition; tests/test_experiments.py compares them.
def train(net, draw, steps, objective, discriminator=None, start=0, sampled=True, rate=1.5e-3):
    """Yields the terms of each step's loss. The discriminator joins at step `start`.

    sampled: z is drawn from the posterior; otherwise it is the mean.
    """
    optimizers = [torch.optim.AdamW(net.parameters(), rate, betas=(0.9, 0.99))]
    if discriminator is not None:
        optimizers.append(torch.optim.AdamW(discriminator.parameters(), rate, betas=(0.9, 0.99)))
    for step in range(steps):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / 50) * (1.02 - step / steps)
        x = draw(16)
        x_hat, posterior = net(x, torch.randn(16, 4, 8, 8) if sampled else None)
        joined = discriminator if step >= start else None
        loss, terms = objective(x, x_hat, posterior, discriminator=joined)
        optimizers[0].zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizers[0].step()
        if joined is not None:
            loss = discriminator_loss(discriminator(x), discriminator(x_hat.detach()))
            terms["discriminator"] = loss
            optimizers[1].zero_grad()
            loss.backward()
            optimizers[1].step()
        yield {name: term.item() for name, term in terms.items()}


def features_distance():
    """The perceptual distance by the shipped model's image encoder."""
    return PerceptualLoss(load_model().image_encoder.requires_grad_(False).features)


def objective(kl_weight=0.0, perceptual=None):
    """autoencoder_loss with the weights of size shapes."""
    return partial(
        autoencoder_loss,
        perceptual=perceptual,
        kl_weight=kl_weight,
        perceptual_weight=SHAPES.perceptual_weight,
        adversarial_weight=SHAPES.adversarial_weight,
    )


def squared_error(x, x_hat, posterior, discriminator):
    loss = (x - x_hat).square().sum(dim=(1, 2, 3)).mean()
    return loss, {"l1": (x - x_hat).abs().mean()}


def new_autoencoder():
    """Of seed 0. The layers draw their weights in the order in which they did for the results."""
    net = Autoencoder(SHAPES.autoencoder)
    parts = [*net.encoder[:-6], *net.decoder[:-3], *net.encoder[-6:], net.to_moments]
    parts += [net.from_latent, *net.decoder[-3:]]
    torch.manual_seed(0)
    for part in parts:
        for layer in part.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                layer.reset_parameters()
    nn.init.constant_(net.to_moments.bias[net.latent_channels :], -6.0)
    return net


def new_training(steps, loss, start=None, sampled=True):
    """A new autoencoder and the generator that trains it. start None: no discriminator."""
    draw = common.batches(load_data("train"))
    net = new_autoencoder()
    if start is None:
        return net, train(net, draw, steps, loss, sampled=sampled)
    discriminator = PatchDiscriminator(32, 2)
    loss = partial(loss, last_layer=net.last_layer)
    return net, train(net, draw, steps, loss, discriminator, start)


def scores(net):
    """The scores on 256 test images, and these images restored."""
    test = load_data("test")
    return common.restoration_scores(net.eval(), test.batch(slice(0, 256)), test.rows[:256])


def curve(history, name):
    """The means of every 20 steps of a term; None where it was not there yet."""
    return common.means([terms.get(name) for terms in history], 20)


@common.experiment("03/losses", steps=1200)
def losses(steps):
    """Term by term: six autoencoders of equal steps; curves, scores and restored images of each."""
    whole = objective(1e-6, features_distance())
    variants = {  # the loss, whether z is sampled, the first step of the discriminator
        "$L_2$": (squared_error, False, None),
        "$L_1$": (objective(), False, None),
        "+ KL": (objective(1e-6), True, None),
        "+ perceptual": (whole, True, None),
        "+ adversarial": (whole, True, steps // 2),
        "adversarial from step 0": (whole, True, 0),
    }
    found = {}
    tiles = [load_data("test").batch(slice(0, 6))]
    for name, (loss, sampled, start) in variants.items():
        net, training = new_training(steps, loss, start, sampled)
        history = list(training)
        found[name], x_hat = scores(net)
        found[name]["curves"] = {term: curve(history, term) for term in history[-1]}
        tiles.append(x_hat[:6])
        print(name, found[name]["psnr"])
    return {"at": list(range(10, steps, 20)), "variants": found}, torch.cat(tiles)


@common.beginning("03/losses")
def twenty_steps_of_l1(record):
    _, training = new_training(record["steps"], objective(), sampled=False)
    now = common.first_mean((terms["l1"] for terms in training), 20)
    return [now], record["variants"]["$L_1$"]["curves"]["l1"][:1]


@common.experiment("03/fixed", steps=1200, weight=5000.0)
def fixed_weight(steps, weight):
    """The discriminator from the first step, and its weight fixed instead of adaptive."""
    reconstruction = objective(1e-6, features_distance())

    def loss(x, x_hat, posterior, discriminator, last_layer):
        total, terms = reconstruction(x, x_hat, posterior)
        adversarial = -discriminator(x_hat).mean()
        return total + SHAPES.adversarial_weight * weight * adversarial, terms

    net, training = new_training(steps, loss, start=0)
    history = list(training)
    found, x_hat = scores(net)
    found["curves"] = {term: curve(history, term) for term in ("l1", "discriminator")}
    return found, x_hat[:6]


@common.experiment("03/kl", steps=800, weights=[1e-6, 1e-4, 1e-2, 1e-1, 1.0, 10.0])
def kl_weights(steps, weights):
    """L1 + perceptual + KL, for each weight of the KL: scores, five images restored, five drawn."""
    perceptual = features_distance()
    noise = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    found = {}
    tiles = []
    for weight in weights:
        net, training = new_training(steps, objective(weight, perceptual))
        for _ in training:
            pass
        found[f"{weight:g}"], x_hat = scores(net)
        with torch.no_grad():
            tiles += [x_hat[:5], net.decode(noise).clamp(-1, 1)]
        print(weight, found[f"{weight:g}"]["psnr"])
    return {"variants": found}, torch.cat(tiles)


# ---- today's recipe, with and without the discriminator ----------------------------------------

VARIANTS = {"without": None, "patches of 16 pixels": 1, "patches of 34 pixels": 2}


def todays_training(steps, seed, layers):
    """The model of size shapes with a new autoencoder, and the library's own training of it.

    layers: of the discriminator; None is none.
    """
    model = load_model(version=2)
    recipe = dataclasses.replace(TODAY["shapes"].autoencoder_training, steps=steps)
    config = dataclasses.replace(TODAY["shapes"], discriminator_layers=layers or 1)
    if layers is None:
        config = dataclasses.replace(config, adversarial_start=steps)  # it never joins
    torch.manual_seed(seed)
    model.autoencoder = Autoencoder(config.autoencoder)
    model.config = config
    data = load_data("train", version=2)
    return model, train_autoencoder(model, data, recipe, seed=seed, accelerator=Accelerator())


def gradient_energy(x):
    """The mean squared difference of neighbouring pixels: blurring lowers it."""
    across = (x[..., 1:] - x[..., :-1]).square().mean()
    down = (x[..., 1:, :] - x[..., :-1, :]).square().mean()
    return (across + down).item()


@torch.no_grad()
def sharpness_scores(autoencoder):
    """Scores on 256 test images by measures that no training used, and the images restored."""
    test = load_data("test", version=2)
    x = test.batch(slice(0, 256))
    x_hat, _ = autoencoder(x)
    x_hat = x_hat.clamp(-1, 1)
    evaluator = PerceptualLoss(load_evaluator(version=2).image_encoder.features)
    lpips = load_lpips()
    return {
        "psnr": common.short(psnr(x, x_hat).mean().item()),
        "lpips": common.short(
            torch.cat([lpips(*p) for p in zip(x[:, None], x_hat[:, None])]).mean().item()
        ),
        "evaluator": common.short(evaluator(x, x_hat).mean().item()),
        "gradient_energy": common.short(gradient_energy(x_hat) / gradient_energy(x)),
        "legible": prompt_accuracy(x_hat, test.rows[:256])["all"],
    }, x_hat


@common.experiment("03/discriminator", steps=1500, seeds=[0, 1, 2])
def discriminator_effect(steps, seeds):
    """The autoencoder of size shapes, by today's recipe, with two discriminators and without."""
    found = {name: [] for name in VARIANTS}
    tiles = [load_data("test", version=2).batch(slice(0, 6))]
    for seed in seeds:
        for name, layers in VARIANTS.items():
            model, training = todays_training(steps, seed, layers)
            history = [terms for _, terms in training]
            history = [{key: term.item() for key, term in terms.items()} for terms in history]
            scores, x_hat = sharpness_scores(model.autoencoder.eval())
            scores["curves"] = {
                key: curve(history, key) for key in ("l1", "discriminator", "weight")
            }
            found[name].append(scores)
            if seed == seeds[0]:
                tiles.append(x_hat[:6])
            shown = {key: value for key, value in scores.items() if key != "curves"}
            print(seed, name, shown, scores["curves"]["discriminator"][::5], flush=True)
    return {"at": list(range(10, steps, 20)), "variants": found}, torch.cat(tiles)


@common.beginning("03/discriminator")
def twenty_steps_of_todays_recipe(record):
    _, training = todays_training(record["steps"], record["seeds"][0], None)
    now = common.first_mean((terms["l1"].item() for _, terms in training), 20)
    return [now], record["variants"]["without"][0]["curves"]["l1"][:1]


if __name__ == "__main__":
    common.main("03")
