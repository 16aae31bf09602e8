"""Disk: files written whole or not at all, data sets found or drawn, models of a run's folder.

No part of the method. What a student must understand is in `ldm.py`.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator

import safetensors.torch
import torch

from .ldm import CLIP, CaptionedImages, LatentDiffusion

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
SHIPPED = REPOSITORY / "data" / "checkpoints" / "shapes"
LPIPS_WEIGHTS = REPOSITORY / "data" / "lpips" / "vgg16.safetensors"


def best_device() -> str:
    """ "cuda", "mps" or "cpu": the first that is there."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


# ---- whole or not at all -----------------------------------------------------------------------


@contextlib.contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields a path to write to; it becomes `path` when the block ends without an error."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(folder: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields a new folder to write to; it replaces `folder` when the block ends without an error.

    A folder cannot be replaced in one step: the old one is moved aside first. `recover_folder`
    brings it back after a kill between these two steps.
    """
    folder = pathlib.Path(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    old = folder.with_name(f".{folder.name}.old")
    recover_folder(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def recover_folder(folder: pathlib.Path) -> None:
    """Undo what a killed `whole_folder` left behind."""
    old = folder.with_name(f".{folder.name}.old")
    if old.exists() and not folder.exists():
        old.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def one_training_in(folder: pathlib.Path) -> Iterator[None]:
    """While the block runs, another process that asks for the same folder gets a ValueError.

    The system unlocks it when a process ends, however it ends. A file system without locks lets
    everyone in.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
    except (BlockingIOError, PermissionError):
        os.close(file)
        raise ValueError(
            f"--out {folder} is in use: another process trains there; wait for it, or choose "
            "another folder"
        ) from None
    except OSError:
        pass  # this file system has no locks
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows keeps an open file
            (folder / ".lock").unlink()
        os.close(file)


def save_in_files_of(
    bytes_per_file: float, model: CLIP | LatentDiffusion, folder: str | os.PathLike
) -> None:
    """`model.save` in half precision, the weights in files of at most so many bytes each."""
    folder = pathlib.Path(folder)
    model.save(folder, torch.float16)
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    files, room = [{}], bytes_per_file
    for name, value in weights.items():
        if value.nbytes > room and files[-1]:
            files.append({})
            room = bytes_per_file
        files[-1][name] = value
        room -= value.nbytes
    (folder / "model.safetensors").unlink()
    for i, part in enumerate(files):
        safetensors.torch.save_file(part, folder / f"model-{i}.safetensors")


# ---- data sets ---------------------------------------------------------------------------------


def data_module(dataset: str, name: str) -> types.ModuleType:
    """data/DATASET/NAME.py of this repository: found by path, as it is no part of the package."""
    path = REPOSITORY / "data" / dataset / f"{name}.py"
    if not path.is_file():
        raise ValueError(f"{path} does not exist; this needs a clone of the repository")
    if dataset == "shapes":  # whose oracle imports its neighbour
        if str(path.parent) not in sys.path:
            sys.path.insert(0, str(path.parent))
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(f"{dataset}_{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except SystemExit as missing_package:
        raise ValueError(str(missing_package)) from None
    return module


def data_folder(
    data: str | os.PathLike | None, size: int, count: int | None = None, dataset: str = "shapes"
) -> pathlib.Path:
    """The folder of a data set.

    data: an existing folder, taken as it is; None for the repository's own, data/DATASET/SIZE,
    which is drawn if it is not there. count: draw so many images, in `data`, which may be a new
    folder, or in data/DATASET/SIZE-COUNT. Raises ValueError for a folder that does not exist (and
    no count), or that holds another count.
    """
    own = str(size) if count is None else f"{size}-{count}"
    folder = pathlib.Path(data) if data is not None else REPOSITORY / "data" / dataset / own
    if data is not None and count is None:
        if not folder.is_dir():
            raise ValueError(
                f"--data {folder} does not exist; name a folder that does, leave --data out to use "
                f"the data set {dataset!r}, or add --count N to draw N images of it there"
            )
        return folder
    prepare = data_module(dataset, "prepare")
    found = prepare.recorded(folder) or {}
    if count is not None and folder.exists() and count != found.get("count"):
        held = f"{found['count']:,} images" if found.get("count") else "other data"
        raise ValueError(
            f"--count is {count}, but {folder} holds {held}; leave --count out, or name a new "
            "folder with --data"
        )
    if data is not None and found:
        return folder  # as it is, whatever its size and seed
    if count is None:
        count = found.get("count", 20000 if dataset == "shapes" else None)
    if dataset == "emoji" and not found:
        _draw_in_many_processes(prepare.__file__, folder, size, count)
    prepare.prepare(folder, size=size, count=count, seed=0)  # does nothing if they are there
    return folder


def _draw_in_many_processes(
    script: str, folder: pathlib.Path, size: int, count: int | None
) -> None:
    command = [sys.executable, script, "--size", str(size), "--seed", "0", "--out", str(folder)]
    if count is not None:
        command += ["--count", str(count)]
    done = subprocess.run(command)
    if done.returncode:
        raise ValueError(f"the data set could not be drawn: {' '.join(command)} failed")


def read_split(folder: pathlib.Path, split: str, size: int) -> CaptionedImages:
    """train/ or test/ of a data set. A folder with neither is a training set of its own."""
    if split == "train" and not (folder / split).is_dir():
        return CaptionedImages.from_folder(folder, size, progress=True)
    return CaptionedImages.from_folder(folder / split, size, progress=True)


# ---- models ------------------------------------------------------------------------------------


def read_record(path: pathlib.Path) -> dict:
    """A run's run.json: {"settings": {...}, "done": [...]}. Raises ValueError for anything else."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {"settings": dict(record["settings"]), "done": list(record["done"])}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is no record of a run of ours") from None


def data_of_run(folder: str | os.PathLike) -> str | None:
    """The --data of a run; None for the repository's own data set, or where nothing tells."""
    path = pathlib.Path(folder) / "run.json"
    data = read_record(path)["settings"].get("data") if path.is_file() else None
    if data is not None and not pathlib.Path(data).is_dir():
        raise ValueError(
            f"--model {folder} was trained on {data}, which is not here; name it with --data"
        )
    return data


def load_part(folder: str | os.PathLike, part: str, kind: type) -> CLIP | LatentDiffusion:
    """`part` ("model" or "evaluator") of a run's folder; or the folder of a saved model."""
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        problem = "is not a folder" if folder.exists() else "does not exist"
        raise ValueError(f"--model {folder} {problem}")
    record = folder / "run.json"
    if part == "model" and record.is_file() and "denoiser" not in read_record(record)["done"]:
        raise ValueError(
            f"--model {folder} is a run that is not finished; its `train` command goes on with it"
        )
    if part == "model" and (folder / "config.json").is_file():
        return kind.load(folder)
    recover_folder(folder / part)
    return kind.load(folder / part)
