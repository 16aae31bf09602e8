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

# The chapters tell of version 1 of the data, and of the model that was trained on it.
DATA = REPOSITORY / "data" / "shapes" / "32-version-1"
SHIPPED = REPOSITORY / "data" / "checkpoints" / "shapes-1"

# Chapters import `oracle` and `prepare` from the data set's folder.
SHAPES_FOLDER = str(REPOSITORY / "data" / "shapes")
if SHAPES_FOLDER not in sys.path:
    sys.path.insert(0, SHAPES_FOLDER)


def load_data(split: str = "train") -> CaptionedImages:
    """The shapes of `train` or `test`, 32 x 32; drawn first where they are not there yet."""
    data_module("shapes", "prepare").prepare(DATA, size=32, version=1)
    return CaptionedImages.from_folder(DATA / split, 32)


def load_recipe() -> Config:
    """The config by which the model of the chapters was trained, without its scale factor."""
    values = json.loads((SHIPPED / "model" / "config.json").read_text(encoding="utf-8"))
    return Config.from_dict(values | {"scale_factor": None})


def load_model() -> LatentDiffusion:
    """The model of the chapters: trained by the same code as theirs, with more steps."""
    return LatentDiffusion.load(SHIPPED / "model")


def load_evaluator() -> CLIP:
    """A second CLIP, of another seed, that no training ever used."""
    return CLIP.load(SHIPPED / "evaluator")


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
    if path.with_suffix(".png").is_file():
        with Image.open(path.with_suffix(".png")) as image:
            pixels = np.array(image.convert("RGB"))
        strip = torch.from_numpy(pixels).permute(2, 0, 1)  # (3, 32, N * 32)
        numbers["pictures"] = torch.stack(strip.split(strip.shape[1], dim=2)) / 127.5 - 1
    return numbers
