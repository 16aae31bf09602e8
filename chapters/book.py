"""What the chapters share: one style of figure, pictures in a grid, curves, a slider, the data, the shipped model, check().

Importing it sets matplotlib's style for the whole book: colours that the colour-blind can tell apart (Okabe & Ito 2008), each
with a line style of its own, so that a page printed in grey says as much.
"""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import ipywidgets
import matplotlib.pyplot as plt
import torch
from cycler import cycler
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

def show(pictures: Tensor | Sequence[Tensor], captions: Sequence[str] = (), *, columns: int = 8, title: str = "", rows: Sequence[str] = ()) -> None:
    """Pictures in a grid, each with its caption under it. pictures: (N, 3, H, W) in [-1, 1], or a list of (3, H, W);
    rows: a label to the left of each row."""
    pictures = list(pictures)
    columns = min(columns, len(pictures))
    count = math.ceil(len(pictures) / columns)
    side = min(1.45, 11 / columns)
    figure, axes = plt.subplots(count, columns, figsize=(columns * side + 0.9 * bool(rows), count * (side + 0.28 * bool(captions)) + 0.4 * bool(title)),
                                squeeze=False)
    for i, axis in enumerate(axes.flat):
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
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


# ---- exercises -------------------------------------------------------------------------------------------------------

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
        print(f"exercise {number}: not yet: it raised {type(error).__name__}: {error}")
    else:
        print(f"exercise {number}: not yet: {complaint}" if complaint else f"exercise {number}: correct")
