"""The data, the shipped model and its evaluator, and what the experiments found."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ldm_minimal import CLIP, CaptionedImages, Config, LatentDiffusion
from ldm_minimal.files import REPOSITORY, data_module

RESULTS = Path(__file__).resolve().parents[1] / "results"

# Version 2 of the data, and the model that was trained on it, are today's. Chapters that still tell
# of version 1 keep its data and its model.
FOLDERS = {1: "32-version-1", 2: "32"}
CHECKPOINTS = {1: "shapes-1", 2: "shapes", "emoji": "emoji"}
SHIPPED = REPOSITORY / "data" / "checkpoints" / CHECKPOINTS[1]

# Chapters import `oracle` and `prepare` from the data set's folder.
SHAPES_FOLDER = str(REPOSITORY / "data" / "shapes")
if SHAPES_FOLDER not in sys.path:
    sys.path.insert(0, SHAPES_FOLDER)


def load_data(split: str = "train", version: int = 1) -> CaptionedImages:
    """The shapes of `train` or `test`, 32 x 32; drawn first where they are not there yet."""
    folder = REPOSITORY / "data" / "shapes" / FOLDERS[version]
    data_module("shapes", "prepare").prepare(folder, size=32, version=version)
    return CaptionedImages.from_folder(folder / split, 32)


def load_recipe() -> Config:
    """The config by which the model of the chapters was trained, without its scale factor."""
    values = json.loads((SHIPPED / "model" / "config.json").read_text(encoding="utf-8"))
    return Config.from_dict(values | {"scale_factor": None})


def load_model(version: int | str = 1) -> LatentDiffusion:
    """The shipped model: trained by the same code as the chapters' own, with more steps.

    version: 1 or 2, of the shapes that it was trained on; or "emoji".
    """
    return LatentDiffusion.load(_checkpoint(version) / "model")


def load_evaluator(version: int = 1) -> CLIP:
    """A second CLIP, of another seed, that no training ever used."""
    return CLIP.load(_checkpoint(version) / "evaluator")


def _checkpoint(version: int | str) -> Path:
    return REPOSITORY / "data" / "checkpoints" / CHECKPOINTS[version]


def result(name: str) -> dict:
    """What an experiment found: the numbers of results/NN/NAME.json, for name "NN/NAME".

    Where it kept images, they are in "pictures": (N, 3, 32, 32) in [-1, 1]. Raises
    FileNotFoundError, which names the command that makes the result.
    """
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        command = f"python chapters/experiments/chapter_{name[:2]}.py"
        raise FileNotFoundError(f"{path} does not exist; {command} makes it")
    numbers = json.loads(path.read_text(encoding="utf-8"))
    if path.with_suffix(".webp").is_file():
        with Image.open(path.with_suffix(".webp")) as image:
            pixels = np.array(image.convert("RGB"))
        strip = torch.from_numpy(pixels).permute(2, 0, 1)  # (3, 32, N * 32)
        numbers["pictures"] = torch.stack(strip.split(strip.shape[1], dim=2)) / 127.5 - 1
    return numbers
