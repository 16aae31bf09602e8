"""The reference implementations of our networks, and our weights in their names.

`unet`, `autoencoder` and `text_encoder` build the model of `diffusers` or `transformers` that has our config. `put(ours, theirs)`
gives it our weights; `translate` does the same to anything that is named like them, such as gradients. A network is described
by one dict {our module: theirs}; two names for one module mean that it holds theirs one on top of the other, and one name for two
modules that theirs holds both of ours, in our order.
"""

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from ldm_minimal import ldm

RES = {"norm_in": "norm1", "conv_in": "conv1", "time": "time_emb_proj", "norm_out": "norm2", "conv_out": "conv2", "skip": "conv_shortcut"}
ATTENTION = {"query": "to_q", "key_value": ("to_k", "to_v"), "out": "to_out.0"}
TRANSFORMER_ENDS = {"norm": "norm", "project_in": "proj_in", "project_out": "proj_out"}
TRANSFORMER_NORMS_AND_MLP = {"norm_self": "norm1", "norm_cross": "norm2", "norm_mlp": "norm3", "mlp_value": "ff.net.0.proj",
                             "mlp_gate": "ff.net.0.proj", "mlp_out": "ff.net.2"}
TEXT_LAYER = {"norm_attention": "layer_norm1", "norm_mlp": "layer_norm2", "mlp_in": "mlp.fc1", "mlp_out": "mlp.fc2",
              "attention.query": "self_attn.q_proj", "attention.key_value": ("self_attn.k_proj", "self_attn.v_proj"),
              "attention.out": "self_attn.out_proj"}


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
    names, like, found = NAMES[type(ours)](ours), theirs.state_dict(), {}
    for name, tensor in state.items():
        module, kind = name.rsplit(".", 1)
        targets = names[module] if isinstance(names[module], tuple) else (names[module],)
        for target, part in zip(targets, tensor.chunk(len(targets))):
            found.setdefault(f"{target}.{kind}", []).append(part)
    return {name: torch.cat(parts).reshape(like[name].shape) for name, parts in found.items()}  # a linear layer as a 1x1 convolution


def under(ours: str, theirs: str, names: dict) -> dict:
    """The same names, one level deeper on either side."""
    deeper = lambda name: tuple(f"{theirs}.{n}" for n in name) if isinstance(name, tuple) else f"{theirs}.{name}"  # noqa: E731
    return {f"{ours}.{mine}": deeper(name) for mine, name in names.items()}


def transformer_names(ours: str, theirs: str) -> dict:
    inner = f"{theirs}.transformer_blocks.0"
    return (under(ours, theirs, TRANSFORMER_ENDS) | under(ours, inner, TRANSFORMER_NORMS_AND_MLP)
            | under(f"{ours}.attend_self", f"{inner}.attn1", ATTENTION) | under(f"{ours}.attend_cross", f"{inner}.attn2", ATTENTION))


def sequence_names(ours: str, theirs: str, modules, samplers: str, start: int = 0) -> dict:
    """Blocks that we hold in one row and diffusers by level and number: a Downsample or Upsample ends its level."""
    names, level, number = {}, 0, 0
    for i, module in enumerate(modules, start):
        mine, block = f"{ours}.{i}", f"{theirs}.{level}"
        if isinstance(module, (ldm.Downsample, ldm.Upsample)):
            names[f"{mine}.conv"] = f"{block}.{samplers}.0.conv"
            level, number = level + 1, 0
        else:
            names |= block_names(mine, f"{block}.resnets.{number}", f"{block}.attentions.{number}", module)
            number += 1
    return names


def block_names(ours: str, resnet: str, attention: str, module: nn.Module) -> dict:
    if isinstance(module, ldm.ResBlock):
        return under(ours, resnet, RES)
    return under(f"{ours}.res", resnet, RES) | transformer_names(f"{ours}.transformer", attention)


def unet_names(ours: ldm.UNet) -> dict:
    names = {"time.0": "time_embedding.linear_1", "time.2": "time_embedding.linear_2", "conv_in": "conv_in",
             "norm": "conv_norm_out", "conv_out": "conv_out"}
    for i, module in enumerate(ours.middle):
        names |= block_names(f"middle.{i}", f"mid_block.resnets.{i}", f"mid_block.attentions.{i}", module)
    return (names | sequence_names("down", "down_blocks", ours.down, "downsamplers")
            | sequence_names("up", "up_blocks", ours.up, "upsamplers"))


def autoencoder_names(ours: ldm.Autoencoder) -> dict:
    names = {"to_moments": "quant_conv", "from_latent": "post_quant_conv"}
    for side, first, theirs, samplers in (("encoder", -6, "down_blocks", "downsamplers"), ("decoder", 1, "up_blocks", "upsamplers")):
        modules = getattr(ours, side)
        last, first = len(modules) - 1, first % len(modules)  # the three blocks of the middle begin at `first`
        names |= {f"{side}.0": f"{side}.conv_in", f"{side}.{last - 2}": f"{side}.conv_norm_out", f"{side}.{last}": f"{side}.conv_out"}
        names |= under(f"{side}.{first}", f"{side}.mid_block.resnets.0", RES)
        names |= under(f"{side}.{first + 1}", f"{side}.mid_block.attentions.0", {"norm": "group_norm"})
        names |= under(f"{side}.{first + 1}.attention", f"{side}.mid_block.attentions.0", ATTENTION)
        names |= under(f"{side}.{first + 2}", f"{side}.mid_block.resnets.1", RES)
        start, stop = (1, first) if side == "encoder" else (first + 3, last - 2)
        names |= sequence_names(side, f"{side}.{theirs}", modules[start:stop], samplers, start)
    return names


def text_encoder_names(ours: ldm.TextEncoder) -> dict:
    names = {"token": "embeddings.token_embedding", "position": "embeddings.position_embedding", "norm": "final_layer_norm"}
    for i in range(len(ours.layers)):
        names |= under(f"layers.{i}", f"encoder.layers.{i}", TEXT_LAYER)
    return names


NAMES = {ldm.UNet: unet_names, ldm.Autoencoder: autoencoder_names, ldm.TextEncoder: text_encoder_names}


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
