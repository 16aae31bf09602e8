"""What the tests share: a size so small that it trains in seconds, and images to train it on."""

import dataclasses
import importlib.util
import pathlib

import pytest
import torch
from accelerate import Accelerator

from ldm_minimal import (
    CLIP,
    AutoencoderConfig,
    CaptionedImages,
    Config,
    ImageConfig,
    LatentDiffusion,
    TextConfig,
    Tokenizer,
    TrainConfig,
    UNetConfig,
)
from random_weights import randomise, seeded  # noqa: F401  tests import both from here

ROOT = pathlib.Path(__file__).parents[1]

TINY_TRAINING = TrainConfig(steps=40, batch_size=8, learning_rate=3e-3, warmup_steps=5)
TINY = Config(
    name="tiny",
    image_size=16,
    text=TextConfig(vocab_size=640, width=16, num_layers=1, num_heads=2),
    image=ImageConfig(width=8, channel_mult=(1, 2), num_groups=4),
    autoencoder=AutoencoderConfig(width=16, channel_mult=(1, 2), num_res_blocks=1, num_groups=4),
    unet=UNetConfig(
        width=32,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_levels=(0, 1),
        num_heads=2,
        context_width=16,
        num_groups=4,
    ),
    clip_training=TINY_TRAINING,
    autoencoder_training=TINY_TRAINING,
    denoiser_training=TINY_TRAINING,
    discriminator_start=20,
    discriminator_head_start=3,
)


# ---- randomness --------------------------------------------------------------------------------


def noise(*shape, seed=0):
    """Standard normal numbers in float64."""
    return torch.randn(shape, generator=seeded(seed)).double()


# ---- images ------------------------------------------------------------------------------------


def prepare_module():
    """data/shapes/prepare.py, under a name of its own."""
    path = ROOT / "data" / "shapes" / "prepare.py"
    spec = importlib.util.spec_from_file_location("shapes_prepare", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A shapes data set of 16 x 16 images: 216 to train on, 24 to test on."""
    path = tmp_path_factory.mktemp("data") / "shapes"
    prepare_module().prepare(path, 16, 240, seed=0)
    return path


@pytest.fixture(scope="session")
def data(folder):
    return CaptionedImages.from_folder(folder / "train", 16)


def first(data, count):
    """The first `count` images as a data set of their own."""
    return CaptionedImages(data.images[:count], data.captions[:count], data.rows[:count])


# ---- models ------------------------------------------------------------------------------------


def tiny_model(data):
    """An untrained model of size TINY with a tokenizer and a scale factor, all weights random."""
    torch.manual_seed(0)
    model = LatentDiffusion(dataclasses.replace(TINY, scale_factor=0.5))
    model.tokenizer = Tokenizer.train(data.captions, TINY.text.vocab_size)
    for weight in model.unet.parameters():
        if not weight.any():  # nothing would pass through what starts at zero, and no gradient
            torch.nn.init.normal_(weight, std=0.1)
    return model.eval()


@pytest.fixture
def tiny(data):
    return tiny_model(data)


def clip_of(model):
    """The CLIP whose towers are the model's."""
    return CLIP(model.tokenizer, model.text_encoder, model.image_encoder)


# ---- training ----------------------------------------------------------------------------------


@pytest.fixture(scope="session", autouse=True)
def train_on_the_cpu():
    """Bits are compared, so accelerate takes the CPU also beside a GPU. tests/gpu undoes it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        yield


class RecordingAccelerator(Accelerator):
    """Keeps the gradients of every optimizer step, as one vector, before they are clipped.

    Adam divides a gradient by its own size, and clipping fixes its norm: weights after a step, and
    gradients after clipping, do not show a gradient that is too large.
    """

    def __init__(self, **options):
        super().__init__(**options)
        self.gradients = []

    def clip_grad_norm_(self, parameters, max_norm, norm_type=2):
        parameters = list(parameters)
        self.gradients.append(torch.cat([p.grad.flatten() for p in parameters]).clone())
        return super().clip_grad_norm_(parameters, max_norm, norm_type)
