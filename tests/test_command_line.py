"""The command line as a user types it, well and badly."""

import csv
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import warnings

import pytest
import safetensors.torch
import torch
from PIL import Image

from conftest import ROOT, prepare_module, seeded
from ldm_minimal import CLIP, SHAPES, LatentDiffusion, Tokenizer, evaluate, files, metrics, sample
from ldm_minimal.__main__ import main
from ldm_minimal.sample import image_sheet
from ldm_minimal.train import mixed_precision, model_card, nearest_neighbours

FEW_STEPS = [
    "--steps-clip=2",
    "--batch-clip=4",
    "--steps-autoencoder=2",
    "--batch-autoencoder=4",
    "--steps-denoiser=2",
    "--batch-denoiser=4",
]
TRAIN = ["train", "--data", "shapes", "--out", "new", *FEW_STEPS]
SAMPLE = ["sample", "a red circle", "--model", "run", "--steps", "2"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """What the commands below are pointed at: a data set, an untrained model and an evaluator."""
    root = tmp_path_factory.mktemp("world")
    prepare_module().prepare(root / "shapes", 32, 60, seed=0)
    torch.manual_seed(0)
    model = LatentDiffusion(SHAPES)
    model.tokenizer = Tokenizer.train(["a red circle above a blue square"], SHAPES.text.vocab_size)
    model.save(root / "unfinished" / "model")
    model.config = dataclasses.replace(SHAPES, scale_factor=1.0)
    model.save(root / "run" / "model")
    evaluator = CLIP(model.tokenizer, model.text_encoder, model.image_encoder)
    evaluator.save(root / "run" / "evaluator")
    shutil.copytree(root / "run" / "model", root / "no-evaluator" / "model")
    return root


@pytest.fixture
def here(world, tmp_path, monkeypatch):
    """A copy of the world to spoil, as the current folder. Its files are links: unlink first."""
    shutil.copytree(world, tmp_path / "world", copy_function=os.link)
    monkeypatch.chdir(tmp_path / "world")
    return tmp_path / "world"


# ---- wrong use ---------------------------------------------------------------------------------
# Each case: the arguments, a function that spoils the world or None, a word of the message.


def removed(path):
    return lambda here: (here / path).unlink()


def replaced(path, text):
    def spoil(here):
        (here / path).unlink()
        (here / path).write_text(text)

    return spoil


def truncated(path, length):
    def spoil(here):
        content = (here / path).read_bytes()
        (here / path).unlink()
        (here / path).write_bytes(content[:length])

    return spoil


def first_row(**changes):
    """Change entries of the first caption's line; None removes one."""

    def spoil(here):
        path = here / "shapes/train/metadata.jsonl"
        head, *rest = path.read_text().splitlines()
        row = json.loads(head) | changes
        row = {name: value for name, value in row.items() if value is not None}
        path.unlink()
        path.write_text("\n".join([json.dumps(row), *rest]))

    return spoil


def new_folder(path):
    return lambda here: (here / path).mkdir()


def weights_of_another_model(here):
    (here / "run/model/model.safetensors").unlink()
    shutil.copy(here / "run/evaluator/model.safetensors", here / "run/model")


def foreign_record(here):
    (here / "odd").mkdir()
    (here / "odd/run.json").write_text("[]")


def no_test_images(here):
    shutil.rmtree(here / "shapes/test")


CONFIG = "run/model/config.json"
WEIGHTS = "run/model/model.safetensors"
TOKENIZER = "run/model/tokenizer.json"
CAPTIONS = "shapes/train/metadata.jsonl"
IMAGE = "shapes/train/00000.png"
NOT_WHOLE = "holds no whole model"
EVALUATE = ["evaluate", "--model", "run", "--data", "shapes"]
WRONG = {
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
    "a height that the U-Net cannot halve": ([*SAMPLE, "--height", "36"], None, "multiples of 8"),
    "a model that is not there": ([*SAMPLE, "--model", "nowhere"], None, "does not exist"),
    "a model that is some file": ([*SAMPLE, "--model", CONFIG], None, "config.json"),
    "an empty model folder": ([*SAMPLE, "--model", "a"], new_folder("a"), "no config.json"),
    "a truncated config": (SAMPLE, truncated(CONFIG, 60), NOT_WHOLE),
    "a foreign config": (SAMPLE, replaced(CONFIG, '{"model_type": "bert"}'), NOT_WHOLE),
    "truncated weights": (SAMPLE, truncated(WEIGHTS, 5000), NOT_WHOLE),
    "missing weights": (SAMPLE, removed(WEIGHTS), NOT_WHOLE),
    "weights of another model": (SAMPLE, weights_of_another_model, NOT_WHOLE),
    "a missing tokenizer": (SAMPLE, removed(TOKENIZER), "tokenizer"),
    "a broken tokenizer": (SAMPLE, replaced(TOKENIZER, "{"), NOT_WHOLE),
    "a model not trained to the end": ([*SAMPLE, "--model", "unfinished"], None, "scale_factor"),
    "a tokenizer for a model of ours": ([*SAMPLE, "--tokenizer", "x"], None, "--tokenizer"),
    "an image inside a file": ([*SAMPLE, "--out", f"{CONFIG}/out.png"], None, "config.json"),
    "an image that is a folder": ([*SAMPLE, "--out", "d.png"], new_folder("d.png"), "is a folder"),
    "an image of no known kind": ([*SAMPLE, "--out", "out.txt"], None, ".png"),
    "an unknown size": ([*TRAIN, "--size", "huge"], None, "huge"),
    "a size that is not trained": ([*TRAIN, "--size", "sd1"], None, "sd1"),
    "an unknown precision": ([*TRAIN, "--precision", "int3"], None, "int3"),
    "a mistyped data folder": ([*TRAIN, "--data", "shpaes"], None, "--data shpaes does not exist"),
    "too few images": (["train", "--count", "5", "--out", "new"], None, "--count"),
    "another count than is there": ([*TRAIN, "--count", "70"], None, "shapes holds 60 images"),
    "a count of one's own images": (
        [*TRAIN, "--count", "60"],
        removed("shapes/dataset.json"),
        "holds other data",
    ),
    "data without captions": (TRAIN, removed(CAPTIONS), "metadata.jsonl"),
    "an empty list of captions": (TRAIN, replaced(CAPTIONS, ""), "empty"),
    "a caption that is missing": (TRAIN, first_row(text=None), "line 1 has no 'text'"),
    "a line that is not JSON": (TRAIN, replaced(CAPTIONS, "hello"), "line 1 is not JSON"),
    "an image that is missing": (TRAIN, first_row(file_name="gone.png"), "gone.png"),
    "an image that is no image": (TRAIN, replaced(IMAGE, "not an image"), "00000.png"),
    "a truncated image": (TRAIN, truncated(IMAGE, 80), "00000.png"),
    "an out folder with other things": ([*TRAIN, "--out", "shapes"], None, "not empty"),
    "an out folder inside a file": ([*TRAIN, "--out", f"{CONFIG}/x"], None, "config.json"),
    "a batch larger than the data": ([*TRAIN, "--batch-denoiser", "1000"], None, "is 1000"),
    "a batch that cannot be cut": ([*TRAIN, "--accumulate", "3"], None, "multiples of 3"),
    "a run of another kind": ([*TRAIN, "--out", "odd"], foreign_record, "no record"),
    "a loss that is not finite": (
        [*TRAIN, "--rate-clip", "1e38", "--steps-clip", "10"],
        None,
        "not finite",
    ),
    "no evaluator": (
        ["evaluate", "--model", "no-evaluator", "--data", "shapes"],
        None,
        "evaluator",
    ),
    "no test images": (EVALUATE, no_test_images, "metadata.jsonl"),
    "no data to evaluate on": ([*EVALUATE, "--data", "nowhere"], None, "does not exist"),
    "information on nothing": (["info", "--model", "nowhere"], None, "does not exist"),
    "information on a broken folder": (
        ["info", "--model", "run"],
        truncated(WEIGHTS, 5000),
        NOT_WHOLE,
    ),
}


def files_in(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_use_ends_with_one_clear_line(name, here, capsys):
    arguments, spoil, word = WRONG[name]
    if spoil:
        spoil(here)
    before = files_in(here)
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    errors = capsys.readouterr().err
    message = errors.replace("\r", "\n").strip().splitlines()[-1]
    assert code in (1, 2)
    assert message.startswith("ldm_minimal")
    assert word in message, message
    assert "Traceback" not in errors
    assert errors.count("ldm_minimal") == 1
    left = {path for path in files_in(here) - before if not path.startswith("new/")}
    assert not left
    assert not list(here.rglob("*partial*")), "something half-written is left"
    assert not list((here / "new").rglob("*.safetensors")), "an untrained model was written"


def test_a_mistyped_data_folder_is_not_created(here):
    assert main([*TRAIN, "--data", "shpaes"]) == 1
    assert not (here / "shpaes").exists()


@pytest.mark.slow
def test_a_new_data_folder_is_drawn_where_a_count_asks_for_it(here):
    assert main([*TRAIN, "--data", "fresh", "--count", "40", "--captions", "0"]) == 0
    assert len(list((here / "fresh/train").glob("*.png"))) == 36
    assert files.data_of_run("new") == "fresh"


def test_a_count_leaves_the_repositorys_own_data_set_alone(here, monkeypatch):
    """Else every later command would train on so many images, without a word."""
    monkeypatch.setattr(files, "REPOSITORY", here)
    monkeypatch.setattr(files, "data_module", lambda *_: prepare_module())
    folder = files.data_folder(None, 32, count=20)
    assert folder == here / "data/shapes/32-20" and not (here / "data/shapes/32").exists()
    assert files.data_folder(folder, 64, count=20) == folder  # of another size: taken as it is
    assert json.loads((folder / "dataset.json").read_text())["size"] == 32


# ---- train -------------------------------------------------------------------------------------


def test_a_second_training_in_the_same_folder_is_refused(here, capsys):
    """It would write over the first one's state and model."""
    with files.one_training_in(here / "new"):
        assert main(TRAIN) == 1
        assert "--out new is in use" in capsys.readouterr().err
    with files.one_training_in(here / "new"):
        pass  # it is free again
    assert not list((here / "new").iterdir())


def test_a_run_does_not_go_on_in_another_precision(here, capsys):
    (here / "new").mkdir()
    settings = {"seed": 0, "data": "shapes", "perceptual": "clip", "number of processes": 1}
    settings["precision"] = "fp16"
    (here / "new/run.json").write_text(json.dumps({"settings": settings, "done": []}))
    assert main(TRAIN) == 1
    assert "another precision and config" in capsys.readouterr().err


def test_what_is_wrong_with_the_test_images_is_said_before_training(here, capsys):
    (here / "shapes/test/metadata.jsonl").unlink()
    assert main(TRAIN) == 1
    assert "metadata.jsonl does not exist" in capsys.readouterr().err
    assert not (here / "new").exists()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("64 GiB"), MemoryError()])
def test_too_little_memory_is_one_line_with_advice(error, here, monkeypatch, capsys):
    def run(_):
        raise error

    monkeypatch.setattr(sample, "run", run)
    assert main(SAMPLE) == 1
    said = capsys.readouterr().err
    assert "out of memory; try" in said and said.count("\n") == 1


@pytest.mark.slow
def test_a_run_of_another_seed_is_not_overwritten(here, capsys):
    assert main([*TRAIN, "--captions", "0"]) == 0
    before = (here / "new/model/model.safetensors").read_bytes()
    assert main([*TRAIN, "--captions", "0", "--seed", "1"]) == 1
    assert "another seed" in capsys.readouterr().err
    assert (here / "new/model/model.safetensors").read_bytes() == before


@pytest.mark.slow
def test_train_from_the_first_image_to_the_scores(here, capsys):
    assert main([*TRAIN, "--captions", "4"]) == 0
    said = capsys.readouterr().out
    for name in ("model", "README.md", "clip.png", "autoencoder.png", "samples.png"):
        assert (here / "new" / name).exists() and name in said
    for name in ("neighbours.png", "log.csv", "scores.json"):
        assert (here / "new" / name).exists() and name in said
    assert not (here / "new/state").exists()
    scores = json.loads((here / "new/scores.json").read_text())
    assert scores["captions"] == 4
    assert 0 <= scores["guidance"]["5"]["accuracy"]["all"] <= 1
    assert "prompt accuracy" in said and "ceiling" in said
    prompt = "a red circle above a blue square"
    assert main(["sample", prompt, "--model", "new", "--steps", "2"]) == 0
    assert Image.open(here / "out.png").size == (256, 256)


def test_a_run_is_evaluated_on_the_data_that_it_was_trained_on(here, monkeypatch):
    settings = {"seed": 0, "data": "shapes"}
    (here / "run/run.json").write_text(json.dumps({"settings": settings, "done": ["denoiser"]}))
    asked = []

    def data_folder(data, *_, **__):
        asked.append(data)
        raise ValueError("far enough")

    monkeypatch.setattr(evaluate, "data_folder", data_folder)
    for options in ([], ["--data", "other"]):
        main(["evaluate", "--model", "run", *options])
    assert asked == ["shapes", "other"]
    shutil.rmtree(here / "shapes")
    with pytest.raises(ValueError, match="was trained on shapes, which is not here"):
        files.data_of_run("run")


def test_train_on_a_folder_of_ones_own_images(here, capsys):
    """Any imagefolder will do: other sizes, transparency, subfolders, no test split."""
    own = here / "own"
    (own / "sub").mkdir(parents=True)
    rows = []
    for i, mode in enumerate(["RGB", "RGBA", "L", "P"]):
        Image.new(mode, (40 + i, 50)).save(own / "sub" / f"{i}.png")
        rows.append(json.dumps({"file_name": f"sub/{i}.png", "text": f"image {i}"}))
    (own / "metadata.jsonl").write_text("\n".join(rows))
    assert main(["train", "--data", "own", "--out", "new", *FEW_STEPS]) == 0
    assert (here / "new/samples.png").exists()
    assert 'ldm_minimal sample "image 0"' in capsys.readouterr().out  # its own caption, no circle


@pytest.mark.slow
def test_the_options_of_train_reach_the_recipe(here):
    options = ["--accumulate", "2", "--rate-denoiser", "0.001", "--steps-autoencoder", "5"]
    assert main([*TRAIN, *options, "--captions", "0"]) == 0
    config = json.loads((here / "new/model/config.json").read_text())
    denoiser, clip = config["denoiser_training"], config["clip_training"]
    assert denoiser["learning_rate"] == 0.001
    assert denoiser["grad_accum_steps"] == 2 and clip["grad_accum_steps"] == 1
    assert denoiser["batch_size"] == 4 and clip["steps"] == 2
    # The discriminator joins, and is heard, after the same share: 500 and 900 of 1,500 steps.
    assert config["autoencoder_training"]["steps"] == 5 and config["discriminator_start"] == 2
    assert config["discriminator_head_start"] == 1


def narrow_lpips(path):
    """A file of weights like the published LPIPS, of 4 channels a layer."""
    weights, c = {}, 3
    for number in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28):
        weights[f"features.{number}.weight"] = torch.randn(4, c, 3, 3, generator=seeded(number))
        weights[f"features.{number}.bias"] = torch.zeros(4)
        c = 4
    for i in range(5):
        weights[f"lin{i}.model.1.weight"] = torch.rand(1, 4, 1, 1, generator=seeded(i))
    safetensors.torch.save_file(weights, path)


@pytest.mark.slow
def test_train_and_evaluate_with_the_published_lpips(here, monkeypatch, capsys):
    monkeypatch.setattr(metrics, "LPIPS_WEIGHTS", here / "vgg16.safetensors")
    command = [*TRAIN, "--perceptual", "lpips", "--captions", "4"]
    assert main(command) == 1
    assert "data/lpips/prepare.py" in capsys.readouterr().err
    assert not (here / "new").exists()

    narrow_lpips(here / "vgg16.safetensors")
    assert main(command) == 0
    settings = json.loads((here / "new/run.json").read_text())["settings"]
    assert settings["perceptual"] == "lpips"
    assert settings["config"]["perceptual_weight"] == 1.0
    scores = json.loads((here / "new/scores.json").read_text())
    assert f"LPIPS {scores['lpips']:.4f}" in capsys.readouterr().out
    own_features = [*TRAIN, "--out", "other", "--captions", "0"]
    assert main(own_features) == 0
    assert autoencoder_losses(here / "new") != autoencoder_losses(here / "other")


def autoencoder_losses(run):
    with open(run / "log.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["stage"] == "autoencoder"]
    return [row["perceptual"] for row in rows]


def test_precision_follows_the_hardware(monkeypatch):
    for available, capability, expected in (
        (False, (0, 0), "no"),
        (True, (7, 5), "fp16"),
        (True, (9, 0), "bf16"),
    ):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        monkeypatch.setattr(
            torch.cuda, "get_device_capability", lambda capability=capability: capability
        )
        assert mixed_precision("auto") == expected
    assert mixed_precision("fp32") == "no"
    assert mixed_precision("fp16") == "fp16"


class FirstPixel:
    """Stands for evaluator, model and data set: all that it sees of an image is its first pixel."""

    device = "cpu"
    captions = ("5", "1", "9")  # in another order than the images

    def image_encoder(self, x):
        return torch.nn.functional.one_hot((x[:, 0, 0, 0] * 100).round().long(), 100).float()

    def generate(self, prompts, **_options):
        return torch.stack([torch.full((3, 4, 4), int(prompt) / 100) for prompt in prompts])

    def batch(self, index):
        return self.generate(torch.tensor([9, 5, 1])[index].tolist())

    def __len__(self):
        return 3


def test_neighbours_are_the_nearest_training_images(tmp_path, monkeypatch):
    saved = {}
    monkeypatch.setattr(
        "ldm_minimal.train.save_sheet",
        lambda path, x, captions, columns: saved.update(captions=captions),
    )
    stand_in = FirstPixel()
    nearest_neighbours(tmp_path / "n.png", stand_in, stand_in, stand_in)
    assert saved["captions"] == ["5", "1", "9", "nearest: 1", "nearest: 9", "nearest: 5"]


def test_the_card_passes_the_attribution_on(tmp_path):
    record = {"attribution": "All emojis designed by OpenMoji", "licence": "CC BY-SA 4.0"}
    (tmp_path / "dataset.json").write_text(json.dumps(record))
    config = dataclasses.replace(SHAPES, scale_factor=0.5)
    card = model_card(config, tmp_path, seed=7)
    assert "All emojis designed by OpenMoji." in card and "CC BY-SA 4.0" in card
    elsewhere = model_card(config, tmp_path / "elsewhere", seed=7)
    assert "OpenMoji" not in elsewhere and "seed 7" in elsewhere


# ---- sample ------------------------------------------------------------------------------------


def test_sample_is_decided_by_the_seed(here):
    images = []
    for seed, out in ((0, "a.png"), (0, "b.png"), (1, "c.png")):
        assert main([*SAMPLE, "--seed", str(seed), "--out", out]) == 0
        images.append((here / out).read_bytes())
    assert images[0] == images[1] != images[2]


def test_the_options_of_sample_reach_the_sampler(here, monkeypatch):
    """Every option has a value that is not its default."""
    seen = {}
    denoise = LatentDiffusion.denoise

    def spy(self, prompts, **options):
        seen.update(options, prompts=prompts)
        return denoise(self, prompts, **options)

    monkeypatch.setattr(LatentDiffusion, "denoise", spy)
    options = ["--guidance", "2.5", "--negative", "a blue square", "--height", "40", "--count", "2"]
    assert main([*SAMPLE, "--steps", "3", "--seed", "4", "--width", "48", *options]) == 0
    assert seen["prompts"] == ["a red circle"] * 2
    assert seen["steps"] == 3 and seen["guidance"] == 2.5
    assert seen["negative"] == "a blue square"
    assert seen["size"] == (40, 48)
    assert seen["generator"].initial_seed() == 4


def test_height_and_width_are_those_of_the_image(here):
    assert main([*SAMPLE, "--height", "40", "--width", "48"]) == 0
    assert Image.open(here / "out.png").size == (48 * 5, 40 * 5)  # enlarged to about 256 pixels


def test_several_prompts_make_one_sheet_with_captions(here):
    assert main(["sample", "a red circle", "a blue square", "--model", "run", "--steps", "2"]) == 0
    width_of_one = image_sheet(torch.zeros(1, 3, 32, 32), ["a"], columns=4).width
    assert Image.open(here / "out.png").width > 1.8 * width_of_one


def test_a_caption_that_is_too_long_is_cut_and_said(here, capsys):
    prompt = "a red circle " * 40 + "and a zebra"
    with warnings.catch_warnings():
        warnings.simplefilter("always")  # pyproject.toml makes errors of our warnings
        assert main(["sample", prompt, "--model", "run", "--steps", "1"]) == 0
    errors = capsys.readouterr().err
    assert "cut off" in errors and "and a zebra" in errors
    assert "warnings.warn" not in errors


# ---- evaluate, info, and all of it as a process ------------------------------------------------


@pytest.mark.slow
def test_evaluate_prints_a_table_or_json(here, capsys):
    command = [*EVALUATE, "--captions", "4", "--guidance", "1", "3"]
    assert main(command) == 0
    table = capsys.readouterr().out
    assert "w = 1" in table and "w = 3" in table and "prompt accuracy" in table
    assert main([*command, "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert set(scores["guidance"]) == {"1", "3"}
    assert set(scores["ceiling"]) >= {"all", "colour", "shape", "count"}


def test_info_counts_stable_diffusion(capsys):
    assert main(["info", "--size", "sd1"]) == 0
    said = capsys.readouterr().out
    for parameters in ("859,520,964", "83,653,863", "123,060,480"):
        assert parameters in said


def test_as_a_user_types_it_from_another_folder(here):
    """A real process: no traceback for a typing mistake, and an image for a right command."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def run(*words):
        command = [sys.executable, "-m", "ldm_minimal", *words]
        return subprocess.run(
            command, cwd=here, env=environment, capture_output=True, text=True, timeout=120
        )

    wrong = run("sampel", "a red circle")
    assert wrong.returncode == 2
    assert len(wrong.stderr.strip().splitlines()) == 1 and "sampel" in wrong.stderr
    right = run(*SAMPLE)
    assert right.returncode == 0, right.stderr
    assert "out.png" in right.stdout and (here / "out.png").exists()
