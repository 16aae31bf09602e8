"""Draws the `shapes` data set: small captioned scenes whose truth is known.

    python data/shapes/prepare.py --size 32 --count 20000 --seed 0 --out DIR

A scene is one or two things (shape, colour, size, texture) on a background. It is drawn antialiased at any picture
size and described in one English sentence. The folder follows the imagefolder convention of the Hugging Face
`datasets` library: DIR/train and DIR/test, each with PNG files and a metadata.jsonl of {"file_name", "text", "split",
"scene"} lines. Six (colour, shape) pairs, HELD_OUT, never occur in training; the part of the test set called
"composition" shows them. `oracle.py` beside this file reads a picture back.

Coordinates are fractions of the picture: x to the right, y DOWN, radius half the box that a shape fills.
"""
import argparse
import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm


# ---- what a scene can hold -------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Thing:
    """One drawn object; x, y and radius are fractions of the picture."""
    shape: str
    colour: str
    size: str
    texture: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """A background and the things on it, none touching another."""
    background: str
    things: tuple[Thing, ...]


def star(u, v, outer=1.06, inner=0.50):
    """Fold the plane into half a spike, a tenth of the turn; there the star is one straight edge."""
    turn = np.arctan2(u, -(v - 0.08)) * 5 / (2 * np.pi)
    angle = np.abs(turn - np.round(turn)) * 2 * np.pi / 5  # 0 at a tip, pi/5 at a notch
    distance = np.hypot(u, v - 0.08)
    tall, wide = inner * np.cos(np.pi / 5) - outer, inner * np.sin(np.pi / 5)
    return (distance * np.cos(angle) - outer) * wide < distance * np.sin(angle) * tall


# Is the point (u, v) inside? The box is [-1, 1] x [-1, 1], v down; the proportions make all six look equally big.
SHAPES = {
    "circle": lambda u, v: u**2 + v**2 < 0.95**2,
    "square": lambda u, v: np.maximum(abs(u), abs(v)) < 0.86,
    "triangle": lambda u, v: (v < 0.84) & (abs(u) < (v + 0.96) / 1.8),
    "star": star,
    "heart": lambda u, v: u**2 + (1.26 * (0.19 - v) - 0.9 * np.sqrt(abs(u)))**2 < 0.98,
    "cross": lambda u, v: (np.minimum(abs(u), abs(v)) < 0.33) & (np.maximum(abs(u), abs(v)) < 0.96),
}
PERIOD = 0.9  # of a texture, in radii: 6.3 pixels at size 32
# Is the point dark? Both patterns are centred on the thing and have a light middle.
TEXTURES = {
    "plain": lambda u, v: np.zeros(np.broadcast(u, v).shape, bool),
    "striped": lambda u, v: np.cos(2 * np.pi * v / PERIOD) + 0 * u < 0,
    "checked": lambda u, v: np.cos(2 * np.pi * u / PERIOD) * np.cos(2 * np.pi * v / PERIOD) < 0,
}
COLOURS = {"red": (222, 40, 48), "orange": (255, 138, 20), "yellow": (252, 216, 44), "green": (44, 168, 76),
           "cyan": (64, 208, 226), "blue": (40, 88, 228), "purple": (132, 52, 188), "pink": (250, 118, 188)}
SHADE = 0.55  # the dark of a texture is its colour times this
BACKGROUNDS = {"white": (255, 255, 255), "black": (12, 12, 16), "grey": (138, 138, 142), "cream": (250, 226, 174)}
SIZES = {"small": 4.4 / 32, "large": 7.0 / 32}  # the radius
RELATIONS = {"left of": ("left of", "to the left of"), "right of": ("right of", "to the right of"),
             "above": ("above", "over"), "below": ("below", "under")}
WORDS = {"small": ("small", "little"), "large": ("large", "big")}
HELD_OUT = (("purple", "circle"), ("orange", "square"), ("pink", "triangle"), ("cyan", "star"), ("blue", "heart"),
            ("green", "cross"))
LINES = (0.25, 0.5, 0.75)  # a thing stands at one of 3 x 3 places; two at the ends of the middle row or column
SUPERSAMPLE = 5  # points a pixel is averaged over, each way


# ---- a random scene --------------------------------------------------------------------------------------------

def pick(rng, options):
    """One of `options`, all equally likely (rng.choice would turn them into an array, slowly)."""
    return tuple(options)[rng.integers(len(options))]


def random_kinds(rng, count, held_out):
    """`count` different (colour, shape) pairs: at least one of HELD_OUT if `held_out`, else none."""
    while True:
        kinds = {(pick(rng, COLOURS), pick(rng, SHAPES)): None for _ in range(count)}
        if len(kinds) == count and any(kind in HELD_OUT for kind in kinds) == held_out:
            return tuple(kinds)


def random_places(rng, count):
    """Centres (x, y) on the grid of one thing, or of two: the first left of or above the second, on the middle line."""
    if count == 1:
        return [(pick(rng, LINES), pick(rng, LINES))]
    places = [(LINES[0], LINES[1]), (LINES[2], LINES[1])]
    return places if rng.random() < 0.5 else [(x, y) for y, x in places]


def random_scene(rng, held_out=False):
    """A scene of one (40%) or two things, with a pair of HELD_OUT in it if `held_out`, without any otherwise."""
    count = 1 if rng.random() < 0.4 else 2
    kinds = random_kinds(rng, count, held_out)
    sizes = [pick(rng, SIZES) for _ in kinds]
    # A small thing has no room for a period of a texture: it is always plain.
    textures = [pick(rng, ("plain", "plain", "plain", "striped", "checked")) if size == "large" else "plain"
                for size in sizes]
    things = tuple(Thing(shape, colour, size, texture, x, y, SIZES[size]) for (colour, shape), size, texture, (x, y)
                   in zip(kinds, sizes, textures, random_places(rng, count)))
    return Scene(pick(rng, BACKGROUNDS), things)


# ---- drawing ---------------------------------------------------------------------------------------------------

def coverage(thing, size):
    """The share of each pixel that `thing` covers, and the share it covers darkly: (2, size, size) in [0, 1]."""
    def window(centre):  # the pixels a thing can touch along one axis, and its own coordinate at their sample points
        start = max(int((centre - thing.radius) * size) - 1, 0)
        stop = min(int((centre + thing.radius) * size) + 2, size)
        points = (np.arange(start * SUPERSAMPLE, stop * SUPERSAMPLE) + 0.5) / (SUPERSAMPLE * size)
        return slice(start, stop), (points - centre) / thing.radius

    (columns, u), (rows, v) = window(thing.x), window(thing.y)
    inside = SHAPES[thing.shape](u[None, :], v[:, None])
    dark = inside & TEXTURES[thing.texture](u[None, :], v[:, None])
    cover = np.zeros((2, size, size))
    for share, points in zip(cover, (inside, dark)):
        blocks = points.reshape(len(v) // SUPERSAMPLE, SUPERSAMPLE, len(u) // SUPERSAMPLE, SUPERSAMPLE)
        share[rows, columns] = blocks.mean((1, 3))
    return cover


def draw(scene, size):
    """The picture of a scene: (size, size, 3) uint8."""
    background = np.array(BACKGROUNDS[scene.background], float)
    picture = np.tile(background, (size, size, 1))
    for thing in scene.things:
        colour = np.array(COLOURS[thing.colour], float)
        cover, dark = coverage(thing, size)[..., None]  # (size, size, 1) each
        picture += cover * (colour - background) + dark * (SHADE - 1) * colour
    return np.clip(np.round(picture), 0, 255).astype(np.uint8)


# ---- the caption -----------------------------------------------------------------------------------------------

def relation(first, second):
    """Where `first` is, seen from `second`: a key of RELATIONS, along the axis on which they are further apart."""
    right, down = first.x - second.x, first.y - second.y
    if abs(right) >= abs(down):
        return "right of" if right > 0 else "left of"
    return "below" if down > 0 else "above"


def phrase(thing, rng):
    """A noun phrase: always the colour, the shape and a texture that is not plain; the size in 35%."""
    words = [pick(rng, WORDS[thing.size])] if rng.random() < 0.35 else []
    words += [thing.texture] if thing.texture != "plain" or rng.random() < 0.08 else []
    words += [thing.colour, thing.shape]
    return ("an " if words[0][0] in "aeiou" else "a ") + " ".join(words)


def describe(scene, rng):
    """A caption of the scene, lower case. The left or upper thing comes first in 96%; half state the background."""
    things = scene.things if rng.random() < 0.96 else scene.things[::-1]
    caption, comma = phrase(things[0], rng), ""
    if len(things) == 2:
        verb, comma = (" is", ",") if rng.random() < 0.2 else ("", "")
        caption += f"{verb} {pick(rng, RELATIONS[relation(*things)])} {phrase(things[1], rng)}"
    return caption + (f"{comma} on a {scene.background} background" if rng.random() < 0.5 else "")


# ---- the data set ----------------------------------------------------------------------------------------------

def examples(count, seed):
    """Yields `count` times (folder, split, scene, caption), training first; no test caption was seen before."""
    rng = np.random.default_rng(seed)
    tests = count // 10
    compositions = -(-tests // 4)
    splits = ["train"] * (count - tests) + list(rng.permutation(["composition"] * compositions
                                                                + ["test"] * (tests - compositions)))
    seen = set()
    for split in map(str, splits):
        while True:
            scene = random_scene(rng, held_out=split == "composition")
            caption = describe(scene, rng)
            if split == "train" or caption not in seen:
                break
        seen.add(caption)
        yield "train" if split == "train" else "test", split, scene, caption


def recorded(folder):
    """What dataset.json in `folder` says of itself, or None if this script did not write it."""
    try:
        record = json.loads((folder / "dataset.json").read_text())
        return record if record["dataset"] == "shapes" else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def check_arguments(out, size, count, seed):
    """Raises ValueError for what cannot be drawn, or if `out` (or its .partial) holds anything else."""
    for name, value, least in (("size", size, 16), ("count", count, 20), ("seed", seed, 0)):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name} is {value!r}; it must be a whole number of at least {least}")
    for folder in (out, out.with_name(out.name + ".partial")):
        empty = folder.is_dir() and not any(folder.iterdir())
        if folder.exists() and not empty and recorded(folder) is None:
            raise ValueError(f"out: {folder} exists and is not a shapes data set; name a new or an empty folder")


def write(folder, record):
    """Draws the data set of `record` into `folder`, which is new."""
    folder.mkdir(parents=True)
    (folder / "dataset.json").write_text(json.dumps(record) + "\n")  # first: so that a later run knows it as ours
    for part in ("train", "test"):
        (folder / part).mkdir()
    numbers = {"train": 0, "test": 0}
    with open(folder / "train/metadata.jsonl", "w") as train, open(folder / "test/metadata.jsonl", "w") as test:
        todo = tqdm(examples(record["count"], record["seed"]), "drawing shapes", record["count"], unit=" pictures")
        for part, split, scene, caption in todo:
            name = f"{numbers[part]:05d}.png"
            numbers[part] += 1
            Image.fromarray(draw(scene, record["size"])).save(folder / part / name, compress_level=1)
            line = {"file_name": name, "text": caption, "split": split, "scene": asdict(scene)}
            print(json.dumps(line), file=train if part == "train" else test)


def prepare(out, size=32, count=20000, seed=0):
    """Writes the data set to the folder `out`; if the very same one is there already, does nothing. True if it wrote.

    Raises ValueError for a wrong argument and for an `out` that holds something else; OSError if it cannot write.
    """
    out = Path(os.path.abspath(out))
    check_arguments(out, size, count, seed)
    record = {"dataset": "shapes", "version": 5, "size": size, "count": count, "seed": seed}
    if recorded(out) == record:
        return False
    partial = out.with_name(out.name + ".partial")  # a killed run leaves only this, and the next run clears it
    for old in (partial, out):
        if old.exists():
            os.replace(old, partial)
            shutil.rmtree(partial)
    write(partial, record)
    os.replace(partial, out)
    return True


class Arguments(argparse.ArgumentParser):
    def error(self, message):
        """One line, without the usage that argparse puts before it."""
        self.exit(2, f"{self.prog}: {message}\n")


def main():
    arguments = Arguments(description="Draws captioned scenes of shapes as an imagefolder data set.")
    arguments.add_argument("--size", type=int, default=32, help="pixels a side, at least 16 (%(default)s)")
    arguments.add_argument("--count", type=int, default=20000,
                           help="pictures, at least 20; the last tenth is the test set (%(default)s)")
    arguments.add_argument("--seed", type=int, default=0, help="same seed, same bytes (%(default)s)")
    arguments.add_argument("--out", required=True, help="folder to write")
    try:
        given = arguments.parse_args()
        if not prepare(**vars(given)):
            print(f"{given.out} already holds this data set")
    except ValueError as error:
        sys.exit(f"prepare.py: {error}")
    except OSError as error:
        sys.exit(f"prepare.py: cannot write out: {error}")


if __name__ == "__main__":
    main()
