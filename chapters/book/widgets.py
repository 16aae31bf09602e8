"""What a reader moves, answers and types into.

Sliders, comparisons and questions are plain HTML whose controls carry their own line of script. So
they work without a kernel: in JupyterLab, on Colab, in the stored notebook and on a static page.
Where scripts are off, a slider shows its first frame, and an answer can be unfolded at once. Only
the studio, where the model draws, needs the kernel.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import ipywidgets
import matplotlib.pyplot as plt
import torch
from IPython.display import HTML, display
from IPython.utils.capture import capture_output
from torch import Tensor

from ldm_minimal import LatentDiffusion

from .plotting import CSS_DPI, described, image_tag, png, webp_of_figure

BUTTON = (
    "font: inherit; color: inherit; background: transparent; cursor: pointer; text-align: left; "
    "border: 1px solid currentColor; border-radius: 6px; padding: 0.35em 0.8em; margin: 0.2em"
)
DRAWING_PIXELS = 256  # the studio's image, in CSS pixels
CARD = "border-left: 4px solid #0072B2; padding: 0.3em 1em; margin: 0.5em 0; max-width: 54em"

# The controls' scripts. `this` is the control; each looks only inside its own widget.
SLIDE = """
const frames = this.closest('.book-slider').querySelectorAll('.book-frame');
frames.forEach((frame, i) => frame.style.display = i == this.value ? '' : 'none');
this.setAttribute('aria-valuetext', frames[this.value].textContent.trim());
"""
PLAY = """
const handle = this.closest('.book-slider').querySelector('input');
const step = () => {
    if (!handle.isConnected || handle.value == handle.max) return stop();
    handle.stepUp();
    handle.oninput();
};
const stop = () => { clearInterval(this.timer); this.timer = null; this.textContent = 'play'; };
if (this.timer) return stop();
if (handle.value == handle.max) { handle.value = 0; handle.oninput(); }
this.textContent = 'stop';
this.timer = setInterval(step, 1000 * this.dataset.seconds / handle.max);
"""
UNCOVER = """
const cover = this.closest('.book-compare').querySelector('.book-cover');
cover.style.clipPath = `inset(0 ${100 - this.value}% 0 0)`;
"""
COMMIT = """
const card = this.closest('.book-predict');
card.querySelectorAll('button').forEach(button => button.disabled = true);
this.style.outline = '2px solid currentColor';
this.setAttribute('aria-pressed', 'true');
card.querySelector('.book-verdict').textContent = this.dataset.verdict;
card.querySelector('details').open = true;
card.dataset.chosen = 'yes';
"""
CHOOSE_FIRST = """
const card = this.closest('.book-predict');
if (card.dataset.chosen) return;
event.preventDefault();
card.querySelector('.book-verdict').textContent = 'Choose first: what do you expect?';
"""


def _script(code: str) -> str:
    """The code as the value of an HTML attribute."""
    return html.escape(" ".join(code.split()))


def _image(image: Tensor | tuple | plt.Figure, alt: str, factor: int) -> str:
    """An HTML image of (3, H, W) in [-1, 1], each pixel `factor` wide, or of a finished figure.

    Several images are shown side by side, as high as the last.
    """
    if isinstance(image, plt.Figure):
        plt.close(image)
        alt = f"{alt}. {described(image)}"
        return image_tag(webp_of_figure(image), alt, image.get_figwidth() * CSS_DPI, "webp")
    images = image if isinstance(image, tuple) else (image,)
    height = images[-1].shape[-2] * factor
    tags = []
    for x in images:
        width = height * x.shape[-1] / x.shape[-2]
        style = "image-rendering: pixelated; margin-right: 8px; "
        style += "outline: 1px solid #cccccc; outline-offset: -1px;"  # where a white image ends
        tags.append(image_tag(png(x, 1), alt if x is images[-1] else "", width, style=style))
    return "".join(tags)


# ---- without a kernel --------------------------------------------------------------------------


def slider(
    images: Sequence[Tensor | tuple[Tensor, ...] | plt.Figure],
    labels: Sequence[str],
    name: str,
    factor: int = 6,
    *,
    seconds: float | None = None,
    start: int = 0,
) -> HTML:
    """Move through images made beforehand: a slider called `name`, then the image and its label.

    images: each (3, H, W) in [-1, 1], shown with every pixel `factor` x `factor`; or several of
    them, side by side; or a figure.
    seconds: how long the film of all of them takes; then there is a button that plays it.
    start: the image that is shown first, and the only one where scripts are off.
    """
    if len(images) != len(labels):
        raise ValueError(f"there are {len(images)} images and {len(labels)} labels: one for each")
    if not 0 <= start < len(images):
        raise ValueError(f"start is {start}; allowed are 0 to {len(images) - 1}")
    frames = ""
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        hidden = "" if i == start else "display: none"
        picture = _image(image, f"{name}: {label}", factor)
        frames += f'<div class="book-frame" style="{hidden}">'
        frames += f"<div>{html.escape(label)}</div>{picture}</div>"
    button = ""
    if seconds is not None:
        button = (
            f'<button type="button" style="{BUTTON}" data-seconds="{seconds:g}" '
            f'onclick="{_script(PLAY)}">play</button>'
        )
    return HTML(
        f'<div class="book-slider"><label>{html.escape(name)} <input type="range" min="0" '
        f'max="{len(images) - 1}" value="{start}" autocomplete="off" '
        f'style="width: min(420px, 60%); vertical-align: middle" '
        f'oninput="{_script(SLIDE)}"></label>{button}{frames}</div>'
    )


def row(images: Sequence[Tensor], label: str, factor: int = 6) -> HTML:
    """Images side by side under their label, as large and as far apart as in a slider's frame."""
    pictures = _image(tuple(images), label, factor)
    return HTML(f"<div><div>{html.escape(label)}</div><div>{pictures}</div></div>")


def compare(
    left: Tensor | plt.Figure,
    right: Tensor | plt.Figure,
    names: tuple[str, str],
    factor: int = 6,
) -> HTML:
    """Drag to compare two images of one size: `left` is to the left of the handle."""
    first, second = (html.escape(name) for name in names)
    below = _image(right, names[1], factor)
    above = _image(left, names[0], factor)
    return HTML(
        '<div class="book-compare" style="display: inline-block; max-width: 100%">'
        f'<div style="display: flex; justify-content: space-between"><span>{first}</span>'
        f"<span>{second}</span></div>"
        f'<div style="position: relative; line-height: 0">{below}<div class="book-cover" style="'
        f'position: absolute; inset: 0; clip-path: inset(0 50% 0 0)">{above}</div></div>'
        f'<input type="range" min="0" max="100" value="50" autocomplete="off" '
        f'aria-label="{first}, up to here; then {second}" style="width: 100%; margin: 0.4em 0" '
        f'oninput="{_script(UNCOVER)}"></div>'
    )


@contextmanager
def predict(
    question: str, choices: Sequence[str], answer: str, because: str = ""
) -> Iterator[None]:
    """A question to which the reader commits; what the block shows is folded until then.

        with predict("What happens to the loss?", ["It falls.", "It rises."], "It falls."):
            curves(...)

    answer: one of the choices. because: a sentence or two above what the block shows.
    """
    if answer not in choices:
        raise ValueError(f"answer is {answer!r}; allowed is one of the choices {list(choices)}")
    with capture_output() as shown:
        yield
    folded = f"<p><b>{answer}</b> {because}</p>"
    for output in shown.outputs:
        folded += (
            output.data.get("text/html") or f"<pre>{html.escape(output.data['text/plain'])}</pre>"
        )
    if shown.stdout:
        folded += f"<pre>{html.escape(shown.stdout)}</pre>"
    buttons = ""
    for choice in choices:
        verdict = "Right."
        if choice != answer:
            expected, found = choice.rstrip("."), answer.rstrip(".")
            verdict = f"You expected: {expected}. The answer is: {found}."
        buttons += (
            f'<button type="button" style="{BUTTON}" data-verdict="{html.escape(verdict)}" '
            f'onclick="{_script(COMMIT)}">{choice}</button>'
        )
    display(
        HTML(
            f'<div class="book-predict" style="{CARD}"><p><b>Predict.</b> {question}</p>'
            f'<div role="group" aria-label="your prediction">{buttons}</div>'
            '<p class="book-verdict" role="status" style="min-height: 1.5em"></p>'
            f'<details><summary onclick="{_script(CHOOSE_FIRST)}">The answer</summary>{folded}'
            "</details></div>"
        )
    )


# ---- with a kernel -----------------------------------------------------------------------------


class Studio(ipywidgets.VBox):
    """A box that shows its first drawing where no kernel runs, such as on a static page."""

    def _repr_mimebundle_(self, **options: object) -> dict[str, object]:
        bundle = super()._repr_mimebundle_(**options)
        drawing, message = self.children[-2:]
        alt = f"The model's drawing of: {message.value}"
        style = "image-rendering: pixelated; border: 1px solid #cccccc;"
        tag = image_tag(drawing.value, alt, DRAWING_PIXELS, style=style)
        caption = f"{html.escape(message.value)}. In a running notebook, type your own prompt here."
        bundle["text/html"] = f"<figure>{tag}<figcaption>{caption}</figcaption></figure>"
        return bundle


def studio(model: LatentDiffusion) -> Studio:
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
    # Without a width, the box would stretch it over the whole page.
    shown = ipywidgets.Image(format="png", layout={"width": f"{DRAWING_PIXELS}px"})
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
    return Studio([prompt, settings, start, shown, message])
