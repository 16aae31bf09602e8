"""The file stays whole: ldm.py, copied alone into an empty folder, trains and draws there."""

import os
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT

SCRIPT = """
import pathlib
import sys

import torch

import ldm

folder = pathlib.Path.cwd()
assert pathlib.Path(ldm.__file__).parent == folder, ldm.__file__
assert sorted(path.name for path in folder.iterdir() if path.is_file()) == ["alone.py", "ldm.py"]

colours = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}
images, captions = [], []
for name, colour in colours.items():
    for row in range(4):
        image = torch.zeros(3, 16, 16, dtype=torch.uint8)
        image[:, 4 * row : 4 * row + 4] = torch.tensor(colour, dtype=torch.uint8).view(3, 1, 1)
        images.append(image)
        captions.append(f"a {name} line, number {row}")
data = ldm.CaptionedImages(torch.stack(images), captions)

training = ldm.TrainConfig(steps=3, batch_size=8, learning_rate=1e-3, warmup_steps=1)
config = ldm.Config(
    name="alone",
    image_size=16,
    text=ldm.TextConfig(vocab_size=540, width=16, num_layers=1, num_heads=2),
    image=ldm.ImageConfig(width=8, channel_mult=(1, 2), num_groups=4),
    autoencoder=ldm.AutoencoderConfig(8, (1, 2), 1, latent_channels=4, num_groups=4),
    unet=ldm.UNetConfig(
        width=16, channel_mult=(1, 2), num_res_blocks=1, num_heads=2, context_width=16, num_groups=4
    ),
    discriminator_start=1,
    discriminator_head_start=0,
)
model = ldm.LatentDiffusion(config)
model.tokenizer = ldm.Tokenizer.train(captions, config.text.vocab_size)
clip = ldm.CLIP(model.tokenizer, model.text_encoder, model.image_encoder)
losses = []
losses += [terms["clip"] for _, terms in ldm.train_clip(clip, data, training)]
losses += [terms["l1"] for _, terms in ldm.train_autoencoder(model, data, training)]
ldm.measure_scale_factor(model, data)
losses += [terms["mse"] for _, terms in ldm.train_denoiser(model, data, training)]
assert len(losses) == 9
assert torch.stack(losses).isfinite().all()

x = model.generate(["a red line"], steps=2, generator=torch.Generator().manual_seed(0))
assert x.shape == (1, 3, 16, 16)
model.save(folder / "model")
again = ldm.LatentDiffusion.load(folder / "model")
same = again.generate(["a red line"], steps=2, generator=torch.Generator().manual_seed(0))
assert torch.equal(x, same)
assert not [name for name in sys.modules if name.split(".")[0] == "ldm_minimal"]
"""


@pytest.mark.slow
def test_ldm_alone_in_an_empty_folder_trains_and_draws(tmp_path):
    shutil.copy(ROOT / "ldm_minimal" / "ldm.py", tmp_path)
    (tmp_path / "alone.py").write_text(SCRIPT)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-W", "error::UserWarning:ldm", "alone.py"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
