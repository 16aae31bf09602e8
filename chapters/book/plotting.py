"""One style of figure for the whole book; images in a grid, and curves.

The colours are those that the colour-blind can tell apart (Okabe & Ito 2008). Each comes with a
line style of its own, so that a page printed in grey says as much.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import matplotlib.pyplot as plt
from cycler import cycler
from PIL import Image
from torch import Tensor

from ldm_minimal.sample import to_image

BLUE = "#0072B2"
ORANGE = "#E69F00"
GREEN = "#009E73"
PINK = "#CC79A7"
SKY = "#56B4E9"
RED = "#D55E00"
YELLOW = "#F0E442"
BLACK = "#000000"
GREY = "#767676"

plt.rcParams.update(
    {
        "axes.prop_cycle": cycler(
            color=[BLUE, RED, GREEN, ORANGE, PINK, BLACK],
            linestyle=["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), "-"],
        ),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlelocation": "left",
        "axes.titlesize": 12,
        "axes.titleweight": "bold",
        "axes.labelsize": 11,
        "lines.linewidth": 2,
        "legend.frameon": False,
        "font.size": 11,
        "figure.figsize": (8, 3.2),
        "figure.dpi": 80,
        "figure.constrained_layout.use": True,
        "image.interpolation": "nearest",
        "svg.fonttype": "none",
    }
)


def show(
    images: Tensor | Sequence[Tensor],
    captions: Sequence[str] = (),
    *,
    columns: int = 8,
    title: str = "",
    rows: Sequence[str] = (),
    side: float = 1.45,
) -> None:
    """Images in a grid, each with its caption under it.

    images: (N, 3, H, W) in [-1, 1], or a list of (3, H, W). rows: a label to the left of each row.
    side: of an image, in inches at most.
    """
    images = list(images)
    columns = min(columns, len(images))
    count = math.ceil(len(images) / columns)
    side = min(side, 11 / columns)
    width = columns * side + (0.9 if rows else 0)
    row_height = side + (0.28 if captions else 0)
    height = count * row_height + (0.4 if title else 0)
    figure, axes = plt.subplots(count, columns, figsize=(width, height), squeeze=False)
    for i, axis in enumerate(axes.flat):
        axis.set(xticks=[], yticks=[])
        if i >= len(images):
            axis.spines[:].set_visible(False)
            continue
        # Without a frame nobody would see where a white image ends.
        axis.spines[:].set(visible=True, color="#cccccc", linewidth=0.6)
        axis.imshow(to_image(images[i]))
        if i < len(captions):
            axis.set_xlabel(captions[i], fontsize=9)
        if rows and i % columns == 0:
            axis.set_ylabel(rows[i // columns], fontsize=10, rotation=0, ha="right", va="center")
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    plt.show()


def curves(
    series: dict[str, tuple],
    *,
    x: str,
    y: str,
    title: str,
    axis: plt.Axes | None = None,
    bands: dict[str, tuple] | None = None,
    **settings,
) -> None:
    """One line for each {name: (xs, ys)}, with a legend where there are several.

    bands: {name: (xs, lows, highs)}, shaded. settings: of the axes, such as yscale="log". Draws
    into `axis` and leaves showing it to the caller; without one, shows a figure of its own.
    """
    own_figure = axis is None
    if own_figure:
        _, axis = plt.subplots()
    for name, (xs, ys) in series.items():
        (line,) = axis.plot(xs, ys, label=name)
        if bands and name in bands:
            axis.fill_between(*bands[name], color=line.get_color(), alpha=0.15, linewidth=0)
    axis.set(xlabel=x, ylabel=y, title=title, **settings)
    if len(series) > 1:
        axis.legend()
    if own_figure:
        plt.show()


def png(image: Tensor, factor: int = 6) -> bytes:
    """(3, H, W) in [-1, 1] -> the bytes of a PNG, each pixel `factor` x `factor`."""
    picture = to_image(image)
    file = io.BytesIO()
    enlarged = (picture.width * factor, picture.height * factor)
    picture.resize(enlarged, Image.Resampling.NEAREST).save(file, "png")
    return file.getvalue()
