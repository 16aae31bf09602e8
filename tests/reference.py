"""The reference implementations of our networks, and our weights in their names.

`unet`, `autoencoder` and `text_encoder` build the model of `diffusers` or `transformers` that has our config. `put(ours, theirs)`
gives it our weights by the key map of `ldm_minimal/stable_diffusion.py`; `translate` does the same to anything that is named like
them, such as gradients.
"""

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from ldm_minimal import ldm, stable_diffusion

# ---- the same model, built by them ----

def unet(config: ldm.UNetConfig) -> UNet2DConditionModel:
    kinds = [("CrossAttn{}Block2D" if level in config.attention else "{}Block2D") for level in range(len(config.mult))]
    return UNet2DConditionModel(
        in_channels=config.channels, out_channels=config.channels, block_out_channels=[config.width * m for m in config.mult],
        layers_per_block=config.blocks, attention_head_dim=config.heads,  # diffusers' name for the number of heads
        cross_attention_dim=config.context_width, norm_num_groups=config.groups,
        down_block_types=[k.format("Down") for k in kinds], up_block_types=[k.format("Up") for k in reversed(kinds)])


def autoencoder(config: ldm.AutoencoderConfig) -> AutoencoderKL:
    levels = len(config.mult)
    return AutoencoderKL(
        block_out_channels=[config.width * m for m in config.mult], layers_per_block=config.blocks, latent_channels=config.channels,
        norm_num_groups=config.groups, down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels)


def text_encoder(config: ldm.TextConfig, end: int | None = None) -> CLIPTextModel:
    """end: the id of the end token, at which `pooler_output` is read; the last one by default."""
    end = config.vocab_size - 1 if end is None else end
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=config.vocab_size, hidden_size=config.width, intermediate_size=4 * config.width, hidden_act="quick_gelu",
        num_hidden_layers=config.layers, num_attention_heads=config.heads, max_position_embeddings=config.length,
        eos_token_id=end, pad_token_id=end, bos_token_id=end - 1))


# ---- the same weights, in their names ----

def put(ours: nn.Module, theirs: nn.Module) -> nn.Module:
    """`theirs`, with the weights of `ours` in it; both in eval mode."""
    theirs.load_state_dict(translate(ours.state_dict(), ours, theirs))
    ours.eval()
    return theirs.eval()


def translate(state: dict, ours: nn.Module, theirs: nn.Module) -> dict:
    """Tensors named as in `ours` -> the same tensors named, and shaped, as in `theirs`."""
    like, found = theirs.state_dict(), {}
    for mine, _, names in ROWS[type(ours)](ours):
        for kind in ("weight", "bias"):
            if f"{mine.split()[0]}.{kind}" in state:
                whole, targets = torch.cat([state[f"{name}.{kind}"] for name in mine.split()]), names.split()
                found |= {f"{name}.{kind}": part for name, part in zip(targets, whole.chunk(len(targets)))}
    return {name: tensor.reshape(like[name].shape) for name, tensor in found.items()}  # a linear layer as a 1x1 convolution


ROWS = {ldm.UNet: stable_diffusion.unet_rows, ldm.Autoencoder: stable_diffusion.autoencoder_rows,
        ldm.TextEncoder: lambda encoder: stable_diffusion.text_rows(len(encoder.layers))}


# ---- weights worth comparing ----

@torch.no_grad()
def randomise(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """Every tensor random: a fresh network has zeros in it, and where they are, any two networks agree.

    Weights have variance 1 / fan_in, so that activations keep their size; norms scale by about 1; no bias is zero.
    """
    for part in module.modules():
        norm = isinstance(part, (nn.GroupNorm, nn.LayerNorm))
        for tensor in part.parameters(recurse=False):
            noise = torch.randn(tensor.shape, generator=generator)
            if isinstance(part, nn.Embedding):
                tensor.copy_(noise)
            elif tensor.ndim > 1:
                tensor.copy_(noise / tensor[0].numel() ** 0.5)
            else:
                tensor.copy_(0.3 * noise + (1 if norm and tensor is part.weight else 0))
    return module
