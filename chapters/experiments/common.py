"""What the experiments share: how a result is made and recorded, and measures of several chapters.

A result is results/NN/NAME.json: numbers, with the command, seed, machine and minutes that made
them; and results/NN/NAME.webp where there are images. `book.result("NN/NAME")` reads both.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where book is

from book import load_data, load_evaluator, load_model, to_image
from ldm_minimal import (
    CaptionedImages,
    LatentDiffusion,
    NoiseSchedule,
    PerceptualLoss,
    UNet,
    denoising_loss,
    train_denoiser,
)
from ldm_minimal.metrics import prompt_accuracy, psnr

RESULTS = Path(__file__).resolve().parents[1] / "results"

# ---- results -----------------------------------------------------------------------------------

EXPERIMENTS = {}  # {"NN/NAME": (function, settings)}
BEGINNINGS = {}  # {"NN/NAME": function}


def experiment(name: str, **settings) -> Callable:
    """Register what makes a result: a function of the settings that returns (numbers, images).

    The settings are recorded with the numbers. images: (N, 3, H, W), or None.
    """

    def register(function: Callable) -> Callable:
        EXPERIMENTS[name] = function, settings
        return function

    return register


def beginning(name: str) -> Callable:
    """Register what check.py makes again of a result, in seconds.

    The function takes the record and returns two lists: numbers made now, the same on record.
    """

    def register(function: Callable) -> Callable:
        BEGINNINGS[name] = function
        return function

    return register


def command(name: str) -> str:
    """The command that makes a result."""
    chapter, _, result = name.partition("/")
    return f"python chapters/experiments/chapter_{chapter}.py {result}"


def machine() -> str:
    """The threads in use and the processor, or the GPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        processor = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        processor = platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{threads} thread{'s' if threads > 1 else ''} of {processor}"


def make(name: str) -> None:
    """Run an experiment and write its result."""
    started = time.time()
    started_computing = time.process_time()
    torch.manual_seed(0)
    function, settings = EXPERIMENTS[name]
    numbers, images = function(**settings)
    record = {
        "command": command(name),
        "seed": 0,
        "machine": machine(),
        "torch": torch.__version__,
        "minutes": round((time.time() - started) / 60, 1),
        "cpu_minutes": round((time.process_time() - started_computing) / 60, 1),
        **settings,
        **numbers,
    }
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    if images is not None:
        strip = side_by_side(images)
        strip.save(path.with_suffix(".webp"), lossless=True, method=6, quality=100)
    print(f"{path}: {record['minutes']} minutes")


def main(chapter: str) -> None:
    """The command line of a chapter's script: make all of its results, or those that are named."""
    names = [name.partition("/")[2] for name in EXPERIMENTS if name.startswith(chapter)]
    parser = argparse.ArgumentParser(description=f"Make the results that chapter {chapter} reads.")
    parser.add_argument("results", nargs="*", metavar="RESULT", help=f"of {', '.join(names)}")
    chosen = parser.parse_args().results or names
    for name in chosen:
        if name not in names:
            parser.error(f"there is no result {name!r}; choose from {', '.join(names)}")
    for name in chosen:
        make(f"{chapter}/{name}")


def side_by_side(images: Tensor) -> Image.Image:
    """(N, 3, H, W) in [-1, 1] -> one image of N tiles in a row."""
    return to_image(torch.cat(list(images.cpu()), dim=2))


# ---- numbers -----------------------------------------------------------------------------------


def short(value: float) -> float:
    """The value with four significant digits."""
    return float(f"{value:.4g}")


def means(values: Sequence[float | None], every: int) -> list[float | None]:
    """The mean of each `every` values; those that are None are left out."""
    found = []
    for i in range(0, len(values), every):
        part = [value for value in values[i : i + every] if value is not None]
        found.append(short(sum(part) / len(part)) if part else None)
    return found


def first_mean(losses: Iterable[float], count: int) -> float:
    """The mean of the first `count` losses of a training, which is then stopped."""
    return sum(loss for _, loss in zip(range(count), losses)) / count


# ---- images and models -------------------------------------------------------------------------


def batches(data: CaptionedImages) -> Callable[[int], Tensor]:
    """A function that draws so many images, by torch's own random numbers."""
    return lambda count: data.batch(torch.randint(len(data), (count,)))


def for_the_oracle(x: Tensor) -> np.ndarray:
    """x (N, 3, H, W) in [-1, 1] -> (N, H, W, 3) in [0, 1], as the oracle reads images."""
    return ((x.clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 1).numpy()


def model_with_new_unet() -> LatentDiffusion:
    """The shipped model with an untrained U-Net, of seed 0."""
    model = load_model()
    torch.manual_seed(0)
    model.unet = UNet(model.config.unet)
    return model


def denoiser_losses(
    model: LatentDiffusion, *, caption_dropout: float = 0.1, **recipe
) -> Iterator[float]:
    """Train the model's U-Net on the shapes; yields the loss of each step.

    recipe: what differs from the model's own, such as steps.
    """
    config = dataclasses.replace(model.config.denoiser_training, **recipe)
    data = load_data("train")
    for _, losses in train_denoiser(model, data, config, caption_dropout=caption_dropout):
        yield losses["mse"].item()


@torch.no_grad()
def error_by_timestep(
    unet: Callable, schedule: NoiseSchedule, z: Tensor, context: Tensor | None, times: Iterable[int]
) -> list[float]:
    """The denoising loss at each of `times`, always with the same noise."""
    generator = torch.Generator().manual_seed(1)
    errors = []
    for t in times:
        eps = torch.randn(z.shape, generator=generator)
        loss = denoising_loss(unet, schedule, z, torch.full((len(z),), t), context, eps)
        errors.append(short(loss.mean().item()))
    return errors


def held_out_errors(
    model: LatentDiffusion, times: Iterable[int], captions: list[str] | None = None
) -> list[float]:
    """`error_by_timestep` on 128 test images, told `captions` (by default their own)."""
    test = load_data("test")
    with torch.no_grad():
        z = model.encode(test.batch(slice(0, 128)))
        context = model.embed(captions or test.captions[:128])
    return error_by_timestep(model.unet, model.schedule, z, context, times)


@torch.no_grad()
def restoration_scores(autoencoder: Callable, x: Tensor, rows: list[dict]) -> tuple[dict, Tensor]:
    """How well `autoencoder`, x -> (x_hat, posterior), restores x: scores, and x_hat.

    "seen" is the perceptual distance by the evaluator's features, "legible" the prompt accuracy of
    the restored images.
    """
    x_hat, posterior = autoencoder(x)
    distance = PerceptualLoss(load_evaluator().image_encoder.features)(x, x_hat)
    x_hat = x_hat.clamp(-1, 1)
    scores = {
        "psnr": round(psnr(x, x_hat).mean().item(), 2),
        "seen": round(distance.mean().item(), 4),
        "legible": round(prompt_accuracy(x_hat, rows)["all"], 4),
        "kl": round(posterior.kl().mean().item(), 1),
        "mean_std": round(posterior.mean.std().item(), 4),
        "cloud_std": round(posterior.logvar.exp().mean().sqrt().item(), 5),
    }
    return scores, x_hat
