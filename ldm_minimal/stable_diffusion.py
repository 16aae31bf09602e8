"""Stable Diffusion 1.x's files <-> the classes of `ldm.py`; and the published LPIPS.

    model = stable_diffusion.load("v1-5-pruned-emaonly.safetensors", dtype=torch.float16)
    model.generate(["a photograph of an astronaut riding a horse"])
    stable_diffusion.save(model, "folder", layout="diffusers")

Two layouts are in use. They have different names for the same 1,130 tensors:

    compvis    one file, .safetensors or .ckpt, as CompVis and Runway published it
    diffusers  a folder with model_index.json, unet/, vae/, text_encoder/, scheduler/, tokenizer/

Models of other sizes are written in these layouts, too, with their Config beside the weights.

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
from collections.abc import Iterator

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.serialization import safe_globals
from tqdm.auto import tqdm

from . import ldm
from .files import whole_file, whole_folder
from .ldm import SD1, Config, LatentDiffusion, Tokenizer

__all__ = ["load", "save", "key_map", "load_tokenizer", "save_tokenizer"]


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
    unet = ("unet", "model.diffusion_model", "unet")
    autoencoder = ("autoencoder", "first_stage_model", "vae")
    text = ("text_encoder", "cond_stage_model.transformer.text_model", "text_encoder.text_model")
    layers = _under(unet, unet_rows(model.unet))
    layers += _under(autoencoder, autoencoder_rows(model.autoencoder))
    layers += _under(text, text_rows(model.text_encoder))
    return tensor_rows(layers, model)


def unet_rows(unet: ldm.UNet) -> list[Row]:
    """The layers of a U-Net."""
    return [
        ("time_mlp.0", "time_embed.0", "time_embedding.linear_1"),
        ("time_mlp.2", "time_embed.2", "time_embedding.linear_2"),
        ("conv_in", "input_blocks.0.0", "conv_in"),
        *_unet_way_rows("down", unet.down, "input_blocks", first=1),
        *_under(("middle.0.res", "middle_block.0", "mid_block.resnets.0"), RES_BLOCK),
        *_under(("middle.0.transformer", "middle_block.1", "mid_block.attentions.0"), TRANSFORMER),
        *_under(("middle.1.res", "middle_block.2", "mid_block.resnets.1"), RES_BLOCK),
        *_unet_way_rows("up", unet.up, "output_blocks", first=0),
        ("norm_out", "out.0", "conv_norm_out"),
        ("conv_out", "out.2", "conv_out"),
    ]


def _unet_way_rows(way: str, layers: nn.ModuleList, compvis: str, first: int) -> list[Row]:
    """CompVis numbers the blocks through; diffusers begins again in each level."""
    rows = []
    block = first - 1
    level = 0
    number = 0  # in the level
    for i, layer in enumerate(layers):
        level_name = f"{way}_blocks.{level}"
        if not isinstance(layer, ldm.Upsample):  # for CompVis, the last part of the block before
            block += 1
        if isinstance(layer, ldm.UNetBlock):
            res = (f"{way}.{i}.res", f"{compvis}.{block}.0", f"{level_name}.resnets.{number}")
            attention = f"{level_name}.attentions.{number}"
            rows += _under(res, RES_BLOCK)
            rows += _under(
                (f"{way}.{i}.transformer", f"{compvis}.{block}.1", attention), TRANSFORMER
            )
            number += 1
            continue
        if isinstance(layer, ldm.Downsample):
            part = "0.op"
        else:
            part = "1.conv" if layers[i - 1].transformer is None else "2.conv"
        resampler = f"{level_name}.{way}samplers.0.conv"
        rows.append((f"{way}.{i}.conv", f"{compvis}.{block}.{part}", resampler))
        level += 1
        number = 0
    return rows


def autoencoder_rows(autoencoder: ldm.Autoencoder) -> list[Row]:
    """The layers of an autoencoder, each side of which is one sequence of layers in our code."""
    return [
        *_side_rows("encoder", autoencoder.encoder, "down"),
        ("to_moments", "quant_conv", "quant_conv"),
        ("from_latent", "post_quant_conv", "post_quant_conv"),
        *_side_rows("decoder", autoencoder.decoder, "up"),
    ]


def _side_rows(side: str, layers: nn.Sequential, way: str) -> list[Row]:
    """The rows of encoder or decoder. CompVis numbers levels by their size, also on the way up."""
    last = len(layers) - 1
    attention = [isinstance(layer, ldm.AttentionBlock) for layer in layers].index(True)
    middle = range(attention - 1, attention + 2)
    rows = [
        ("0", "conv_in", "conv_in"),
        *_under((f"{middle[0]}", "mid.block_1", "mid_block.resnets.0"), AUTOENCODER_RES_BLOCK),
        *_under((f"{middle[1]}", "mid.attn_1", "mid_block.attentions.0"), AUTOENCODER_ATTENTION),
        *_under((f"{middle[2]}", "mid.block_2", "mid_block.resnets.1"), AUTOENCODER_RES_BLOCK),
        (f"{last - 2}", "norm_out", "conv_norm_out"),
        (f"{last}", "conv_out", "conv_out"),
    ]
    highest = sum(isinstance(layer, (ldm.Downsample, ldm.Upsample)) for layer in layers)
    level = 0
    number = 0  # in the level
    for i, layer in enumerate(layers):
        compvis = f"{way}.{level if way == 'down' else highest - level}"
        diffusers = f"{way}_blocks.{level}"
        if isinstance(layer, ldm.ResBlock) and i not in middle:
            block = (f"{i}", f"{compvis}.block.{number}", f"{diffusers}.resnets.{number}")
            rows += _under(block, AUTOENCODER_RES_BLOCK)
            number += 1
        elif isinstance(layer, (ldm.Downsample, ldm.Upsample)):
            resampler = f"{diffusers}.{way}samplers.0.conv"
            rows.append((f"{i}.conv", f"{compvis}.{way}sample.conv", resampler))
            level += 1
            number = 0
    return _under((side, side, side), rows)


def text_rows(text_encoder: ldm.TextEncoder) -> list[Row]:
    """The layers of a text tower."""
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
    return [tuple(map(_under_one, prefixes, row)) for row in rows]


def _under_one(prefix: str, names: str) -> str:
    return " ".join(f"{prefix}.{name}" for name in names.split())


def tensor_rows(rows: list[Row], module: nn.Module) -> list[Row]:
    """From layers to their weights and biases, without those that `module` has not."""
    ours = module.state_dict()
    tensors = []
    for row in rows:
        for kind in (".weight", ".bias"):
            names = tuple(column.replace(" ", f"{kind} ") + kind for column in row)
            if names[OURS].split()[0] in ours:
                tensors.append(names)
    return tensors


def translate(state: dict[str, Tensor], rows: list[Row], column: int) -> dict[str, Tensor]:
    """Tensors under our names -> the same tensors under the names of another column."""
    translated = {}
    for row in rows:
        parts = [state[name] for name in row[OURS].split()]
        names = row[column].split()
        translated |= dict(zip(names, _restack(parts, len(names))))
    return translated


def _restack(parts: list[Tensor], count: int) -> list[Tensor]:
    """The tensors on top of each other, cut into `count` of equal height."""
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    return list(whole.chunk(count))


# ------------------------------------------------------------------------------------------------
#                                             Reading
# ------------------------------------------------------------------------------------------------

OLD_NAMES = {  # of the autoencoder's attention, in the first generation of diffusers' files
    ".query.": ".to_q.",
    ".key.": ".to_k.",
    ".value.": ".to_v.",
    ".proj_attn.": ".to_out.0.",
}
TEXT_TOWERS = ("cond_stage_model.transformer.", "text_encoder.")
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
WEIGHTS = {  # folders with weights, and what their files are called
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}


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
    """Read one file (.safetensors, .ckpt) or a `diffusers` folder. Returns a model in eval mode.

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
        own = path / "ldm_minimal.json"
        model = _described_model(path, own.read_bytes() if own.is_file() else None)
        _check_configs(path, model.config)
        rows = [(ours, diffusers) for ours, _, diffusers in key_map(model)]
        files = _folder_files(path)
        tokenizer = tokenizer or path / "tokenizer"
    else:
        model = _described_model(path, _file_description(path))
        rows = [(ours, compvis) for ours, compvis, _ in key_map(model)]
        files = {"": path}

    like = model.state_dict()
    rows_of = {}
    for prefix, file in files.items():
        rows_of[prefix] = [row for row in rows if row[1].startswith(prefix)]
        _check_tensors(file, _open_tensors(file, prefix), rows_of[prefix], like)
    if device.type == "meta":
        return model.eval()

    model.tokenizer = _fitting_tokenizer(path, tokenizer or model.tokenizer, model.config.text)
    state = {}
    bar = tqdm(total=len(rows), desc=f"reading {path.name}", disable=not progress, leave=False)
    for prefix, file in files.items():
        for name, tensor in _read(file, prefix, rows_of[prefix]):
            tensor = tensor.reshape(like[name].shape)
            layout = torch.contiguous_format if tensor.ndim < 4 else torch.channels_last
            state[name] = tensor.to(device, dtype or torch.float32, copy=True, memory_format=layout)
            bar.update()
    bar.close()
    model.load_state_dict(state, assign=True)
    return model.eval()


def _read(
    path: pathlib.Path, prefix: str, rows: list[tuple[str, str]]
) -> Iterator[tuple[str, Tensor]]:
    """The file's tensors under our names, one after the other.

    What was read of a mapped file stays in memory until it is closed. So it is opened again after
    every 128 MB.
    """
    tensors = _open_tensors(path, prefix)
    bytes_read = 0
    for ours, theirs in rows:
        if bytes_read > 2**27:
            tensors = _open_tensors(path, prefix)
            bytes_read = 0
        parts = [tensors[name] for name in theirs.split()]
        bytes_read += sum(part.nbytes for part in parts)
        names = ours.split()
        yield from zip(names, _restack(parts, len(names)))


def _open_tensors(path: pathlib.Path, prefix: str = "") -> dict[str, Tensor]:
    """The file's tensors by today's names, with `prefix` before them.

    The file is mapped: a tensor's bytes are read from the disk when they are used.
    """
    if path.suffix not in (".safetensors", ".ckpt", ".bin"):
        raise ValueError(f"{path} must be a folder, or end in .safetensors or .ckpt")
    try:
        if path.suffix == ".safetensors":
            found = safetensors.torch.load_file(path)
        else:
            found = _open_pickle(path)
    except Exception as error:  # both libraries raise many kinds
        problem = "cannot be read: it is cut off, or not what its name says"
        if code := re.search(r"GLOBAL ([\w.]+)", str(error)):
            problem = f"names {code[1]}, which is code and no tensor; nothing was run or read"
        raise ValueError(f"{path} {problem}") from None
    return {_today(prefix + name): t for name, t in found.items() if isinstance(t, Tensor)}


def _open_pickle(path: pathlib.Path) -> dict:
    stand_ins = [(Inert, name) for name in STAND_INS]
    with safe_globals(stand_ins), warnings.catch_warnings(action="ignore"):
        can_map = zipfile.is_zipfile(path)
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=can_map)
    if isinstance(found, dict):
        found = found.get("state_dict", found)
    if not isinstance(found, dict):
        return {}
    return {str(name): value for name, value in found.items()}


def _today(name: str) -> str:
    for old, new in OLD_NAMES.items():
        name = name.replace(old, new)
    for tower in TEXT_TOWERS:  # some single files, and transformers 5, leave "text_model." out
        if name.startswith(tower) and not name.startswith(f"{tower}text_model."):
            name = f"{tower}text_model.{name.removeprefix(tower)}"
    return name


def _check_tensors(
    path: pathlib.Path,
    found: dict[str, Tensor],
    rows: list[tuple[str, str]],
    like: dict[str, Tensor],
) -> None:
    """Raise ValueError unless each tensor of the file has its row, and each row its tensors."""
    for sign, what in OTHER_MODELS.items():
        if any(sign in name.lower() for name in found):
            raise ValueError(f"{path} is {what}; Stable Diffusion 1 is read here")
    wanted = {}
    for ours, theirs in rows:
        names = theirs.split()
        height = sum(len(like[name]) for name in ours.split()) // len(names)
        wanted |= {name: [height, *like[ours.split()[0]].shape[1:]] for name in names}
    shapes = {name: list(found[name].shape) for name in wanted if name in found}
    unlike = [name for name in shapes if _as_linear(shapes[name]) != _as_linear(wanted[name])]
    problems = {
        "missing": [name for name in wanted if name not in found],
        "left over": [n for n in found if n not in wanted and not IGNORED.fullmatch(n)],
        "of another shape": [f"{name}: {shapes[name]}, not {wanted[name]}" for name in unlike],
    }
    said = []
    for problem, names in problems.items():
        if names:
            examples = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            said.append(f"{len(names)} {problem} ({examples})")
    if said:
        raise ValueError(f"{path} is not Stable Diffusion 1: of its tensors {'; '.join(said)}")


def _as_linear(shape: list[int]) -> list[int]:
    is_1x1_convolution = shape[2:] == [1, 1]
    return shape[:2] if is_1x1_convolution else shape


def _folder_files(path: pathlib.Path) -> dict[str, pathlib.Path]:
    """The file of each part, by the prefix of its tensors in the key map: safetensors first."""
    files = {}
    for part, stem in WEIGHTS.items():
        pickle = "pytorch_model.bin" if stem == "model" else f"{stem}.bin"
        names = [f"{stem}.safetensors", f"{stem}.fp16.safetensors", pickle]
        found = [path / part / name for name in names if (path / part / name).is_file()]
        if not found:
            raise ValueError(f"{path / part} holds no weights; one of {', '.join(names)} is needed")
        files[f"{part}."] = found[0]
    return files


# ------------------------------------------------------------------------------------------------
#                                             Configs
# ------------------------------------------------------------------------------------------------
# Official files do not say what they are, or say it in diffusers' words. They are Stable Diffusion
# 1, or refused. `save` adds a description of its own, so that other sizes can be read back.

SCHEDULES = {  # our kind of schedule -> diffusers' beta_schedule, beta_start and beta_end
    "scaled-linear": ("scaled_linear", 0.00085, 0.012),
    "linear": ("linear", 1e-4, 0.02),
    "cosine": ("squaredcos_cap_v2", 1e-4, 0.02),
}
# What may differ from the configs that we would write: names, image sizes, the sampler. Other
# values may be missing, unless the default of diffusers or transformers is another.
NOT_COMPARED = {"_class_name", "model_type", "sample_size"}
NOT_COMPARED |= {"clip_sample", "timestep_spacing", "set_alpha_to_one", "steps_offset"}
NEEDED = {"block_out_channels", "hidden_size", "num_attention_heads"}
NEEDED |= {"beta_schedule", "beta_start", "beta_end"}


def _diffusers_configs(config: Config) -> dict[str, dict]:
    """The configs of diffusers' parts, by their files.

    Beside our own numbers are those options that change a network but not its tensors, with the
    only value that our classes have.
    """
    unet, vae, text = config.unet, config.autoencoder, config.text
    kinds = []
    for level in range(len(unet.channel_mult)):
        has_attention = level in unet.attention_levels
        kinds.append("CrossAttn{}Block2D" if has_attention else "{}Block2D")
    vae_levels = len(vae.channel_mult)
    beta_schedule, beta_start, beta_end = SCHEDULES[config.schedule]
    return {
        "unet/config.json": {
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
            "down_block_types": [kind.format("Down") for kind in kinds],
            "up_block_types": [kind.format("Up") for kind in reversed(kinds)],
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
        "vae/config.json": {
            "_class_name": "AutoencoderKL",
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
        "text_encoder/config.json": {
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
        "scheduler/scheduler_config.json": {
            "_class_name": "DDIMScheduler",
            "num_train_timesteps": config.T,
            "beta_schedule": beta_schedule,
            "beta_start": beta_start,
            "beta_end": beta_end,
            "trained_betas": None,
            "rescale_betas_zero_snr": False,
            "prediction_type": "epsilon",
            "clip_sample": False,
            "timestep_spacing": config.spacing,
            "set_alpha_to_one": config.spacing == "trailing",
            "steps_offset": 1,  # of "leading": the last timestep
        },
    }


def _check_configs(path: pathlib.Path, config: Config) -> None:
    """Raise ValueError unless the configs of a `diffusers` folder say what ours would say."""
    pipeline = _read_json(path, "model_index.json").get("_class_name")
    if pipeline != "StableDiffusionPipeline":
        raise ValueError(f"{path} holds a {pipeline}; a StableDiffusionPipeline is read here")
    for name, expected in _diffusers_configs(config).items():
        found = _read_json(path, name)
        for key, value in expected.items():
            found_value = found.get(key, None if key in NEEDED else value)
            if key not in NOT_COMPARED and found_value != value:
                raise ValueError(
                    f"{path / name} describes another model: {key} = {found_value!r}, not {value!r}"
                )


def _read_json(folder: pathlib.Path, name: str) -> dict:
    try:
        found = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder} is no `diffusers` folder: it has no {name}") from None
    except (ValueError, OSError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{folder / name} cannot be read as JSON")
    return found


def _file_description(path: pathlib.Path) -> str | None:
    """What `save` wrote into a single file: JSON with config, vocab and merges."""
    _open_tensors(path)  # raises for a file that cannot be read
    if path.suffix != ".safetensors":
        return None
    with safetensors.safe_open(path, framework="pt") as file:
        return (file.metadata() or {}).get("ldm_minimal")


def _described_model(path: pathlib.Path, description: str | bytes | None) -> LatentDiffusion:
    """A model without weights: the described one, else Stable Diffusion 1."""
    try:
        described = json.loads(description or "{}")
        config = Config.from_dict(described["config"]) if description else SD1
        with torch.device("meta"):
            model = LatentDiffusion(config)
        if "vocab" in described:
            vocab, merges = described["vocab"], described["merges"]
            model.tokenizer = Tokenizer(vocab, merges, config.text.length)
    except Exception:  # a file may say anything
        raise ValueError(f"{path} says that it is ours, but its config cannot be read") from None
    return model


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
            lines = gzip.decompress(path.read_bytes()).decode().splitlines()
            num_merges = 49408 - 2 * 256 - 2  # CLIP was trained without the rest
            return Tokenizer.from_merges(_merges(lines)[:num_merges], length)
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
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils import logging

        logging.set_verbosity_error()  # its warnings say at length what the line below says
        for name in ("vocab.json", "merges.txt"):
            file = hf_hub_download(HUB, name, etag_timeout=5)
        return pathlib.Path(file).parent
    except ImportError:
        problem = "huggingface_hub is not installed; pip install it, or"
    except Exception as error:  # the hub's client raises many kinds
        problem = f"the hub cannot be reached ({type(error).__name__});"
    raise ValueError(
        f"a single file holds no tokenizer, and {problem} give one (--tokenizer PATH): {TOKENIZERS}"
    )


def _fitting_tokenizer(
    path: pathlib.Path, tokenizer: str | os.PathLike | Tokenizer | None, text: ldm.TextConfig
) -> Tokenizer:
    """The tokenizer, loaded. Raises ValueError unless the text encoder has a row for each entry."""
    if not isinstance(tokenizer, Tokenizer):
        tokenizer = load_tokenizer(tokenizer, text.length)
    entries = len(tokenizer.vocab)
    # Tokenizers of our own may have fewer entries; CLIP's has as many.
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

    In the dtype that it has. `load` gives back all but the image encoder. Other programs ignore
    the description of the model that lies beside its weights. Raises ValueError for another layout,
    a wrong name, a model that is not trained, or a folder that holds something else.
    """
    path = pathlib.Path(path)
    if layout not in ("compvis", "diffusers"):
        raise ValueError(f"layout is {layout!r}; allowed are 'compvis' and 'diffusers'")
    if model.tokenizer is None or model.config.scale_factor is None:
        raise ValueError(
            "the model has no tokenizer or no scale_factor yet: it is not trained to the end"
        )
    description = {"config": dataclasses.asdict(model.config) | {"image": None}}
    if layout == "compvis":
        _save_file(model, path, description)
    else:
        _save_folder(model, path, description)


def _save_file(model: LatentDiffusion, path: pathlib.Path, description: dict) -> None:
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} must end in .safetensors")
    description |= {"vocab": model.tokenizer.vocab, "merges": model.tokenizer.merges}
    metadata = {"format": "pt", "ldm_minimal": json.dumps(description)}
    with whole_file(path) as partial:
        safetensors.torch.save_file(layout_state(model, COMPVIS), partial, metadata)


def _save_folder(model: LatentDiffusion, path: pathlib.Path, description: dict) -> None:
    if path.exists() and not (path / "model_index.json").is_file():
        raise ValueError(f"{path} exists and is no model; choose a new folder")
    configs = _diffusers_configs(model.config)
    configs["text_encoder/config.json"] |= {
        "bos_token_id": model.tokenizer.start,
        "eos_token_id": model.tokenizer.end,
        "pad_token_id": model.tokenizer.end,
    }
    state = layout_state(model, DIFFUSERS)
    with whole_folder(path) as partial:
        _write_json(partial / "model_index.json", MODEL_INDEX)
        _write_json(partial / "ldm_minimal.json", description)
        for name, config in configs.items():
            (partial / name).parent.mkdir()
            _write_json(partial / name, config)
        for folder, stem in WEIGHTS.items():
            prefix = f"{folder}."
            part = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
            file = partial / folder / f"{stem}.safetensors"
            safetensors.torch.save_file(part, file, {"format": "pt"})
        save_tokenizer(model.tokenizer, partial / "tokenizer")


def layout_state(model: LatentDiffusion, column: int) -> dict[str, Tensor]:
    """Every tensor as COMPVIS or DIFFUSERS names and shapes it."""
    state = translate(model.state_dict(), key_map(model), column)
    for name, tensor in state.items():
        # Linear layers in our classes, 1x1 convolutions there.
        if re.search(r"\.proj_(in|out)\.weight$|mid\.attn_1\.[qkv]\.weight$", name):
            tensor = tensor[:, :, None, None]
        state[name] = tensor.contiguous()
    return state


def save_tokenizer(tokenizer: Tokenizer, folder: pathlib.Path) -> None:
    """Write the two files of CLIP's tokenizer, and what diffusers' pipeline asks beside them."""
    folder.mkdir()
    merges = ["#version: 0.2", *(" ".join(pair) for pair in tokenizer.merges)]
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": tokenizer.length}
    _write_json(folder / "vocab.json", tokenizer.vocab)
    (folder / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
    _write_json(folder / "tokenizer_config.json", settings)


def _write_json(path: pathlib.Path, values: dict) -> None:
    text = json.dumps(values, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
