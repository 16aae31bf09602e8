"""python -m ldm_minimal sample PROMPT: draw prompts with a trained model. Also: images to files."""

from __future__ import annotations

import argparse
import math
import os
import pathlib
import sys
import time

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

from . import stable_diffusion
from .cli import add_seed, number
from .files import SHIPPED, best_device, load_part, whole_file
from .ldm import LatentDiffusion

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `sample`."""
    parser.add_argument("prompts", nargs="+", metavar="PROMPT")
    parser.add_argument(
        "--model",
        default=SHIPPED,
        help="a run's folder, a saved model, or Stable Diffusion 1 as a .safetensors or .ckpt file "
        "or a `diffusers` folder (default: the shipped model)",
    )
    parser.add_argument(
        "--tokenizer",
        help="of a single-file Stable Diffusion: a folder with vocab.json and merges.txt, a "
        "tokenizer.json, or bpe_simple_vocab_16e6.txt.gz (default: from the Hugging Face hub)",
    )
    parser.add_argument(
        "--precision",
        choices=list(PRECISIONS),
        default="fp32",
        help="fp16 and bf16 halve the memory, for a GPU (default fp32)",
    )
    parser.add_argument(
        "--height",
        type=number(int, 1, 4096),
        help="in pixels (default: the model's); with Stable Diffusion a multiple of 64",
    )
    parser.add_argument("--width", type=number(int, 1, 4096), help="likewise")
    parser.add_argument(
        "--count",
        type=number(int, 1, 64),
        default=1,
        help="images of each prompt, drawn at once (default 1)",
    )
    parser.add_argument("--steps", type=number(int, 1, 1000), default=50)
    parser.add_argument("--guidance", type=number(float, 0, 100), default=7.5)
    parser.add_argument("--negative", default="", help="what to steer away from")
    add_seed(parser)
    parser.add_argument("--out", default="out.png")


def run(args: argparse.Namespace) -> None:
    """The command. Raises ValueError or OSError for what is wrong with its options."""
    if not all(prompt.strip() for prompt in args.prompts):
        raise ValueError(
            'an empty prompt; say what to draw, for example "a red circle above a blue square"'
        )
    out = pathlib.Path(args.out)
    check_writable(out)
    model = load_model(args.model, precision=args.precision, tokenizer=args.tokenizer)
    if args.precision != "fp32" and model.device.type == "cpu":
        print(
            f"ldm_minimal: on a CPU {args.precision} halves the memory, and may take several times "
            "as long as fp32",
            file=sys.stderr,
        )
    started = time.time()
    prompts = [prompt for prompt in args.prompts for _ in range(args.count)]
    image_size = model.config.image_size
    trajectory = model.denoise(
        prompts,
        steps=args.steps,
        guidance=args.guidance,
        negative=args.negative,
        size=(args.height or image_size, args.width or image_size),
        generator=torch.Generator().manual_seed(args.seed),
    )
    bar = tqdm(trajectory, total=args.steps, desc="denoising", unit="step", leave=False)
    for _, z, _ in bar:  # noqa: B007
        pass
    with torch.no_grad():
        x = model.decode(z)
    if len(x) == 1:
        save_image(out, x[0])
    else:
        save_sheet(out, x, prompts)
    plural = "s" if len(x) > 1 else ""
    size = f"{x.shape[-1]} x {x.shape[-2]}"
    print(f"{out}  {len(x)} image{plural} of {size}, {time.time() - started:.1f} s")


def load_model(
    model: str | os.PathLike,
    *,
    precision: str = "fp32",
    tokenizer: str | None = None,
    device: str | None = None,
) -> LatentDiffusion:
    """A run's folder, a saved model, or Stable Diffusion 1: one file, or a `diffusers` folder."""
    path = pathlib.Path(model)
    device = device or best_device()
    dtype = PRECISIONS[precision]
    if path.is_file() or (path / "model_index.json").is_file():
        return stable_diffusion.load(
            path, dtype=dtype, device=device, tokenizer=tokenizer, progress=device != "meta"
        )
    if tokenizer:
        raise ValueError(
            f"--tokenizer is for files of Stable Diffusion; --model {path} has its own"
        )
    return load_part(path, "model", LatentDiffusion).to(device, dtype)


def check_writable(out: pathlib.Path) -> None:
    """Before the long work. Raises ValueError, or OSError if `out` cannot be written."""
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise ValueError(f"--out {out} must end in .png, .jpg or .webp")
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder; a file name is needed")
    trial = out.with_name(f".{out.name}.{os.getpid()}.try")
    with whole_file(trial) as partial:
        partial.touch()
    trial.unlink()


# ---- images ------------------------------------------------------------------------------------


def to_image(x: Tensor) -> Image.Image:
    """x (3, H, W) in [-1, 1] -> a PIL image."""
    pixels = ((x.clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def save_image(path: pathlib.Path, x: Tensor) -> None:
    """One image (3, H, W). A small one is enlarged by a whole number to about 256 pixels."""
    image = to_image(x)
    factor = max(1, 256 // x.shape[-1])
    enlarged = (image.width * factor, image.height * factor)
    with whole_file(path) as partial:
        image.resize(enlarged, Image.Resampling.NEAREST).save(partial)


def save_sheet(path: pathlib.Path, x: Tensor, captions: list[str], columns: int = 4) -> None:
    """Images (N, 3, H, W) with their captions, as `image_sheet` lays them out."""
    sheet = image_sheet(x, captions, columns)
    with whole_file(path) as partial:
        sheet.save(partial)


def image_sheet(x: Tensor, captions: list[str], columns: int, tile: int = 160) -> Image.Image:
    """Images in rows of `columns`, each about `tile` pixels wide with its caption under it."""
    factor = max(1, round(tile / x.shape[-1]))
    height = factor * x.shape[-2]
    width = factor * x.shape[-1]
    font = ImageFont.load_default(size=12)
    line_height = 15
    pad = 8
    texts = [wrap_text(caption, font, width) for caption in captions]
    tile_height = height + line_height * max(len(lines) for lines in texts) + pad
    columns = min(columns, len(x))
    rows = math.ceil(len(x) / columns)
    sheet_size = (columns * (width + pad) + pad, rows * (tile_height + pad) + pad)
    sheet = Image.new("RGB", sheet_size, "white")
    pen = ImageDraw.Draw(sheet)
    for i, (image, lines) in enumerate(zip(x, texts, strict=True)):
        left = pad + (i % columns) * (width + pad)
        top = pad + (i // columns) * (tile_height + pad)
        enlarged = to_image(image).resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(enlarged, (left, top))
        pen.rectangle((left - 1, top - 1, left + width, top + height), outline="#bbbbbb")
        for number_of_line, line in enumerate(lines):
            below = top + height + 3 + number_of_line * line_height
            pen.text((left, below), line, fill="#222222", font=font)
    return sheet


def wrap_text(text: str, font: ImageFont.ImageFont, width: int) -> list[str]:
    """Lines of words, each at most `width` pixels if its words allow it."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if not lines[-1] or font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
