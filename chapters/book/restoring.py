"""Figures of chapter 3: restored images beside their originals, and what judges them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.cbook import get_sample_data
from PIL import Image, ImageDraw
from torch import Tensor

from ldm_minimal.sample import to_image

from .diagrams import latent_image
from .plotting import BLACK, BLUE, GREEN, ORANGE, RED, SKY, curves


def _picture(axis: plt.Axes, image: Tensor, **settings) -> None:
    axis.imshow(to_image(image), **settings)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set(visible=True, color="#cccccc", linewidth=0.6)


# ---- images ------------------------------------------------------------------------------------


def hard_images() -> dict[str, Tensor]:
    """Images that are unlike any scene, (3, 32, 32): stripes, text, and a face."""

    def stripes(width: int) -> Tensor:
        bright = torch.arange(32) // width % 2 == 1
        return torch.where(bright, 0.9, -0.9).expand(3, 32, 32)

    page = Image.new("RGB", (32, 32), "white")
    ImageDraw.Draw(page).text((1, 1), "small\ntext", fill="black", spacing=2)
    return {
        "stripes of 2": stripes(2),
        "of 4": stripes(4),
        "of 8": stripes(8),
        "text": _to_x(page),
        "face": photograph(32),
    }


def photograph(side: int) -> Tensor:
    """Grace Hopper, by the US Navy (public domain; comes with matplotlib), (3, side, side)."""
    with Image.open(get_sample_data("grace_hopper.jpg")) as image:
        face = image.crop((140, 30, 396, 286)).resize((128, 128))
    return _to_x(face.resize((side, side)))


def _to_x(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 127.5 - 1


# ---- latents -----------------------------------------------------------------------------------


def one_number(z: Tensor, place: tuple[int, int, int], before: Tensor, after: Tensor, turn: float):
    """A figure: the latent z (4, h, w), the number at `place` framed; restored before and after.

    place: channel, row, column of z. turn: what was added there, for the title.
    """
    figure, axes = plt.subplots(1, 3, figsize=(7.2, 2.85))
    _picture(axes[0], latent_image(z))
    channel, row, column = place
    top, left = (channel // 2) * (z.shape[1] + 1), (channel % 2) * (z.shape[2] + 1)
    corner = (left + column - 0.5, top + row - 0.5)
    axes[0].add_patch(plt.Rectangle(corner, 1, 1, fill=False, edgecolor=BLACK, linewidth=2))
    _picture(axes[1], before)
    _picture(axes[2], after)
    titles = "latent; framed:\nthe changed number", "restored,\nunchanged"
    for axis, title in zip(axes, (*titles, f"restored,\n{turn:+.0f} added")):
        axis.set_title(title, fontsize=11, fontweight="normal")
    return figure


def restored_and_drawn(
    originals: Tensor, restored: dict[str, Tensor], drawn: Tensor, notes: Sequence[str]
) -> None:
    """For each name of `restored`: its images at the left; at the right `drawn`, and its note.

    originals (n, 3, H, W), restored {name: (n, 3, H, W)}, drawn (number of names, n, 3, H, W).
    """
    count = len(originals)
    rows = [("original", originals, [], "")]
    rows += [(*pair, x, note) for pair, x, note in zip(restored.items(), drawn, notes)]
    _, grid = plt.subplots(
        len(rows),
        2 * count + 1,
        figsize=(8.9, 1.06 * len(rows) + 0.3),
        width_ratios=[1] * count + [0.12] + [1] * count,
    )
    for axes, (name, left, right, note) in zip(grid, rows):
        axes[count].axis("off")
        for axis, image in zip(axes[:count], left):
            _picture(axis, image)
        for axis, image in zip(axes[count + 1 :], right):
            _picture(axis, image)
        for axis in axes[count + 1 + len(right) :]:
            axis.axis("off")
        axes[0].set_ylabel(name, rotation=0, ha="right", va="center")
        axes[-1].yaxis.set_label_position("right")
        axes[-1].set_ylabel(note, rotation=0, ha="left", va="center")
    grid[1, 0].set_title(" ", fontsize=11)  # room
    titles = {count // 2: "restored from the mean μ", count + 1 + count // 2: "decoded from noise"}
    for column, title in titles.items():
        grid[1, column].set_title(title, fontsize=11, loc="center").set_in_layout(False)
    plt.show()


# ---- losses ------------------------------------------------------------------------------------


def costs(answer: Tensor, costs: dict[str, Tensor]) -> None:
    """The expected cost of each answer, one panel for each kind of cost, its least marked."""
    _, panels = plt.subplots(1, len(costs), figsize=(9, 3.2))
    for axis, (name, cost) in zip(panels, costs.items()):
        limits = answer[0].item(), answer[-1].item()
        curves(
            {"": (answer, cost)}, axis=axis, x="answer", y="expected cost", title=name, xlim=limits
        )
        best = answer[cost.argmin()].item()
        axis.axvline(best, color=RED, linestyle="--")
        label = f"least at {best:.2f}"
        axis.text(best - 0.02, cost.max(), label, ha="right", va="top", color=RED)
    plt.show()


def distances(of_each: dict[str, dict[str, float]]) -> None:
    """{network: {kind: distance}} as bars, a panel for each network."""
    _, panels = plt.subplots(1, len(of_each), figsize=(9, 2.6), sharey=True)
    for axis, (network, values) in zip(panels, of_each.items()):
        axis.barh(list(values), list(values.values()), color=SKY)
        for i, value in enumerate(values.values()):
            axis.text(value, i, f" {value:.2f}", va="center")
        axis.set(title=network, xlabel="mean distance", xlim=(0, 1.25 * max(values.values())))
        axis.locator_params(axis="x", nbins=4)
    panels[0].invert_yaxis()
    plt.show()


def scores(recipes: dict[str, list[dict]], kinds: dict[str, tuple[str, Callable]]) -> None:
    """One panel for each score, one point for each seed; the best recipe has squares.

    recipes: {name: [{key: score} of each seed]}. kinds: {key: (label, max or min)}.
    """
    _, panels = plt.subplots(1, len(kinds), figsize=(9, 3.5), sharey=True)
    names = [name.replace("features + ", "features\n+ ") for name in recipes]
    for axis, (key, (label, better)) in zip(panels, kinds.items()):
        values = {name: [run[key] for run in runs] for name, runs in recipes.items()}
        best = better(values, key=lambda name: sum(values[name]))
        for i, (name, of_seeds) in enumerate(values.items()):
            marker, color = ("s", RED) if name == best else ("o", BLUE)
            style = {"marker": marker, "color": color, "alpha": 0.8, "linestyle": "none"}
            axis.plot(of_seeds, [i] * len(of_seeds), **style)
        axis.set(xlabel=label, yticks=range(len(names)), yticklabels=names)
        axis.grid(True)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    panels[-1].set(xlim=(0, 1.1), xticks=(0, 0.5, 1))
    panels[-1].axvline(1, color=BLACK, linewidth=1, linestyle="--")
    plt.show()


def verdicts(images: dict[str, Tensor], logits: dict[str, Tensor], scenes: Sequence[int]) -> None:
    """Above the images, below the maps of their logits: orange looks real, purple restored.

    images {kind: (N, 3, H, W)}, logits {kind: (N, h, w)}. Of the kind "half", the left half is
    original and the right one restored; a dashed line is between them.
    """
    columns = [(kind, i) for i in scenes for kind in images]
    figure, grid = plt.subplots(2, len(columns), figsize=(min(9, 2.2 * len(columns) + 1), 4.3))
    for (kind, i), (above, below) in zip(columns, grid.T):
        _picture(above, images[kind][i])
        shown = below.imshow(logits[kind][i], cmap="PuOr_r", vmin=-5, vmax=5)
        below.set(xticks=[], yticks=[])
        below.spines[:].set(visible=True, color="#cccccc")
        title = kind
        if kind == "half":
            title = "original | restored"
            above.axvline(images[kind].shape[-1] / 2 - 0.5, color=BLACK, linestyle="--")
            below.axvline(logits[kind].shape[-1] / 2 - 0.5, color=BLACK, linestyle="--")
        above.set_title(title, fontsize=11, fontweight="normal", loc="center")
    bar = figure.colorbar(shown, ax=grid, ticks=(-4, -2, 0, 2, 4), shrink=0.8)
    bar.set_label("logit: restored ← → real")
    plt.show()


def adversarial_curves(
    at: Sequence[int], variants: dict[str, list[dict]], factor: float, fixed: float, starts: int
) -> None:
    """The absolute error of each variant, and `factor` times the adaptive weight, by step.

    variants: {name: [{"l1": [...], "weight": [...]} of each seed]}; their means are shown. The
    weight is `fixed` from step `starts` on in the variant that has none.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
    errors, weights = {}, {}
    for name, runs in variants.items():
        errors[name] = at, _mean([run["l1"] for run in runs])
        if all("weight" in run for run in runs):
            by_step = _mean([run["weight"] for run in runs])
            weights[name] = at, [factor * value for value in by_step]
    title = "absolute error"
    curves(errors, axis=left, x="step", y="mean of a number", title=title, ylim=(0, 1))
    left.get_legend().remove()
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    title = "weight of the adversarial term"
    curves(weights, axis=right, x="step", y="weight", title=title, yscale="log")
    right.hlines(fixed, starts, at[-1], color=GREEN, linestyle="-.")
    right.text(at[-1], 0.8 * fixed, f"fixed weight {fixed:,.0f}", color=GREEN, ha="right", va="top")
    right.get_legend().remove()
    figure.set_label(
        "Two panels over the steps. The absolute error falls to 0.2 where the weight is adaptive; "
        "with the fixed weight it jumps to above 0.8 after step 150. The adaptive weight falls "
        f"from between 100 and 400 to about 30; the fixed weight is {fixed:,.0f}."
    )
    plt.show()


def _mean(of_seeds: list[list[float | None]]) -> list[float]:
    """The mean of the seeds at each step; nan where there is nothing yet."""
    by_step = zip(*of_seeds)
    return [float("nan") if None in v else sum(v) / len(v) for v in by_step]


def histograms(values: dict[str, Tensor], span: tuple[float, float], x: str) -> None:
    """The distributions of a few quantities, over each other."""
    _, axis = plt.subplots(figsize=(9, 3))
    for (name, numbers), color in zip(values.items(), (SKY, ORANGE)):
        axis.hist(numbers, bins=60, range=span, color=color, alpha=0.75, label=name)
    axis.set(xlabel=x, ylabel="how many")
    axis.legend()
    plt.show()
