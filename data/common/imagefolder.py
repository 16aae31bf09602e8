"""Makes the folder of a data set: whole or not at all, and by one process at a time.

Both prepare.py scripts use it. The folder follows the imagefolder convention of the Hugging Face
`datasets` library: train/ and test/, each with PNG files and a metadata.jsonl of one line an image.
dataset.json beside them records what was drawn.
"""

import argparse
import contextlib
import io
import json
import os
import shutil
import sys
import time
from pathlib import Path

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None
    import msvcrt


# ---- what is there -------------------------------------------------------------------------------


def recorded(folder, dataset):
    """What dataset.json in `folder` records; None if this is no data set of that name."""
    try:
        record = json.loads((Path(folder) / "dataset.json").read_text(encoding="utf-8"))
        return record if record["dataset"] == dataset else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def is_there(out, record):
    """Whether `out` is the data set of `record`. Raises ValueError if it holds anything foreign."""
    found = recorded(out, record["dataset"])
    empty = out.is_dir() and not any(out.iterdir())
    if found is None and out.exists() and not empty:
        raise ValueError(
            f"out: {out} exists and is not a data set of {record['dataset']}; "
            "name a new or an empty folder"
        )
    return found == record


def remove(path):
    """Deletes a file, a link (not what it points to) or a folder; nothing is there: no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# ---- one process at a time -----------------------------------------------------------------------


def lock(path, out):
    """Opens and locks the file `path`, waiting while another process holds it: a descriptor.

    The system unlocks it when this process ends, however it ends. None where the file system has
    no locks, as Lustre without its option flock and some NFS.
    """
    told = False
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
            if os.path.samestat(os.fstat(file), os.stat(path)):
                return file
        except FileNotFoundError:
            pass  # its last holder has just deleted it: try again with a new one
        except (BlockingIOError, PermissionError):  # another process holds it
            if not told:
                print(f"waiting for another process, which draws {out}", file=sys.stderr)
            told = True
            time.sleep(0.1)
        except OSError:
            os.close(file)
            return None
        os.close(file)


@contextlib.contextmanager
def one_at_a_time(out):
    """Lets one process in after the other. Yields False where all come in, for want of locks."""
    path = out.with_name(f"{out.name}.partial.lock")
    file = lock(path, out)
    try:
        yield file is not None
    finally:
        with contextlib.suppress(OSError):  # Windows keeps an open file; the next run uses it
            path.unlink()
        if file is not None:
            os.close(file)  # last: whoever locks the deleted file sees that it is gone


# ---- making it -----------------------------------------------------------------------------------


def png(image):
    """The bytes of a PNG file."""
    file = io.BytesIO()
    image.save(file, "png", compress_level=1)
    return file.getvalue()


def write(folder, record, examples):
    """Fills `folder`, which is new."""
    folder.mkdir()
    (folder / "dataset.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
    metadata = {"train": [], "test": []}
    for part in metadata:
        (folder / part).mkdir()
    for part, name, image, line in examples:
        (folder / part / name).write_bytes(image)
        metadata[part].append(json.dumps(line) + "\n")
    for part, lines in metadata.items():
        (folder / part / "metadata.jsonl").write_bytes("".join(lines).encode())


def make(out, record, examples):
    """Makes `out` the data set of `record`; if it is that already, does nothing. True if it drew.

    `examples` yields (part, file name, bytes of a PNG file, line of metadata); a part is "train" or
    "test". Raises ValueError if `out` holds anything foreign, OSError if it cannot be written.
    """
    out = Path(out).resolve()
    if is_there(out, record):
        return False
    out.parent.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(out) as alone:
        if is_there(out, record):  # drawn while this process waited
            return False
        # Locked in, what lies there is of a dead process. Without locks another one may be drawing.
        partial = out.with_name(out.name + (".partial" if alone else f".partial.{os.getpid()}"))
        remove(partial)
        if (
            out.exists()
        ):  # empty, or another data set of ours: moved away first, so never half there
            os.replace(out, partial)
            remove(partial)
        try:
            write(partial, record, examples)
            try:
                os.replace(partial, out)
            except OSError:  # something has appeared there: foreign, or drawn by a process unlocked
                if not is_there(out, record):
                    raise
        finally:
            remove(partial)
    return True


# ---- the command ---------------------------------------------------------------------------------


def check_number(name, value, least):
    """Raises ValueError unless `value` is a whole number of at least `least`."""
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is {value!r}; it must be a whole number of at least {least}")


class Arguments(argparse.ArgumentParser):
    def error(self, message):
        """One line, without the usage that argparse puts before it."""
        self.exit(2, f"{self.prog}: {message}\n")


def run(prepare, arguments):
    """Calls `prepare` with the command line's arguments; an error is one line."""
    given = arguments.parse_args()
    try:
        if not prepare(**vars(given)):
            print(f"{given.out} already holds this data set")
    except ValueError as error:
        sys.exit(f"{arguments.prog}: {error}")
    except OSError as error:
        sys.exit(f"{arguments.prog}: cannot write out, {given.out}: {error}")
