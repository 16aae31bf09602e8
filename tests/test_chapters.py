"""The form of the chapters, read from the stored notebooks; and what `import book` gives them.

nbval executes the chapters (`make test`). Their exercises are tested in test_grading.py, their
experiments in test_experiments.py.
"""

import ast
import base64
import html
import io
import json
import re
import shutil
import statistics
import subprocess
import sys
import time
from xml.etree import ElementTree

import matplotlib.pyplot as plt
import pytest
import torch
from PIL import Image

from conftest import ROOT

sys.path.insert(0, str(ROOT / "chapters"))
import book

CHAPTERS = sorted((ROOT / "chapters").glob("[0-9][0-9]_*.ipynb"))
SOLUTIONS = sorted((ROOT / "chapters" / "solutions").glob("[0-9][0-9]_*.ipynb"))


def name(path):
    return f"{path.parent.name}-{path.stem}"


# Chapters whose figures were made by the second edition's style; the others follow.
SECOND_EDITION = ("0", "1", "2", "3", "4")

every_notebook = pytest.mark.parametrize("path", CHAPTERS + SOLUTIONS, ids=name)
every_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=name)


def cells(path, kind=None):
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    for cell in found:
        cell["source"] = "".join(cell["source"])
    return [cell for cell in found if kind in (None, cell["cell_type"])]


def printed(path):
    """All that the code cells of a notebook printed."""
    outputs = [output for cell in cells(path, "code") for output in cell["outputs"]]
    return "".join("".join(o["text"]) for o in outputs if o["output_type"] == "stream")


def pages(cell):
    """The HTML that a cell showed."""
    shown = [output.get("data", {}).get("text/html", "") for output in cell.get("outputs", [])]
    return ["".join(page) for page in shown]


def figures(cell):
    """(alternative text, CSS pixels, pixels or None for vectors) of each figure of a cell.

    The frames of a slider, enlarged pixels, are left out; they have its label.
    """
    tag = r'<img class="book-figure" alt="([^"]*)" width="(\d+)" style="([^"]*)" '
    tag += r'src="data:image/(png|webp|svg\+xml);base64,([^"]+)"'
    for page in pages(cell):
        for alt, width, style, kind, data in re.findall(tag, page):
            if "pixelated" not in style:
                content = io.BytesIO(base64.b64decode(data))
                pixels = None if kind == "svg+xml" else Image.open(content).width
                yield html.unescape(alt), int(width), pixels


def exercises(path):
    """The numbers of the checks that the notebook calls, in order."""
    source = "\n".join(cell["source"] for cell in cells(path, "code"))
    return re.findall(r'^check\("([^"]+)"', source, re.MULTILINE)


def statements(source):
    return sum(isinstance(node, ast.stmt) for node in ast.walk(ast.parse(source)))


# ---- notebooks ---------------------------------------------------------------------------------


@every_notebook
def test_outputs_are_those_of_one_clean_run(path):
    code = cells(path, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        start = cell["source"][:60]
        for output in cell["outputs"]:
            assert output["output_type"] != "error", start
            # A warning, or a progress bar.
            assert output.get("name") != "stderr", start
    assert path.stat().st_size <= 1_500_000


@every_notebook
def test_every_figure_has_an_alternative_text_and_fits_the_page(path):
    for cell in cells(path, "code"):
        start = cell["source"][:80]
        for output in cell["outputs"]:
            assert "image/png" not in output.get("data", {}), start  # it has no alternative text
        found = list(figures(cell))
        for alt, width, _ in found:
            assert len(alt) >= 20, start
            assert str(int(path.stem[:2])) not in SECOND_EDITION or width <= 864, start
        described = cell["metadata"].get("alt", [])
        described = [described] if isinstance(described, str) else described
        assert [alt for alt, _, _ in found][: len(described)] == described, start


@pytest.mark.parametrize(
    "path",
    [path for path in CHAPTERS + SOLUTIONS if str(int(path.stem[:2])) in SECOND_EDITION],
    ids=name,
)
def test_every_figure_is_sharp(path):
    for cell in cells(path, "code"):
        for _, width, pixels in figures(cell):
            assert pixels is None or pixels >= 160 / 96 * width, cell["source"][:80]


def test_every_first_code_cell_is_the_one_that_finds_the_book():
    setups = {cells(path, "code")[0]["source"] for path in CHAPTERS + SOLUTIONS}
    assert len(setups) == 1, "the set-up cells differ"
    assert "ADDRESS" in setups.pop()


@pytest.mark.parametrize("place", [".", "chapters", "chapters/solutions", "elsewhere/deep"])
def test_the_set_up_cell_finds_the_book_from_any_folder_of_a_clone(place, tmp_path):
    (tmp_path / "chapters" / "book").mkdir(parents=True)
    (tmp_path / "chapters" / "book" / "__init__.py").write_text("found = True\n")
    here = tmp_path / place
    here.mkdir(parents=True, exist_ok=True)
    script = here / "set_up.py"
    script.write_text(cells(CHAPTERS[0], "code")[0]["source"] + "\nimport book; print(book.found)")
    run = subprocess.run(
        [sys.executable, script.name], cwd=here, capture_output=True, text=True, timeout=60
    )
    assert run.stdout == "True\n", run.stderr


BESIDE_A_GPU = """
import torch
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
{}
from accelerate import Accelerator
print(Accelerator().device)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("first", "device"), [("import book", "cpu"), ("", "cuda")])
def test_chapters_train_on_the_cpu_beside_a_gpu(first, device, monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    command = [sys.executable, "-c", BESIDE_A_GPU.format(first)]
    run = subprocess.run(
        command, cwd=ROOT / "chapters", capture_output=True, text=True, timeout=120
    )
    assert run.stdout == f"{device}\n", run.stderr


@every_chapter
def test_a_chapter_has_the_form_of_one(path):
    text = "\n".join(cell["source"] for cell in cells(path))
    number = str(int(path.stem[:2]))
    assert text.startswith(f"# {number} · ")
    parts = ["atch it break", "## Exercises", "## What you take away", "Check the book"]
    parts += ["<details><summary>"]
    if number in SECOND_EDITION:
        parts += [
            "with predict(",
            "book.diagrams.pipeline(",
            "**Your turn.**",
            "<summary>One answer",
        ]
        parts += ["(warm-up)", "(core)", "(challenge"]
    else:
        parts += ["**Predict.**"]
    for part in parts:
        assert part in text, f"no {part!r}"


@every_chapter
def test_code_cells_are_short(path):
    _, *code = cells(path, "code")
    counts = [statements(cell["source"]) for cell in code]
    assert max(counts) <= 25 and statistics.median(counts) <= 8, counts


@every_chapter
def test_exercises_are_open_in_the_chapter_and_solved_in_its_solutions(path):
    solution = path.parent / "solutions" / path.name
    numbers = exercises(path)
    assert 3 <= len({re.match(r"\d+\.\d+", number)[0] for number in numbers}) <= 5
    assert exercises(solution) == numbers
    assert re.findall(r"exercise (\S+): not attempted", printed(path)) == numbers
    assert re.findall(r"exercise (\S+): correct", printed(solution)) == numbers


@every_notebook
def test_what_the_checks_say_is_compared_by_nbval(path):
    for cell in cells(path, "code"):
        if re.search(r"^check\(", cell["source"], re.MULTILINE):
            tags = cell["metadata"].get("tags", [])
            assert "nbval-check-output" in tags, cell["source"][:60]


# ---- import book -------------------------------------------------------------------------------


def test_a_slider_has_a_frame_and_a_label_for_each_image():
    images = torch.rand(3, 3, 8, 8) * 2 - 1
    page = book.slider(images, ["a", "b < c", "d"], "step", seconds=2).data
    frames = re.findall(r'class="book-frame" style="(.*?)"><div>(.*?)</div>.*?base64,(.*?)"', page)
    assert [style for style, _, _ in frames] == ["", "display: none", "display: none"]
    assert [html.unescape(label) for _, label, _ in frames] == ["a", "b < c", "d"]
    shown = [base64.b64decode(data) for _, _, data in frames]
    assert shown == [book.png(image, 1) for image in images]
    assert 'max="2"' in page and ">play</button>" in page
    assert "play</button>" not in book.slider(images, ["a", "b", "c"], "step").data
    page = book.slider(images, ["a", "b", "c"], "step", start=1).data
    styles = re.findall('class="book-frame" style="([^"]*)"', page)
    assert styles == ["display: none", "", "display: none"]
    assert 'value="1"' in page
    with pytest.raises(ValueError, match="start is 3; allowed are 0 to 2"):
        book.slider(images, ["a", "b", "c"], "step", start=3)
    with pytest.raises(ValueError, match="3 images and 2 labels"):
        book.slider(images, ["a", "b"], "step")


def test_a_row_shows_images_as_a_frame_of_a_slider_does():
    images = tuple(torch.rand(3, 3, 8, 8) * 2 - 1)
    page = book.row(images, "a < b", factor=4).data
    frame = book.slider([images], ["a < b"], "step", factor=4).data
    tags = r'<img [^>]*?width="(\d+)" style="(.*?)" src="(.*?)"'
    assert len(re.findall(tags, page)) == 3
    assert re.findall(tags, page) == re.findall(tags, frame)
    assert "<div>a &lt; b</div>" in page


def test_what_settles_a_prediction_is_folded(capsys, monkeypatch):
    shown = []
    monkeypatch.setattr(book.widgets, "display", shown.append)
    with book.predict("Which?", ["this", "that"], "that", "It had to be."):
        print("settled")
    (page,) = shown
    before, folded = page.data.split("<details>")
    assert "Which?" in before and "settled" not in before and "It had to be." not in before
    assert "settled" in folded and "It had to be." in folded
    assert re.findall(r'data-verdict="([^"]*)"', before) == [
        "You expected: this. The answer is: that.",
        "Right.",
    ]
    assert capsys.readouterr().out == ""
    with (
        pytest.raises(ValueError, match="answer is 'those'; allowed is one of the choices"),
        book.predict("Which?", ["this", "that"], "those"),
    ):
        pass


PARTS = "autoencoder cross_attention ddim_step guidance pixel_unet reparameterisation "
PARTS += "residual_block unet"


@pytest.mark.parametrize("part", PARTS.split())
def test_a_diagram_is_well_formed_and_described(part, monkeypatch):
    drawn = drawn_by(getattr(book.diagrams, part), monkeypatch)
    assert len(drawn) == 1


def test_the_map_lights_the_part_of_each_chapter(monkeypatch):
    def draw_all():
        for chapter in range(11):
            book.diagrams.pipeline(chapter)

    drawn = drawn_by(draw_all, monkeypatch)
    faint = [len(drawing.findall(".//*[@opacity]")) for drawing in drawn]
    assert faint[0] == faint[8] == 0  # the whole of it
    assert all(count > 10 for chapter, count in enumerate(faint) if chapter not in (0, 8, 10))
    number = "".join(drawn[4].find(".//*[@class='number']").itertext())
    assert number == "3"  # the first badge, faint in chapter 4
    written = ["".join(drawing.itertext()) for drawing in drawn]
    assert [number for number, text in enumerate(written) if "DDPM step" in text] == [2]
    assert [number for number, text in enumerate(written) if "1,000 steps" in text] == [2]


def drawn_by(function, monkeypatch):
    """The drawings that a function displays, as XML; each has an alternative text."""
    shown = []
    monkeypatch.setattr(book.drawing, "display", shown.append)
    function()
    for page in shown:
        assert len(re.search(' alt="([^"]*)"', page.data)[1]) > 100
        assert 'width="864"' in page.data
    data = [re.search(r"svg\+xml;base64,([^\"]*)", page.data)[1] for page in shown]
    return [ElementTree.fromstring(base64.b64decode(svg)) for svg in data]


def test_marks_of_a_drawing_are_lower_and_higher():
    drawing = book.drawing.Drawing(10, 10)
    drawing.words(0, 0, "z_t < x^{10}")
    text = ElementTree.fromstring(drawing.svg()).find(".//{*}text")
    assert "".join(text.itertext()).replace("\u200b", "") == "zt < x10"
    assert [part.get("dy") for part in text] == ["4", "-4", "-6", "6"]


def test_a_latent_is_four_tiles_with_zero_white():
    z = torch.zeros(4, 2, 3)
    z[1, 0, 0] = 3.0  # top right
    z[2, 1, 2] = -9.0  # bottom left
    image = book.diagrams.latent_image(z)
    assert image.shape == (3, 5, 7) and image.abs().max() <= 1
    assert (image[:, 2] == image[0, 2, 0]).all()  # the gap
    assert (image[:, 0, 0] == 1).all()
    red, _, blue = image[:, 0, 4].tolist()
    assert red > blue
    red, _, blue = image[:, 4, 2].tolist()
    assert blue > red


def test_a_changed_number_is_framed_at_its_place():
    x = torch.zeros(3, 32, 32)
    figure = book.restoring.one_number(torch.zeros(4, 8, 8), (2, 1, 5), x, x, 3.0)
    (frame,) = figure.axes[0].patches
    assert (frame.get_x(), frame.get_y()) == (4.5, 9.5)  # of tiles of 8 x 8, the lower left one
    assert figure.axes[2].get_title("left") == "restored,\n+3 added"
    plt.close(figure)


def test_a_figure_is_described_by_its_label_or_by_what_is_written_in_it():
    figure, axis = plt.subplots()
    axis.plot([1, 2], label="a line")
    axis.set(title="$A$ title", xlabel="step", ylabel="loss")
    page = book.plotting.html_of_figure(figure)
    assert 'alt="A title. loss against step. a line"' in page
    figure.set_label("a < b")
    assert 'alt="a &lt; b"' in book.plotting.html_of_figure(figure)
    plt.close(figure)


def test_only_rows_with_captions_take_room_for_them(monkeypatch):
    monkeypatch.setattr(plt, "show", lambda: None)
    heights = []
    for captions in ([], ["", "", "below", "below"], ["below"] * 4):
        book.show(torch.zeros(4, 3, 8, 8), captions, columns=2)
        heights.append(plt.gcf().get_figheight())
        plt.close()
    without, last_row, both_rows = heights
    assert last_row - without == pytest.approx(0.19)
    assert both_rows - without == pytest.approx(2 * 0.19)


def test_a_studio_draws_what_is_typed_and_asks_for_a_sentence():
    class Model:
        prompts = []

        def generate(self, prompts, **options):
            self.prompts += prompts
            return torch.zeros(len(prompts), 3, 8, 8)

    model = Model()
    prompt, _, start, image, message = book.studio(model).children
    _, button = start.children
    prompt.value = "a red circle"
    button.click()
    assert model.prompts[-1] == message.value == "a red circle"
    assert image.value == book.png(torch.zeros(3, 8, 8), 8)
    prompt.value = "  "
    button.click()
    assert model.prompts[-1] == "a red circle" and message.value == "type a sentence first"


def test_a_studio_on_a_static_page_shows_its_first_drawing():
    class Model:
        def generate(self, prompts, **options):
            return torch.zeros(len(prompts), 3, 8, 8)

    studio = book.studio(Model())
    page = studio._repr_mimebundle_()["text/html"]
    assert base64.b64encode(book.png(torch.zeros(3, 8, 8), 8)).decode() in page
    assert studio.children[0].value in page


def test_a_result_has_its_numbers_and_its_images():
    found = book.result("02/pixels")
    assert found["steps"] == 1200
    assert found["pictures"].shape == (16, 3, 32, 32)
    assert found["pictures"].min() >= -1 and found["pictures"].max() <= 1


def test_a_missing_result_names_the_command_that_makes_it():
    with pytest.raises(FileNotFoundError, match=r"python chapters/experiments/chapter_02\.py"):
        book.result("02/nothing")


def test_everything_that_the_chapters_take_from_the_book_is_exported():
    for path in CHAPTERS + SOLUTIONS:
        for cell in cells(path, "code"):
            for attribute in re.findall(r"\bbook\.(\w+)", cell["source"]):
                assert attribute in book.__all__, f"{name(path)} takes book.{attribute}"


# ---- what nbval says of a chapter that breaks --------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "source, complaint",
    [
        ("import os; os._exit(9)", "the kernel died in this cell"),
        ("raise ValueError('no such bird')", "no such bird"),
        ("import time; time.sleep(99)", "Timeout of 5"),
    ],
    ids=["dies", "breaks", "hangs"],
)
def test_a_chapter_that_breaks_fails_promptly_and_says_where(source, complaint, tmp_path):
    cell = {
        "cell_type": "code",
        "id": "one",
        "execution_count": None,
        "metadata": {},
        "outputs": [],
        "source": source,
    }
    kernel = {"name": "python3", "display_name": "Python 3"}
    notebook = {
        "cells": [cell],
        "metadata": {"kernelspec": kernel},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    (tmp_path / "bad.ipynb").write_text(json.dumps(notebook))
    shutil.copy(ROOT / "chapters" / "conftest.py", tmp_path)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--nbval-lax"]
    command += ["--nbval-current-env", "--nbval-cell-timeout", "5", "."]
    started = time.monotonic()
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.returncode == 1, run.stdout[-2000:]
    assert complaint in run.stdout and "bad.ipynb::Cell 0" in run.stdout, run.stdout[-2000:]
    assert time.monotonic() - started < 60
