"""Do the results that the chapters read still come out of the experiments?

    python chapters/experiments/check.py       # a few minutes
    python chapters/experiments/check.py 07    # only chapter 7's

First: every result that a chapter reads has its experiment, every experiment its result and every
chapter a cheap beginning. Then each beginning is made again, and must agree to 5 %, because another
machine rounds otherwise.
"""

import argparse
import importlib
import json
import re
import sys
from pathlib import Path

import torch

import common

HERE = Path(__file__).resolve().parent
LARGEST = 300_000  # bytes of a result's file
FIELDS = {"command", "seed", "machine", "torch", "minutes"}

for script in sorted(HERE.glob("chapter_*.py")):
    importlib.import_module(script.stem)  # registers its experiments


def read_by_chapters() -> set[str]:
    """The names of all results that a notebook reads."""
    names = set()
    for notebook in HERE.parent.glob("[0-9][0-9]_*.ipynb"):
        names |= set(re.findall(r'\bresult\(\\"([^"\\]+)', notebook.read_text(encoding="utf-8")))
    return names


def missing() -> list[str]:
    """What is wrong with the files."""
    files = {}
    wrong = []
    for path in sorted(common.RESULTS.rglob("*.json")):
        name = f"{path.parent.name}/{path.stem}"
        files[name] = json.loads(path.read_text(encoding="utf-8"))
        if FIELDS - set(files[name]) or files[name]["command"] != common.command(name):
            wrong.append(f"{name} does not say how it was made")
    read, made = read_by_chapters(), set(common.EXPERIMENTS)
    wrong += [f"{name} is read by a chapter and has no experiment" for name in sorted(read - made)]
    wrong += [f"{name} has an experiment and no file" for name in sorted(made - set(files))]
    wrong += [f"{name} has a file and no experiment" for name in sorted(set(files) - made)]
    chapters = {name[:2] for name in made} - {name[:2] for name in common.BEGINNINGS}
    wrong += [f"no experiment of chapter {chapter} has a beginning" for chapter in sorted(chapters)]
    large = [path for path in common.RESULTS.rglob("*.*") if path.stat().st_size > LARGEST]
    return wrong + [f"{path} is larger than {LARGEST // 1000} kB" for path in large]


def changed(chapters: list[str]) -> list[str]:
    """Which beginnings do not come out again."""
    wrong = []
    for name, function in common.BEGINNINGS.items():
        if chapters and name[:2] not in chapters:
            continue
        torch.manual_seed(0)
        record = json.loads((common.RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        now, before = (torch.tensor(v, dtype=torch.float64) for v in function(record))
        print(f"{name}: {now.tolist()} now, {before.tolist()} on record", flush=True)
        if not torch.allclose(now, before, rtol=0.05):
            wrong.append(f"{name} does not come out again")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("chapters", nargs="*", metavar="NN", help="only these (default: all)")
    wrong = missing() or changed(parser.parse_args().chapters)
    print("\n".join(wrong) or "every result has its experiment, and comes out of it again")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
