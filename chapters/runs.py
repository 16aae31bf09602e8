"""Remakes the small result files that the chapters read, from the chapters' own code and the library.

    python chapters/runs.py 02            # remake the results of chapter 2
    python chapters/runs.py --check       # is there a recipe for every file that a chapter reads, and a file for every recipe?

A result is runs/NN/NAME.json: curves and numbers, with the seed, machine and minutes that made them; and, where there are
pictures, runs/NN/NAME.png, all of them in one row of 32 x 32 tiles. `book.result("NN/NAME")` reads both.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
import time
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

import book

HERE = Path(__file__).resolve().parent
RECIPES = {}


def recipe(name: str):
    """Register what makes runs/`name`: a function that returns (numbers, pictures or None)."""
    def register(function):
        RECIPES[name] = function
        return function
    return register


def chapter_code(number: str) -> dict:
    """The names that chapter `number` defines in its cells tagged "export": runs use the very code that the chapter shows."""
    notebook = json.loads(next(HERE.glob(f"{number}_*.ipynb")).read_text(encoding="utf-8"))
    names = {}
    for cell in notebook["cells"]:
        if "export" in cell["metadata"].get("tags", []):
            exec("".join(cell["source"]), names)
    return names


def machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        name = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        name = platform.processor() or platform.machine()
    return f"{torch.get_num_threads()} threads of {name}"


def make(name: str) -> None:
    started = time.time()
    torch.manual_seed(0)
    numbers, pictures = RECIPES[name]()
    record = {"command": f"python chapters/runs.py {name[:2]}", "seed": 0, "machine": machine(), "torch": torch.__version__,
              "minutes": round((time.time() - started) / 60, 1)} | numbers
    folder = HERE / "runs" / name[:2]
    folder.mkdir(parents=True, exist_ok=True)
    (HERE / "runs" / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    if pictures is not None:
        row(pictures).save(HERE / "runs" / f"{name}.png", optimize=True)
    print(f"runs/{name}: {record['minutes']} minutes")


def row(pictures: Tensor) -> Image.Image:
    """(N, 3, H, W) in [-1, 1] -> one picture, side by side."""
    return book.to_image(torch.cat(list(pictures.cpu()), dim=2))


def check() -> list[str]:
    """What is wrong: files without a recipe, recipes without a file, files too large."""
    files = {str(path.relative_to(HERE / "runs").with_suffix("")) for path in (HERE / "runs").rglob("*.json")}
    read = {name for path in HERE.glob("[0-9][0-9]_*.ipynb") for name in re.findall(r'book\.result\(\\"([^"\\]+)', path.read_text(encoding="utf-8"))}
    return ([f"{name} is read by a chapter and has no recipe" for name in sorted(read - set(RECIPES))]
            + [f"{name} has a recipe and no file" for name in sorted(set(RECIPES) - files)]
            + [f"{name} has a file and no recipe" for name in sorted(files - set(RECIPES))]
            + [f"{path} is larger than 300 kB" for path in (HERE / "runs").rglob("*.*") if path.stat().st_size > 300_000])


# ---- recipes ---------------------------------------------------------------------------------------------------------

@recipe("02/pixels")
def pixels():
    """Chapter 2's simple U-Net in pixel space, trained for longer; the loss at each t, of 300 steps and of all; 16 samples."""
    code, steps, batch = chapter_code("02"), 1200, 32
    data, held_out = book.load_data("train"), book.load_data("test").pictures(slice(0, 128))
    torch.manual_seed(0)

    def by_time(unet):
        noise = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for t in range(0, 1000, 50):
                eps, times = torch.randn(held_out.shape, generator=noise), torch.full((128,), t)
                yield ((unet(code["schedule"].add_noise(held_out, times, eps), times) - eps) ** 2).mean().item()

    def trained(steps):
        torch.manual_seed(0)
        unet = code["SimpleUNet"]()
        losses = list(code["train"](unet, lambda count: data.pictures(torch.randint(len(data), (count,))), steps, batch, 2e-3))
        return unet, losses
    short, _ = trained(300)
    unet, losses = trained(steps)
    with torch.no_grad():
        *_, drawn = code["sample"](lambda x, t: unet(x, torch.full((len(x),), t)), torch.randn(16, 3, 32, 32))
    smooth = torch.tensor(losses).view(-1, 50).mean(dim=1).tolist()
    return {"steps": steps, "batch": batch, "losses_of_50_steps": [round(v, 4) for v in smooth], "loss_by_t": [round(v, 5) for v in by_time(unet)],
            "loss_by_t_short": [round(v, 5) for v in by_time(short)]}, drawn.clamp(-1, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("chapters", nargs="*", metavar="NN", help="chapters whose results to remake")
    parser.add_argument("--check", action="store_true", help="only compare recipes and files")
    options = parser.parse_args()
    unknown = [number for number in options.chapters if number not in {name[:2] for name in RECIPES}]
    if unknown or not (options.check or options.chapters):
        parser.exit(2, f"runs.py: name one of {', '.join(sorted({name[:2] for name in RECIPES}))}, or --check\n")
    for name in RECIPES:
        if name[:2] in options.chapters:
            make(name)
    if options.check:
        wrong = check()
        print("\n".join(wrong) or "every result has its recipe, every recipe its result")
        sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
