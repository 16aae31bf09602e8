"""Chapter 3: autoencoders that differ in one thing: size, one term of the loss, or its weight.

The published LPIPS is one of the losses and one of the scores: `python data/lpips/prepare.py`
fetches its weights.
"""

import dataclasses
from functools import partial

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

import common
from book import load_data, load_evaluator, load_model
from ldm_minimal import (
    SHAPES,
    Autoencoder,
    Gaussian,
    PatchDiscriminator,
    PerceptualLoss,
    TrainConfig,
    Trainer,
    autoencoder_loss,
    discriminator_loss,
    train_autoencoder,
)
from ldm_minimal.metrics import frechet_distance, image_features, load_lpips, prompt_accuracy, psnr

SEEDS = [0, 1, 2]


# ---- how small? --------------------------------------------------------------------------------


# The chapter shows these definitions; tests/test_experiments.py compares them.
class SimpleAutoencoder(nn.Module):
    """x (B, 3, 32, 32) -> z (B, c, 8, 8) -> x_hat like x."""

    def __init__(self, c=4, width=32):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, stride=2, padding=1),  # 32 -> 16
            nn.SiLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),  # 16 -> 8
            nn.SiLU(),
            nn.Conv2d(2 * width, c, 3, padding=1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(c, 2 * width, 3, padding=1),
            nn.SiLU(),
            nn.Upsample(scale_factor=2),  # 8 -> 16
            nn.Conv2d(2 * width, width, 3, padding=1),
            nn.SiLU(),
            nn.Upsample(scale_factor=2),  # 16 -> 32
            nn.Conv2d(width, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, 3, 3, padding=1),
        )
        self.to(memory_format=torch.channels_last)

    def forward(self, x):
        return self.decoder(self.encoder(x))


def learn(net, data, loss_of, config):
    """Train a network on the images. Yields the loss of each step."""
    trainer = Trainer(net, config, Accelerator(cpu=True))
    for step in range(config.steps):
        x = data.batch(torch.randint(len(data), (config.batch_size,)))
        loss = loss_of(net, x)
        trainer.backward(loss)
        trainer.update(step)
        yield loss.item()


def restoration_loss(net, x):
    return F.mse_loss(net(x), x)


def new_plain_training(c, seed, steps):
    """An untrained autoencoder of c latent channels, and the generator that trains it."""
    data = load_data("train", version=2)
    config = TrainConfig(steps, batch_size=32, learning_rate=1e-2, muon=True)
    torch.manual_seed(seed)
    net = SimpleAutoencoder(c)
    return net, learn(net, data, restoration_loss, config)


def principal_components(x, count):
    """The mean of x (N, ...) and its `count` principal components, (numbers of an image, count)."""
    flat = x.flatten(1)
    centre = flat.mean(dim=0)
    torch.manual_seed(0)
    _, _, axes = torch.pca_lowrank(flat - centre, q=count, niter=2)
    return centre, axes


@common.experiment("03/size", steps=250, channels=[1, 2, 4, 8, 16], seeds=SEEDS)
def size(steps, channels, seeds):
    """The simple autoencoder with 1 to 16 channels; a linear one and a thumbnail of equal size."""
    x = load_data("test", version=2).batch(slice(0, 256))
    centre, axes = principal_components(load_data("train", version=2).batch(slice(0, 4000)), 1024)
    found = {"network": {}, "linear": {}, "thumbnail": {}, "curves": {}}
    tiles = [x[:6]]
    for c in channels:
        found["network"][str(c)] = []
        for seed in seeds:
            net, training = new_plain_training(c, seed, steps)
            losses = list(training)
            with torch.no_grad():
                x_hat = net(x).clamp(-1, 1)
            found["network"][str(c)].append(common.short(psnr(x, x_hat).mean().item()))
            if seed == seeds[0]:
                tiles.append(x_hat[:6])
                found["curves"][str(c)] = common.means(losses, 20)
        some = axes[:, : 64 * c]
        linear = (centre + (x.flatten(1) - centre) @ some @ some.T).view_as(x).clamp(-1, 1)
        found["linear"][str(c)] = common.short(psnr(x, linear).mean().item())
        side = round((64 * c / 3) ** 0.5)
        small = F.interpolate(x, (side, side), mode="area")
        restored = F.interpolate(small, (32, 32), mode="bicubic").clamp(-1, 1)
        found["thumbnail"][str(c)] = common.short(psnr(x, restored).mean().item())
        print(c, found["network"][str(c)], found["linear"][str(c)], side, flush=True)
    return found, torch.cat(tiles)


@common.beginning("03/size")
def twenty_steps_of_one_channel(record):
    _, training = new_plain_training(1, record["seeds"][0], record["steps"])
    return [common.first_mean(training, 20)], record["curves"]["1"][:1]


# ---- a Gaussian instead of a point -------------------------------------------------------------


# The chapter shows this definition; tests/test_experiments.py compares them.
class SimpleVAE(SimpleAutoencoder):
    """x (B, 3, 32, 32), eps (B, c, 8, 8) -> x_hat like x, and the Gaussian of z."""

    def __init__(self, c=4, width=32):
        super().__init__(c, width)
        self.encoder[-1] = nn.Conv2d(2 * width, 2 * c, 3, padding=1)  # means, then log-variances

    def forward(self, x, eps):
        posterior = Gaussian(self.encoder(x))
        std = (0.5 * posterior.logvar).exp()
        z = posterior.mean + std * eps
        return self.decoder(z), posterior


def vae_loss(net, x, kl_weight, scale=1.0):
    """The squared error of a draw, and the KL; both summed over an image. scale: of the noise."""
    x_hat, posterior = net(x, scale * torch.randn(len(x), 4, 8, 8))
    return (x - x_hat).square().sum(dim=(1, 2, 3)).mean() + kl_weight * posterior.kl().mean()


MYSTERIES = {
    "weight 100": {"kl_weight": 100.0},
    "no KL": {"kl_weight": 0.0},
    "no draw": {"kl_weight": 1.0, "scale": 0.0},
}


@common.experiment("03/diagnose", steps=150)
def diagnose(steps):
    """Three VAEs with one mistake each; five images restored from the mean, and from a draw."""
    data, x = load_data("train", version=2), load_data("test", version=2).batch(slice(0, 256))
    eps = torch.randn(256, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    config = TrainConfig(steps, batch_size=32, learning_rate=1e-2, muon=True)
    found, tiles = {}, [x[:5]]
    for name, mistake in MYSTERIES.items():
        torch.manual_seed(0)
        net = SimpleVAE()
        for _ in learn(net, data, partial(vae_loss, **mistake), config):
            pass
        with torch.no_grad():
            from_draw, posterior = net(x, eps)
            from_mean = net.decoder(posterior.mean)
        scores = {
            "psnr_mean": psnr(x, from_mean.clamp(-1, 1)).mean().item(),
            "psnr_draw": psnr(x, from_draw.clamp(-1, 1)).mean().item(),
            "kl": posterior.kl().mean().item(),
            "std_of_means": posterior.mean.std().item(),
            "posterior_std": (0.5 * posterior.logvar).exp().mean().item(),
        }
        found[name] = {key: common.short(value) for key, value in scores.items()}
        tiles += [from_mean[:5].clamp(-1, 1), from_draw[:5].clamp(-1, 1)]
        print(name, found[name], flush=True)
    return {"runs": found}, torch.cat(tiles)


# ---- which loss? -------------------------------------------------------------------------------


# The chapter shows these definitions; tests/test_experiments.py compares them.
def speckled(x, seed):
    """Darken 35 % of the pixels, drawn at random. x (N, 3, H, W) in [-1, 1] -> like x."""
    generator = torch.Generator().manual_seed(seed)
    dark = torch.rand(len(x), 1, *x.shape[2:], generator=generator) < 0.35
    return torch.where(dark, x - 0.6, x).clamp(-1, 1)


def train(net, data, loss_of, config, discriminator=None, learns_from=0, used_from=0):
    """Yields the terms of each step's loss.

    The discriminator learns from step `learns_from`. Its term is in the loss from `used_from`.
    """
    trainer = Trainer(net, config, Accelerator(cpu=True))
    if discriminator is not None:
        optimizer = torch.optim.AdamW(discriminator.parameters(), 1e-3, betas=(0.9, 0.99))
    for step in range(config.steps):
        x = data[torch.randint(len(data), (config.batch_size,))]
        x_hat, posterior = net(x, torch.randn(len(x), 4, 8, 8))
        used = discriminator if step >= used_from else None
        loss, terms = loss_of(x, x_hat, posterior, discriminator=used)
        trainer.backward(loss)
        trainer.update(step)
        if discriminator is not None and step >= learns_from:
            loss = discriminator_loss(discriminator(x), discriminator(x_hat.detach()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            terms["discriminator"] = loss.detach()
        yield terms


def squared_error(x, x_hat, posterior, discriminator=None):
    """L2 instead of L1, with the same tiny KL."""
    loss = (x - x_hat).square().sum(dim=(1, 2, 3)).mean() + 1e-6 * posterior.kl().mean()
    return loss, {"l1": (x - x_hat).abs().mean().detach()}


def features_distance():
    """The perceptual distance by the shipped model's image encoder."""
    encoder = load_model(version=2).image_encoder.requires_grad_(False)
    return PerceptualLoss(encoder.features)


def loss_with(perceptual=None, weight=0.2, **weights):
    """`autoencoder_loss` with a perceptual term."""
    return partial(autoencoder_loss, perceptual=perceptual, perceptual_weight=weight, **weights)


ALL_THREE = "L1 + own features + adversarial"
ADVERSARIAL = {"adversarial_weight": 0.5, "adversarial_limit": 1e4}


def fixed_weight(x, x_hat, posterior, discriminator, last_layer, perceptual, weight):
    """The discriminator's verdict with a fixed weight instead of the adaptive one."""
    loss, terms = autoencoder_loss(x, x_hat, posterior, perceptual, perceptual_weight=0.2)
    if discriminator is None:
        return loss, terms
    return loss - weight * discriminator(x_hat).mean(), terms


def recipes(steps, weight):
    """{name: (loss, first step of the discriminator, first step with its term in the loss)}."""
    own = features_distance()
    early, later = steps // 4, 3 * steps // 8
    adversarial = loss_with(own, **ADVERSARIAL)
    return {
        "L2": (squared_error, None, None),
        "L1": (loss_with(), None, None),
        "L1 + own features": (loss_with(own), None, None),
        "L1 + LPIPS": (loss_with(load_lpips().requires_grad_(False), 1.0), None, None),
        ALL_THREE: (adversarial, early, later),
        "adversarial from step 0": (adversarial, 0, 0),
        "fixed weight": (partial(fixed_weight, perceptual=own, weight=weight), early, later),
    }


def new_training(recipe, data, seed, steps, discriminator=None):
    """A new autoencoder, and the generator that trains it by one of the `recipes`."""
    loss_of, learns_from, used_from = recipe
    config = dataclasses.replace(SHAPES.autoencoder_training, steps=steps)
    torch.manual_seed(seed)
    net = Autoencoder(SHAPES.autoencoder)
    if learns_from is None:
        return net, train(net, data, loss_of, config)
    discriminator = discriminator or PatchDiscriminator(32, 1)
    loss_of = partial(loss_of, last_layer=net.last_layer)
    return net, train(net, data, loss_of, config, discriminator, learns_from, used_from)


def gradient_energy(x):
    """The mean squared difference of neighbouring pixels: blurring lowers it."""
    across = (x[..., 1:] - x[..., :-1]).square().mean()
    down = (x[..., 1:, :] - x[..., :-1, :]).square().mean()
    return (across + down).item()


@torch.no_grad()
def speckled_scores(net, x, evaluator, lpips):
    """How like x its restored images are, by measures of several kinds; and these images."""
    x_hat = net.eval()(x)[0].clamp(-1, 1)
    distance = PerceptualLoss(evaluator.image_encoder.features)
    distances = [lpips(a, b) for a, b in zip(x.split(32), x_hat.split(32), strict=True)]
    scores = {
        "psnr": psnr(x, x_hat).mean().item(),
        "l1": (x - x_hat).abs().mean().item(),
        "lpips": torch.cat(distances).mean().item(),
        "evaluator": distance(x, x_hat).mean().item(),
        "gradient_energy": gradient_energy(x_hat) / gradient_energy(x),
    }
    return {key: common.short(value) for key, value in scores.items()}, x_hat


def compare_recipes(names, steps, seeds, weight=None):
    """Scores and curves of each recipe and seed; the originals, and those restored with seed 0."""
    x = speckled(load_data("test", version=2).batch(slice(0, 128)), seed=1)
    data = speckled(load_data("train", version=2).batch(slice(0, 6000)), seed=0)
    evaluator, lpips = load_evaluator(version=2), load_lpips()
    known = recipes(steps, weight)
    found = {name: [] for name in names}
    tiles = {"x": x[:6]}
    for seed in seeds:
        for name in names:
            net, training = new_training(known[name], data, seed, steps)
            history = [{key: term.item() for key, term in terms.items()} for terms in training]
            scores, x_hat = speckled_scores(net, x, evaluator, lpips)
            found[name].append(scores | {"curves": curves(history)})
            if seed == seeds[0]:
                tiles[name] = x_hat[:6]
            print(seed, name, scores, flush=True)
    return {"at": list(range(10, steps, 20)), "variants": found}, torch.cat(list(tiles.values()))


def curve(history, name):
    """The means of every 20 steps of a term; None where it was not there yet."""
    return common.means([terms.get(name) for terms in history], 20)


def curves(history):
    """The means of every 20 steps of some terms; None where a term was not there yet."""
    last = history[-1]
    return {
        name: curve(history, name) for name in ("l1", "discriminator", "weight") if name in last
    }


# The chapter shows this definition; tests/test_experiments.py compares them.
def spoil(x, error=0.02):
    """x changed in three ways, each with the same mean squared error in every image."""
    generator = torch.Generator().manual_seed(0)
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    changes = {
        "lighter": torch.ones_like(x),
        "blurred": F.avg_pool2d(padded, 3, stride=1) - x,
        "grainy": torch.randn(x.shape, generator=generator),
    }
    spoiled = {}
    for name, change in changes.items():
        size = change.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
        spoiled[name] = x + error**0.5 * change / size
    return spoiled


@common.experiment("03/spoiled", error=0.02)
def distances_of_spoiled(error):
    """How different two networks find 128 images and the same spoiled in three ways."""
    x = 0.8 * load_data("test", version=2).batch(slice(0, 128))  # room to be changed
    found = {"mean_squared_error": {}, "own features": {}, "LPIPS": {}}
    distances = {"own features": features_distance(), "LPIPS": load_lpips()}
    with torch.no_grad():
        for name, y in spoil(x, error).items():
            mse = (x - y).square().mean(dim=(1, 2, 3))
            found["mean_squared_error"][name] = [common.short(v) for v in mse.tolist()]
            for network, distance in distances.items():
                values = torch.cat([distance(a, b) for a, b in zip(x.split(32), y.split(32))])
                found[network][name] = [common.short(v) for v in values.tolist()]
    return found, None


@common.experiment("03/losses", steps=400, seeds=SEEDS)
def losses(steps, seeds):
    """Five recipes of equal steps on speckled scenes."""
    names = ["L2", "L1", "L1 + own features", "L1 + LPIPS", ALL_THREE]
    return compare_recipes(names, steps, seeds)


@common.experiment("03/longer", steps=1600, seeds=[0])
def longer(steps, seeds):
    """Four of the recipes of 03/losses with four times the steps; as an example."""
    return compare_recipes(["L2", "L1", "L1 + own features", ALL_THREE], steps, seeds)


@common.beginning("03/losses")
@common.beginning("03/longer")
def twenty_steps_of_l1(record):
    data = speckled(load_data("train", version=2).batch(slice(0, 6000)), seed=0)
    recipe = (loss_with(), None, None)
    _, training = new_training(recipe, data, record["seeds"][0], record["steps"])
    now = common.first_mean((terms["l1"].item() for terms in training), 20)
    return [now], record["variants"]["L1"][0]["curves"]["l1"][:1]


@common.experiment("03/schedule", steps=400, seeds=SEEDS, weight=3000.0)
def schedule(steps, seeds, weight):
    """The adversarial term from step 0, and with a fixed weight; else as `ALL_THREE`."""
    return compare_recipes(["adversarial from step 0", "fixed weight"], steps, seeds, weight)


@common.experiment("03/verdict", steps=400)
def verdict(steps):
    """The logits of a discriminator that is in no loss, on originals, restored images and halves.

    A half: the left of it is the original, the right is restored.
    """
    x = speckled(load_data("test", version=2).batch(slice(0, 128)), seed=1)[:6]
    data = speckled(load_data("train", version=2).batch(slice(0, 6000)), seed=0)
    loss_of, learns_from, _ = recipes(steps, None)[ALL_THREE]
    discriminator = PatchDiscriminator(32, 1)
    net, training = new_training((loss_of, learns_from, steps), data, 0, steps, discriminator)
    losses = [terms["discriminator"].item() for terms in training if "discriminator" in terms]
    with torch.no_grad():
        x_hat = net.eval()(x)[0].clamp(-1, 1)
        half = torch.cat([x[..., :16], x_hat[..., 16:]], dim=-1)
        kinds = {"original": x, "restored": x_hat, "half": half}
        maps = {kind: discriminator(images)[:, 0] for kind, images in kinds.items()}
    found = {
        kind: [[round(v, 2) for v in m.flatten().tolist()] for m in logits]
        for kind, logits in maps.items()
    }
    found["discriminator"] = common.means(losses, 20)
    print({kind: logits.mean().item() for kind, logits in maps.items()}, flush=True)
    return {"in no loss": found}, torch.cat([x, x_hat, half])


# ---- how large a KL? ---------------------------------------------------------------------------


@torch.no_grad()
def kl_scores(vae, x, evaluator, noise):
    """Scores of images restored from the mean, and of images decoded from noise; six of each."""
    posterior = Gaussian(vae.encoder(x))
    x_hat = vae.decoder(posterior.mean).clamp(-1, 1)
    drawn = vae.decoder(noise).clamp(-1, 1)
    real = image_features(evaluator, x)
    scores = {
        "psnr": psnr(x, x_hat).mean().item(),
        "kl": posterior.kl().mean().item(),
        "std_of_means": posterior.mean.std().item(),
        "posterior_std": posterior.logvar.exp().mean().sqrt().item(),
        "frechet_restored": frechet_distance(image_features(evaluator, x_hat), real),
        "frechet_drawn": frechet_distance(image_features(evaluator, drawn), real),
    }
    tiles = torch.cat([x_hat[:6], drawn[:6]])
    return {key: common.short(value) for key, value in scores.items()}, tiles


@common.experiment("03/kl", steps=300, weights=[1e-6, 1e-2, 1e-1, 1.0, 10.0], seeds=SEEDS)
def kl_weights(steps, weights, seeds):
    """The simple VAE, for each weight of the KL."""
    x = load_data("test", version=2).batch(slice(0, 256))
    data, evaluator = load_data("train", version=2), load_evaluator(version=2)
    config = TrainConfig(steps, batch_size=32, learning_rate=1e-2, muon=True)
    noise = torch.randn(256, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    found = {f"{weight:g}": [] for weight in weights}
    all_tiles = [x[:6]]
    for seed in seeds:
        for weight in weights:
            torch.manual_seed(seed)
            vae = SimpleVAE()
            for _ in learn(vae, data, partial(vae_loss, kl_weight=weight), config):
                pass
            scores, tiles = kl_scores(vae, x, evaluator, noise)
            found[f"{weight:g}"].append(scores)
            if seed == seeds[0]:
                all_tiles.append(tiles)
            print(seed, weight, scores, flush=True)
    return {"variants": found}, torch.cat(all_tiles)


# ---- today's recipe, with and without the discriminator ----------------------------------------

VARIANTS = {"without": None, "patches of 16 pixels": 1, "patches of 34 pixels": 2}


def todays_training(steps, seed, layers):
    """The model of size shapes with a new autoencoder, and the library's own training of it.

    layers: of the discriminator; None is none.
    """
    model = load_model(version=2)
    recipe = dataclasses.replace(SHAPES.autoencoder_training, steps=steps)
    config = dataclasses.replace(SHAPES, discriminator_layers=layers or 1)
    if layers is None:
        config = dataclasses.replace(config, discriminator_start=steps)  # it never joins
    torch.manual_seed(seed)
    model.autoencoder = Autoencoder(config.autoencoder)
    model.config = config
    data = load_data("train", version=2)
    return model, train_autoencoder(model, data, recipe, seed=seed, accelerator=Accelerator())


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
