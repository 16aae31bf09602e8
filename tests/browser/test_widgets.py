"""Sliders, comparisons and questions on a static page, without a kernel and without a network.

Headless Chromium opens a notebook that nbconvert has exported. It needs `pip install playwright`
and a Chromium on the PATH (Debian, Ubuntu: apt install chromium); without them the tests are
skipped and say so.
"""

import os
import shutil
import subprocess
import sys

import nbformat
import pytest

from conftest import ROOT

sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]

SOURCE = """
import torch
import book

images = [torch.full((3, 8, 8), level) for level in (-1.0, 0.0, 1.0)]
display(book.slider(images, ["black", "grey", "white"], "level", seconds=0.2))
display(book.compare(images[0], images[2], ("left", "right")))
with book.predict("Does it rise?", ["It rises.", "It falls."], "It rises.", "See the line."):
    book.curves({"line": ([0, 1], [0, 1])}, x="x", y="y", title="A line")
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(SOURCE)])
    nbformat.write(notebook, folder / "page.ipynb")
    command = [sys.executable, "-m", "nbconvert", "--to", "html", "--execute", "page.ipynb"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "chapters")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "page.html"


@pytest.fixture(params=[True, False], ids=["scripts", "no-scripts"])
def scripts(request):
    return request.param


@pytest.fixture
def page(exported, scripts):
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        context = browser.new_context(offline=True, java_script_enabled=scripts)
        page = context.new_page()
        page.set_default_timeout(5000)
        page.goto(exported.as_uri(), wait_until="domcontentloaded")
        yield page
        browser.close()


def visible_frames(page):
    frames = page.locator(".book-frame").all()
    return [frame.inner_text().strip() for frame in frames if frame.is_visible()]


@pytest.mark.parametrize("scripts", [True], indirect=True)
def test_a_slider_moves_by_keys_by_mouse_and_by_itself(page):
    handle = page.locator(".book-slider input")
    assert visible_frames(page) == ["black"]
    handle.focus()
    page.keyboard.press("ArrowRight")
    assert visible_frames(page) == ["grey"]
    assert handle.get_attribute("aria-valuetext") == "grey"
    page.keyboard.press("End")
    assert visible_frames(page) == ["white"]
    box = handle.bounding_box()
    page.mouse.click(box["x"] + 2, box["y"] + box["height"] / 2)
    assert visible_frames(page) == ["black"]
    page.get_by_role("button", name="play").click()
    page.wait_for_function("document.querySelector('.book-slider input').value == 2")
    page.get_by_role("button", name="play").wait_for()
    assert visible_frames(page) == ["white"]


@pytest.mark.parametrize("scripts", [True], indirect=True)
def test_the_handle_of_a_comparison_uncovers_the_other_image(page):
    card = page.locator(".book-compare")
    before = card.screenshot()
    card.locator("input").focus()
    page.keyboard.press("Home")
    assert (
        card.locator(".book-cover").evaluate("e => e.style.clipPath") == "inset(0px 100% 0px 0px)"
    )
    assert card.screenshot() != before


@pytest.mark.parametrize("scripts", [True], indirect=True)
@pytest.mark.parametrize("by", ["mouse", "keyboard"])
def test_an_answer_unfolds_when_the_reader_has_chosen(page, by):
    card = page.locator(".book-predict")
    figure, verdict = card.locator("img"), card.get_by_role("status")
    card.locator("summary").click()
    assert not figure.is_visible() and "Choose first" in verdict.inner_text()
    choice = card.get_by_role("button", name="It falls.")
    if by == "mouse":
        choice.click()
    else:
        choice.focus()
        page.keyboard.press("Enter")
    assert figure.is_visible()
    assert verdict.inner_text() == "You expected: It falls. The answer is: It rises."
    assert card.get_by_role("button", name="It rises.").is_disabled()
    card.locator("summary").click()  # and now it can be folded
    assert not figure.is_visible()


@pytest.mark.parametrize("scripts", [False], indirect=True)
def test_without_scripts_there_is_a_still_image_and_answers_unfold_at_once(page):
    assert visible_frames(page) == ["black"]
    card = page.locator(".book-predict")
    assert not card.locator("img").is_visible()
    card.locator("summary").click()
    assert card.locator("img").is_visible()
