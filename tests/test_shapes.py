"""The shapes data set keeps its promises, and its oracle reads images right."""

import json
import re
import sys
from collections import defaultdict

import numpy as np
import pytest
from PIL import Image, ImageFilter

from data_sets import DATA, content_hash, digest, lines

sys.path.insert(0, str(DATA / "shapes"))
import oracle
import prepare
from prepare import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT,
    RELATIONS,
    SHAPES,
    TEXTURES,
    WORDS,
    Scene,
    Thing,
)


@pytest.fixture(scope="module", params=[1, 2], ids=["version-1", "version-2"])
def version(request):
    return request.param


@pytest.fixture(scope="module")
def drawn(version):
    return scenes_of(version)


@pytest.fixture(scope="module")
def drawn_2():
    return scenes_of(2)


def scenes_of(version):
    """1,000 (scene, caption, image), a third of them with held-out pairs."""
    rng = np.random.default_rng(7)
    scenes = [prepare.random_scene(rng, rng.random() < 1 / 3, version) for _ in range(1000)]
    captions = [prepare.describe(scene, rng, version) for scene in scenes]
    return [(scene, text, prepare.draw(scene, 32)) for scene, text in zip(scenes, captions)]


@pytest.fixture(scope="module")
def readings(drawn):
    """What the oracle reads in the first 400."""
    return [oracle.read(image) for _, _, image in drawn[:400]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, version):
    out = tmp_path_factory.mktemp("shapes") / "data"
    prepare.prepare(out, size=32, count=2000, seed=3, version=version)
    return out


def kinds(line):
    return [(thing["colour"], thing["shape"]) for thing in line["scene"]["things"]]


def one(shape="circle", colour="red", size="large", texture="plain", background="white", side=32):
    """The image of one object in the middle."""
    thing = Thing(shape, colour, size, texture, 0.5, 0.5, prepare.SIZES[size])
    return prepare.draw(Scene(background, (thing,)), side)


def is_right(image, caption):
    return all(oracle.grade(image, caption).values())


# ---- the data set ----


def test_a_seed_names_its_bytes(tmp_path):
    for name, seed in (("first", 5), ("again", 5), ("other", 6)):
        prepare.prepare(tmp_path / name, size=24, count=60, seed=seed)
    first, again, other = (digest(tmp_path / name) for name in ("first", "again", "other"))
    assert len(first) == 60 + 3 and first == again
    assert first["train/00000.png"] != other["train/00000.png"]


@pytest.mark.parametrize(
    ("version", "number", "expected"),
    [
        (1, 5, "98d74f8cbdb652a082350f75aaf34ee6a64f04069ffff4cd105cb6bbc9bb4932"),
        (2, 7, "3c05302324878451ab1f249c4a74f0baeb09396e673f5dcef6e0b1d4a883cdb4"),
    ],
)
def test_a_version_stays_what_it_is(tmp_path, version, number, expected):
    """Every caption and pixel. Who changes them gives the data set another number."""
    prepare.prepare(tmp_path / "set", size=24, count=60, seed=5, version=version)
    assert json.loads((tmp_path / "set" / "dataset.json").read_text())["version"] == number
    assert content_hash(tmp_path / "set") == expected


def test_there_are_two_versions(tmp_path):
    with pytest.raises(ValueError, match="version is 3; allowed are 1 and 2"):
        prepare.prepare(tmp_path / "set", version=3)
    assert not list(tmp_path.iterdir())


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


def test_images_show_their_metadata(folder):
    for line in lines(folder, "test")[:20]:
        things = tuple(Thing(**thing) for thing in line["scene"]["things"])
        scene = Scene(line["scene"]["background"], things)
        image = np.asarray(Image.open(folder / "test" / line["file_name"]))
        np.testing.assert_array_equal(image, prepare.draw(scene, 32))


def test_scenes_are_whole_clear_and_never_diagonal(drawn, version):
    for scene, _, _ in drawn:
        for thing in scene.things:
            assert thing.radius <= min(thing.x, thing.y, 1 - thing.x, 1 - thing.y) + 1e-4
            if version == 1:
                assert thing.radius == prepare.SIZES[thing.size]
                assert {thing.x, thing.y} <= set(prepare.LINES)
            else:
                assert thing.radius in prepare.RADII[thing.size]
        if len(scene.things) == 2:
            first, second = scene.things
            apart, aside = sorted((abs(first.x - second.x), abs(first.y - second.y)), reverse=True)
            assert apart >= first.radius + second.radius + 2 / 32 - 1e-4
            assert aside < apart / 2 if version == 1 else aside <= apart / 2


def test_objects_are_in_many_places(drawn_2):
    """Data of few positions and sizes can be learned by heart."""
    alone = [scene.things[0] for scene, _, _ in drawn_2 if len(scene.things) == 1]
    assert len({(thing.x, thing.y) for thing in alone}) == 25
    assert len({thing.radius for thing in alone}) == 6
    beside = [scene.things[0] for scene, _, _ in drawn_2 if len(scene.things) == 2]
    assert len({(thing.x, thing.y) for thing in beside}) == 6  # three of a column, three of a row


def test_either_object_is_named_first(drawn_2):
    first = [
        oracle.parse(caption).relation in ("left of", "above")
        for scene, caption, _ in drawn_2
        if len(scene.things) == 2
    ]
    assert 0.45 < np.mean(first) < 0.55


# ---- pairs ----


def changes(first, second):
    """The attributes in which the objects of two scenes differ, place by place."""
    names = set()
    for a, b in zip(first.things, second.things, strict=True):
        names |= {name for name, value in vars(a).items() if vars(b)[name] != value}
    return names


def test_a_twin_differs_in_which_attribute_goes_where(drawn_2):
    rng = np.random.default_rng(1)
    seen = set()
    for scene, _, _ in drawn_2:
        if set(kinds_of(scene)) & set(HELD_OUT):
            continue
        twin = prepare.twin(rng, scene)
        assert twin.background == scene.background
        assert not set(kinds_of(twin)) & set(HELD_OUT)
        for thing in twin.things:
            assert thing.size == "large" or thing.texture == "plain"
            assert thing.radius in prepare.RADII[thing.size]
        changed = changes(scene, twin)
        assert changed != {"radius"}, "no caption tells these two apart"
        assert not changed & {"x", "y"}
        if len(scene.things) == 2:
            for name in changed:  # exchanged, not changed
                values = [getattr(thing, name) for thing in scene.things]
                assert [getattr(thing, name) for thing in twin.things] == values[::-1]
        seen.add((len(scene.things), frozenset(changed - {"radius"})))
    size = {frozenset({"size"}), frozenset({"size", "texture"})}
    alone = size | {frozenset({"colour"}), frozenset({"shape"}), frozenset({"texture"})}
    both = alone | {frozenset({"colour", "shape"})}
    assert {names for count, names in seen if count == 1} == alone
    assert {names for count, names in seen if count == 2} == both


def kinds_of(scene):
    return [(thing.colour, thing.shape) for thing in scene.things]


def test_the_training_set_of_version_2_lies_in_pairs(folder, version):
    train = lines(folder, "train")
    if version == 1:
        assert not any("pair" in line for line in train)
        return
    for first, second in zip(train[::2], train[1::2]):
        assert first["pair"] == second["pair"]
        places = [[(t["x"], t["y"]) for t in r["scene"]["things"]] for r in (first, second)]
        assert places[0] == places[1]
    assert len({line["pair"] for line in train}) == len(train) / 2
    assert not any("pair" in line for line in lines(folder, "test"))


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
    image = one("square", "yellow", texture=texture, side=320)  # 10 pixels to one of size 32
    down = image[:, 160].astype(int).sum(1)
    dark = down[down < 765] < 0.75 * sum(COLOURS["yellow"])
    changes = np.flatnonzero(np.diff(dark))
    assert len(changes) >= 4 and 2 * np.diff(changes).min() >= 4 * 10
    across = image[160].astype(int).sum(1)
    assert (across < 0.75 * sum(COLOURS["yellow"])).any() == (texture == "checked")


def test_colours_and_their_shades_stay_apart():
    colours = np.array(list(COLOURS.values())) / 255
    backgrounds = np.array(list(BACKGROUNDS.values())) / 255

    def least(a, b):
        distance = np.linalg.norm(a[:, None] - b, axis=2)
        return distance[distance > 0].min()

    assert least(colours, colours) > 0.3 and least(backgrounds, backgrounds) > 0.3
    assert least(colours, backgrounds) > 0.35 and least(colours * prepare.SHADE, backgrounds) > 0.3


# ---- captions ----


def test_parse_recovers_what_describe_stated(drawn, version):
    stated_size = []
    stated_background = []
    plain_pairs = []  # nothing stated but colours, shapes and the relation
    for scene, caption, _ in drawn:
        assert caption == caption.lower()
        assert all(oracle.grade_scene(scene, caption).values())
        stated = oracle.parse(caption)
        textures = {thing["texture"] for thing in stated.things if "texture" in thing}
        assert textures >= {thing.texture for thing in scene.things} - {"plain"}
        stated_size += ["size" in thing for thing in stated.things]
        stated_background.append(stated.background is not None)
        bare = stated.background is None and all(len(thing) == 2 for thing in stated.things)
        plain_pairs.append(bare and len(stated.things) == 2)
    assert np.mean(stated_size) == pytest.approx(prepare.SIZE_TOLD[version], abs=0.05)
    assert np.mean(stated_background) == pytest.approx(0.5, abs=0.05)
    assert np.mean(plain_pairs) > {1: 0.06, 2: 0.03}[version]


def test_parse_by_hand():
    caption = "a little striped green heart is to the left of an orange cross"
    heart = {"size": "small", "texture": "striped", "colour": "green", "shape": "heart"}
    cross = {"colour": "orange", "shape": "cross"}
    stated = oracle.parse(f"{caption}, on a black background")
    assert stated == oracle.Stated((heart, cross), "left of", "black")
    circle = {"colour": "red", "shape": "circle"}
    assert oracle.parse("a red circle") == oracle.Stated((circle,), None, None)


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "red circle",
        "a circle",
        "a red dog",
        "a red circle above",
        "A red circle",
        "a red circle and a blue square",
        "a red circle on a pink background",
    ],
)
def test_parse_refuses_what_is_no_caption(caption):
    with pytest.raises(ValueError, match=re.escape(f"caption {caption!r}")):
        oracle.parse(caption)


# ---- reading and grading ----


def test_every_stated_attribute_of_a_clean_image_holds(drawn, readings):
    held = []
    for read, (_, caption, _) in zip(readings, drawn):
        held.append(all(oracle.grade_scene(read, caption).values()))
    assert np.mean(held) >= 0.995


def distance(thing, other):
    """The largest error in position and size."""
    return max(abs(thing.x - other.x), abs(thing.y - other.y), abs(thing.radius - other.radius))


def test_a_reading_is_the_scene(drawn, readings):
    """Positions and sizes too: within half a pixel, median far below."""
    errors = []
    for (scene, _, _), read in zip(drawn, readings):
        for thing in scene.things:
            errors.append(min((distance(thing, other) for other in read.things), default=1))
    assert np.median(errors) * 32 < 0.1 and np.quantile(errors, 0.99) * 32 < 0.5


def noisy(image, rng, sigma):
    return np.clip(image / 255 + rng.normal(0, sigma, image.shape), 0, 1)


def halved_and_enlarged(image, resampling):
    small = Image.fromarray(image).resize((16, 16), resampling)
    return np.asarray(small.resize((32, 32), resampling))


def blurred_and_tinted(image, rng):
    """Blurred, noisy, and each channel a little too bright or too dark."""
    blurred = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(0.8)))
    tint = 0.03 * rng.choice([-1, 1], 3)
    return np.clip(blurred / 255 + rng.normal(0, 0.03, image.shape) + tint, 0, 1)


def spoilt(image, how, rng):
    if how == "noise":
        return noisy(image, rng, 0.05)
    if how == "mixed":
        return blurred_and_tinted(image, rng)
    return halved_and_enlarged(image, Image.Resampling[how])


@pytest.mark.slow
@pytest.mark.parametrize(
    "how, least", [("noise", 0.97), ("BILINEAR", 0.97), ("BICUBIC", 0.97), ("mixed", 0.95)]
)
def test_spoilt_images_are_still_read(drawn, how, least):
    rng = np.random.default_rng(11)
    right = [is_right(spoilt(image, how, rng), caption) for _, caption, image in drawn[:150]]
    assert np.mean(right) >= least


@pytest.mark.parametrize("side", [48, 64, 128])
def test_other_sizes_are_read(side, version):
    rng = np.random.default_rng(side)
    scenes = [prepare.random_scene(rng, version=version) for _ in range(20)]
    right = [is_right(prepare.draw(scene, side), prepare.describe(scene, rng)) for scene in scenes]
    assert np.mean(right) >= 0.95


NAMES = {"colour": COLOURS, "shape": SHAPES, "texture": TEXTURES, "background": BACKGROUNDS}
RELATION = r" (?:is )?(?:to the left|left|to the right|right|above|over|below|under)\b"


def word_tables():
    """{attribute: {word: what it means}}"""
    tables = {attribute: {name: name for name in names} for attribute, names in NAMES.items()}
    tables["size"] = oracle.meanings(WORDS)
    tables["relation"] = oracle.meanings(RELATIONS)
    return tables


def alterations(caption, rng):
    """{attribute: the caption with exactly that one changed}, for each attribute that it states."""
    changed = {}
    for attribute, meaning in word_tables().items():
        words = "|".join(sorted(meaning, key=len, reverse=True))
        found = list(re.finditer(rf"\b({words})\b", caption))
        if found:
            match = prepare.pick(rng, found)
            others = [word for word in meaning if meaning[word] != meaning[match[0]]]
            other = prepare.pick(rng, others)
            changed[attribute] = caption[: match.start()] + other + caption[match.end() :]
    objects, background = re.fullmatch(r"(.*?)(,? on a \w+ background)?", caption).groups()
    first, *more = re.split(RELATION, objects)
    altered = first if more else f"{objects} above a red heart"
    changed["count"] = altered + (background or "")
    return changed


def test_a_caption_altered_in_one_attribute_fails(drawn, readings):
    rng = np.random.default_rng(17)
    refused = defaultdict(list)
    for read, (_, caption, _) in zip(readings, drawn):
        for attribute, altered in alterations(caption, rng).items():
            assert altered != caption
            refused[attribute].append(not all(oracle.grade_scene(read, altered).values()))
    assert set(refused) == {"colour", "shape", "texture", "background", "size", "relation", "count"}
    assert min(len(answers) for answers in refused.values()) > 60
    assert min(np.mean(answers) for answers in refused.values()) >= 0.99


def test_grade_names_what_fails():
    image = one("square", "blue", background="grey")
    assert oracle.grade(image, "a large blue circle on a grey background") == {
        "count": True,
        "shape 1": False,
        "colour 1": True,
        "size 1": True,
        "background": True,
    }
    assert oracle.grade(image, "a red star above a blue square") == {
        "count": False,
        "shape 1": False,
        "colour 1": False,
        "shape 2": True,
        "colour 2": True,
        "relation": False,
    }


@pytest.mark.parametrize(
    "turns, truth", [(0, "above"), (1, "left of"), (2, "below"), (3, "right of")]
)
def test_relations_mean_what_they_say(turns, truth):
    """On an image painted by hand: the red square on top, the blue one below; then turned."""
    image = np.full((32, 32, 3), 255, np.uint8)
    image[2:14, 10:22] = COLOURS["red"]
    image[18:30, 10:22] = COLOURS["blue"]
    image = np.rot90(image, turns)
    for name, wordings in RELATIONS.items():
        for words in wordings:
            caption = f"a red square {words} a blue square on a white background"
            marks = oracle.grade(image, caption)
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
    image = one(shape, size=size).copy()
    image[:, 16:] = BACKGROUNDS["white"]
    assert not oracle.grade(image, f"a red {shape}")["shape 1"]


def test_shapes_that_do_not_exist_are_unknown():
    """A thin bar, a ring and a diagonal cross: none passes as any shape."""
    v, u = np.mgrid[-1:1:32j, -1:1:32j]
    masks = {
        "bar": (abs(v) < 0.12) & (abs(u) < 0.5),
        "ring": abs(np.hypot(u, v) - 0.4) < 0.1,
        "x": (np.minimum(abs(u + v), abs(u - v)) < 0.12) & (np.maximum(abs(u), abs(v)) < 0.45),
    }
    for name, mask in masks.items():
        image = np.where(mask[..., None], COLOURS["red"], BACKGROUNDS["white"]).astype(np.uint8)
        assert {thing.shape for thing in oracle.read(image).things} == {"unknown"}, name


def test_an_extra_blob_is_counted_and_a_speck_is_not():
    image = one("circle").copy()
    image[3, 3] = 0
    assert all(oracle.grade(image, "a red circle").values())
    image[2:6, 2:6] = 0
    marks = oracle.grade(image, "a red circle")
    assert marks == {"count": False, "shape 1": True, "colour 1": True}


def test_uint8_and_float_read_alike_and_other_arrays_are_refused():
    image = one("heart", "pink", texture="striped")
    assert oracle.read(image) == oracle.read(image / 255)
    wrong = {"(32, 32)": image[..., 0], "(8, 32, 3)": image[:8], "float64": image / 127.5 - 1}
    for named, array in wrong.items():
        with pytest.raises(ValueError, match=re.escape(named)):
            oracle.read(array)
