"""The reference implementations of our networks, and our weights under their names.

`unet`, `autoencoder` and `text_encoder` build the network of `diffusers` or `transformers` that has
our config. `put(ours, theirs)` gives it our weights by the key map of `stable_diffusion.py`.
`translate` does the same to anything that is named like them, such as gradients. `randomise` gives
ours weights that are worth comparing.
"""

import importlib.util
import pathlib

import pytest
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from ldm_minimal import ldm, stable_diffusion
from random_weights import randomise as randomise

# ---- the same network, built by them -----------------------------------------------------------


def unet(config):
    """diffusers' U-Net of a UNetConfig."""
    kinds = []
    for level in range(len(config.channel_mult)):
        has_attention = level in config.attention_levels
        kinds.append("CrossAttn{}Block2D" if has_attention else "{}Block2D")
    return UNet2DConditionModel(
        in_channels=config.latent_channels,
        out_channels=config.latent_channels,
        block_out_channels=[config.width * mult for mult in config.channel_mult],
        layers_per_block=config.num_res_blocks,
        attention_head_dim=config.num_heads,  # diffusers' name for the number of heads
        cross_attention_dim=config.context_width,
        norm_num_groups=config.num_groups,
        down_block_types=[kind.format("Down") for kind in kinds],
        up_block_types=[kind.format("Up") for kind in reversed(kinds)],
    )


def autoencoder(config):
    """diffusers' autoencoder of an AutoencoderConfig."""
    levels = len(config.channel_mult)
    return AutoencoderKL(
        block_out_channels=[config.width * mult for mult in config.channel_mult],
        layers_per_block=config.num_res_blocks,
        latent_channels=config.latent_channels,
        norm_num_groups=config.num_groups,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
    )


def text_encoder(config, end=None):
    """transformers' text tower of a TextConfig. end: the end token, by default the last one."""
    if end is None:
        end = config.vocab_size - 1
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            intermediate_size=4 * config.width,
            hidden_act="quick_gelu",
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            max_position_embeddings=config.length,
            bos_token_id=end - 1,
            eos_token_id=end,
            pad_token_id=end,
        )
    )


# ---- the same weights, under their names -------------------------------------------------------

ROWS = {
    ldm.UNet: stable_diffusion.unet_rows,
    ldm.Autoencoder: stable_diffusion.autoencoder_rows,
    ldm.TextEncoder: stable_diffusion.text_rows,
}


def translate(state, ours, theirs):
    """Tensors named as in `ours` -> the same tensors named, and shaped, as in `theirs`."""
    rows = stable_diffusion.tensor_rows(ROWS[type(ours)](ours), ours)
    like = theirs.state_dict()
    found = stable_diffusion.translate(state, rows, stable_diffusion.DIFFUSERS)
    return {name: tensor.reshape(like[name].shape) for name, tensor in found.items()}


def put(ours, theirs):
    """`theirs`, with the weights of `ours` in it. Both are in eval mode afterwards."""
    theirs.load_state_dict(translate(ours.state_dict(), ours, theirs))
    ours.eval()
    return theirs.eval()


# ---- how far apart -----------------------------------------------------------------------------


def relative_error(ours, theirs):
    """The largest difference, as a share of the largest number."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def assert_same(ours, theirs, tolerance):
    """Equal shapes, and a relative error of at most `tolerance`."""
    assert ours.shape == theirs.shape
    assert theirs.std() > 0.01, "nothing to compare"
    assert relative_error(ours, theirs) <= tolerance


# ---- CLIP's vocabulary -------------------------------------------------------------------------


def clip_vocabulary():
    """OpenAI's file in the package open_clip_torch, which is not imported. Skips without it."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None:
        pytest.skip("make test installs it: pip install --no-deps open_clip_torch==3.3.0")
    return pathlib.Path(spec.submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz"
