"""Draws the `shapes` data set: small captioned scenes whose truth is known.

    python data/shapes/prepare.py --size 32 --count 20000 --seed 0 --out DIR

A scene is one or two objects (shape, colour, size, texture) on a background. It is drawn
antialiased at any image size and described in one English sentence. The folder follows the
imagefolder convention of the Hugging Face `datasets` library: DIR/train and DIR/test, each with PNG
files and a metadata.jsonl of {"file_name", "text", "split", "scene"} lines. Six (colour, shape)
pairs, HELD_OUT, never occur in training; the part of the test set called "composition" shows them.
`oracle.py` beside this file reads an image back.

Coordinates are fractions of the image: x to the right, y DOWN, radius half the box that a shape
fills.
"""

import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

# By path, because the scripts are run and loaded by path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "common"))
import imagefolder

# ---- what a scene can hold -----------------------------------------------------------------------


@dataclass(frozen=True)
class Thing:
    """One drawn object; x, y and radius are fractions of the image."""

    shape: str
    colour: str
    size: str
    texture: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """A background and the objects on it, none touching another."""

    background: str
    things: tuple[Thing, ...]


# Is the point (u, v) inside? The box is [-1, 1] x [-1, 1], v down. The proportions make all six
# shapes look equally big.


def circle(u, v):
    return u**2 + v**2 < 0.95**2


def square(u, v):
    return np.maximum(abs(u), abs(v)) < 0.86


def triangle(u, v):
    return (v < 0.84) & (abs(u) < (v + 0.96) / 1.8)


def star(u, v, outer=1.06, inner=0.50):
    """Folds the plane into half a spike, a tenth of the turn; there the star has one edge."""
    turn = np.arctan2(u, -(v - 0.08)) * 5 / (2 * np.pi)
    angle = np.abs(turn - np.round(turn)) * 2 * np.pi / 5  # 0 at a tip, pi/5 at a notch
    distance = np.hypot(u, v - 0.08)
    tall = inner * np.cos(np.pi / 5) - outer
    wide = inner * np.sin(np.pi / 5)
    return (distance * np.cos(angle) - outer) * wide < distance * np.sin(angle) * tall


def heart(u, v):
    return u**2 + (1.26 * (0.19 - v) - 0.9 * np.sqrt(abs(u))) ** 2 < 0.98


def cross(u, v):
    return (np.minimum(abs(u), abs(v)) < 0.33) & (np.maximum(abs(u), abs(v)) < 0.96)


# Is the point (u, v) dark? Both patterns are centred on the object and have a light middle.


def plain(u, v):
    return np.zeros(np.broadcast(u, v).shape, bool)


def striped(u, v):
    return np.broadcast_to(np.cos(2 * np.pi * v / PERIOD) < 0, np.broadcast(u, v).shape)


def checked(u, v):
    return np.cos(2 * np.pi * u / PERIOD) * np.cos(2 * np.pi * v / PERIOD) < 0


SHAPES = {
    "circle": circle,
    "square": square,
    "triangle": triangle,
    "star": star,
    "heart": heart,
    "cross": cross,
}
TEXTURES = {"plain": plain, "striped": striped, "checked": checked}
PERIOD = 0.9  # of a texture, in radii: 6.3 pixels at size 32
COLOURS = {
    "red": (222, 40, 48),
    "orange": (255, 138, 20),
    "yellow": (252, 216, 44),
    "green": (44, 168, 76),
    "cyan": (64, 208, 226),
    "blue": (40, 88, 228),
    "purple": (132, 52, 188),
    "pink": (250, 118, 188),
}
SHADE = 0.55  # the dark of a texture is its colour times this
BACKGROUNDS = {
    "white": (255, 255, 255),
    "black": (12, 12, 16),
    "grey": (138, 138, 142),
    "cream": (250, 226, 174),
}
SIZES = {"small": 4.4 / 32, "large": 7.0 / 32}  # the radius in version 1
RADII = {  # in version 2
    "small": (4.2 / 32, 4.4 / 32, 4.6 / 32),
    "large": (6.6 / 32, 6.8 / 32, 7.0 / 32),
}
RELATIONS = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
WORDS = {"small": ("small", "little"), "large": ("large", "big")}
HELD_OUT = (
    ("purple", "circle"),
    ("orange", "square"),
    ("pink", "triangle"),
    ("cyan", "star"),
    ("blue", "heart"),
    ("green", "cross"),
)
VERSION = 2  # of the data set, unless another is asked for
# Version 1 puts one object at one of 3 x 3 positions, two at the ends of the middle row or column.
LINES = (0.25, 0.5, 0.75)
# Version 2 has 5 x 5 positions: every fourth pixel at size 32. Two objects are at the ends of a row
# or column, each up to one position beside its middle.
FINE_LINES = (0.25, 0.375, 0.5, 0.625, 0.75)
# By version, the share of captions that name the left or upper object first, and of objects whose
# size is told.
IN_ORDER = {1: 0.96, 2: 0.5}
SIZE_TOLD = {1: 0.35, 2: 0.5}
SUPERSAMPLE = 5  # points a pixel is averaged over, each way


# ---- a random scene ------------------------------------------------------------------------------


def pick(rng, options):
    """One of `options`, all equally likely (rng.choice would turn them into an array, slowly)."""
    return tuple(options)[rng.integers(len(options))]


def random_kinds(rng, count, held_out):
    """`count` different (colour, shape) pairs: one or more of HELD_OUT if `held_out`, else none."""
    while True:
        kinds = [(pick(rng, COLOURS), pick(rng, SHAPES)) for _ in range(count)]
        different = len(set(kinds)) == count
        if different and any(kind in HELD_OUT for kind in kinds) == held_out:
            return kinds


def fixed_positions(rng, count):
    """Version 1: centres (x, y) of one object, or of two, the first left of or above the second."""
    if count == 1:
        return [(pick(rng, LINES), pick(rng, LINES))]
    positions = [(LINES[0], LINES[1]), (LINES[2], LINES[1])]
    return positions if rng.random() < 0.5 else [(x, y) for y, x in positions]


def random_positions(rng, count):
    """Version 2: centres (x, y) of one object, or of two, the first left of or above the second."""
    if count == 1:
        return [(pick(rng, FINE_LINES), pick(rng, FINE_LINES))]
    middle = FINE_LINES[1:-1]
    positions = [(FINE_LINES[0], pick(rng, middle)), (FINE_LINES[-1], pick(rng, middle))]
    return positions if rng.random() < 0.5 else [(x, y) for y, x in positions]


def random_texture(rng, size):
    """Plain in 60%. A small object has no room for a period of a texture: it is always plain."""
    if size == "small":
        return "plain"
    return pick(rng, ("plain", "plain", "plain", "striped", "checked"))


def random_scene(rng, held_out=False, version=VERSION):
    """A scene of one object (40%) or two, with a pair of HELD_OUT if `held_out`, else without."""
    count = 1 if rng.random() < 0.4 else 2
    kinds = random_kinds(rng, count, held_out)
    sizes = [pick(rng, SIZES) for _ in kinds]
    textures = [random_texture(rng, size) for size in sizes]
    if version == 1:
        radii = [SIZES[size] for size in sizes]
        positions = fixed_positions(rng, count)
    else:
        radii = [pick(rng, RADII[size]) for size in sizes]
        positions = random_positions(rng, count)
    things = tuple(
        Thing(shape, colour, size, texture, x, y, radius)
        for (colour, shape), size, texture, (x, y), radius in zip(
            kinds, sizes, textures, positions, radii
        )
    )
    return Scene(pick(rng, BACKGROUNDS), things)


SIZE = ["size", "radius", "texture"]  # the texture, because a small object must be plain


def twin(rng, scene):
    """The same scene but for one thing: what tells them apart is which word goes where.

    Two objects exchange one attribute, or colour and shape; one object gets another colour, shape,
    texture or size.
    """
    while True:
        if len(scene.things) == 2:
            names = pick(rng, (["colour"], ["shape"], ["colour", "shape"], ["texture"], SIZE))
            things = exchanged(*scene.things, names)
        else:
            names = pick(rng, (["colour"], ["shape"], ["texture"], SIZE))
            another = random_scene(rng, version=2).things[0]
            things = exchanged(*scene.things, another, names)[:1]
        differs = [in_words(thing) for thing in things] != [in_words(t) for t in scene.things]
        if differs and all(is_allowed(thing) for thing in things):
            return replace(scene, things=things)


def in_words(thing):
    """What a caption can say of an object by itself."""
    return thing.colour, thing.shape, thing.size, thing.texture


def exchanged(first, second, names):
    """Two objects, each with these attributes of the other."""
    of_first = {name: getattr(first, name) for name in names}
    of_second = {name: getattr(second, name) for name in names}
    return replace(first, **of_second), replace(second, **of_first)


def is_allowed(thing):
    """In the training set: no pair of HELD_OUT, and a small object is plain."""
    small_and_patterned = thing.size == "small" and thing.texture != "plain"
    return (thing.colour, thing.shape) not in HELD_OUT and not small_and_patterned


# ---- drawing -------------------------------------------------------------------------------------


def coverage(thing, size):
    """The share of each pixel that an object covers, all and dark: (2, size, size) in [0, 1]."""

    def window(centre):
        """The pixels it can touch along one axis, and its own coordinate at their sample points."""
        start = max(int((centre - thing.radius) * size) - 1, 0)
        stop = min(int((centre + thing.radius) * size) + 2, size)
        points = np.arange(start * SUPERSAMPLE, stop * SUPERSAMPLE) + 0.5
        return slice(start, stop), (points / (SUPERSAMPLE * size) - centre) / thing.radius

    columns, u = window(thing.x)
    rows, v = window(thing.y)
    inside = SHAPES[thing.shape](u[None, :], v[:, None])
    dark = inside & TEXTURES[thing.texture](u[None, :], v[:, None])
    cover = np.zeros((2, size, size))
    ones = np.ones(SUPERSAMPLE)  # products count the points, several times faster than sums
    for share, points in zip(cover, (inside, dark)):
        in_row = points.astype(float).reshape(-1, SUPERSAMPLE) @ ones  # of each pixel, in each row
        in_pixel = ones @ in_row.reshape(rows.stop - rows.start, SUPERSAMPLE, -1)
        share[rows, columns] = in_pixel / SUPERSAMPLE**2
    return cover


def draw(scene, size):
    """The image of a scene: (size, size, 3) uint8."""
    background = np.array(BACKGROUNDS[scene.background], float)
    image = np.tile(background, (size, size, 1))
    for thing in scene.things:
        colour = np.array(COLOURS[thing.colour], float)
        cover, dark = coverage(thing, size)[..., None]  # (size, size, 1) each
        image += cover * (colour - background) + dark * (SHADE - 1) * colour
    return np.clip(np.round(image), 0, 255).astype(np.uint8)


# ---- the caption ---------------------------------------------------------------------------------


def relation(first, second):
    """Where `first` is, seen from `second`: a key of RELATIONS, along the longer distance."""
    right = first.x - second.x
    down = first.y - second.y
    if abs(right) >= abs(down):
        return "right of" if right > 0 else "left of"
    return "below" if down > 0 else "above"


def phrase(thing, rng, version=VERSION):
    """A noun phrase: always colour, shape and a texture not plain; the size in SIZE_TOLD."""
    words = []
    if rng.random() < SIZE_TOLD[version]:
        words.append(pick(rng, WORDS[thing.size]))
    if thing.texture != "plain" or rng.random() < 0.08:
        words.append(thing.texture)
    words += [thing.colour, thing.shape]
    article = "an" if words[0][0] in "aeiou" else "a"
    return " ".join([article, *words])


def describe(scene, rng, version=VERSION):
    """A caption, lower case: either object first (see IN_ORDER), the background in 50%."""
    things = scene.things if rng.random() < IN_ORDER[version] else scene.things[::-1]
    caption = phrase(things[0], rng, version)
    comma = ""
    if len(things) == 2:
        if rng.random() < 0.2:
            caption += " is"
            comma = ","
        caption += f" {pick(rng, RELATIONS[relation(*things)])} {phrase(things[1], rng, version)}"
    if rng.random() < 0.5:
        caption += f"{comma} on a {scene.background} background"
    return caption


# ---- the data set --------------------------------------------------------------------------------


def examples(count, seed, version=VERSION):
    """Yields `count` times (split, scene, caption), training first; test captions are all new.

    In version 2, every second image of the training set is the twin of the one before it.
    """
    rng = np.random.default_rng(seed)
    tests = count // 10
    compositions = -(-tests // 4)
    test_splits = ["composition"] * compositions + ["test"] * (tests - compositions)
    splits = ["train"] * (count - tests) + rng.permutation(test_splits).tolist()
    seen = set()
    scene = None
    for number, split in enumerate(splits):
        while True:
            if split == "train" and number % 2 and version == 2:
                scene = twin(rng, scene)
            else:
                scene = random_scene(rng, split == "composition", version)
            caption = describe(scene, rng, version)
            if split == "train" or caption not in seen:
                break
        seen.add(caption)
        yield split, scene, caption


def files(size, count, seed, version=VERSION):
    """Yields what imagefolder.make writes: (part, file name, PNG file, line of metadata)."""
    numbers = {"train": 0, "test": 0}
    drawing = tqdm(examples(count, seed, version), "drawing shapes", count, unit=" images")
    for split, scene, caption in drawing:
        part = "train" if split == "train" else "test"
        name = f"{numbers[part]:05d}.png"
        numbers[part] += 1
        line = {"file_name": name, "text": caption, "split": split, "scene": asdict(scene)}
        if part == "train" and version == 2:
            line["pair"] = int(name[:-4]) // 2
        yield part, name, imagefolder.png(Image.fromarray(draw(scene, size))), line


def recorded(folder):
    """What dataset.json in `folder` records; None if this script did not draw it."""
    return imagefolder.recorded(folder, "shapes")


def prepare(out, size=32, count=20000, seed=0, version=VERSION):
    """Makes `out` the data set; if it is that already, does nothing. True if it drew.

    Several processes can ask at once: one draws, the others wait. Raises ValueError for a wrong
    argument and for an `out` that holds anything else; OSError if it cannot write.
    """
    imagefolder.check_number("size", size, 16)
    imagefolder.check_number("count", count, 20)
    imagefolder.check_number("seed", seed, 0)
    if version not in IN_ORDER:
        raise ValueError(f"version is {version!r}; allowed are 1 and 2")
    # The number in dataset.json counts every change of the bytes.
    record = {"dataset": "shapes", "version": {1: 5, 2: 7}[version], "size": size}
    record |= {"count": count, "seed": seed}
    return imagefolder.make(out, record, files(size, count, seed, version))


def main():
    arguments = imagefolder.Arguments(
        description="Draws captioned scenes of shapes as an imagefolder data set."
    )
    option = arguments.add_argument
    option("--size", type=int, default=32, help="pixels a side, at least 16 (%(default)s)")
    count_help = "images, at least 20; the last tenth is the test set (%(default)s)"
    option("--count", type=int, default=20000, help=count_help)
    option("--seed", type=int, default=0, help="same seed, same bytes (%(default)s)")
    version_help = "1: few positions, mostly one order of words; 2: neither (%(default)s)"
    option("--version", type=int, choices=(1, 2), default=VERSION, help=version_help)
    option("--out", required=True, help="folder to write")
    imagefolder.run(prepare, arguments)


if __name__ == "__main__":
    main()
