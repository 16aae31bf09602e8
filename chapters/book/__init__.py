"""What the chapters share: figures in one style, widgets, the data and the shipped model, `check`.

Importing it sets matplotlib's style for the whole book, and makes `accelerate` train on the CPU.
"""

import os

# What the chapters train is sized for two CPU cores, and their cells mix models, data and probes.
# A training would otherwise move its model to a GPU and leave the rest where it was.
os.environ.setdefault("ACCELERATE_USE_CPU", "true")

from ldm_minimal.sample import to_image

from . import diagrams, restoring
from .grading import check
from .loading import SHIPPED, load_data, load_evaluator, load_model, load_recipe, result
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
    show_figures_as_html,
)
from .widgets import compare, predict, row, slider, studio

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
    "compare",
    "curves",
    "diagrams",
    "load_data",
    "load_evaluator",
    "load_model",
    "load_recipe",
    "png",
    "predict",
    "restoring",
    "result",
    "row",
    "show",
    "slider",
    "studio",
    "to_image",
]

show_figures_as_html()
