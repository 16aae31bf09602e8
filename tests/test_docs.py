"""The pages say what is true: links, badges, the address, the commands and the Python blocks."""

import functools
import importlib
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from ldm_minimal.__main__ import parser

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))
import set_address  # noqa: E402

README = ROOT / "README.md"
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        ROOT / "data" / "README.md",
        *(ROOT / "data" / "checkpoints").glob("*/README.md"),
    ]
)
CHAPTERS = sorted((ROOT / "chapters").glob("[0-9][0-9]_*.ipynb"))
COLAB = "https://colab.research.google.com/github/"
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@functools.cache
def read(path):
    return path.read_text(encoding="utf-8")


def address():
    return tomllib.loads(read(ROOT / "pyproject.toml"))["project"]["urls"]["Repository"]


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", read(page), re.M | re.S)


def code(text):
    """What the page shows as code: fenced blocks, and what stands in backticks."""
    fenced = re.findall(r"^```.*?\n(.*?)^```", text, re.M | re.S)
    inline = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    return [*fenced, *(part.replace("\n", " ") for part in inline)]


def command_lines(path):
    """The lines of code in a page, or all lines of a script, with continued lines joined."""
    text = read(path)
    parts = code(text) if path.suffix == ".md" else [text]
    return [line for part in parts for line in part.replace("\\\n", " ").splitlines()]


def anchors(page):
    """The anchors that GitHub gives to the headings of a page."""
    outside = re.sub(r"^```.*?^```", "", read(page), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.+)$", outside, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


# ---- links ----


@every_page
def test_relative_links_resolve(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", read(page)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), f"{page.name} links to {link}"
        if anchor:
            assert anchor in anchors(target), f"{page.name} links to {link}: no such heading"


@every_page
def test_files_named_in_code_exist(page):
    """A path with a folder of this repository in front, unless a command makes it."""
    made = ("data/shapes/32", "data/emoji/128", "chapters/11_", "chapters/experiments/chapter_11")
    made += ("chapters/results/11", "chapters/solutions/11_", "chapters/book/exercises/chapter_11")
    old = ("chapters/runs", "chapters/experiments/chapter_NN", "chapters/results/NN")
    folders = r"(?:ldm_minimal|chapters|data|tests|docs)"
    for part in code(read(page)):
        for name in re.findall(rf"(?<![\w./-])({folders}/[\w./-]+)", part):
            if not name.startswith(made + old):
                assert (ROOT / name.rstrip(".")).exists(), f"{page.name} names {name}"


# ---- the table of chapters ----


def rows():
    """{notebook's path: its row of the README's table}"""
    found = {}
    for line in read(README).splitlines():
        match = re.match(r"\| \[[^]]+\]\((chapters/\d\d_\w+\.ipynb)\)", line)
        if match:
            found[match[1]] = line
    return found


def test_table_lists_every_chapter_in_order():
    assert list(rows()) == [str(path.relative_to(ROOT)) for path in CHAPTERS]


def test_every_badge_opens_its_own_chapter():
    for path, row in rows().items():
        badges = re.findall(rf"\]\(({re.escape(COLAB)}[^)]+)\)", row)
        assert badges == [
            f"{COLAB}{address().removeprefix('https://github.com/')}/blob/main/{path}"
        ]


def test_minutes_are_those_that_the_notebooks_keep(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "chapters"))
    printed = importlib.import_module("execute").table_of_minutes()
    lines = read(README).splitlines()
    for row in printed.strip().splitlines():
        assert any(line.startswith(row) for line in lines), f"execute.py --minutes prints {row}"


# ---- the address ----


def addresses(root):
    """(where, address) of every place that should be the address of this repository."""
    citation = yaml.safe_load((root / "CITATION.cff").read_text(encoding="utf-8"))
    yield "CITATION.cff", citation["repository-code"]
    for path in set_address.files(root):
        text = path.read_text(encoding="utf-8")
        where = str(path.relative_to(root))
        for name in re.findall(rf"{re.escape(COLAB)}([\w.-]+/[\w.-]+)/", text):
            yield where, f"https://github.com/{name}"
        for url in re.findall(r"git clone [^\n]*?(https://github\.com/[\w./-]+)", text):
            yield where, url
        for url in re.findall(r'ADDRESS = \\?"(https://[^"\\]+)', text):
            yield where, url


def test_address_is_the_same_everywhere():
    found = list(addresses(ROOT))
    assert {url for _, url in found} == {address()}, found
    notebooks = {where for where, _ in found if where.endswith(".ipynb")}
    assert notebooks >= {str(path.relative_to(ROOT)) for path in CHAPTERS}


def test_one_command_rewrites_the_address_everywhere(tmp_path):
    before = {}
    for path in set_address.files(ROOT):
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
        before[copy] = copy.read_bytes()
    new = "https://github.com/someone/a.fork-2"
    command = [sys.executable, str(tmp_path / "docs" / "set_address.py")]
    (tmp_path / "docs" / "set_address.py").write_text(read(ROOT / "docs" / "set_address.py"))

    subprocess.run([*command, new + "/"], check=True, capture_output=True)
    assert {url for _, url in addresses(tmp_path)} == {new}
    old = address().removeprefix("https://")
    for copy in before:
        assert old not in copy.read_text(encoding="utf-8"), copy

    subprocess.run([*command, address()], check=True, capture_output=True)
    assert {copy: copy.read_bytes() for copy in before} == before


@pytest.mark.parametrize("wrong", ["http://github.com/a/b", "github.com/a/b", "https://x.org/a/b"])
def test_a_wrong_address_is_refused(wrong, tmp_path):
    with pytest.raises(ValueError, match="is needed"):
        set_address.rewrite(tmp_path, wrong)


def test_an_address_that_begins_like_ours_is_left_alone(tmp_path):
    (tmp_path / "pyproject.toml").write_text(
        '[project.urls]\nRepository = "https://github.com/me/ldm"\n[project]\nname = "x"\n'
    )
    (tmp_path / "page.md").write_text("https://github.com/me/ldm-more https://github.com/me/ldm.")
    set_address.rewrite(tmp_path, "https://github.com/you/yours")
    text = (tmp_path / "page.md").read_text()
    assert text == "https://github.com/me/ldm-more https://github.com/you/yours."


# ---- the commands ----


SOURCES = [*PAGES, ROOT / "Makefile", ROOT / ".ci" / "run"]
every_source = pytest.mark.parametrize(
    "source", SOURCES, ids=lambda path: str(path.relative_to(ROOT))
)


@every_source
def test_command_lines_are_understood_by_the_command_line(source):
    for line in command_lines(source):
        match = re.search(
            r"(?:-m ldm_minimal|ldm-minimal) ((?:train|sample|evaluate|info)\b.*)", line
        )
        if match:
            arguments = match[1].replace("$(ARGS)", "")
            parser().parse_args(shlex.split(arguments, comments=True))


@every_source
def test_scripts_have_the_options_that_are_named(source):
    for line in command_lines(source):
        match = re.search(r"\bpython3? ((?:tests|chapters|data|docs)/[\w/]+\.py)(.*)", line)
        if match and "_NN" not in match[1] and "_11" not in match[1]:
            script = ROOT / match[1]
            assert script.is_file(), f"{source.name} runs {match[1]}"
            for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", match[2].split("#")[0]):
                assert f'"{option}"' in read(script), f"{match[1]} has no {option}"


@every_source
def test_make_targets_exist(source):
    targets = set(re.findall(r"^([a-z]+):", read(ROOT / "Makefile"), re.M))
    for line in command_lines(source):
        for target in re.findall(r"(?<![\w-])make ([a-z]+)", line.split("#")[0]):
            if source.name != "Makefile":
                assert target in targets, f"{source.name} names make {target}"


def test_ci_runs_what_a_reader_types():
    script = read(ROOT / ".ci" / "run")
    assert re.search(r"^part \w+ make test$", script, re.M)
    assert "set -euo pipefail" in script
    if sys.platform != "win32":
        assert (ROOT / ".ci" / "run").stat().st_mode & 0o111, ".ci/run is not executable"


# ---- the Python blocks ----


@pytest.fixture
def reader(tmp_path):
    """A folder like a reader's: the shipped model, and a data set that `make train` drew."""
    (tmp_path / "data" / "shapes").mkdir(parents=True)
    (tmp_path / "data" / "checkpoints").symlink_to(ROOT / "data" / "checkpoints")
    prepare = [sys.executable, str(ROOT / "data" / "shapes" / "prepare.py"), "--count", "100"]
    subprocess.run([*prepare, "--out", "data/shapes/32"], cwd=tmp_path, check=True)
    return tmp_path


@pytest.mark.slow
def test_readme_python_runs(reader):
    draw, train = blocks(README, "python")
    for block in (draw, train):
        subprocess.run(
            [sys.executable, "-W", "error::UserWarning", "-c", block], cwd=reader, check=True
        )
    assert (reader / "out.png").stat().st_size > 0
    assert (reader / "runs" / "quick" / "model.safetensors").is_file()


def test_readme_python_is_formatted(tmp_path):
    for i, block in enumerate(blocks(README, "python")):
        (tmp_path / f"block_{i}.py").write_text(block)
    ruff = [sys.executable, "-m", "ruff"]
    settings = ["--config", str(ROOT / "pyproject.toml"), "--no-cache", str(tmp_path)]
    subprocess.run([*ruff, "check", "--ignore", "D", *settings], check=True)
    subprocess.run([*ruff, "format", "--check", *settings], check=True)
