"""Drawn diagrams: what goes where in latent diffusion."""

from __future__ import annotations

import matplotlib.pyplot as plt

from .plotting import BLACK

NETWORK = "#cfe6f5"  # colour of what is trained
DATA = "#f4f4f4"  # colour of what flows through it

# A row of the diagram: its height and name; the boxes from left to right, (x, text, colour); and
# where the arrow between each two of them starts and ends.
ROWS = [
    (
        36,
        "stage 1: squeeze",
        [
            (27, "picture x", DATA),
            (44, "encoder E", NETWORK),
            (60, "latent z", DATA),
            (76, "decoder D", NETWORK),
            (93, "picture", DATA),
        ],
        [(32, 38), (50, 55), (65, 70), (82, 88.5)],
    ),
    (
        22,
        "stage 2: learn to\ntake noise out",
        [
            (27, "latent z", DATA),
            (47, "z_t = z with noise", DATA),
            (68, "U-Net", NETWORK),
            (88, "guess of the noise", DATA),
        ],
        [(31.5, 38.5), (55.5, 64.5), (71.5, 79)],
    ),
    (
        7,
        "drawing",
        [
            (27, "pure noise", DATA),
            (47, "U-Net,\nfifty times", NETWORK),
            (64, "latent z", DATA),
            (79, "D, once", NETWORK),
            (93, "picture", DATA),
        ],
        [(32, 41.5), (52.5, 59.5), (68.5, 74.5), (83.5, 88.5)],
    ),
]


def diagram() -> None:
    """The two stages of latent diffusion, and drawing, as boxes and arrows."""
    _, axis = plt.subplots(figsize=(10, 4.2))
    axis.set(xlim=(0, 100), ylim=(0, 42))
    axis.axis("off")
    for y, name, boxes, arrows in ROWS:
        axis.text(0, y, name, va="center", fontsize=11, fontweight="bold")
        for x, text, colour in boxes:
            _box(axis, x, y, text, colour)
        for start, end in arrows:
            _arrow(axis, (start, y), (end, y))
    # Time and caption reach the U-Net in training (up) and in drawing (down).
    _box(axis, 68, 14.5, "time t, caption y", DATA)
    _arrow(axis, (68, 16.4), (68, 19.8))
    _arrow(axis, (61, 13.4), (50, 9.6))
    plt.show()


def _box(axis: plt.Axes, x: float, y: float, text: str, colour: str) -> None:
    style = {
        "boxstyle": "round,pad=0.55",
        "facecolor": colour,
        "edgecolor": BLACK,
        "linewidth": 1,
    }
    axis.text(x, y, text, ha="center", va="center", fontsize=10, bbox=style)


def _arrow(axis: plt.Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    style = {"arrowstyle": "-|>", "color": BLACK, "linewidth": 1.2}
    axis.annotate("", end, start, arrowprops=style)
