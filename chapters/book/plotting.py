"""One style of figure for the whole book; images in a grid, and curves.

A figure is as wide as a page (9 inches, 864 CSS pixels) or less, and its PNG has 168 pixels an
inch, so that it is sharp on every screen. Its text is at least 11 points. The colours
are those that the colour-blind can tell apart (Okabe & Ito 2008). Each comes with a line style of
its own, so that a page printed in grey says as much.
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Sequence

import matplotlib.pyplot as plt
from cycler import cycler
from IPython import get_ipython
from IPython.core.pylabtools import select_figure_formats
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

PAGE_WIDTH = 9.0  # inches
CSS_DPI = 96  # a browser's inch
SHARPNESS = 1.75  # pixels of a figure for each CSS pixel
FEW = 12  # a line of so many points is a sweep, and shows its points

plt.rcParams.update(
    {
        "axes.prop_cycle": cycler(
            color=[BLUE, RED, GREEN, ORANGE, PINK, BLACK],
            linestyle=["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), "-"],
        ),
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlelocation": "left",
        "axes.titlesize": 12,
        "axes.titleweight": "bold",
        "axes.labelsize": 11,
        "figure.figsize": (PAGE_WIDTH, 3.6),
        "figure.dpi": CSS_DPI,
        "figure.titlesize": 12,
        "figure.titleweight": "bold",
        "figure.constrained_layout.use": True,
        "font.size": 11,
        "grid.color": "#e4e4e4",
        "grid.linewidth": 0.8,
        "image.interpolation": "nearest",
        "legend.frameon": False,
        "legend.fontsize": 11,
        "lines.linewidth": 2,
        "lines.markersize": 6,
        "xtick.labelsize": 11,
        "ytick.labelsize": 11,
    }
)


# ---- showing a figure --------------------------------------------------------------------------


def show_figures_as_html() -> None:
    """In a notebook, show figures as HTML images: these can have an alternative text.

    A figure's label is its alternative text; without one, its titles and the names of its axes.
    """
    shell = get_ipython()
    if shell is None:  # not in a notebook
        return
    plt.switch_backend("module://matplotlib_inline.backend_inline")
    select_figure_formats(shell, set())
    shell.display_formatter.formatters["text/html"].for_type(plt.Figure, html_of_figure)


def html_of_figure(figure: plt.Figure) -> str:
    alt = figure.get_label() or described(figure)
    return image_tag(webp_of_figure(figure), alt, figure.get_figwidth() * CSS_DPI, "webp")


def webp_of_figure(figure: plt.Figure) -> bytes:
    """The figure with 256 colours, without further loss: a fraction of a PNG's bytes."""
    file = io.BytesIO()
    dpi = CSS_DPI * SHARPNESS
    figure.savefig(file, format="png", dpi=dpi)
    picture = Image.open(file).convert("RGB")
    method = Image.Quantize.MAXCOVERAGE
    picture = picture.quantize(256, method=method, kmeans=2, dither=Image.Dither.NONE)
    file = io.BytesIO()
    picture.convert("RGB").save(file, "webp", lossless=True, method=4, quality=30)
    return file.getvalue()


def image_tag(content: bytes, alt: str, width: float, kind: str = "png", style: str = "") -> str:
    """An HTML image that carries its own bytes. width: in CSS pixels, where the page has room."""
    data = base64.b64encode(content).decode()
    return (
        f'<img class="book-figure" alt="{html.escape(alt)}" width="{width:.0f}" '
        f'style="max-width: 100%; height: auto; {style}" src="data:image/{kind};base64,{data}">'
    )


def described(figure: plt.Figure) -> str:
    """What is written in the figure: its title, and each part's title, axes and lines."""
    parts = [figure.get_suptitle()]
    for axis in figure.axes:
        lines = [line.get_label() for line in axis.get_lines()]
        parts.append(axis.get_title("left") or axis.get_title())
        if axis.get_ylabel() and axis.get_xlabel():
            parts.append(f"{axis.get_ylabel()} against {axis.get_xlabel()}")
        elif axis.get_xlabel():
            parts.append(axis.get_xlabel())
        parts.append(", ".join(line for line in lines if not line.startswith("_")))
    return ". ".join(part for part in parts if part).replace("\n", " ").replace("$", "")


# ---- images in a grid --------------------------------------------------------------------------


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
    longest = max((len(line) for label in rows for line in label.split("\n")), default=0)
    margin = 0.3 + 0.09 * longest if rows else 0.0
    side = min(side, (PAGE_WIDTH - margin) / columns)
    captions = [_wrapped(caption, side) for caption in captions]
    height = count * (side + 0.06) + (0.4 if title else 0)
    for i in range(0, len(captions), columns):  # each row needs room for its longest caption
        height += 0.19 * max(_lines(caption) for caption in captions[i : i + columns])
    size = (columns * side + margin, height)
    figure, axes = plt.subplots(count, columns, figsize=size, squeeze=False)
    for i, axis in enumerate(axes.flat):
        axis.set(xticks=[], yticks=[])
        if i >= len(images):
            axis.spines[:].set_visible(False)
            continue
        # Without a frame one would not see where a white image ends.
        axis.spines[:].set(visible=True, color="#cccccc", linewidth=0.6)
        axis.imshow(to_image(images[i]))
        if i < len(captions):
            axis.set_xlabel(captions[i])
        if rows and i % columns == 0:
            axis.set_ylabel(rows[i // columns], rotation=0, ha="right", va="center")
    if title:
        figure.suptitle(title, x=0.01, ha="left")
    figure.set_label(_alt_of_images(title, rows, captions, len(images)))
    plt.show()


def _lines(caption: str) -> int:
    return caption.count("\n") + 1 if caption else 0


def _wrapped(caption: str, inches: float) -> str:
    """The caption in lines that are no wider than its image."""
    room = max(int(inches * 11.5), 8)  # characters of 11 points
    lines = [""]
    for word in caption.split(" "):
        if lines[-1] and len(lines[-1]) + 1 + len(word) > room:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def _alt_of_images(title: str, rows: Sequence[str], captions: Sequence[str], count: int) -> str:
    parts = [title or f"{count} images"]
    if rows:
        parts.append("Rows: " + ", ".join(rows))
    if captions:
        parts.append("Captions: " + "; ".join(captions))
    return ". ".join(parts).replace("\n", " ").replace("$", "") + "."


# ---- curves ------------------------------------------------------------------------------------


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
        (line,) = axis.plot(xs, ys, label=name, marker="o" if len(xs) <= FEW else None)
        if bands and name in bands:
            axis.fill_between(*bands[name], color=line.get_color(), alpha=0.15, linewidth=0)
    axis.grid(True)
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
    picture.resize(enlarged, Image.Resampling.NEAREST).save(file, "png", optimize=True)
    return file.getvalue()
