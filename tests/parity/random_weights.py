"""Weights worth comparing. It imports nothing but torch, so that scripts can use it, too."""

import torch
from torch import nn


def seeded(seed=0):
    """A generator of its own for each use: no test depends on what ran before it."""
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def randomise(module, generator):
    """Every tensor of the module random. Where a fresh network has zeros, any two networks agree.

    Weights have variance 1 / fan_in, so that activations keep their size. Norms scale by about 1.
    No bias is zero.
    """
    for part in module.modules():
        is_norm = isinstance(part, (nn.GroupNorm, nn.LayerNorm))
        for name, tensor in part.named_parameters(recurse=False):
            values = torch.randn(tensor.shape, generator=generator)
            if isinstance(part, nn.Embedding):
                tensor.copy_(values)
            elif tensor.ndim > 1:
                tensor.copy_(values / tensor[0].numel() ** 0.5)
            elif is_norm and name == "weight":
                tensor.copy_(1 + 0.3 * values)
            else:
                tensor.copy_(0.3 * values)
    return module
