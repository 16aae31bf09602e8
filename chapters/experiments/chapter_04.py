"""Chapter 4: U-Nets on latents that are scaled rightly, too large and too small."""

import dataclasses

import torch

import common
from book import load_data
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


def new_training(steps, batch_size, width):
    """A new U-Net on latents of this standard deviation: the model, and its training."""
    model = common.model_with_new_unet()
    scale_factor = width * model.scale_factor
    model.config = dataclasses.replace(model.config, scale_factor=scale_factor)
    return model, common.denoiser_losses(model, steps=steps, batch_size=batch_size)


@common.experiment("04/scaled", steps=1000, batch=64, t=[*range(0, 1000, 50), 999], prompts=PROMPTS)
def scaled(steps, batch, t, prompts):
    """Errors by timestep, prompt accuracy and images, for three standard deviations."""
    test = load_data("test")
    found = {}
    tiles = []
    for width in (1.0, 5.49, 0.18):
        model, training = new_training(steps, batch, width)
        losses = list(training)
        errors = common.held_out_errors(model, t)
        noise_to_signal = (1 / model.schedule.snr()[t]).tolist()
        # The same errors in the clean latent, in units of its standard deviation.
        z0_errors = [(e * n) ** 0.5 / width for e, n in zip(errors, noise_to_signal)]
        drawn = draw_captions(model, test.captions[:128], 5.0, seed=0)
        tiles.append(draw_captions(model, prompts, 5.0, seed=0))
        found[f"{width:g}"] = {
            "eps_by_t": errors,
            "z0_by_t": [common.short(error) for error in z0_errors],
            "accuracy": round(prompt_accuracy(drawn, test.rows[:128])["all"], 4),
            "mse": common.means(losses, 20),
        }
    return {"variants": found}, torch.cat(tiles)


@common.beginning("04/scaled")
def twenty_steps_at_unit_width(record):
    _, training = new_training(record["steps"], record["batch"], width=1.0)
    return [common.first_mean(training, 20)], record["variants"]["1"]["mse"][:1]


if __name__ == "__main__":
    common.main("04")
