"""Muon against AdamW: how well does the U-Net of size shapes draw after equally many steps?

    OMP_NUM_THREADS=1 python tests/benchmarks/optimizers.py            # three seeds: some hours

Text encoder and autoencoder are those that ship; a new U-Net learns by each optimizer, at each of
some learning rates, with the same seeds, noise and batches. What is finished is read from --out
and not repeated.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import time

import torch

from ldm_minimal import SHAPES, CaptionedImages, LatentDiffusion, UNet, train_denoiser
from ldm_minimal.files import REPOSITORY, data_module
from ldm_minimal.metrics import draw_captions, prompt_accuracy

RATES = {"Muon": [8e-3], "AdamW": [4e-3, 8e-3]}  # 8e-3 is the recipe's, 4e-3 was 0.1.0's
CAPTIONS = 256
GUIDANCE = 3.0


def data_sets():
    folder = REPOSITORY / "data" / "shapes" / "32"
    data_module("shapes", "prepare").prepare(folder, size=32)
    return [CaptionedImages.from_folder(folder / split, 32) for split in ("train", "test")]


def train_and_draw(optimizer, rate, seed, steps, train, test):
    """The prompt accuracy of a new U-Net, its last losses, and the seconds of its training."""
    model = LatentDiffusion.load(REPOSITORY / "data" / "checkpoints" / "shapes" / "model")
    model.config = dataclasses.replace(SHAPES, scale_factor=model.config.scale_factor)
    torch.manual_seed(seed)
    model.unet = UNet(SHAPES.unet)
    recipe = dataclasses.replace(
        SHAPES.denoiser_training, steps=steps, learning_rate=rate, muon=optimizer == "Muon"
    )
    begun = time.time()
    losses = []
    for _, step in train_denoiser(model, train, recipe, seed=seed):
        losses.append(step["mse"].item())
    seconds = time.time() - begun
    images = draw_captions(model, test.captions[:CAPTIONS], GUIDANCE, seed=0)
    accuracy = prompt_accuracy(images, test.rows[:CAPTIONS])
    return {
        "all": accuracy["all"],
        "mse": statistics.mean(losses[-100:]),
        "seconds": seconds,
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/optimizers"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    train, test = data_sets()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {options.steps} steps")
    found = {}
    for seed in options.seeds:
        for optimizer, rates in RATES.items():
            for rate in rates:
                file = options.out / f"{optimizer}-{rate:g}-{options.steps}-{seed}.json"
                if not file.is_file():
                    result = train_and_draw(optimizer, rate, seed, options.steps, train, test)
                    file.write_text(json.dumps(result))
                result = json.loads(file.read_text())
                found.setdefault((optimizer, rate), []).append(result)
                print(f"{optimizer:6} {rate:g} seed {seed}: {result}", flush=True)
    print("| optimizer | learning rate | prompt accuracy of the seeds | mse | seconds |")
    print("|---|---|---|---|---|")
    for (optimizer, rate), results in found.items():
        shares = ", ".join(f"{result['all']:.1%}" for result in results)
        mse = ", ".join(f"{result['mse']:.4f}" for result in results)
        seconds = ", ".join(f"{result['seconds']:.0f}" for result in results)
        print(f"| {optimizer} | {rate:g} | {shares} | {mse} | {seconds} |")


if __name__ == "__main__":
    main()
