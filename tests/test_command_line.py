"""The command line as a user types it, well and badly."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import types
import warnings

import pytest
import torch
from conftest import ROOT, prepare_module
from PIL import Image

from ldm_minimal import SHAPES, CLIP, LatentDiffusion, Tokenizer
from ldm_minimal.__main__ import card, frechet, main, mixed_precision, neighbours, picture_grid, retrieval

FEW = [f"--{what}-{stage}={value}" for stage in ("clip", "autoencoder", "denoiser") for what, value in (("steps", 2), ("batch", 4))]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a small data set, an untrained model of size SHAPES, and a judge: what the commands below are pointed at."""
    root = tmp_path_factory.mktemp("world")
    prepare_module().prepare(root / "shapes", 32, 60, seed=0)
    torch.manual_seed(0)
    model = LatentDiffusion(SHAPES)
    model.tokenizer = Tokenizer.train(["a red circle above a blue square"], SHAPES.text.vocab_size)
    model.save(root / "unfinished" / "model")
    model.config = dataclasses.replace(SHAPES, scale_factor=1.0)
    model.save(root / "run" / "model")
    CLIP(model.tokenizer, model.text_encoder, model.image_encoder).save(root / "run" / "judge")
    shutil.copytree(root / "run" / "model", root / "nojudge" / "model")
    return root


@pytest.fixture
def here(world, tmp_path, monkeypatch):
    """A copy of the world to spoil, as the current folder (linked, not copied: what is spoilt must be unlinked first)."""
    shutil.copytree(world, tmp_path / "world", copy_function=os.link)
    monkeypatch.chdir(tmp_path / "world")
    return tmp_path / "world"


def spoil(path, text=None, cut=None):
    content = path.read_bytes()[:cut] if cut is not None else None if text is None else text.encode()
    path.unlink()
    if content is not None:
        path.write_bytes(content)


def first_line(folder, **changes):
    """Change or (None) remove entries of the first caption's line."""
    path = folder / "shapes" / "train" / "metadata.jsonl"
    head, *rest = path.read_text().splitlines()
    row = {k: v for k, v in {**json.loads(head), **changes}.items() if v is not None}
    spoil(path, "\n".join([json.dumps(row), *rest]))


def foreign_weights(folder):
    spoil(folder / "run/model/model.safetensors")
    shutil.copy(folder / "run/judge/model.safetensors", folder / "run/model")


TRAIN = ["train", "--data", "shapes", "--out", "new", *FEW]
SAMPLE = ["sample", "a red circle", "--model", "run", "--steps", "2"]
WRONG = {  # name: (arguments, how to spoil the world, a word that the message must contain)
    "no command": ([], None, "command"),
    "an unknown command": (["draw"], None, "draw"),
    "an unknown option": ([*SAMPLE, "--colour", "red"], None, "--colour"),
    "no prompt": (["sample", "--model", "run"], None, "PROMPT"),
    "an empty prompt": (["sample", "  ", "--model", "run"], None, "empty prompt"),
    "zero steps": ([*SAMPLE, "--steps", "0"], None, "'0' came"),
    "too many steps": ([*SAMPLE, "--steps", "1001"], None, "1 to 1000"),
    "steps in words": ([*SAMPLE, "--steps", "fifty"], None, "'fifty' came"),
    "a fraction of a step": ([*SAMPLE, "--steps", "2.5"], None, "whole number"),
    "a negative seed": ([*SAMPLE, "--seed", "-1"], None, "--seed"),
    "guidance that is no number": ([*SAMPLE, "--guidance", "nan"], None, "--guidance"),
    "negative guidance": ([*SAMPLE, "--guidance", "-3"], None, "--guidance"),
    "a model that is not there": ([*SAMPLE, "--model", "nowhere"], None, "does not exist"),
    "a model that is some file": ([*SAMPLE, "--model", "run/model/config.json"], None, "must be a folder, or end in"),
    "an empty model folder": ([*SAMPLE, "--model", "empty"], lambda h: (h / "empty").mkdir(), "no config.json"),
    "a truncated config": (SAMPLE, lambda h: spoil(h / "run/model/config.json", cut=60), "not a whole model"),
    "a foreign config": (SAMPLE, lambda h: spoil(h / "run/model/config.json", '{"model_type": "bert"}'), "not a whole model"),
    "truncated weights": (SAMPLE, lambda h: spoil(h / "run/model/model.safetensors", cut=5000), "not a whole model"),
    "missing weights": (SAMPLE, lambda h: spoil(h / "run/model/model.safetensors"), "not a whole model"),
    "weights of another model": (SAMPLE, foreign_weights, "not a whole model"),
    "a missing tokenizer": (SAMPLE, lambda h: spoil(h / "run/model/tokenizer.json"), "tokenizer"),
    "a broken tokenizer": (SAMPLE, lambda h: spoil(h / "run/model/tokenizer.json", "{"), "not a whole model"),
    "a model not trained to the end": ([*SAMPLE, "--model", "unfinished"], None, "scale_factor"),
    "a picture into a file as if a folder": ([*SAMPLE, "--out", "run/model/config.json/out.png"], None, "config.json"),
    "a picture that is a folder": ([*SAMPLE, "--out", "dir.png"], lambda h: (h / "dir.png").mkdir(), "is a folder"),
    "a picture of no known kind": ([*SAMPLE, "--out", "out.txt"], None, ".png"),
    "an unknown size": ([*TRAIN, "--size", "huge"], None, "huge"),
    "a size that is not trained": ([*TRAIN, "--size", "sd1"], None, "sd1"),
    "an unknown precision": ([*TRAIN, "--precision", "int3"], None, "int3"),
    "too few pictures": (["train", "--count", "5", "--out", "new"], None, "--count"),
    "another count than is there": ([*TRAIN, "--count", "70"], None, "shapes holds 60 pictures"),
    "a count of one's own pictures": ([*TRAIN, "--count", "60"], lambda h: (h / "shapes/dataset.json").unlink(), "holds other data"),
    "data without captions": (TRAIN, lambda h: spoil(h / "shapes/train/metadata.jsonl"), "metadata.jsonl"),
    "an empty list of captions": (TRAIN, lambda h: spoil(h / "shapes/train/metadata.jsonl", ""), "empty"),
    "a caption that is missing": (TRAIN, lambda h: first_line(h, text=None), "line 1 has no 'text'"),
    "a line that is not JSON": (TRAIN, lambda h: spoil(h / "shapes/train/metadata.jsonl", "hello"), "line 1 is not JSON"),
    "a picture that is missing": (TRAIN, lambda h: first_line(h, file_name="gone.png"), "gone.png"),
    "a picture that is no picture": (TRAIN, lambda h: spoil(h / "shapes/train/00000.png", "not a picture"), "00000.png"),
    "a truncated picture": (TRAIN, lambda h: spoil(h / "shapes/train/00000.png", cut=80), "00000.png"),
    "an out folder with other things": ([*TRAIN, "--out", "shapes"], None, "not empty"),
    "an out folder inside a file": ([*TRAIN, "--out", "run/model/config.json/x"], None, "config.json"),
    "a batch larger than the data": ([*TRAIN, "--batch-denoiser", "1000"], None, "--batch-denoiser is 1000"),
    "a run of another kind": ([*TRAIN, "--out", "odd"], lambda h: [(h / "odd").mkdir(), (h / "odd/run.json").write_text("[]")], "no record"),
    "a loss that is not finite": ([*TRAIN, "--rate-clip", "1e38", "--steps-clip", "10"], None, "not finite"),
    "evaluation without a judge": (["evaluate", "--model", "nojudge", "--data", "shapes"], None, "judge"),
    "evaluation without test pictures": (["evaluate", "--model", "run", "--data", "shapes"],
                                         lambda h: shutil.rmtree(h / "shapes/test"), "metadata.jsonl"),
    "information on nothing": (["info", "--model", "nowhere"], None, "does not exist"),
}


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_use_ends_with_one_clear_line(name, here, capsys):
    arguments, harm, word = WRONG[name]
    if harm:
        harm(here)
    before = files(here)
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    errors = capsys.readouterr().err
    message = errors.replace("\r", "\n").strip().splitlines()[-1]
    assert code in (1, 2)
    assert message.startswith("ldm_minimal") and word in message, message
    assert "Traceback" not in errors and errors.count("ldm_minimal") == 1
    left = {path for path in files(here) - before if not path.startswith("new/")}
    assert not left and not list(here.rglob("*partial*")), "something half-written is left"
    assert not list((here / "new").rglob("*.safetensors")), "a model was written that never was trained"


def test_a_run_of_another_seed_is_not_overwritten(here, capsys):
    assert main([*TRAIN, "--captions", "0"]) == 0
    before = (here / "new/model/model.safetensors").read_bytes()
    assert main([*TRAIN, "--captions", "0", "--seed", "1"]) == 1
    assert "another seed" in capsys.readouterr().err
    assert (here / "new/model/model.safetensors").read_bytes() == before


def test_train_from_the_first_picture_to_the_scores(here, capsys):
    assert main([*TRAIN, "--captions", "4"]) == 0
    said = capsys.readouterr().out
    for name in ("model", "README.md", "clip.png", "autoencoder.png", "samples.png", "neighbours.png", "log.csv", "scores.json"):
        assert (here / "new" / name).exists() and name in said
    scores = json.loads((here / "new/scores.json").read_text())
    assert scores["captions"] == 4 and 0 <= scores["guidance"]["5"]["accuracy"]["all"] <= 1
    assert "prompt accuracy" in said and "ceiling" in said
    assert main(["sample", "a red circle above a blue square", "--model", "new", "--steps", "2"]) == 0
    assert Image.open(here / "out.png").size == (256, 256)


def test_train_on_a_folder_of_ones_own_pictures(here):
    """Any imagefolder will do: other sizes, transparency, subfolders, no test split."""
    own = here / "own"
    (own / "sub").mkdir(parents=True)
    for i, mode in enumerate(["RGB", "RGBA", "L", "P"]):
        Image.new(mode, (40 + i, 50)).save(own / "sub" / f"{i}.png")
    (own / "metadata.jsonl").write_text("\n".join(json.dumps({"file_name": f"sub/{i}.png", "text": f"picture {i}"}) for i in range(4)))
    assert main(["train", "--data", "own", "--out", "new", *FEW]) == 0
    assert (here / "new/samples.png").exists()


def test_sample_is_decided_by_the_seed(here):
    pictures = []
    for seed, out in [(0, "a.png"), (0, "b.png"), (1, "c.png")]:
        assert main([*SAMPLE, "--seed", str(seed), "--out", out]) == 0
        pictures.append((here / out).read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]


def test_several_prompts_make_one_sheet_with_captions(here):
    assert main(["sample", "a red circle", "a blue square", "--model", "run", "--steps", "2"]) == 0
    one, two = picture_grid(torch.zeros(1, 3, 32, 32), ["a"], 4).size, Image.open(here / "out.png").size
    assert two[0] > 1.8 * one[0]


def test_a_caption_that_is_too_long_is_cut_and_said(here, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("always")  # pyproject.toml makes errors of our warnings
        assert main(["sample", "a red circle " * 40 + "and a zebra", "--model", "run", "--steps", "1"]) == 0
    errors = capsys.readouterr().err
    assert "cut off" in errors and "and a zebra" in errors and "warnings.warn" not in errors


def test_evaluate_prints_a_table_or_json(here, capsys):
    command = ["evaluate", "--model", "run", "--data", "shapes", "--captions", "4", "--guidance", "1", "3"]
    assert main(command) == 0
    table = capsys.readouterr().out
    assert "w = 1" in table and "w = 3" in table and "prompt accuracy" in table
    assert main([*command, "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert set(scores["guidance"]) == {"1", "3"} and set(scores["ceiling"]) >= {"all", "colour", "shape", "count"}


def test_info_counts_stable_diffusion(capsys):
    assert main(["info", "--size", "sd1"]) == 0
    said = capsys.readouterr().out
    assert "859,520,964" in said and "83,653,863" in said and "123,060,480" in said


def test_frechet_distance_of_gaussians_has_its_closed_form():
    """For independent dimensions it is |mu_a - mu_b|^2 + sum (sigma_a - sigma_b)^2."""
    noise = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = (noise - noise.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(noise.T)).T)  # covariance exactly I
    a, b = noise * torch.tensor([1.0, 2.0, 3.0]), noise * torch.tensor([2.0, 2.0, 1.0]) + torch.tensor([0.0, 5.0, 0.0])
    assert frechet(a, b) == pytest.approx(25 + 1 + 0 + 4, rel=1e-6)
    assert frechet(a, a) == pytest.approx(0, abs=1e-6)


class Lookup:
    """A judge and a model in one that see only the colour of a picture's first pixel, and read captions that are numbers."""
    device, tokenizer = "cpu", staticmethod(lambda captions: torch.tensor([int(caption) for caption in captions]))

    def image_encoder(self, x):
        return torch.nn.functional.one_hot((x[:, 0, 0, 0] * 100).round().long(), 100).float()

    def text_features(self, tokens):
        return torch.nn.functional.one_hot(tokens, 100).float()

    def generate(self, prompts, **_):
        return torch.stack([torch.full((3, 4, 4), int(prompt) / 100) for prompt in prompts])


def test_retrieval_counts_the_captions_that_are_found():
    judge, numbers = Lookup(), [3, 4, 5, 6, 50, 7]
    rows = [{"text": str(n), "split": "composition" if n != 50 else "test"} for n in numbers]
    right, wrong = judge.generate([3, 4, 5, 6, 50, 7]), judge.generate([3, 5, 4, 6, 4, 7])
    assert retrieval(judge, right, rows) == 1 and retrieval(judge, wrong, rows) == 0.6
    assert retrieval(judge, right, [row | {"split": "test"} for row in rows]) is None


def test_neighbours_are_the_nearest_training_pictures(tmp_path, monkeypatch):
    model, saved = Lookup(), {}
    monkeypatch.setattr("ldm_minimal.__main__.save_grid", lambda path, x, captions, columns: saved.update(captions=captions, x=x))
    neighbours(tmp_path / "n.png", model, model, Three())
    assert saved["captions"] == ["5", "1", "9", "nearest: 1", "nearest: 9", "nearest: 5"]  # captions in another order than the pictures


class Three:
    """A data set whose captions are wrong on purpose, so that it shows which picture was taken for the nearest."""
    captions = ["5", "1", "9"]

    def pictures(self, index):
        return Lookup().generate(torch.tensor([9, 5, 1])[index].tolist())

    def __len__(self):
        return 3


def test_the_card_passes_the_attribution_on(tmp_path):
    (tmp_path / "dataset.json").write_text(json.dumps({"attribution": "All emojis designed by OpenMoji", "licence": "CC BY-SA 4.0"}))
    config, args = dataclasses.replace(SHAPES, scale_factor=0.5), types.SimpleNamespace(seed=7)
    assert "All emojis designed by OpenMoji." in card(config, tmp_path, args) and "CC BY-SA 4.0" in card(config, tmp_path, args)
    assert "OpenMoji" not in card(config, tmp_path / "elsewhere", args) and "seed 7" in card(config, tmp_path, args)


def test_precision_follows_the_hardware(monkeypatch):
    for available, capability, expected in [(False, (0, 0), "no"), (True, (7, 5), "fp16"), (True, (9, 0), "bf16")]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        assert mixed_precision("auto") == expected
    assert mixed_precision("fp32") == "no" and mixed_precision("fp16") == "fp16"


def test_as_a_user_types_it_from_another_folder(here):
    """A real process: no traceback for a typing mistake, and a picture for a right one."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run = lambda *words: subprocess.run([sys.executable, "-m", "ldm_minimal", *words], cwd=here, env=environment,  # noqa: E731
                                        capture_output=True, text=True, timeout=120)
    wrong = run("sampel", "a red circle")
    assert wrong.returncode == 2 and len(wrong.stderr.strip().splitlines()) == 1 and "sampel" in wrong.stderr
    right = run(*SAMPLE)
    assert right.returncode == 0 and "out.png" in right.stdout and (here / "out.png").exists(), right.stderr
