"""The shapes data set keeps its promises, and its oracle reads pictures right: measured on 2,000 drawn scenes."""
import hashlib
import json
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

SHAPES_FOLDER = Path(__file__).parents[1] / "data" / "shapes"
sys.path.insert(0, str(SHAPES_FOLDER))
import oracle  # noqa: E402
import prepare  # noqa: E402
from prepare import BACKGROUNDS, COLOURS, HELD_OUT, RELATIONS, SHAPES, TEXTURES, WORDS, Scene, Thing  # noqa: E402


@pytest.fixture(scope="module")
def drawn():
    """2,000 (scene, caption, picture), a third of them with held-out pairs."""
    rng = np.random.default_rng(7)
    scenes = [prepare.random_scene(rng, held_out=rng.random() < 1 / 3) for _ in range(2000)]
    return [(scene, prepare.describe(scene, rng), prepare.draw(scene, 32)) for scene in scenes]


@pytest.fixture(scope="module")
def readings(drawn):
    return [oracle.read(picture) for _, _, picture in drawn]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("shapes") / "data"
    prepare.prepare(out, size=32, count=2000, seed=3)
    return out


def lines(folder, part):
    return [json.loads(line) for line in (folder / part / "metadata.jsonl").read_text().splitlines()]


def kinds(line):
    return [(thing["colour"], thing["shape"]) for thing in line["scene"]["things"]]


def digest(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def one(shape="circle", colour="red", size="large", texture="plain", background="white", radius=None, side=32):
    radius = radius or prepare.SIZES[size]
    return prepare.draw(Scene(background, (Thing(shape, colour, size, texture, 0.5, 0.5, radius),)), side)


def share_held(drawn, spoil):
    return np.mean([all(oracle.grade(spoil(picture), caption).values()) for _, caption, picture in drawn])


# ---- the data set ----------------------------------------------------------------------------------------------

def test_a_seed_names_its_bytes(tmp_path):
    for name, seed in (("first", 5), ("again", 5), ("other", 6)):
        prepare.prepare(tmp_path / name, size=24, count=60, seed=seed)
    first, again, other = (digest(tmp_path / name) for name in ("first", "again", "other"))
    assert len(first) == 60 + 3 and first == again
    assert first["train/00000.png"] != other["train/00000.png"]


def test_splits_and_held_out_pairs(folder):
    train, test = lines(folder, "train"), lines(folder, "test")
    assert (len(train), len(test)) == (1800, 200)
    assert {line["split"] for line in train} == {"train"}
    composition = [line["split"] == "composition" for line in test]
    assert sum(composition) == 50 and 0 < sum(composition[:100]) < 50  # interleaved
    for line in train + test:
        assert any(kind in HELD_OUT for kind in kinds(line)) == (line["split"] == "composition")
        assert len(set(kinds(line))) == len(kinds(line))
    assert 0.35 < np.mean([len(kinds(line)) == 1 for line in train]) < 0.45


def test_held_out_pairs_are_one_of_each_shape_and_no_favourite():
    assert sorted(shape for _, shape in HELD_OUT) == sorted(SHAPES)
    assert len({colour for colour, _ in HELD_OUT}) == 6
    assert not {("red", "circle"), ("blue", "square")} & set(HELD_OUT)


def test_no_test_caption_was_seen_before(folder):
    test = [line["text"] for line in lines(folder, "test")]
    assert len(set(test)) == len(test)
    assert not set(test) & {line["text"] for line in lines(folder, "train")}


def test_pictures_show_their_metadata(folder):
    for line in lines(folder, "test")[:20]:
        scene = Scene(line["scene"]["background"], tuple(Thing(**thing) for thing in line["scene"]["things"]))
        picture = np.asarray(Image.open(folder / "test" / line["file_name"]))
        np.testing.assert_array_equal(picture, prepare.draw(scene, 32))


def test_scenes_are_whole_clear_and_never_diagonal(drawn):
    for scene, _, _ in drawn:
        for thing in scene.things:
            assert thing.radius <= min(thing.x, thing.y, 1 - thing.x, 1 - thing.y) + 1e-4
            assert thing.radius == prepare.SIZES[thing.size]
            assert {thing.x, thing.y} <= set(prepare.LINES)
        if len(scene.things) == 2:
            first, second = scene.things
            apart, aside = sorted((abs(first.x - second.x), abs(first.y - second.y)), reverse=True)
            assert apart >= first.radius + second.radius + 2 / 32 - 1e-4 and aside < apart / 2


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_fills_its_box_and_no_more(shape):
    v, u = np.mgrid[-1.5:1.5:301j, -1.5:1.5:301j]
    inside = SHAPES[shape](u, v)
    assert not inside[(abs(u) > 1) | (abs(v) > 1)].any()
    assert 1.4 < inside.mean() * 9 < 3.0  # of the box's 4
    assert 1.7 < np.ptp(u[inside]) <= 2 and 1.7 < np.ptp(v[inside]) <= 2


def test_edges_are_antialiased_and_sizes_agree():
    cover = prepare.coverage(Thing("circle", "red", "large", "plain", 0.47, 0.52, 0.2), 32)[0]
    assert ((cover > 0.1) & (cover < 0.9)).sum() > 15
    assert abs(cover.sum() - np.pi * (0.95 * 0.2 * 32) ** 2) < 0.5
    fine = one(side=128).reshape(32, 4, 32, 4, 3).mean((1, 3))
    assert abs(fine - one()).max() < 12


@pytest.mark.parametrize("texture", ["striped", "checked"])
def test_a_texture_repeats_at_least_every_four_pixels(texture):
    """A clearly darker shade, and bands of two pixels or more between changes."""
    picture = one("square", "yellow", texture=texture, side=320)
    down = picture[:, 160].astype(int).sum(1)
    dark = down[down < 765] < 0.75 * sum(COLOURS["yellow"])
    changes = np.flatnonzero(np.diff(dark))
    assert len(changes) >= 4 and 2 * np.diff(changes).min() >= 4 * 10  # 10 fine pixels to one of size 32
    across = picture[160].astype(int).sum(1)
    assert (across < 0.75 * sum(COLOURS["yellow"])).any() == (texture == "checked")


def test_colours_and_their_shades_stay_apart():
    colours, backgrounds = (np.array(list(table.values())) / 255 for table in (COLOURS, BACKGROUNDS))
    def least(a, b):
        distance = np.linalg.norm(a[:, None] - b, axis=2)
        return distance[distance > 0].min()
    assert least(colours, colours) > 0.3 and least(backgrounds, backgrounds) > 0.3
    assert least(colours, backgrounds) > 0.35 and least(colours * prepare.SHADE, backgrounds) > 0.3


# ---- captions --------------------------------------------------------------------------------------------------

def test_parse_recovers_what_describe_stated(drawn):
    stated_size, stated_background, plain_pairs = [], [], []
    for scene, caption, _ in drawn:
        assert caption == caption.lower()
        stated, best = oracle.parse(caption), oracle.grade_scene(scene, caption)
        assert all(best.values())
        assert {thing["texture"] for thing in stated.things if "texture" in thing} >= {
            thing.texture for thing in scene.things if thing.texture != "plain"}
        stated_size += ["size" in thing for thing in stated.things]
        stated_background.append(stated.background is not None)
        plain_pairs.append(len(stated.things) == 2 and stated.background is None
                           and all(len(thing) == 2 for thing in stated.things))
    assert 0.3 < np.mean(stated_size) < 0.4 and 0.45 < np.mean(stated_background) < 0.55
    assert np.mean(plain_pairs) > 0.06


def test_parse_by_hand():
    stated = oracle.parse("a little striped green heart is to the left of an orange cross, on a black background")
    assert stated == oracle.Stated(({"size": "small", "texture": "striped", "colour": "green", "shape": "heart"},
                                    {"colour": "orange", "shape": "cross"}), "left of", "black")
    assert oracle.parse("a red circle") == oracle.Stated(({"colour": "red", "shape": "circle"},), None, None)


@pytest.mark.parametrize("caption", ["", "red circle", "a circle", "a red dog", "a red circle above", "A red circle",
                                     "a red circle and a blue square", "a red circle on a pink background"])
def test_parse_refuses_what_is_no_caption(caption):
    with pytest.raises(ValueError, match=re.escape(f"caption {caption!r}")):
        oracle.parse(caption)


# ---- reading and grading ---------------------------------------------------------------------------------------

def test_every_stated_attribute_of_a_clean_picture_holds(drawn, readings):
    held = [all(oracle.grade_scene(read, caption).values()) for read, (_, caption, _) in zip(readings, drawn)]
    assert np.mean(held) >= 0.995


def test_a_reading_is_the_scene(drawn, readings):
    """Places and sizes too: within half a pixel, median far below."""
    errors = []
    for (scene, _, _), read in zip(drawn, readings):
        for thing in scene.things:
            errors.append(min((max(abs(thing.x - other.x), abs(thing.y - other.y), abs(thing.radius - other.radius))
                               for other in read.things), default=1))
    assert np.median(errors) * 32 < 0.1 and np.quantile(errors, 0.99) * 32 < 0.5


@pytest.mark.parametrize("name,least", [("noise", 0.97), ("bilinear", 0.97), ("bicubic", 0.97), ("mixed", 0.95)])
def test_spoilt_pictures_are_still_read(drawn, name, least):
    rng = np.random.default_rng(11)

    def resized(picture, filter):
        return np.asarray(Image.fromarray(picture).resize((16, 16), filter).resize((32, 32), filter))

    def noisy(picture, sigma, shift=0.0):
        return np.clip(picture / 255 + rng.normal(0, sigma, picture.shape) + shift * rng.choice([-1, 1], 3), 0, 1)

    spoil = {"noise": lambda picture: noisy(picture, 0.05),
             "bilinear": lambda picture: resized(picture, Image.Resampling.BILINEAR),
             "bicubic": lambda picture: resized(picture, Image.Resampling.BICUBIC),
             "mixed": lambda picture: noisy(np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(0.8))),
                                            0.03, 0.03)}[name]
    assert share_held(drawn[:300], spoil) >= least


def test_other_sizes_are_read():
    rng = np.random.default_rng(13)
    for side in (48, 64, 128):
        scenes = [prepare.random_scene(rng) for _ in range(20)]
        assert np.mean([all(oracle.grade(prepare.draw(scene, side), prepare.describe(scene, rng)).values())
                        for scene in scenes]) >= 0.95


def alterations(caption, rng):
    """{attribute: the caption with exactly that attribute changed}, for each attribute that it states."""
    words = {"colour": {name: (name,) for name in COLOURS}, "shape": {name: (name,) for name in SHAPES},
             "texture": {name: (name,) for name in TEXTURES}, "background": {name: (name,) for name in BACKGROUNDS},
             "size": WORDS, "relation": RELATIONS}
    changed = {}
    for attribute, table in words.items():
        meaning = {word: name for name, wordings in table.items() for word in wordings}
        found = list(re.finditer(rf"\b({'|'.join(sorted(meaning, key=len, reverse=True))})\b", caption))
        if found:
            match = prepare.pick(rng, found)
            other = prepare.pick(rng, [word for word in meaning if meaning[word] != meaning[match[0]]])
            changed[attribute] = caption[:match.start()] + other + caption[match.end():]
    things, background = re.fullmatch(r"(.*?)(,? on a \w+ background)?", caption).groups()
    first, *more = re.split(r" (?:is )?(?:to the left|left|to the right|right|above|over|below|under)\b", things)
    changed["count"] = (first if more else things + " above a red heart") + (background or "")
    return changed


def test_a_caption_altered_in_one_attribute_fails(drawn, readings):
    rng, refused = np.random.default_rng(17), defaultdict(list)
    for read, (_, caption, _) in zip(readings, drawn):
        for attribute, altered in alterations(caption, rng).items():
            assert altered != caption
            refused[attribute].append(not all(oracle.grade_scene(read, altered).values()))
    assert set(refused) == {"colour", "shape", "texture", "background", "size", "relation", "count"}
    assert min(len(answers) for answers in refused.values()) > 300
    assert min(np.mean(answers) for answers in refused.values()) >= 0.99


def test_grade_names_what_fails():
    picture = one("square", "blue", background="grey")
    assert oracle.grade(picture, "a large blue circle on a grey background") == {
        "count": True, "shape 1": False, "colour 1": True, "size 1": True, "background": True}
    assert oracle.grade(picture, "a red star above a blue square") == {
        "count": False, "shape 1": False, "colour 1": False, "shape 2": True, "colour 2": True, "relation": False}


@pytest.mark.parametrize("turn,truth", [(0, "above"), (1, "left of"), (2, "below"), (3, "right of")])
def test_relations_mean_what_they_say(turn, truth):
    """On a picture painted by hand: the red square in the rows on top, the blue one below, then turned."""
    picture = np.full((32, 32, 3), 255, np.uint8)
    picture[2:14, 10:22], picture[18:30, 10:22] = COLOURS["red"], COLOURS["blue"]
    picture = np.rot90(picture, turn)
    for name, wordings in RELATIONS.items():
        for words in wordings:
            marks = oracle.grade(picture, f"a red square {words} a blue square on a white background")
            assert marks.pop("relation") == (name == truth) and all(marks.values())


def test_blank_and_noise_do_not_pass():
    rng = np.random.default_rng(19)
    for background in BACKGROUNDS.values():
        assert oracle.read(np.full((32, 32, 3), background, np.uint8)).things == ()
    for _ in range(10):
        marks = oracle.grade(rng.random((32, 32, 3)), "a red circle")
        assert not (marks["count"] and marks["shape 1"] and marks["colour 1"])


@pytest.mark.parametrize("shape", ["circle", "square", "star", "heart", "cross"])
@pytest.mark.parametrize("size", ["small", "large"])
def test_half_a_shape_is_not_the_shape(shape, size):
    picture = one(shape, size=size).copy()
    picture[:, 16:] = BACKGROUNDS["white"]
    assert not oracle.grade(picture, f"a red {shape}")["shape 1"]


def test_shapes_that_do_not_exist_are_unknown():
    """A thin bar, a ring and a diagonal cross: none passes as any shape."""
    v, u = np.mgrid[-1:1:32j, -1:1:32j]
    masks = {"bar": (abs(v) < 0.12) & (abs(u) < 0.5), "ring": abs(np.hypot(u, v) - 0.4) < 0.1,
             "x": (np.minimum(abs(u + v), abs(u - v)) < 0.12) & (np.maximum(abs(u), abs(v)) < 0.45)}
    for name, mask in masks.items():
        picture = np.where(mask[..., None], COLOURS["red"], BACKGROUNDS["white"]).astype(np.uint8)
        assert {thing.shape for thing in oracle.read(picture).things} == {"unknown"}, name


def test_an_extra_blob_is_counted_and_a_speck_is_not():
    picture = one("circle").copy()
    picture[3, 3] = 0
    assert all(oracle.grade(picture, "a red circle").values())
    picture[2:6, 2:6] = 0
    assert oracle.grade(picture, "a red circle") == {"count": False, "shape 1": True, "colour 1": True}


def test_uint8_and_float_read_alike_and_other_arrays_are_refused():
    picture = one("heart", "pink", texture="striped")
    assert oracle.read(picture) == oracle.read(picture / 255)
    for wrong, named in ((picture[..., 0], "(32, 32)"), (picture / 127.5 - 1, "float64"), (picture[:8], "(8, 32, 3)")):
        with pytest.raises(ValueError, match=re.escape(named)):
            oracle.read(wrong)


# ---- the command -----------------------------------------------------------------------------------------------

def command(*arguments):
    done = subprocess.run([sys.executable, SHAPES_FOLDER / "prepare.py", *map(str, arguments)], text=True,
                          capture_output=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("arguments,named", [
    (["--size", 8], ["size", "8", "16"]), (["--count", 5], ["count", "5", "20"]), (["--seed", -1], ["seed", "-1", "0"]),
    (["--size", "big"], ["--size", "big", "int"])])
def test_wrong_arguments_get_one_clear_line(tmp_path, arguments, named):
    status, _, complaint = command("--out", tmp_path / "out", *arguments)
    assert status != 0 and len(complaint.splitlines()) == 1
    assert all(word in complaint for word in named)
    assert not list(tmp_path.iterdir())


def test_an_unwritable_or_foreign_folder_is_left_alone(tmp_path):
    letter = tmp_path / "letter.txt"
    letter.write_text("dear reader")
    for out in (letter / "data", letter, tmp_path):
        status, _, complaint = command("--count", 20, "--out", out)
        assert status != 0 and len(complaint.splitlines()) == 1 and "out" in complaint and str(out) in complaint
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"] and letter.read_text() == "dear reader"


def test_the_same_data_set_is_kept_and_another_replaces_it(tmp_path):
    out = tmp_path / "data"
    assert command("--count", 20, "--out", out)[0] == 0
    picture = out / "train" / "00000.png"
    born, before = picture.stat().st_mtime_ns, digest(out)
    status, said, _ = command("--count", 20, "--out", out)
    assert status == 0 and "already" in said and picture.stat().st_mtime_ns == born
    assert command("--count", 20, "--seed", 1, "--out", out)[0] == 0
    assert digest(out) != before and not (tmp_path / "data.partial").exists()


def test_a_killed_run_leaves_nothing_that_looks_complete(tmp_path, monkeypatch):
    out, calls, draw = tmp_path / "data", [], prepare.draw

    def interrupted(*scene):
        calls.append(scene)
        if len(calls) > 10:
            raise KeyboardInterrupt
        return draw(*scene)

    monkeypatch.setattr(prepare, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(out, count=20)
    assert not out.exists() and (tmp_path / "data.partial").is_dir()
    monkeypatch.undo()
    prepare.prepare(out, count=20)
    assert len(lines(out, "train")) == 18 and not (tmp_path / "data.partial").exists()
