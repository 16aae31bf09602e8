"""Stable Diffusion 1.x's files <-> the classes of `ldm.py`; and the published LPIPS.

    model = stable_diffusion.load("v1-5-pruned-emaonly.safetensors", dtype=torch.float16)
    model.generate(["a photograph of an astronaut riding a horse"])
    stable_diffusion.save(model, "folder", layout="diffusers")

Two layouts are in use. They have different names for the same 1,130 tensors:

    compvis    one file, .safetensors or .ckpt, as CompVis and Runway published it
    diffusers  a folder with model_index.json, unet/, vae/, text_encoder/, scheduler/, tokenizer/

No code in a file is ever run. Safetensors hold none. A .ckpt is a pickle: torch reads it with
`weights_only=True`, and a stand-in that does nothing takes the place of the few classes that
Lightning leaves in such files.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import pathlib
import re
import warnings
import zipfile

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.serialization import safe_globals
from tqdm.auto import tqdm

from .files import whole_file, whole_folder
from .ldm import (
    SD1,
    AttentionBlock,
    Autoencoder,
    AutoencoderConfig,
    Config,
    Downsample,
    LatentDiffusion,
    PerceptualLoss,
    ResBlock,
    TextConfig,
    TextEncoder,
    Tokenizer,
    UNet,
    UNetBlock,
    UNetConfig,
    Upsample,
)

__all__ = ["load", "save", "key_map", "load_tokenizer", "published_lpips"]


# ------------------------------------------------------------------------------------------------
#                                           The key map
# ------------------------------------------------------------------------------------------------
# A row names the same layer in three languages: (ours, compvis, diffusers). Several names in one
# column, separated by spaces, are layers whose weights, stacked in this order, are the weight of
# the one layer in another column: our keys and values are one matrix, and so are their halves of
# GEGLU.

Row = tuple[str, str, str]
OURS, COMPVIS, DIFFUSERS = range(3)


def _alike(*pairs: tuple[str, str]) -> list[Row]:
    """Rows of layers that have the same name in both layouts: (ours, theirs)."""
    return [(ours, theirs, theirs) for ours, theirs in pairs]


RES_BLOCK = [
    ("norm1", "in_layers.0", "norm1"),
    ("conv1", "in_layers.2", "conv1"),
    ("t_proj", "emb_layers.1", "time_emb_proj"),
    ("norm2", "out_layers.0", "norm2"),
    ("conv2", "out_layers.3", "conv2"),
    ("skip", "skip_connection", "conv_shortcut"),
]
TRANSFORMER = _alike(
    ("norm", "norm"),
    ("proj_in", "proj_in"),
    ("norm_self", "transformer_blocks.0.norm1"),
    ("self_attn.to_q", "transformer_blocks.0.attn1.to_q"),
    ("self_attn.to_kv", "transformer_blocks.0.attn1.to_k transformer_blocks.0.attn1.to_v"),
    ("self_attn.to_out", "transformer_blocks.0.attn1.to_out.0"),
    ("norm_cross", "transformer_blocks.0.norm2"),
    ("cross_attn.to_q", "transformer_blocks.0.attn2.to_q"),
    ("cross_attn.to_kv", "transformer_blocks.0.attn2.to_k transformer_blocks.0.attn2.to_v"),
    ("cross_attn.to_out", "transformer_blocks.0.attn2.to_out.0"),
    ("norm_mlp", "transformer_blocks.0.norm3"),
    ("mlp_value mlp_gate", "transformer_blocks.0.ff.net.0.proj"),
    ("mlp_out", "transformer_blocks.0.ff.net.2"),
    ("proj_out", "proj_out"),
)
AUTOENCODER_RES_BLOCK = [
    ("norm1", "norm1", "norm1"),
    ("conv1", "conv1", "conv1"),
    ("norm2", "norm2", "norm2"),
    ("conv2", "conv2", "conv2"),
    ("skip", "nin_shortcut", "conv_shortcut"),
]
AUTOENCODER_ATTENTION = [
    ("norm", "norm", "group_norm"),
    ("attn.to_q", "q", "to_q"),
    ("attn.to_kv", "k v", "to_k to_v"),
    ("attn.to_out", "proj_out", "to_out.0"),
]
TEXT_BLOCK = _alike(
    ("norm1", "layer_norm1"),
    ("attn.to_q", "self_attn.q_proj"),
    ("attn.to_kv", "self_attn.k_proj self_attn.v_proj"),
    ("attn.to_out", "self_attn.out_proj"),
    ("norm2", "layer_norm2"),
    ("mlp_in", "mlp.fc1"),
    ("mlp_out", "mlp.fc2"),
)


def key_map(model: LatentDiffusion) -> list[Row]:
    """Every tensor of the model in three languages: rows of (ours, compvis, diffusers).

    The first word of a diffusers name is the folder. Several names in a column, separated by
    spaces, are tensors that lie on top of each other in a column with fewer names. A linear layer
    in one language may be a 1x1 convolution in another.
    """
    text_tower = ("cond_stage_model.transformer.text_model", "text_encoder.text_model")
    return _tensor_rows(
        [
            *_under(("unet", "model.diffusion_model", "unet"), unet_rows(model.unet)),
            *_under(
                ("autoencoder", "first_stage_model", "vae"), autoencoder_rows(model.autoencoder)
            ),
            *_under(("text_encoder", *text_tower), text_rows(model.text_encoder)),
        ],
        model,
    )


def unet_rows(unet: UNet) -> list[Row]:
    """The layers of the U-Net.

    CompVis numbers all blocks in one sequence. On the way up, an Upsample is the last part of the
    block before it.
    """
    rows = [
        ("time_mlp.0", "time_embed.0", "time_embedding.linear_1"),
        ("time_mlp.2", "time_embed.2", "time_embedding.linear_2"),
        ("conv_in", "input_blocks.0.0", "conv_in"),
        ("norm_out", "out.0", "conv_norm_out"),
        ("conv_out", "out.2", "conv_out"),
    ]

    level, number = 0, 0  # of diffusers' blocks: the level, and the block in it
    for i, layer in enumerate(unet.down):
        block = f"input_blocks.{i + 1}"
        if isinstance(layer, UNetBlock):
            rows += _unet_block_rows(f"down.{i}", block, f"down_blocks.{level}", number)
            number += 1
        else:
            theirs = f"down_blocks.{level}.downsamplers.0.conv"
            rows.append((f"down.{i}.conv", f"{block}.0.op", theirs))
            level, number = level + 1, 0

    rows += _under(("middle.0.res", "middle_block.0", "mid_block.resnets.0"), RES_BLOCK)
    rows += _under(
        ("middle.0.transformer", "middle_block.1", "mid_block.attentions.0"), TRANSFORMER
    )
    rows += _under(("middle.1.res", "middle_block.2", "mid_block.resnets.1"), RES_BLOCK)

    level, number = 0, 0
    blocks = 0  # of output_blocks so far
    for i, layer in enumerate(unet.up):
        if isinstance(layer, UNetBlock):
            block = f"output_blocks.{blocks}"
            rows += _unet_block_rows(f"up.{i}", block, f"up_blocks.{level}", number)
            number += 1
            blocks += 1
        else:
            part = 1 if unet.up[i - 1].transformer is None else 2
            theirs = f"up_blocks.{level}.upsamplers.0.conv"
            rows.append((f"up.{i}.conv", f"output_blocks.{blocks - 1}.{part}.conv", theirs))
            level, number = level + 1, 0
    return rows


def _unet_block_rows(ours: str, compvis: str, level: str, number: int) -> list[Row]:
    res = (f"{ours}.res", f"{compvis}.0", f"{level}.resnets.{number}")
    transformer = (f"{ours}.transformer", f"{compvis}.1", f"{level}.attentions.{number}")
    return _under(res, RES_BLOCK) + _under(transformer, TRANSFORMER)


def autoencoder_rows(autoencoder: Autoencoder) -> list[Row]:
    """The layers of the autoencoder, each side of which is one sequence of layers in our code."""
    return [
        *_side_rows("encoder", autoencoder.encoder, "down"),
        ("to_moments", "quant_conv", "quant_conv"),
        ("from_latent", "post_quant_conv", "post_quant_conv"),
        *_side_rows("decoder", autoencoder.decoder, "up"),
    ]


def _side_rows(side: str, layers: nn.Sequential, way: str) -> list[Row]:
    """The rows of encoder or decoder. CompVis numbers levels by their size, also on the way up."""
    last = len(layers) - 1
    attention = next(i for i in range(last) if isinstance(layers[i], AttentionBlock))
    rows = [
        ("0", "conv_in", "conv_in"),
        *_under((f"{attention - 1}", "mid.block_1", "mid_block.resnets.0"), AUTOENCODER_RES_BLOCK),
        *_under((f"{attention}", "mid.attn_1", "mid_block.attentions.0"), AUTOENCODER_ATTENTION),
        *_under((f"{attention + 1}", "mid.block_2", "mid_block.resnets.1"), AUTOENCODER_RES_BLOCK),
        (f"{last - 2}", "norm_out", "conv_norm_out"),
        (f"{last}", "conv_out", "conv_out"),
    ]
    highest_level = sum(isinstance(layer, (Downsample, Upsample)) for layer in layers)
    level, number = 0, 0  # the level, and the block in it
    for i, layer in enumerate(layers):
        compvis = f"{way}.{level if way == 'down' else highest_level - level}"
        diffusers = f"{way}_blocks.{level}"
        if isinstance(layer, ResBlock) and abs(i - attention) > 1:
            names = (f"{i}", f"{compvis}.block.{number}", f"{diffusers}.resnets.{number}")
            rows += _under(names, AUTOENCODER_RES_BLOCK)
            number += 1
        elif isinstance(layer, (Downsample, Upsample)):
            theirs = f"{diffusers}.{way}samplers.0.conv"
            rows.append((f"{i}.conv", f"{compvis}.{way}sample.conv", theirs))
            level, number = level + 1, 0
    return _under((side, side, side), rows)


def text_rows(text_encoder: TextEncoder) -> list[Row]:
    """The layers of the text tower."""
    rows = _alike(
        ("token_embedding", "embeddings.token_embedding"),
        ("position_embedding", "embeddings.position_embedding"),
        ("final_norm", "final_layer_norm"),
    )
    for i in range(len(text_encoder.blocks)):
        theirs = f"encoder.layers.{i}"
        rows += _under((f"blocks.{i}", theirs, theirs), TEXT_BLOCK)
    return rows


def _under(prefixes: Row, rows: list[Row]) -> list[Row]:
    """The same rows, each column's names under its prefix."""
    deeper = []
    for row in rows:
        columns = zip(prefixes, row)
        deeper.append(tuple(_for_each(f"{prefix}.{{}}", names) for prefix, names in columns))
    return deeper


def _tensor_rows(rows: list[Row], module: nn.Module) -> list[Row]:
    """From layers to the weights and biases that `module` has."""
    ours = module.state_dict()
    tensors = []
    for row in rows:
        for kind in ("weight", "bias"):
            names = tuple(_for_each(f"{{}}.{kind}", names) for names in row)
            if names[OURS].split()[0] in ours:
                tensors.append(names)
    return tensors


def _for_each(form: str, names: str) -> str:
    return " ".join(form.format(name) for name in names.split())


def translate(state: dict[str, Tensor], rows: list[Row], column: int) -> dict[str, Tensor]:
    """Tensors under our names -> the same tensors under the names of another column."""
    translated = {}
    for row in rows:
        names = row[column].split()
        parts = _restack([state[name] for name in row[OURS].split()], len(names))
        translated |= dict(zip(names, parts))
    return translated


def _restack(parts: list[Tensor], count: int) -> list[Tensor]:
    """The same rows in `count` tensors of equal height."""
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    return list(whole.chunk(count))


# ------------------------------------------------------------------------------------------------
#                                             Reading
# ------------------------------------------------------------------------------------------------

OLD_NAMES = [  # of earlier generations of files, as regular expressions -> today's
    (r"(mid_block\.attentions\.0)\.query\.", r"\1.to_q."),
    (r"(mid_block\.attentions\.0)\.key\.", r"\1.to_k."),
    (r"(mid_block\.attentions\.0)\.value\.", r"\1.to_v."),
    (r"(mid_block\.attentions\.0)\.proj_attn\.", r"\1.to_out.0."),
    # some single files, and transformers 5
    (
        r"^(text_encoder|cond_stage_model\.transformer)\.(?=embeddings\.|encoder\.|final_layer_)",
        r"\1.text_model.",
    ),
]
IGNORED = re.compile(  # what official files hold besides the model
    r"""
    model_ema\..*            # the average of the weights, once more
    | .*\.position_ids       # 0 ... 76
    | betas                  # the noise schedule as tables
    | (sqrt_|sqrt_recip_|sqrt_recipm1_|sqrt_one_minus_|log_one_minus_)?alphas_cumprod(_prev)?
    | posterior_(variance|log_variance_clipped|mean_coef1|mean_coef2)
    """,
    re.VERBOSE,
)
OTHER_MODELS = {  # a part of a tensor's name -> what the file is
    "lora": "a LoRA: small changes to a model, not a model",
    "conditioner.embedders.": "Stable Diffusion XL, which has two text towers",
    "cond_stage_model.model.": "Stable Diffusion 2, which has another text tower",
    "control_model.": "a ControlNet",
    "joint_blocks.": "Stable Diffusion 3, which has no U-Net",
    "double_blocks.": "Flux, which has no U-Net",
    "unet.down.0.res.": "a model of ours; name its folder",
}
STAND_INS = [  # classes that a checkpoint may name although its tensors do not need them
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
]


class Inert:
    """Takes the place of each of STAND_INS: accepts anything, does nothing."""

    def __init__(self, *_):
        pass

    def __setstate__(self, _):
        pass


def load(
    path: str | os.PathLike,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    tokenizer: str | os.PathLike | Tokenizer | None = None,
    progress: bool = False,
) -> LatentDiffusion:
    """Stable Diffusion 1.x from one file (.safetensors, .ckpt) or a `diffusers` folder, in eval mode.

    dtype: None for float32. device: None for the CPU; "meta" checks the file and reads neither
    weights nor tokenizer. tokenizer: one that is loaded, or what `load_tokenizer` takes; None for
    the folder's own or, of a single file, for the one that `save` wrote into it, else the hub's.
    progress: show a bar. Raises ValueError, in one line, for a file that is broken, holds code or
    is another model, naming the tensors that are missing, left over or of another shape.
    """
    path = pathlib.Path(path)
    device = torch.device(device or "cpu")
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    if path.is_dir():
        column = DIFFUSERS
        config = _folder_config(path)
        files = _folder_files(path, dtype)  # by the prefix that their tensors' names get
        own_tokenizer = path / "tokenizer"
    else:
        column = COMPVIS
        config, own_tokenizer = _file_config(path)
        files = {"": path}
    model = _empty_model(path, config)

    like = model.state_dict()
    rows = {}
    for prefix, file in files.items():
        rows[prefix] = [
            (row[OURS], row[column]) for row in key_map(model) if row[column].startswith(prefix)
        ]
        _check_tensors(file, _tensors(file, prefix), rows[prefix], like)
    if device.type == "meta":
        return model.eval()

    model.tokenizer = _fitting_tokenizer(path, tokenizer or own_tokenizer, config.text)
    state = {}
    for prefix, file in files.items():
        state |= _read(file, prefix, rows[prefix], like, dtype or torch.float32, device, progress)
    model.load_state_dict(state, assign=True)
    return model.eval()


def _empty_model(path: pathlib.Path, config: Config) -> LatentDiffusion:
    try:
        with torch.device("meta"):
            return LatentDiffusion(config)
    except Exception as error:  # torch raises many kinds
        raise ValueError(f"{path}: its config describes no model that works ({error})") from None


def _read(
    path: pathlib.Path,
    prefix: str,
    rows: list[tuple[str, str]],
    like: dict[str, Tensor],
    dtype: torch.dtype,
    device: torch.device,
    progress: bool,
) -> dict[str, Tensor]:
    """The file's tensors under our names, each read straight into its dtype and device.

    The file is mapped. What was read of it stays in memory until it is closed, so it is opened
    again after every 128 MB.
    """
    tensors = _tensors(path, prefix)
    bytes_read = 0
    state = {}
    bar = tqdm(rows, desc=f"reading {prefix}{path.name}", disable=not progress, leave=False)
    for ours, theirs in bar:
        if bytes_read > 2**27:
            tensors = _tensors(path, prefix)
            bytes_read = 0
        parts = [tensors[name] for name in theirs.split()]
        bytes_read += sum(part.nbytes for part in parts)
        names = ours.split()
        for name, part in zip(names, _restack(parts, len(names))):
            is_convolution = like[name].ndim == 4
            layout = torch.channels_last if is_convolution else torch.contiguous_format
            part = part.reshape(like[name].shape)
            state[name] = part.to(device, dtype, copy=True, memory_format=layout)
    return state


def _tensors(path: pathlib.Path, prefix: str) -> dict[str, Tensor]:
    """The file's tensors by today's names, with `prefix` before them."""
    tensors = {prefix + name: tensor for name, tensor in _open_tensors(path).items()}
    for old, new in OLD_NAMES:
        tensors = {re.sub(old, new, name): tensor for name, tensor in tensors.items()}
    return tensors


def _open_tensors(path: pathlib.Path) -> dict[str, Tensor]:
    """The file's tensors by name, mapped: their bytes are read from the disk when they are used."""
    if path.suffix not in (".safetensors", ".ckpt", ".bin"):
        raise ValueError(f"{path} must be a folder, or end in .safetensors or .ckpt")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        stand_ins = [(Inert, name) for name in STAND_INS]
        with safe_globals(stand_ins), warnings.catch_warnings(action="ignore"):
            can_map = zipfile.is_zipfile(path)
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=can_map)
    except Exception as error:  # both libraries raise many kinds
        if code := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ValueError(
                f"{path} names {code[1]}, which is code and no tensor; it was not run, and the file "
                "is not read"
            ) from None
        raise ValueError(
            f"{path} cannot be read: it is cut off, or not what its name says"
        ) from None
    if not isinstance(found, dict):
        return {}
    found = found.get("state_dict", found)
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def _check_tensors(
    path: pathlib.Path,
    found: dict[str, Tensor],
    rows: list[tuple[str, str]],
    like: dict[str, Tensor],
) -> None:
    """Raise ValueError unless every tensor is accounted for, on both sides."""
    for sign, what in OTHER_MODELS.items():
        if any(sign in name.lower() for name in found):
            raise ValueError(f"{path} is {what}; Stable Diffusion 1 is read here")

    wanted = {}
    for ours, theirs in rows:
        height = sum(len(like[name]) for name in ours.split())
        other_sizes = like[ours.split()[0]].shape[1:]
        names = theirs.split()
        wanted |= {name: (height // len(names), *other_sizes) for name in names}

    unlike = []
    for name in wanted.keys() & found.keys():
        if _as_linear(found[name].shape) != _as_linear(wanted[name]):
            shapes = f"{_times(found[name].shape)}, not {_times(wanted[name])}"
            unlike.append(f"{name}: {shapes}")
    problems = {
        "missing": [name for name in wanted if name not in found],
        "left over": [n for n in found if n not in wanted and not IGNORED.fullmatch(n)],
        "of another shape": sorted(unlike),
    }
    said = []
    for problem, names in problems.items():
        if names:
            examples = names[:3] + ["..."] * (len(names) > 3)
            said.append(f"{len(names)} {problem} ({', '.join(examples)})")
    if said:
        raise ValueError(f"{path} is not Stable Diffusion 1: of its tensors {'; '.join(said)}")


def _as_linear(shape: tuple[int, ...]) -> tuple[int, ...]:
    is_1x1_convolution = tuple(shape[2:]) == (1, 1)
    return tuple(shape[:2]) if is_1x1_convolution else tuple(shape)


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(str(size) for size in shape)


# ------------------------------------------------------------------------------------------------
#                                             Configs
# ------------------------------------------------------------------------------------------------

SCHEDULES = {  # our kind of schedule -> diffusers' beta_schedule, beta_start and beta_end
    "scaled-linear": ("scaled_linear", 0.00085, 0.012),
    "linear": ("linear", 1e-4, 0.02),
    "cosine": ("squaredcos_cap_v2", 1e-4, 0.02),
}
# These may differ from what we write: names, image sizes, and the choice of a sampler.
NOT_COMPARED = {"_class_name", "architectures", "model_type", "sample_size", "clip_sample"}
NOT_COMPARED |= {"timestep_spacing", "set_alpha_to_one", "steps_offset"}


def _diffusers_configs(config: Config) -> dict[str, dict]:
    """The configs of diffusers' parts, by their folders.

    Besides our own numbers they hold those options, at the only value that our classes have, that
    would change the network and leave its tensors as they are.
    """
    unet, vae, text = config.unet, config.autoencoder, config.text
    block_kinds = []
    for level in range(len(unet.channel_mult)):
        attention = "CrossAttn" if level in unet.attention_levels else ""
        block_kinds.append(attention + "{}Block2D")
    vae_levels = len(vae.channel_mult)
    beta_schedule, beta_start, beta_end = SCHEDULES[config.schedule]
    return {
        "unet": {
            "_class_name": "UNet2DConditionModel",
            "sample_size": config.image_size // 2 ** (vae_levels - 1),
            "in_channels": unet.latent_channels,
            "out_channels": unet.latent_channels,
            "block_out_channels": [unet.width * mult for mult in unet.channel_mult],
            "layers_per_block": unet.num_res_blocks,
            "attention_head_dim": unet.num_heads,  # diffusers' name for the number of heads
            "num_attention_heads": None,
            "cross_attention_dim": unet.context_width,
            "norm_num_groups": unet.num_groups,
            "down_block_types": [kind.format("Down") for kind in block_kinds],
            "up_block_types": [kind.format("Up") for kind in reversed(block_kinds)],
            "act_fn": "silu",
            "norm_eps": 1e-5,
            "center_input_sample": False,
            "flip_sin_to_cos": True,
            "freq_shift": 0,
            "time_embedding_act_fn": None,
            "timestep_post_act": None,
            "class_embed_type": None,
            "downsample_padding": 1,
            "mid_block_scale_factor": 1,
        },
        "vae": {
            "_class_name": "AutoencoderKL",
            "sample_size": config.image_size,
            "latent_channels": vae.latent_channels,
            "block_out_channels": [vae.width * mult for mult in vae.channel_mult],
            "layers_per_block": vae.num_res_blocks,
            "norm_num_groups": vae.num_groups,
            "down_block_types": ["DownEncoderBlock2D"] * vae_levels,
            "up_block_types": ["UpDecoderBlock2D"] * vae_levels,
            "act_fn": "silu",
            "scaling_factor": config.scale_factor,
            "shift_factor": None,
        },
        "text_encoder": {
            "architectures": ["CLIPTextModel"],
            "model_type": "clip_text_model",
            "vocab_size": text.vocab_size,
            "hidden_size": text.width,
            "intermediate_size": 4 * text.width,
            "num_hidden_layers": text.num_layers,
            "num_attention_heads": text.num_heads,
            "max_position_embeddings": text.length,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
        },
        "scheduler": {
            "_class_name": "DDIMScheduler",
            "num_train_timesteps": config.T,
            "beta_schedule": beta_schedule,
            "beta_start": beta_start,
            "beta_end": beta_end,
            "trained_betas": None,
            "rescale_betas_zero_snr": False,
            "prediction_type": "epsilon",
            "clip_sample": False,
            "thresholding": False,
            "timestep_spacing": config.spacing,
            "set_alpha_to_one": config.spacing == "trailing",
            "steps_offset": 1,  # "leading" ends at t = 1
        },
    }


def _config_from_diffusers(name: str, unet: dict, vae: dict, text: dict, scheduler: dict) -> Config:
    """The inverse of `_diffusers_configs`; where an old file says nothing, Stable Diffusion's values."""
    for key in ("attention_head_dim", "layers_per_block", "cross_attention_dim"):
        if isinstance(unet.get(key), list):
            raise ValueError(f"{key} = {unet[key]}; our classes have one number for all levels")
    kinds = {beta_schedule: kind for kind, (beta_schedule, _, _) in SCHEDULES.items()}
    unet_channels, vae_channels = unet["block_out_channels"], vae["block_out_channels"]
    down = unet["down_block_types"]
    is_trailing = scheduler.get("timestep_spacing") == "trailing"
    return Config(
        name=name,
        image_size=unet.get("sample_size", 64) * 2 ** (len(vae_channels) - 1),
        text=TextConfig(
            vocab_size=text["vocab_size"],
            width=text["hidden_size"],
            num_layers=text["num_hidden_layers"],
            num_heads=text["num_attention_heads"],
            length=text.get("max_position_embeddings", 77),
        ),
        image=None,
        autoencoder=AutoencoderConfig(
            width=vae_channels[0],
            channel_mult=tuple(c // vae_channels[0] for c in vae_channels),
            num_res_blocks=vae["layers_per_block"],
            latent_channels=vae["latent_channels"],
            num_groups=vae.get("norm_num_groups", 32),
        ),
        unet=UNetConfig(
            latent_channels=unet["in_channels"],
            width=unet_channels[0],
            channel_mult=tuple(c // unet_channels[0] for c in unet_channels),
            num_res_blocks=unet["layers_per_block"],
            attention_levels=tuple(i for i in range(len(down)) if down[i].startswith("CrossAttn")),
            num_heads=unet.get("attention_head_dim", 8),
            context_width=unet["cross_attention_dim"],
            num_groups=unet.get("norm_num_groups", 32),
        ),
        schedule=kinds[scheduler["beta_schedule"]],
        T=scheduler["num_train_timesteps"],
        spacing="trailing" if is_trailing else "leading",
        scale_factor=vae.get("scaling_factor", 0.18215),
    )


def _folder_config(path: pathlib.Path) -> Config:
    """The Config of a `diffusers` folder. Raises ValueError for what our classes do not cover."""
    pipeline = _read_json(path, "model_index.json").get("_class_name")
    if pipeline != "StableDiffusionPipeline":
        raise ValueError(f"{path} holds a {pipeline}; a StableDiffusionPipeline is read here")
    found = {
        "unet": _read_json(path, "unet/config.json"),
        "vae": _read_json(path, "vae/config.json"),
        "text_encoder": _read_json(path, "text_encoder/config.json"),
        "scheduler": _read_json(path, "scheduler/scheduler_config.json"),
    }
    try:
        config = _config_from_diffusers(path.name, *found.values())
        expected = _diffusers_configs(config)
    except Exception as error:  # whatever a missing or odd value leads to
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{path}: its configs do not describe a Stable Diffusion 1 ({reason})"
        ) from None
    for folder, values in found.items():  # what our config cannot say comes out different
        for key, ours in expected[folder].items():
            if key not in NOT_COMPARED and values.get(key, ours) != ours:
                raise ValueError(
                    f"{path / folder}: its config has {key} = {values[key]!r}; only {ours!r} is "
                    "possible in our classes"
                )
    return config


def _read_json(folder: pathlib.Path, name: str) -> dict:
    try:
        found = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder} is no `diffusers` folder: it has no {name}") from None
    except (ValueError, OSError):
        raise ValueError(f"{folder / name} cannot be read as JSON") from None
    if not isinstance(found, dict):
        raise ValueError(f"{folder / name} cannot be read as JSON: it holds no object")
    return found


def _folder_files(path: pathlib.Path, dtype: torch.dtype | None) -> dict[str, pathlib.Path]:
    """The weights of each part, as {"unet.": file, ...}: safetensors before pickles.

    Where half precision is asked for, the variant in half precision comes first.
    """
    endings = [".safetensors", ".fp16.safetensors", ".bin"]
    if dtype == torch.float16:
        endings = [".fp16.safetensors", ".safetensors", ".bin"]
    files = {}
    for part in ("unet", "vae", "text_encoder"):
        names = [WEIGHTS[part] + ending for ending in endings]
        there = [path / part / name for name in names if (path / part / name).is_file()]
        if not there:
            raise ValueError(f"{path / part} holds no weights; one of {', '.join(names)} is needed")
        files[f"{part}."] = there[0]
    return files


def _file_config(path: pathlib.Path) -> tuple[Config, Tokenizer | None]:
    """Config and tokenizer of a single file: those that `save` wrote, else SD1 and None."""
    _open_tensors(path)  # which says what is wrong with the file
    own = None
    if path.suffix == ".safetensors":
        with safetensors.safe_open(path, framework="pt") as file:
            own = (file.metadata() or {}).get("ldm_minimal")
    if own is None:
        return SD1, None
    try:
        own = json.loads(own)
        config = Config.from_dict(own["config"])
        return config, Tokenizer(own["vocab"], own["merges"], config.text.length)
    except Exception:  # `tokenizers` raises bare ones
        raise ValueError(f"{path} says that it is ours, but its config cannot be read") from None


# ------------------------------------------------------------------------------------------------
#                                            Tokenizer
# ------------------------------------------------------------------------------------------------

HUB = "openai/clip-vit-large-patch14"
TOKENIZERS = (
    "a folder with vocab.json and merges.txt, a tokenizer.json, or bpe_simple_vocab_16e6.txt.gz"
)


def load_tokenizer(path: str | os.PathLike | None = None, length: int = 77) -> Tokenizer:
    """CLIP's tokenizer.

    path: a folder with vocab.json and merges.txt or with tokenizer.json, such a tokenizer.json, or
    OpenAI's bpe_simple_vocab_16e6.txt.gz (in the PyPI package open_clip_torch); None for the hub's,
    or its cache. length: tokens of a caption. Raises ValueError saying what is not there.
    """
    path = _tokenizer_from_hub() if path is None else pathlib.Path(path)
    try:
        if path.name.endswith(".gz"):
            lines = gzip.open(path, "rt", encoding="utf-8").read().splitlines()
            used = 49408 - 2 * 256 - 2 + 1  # with the headline; CLIP was trained without the rest
            return Tokenizer.from_merges(_merges(lines[:used]), length)
        if (path / "vocab.json").is_file():
            vocab = json.loads((path / "vocab.json").read_text(encoding="utf-8"))
            lines = (path / "merges.txt").read_text(encoding="utf-8").splitlines()
            return Tokenizer(vocab, _merges(lines), length)
        return Tokenizer.load(path / "tokenizer.json" if path.is_dir() else path, length)
    except Exception as error:  # `tokenizers` raises bare ones
        reason = " ".join(str(error).split())[:100]
        raise ValueError(
            f"{path} holds no tokenizer that can be read ({reason}); allowed are {TOKENIZERS}"
        ) from None


def _merges(lines: list[str]) -> list[tuple[str, str]]:
    headlines = ("#version", '"bpe_simple_vocab')
    return [tuple(line.split()) for line in lines if line and not line.startswith(headlines)]


def _tokenizer_from_hub() -> pathlib.Path:
    """The folder in which huggingface_hub keeps CLIP's tokenizer; downloaded once."""
    problem = "a single file holds no tokenizer, and"
    instead = f"give a tokenizer (--tokenizer PATH): {TOKENIZERS}"
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils import logging
    except ImportError:
        raise ValueError(
            f"{problem} huggingface_hub is not installed; pip install it, or {instead}"
        ) from None
    logging.set_verbosity_error()  # its warnings say at length what the line below says
    try:
        hf_hub_download(HUB, "merges.txt", etag_timeout=5)
        return pathlib.Path(hf_hub_download(HUB, "vocab.json", etag_timeout=5)).parent
    except Exception as error:  # the hub's client raises many kinds
        reason = type(error).__name__
        raise ValueError(f"{problem} the hub cannot be reached ({reason}); {instead}") from None


def _fitting_tokenizer(
    path: pathlib.Path, tokenizer: str | os.PathLike | Tokenizer | None, text: TextConfig
) -> Tokenizer:
    """The tokenizer, loaded. Raises ValueError unless it is one for this text encoder."""
    if not isinstance(tokenizer, Tokenizer):
        tokenizer = load_tokenizer(tokenizer, text.length)
    entries = len(tokenizer.vocab)
    # Ours may have fewer entries than the text encoder has rows, CLIP's has as many.
    if entries > text.vocab_size or (text == SD1.text and entries < text.vocab_size):
        raise ValueError(
            f"the tokenizer has {entries:,} entries, the text encoder of {path} {text.vocab_size:,}"
        )
    return tokenizer


# ------------------------------------------------------------------------------------------------
#                                             Writing
# ------------------------------------------------------------------------------------------------

MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "safety_checker": [None, None],
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
}


def save(model: LatentDiffusion, path: str | os.PathLike, layout: str = "diffusers") -> None:
    """Write the model for other programs: layout "compvis", one .safetensors file, or "diffusers".

    In the dtype that it has. `load` gives back the same three networks, tokenizer and sampler; an
    image encoder is left out, and the diffusers layout has no room for the recipe of the training.
    The single file holds config and tokenizer as metadata, which other programs ignore. Raises
    ValueError for another layout, a wrong name, or a folder that holds something else.
    """
    path = pathlib.Path(path)
    if layout not in ("compvis", "diffusers"):
        raise ValueError(f"layout is {layout!r}; allowed are 'compvis' and 'diffusers'")
    if model.tokenizer is None or model.config.scale_factor is None:
        raise ValueError(
            "the model has no tokenizer or no scale_factor yet: it is not trained to the end"
        )
    if layout == "compvis":
        _save_file(model, path)
    else:
        _save_folder(model, path)


def _save_file(model: LatentDiffusion, path: pathlib.Path) -> None:
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} must end in .safetensors")
    own = {
        "config": dataclasses.asdict(model.config) | {"image": None},
        "vocab": model.tokenizer.vocab,
        "merges": model.tokenizer.merges,
    }
    metadata = {"format": "pt", "ldm_minimal": json.dumps(own)}
    with whole_file(path) as partial:
        safetensors.torch.save_file(layout_state(model, COMPVIS), partial, metadata)


def _save_folder(model: LatentDiffusion, path: pathlib.Path) -> None:
    if path.exists() and not (path / "model_index.json").is_file():
        raise ValueError(f"{path} exists and is no model; choose a new folder")
    configs = _diffusers_configs(model.config)
    configs["text_encoder"] |= {
        "bos_token_id": model.tokenizer.start,
        "eos_token_id": model.tokenizer.end,
        "pad_token_id": model.tokenizer.end,
    }
    state = layout_state(model, DIFFUSERS)
    with whole_folder(path) as partial:
        _write_json(partial / "model_index.json", MODEL_INDEX)
        for part, config in configs.items():
            folder = partial / part
            folder.mkdir()
            if part == "scheduler":
                _write_json(folder / "scheduler_config.json", config)
                continue
            _write_json(folder / "config.json", config)
            stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
            own = {n.removeprefix(f"{part}."): t for n, t in state.items() if n.startswith(part)}
            safetensors.torch.save_file(own, folder / f"{stem}.safetensors", {"format": "pt"})
        save_tokenizer(model.tokenizer, partial / "tokenizer")


def layout_state(model: LatentDiffusion, column: int) -> dict[str, Tensor]:
    """Every tensor as the layout names and shapes it."""
    state = translate(model.state_dict(), key_map(model), column)
    for name, tensor in state.items():
        # Linear layers in our classes, 1x1 convolutions there.
        if re.search(r"\.proj_(in|out)\.weight$|mid\.attn_1\.[qkv]\.weight$", name):
            tensor = tensor[:, :, None, None]
        state[name] = tensor.contiguous()
    return state


def save_tokenizer(tokenizer: Tokenizer, folder: pathlib.Path) -> None:
    """Write the two files of CLIP's tokenizer, and what transformers wants to know beside them."""
    folder.mkdir()
    marks = {
        "bos_token": tokenizer.START,
        "eos_token": tokenizer.END,
        "unk_token": tokenizer.END,
        "pad_token": tokenizer.END,
    }
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": tokenizer.length,
        "do_lower_case": True,
    }
    _write_json(folder / "vocab.json", tokenizer.vocab)
    merges = ["#version: 0.2", *(" ".join(pair) for pair in tokenizer.merges)]
    (folder / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
    _write_json(folder / "tokenizer_config.json", settings | marks)
    _write_json(folder / "special_tokens_map.json", marks)


def _write_json(path: pathlib.Path, values: dict) -> None:
    text = json.dumps(values, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------
#                                       The published LPIPS
# ------------------------------------------------------------------------------------------------


def published_lpips(vgg: dict[str, Tensor], lpips: dict[str, Tensor]) -> PerceptualLoss:
    """The perceptual loss with which Stable Diffusion's autoencoder was trained.

    vgg: torchvision's VGG16 state dict. lpips: the linear weights of the `lpips` package (v0.1,
    vgg). Raises ValueError naming what is missing.
    """
    layer_weights = [f"lin{i}.model.1.weight" for i in range(5)]
    missing = [name for name in ("features.0.weight", "features.28.bias") if name not in vgg]
    missing += [name for name in layer_weights if name not in lpips]
    if missing:
        raise ValueError(
            f"vgg or lpips lacks {', '.join(missing)}; they are torchvision's VGG16 and lpips' v0.1 "
            "'vgg' weights"
        )
    return PerceptualLoss(VGGFeatures(vgg), [lpips[name].flatten() for name in layer_weights])


class VGGFeatures(nn.Module):
    """VGG16's feature maps before each pooling (Simonyan & Zisserman 2015).

    x (B, 3, H, W) in [-1, 1], which is shifted and scaled as lpips does -> five maps, from
    (B, 64, H, W) to (B, 512, H / 16, W / 16).
    """

    # Convolutions of each level, by their numbers in torchvision's `features`.
    LEVELS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
    SHIFT = (-0.030, -0.088, -0.188)
    SCALE = (0.458, 0.448, 0.450)

    def __init__(self, state: dict[str, Tensor]):
        super().__init__()
        self.weights = nn.ParameterDict()
        self.biases = nn.ParameterDict()
        for numbers in self.LEVELS:
            for number in numbers:
                self.weights[f"{number}"] = state[f"features.{number}.weight"]
                self.biases[f"{number}"] = state[f"features.{number}.bias"]
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> list[Tensor]:
        shift = x.new_tensor(self.SHIFT).view(1, 3, 1, 1)
        scale = x.new_tensor(self.SCALE).view(1, 3, 1, 1)
        h = (x - shift) / scale
        maps = []
        for level, numbers in enumerate(self.LEVELS):
            if level > 0:
                h = F.max_pool2d(h, 2)
            for number in numbers:
                weight = self.weights[f"{number}"].to(x.dtype)
                bias = self.biases[f"{number}"].to(x.dtype)
                h = F.relu(F.conv2d(h, weight, bias, padding=1))
            maps.append(h)
        return maps
