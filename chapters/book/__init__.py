"""What the chapters share: figures in one style, widgets, the data and the shipped model, `check`.

Importing it sets matplotlib's style for the whole book.
"""

from ldm_minimal.sample import to_image

from .diagrams import diagram
from .grading import check
from .loading import SHIPPED, load_data, load_evaluator, load_model, result
from .plotting import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    RED,
    SKY,
    YELLOW,
    curves,
    png,
    show,
)
from .widgets import slider, studio

__all__ = [
    "BLACK",
    "BLUE",
    "GREEN",
    "GREY",
    "ORANGE",
    "PINK",
    "RED",
    "SHIPPED",
    "SKY",
    "YELLOW",
    "check",
    "curves",
    "diagram",
    "load_data",
    "load_evaluator",
    "load_model",
    "png",
    "result",
    "show",
    "slider",
    "studio",
    "to_image",
]
