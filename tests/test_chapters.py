"""The form of the chapters, read from the stored notebooks; and what `import book` gives them.

nbval executes the chapters (`make test`). Their exercises are tested in test_grading.py, their
experiments in test_experiments.py.
"""

import ast
import json
import re
import shutil
import statistics
import subprocess
import sys
import time

import pytest
import torch

from conftest import ROOT

sys.path.insert(0, str(ROOT / "chapters"))
import book

CHAPTERS = sorted((ROOT / "chapters").glob("[0-9][0-9]_*.ipynb"))
SOLUTIONS = sorted((ROOT / "chapters" / "solutions").glob("[0-9][0-9]_*.ipynb"))


def name(path):
    return f"{path.parent.name}-{path.stem}"


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


def has_figure(cell):
    return any("image/png" in output.get("data", {}) for output in cell.get("outputs", []))


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
    assert path.stat().st_size <= 500_000


@every_notebook
def test_every_figure_is_described_in_words(path):
    page = cells(path)
    for cell, after in zip(page, [*page[1:], None]):
        if has_figure(cell):
            start = cell["source"][:80]
            assert after and after["cell_type"] == "markdown", start
            assert after["source"].startswith("*In words:"), start


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
    text = "\n".join(cell["source"] for cell in cells(path, "markdown"))
    number = path.stem[:2].lstrip("0") or "0"
    assert text.startswith(f"# {number} · ")
    parts = ["**Predict.**", "atch it break", "## Exercises", "## What you take away"]
    parts += ["Check the book", "<details><summary>"]
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


def test_a_slider_moves_its_image():
    box = book.slider(torch.rand(3, 3, 8, 8) * 2 - 1, ["a", "b", "c"], "step")
    row, image = box.children
    handle, label = row.children
    seen = {image.value}
    for position in (1, 2):
        handle.value = position
        seen.add(image.value)
    assert len(seen) == 3 and label.value == "c"


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
