"""Run chapters and keep their outputs.

python chapters/execute.py 02 05       # these chapters and their solutions, from clean kernels
python chapters/execute.py --minutes   # the README's table of chapters, without its badges
"""

from __future__ import annotations

import argparse
import html
import json
import re
import time
from pathlib import Path

import nbformat
import torch
from nbclient import NotebookClient

from experiments.common import machine

HERE = Path(__file__).resolve().parent
FIGURE = '<img class="book-figure"'  # book.plotting.image_tag writes it


def execute(path: Path) -> None:
    """Run a notebook, and keep its outputs, without timestamps, and how long it took."""
    notebook = nbformat.read(path, as_version=4)
    started = time.time()
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        store_widget_state=False,
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute()
    seconds = round(time.time() - started)
    notebook.metadata.pop("widgets", None)
    notebook.metadata["measured"] = {
        "seconds": seconds,
        "machine": machine(),
        "torch": torch.__version__,
    }
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        has_figures = describe(cell)
        cell.metadata["slideshow"] = {"slide_type": slide_type(cell, has_figures)}
    nbformat.write(notebook, path)
    print(f"{path.relative_to(HERE)}: {seconds} s")


def describe(cell: nbformat.NotebookNode) -> bool:
    """Give the cell's figures the alternative texts in its metadata; are there figures at all?

    "alt" is a text, or a list with one for each figure. Without it, a figure keeps the text that
    `book` made of its titles.
    """
    texts = cell.metadata.get("alt", [])
    texts = iter([texts] if isinstance(texts, str) else texts)
    found = False
    for output in cell.get("outputs", []):
        page = output.get("data", {}).get("text/html", "")
        if FIGURE in page:
            found = True
            text = next(texts, None)
            if text is not None:
                before, _, rest = page.partition(f'{FIGURE} alt="')
                _, _, after = rest.partition('"')
                output.data["text/html"] = f'{before}{FIGURE} alt="{html.escape(text)}"{after}'
    return found


def slide_type(cell: nbformat.NotebookNode, has_figures: bool) -> str:
    """Headings begin slides, figures the slides below them."""
    if cell.cell_type == "markdown" and cell.source.startswith("#"):
        return "slide"
    return "subslide" if has_figures else "-"


def table_of_minutes() -> str:
    """Chapter, question, and the minutes that it and its solutions took when they were executed."""
    rows = ["| chapter | question | minutes | solutions |", "|---|---|---|---|"]
    for path in sorted(HERE.glob("[0-9][0-9]_*.ipynb")):
        chapter = json.loads(path.read_text(encoding="utf-8"))
        solutions = json.loads((HERE / "solutions" / path.name).read_text(encoding="utf-8"))
        first_cell = "".join(chapter["cells"][0]["source"])
        title, question = re.match(r"# (.*?)\n\n\*\*(.*?)\*\*", first_cell).groups()
        row = f"| [{title}](chapters/{path.name}) | {question} |"
        for notebook in (chapter, solutions):
            row += f" {notebook['metadata']['measured']['seconds'] / 60:.1f} |"
        rows.append(row)
    return "\n".join(rows)


def main() -> None:
    numbers = sorted(path.name[:2] for path in HERE.glob("[0-9][0-9]_*.ipynb"))
    parser = argparse.ArgumentParser(description="Run chapters and keep their outputs.")
    parser.add_argument("chapters", nargs="*", metavar="NN", help="such as 02")
    parser.add_argument("--minutes", action="store_true", help="print the table of minutes")
    options = parser.parse_args()
    if not options.chapters and not options.minutes:
        parser.error("name chapters, or --minutes")
    for number in options.chapters:
        if number not in numbers:
            parser.error(f"there is no chapter {number!r}; choose from {', '.join(numbers)}")
    for number in options.chapters:
        for path in [*HERE.glob(f"{number}_*.ipynb"), *HERE.glob(f"solutions/{number}_*.ipynb")]:
            execute(path)
    if options.minutes:
        print(table_of_minutes())


if __name__ == "__main__":
    main()
