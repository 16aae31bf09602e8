"""Stable Diffusion 1.x's files, read into the classes of `ldm.py`, and written back; and the published LPIPS.

    model = stable_diffusion.load("v1-5-pruned-emaonly.safetensors", dtype=torch.float16, device="cuda")
    model.generate(["a photograph of an astronaut riding a horse"])
    stable_diffusion.save(model, "folder", layout="diffusers")

Two layouts are in use, two sets of names for the same 1,130 tensors:

    compvis     one file, .safetensors or .ckpt, as CompVis and Runway published it: model.diffusion_model.input_blocks...
    diffusers   a folder with model_index.json, unet/, vae/, text_encoder/, scheduler/ and tokenizer/: down_blocks.0.resnets.0...

`key_map(model)` is the dictionary of all three languages, in rows of (ours, compvis, diffusers).

Nothing in a file is ever run. Safetensors hold no code. A .ckpt is a pickle: torch reads it with `weights_only=True`, and
the few classes that Lightning leaves in such files are given a stand-in that does nothing.
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
from torch import Tensor, nn
from torch.serialization import safe_globals
from tqdm.auto import tqdm

from .ldm import (SD1, Autoencoder, AutoencoderConfig, Config, Downsample, LatentDiffusion, PerceptualLoss, ResBlock, TextConfig,
                  Tokenizer, UNet, UNetConfig, Upsample, _whole_folder)

__all__ = ["load", "save", "key_map", "load_tokenizer", "published_lpips"]


# ------------------------------------------------------------------------------------------------------ the key map ----
# A row is (ours, compvis, diffusers). Several names in a column, parted by a space, hold in their order, one on top of the other,
# what the single name in another column holds: our keys and values are one matrix, and GEGLU's value half stands above its gate.

Row = tuple[str, str, str]
alike = lambda *pairs: [(ours, theirs, theirs) for ours, theirs in pairs]  # noqa: E731  where both layouts use the same name

RES = [("norm_in", "in_layers.0", "norm1"), ("conv_in", "in_layers.2", "conv1"), ("time", "emb_layers.1", "time_emb_proj"),
       ("norm_out", "out_layers.0", "norm2"), ("conv_out", "out_layers.3", "conv2"), ("skip", "skip_connection", "conv_shortcut")]
AUTOENCODER_RES = [*alike(("norm_in", "norm1"), ("conv_in", "conv1"), ("norm_out", "norm2"), ("conv_out", "conv2")),
                   ("skip", "nin_shortcut", "conv_shortcut")]
AUTOENCODER_ATTENTION = [("norm", "norm", "group_norm"), ("attention.query", "q", "to_q"), ("attention.key_value", "k v", "to_k to_v"),
                         ("attention.out", "proj_out", "to_out.0")]
TRANSFORMER = alike(
    ("norm", "norm"), ("project_in", "proj_in"), ("project_out", "proj_out"),
    ("norm_self", "transformer_blocks.0.norm1"), ("attend_self.query", "transformer_blocks.0.attn1.to_q"),
    ("attend_self.key_value", "transformer_blocks.0.attn1.to_k transformer_blocks.0.attn1.to_v"),
    ("attend_self.out", "transformer_blocks.0.attn1.to_out.0"),
    ("norm_cross", "transformer_blocks.0.norm2"), ("attend_cross.query", "transformer_blocks.0.attn2.to_q"),
    ("attend_cross.key_value", "transformer_blocks.0.attn2.to_k transformer_blocks.0.attn2.to_v"),
    ("attend_cross.out", "transformer_blocks.0.attn2.to_out.0"),
    ("norm_mlp", "transformer_blocks.0.norm3"), ("mlp_value mlp_gate", "transformer_blocks.0.ff.net.0.proj"),
    ("mlp_out", "transformer_blocks.0.ff.net.2"))
TEXT_LAYER = alike(
    ("norm_attention", "layer_norm1"), ("attention.query", "self_attn.q_proj"), ("attention.key_value", "self_attn.k_proj self_attn.v_proj"),
    ("attention.out", "self_attn.out_proj"), ("norm_mlp", "layer_norm2"), ("mlp_in", "mlp.fc1"), ("mlp_out", "mlp.fc2"))


def under(prefix: Row, rows: list[Row]) -> list[Row]:
    """The same rows, one level deeper in each column."""
    return [tuple(" ".join(f"{above}.{name}" for name in names.split()) for above, names in zip(prefix, row)) for row in rows]


def unet_rows(unet: UNet) -> list[Row]:
    """CompVis numbers the blocks through; there, an Upsample is the last part of the block before it."""
    rows = [("time.0", "time_embed.0", "time_embedding.linear_1"), ("time.2", "time_embed.2", "time_embedding.linear_2"),
            ("conv_in", "input_blocks.0.0", "conv_in"), ("norm", "out.0", "conv_norm_out"), ("conv_out", "out.2", "conv_out")]
    for way, blocks, block in (("down", "input_blocks", 0), ("up", "output_blocks", -1)):
        level, number = 0, 0
        for i, layer in enumerate(getattr(unet, way)):
            ours, level_name = f"{way}.{i}", f"{way}_blocks.{level}"
            block += not isinstance(layer, Upsample)
            if isinstance(layer, Downsample):
                rows.append((f"{ours}.conv", f"{blocks}.{block}.0.op", f"{level_name}.downsamplers.0.conv"))
            elif isinstance(layer, Upsample):
                part = 1 if unet.up[i - 1].transformer is None else 2
                rows.append((f"{ours}.conv", f"{blocks}.{block}.{part}.conv", f"{level_name}.upsamplers.0.conv"))
            else:
                rows += under((f"{ours}.res", f"{blocks}.{block}.0", f"{level_name}.resnets.{number}"), RES)
                rows += under((f"{ours}.transformer", f"{blocks}.{block}.1", f"{level_name}.attentions.{number}"), TRANSFORMER)
            level, number = (level, number + 1) if hasattr(layer, "res") else (level + 1, 0)
    for i in (0, 1):
        rows += under((f"middle.{i}.res", f"middle_block.{2 * i}", f"mid_block.resnets.{i}"), RES)
    return rows + under(("middle.0.transformer", "middle_block.1", "mid_block.attentions.0"), TRANSFORMER)


def autoencoder_rows(autoencoder: Autoencoder) -> list[Row]:
    """We hold each side as one row of layers; CompVis numbers the decoder's levels by their size, diffusers as they come."""
    rows = [("to_moments", "quant_conv", "quant_conv"), ("from_latent", "post_quant_conv", "post_quant_conv")]
    for side, way in (("encoder", "down"), ("decoder", "up")):
        layers = getattr(autoencoder, side)
        last, levels = len(layers) - 1, autoencoder.f.bit_length()
        middle = last - 5 if side == "encoder" else 1  # the first of its three blocks
        inside = [("0", "conv_in", "conv_in"), (f"{last - 2}", "norm_out", "conv_norm_out"), (f"{last}", "conv_out", "conv_out")]
        inside += under((f"{middle}", "mid.block_1", "mid_block.resnets.0"), AUTOENCODER_RES)
        inside += under((f"{middle + 1}", "mid.attn_1", "mid_block.attentions.0"), AUTOENCODER_ATTENTION)
        inside += under((f"{middle + 2}", "mid.block_2", "mid_block.resnets.1"), AUTOENCODER_RES)
        level, number = 0, 0
        for i in range(1, middle) if side == "encoder" else range(4, last - 2):
            theirs = f"{way}.{level if side == 'encoder' else levels - 1 - level}"
            if isinstance(layers[i], ResBlock):
                inside += under((f"{i}", f"{theirs}.block.{number}", f"{way}_blocks.{level}.resnets.{number}"), AUTOENCODER_RES)
                number += 1
            else:
                inside.append((f"{i}.conv", f"{theirs}.{way}sample.conv", f"{way}_blocks.{level}.{way}samplers.0.conv"))
                level, number = level + 1, 0
        rows += under((side, side, side), inside)
    return rows


def text_rows(layers: int) -> list[Row]:
    rows = alike(("token", "embeddings.token_embedding"), ("position", "embeddings.position_embedding"), ("norm", "final_layer_norm"))
    for i in range(layers):
        rows += under((f"layers.{i}", f"encoder.layers.{i}", f"encoder.layers.{i}"), TEXT_LAYER)
    return rows


def key_map(model: LatentDiffusion) -> list[Row]:
    """Every tensor of Stable Diffusion, in three languages: rows of (ours, compvis, diffusers, whose first word is the folder).

    Where a column has several names, parted by a space, these tensors lie one on top of the other in the columns that have
    one. A 1x1 convolution in one language may be a linear layer in another."""
    rows = under(("unet", "model.diffusion_model", "unet"), unet_rows(model.unet))
    rows += under(("autoencoder", "first_stage_model", "vae"), autoencoder_rows(model.autoencoder))
    rows += under(("text_encoder", "cond_stage_model.transformer.text_model", "text_encoder.text_model"), text_rows(model.config.text.layers))
    ours = dict(model.named_parameters())
    tensors = [tuple(" ".join(f"{name}.{kind}" for name in names.split()) for names in row) for row in rows for kind in ("weight", "bias")]
    return [row for row in tensors if row[0].split()[0] in ours]  # without the biases, skips and transformers that are not there


# ----------------------------------------------------------------------------------------------------------- reading ----

OLD_NAMES = [  # of earlier generations of files -> those of today
    (r"(mid_block\.attentions\.0)\.query\.", r"\1.to_q."), (r"(mid_block\.attentions\.0)\.key\.", r"\1.to_k."),
    (r"(mid_block\.attentions\.0)\.value\.", r"\1.to_v."), (r"(mid_block\.attentions\.0)\.proj_attn\.", r"\1.to_out.0."),
    (r"^(text_encoder|cond_stage_model\.transformer)\.(?=embeddings\.|encoder\.|final_layer_norm\.)", r"\1.text_model."),  # transformers 5
]
HARMLESS = re.compile(  # what official files hold besides the model
    r"model_ema\..*"                                     # the average of the weights, once more
    r"|.*\.position_ids"                                 # 0 ... 76
    r"|betas|(sqrt_|sqrt_recip_|sqrt_recipm1_|sqrt_one_minus_|log_one_minus_)?alphas_cumprod(_prev)?"  # the noise schedule, tabulated
    r"|posterior_(variance|log_variance_clipped|mean_coef1|mean_coef2)")
FOREIGN = [  # what other files are known by
    ("lora", "a LoRA: small changes to a model, not a model"), ("conditioner.embedders.", "Stable Diffusion XL, which has two text towers"),
    ("cond_stage_model.model.", "Stable Diffusion 2, which has another text tower"), ("control_model.", "a ControlNet"),
    ("joint_blocks.", "Stable Diffusion 3, which has no U-Net"), ("double_blocks.", "Flux, which has no U-Net"),
    ("unet.down.0.res.", "a model of ours; name its folder"),
]
STAND_INS = ["pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint", "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
             "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar",
             "numpy.dtype"]


class Inert:
    """Stands where a checkpoint names a class that its tensors do not need: takes anything, does nothing."""

    def __init__(self, *_):
        pass

    def __setstate__(self, _):
        pass


def load(path: str | os.PathLike, *, dtype: torch.dtype | None = None, device: str | torch.device | None = None,
         tokenizer: str | os.PathLike | Tokenizer | None = None, progress: bool = False) -> LatentDiffusion:
    """Stable Diffusion 1.x, from one file (.safetensors, .ckpt) or a `diffusers` folder, ready to draw, in eval mode.

    dtype: None for float32. device: None for the CPU; "meta" checks the file and reads neither weights nor tokenizer.
    tokenizer: what `load_tokenizer` takes, or one that is loaded; None for the folder's own, and for a single file for the one
    that it may hold (those of `save` do), else the hub's. The file is mapped and read a few tensors at a time, each straight
    into its dtype and device, behind a bar if `progress`. Raises ValueError, in one line, for a file that is broken, holds code
    or is another model, with the tensors that are missing, left over or of another shape."""
    path, device = pathlib.Path(path), torch.device(device or "cpu")
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    if path.is_dir():
        config, files, column = folder_config(path), folder_files(path, dtype), 2
        tokenizer = tokenizer or path / "tokenizer"
    else:
        (config, own), files, column = file_config(path), {"": path}, 1
        tokenizer = tokenizer or own
    with torch.device("meta"):
        model = LatentDiffusion(config)
    like, state = dict(model.named_parameters()), {}
    rows = {folder: [(row[0], row[column]) for row in key_map(model) if row[column].startswith(folder)] for folder in files}
    for folder, file in files.items():
        check_tensors(file, {name: tensor.shape for name, tensor in current_names(folder, open_tensors(file)).items()}, rows[folder], like)
    if device.type != "meta":
        model.tokenizer = tokenizer if isinstance(tokenizer, Tokenizer) else load_tokenizer(tokenizer, config.text.length)
        size, rows_of_text = len(model.tokenizer.vocab), config.text.vocab_size  # ours may have more rows than words, CLIP's has not
        if size > rows_of_text or (config.text == SD1.text and size < rows_of_text):
            raise ValueError(f"the tokenizer has {size:,} entries, the text encoder of {path} {rows_of_text:,}")
    for folder, file in files.items():
        state |= read(file, folder, rows[folder], like, dtype or torch.float32, device, progress)
    model.load_state_dict(state, assign=True)
    return model.eval()


def read(path: pathlib.Path, prefix: str, rows: list[tuple[str, str]], like: dict[str, Tensor], dtype: torch.dtype, device: torch.device,
         progress: bool) -> dict[str, Tensor]:
    """The file's tensors under our names. A mapping's pages stay in memory until it is closed: it is opened anew every 128 MB."""
    tensors, state, seen = current_names(prefix, open_tensors(path)), {}, 0
    for ours, theirs in tqdm(rows, desc=f"reading {prefix}{path.name}", unit="tensor", disable=not progress, leave=False):
        if seen > 2**27:
            tensors, seen = current_names(prefix, open_tensors(path)), 0
        parts = [tensors[name] for name in theirs.split()]
        seen += sum(part.nbytes for part in parts)
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        for name, part in zip(ours.split(), whole.chunk(len(ours.split()))):
            layout = torch.channels_last if like[name].ndim == 4 else torch.contiguous_format
            part = part.reshape(like[name].shape).to(device, dtype, copy=True, memory_format=layout)
            state[name] = torch.nn.Parameter(part, requires_grad=True)
    return state


def current_names(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The file's tensors, the folder before their names, and these as files of today have them."""
    tensors = {prefix + name: tensor for name, tensor in tensors.items()}
    for old, new in OLD_NAMES:
        tensors = {re.sub(old, new, name): tensor for name, tensor in tensors.items()}
    return tensors


def check_tensors(path: pathlib.Path, found: dict[str, torch.Size], rows: list[tuple[str, str]], like: dict[str, Tensor]) -> None:
    """Every tensor is accounted for, or one line says which are not."""
    for sign, what in FOREIGN:
        if any(sign in name.lower() for name in found):
            raise ValueError(f"{path} is {what}; Stable Diffusion 1 is read here")
    wanted = {}
    for ours, theirs in rows:
        shape, height = like[ours.split()[0]].shape, sum(len(like[name]) for name in ours.split())
        wanted |= {name: (height // len(theirs.split()), *shape[1:]) for name in theirs.split()}
    flat = lambda shape: tuple(shape[:2] if tuple(shape[2:]) == (1, 1) else shape)  # noqa: E731  a 1x1 convolution is a linear layer
    times = lambda shape: " x ".join(map(str, shape))  # noqa: E731
    lists = {
        "missing": [name for name in wanted if name not in found],
        "left over": [name for name in found if name not in wanted and not HARMLESS.fullmatch(name)],
        "of another shape": [f"{name}: {times(found[name])}, not {times(shape)}" for name, shape in wanted.items()
                             if name in found and flat(found[name]) != flat(shape)],
    }
    if any(lists.values()):
        said = [f"{len(names)} {what} ({', '.join(names[:3])}{', ...' * (len(names) > 3)})" for what, names in lists.items() if names]
        raise ValueError(f"{path} is not Stable Diffusion 1: of its tensors {'; '.join(said)}")


def open_tensors(path: pathlib.Path) -> dict[str, Tensor]:
    """A file's tensors by name, mapped: their bytes are read from the disk when they are used."""
    if path.suffix not in (".safetensors", ".ckpt", ".pt", ".pth", ".bin"):
        raise ValueError(f"{path} must be a folder, or end in .safetensors or .ckpt")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with safe_globals([(Inert, name) for name in STAND_INS]), warnings.catch_warnings(action="ignore"):
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # whatever is wrong with it; both libraries raise many kinds
        if code := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ValueError(f"{path} names {code[1]}, which is code and no tensor; nothing of it was run, and it is not read") from None
        raise ValueError(f"{path} cannot be read: it is cut off, or not what its name says") from None
    found = found.get("state_dict", found) if isinstance(found, dict) else {}
    return {name: value for name, value in found.items() if isinstance(name, str) and isinstance(value, Tensor)}


# ------------------------------------------------------------------------------------------------- what a file is ----
# Our configs in diffusers' words, and back. What has no place in our config must be as Stable Diffusion 1 has it.

SCHEDULES = {"scaled-linear": ("scaled_linear", 0.00085, 0.012), "linear": ("linear", 1e-4, 0.02), "cosine": ("squaredcos_cap_v2", 1e-4, 0.02)}
FIXED = {
    "unet": {"act_fn": "silu", "norm_eps": 1e-5, "center_input_sample": False, "flip_sin_to_cos": True, "freq_shift": 0, "downsample_padding": 1,
             "mid_block_scale_factor": 1, "only_cross_attention": False, "dual_cross_attention": False, "class_embed_type": None,
             "addition_embed_type": None, "encoder_hid_dim": None, "transformer_layers_per_block": 1, "resnet_time_scale_shift": "default",
             "time_embedding_type": "positional", "mid_block_type": "UNetMidBlock2DCrossAttn", "num_attention_heads": None},
    "vae": {"act_fn": "silu", "in_channels": 3, "out_channels": 3, "mid_block_add_attention": True, "use_quant_conv": True,
            "use_post_quant_conv": True, "shift_factor": None},
    "text_encoder": {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    "scheduler": {"prediction_type": "epsilon", "thresholding": False, "trained_betas": None, "rescale_betas_zero_snr": False},
}
UNIMPORTANT = {"_class_name", "sample_size", "architectures", "model_type", "scaling_factor"}


def diffusers_configs(config: Config) -> dict[str, dict]:
    """model_index.json ("") and the config of each folder."""
    unet, vae, text = config.unet, config.autoencoder, config.text
    levels = range(len(unet.mult))
    kinds = [("CrossAttn" if level in unet.attention else "") + "{}Block2D" for level in levels]
    name, first, last = SCHEDULES[config.schedule]
    return {
        "": {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
             "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
             "scheduler": ["diffusers", "DDIMScheduler"], "safety_checker": [None, None], "feature_extractor": [None, None],
             "requires_safety_checker": False},
        "unet": {"_class_name": "UNet2DConditionModel", "sample_size": config.image_size // 2 ** (len(vae.mult) - 1),
                 "in_channels": unet.channels, "out_channels": unet.channels, "block_out_channels": [unet.width * m for m in unet.mult],
                 "layers_per_block": unet.blocks, "attention_head_dim": unet.heads,  # diffusers' name for the number of heads
                 "cross_attention_dim": unet.context_width, "norm_num_groups": unet.groups,
                 "down_block_types": [kind.format("Down") for kind in kinds], "up_block_types": [kind.format("Up") for kind in kinds[::-1]]},
        "vae": {"_class_name": "AutoencoderKL", "sample_size": config.image_size, "latent_channels": vae.channels,
                "block_out_channels": [vae.width * m for m in vae.mult], "layers_per_block": vae.blocks, "norm_num_groups": vae.groups,
                "down_block_types": ["DownEncoderBlock2D"] * len(vae.mult), "up_block_types": ["UpDecoderBlock2D"] * len(vae.mult),
                "scaling_factor": config.scale_factor},
        "text_encoder": {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "vocab_size": text.vocab_size,
                         "hidden_size": text.width, "intermediate_size": 4 * text.width, "num_hidden_layers": text.layers,
                         "num_attention_heads": text.heads, "max_position_embeddings": text.length, "hidden_act": "quick_gelu"},
        "scheduler": {"_class_name": "DDIMScheduler", "num_train_timesteps": config.T, "beta_schedule": name, "beta_start": first,
                      "beta_end": last, "clip_sample": False, "prediction_type": "epsilon", "timestep_spacing": config.spacing,
                      "set_alpha_to_one": config.spacing == "trailing", "steps_offset": 1},
    }


def folder_config(path: pathlib.Path) -> Config:
    """The Config of a `diffusers` folder. Raises ValueError for what our classes do not cover."""
    kind = folder_json(path, "model_index.json").get("_class_name")
    if kind not in ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"):
        raise ValueError(f"{path} holds a {kind}; a StableDiffusionPipeline is read here")
    unet, vae, text = (folder_json(path, f"{part}/config.json") for part in ("unet", "vae", "text_encoder"))
    scheduler = folder_json(path, "scheduler/scheduler_config.json")
    for part, found in (("unet", unet), ("vae", vae), ("text_encoder", text), ("scheduler", scheduler)):
        for key, only in FIXED[part].items():
            if found.get(key, only) != only:
                raise ValueError(f"{path / part}: its config has {key} = {found[key]!r}; Stable Diffusion 1 has {only!r}")
    for key in ("attention_head_dim", "layers_per_block", "cross_attention_dim"):
        if isinstance(unet.get(key), list):
            raise ValueError(f"{path / 'unet'}: its config has {key} = {unet[key]}, one for each level; our classes have one for all")
    try:
        width, vae_width = unet["block_out_channels"][0], vae["block_out_channels"][0]
        betas = tuple(scheduler[key] for key in ("beta_schedule", "beta_start", "beta_end"))
        if betas not in SCHEDULES.values():
            raise ValueError(f"the noise schedule is {betas}")
        config = Config(
            name=path.name, image_size=unet.get("sample_size", 64) * 2 ** (len(vae["block_out_channels"]) - 1), image=None,
            text=TextConfig(text["vocab_size"], text["hidden_size"], text["num_hidden_layers"], text["num_attention_heads"],
                            text.get("max_position_embeddings", 77)),
            autoencoder=AutoencoderConfig(vae_width, tuple(c // vae_width for c in vae["block_out_channels"]), vae["layers_per_block"],
                                          vae["latent_channels"], vae.get("norm_num_groups", 32)),
            unet=UNetConfig(unet["in_channels"], width, tuple(c // width for c in unet["block_out_channels"]), unet["layers_per_block"],
                            tuple(i for i, kind in enumerate(unet["down_block_types"]) if kind.startswith("CrossAttn")),
                            unet.get("attention_head_dim", 8), unet["cross_attention_dim"], unet.get("norm_num_groups", 32)),
            schedule=next(kind for kind, known in SCHEDULES.items() if known == betas), T=scheduler["num_train_timesteps"],
            spacing="trailing" if scheduler.get("timestep_spacing") == "trailing" else "leading", scale_factor=vae.get("scaling_factor", 0.18215))
        expected = diffusers_configs(config)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ZeroDivisionError) as error:
        raise ValueError(f"{path}: its configs do not describe a Stable Diffusion 1 ({type(error).__name__}: {error})") from None
    for part, found in (("unet", unet), ("vae", vae), ("text_encoder", text)):
        for key, ours in expected[part].items():  # what our config cannot say comes out different
            if key not in UNIMPORTANT and found.get(key, ours) != ours:
                raise ValueError(f"{path / part}: its config has {key} = {found[key]!r}, for which our classes have {ours!r}")
    return dataclasses.replace(config, name=SD1.name) if dataclasses.replace(config, name=SD1.name) == SD1 else config


def folder_json(path: pathlib.Path, name: str) -> dict:
    try:
        found = json.loads((path / name).read_text(encoding="utf-8"))
        return found | {}
    except FileNotFoundError:
        raise ValueError(f"{path} is no `diffusers` folder: it has no {name}") from None
    except (ValueError, TypeError):
        raise ValueError(f"{path / name} cannot be read as JSON") from None


def folder_files(path: pathlib.Path, dtype: torch.dtype | None) -> dict[str, pathlib.Path]:
    """The weights of each part: safetensors before pickles, the half-sized variant first where half precision is asked for."""
    variants = [".fp16.safetensors", ".safetensors"] if dtype == torch.float16 else [".safetensors", ".fp16.safetensors"]
    files = {}
    for part, stem in (("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"), ("text_encoder", "model")):
        names = [stem + variant for variant in variants] + ["pytorch_model.bin" if stem == "model" else stem + ".bin"]
        files[f"{part}."] = next((path / part / name for name in names if (path / part / name).is_file()), None)
        if files[f"{part}."] is None:
            raise ValueError(f"{path / part} holds no weights; one of {', '.join(names)} is needed")
    return files


def file_config(path: pathlib.Path) -> tuple[Config, Tokenizer | None]:
    """The Config of a single file, and its tokenizer: those that `save` wrote into it, else Stable Diffusion 1's and None."""
    open_tensors(path)  # which says what is wrong with it
    if path.suffix == ".safetensors":
        with safetensors.safe_open(path, framework="pt") as file:
            own = (file.metadata() or {}).get("ldm_minimal")
        if own:
            try:
                own = json.loads(own)
                config, model = Config.from_dict(own["config"]), own["tokenizer"] and json.loads(own["tokenizer"])["model"]
                return config, model and Tokenizer(model["vocab"], model["merges"], config.text.length)
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ValueError(f"{path} says that it is ours, but its config cannot be read") from None
    return SD1, None


# ------------------------------------------------------------------------------------------------------- tokenizer ----

HUB = "openai/clip-vit-large-patch14"


def load_tokenizer(path: str | os.PathLike | None = None, length: int = 77) -> Tokenizer:
    """CLIP's tokenizer: from a folder with vocab.json and merges.txt or tokenizer.json, from such a tokenizer.json, or from
    OpenAI's bpe_simple_vocab_16e6.txt.gz (the PyPI package open_clip_torch holds it). None: from the hub, or its cache.

    length: tokens of a caption. Raises ValueError saying what is not there."""
    path = from_hub() if path is None else pathlib.Path(path)
    try:
        if path.is_dir() and (path / "vocab.json").is_file():
            lines = (path / "merges.txt").read_text(encoding="utf-8").splitlines()
            return Tokenizer(json.loads((path / "vocab.json").read_text(encoding="utf-8")), merges(lines), length)
        if path.name.endswith(".gz"):
            with gzip.open(path, "rt", encoding="utf-8") as file:
                pairs = merges(file.read().splitlines()[:49152 - 256 - 2 + 1])  # the rest was cut off when CLIP was trained
            return Tokenizer.from_merges(pairs, length)
        return Tokenizer.load(path / "tokenizer.json" if path.is_dir() else path, length)
    except Exception as error:  # `tokenizers` raises bare ones
        raise ValueError(f"{path} holds no tokenizer that can be read ({' '.join(str(error).split())[:100]}); allowed are a folder with vocab.json and "
                         "merges.txt, a tokenizer.json, or bpe_simple_vocab_16e6.txt.gz") from None


def merges(lines: list[str]) -> list[tuple[str, str]]:
    return [tuple(line.split()) for line in lines if line and not line.startswith(("#version", '"bpe_simple_vocab'))]


def from_hub() -> pathlib.Path:
    """The folder in which huggingface_hub keeps CLIP's tokenizer; fetched once, where there is a network."""
    instead = "give a tokenizer (--tokenizer PATH): a folder with vocab.json and merges.txt, a tokenizer.json, or bpe_simple_vocab_16e6.txt.gz"
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils import logging
        logging.set_verbosity_error()  # its warnings say at length what the line below says
    except ImportError:
        raise ValueError(f"a single file holds no tokenizer, and huggingface_hub is not installed; pip install it, or {instead}") from None
    try:
        files = [pathlib.Path(hf_hub_download(HUB, name, etag_timeout=5)) for name in ("vocab.json", "merges.txt")]
        return files[0].parent
    except Exception as error:  # the hub's client raises many kinds
        raise ValueError(f"a single file holds no tokenizer, and the hub cannot be reached ({type(error).__name__}); {instead}") from None


# --------------------------------------------------------------------------------------------------------- writing ----


def save(model: LatentDiffusion, path: str | os.PathLike, layout: str = "diffusers") -> None:
    """Write the model for the rest of the world: layout "compvis", one .safetensors file, or "diffusers", a folder.

    In the dtype that it has. `load` gives back the same three networks, tokenizer and sampler; a picture tower and the recipe of
    the training have no place in the diffusers layout. The single file holds config and tokenizer besides, as metadata that
    other programs pass over. Raises ValueError for another layout, a wrong name, or a folder that is something else."""
    path = pathlib.Path(path)
    if layout not in ("compvis", "diffusers"):
        raise ValueError(f"layout is {layout!r}; allowed are 'compvis' and 'diffusers'")
    if model.tokenizer is None or model.config.scale_factor is None:
        raise ValueError("the model has no tokenizer or no scale_factor yet: it is not trained to the end")
    if layout == "compvis":
        return save_file(model, path)
    if path.exists() and not (path / "model_index.json").is_file():
        raise ValueError(f"{path} exists and is no model; choose a new folder")
    configs = diffusers_configs(model.config)
    configs["text_encoder"] |= {"bos_token_id": model.tokenizer.start, "eos_token_id": model.tokenizer.end, "pad_token_id": model.tokenizer.end}
    with _whole_folder(path) as partial:
        for folder, config in configs.items():
            name = {"": "model_index.json", "scheduler": "scheduler_config.json"}.get(folder, "config.json")
            (partial / folder).mkdir(exist_ok=True)
            (partial / folder / name).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for folder, stem in (("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"), ("text_encoder", "model")):
            state = {name.removeprefix(f"{folder}."): tensor for name, tensor in in_their_names(model, 2).items() if name.startswith(f"{folder}.")}
            safetensors.torch.save_file(state, partial / folder / f"{stem}.safetensors", {"format": "pt"})
        save_tokenizer(model.tokenizer, partial / "tokenizer")


def save_file(model: LatentDiffusion, path: pathlib.Path) -> None:
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} must end in .safetensors")
    own = {"config": dataclasses.asdict(model.config) | {"image": None}, "tokenizer": model.tokenizer.engine.to_str()}
    partial = path.with_name(f".{path.stem}.partial.safetensors")
    try:
        safetensors.torch.save_file(in_their_names(model, 1), partial, {"format": "pt", "ldm_minimal": json.dumps(own)})
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def in_their_names(model: LatentDiffusion, column: int) -> dict[str, Tensor]:
    """Every tensor as the layout names and shapes it."""
    ours, state = model.state_dict(), {}
    for row in key_map(model):
        parts = [ours[name] for name in row[0].split()]
        whole, names = parts[0] if len(parts) == 1 else torch.cat(parts), row[column].split()
        for name, part in zip(names, whole.chunk(len(names))):
            convolution = re.search(r"\.proj_(in|out)\.weight$|mid\.attn_1\.[qkv]\.weight$", name)  # in our classes linear layers
            state[name] = (part[:, :, None, None] if convolution else part).contiguous()
    return state


def save_tokenizer(tokenizer: Tokenizer, folder: pathlib.Path) -> None:
    """The two files of CLIP's tokenizer, and what transformers wants to know beside them."""
    folder.mkdir()
    marks = {"bos_token": tokenizer.START, "eos_token": tokenizer.END, "unk_token": tokenizer.END, "pad_token": tokenizer.END}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": tokenizer.length, "do_lower_case": True} | marks
    pairs = ["#version: 0.2", *(" ".join(pair) for pair in tokenizer.merges)]
    (folder / "vocab.json").write_text(json.dumps(tokenizer.vocab, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(pairs) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(marks, indent=2) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------ the published LPIPS ----

def published_lpips(vgg: dict[str, Tensor], lpips: dict[str, Tensor]) -> PerceptualLoss:
    """The perceptual loss that Stable Diffusion's autoencoder was trained with, in place of our own features'.

    vgg: torchvision's VGG16 state dict; lpips: the linear weights of the `lpips` package (v0.1, vgg). Raises ValueError naming
    what is missing."""
    missing = [k for k in ["features.0.weight", "features.28.bias"] if k not in vgg]
    missing += [k for k in [f"lin{i}.model.1.weight" for i in range(5)] if k not in lpips]
    if missing:
        raise ValueError(f"vgg or lpips lacks {', '.join(missing)}; they are torchvision's VGG16 and lpips' v0.1 'vgg' weights")
    return PerceptualLoss(VGGFeatures(vgg), [lpips[f"lin{i}.model.1.weight"].flatten() for i in range(5)])


class VGGFeatures(nn.Module):
    """VGG16's convolutions (Simonyan & Zisserman 2015), read before each pooling; x in [-1, 1], shifted as lpips does."""

    POOL_BEFORE, NUMBERS = {5, 10, 17, 24}, [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]  # in torchvision's `features`

    def __init__(self, state: dict[str, Tensor]):
        super().__init__()
        for number in self.NUMBERS:
            self.register_buffer(f"weight{number}", state[f"features.{number}.weight"])
            self.register_buffer(f"bias{number}", state[f"features.{number}.bias"])

    def forward(self, x: Tensor) -> list[Tensor]:
        shift, scale = x.new_tensor([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]])[:, None, :, None, None]
        h, maps = (x - shift) / scale, []
        for number in self.NUMBERS:
            if number in self.POOL_BEFORE:
                maps, h = maps + [h], nn.functional.max_pool2d(h, 2)
            weight, bias = [getattr(self, f"{name}{number}").to(x.dtype) for name in ("weight", "bias")]
            h = nn.functional.relu(nn.functional.conv2d(h, weight, bias, padding=1))
        return maps + [h]
