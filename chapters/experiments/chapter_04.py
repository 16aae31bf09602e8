"""Chapter 4: U-Nets on latents that are scaled rightly, too large and too small."""

import dataclasses

import torch

import common
from book import load_data, load_model
from ldm_minimal import NoiseSchedule, UNet, train_denoiser
from ldm_minimal.metrics import draw_captions, prompt_accuracy

PROMPTS = [
    "a red circle",
    "a large blue square",
    "a small green star",
    "a yellow heart",
    "a pink cross above a blue circle",
    "a red star left of a green square",
    "a cyan triangle above a purple heart",
    "an orange circle left of a blue cross",
]
# The standard deviation of the latents; and whether the schedule is the one of exercise 4.2.
VARIANTS = {
    "s = 1": (1.0, False),
    "s = 5.49": (5.49, False),
    "s = 0.18": (0.18, False),
    "s = 5.49, new schedule": (5.49, True),
}


class ScheduleForWidth(NoiseSchedule):
    """The scaled-linear schedule for latents of standard deviation s: its SNR is theirs.

    same_snr: with the alpha_bars of exercise 4.2, for which the SNR is that of unit width.
    """

    def __init__(self, s: float, same_snr: bool):
        super().__init__()
        self.s = s
        if same_snr:
            self.alpha_bars = self.alpha_bars / (self.alpha_bars + s**2 * (1 - self.alpha_bars))
            before = torch.cat([torch.ones(1, dtype=torch.float64), self.alpha_bars[:-1]])
            self.betas = 1 - self.alpha_bars / before

    def snr(self) -> torch.Tensor:
        return self.s**2 * super().snr()


def new_training(steps, batch_size, variant, seed, snr_clip=1.0):
    """Today's model with a new U-Net and latents of another width: the model, and its losses.

    The loss is weighted as in the recipe, by min(SNR, snr_clip) / SNR, with each variant's own SNR;
    snr_clip None: not weighted.
    """
    width, same_snr = VARIANTS[variant]
    model = load_model(version=2)
    torch.manual_seed(seed)
    model.unet = UNet(model.config.unet)
    scale_factor = width * model.scale_factor
    model.config = dataclasses.replace(model.config, scale_factor=scale_factor, snr_clip=snr_clip)
    model.schedule = ScheduleForWidth(width, same_snr)
    recipe = dataclasses.replace(model.config.denoiser_training, steps=steps, batch_size=batch_size)
    training = train_denoiser(model, load_data("train", version=2), recipe, seed=seed)
    return model, (losses["mse"].item() for _, losses in training)


def errors_by_t(model, t, width):
    """On 128 test images: the mean squared error of eps, and the error of z in units of s."""
    test = load_data("test", version=2)
    with torch.no_grad():
        z = model.encode(test.batch(slice(0, 128)))
        context = model.embed(test.captions[:128])
        eps_errors = common.error_by_timestep(model.unet, model.schedule, z, context, t)
    shares = [model.schedule.alpha_bars[i].item() for i in t]
    z_errors = [(e * (1 - a) / a) ** 0.5 / width for e, a in zip(eps_errors, shares)]
    return eps_errors, [common.short(error) for error in z_errors]


def shares_right(model, test):
    """Of images drawn for 128 test captions: the shares that are right, entirely and in parts."""
    drawn = draw_captions(model, test.captions[:128], 3.0, seed=0)
    accuracy = prompt_accuracy(drawn, test.rows[:128])
    return {key: common.short(accuracy[key]) for key in ("all", "colour", "shape")}


@common.experiment(
    "04/scaled",
    steps=1000,
    batch=64,
    seeds=[0, 1, 2],
    t=[*range(0, 1000, 50), 999],
    prompts=PROMPTS,
)
def scaled(steps, batch, seeds, t, prompts):
    """Errors by timestep, prompt accuracy and images, for three widths and one other schedule."""
    test = load_data("test", version=2)
    found = {name: [] for name in VARIANTS}
    tiles = []
    for seed in seeds:
        for name, (width, _) in VARIANTS.items():
            model, losses = new_training(steps, batch, name, seed)
            curve = common.means(list(losses), 20)
            eps_errors, z_errors = errors_by_t(model, t, width)
            shares = shares_right(model, test)
            found[name].append(
                {"accuracy": shares, "eps_by_t": eps_errors, "z0_by_t": z_errors, "mse": curve}
            )
            if seed == seeds[0]:
                tiles.append(draw_captions(model, prompts, 3.0, seed=0))
            print(seed, name, shares, curve[-1], flush=True)
    return {"variants": found}, torch.cat(tiles)


@common.beginning("04/scaled")
def twenty_steps_at_unit_width(record):
    _, losses = new_training(record["steps"], record["batch"], "s = 1", record["seeds"][0])
    return [common.first_mean(losses, 20)], record["variants"]["s = 1"][0]["mse"][:1]


@common.experiment("04/unweighted", steps=1000, batch=64, names=["s = 1", "s = 5.49", "s = 0.18"])
def unweighted(steps, batch, names):
    """The same without the weight of the loss, seed 0: prompt accuracy."""
    test = load_data("test", version=2)
    found = {}
    for name in names:
        model, losses = new_training(steps, batch, name, seed=0, snr_clip=None)
        curve = common.means(list(losses), 20)
        found[name] = {"accuracy": shares_right(model, test), "mse": curve}
        print(name, found[name]["accuracy"], curve[-1], flush=True)
    return {"variants": found}, None


if __name__ == "__main__":
    common.main("04")
