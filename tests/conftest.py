"""What the tests share: a size so small that it trains in seconds, and a data set of 24 pictures to train it on."""

import dataclasses
import importlib.util
import pathlib

import pytest
import torch

from ldm_minimal import (CaptionedImages, Config, ImageConfig, LatentDiffusion, AutoencoderConfig, Stage, TextConfig, Tokenizer,
                         UNetConfig)

ROOT = pathlib.Path(__file__).parents[1]
TINY = Config(
    name="tiny", image_size=16,
    text=TextConfig(vocab_size=640, width=16, layers=1, heads=2), image=ImageConfig(width=8, mult=(1, 2), groups=4),
    autoencoder=AutoencoderConfig(width=16, mult=(1, 2), blocks=1, groups=4),
    unet=UNetConfig(width=32, mult=(1, 2), blocks=1, attention=(0, 1), heads=2, context_width=16, groups=4),
    clip_stage=Stage(40, 8, 3e-3, 5), autoencoder_stage=Stage(40, 8, 3e-3, 5), denoiser_stage=Stage(40, 8, 3e-3, 5),
    adversarial_start=20,
)


def prepare_module():
    """data/shapes/prepare.py, under a name of its own."""
    spec = importlib.util.spec_from_file_location("shapes_prepare", ROOT / "data" / "shapes" / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A shapes data set of 16 x 16 pictures: 216 to train on, 24 to test on."""
    path = tmp_path_factory.mktemp("data") / "shapes"
    prepare_module().prepare(path, 16, 240, seed=0)
    return path


@pytest.fixture(scope="session")
def data(folder):
    return CaptionedImages(folder / "train", 16)


def tiny_model(data):
    """An untrained model of size TINY with a tokenizer and a scale factor, all weights random."""
    torch.manual_seed(0)
    model = LatentDiffusion(dataclasses.replace(TINY, scale_factor=0.5))
    model.tokenizer = Tokenizer.train(data.captions, TINY.text.vocab_size)
    for weight in model.unet.parameters():
        if not weight.any():  # the last layers start at zero: nothing would pass through them, and no gradient
            torch.nn.init.normal_(weight, std=0.1)
    return model.eval()


@pytest.fixture
def tiny(data):
    return tiny_model(data)
