"""What the chapters share: one style of figure, pictures in a grid, curves, a slider, the data, the shipped model, check().

Importing it sets matplotlib's style for the whole book: colours that the colour-blind can tell apart (Okabe & Ito 2008), each
with a line style of its own, so that a page printed in grey says as much.
"""

from __future__ import annotations

import io
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
import torch
from cycler import cycler
from PIL import Image
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path[:0] = [path for path in (str(HERE.parent), str(HERE.parent / "data" / "shapes")) if path not in sys.path]

from ldm_minimal import CLIP, CaptionedImages, LatentDiffusion  # noqa: E402
from ldm_minimal.__main__ import SHIPPED, data_folder, to_image  # noqa: E402

BLUE, ORANGE, GREEN, PINK, SKY, RED, YELLOW, BLACK = "#0072B2 #E69F00 #009E73 #CC79A7 #56B4E9 #D55E00 #F0E442 #000000".split()
GREY = "#767676"

plt.rcParams.update({
    "axes.prop_cycle": cycler(color=[BLUE, RED, GREEN, ORANGE, PINK, BLACK], linestyle=["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), "-"]),
    "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left", "axes.titlesize": 12, "axes.titleweight": "bold",
    "axes.labelsize": 11, "lines.linewidth": 2, "legend.frameon": False, "font.size": 11, "figure.figsize": (8, 3.2),
    "figure.dpi": 80, "figure.constrained_layout.use": True, "image.interpolation": "nearest", "svg.fonttype": "none",
})


# ---- figures ---------------------------------------------------------------------------------------------------------

def show(pictures: Tensor | Sequence[Tensor], captions: Sequence[str] = (), *, columns: int = 8, title: str = "", rows: Sequence[str] = (), side: float = 1.45) -> None:
    """Pictures in a grid, each with its caption under it. pictures: (N, 3, H, W) in [-1, 1], or a list of (3, H, W);
    rows: a label to the left of each row; side: of a picture, in inches at most."""
    pictures = list(pictures)
    columns = min(columns, len(pictures))
    count = math.ceil(len(pictures) / columns)
    side = min(side, 11 / columns)
    figure, axes = plt.subplots(count, columns, figsize=(columns * side + 0.9 * bool(rows), count * (side + 0.28 * bool(captions)) + 0.4 * bool(title)),
                                squeeze=False)
    for i, axis in enumerate(axes.flat):
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set(visible=i < len(pictures), color="#cccccc", linewidth=0.6)  # white pictures end somewhere, too
        if i < len(pictures):
            axis.imshow(to_image(pictures[i]))
            if i < len(captions):
                axis.set_xlabel(captions[i], fontsize=9)
            if rows and i % columns == 0:
                axis.set_ylabel(rows[i // columns], fontsize=10, rotation=0, ha="right", va="center")
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    plt.show()


def curves(series: dict[str, tuple], *, x: str, y: str, title: str, axis: plt.Axes | None = None,
           bands: dict[str, tuple] | None = None, **settings) -> None:
    """One line for each {name: (xs, ys)}, with a legend where there are several; bands: {name: (xs, lows, highs)}, shaded.

    settings: of the axes, such as yscale="log". Draws into `axis` and leaves showing to the caller, or makes its own figure."""
    own = axis is None
    axis = plt.subplots()[1] if own else axis
    for name, (xs, ys) in series.items():
        line, = axis.plot(xs, ys, label=name)
        if bands and name in bands:
            axis.fill_between(*bands[name], color=line.get_color(), alpha=0.15, linewidth=0)
    axis.set(xlabel=x, ylabel=y, title=title, **settings)
    if len(series) > 1:
        axis.legend()
    if own:
        plt.show()


def png(picture: Tensor, factor: int = 6) -> bytes:
    """(3, H, W) in [-1, 1] -> the bytes of a PNG, each pixel `factor` x `factor`."""
    image, file = to_image(picture), io.BytesIO()
    image.resize((image.width * factor, image.height * factor), 0).save(file, "png")
    return file.getvalue()


def slider(pictures: Sequence[Tensor], labels: Sequence[str], name: str, factor: int = 6) -> ipywidgets.Widget:
    """Move through pictures made beforehand: a slider called `name`, and the picture and label at its place."""
    frames = [png(picture, factor) for picture in pictures]
    handle = ipywidgets.IntSlider(0, 0, len(frames) - 1, description=name, readout=False, layout={"width": "420px"})
    image, label = ipywidgets.Image(value=frames[0], format="png"), ipywidgets.Label(labels[0])

    def move(change: dict) -> None:
        image.value, label.value = frames[change["new"]], labels[change["new"]]
    handle.observe(move, "value")
    box = ipywidgets.VBox([ipywidgets.HBox([handle, label]), image])
    box.add_class("widget-interact")
    return box


def diagram() -> None:
    """The two stages of latent diffusion, and drawing, as boxes and arrows."""
    figure, axis = plt.subplots(figsize=(10, 4.2))
    axis.set(xlim=(0, 100), ylim=(0, 42))
    axis.axis("off")

    def box(x: float, y: float, text: str, colour: str) -> None:
        axis.text(x, y, text, ha="center", va="center", fontsize=10, bbox={"boxstyle": "round,pad=0.55", "facecolor": colour, "edgecolor": BLACK, "linewidth": 1})

    def arrow(start: tuple, end: tuple) -> None:
        axis.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": BLACK, "linewidth": 1.2})

    part, plain = "#cfe6f5", "#f4f4f4"
    for y, name in ((36, "stage 1: squeeze"), (22, "stage 2: learn to\ntake noise out"), (7, "drawing")):
        axis.text(0, y, name, va="center", fontsize=11, fontweight="bold")
    for x, text, colour in ((27, "picture x", plain), (44, "encoder E", part), (60, "latent z", plain), (76, "decoder D", part), (93, "picture", plain)):
        box(x, 36, text, colour)
    for x, text, colour in ((27, "latent z", plain), (47, "z_t = z with noise", plain), (68, "U-Net", part), (88, "guess of the noise", plain)):
        box(x, 22, text, colour)
    for x, text, colour in ((27, "pure noise", plain), (47, "U-Net,\nfifty times", part), (64, "latent z", plain), (79, "D, once", part), (93, "picture", plain)):
        box(x, 7, text, colour)
    for y, stops in ((36, ((32, 38), (50, 55), (65, 70), (82, 88.5))), (22, ((31.5, 38.5), (55.5, 64.5), (71.5, 79))), (7, ((32, 41.5), (52.5, 59.5), (68.5, 74.5), (83.5, 88.5)))):
        for start, end in stops:
            arrow((start, y), (end, y))
    box(68, 14.5, "time t, caption y", plain)
    arrow((68, 16.4), (68, 19.8))
    arrow((61, 13.4), (50, 9.6))
    plt.show()


def studio(model: LatentDiffusion) -> ipywidgets.Widget:
    """A text box, guidance, steps and seed, and a button that draws."""
    text = ipywidgets.Text("a small cyan heart below a large orange circle", description="prompt", layout={"width": "520px"})
    guidance = ipywidgets.FloatSlider(5.0, min=0.0, max=12.0, step=0.5, description="guidance")
    steps = ipywidgets.IntSlider(50, min=1, max=100, description="steps")
    seed = ipywidgets.IntText(0, description="seed", layout={"width": "180px"})
    button, image, says = ipywidgets.Button(description="draw", button_style="primary"), ipywidgets.Image(format="png"), ipywidgets.Label()

    def draw(_=None) -> None:
        if not text.value.strip():
            says.value = "type a sentence first"
            return
        generator = torch.Generator().manual_seed(abs(seed.value))
        image.value = png(model.generate([text.value], steps=steps.value, guidance=guidance.value, generator=generator)[0], 8)
        says.value = text.value
    button.on_click(draw)
    draw()
    return ipywidgets.VBox([text, ipywidgets.HBox([guidance, steps]), ipywidgets.HBox([seed, button]), image, says])


# ---- data and models -------------------------------------------------------------------------------------------------

def load_data(split: str = "train") -> CaptionedImages:
    """The shapes of `train` or `test`, 32 x 32; drawn first (some seconds) where they are not there yet."""
    return CaptionedImages(data_folder(None, 32) / split, 32)


def load_model() -> LatentDiffusion:
    """The shipped model: trained by the same code as every chapter's, with more steps."""
    return LatentDiffusion.load(SHIPPED / "model")


def load_judge() -> CLIP:
    """A second CLIP, of another seed, that no training ever used: it only judges."""
    return CLIP.load(SHIPPED / "judge")


def result(name: str) -> dict:
    """What `python chapters/runs.py NN` made: the numbers of runs/NN/NAME.json, and "pictures", (N, 3, 32, 32), where there are."""
    path = HERE / "runs" / f"{name}.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; python chapters/runs.py {name[:2]} makes it")
    numbers = json.loads(path.read_text(encoding="utf-8"))
    if path.with_suffix(".png").is_file():
        with Image.open(path.with_suffix(".png")) as image:
            pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)      # (3, H, N * H)
        numbers["pictures"] = torch.stack(pixels.split(pixels.shape[1], dim=2)) / 127.5 - 1
    return numbers


# ---- exercises -------------------------------------------------------------------------------------------------------

def cause(error: Exception) -> str:
    """What went wrong: a line of the reader's own code, or an answer that the check cannot use."""
    ours = (str(HERE / "book.py"), str(HERE / "checks.py"), f"{sys.prefix}{os.sep}", f"{sys.base_prefix}{os.sep}", "<frozen")
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(ours)]
    raised = f"{type(error).__name__}: {error}"
    if own:
        return f"it raised {raised}" + (f", in the line `{own[-1].line.strip()}`" if own[-1].line else "")
    if "NoneType" in str(error):
        return f"it gave None; is a `return` missing? (raised {raised})"
    return f"the answer is not of the kind that is asked for (raised {raised})"


def check(number: str, answer: Callable | object) -> None:
    """Print what `answer` (a function, or a value; ... for none) is to exercise `number`: not attempted, not yet, or correct."""
    from checks import CHECKS

    try:
        if answer is ...:
            raise NotImplementedError
        complaint = CHECKS[number](answer)
    except NotImplementedError:
        print(f"exercise {number}: not attempted")
    except Exception as error:  # whatever a reader's own code may raise
        print(f"exercise {number}: not yet: {cause(error)}")
    else:
        print(f"exercise {number}: not yet: {complaint}" if complaint else f"exercise {number}: correct")
