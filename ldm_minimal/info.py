"""python -m ldm_minimal info: parameters, bytes and floating-point operations of each part."""

from __future__ import annotations

import argparse

import torch
from torch.utils.flop_counter import FlopCounterMode

from .files import SHIPPED
from .ldm import NAMED_SIZES, Attention, LatentDiffusion
from .sample import load_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `info`."""
    parser.add_argument(
        "--model", default=SHIPPED, help="as for `sample` (default: the shipped model)"
    )
    parser.add_argument("--size", choices=sorted(NAMED_SIZES), help="a size instead of a model")


def run(args: argparse.Namespace) -> None:
    """The command. Raises ValueError or OSError for what is wrong with its options."""
    if args.size:
        with torch.device("meta"):
            model = LatentDiffusion(NAMED_SIZES[args.size])
    else:
        model = load_model(args.model, device="meta")
    for module in model.modules():
        if isinstance(module, Attention):
            module.keep_weights = True  # the counter does not see inside the fused kernel
    config = model.config
    latent_side = config.image_size // model.autoencoder.f
    c = config.autoencoder.latent_channels
    print(
        f"{config.name}: {config.image_size} x {config.image_size} images, "
        f"f = {model.autoencoder.f}, {c} x {latent_side} x {latent_side} latents, "
        f"scale factor {config.scale_factor}"
    )
    print(f"{'':<15}{'parameters':>15}{'MB':>10}{'GFLOP, one forward pass of one image':>42}")
    for name, flops in flops_of_parts(model).items():
        weights = list(getattr(model, name).parameters())
        parameters = sum(p.numel() for p in weights)
        megabytes = sum(p.numel() * p.element_size() for p in weights) / 1e6
        print(f"{name:<15}{parameters:>15,}{megabytes:>10.1f}{flops / 1e9:>42.3f}")


@torch.no_grad()
def flops_of_parts(model: LatentDiffusion) -> dict[str, int]:
    """Operations of one forward pass of each part, one image; a multiply-add counts as two."""
    config = model.config
    size = config.image_size
    latent_side = size // model.autoencoder.f
    with torch.device(model.device):
        x = torch.zeros(1, 3, size, size)
        z = torch.zeros(1, config.autoencoder.latent_channels, latent_side, latent_side)
        t = torch.zeros(1, dtype=torch.long)
        tokens = torch.zeros(1, config.text.length, dtype=torch.long)
        context = torch.zeros(1, config.text.length, config.text.width)
    inputs = {"text_encoder": (tokens,), "autoencoder": (x,), "unet": (z, t, context)}
    if model.image_encoder is not None:
        inputs["image_encoder"] = (x,)
    flops = {}
    for name, arguments in inputs.items():
        part = getattr(model, name)
        with FlopCounterMode(display=False) as counter:
            part(*arguments)
        flops[name] = counter.get_total_flops()
    return flops
