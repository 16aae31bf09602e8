"""The form of the chapters, read from the notebooks as they are stored; nbval executes them (`make test`)."""

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
import book  # noqa: E402
import runs  # noqa: E402
from checks import CHECKS  # noqa: E402

CHAPTERS = sorted((ROOT / "chapters").glob("[0-9][0-9]_*.ipynb"))
SOLUTIONS = sorted((ROOT / "chapters" / "solutions").glob("[0-9][0-9]_*.ipynb"))
every_notebook = pytest.mark.parametrize("path", CHAPTERS + SOLUTIONS, ids=lambda path: f"{path.parent.name}-{path.stem}")
every_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)


def cells(path, kind=None):
    return [c | {"source": "".join(c["source"])} for c in json.loads(path.read_text(encoding="utf-8"))["cells"]
            if kind in (None, c["cell_type"])]


def printed(cell):
    return "".join("".join(o["text"]) for o in cell["outputs"] if o["output_type"] == "stream")


def figure(cell):
    return any("image/png" in o.get("data", {}) for o in cell.get("outputs", []))


def exercises(path):
    """The numbers of the checks that the notebook calls, in order."""
    return re.findall(r'^check\("([^"]+)"', "\n".join(c["source"] for c in cells(path, "code")), re.M)


@every_notebook
def test_outputs_are_those_of_one_clean_run(path):
    code = cells(path, "code")
    assert [c["execution_count"] for c in code] == list(range(1, len(code) + 1))
    for c in code:
        assert all(o["output_type"] != "error" for o in c["outputs"])
        assert not any(o.get("name") == "stderr" for o in c["outputs"]), f"a warning or a progress bar is stored: {c['source'][:60]}"
    assert path.stat().st_size <= 500_000


@every_notebook
def test_every_figure_is_described_in_words(path):
    page = cells(path)
    for cell, after in zip(page, [*page[1:], None]):
        if figure(cell):
            assert after and after["cell_type"] == "markdown" and after["source"].startswith("*In words:"), cell["source"][:80]


@every_notebook
def test_first_code_cell_finds_the_book(path):
    setups = {cells(p, "code")[0]["source"] for p in CHAPTERS + SOLUTIONS}
    assert len(setups) == 1, "the set-up cells differ"
    assert "ADDRESS" in setups.pop()


@every_chapter
def test_a_chapter_has_the_form_of_one(path):
    code, text = cells(path, "code"), "\n".join(c["source"] for c in cells(path, "markdown"))
    lengths = [len(c["source"].splitlines()) for c in code[1:]]
    assert max(lengths) <= 25 and statistics.median(lengths) <= 8, lengths
    number = path.stem[:2].lstrip("0") or "0"
    assert text.startswith(f"# {number} · ")
    for part in ("**Predict.**", "atch it break", "## Exercises", "## What you take away", "Check the book", "<details><summary>"):
        assert part in text, f"no {part!r}"
    titles = [match for c in code for match in re.findall(r'title="([^"]+)"', c["source"])]
    assert len(set(titles)) >= 4, "a figure's title states its finding"


@every_chapter
def test_exercises_are_checked_and_solved(path):
    solution = path.parent / "solutions" / path.name
    numbers = exercises(path)
    assert 3 <= len({re.match(r"\d+\.\d+", n)[0] for n in numbers}) <= 5
    assert exercises(solution) == numbers
    lines = "".join(map(printed, cells(path, "code")))
    assert re.findall(r"exercise (\S+): not attempted", lines) == numbers
    lines = "".join(map(printed, cells(solution, "code")))
    assert re.findall(r"exercise (\S+): correct", lines) == numbers


@every_notebook
def test_what_the_checks_say_is_compared_by_nbval(path):
    for c in cells(path, "code"):
        if re.search(r"^check\(", c["source"], re.M):
            assert "nbval-check-output" in c["metadata"].get("tags", []), c["source"][:60]


def test_every_result_has_its_recipe():
    assert not runs.check()
    for path in (ROOT / "chapters" / "runs").rglob("*.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        assert {"command", "seed", "machine", "torch", "minutes"} <= set(record)
        assert record["command"] == f"python chapters/runs.py {path.parent.name}"


def test_the_readme_has_the_minutes_that_were_measured():
    assert runs.minutes() in (ROOT / "README.md").read_text(encoding="utf-8"), "python chapters/runs.py --minutes prints the table"


def test_a_slider_moves_its_picture():
    box = book.slider(torch.rand(3, 3, 8, 8) * 2 - 1, ["a", "b", "c"], "step")
    handle, label = box.children[0].children
    seen = {box.children[1].value}
    for place in (1, 2):
        handle.value = place
        seen.add(box.children[1].value)
    assert len(seen) == 3 and label.value == "c"


def test_every_check_belongs_to_a_chapter():
    assert sorted(n for path in CHAPTERS for n in exercises(path)) == sorted(CHECKS)


@pytest.mark.slow
@pytest.mark.parametrize("source, complaint", [
    ("import os; os._exit(9)", "the kernel died in this cell"), ("raise ValueError('no such bird')", "no such bird"), ("import time; time.sleep(99)", "Timeout of 5"),
], ids=["dies", "breaks", "hangs"])
def test_a_chapter_that_breaks_fails_promptly_and_says_where(source, complaint, tmp_path):
    cell = {"cell_type": "code", "id": "one", "execution_count": None, "metadata": {}, "outputs": [], "source": source}
    (tmp_path / "bad.ipynb").write_text(json.dumps({"cells": [cell], "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3"}},
                                                    "nbformat": 4, "nbformat_minor": 5}))
    shutil.copy(ROOT / "chapters" / "conftest.py", tmp_path)
    started = time.monotonic()
    run = subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout", "5", "."],
                         cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.returncode == 1 and complaint in run.stdout and "bad.ipynb::Cell 0" in run.stdout, run.stdout[-2000:]
    assert time.monotonic() - started < 60
