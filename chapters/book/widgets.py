"""What a reader moves and types into: a slider over finished images, and a studio that draws."""

from __future__ import annotations

from collections.abc import Sequence

import ipywidgets
import torch
from torch import Tensor

from ldm_minimal import LatentDiffusion

from .plotting import png


def slider(
    images: Sequence[Tensor], labels: Sequence[str], name: str, factor: int = 6
) -> ipywidgets.Widget:
    """Move through images made beforehand: a slider called `name`, then the image and its label.

    images: each (3, H, W) in [-1, 1], shown with every pixel `factor` x `factor`.
    """
    frames = [png(image, factor) for image in images]
    handle = ipywidgets.IntSlider(
        0, 0, len(frames) - 1, description=name, readout=False, layout={"width": "420px"}
    )
    shown = ipywidgets.Image(value=frames[0], format="png")
    label = ipywidgets.Label(labels[0])

    def move(change: dict) -> None:
        shown.value = frames[change["new"]]
        label.value = labels[change["new"]]

    handle.observe(move, "value")
    box = ipywidgets.VBox([ipywidgets.HBox([handle, label]), shown])
    box.add_class("widget-interact")
    return box


def studio(model: LatentDiffusion) -> ipywidgets.Widget:
    """A text box, guidance, steps and seed, and a button that draws."""
    prompt = ipywidgets.Text(
        "a small cyan heart below a large orange circle",
        description="prompt",
        layout={"width": "520px"},
    )
    guidance = ipywidgets.FloatSlider(5.0, min=0.0, max=12.0, step=0.5, description="guidance")
    steps = ipywidgets.IntSlider(50, min=1, max=100, description="steps")
    seed = ipywidgets.IntText(0, description="seed", layout={"width": "180px"})
    button = ipywidgets.Button(description="draw", button_style="primary")
    shown = ipywidgets.Image(format="png")
    message = ipywidgets.Label()

    def draw(_button: ipywidgets.Button | None = None) -> None:
        if not prompt.value.strip():
            message.value = "type a sentence first"
            return
        x = model.generate(
            [prompt.value],
            steps=steps.value,
            guidance=guidance.value,
            generator=torch.Generator().manual_seed(abs(seed.value)),
        )
        shown.value = png(x[0], 8)
        message.value = prompt.value

    button.on_click(draw)
    draw()
    settings = ipywidgets.HBox([guidance, steps])
    start = ipywidgets.HBox([seed, button])
    return ipywidgets.VBox([prompt, settings, start, shown, message])
