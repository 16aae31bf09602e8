"""Reads an image of `shapes` back into its scene, and grades it against a caption; no network.

    python data/shapes/oracle.py DIR    # grades a data set's test images against their captions

Analysis by synthesis: a bank holds what prepare.py would draw for every shape, radius, position and
texture. The image minus its background is cut into connected parts, and each part is explained by
the drawing that leaves the least of it unexplained. All drawings are compared at once: if m is the
share of a pixel that an object covers, k the share that it covers darkly, and D the image minus its
background, then the drawing in a colour with contrast c and a dark stroke d is m c + k d, and

    |D - (m c + k d)|^2 = |D|^2 - 2 (c . m'D + d . k'D) + c.c m'm + 2 c.d m'k + d.d k'k

needs only the products m'D and k'D with the image: two matrix products. Everything is compared
after one light blur (see `soften`), so that noise and a blurred autoencoder cost little.
"""

import json
import re
import sys
import time
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import permutations, product
from pathlib import Path

import numpy as np
from PIL import Image

from prepare import (
    BACKGROUNDS,
    COLOURS,
    RELATIONS,
    SHADE,
    SHAPES,
    SIZES,
    TEXTURES,
    WORDS,
    Scene,
    Thing,
    coverage,
    relation,
)

SIDE = 32  # images of another size are resized to this
WINDOW = 23  # pixels around a part that the bank looks at
RADII = (3.5, 3.8, 4.15, 4.5, 5.0, 5.5, 6.0, 6.4, 6.75, 7.1, 7.45, 7.9)  # pixels
OFFSETS = (-0.8, -0.4, 0.0, 0.4, 0.8)  # pixels from the part's centre of mass, each way
# How blurred the bank expects an image (see soften); each candidate is then fitted more exactly.
BLUR = 0.4
KEEP = 4  # candidates of the bank that are fitted more exactly
MIDDLE = (SIZES["small"] + SIZES["large"]) / 2  # the radius between small and large
# The share of a part's energy that may stay unexplained; above it the shape is "unknown". Drawn,
# blurred and noisy objects leave up to 0.04 (99 of 100), half-drawn ones 0.10 or more (90 of 100).
TOLERANCE = 0.07
FAINT = 0.13  # less contrast than this (of RGB in [0, 1]) is noise
FEW = 6  # a part of fewer pixels is a speck, not an object
UNKNOWN = "unknown"
PALETTE = np.array(list(COLOURS.values())) / 255  # (8, 3)


# ---- reading an image ----------------------------------------------------------------------------


def neighbours(plane, reach):
    """The (H, W) plane shifted by every step of up to `reach` pixels, its edge repeated."""
    padded = np.pad(plane, reach, mode="edge")
    height, width = plane.shape
    steps = product(range(2 * reach + 1), repeat=2)
    return np.stack([padded[i : i + height, j : j + width] for i, j in steps])  # (steps, H, W)


@lru_cache
def blurring(side, times):
    """The matrix that blurs a line of `side` pixels by 1/4, 1/2, 1/4, its ends repeated."""
    line = np.eye(side) / 2 + (np.eye(side, k=1) + np.eye(side, k=-1)) / 4
    line[0, 0] = line[-1, -1] = 3 / 4
    return np.linalg.matrix_power(line, times)


def soften(planes, blur=0.0):
    """Blurs (..., side, side): once at `blur` 0, three times at 1, and a mixture between."""
    light = blurring(planes.shape[-1], 1)
    strong = blurring(planes.shape[-1], 3)
    return (1 - blur) * (light @ planes @ light.T) + blur * (strong @ planes @ strong.T)


def standard(image):
    """(H, W, 3) uint8, or float in [0, 1], to (32, 32, 3) float in [0, 1]."""
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[2] != 3 or min(image.shape[:2]) < 16:
        raise ValueError(
            f"image has shape {image.shape}; it must be (H, W, 3) with H and W at least 16"
        )
    whole = image.dtype == np.uint8
    if not whole and not (np.isfinite(image).all() and image.min() >= 0 and image.max() <= 1):
        raise ValueError(f"image of {image.dtype} must be uint8, or finite and in [0, 1]")
    if image.shape[:2] != (SIDE, SIDE):
        image = image if whole else np.round(image * 255).astype(np.uint8)
        resized = Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BOX)
        image = np.asarray(resized)
        whole = True
    return image / 255.0 if whole else image.astype(float)


def connected(mask, start):
    """The pixels of `mask` that are connected to the pixel `start`, one of them: (H, W) bool."""
    part = np.zeros_like(mask)
    part[start] = True
    while True:
        grown = neighbours(part, 1).any(0) & mask
        if (grown == part).all():
            return part
        part = grown


def parts(contrast):
    """Cuts a (H, W) map of contrast into connected parts, largest first: a list of (H, W) bool."""
    # Half as strong as the strongest nearby, so that soft edges do not join two objects.
    left = (contrast > FAINT) & (contrast > 0.42 * neighbours(contrast, 2).max(0))
    found = []
    while left.any():
        part = connected(left, np.unravel_index(np.argmax(left), left.shape))
        left = left & ~part
        if part.sum() >= FEW:
            found.append(part)
    return sorted(found, key=np.sum, reverse=True)


def centre_of_mass(weight):
    """(x, y) in pixels; a pixel's middle is at a half."""
    rows, columns = np.indices(weight.shape) + 0.5
    return (weight * columns).sum() / weight.sum(), (weight * rows).sum() / weight.sum()


@lru_cache(maxsize=1)
def bank():
    """Every candidate for a part: (candidates, covers, energy).

    candidates: a list of N (shape, texture, x, y, radius), in pixels from the window's middle.
    covers: their softened m and k, (N, 2, WINDOW * WINDOW) float32.
    energy: their m'm, m'k, k'm, k'k, (N, 4).
    """
    middle = WINDOW / 2
    candidates = []
    covers = []
    for shape, radius in product(SHAPES, RADII):
        whole = Thing(shape, "", "", "plain", 0.5, 0.5, radius / WINDOW)
        mass_x, mass_y = np.array(centre_of_mass(coverage(whole, WINDOW)[0])) - middle
        textures = TEXTURES if radius > MIDDLE * SIDE else ("plain",)
        for texture, dx, dy in product(textures, OFFSETS, OFFSETS):
            x = dx - mass_x
            y = dy - mass_y
            moved = replace(
                whole, texture=texture, x=(middle + x) / WINDOW, y=(middle + y) / WINDOW
            )
            candidates.append((shape, texture, x, y, radius))
            covers.append(soften(coverage(moved, WINDOW), BLUR).reshape(2, -1))
    covers = np.array(covers, np.float32)
    return candidates, covers, (covers @ covers.transpose(0, 2, 1)).reshape(-1, 4)


def strokes(background):
    """The contrast c of each colour, and its dark stroke d: (8, 2, 3)."""
    return np.stack([PALETTE - background, (SHADE - 1) * PALETTE], 1)


def candidates_for(difference, background):
    """The bank's best objects for a part's (3, side, side) difference, each kind once."""
    column, row = (int(middle) for middle in centre_of_mass((difference**2).sum(0)))
    reach = WINDOW // 2
    padded = np.pad(difference, ((0, 0), (reach, reach), (reach, reach)))
    window = padded[:, row : row + WINDOW, column : column + WINDOW].reshape(3, -1)
    kinds, covers, energy = bank()
    stroke = strokes(background)
    products = covers.reshape(-1, WINDOW * WINDOW) @ window.T.astype(np.float32)  # m'D and k'D
    gained = 2 * products.reshape(-1, 6) @ stroke.reshape(-1, 6).T
    spent = energy @ (stroke @ stroke.transpose(0, 2, 1)).reshape(-1, 4).T
    explained = gained - spent  # (N, 8)
    best = {}
    for i in np.argsort(-explained.max(1)):
        shape, texture, x, y, radius = kinds[i]
        if (shape, texture) in best:
            continue
        colour = list(COLOURS)[explained[i].argmax()]
        x = (column + 0.5 + x) / SIDE
        y = (row + 0.5 + y) / SIDE
        best[shape, texture] = Thing(shape, colour, "", texture, x, y, radius / SIDE)
        if len(best) == KEEP:
            break
    return list(best.values())


def refined(thing, difference, background, step=0.25 / SIDE):
    """One Gauss-Newton step on (x, y, radius, blur): the moved object and the energy it leaves."""
    stroke = strokes(background)[list(COLOURS).index(thing.colour)]

    def rest(covers, blur):
        drawn = np.einsum("kc,nkij->ncij", stroke, soften(covers, blur))
        return (difference - drawn).reshape(len(covers), -1)  # (n, 3 side side)

    moved = [
        thing,
        replace(thing, x=thing.x + step),
        replace(thing, y=thing.y + step),
        replace(thing, radius=thing.radius + step),
    ]
    covers = np.stack([coverage(each, SIDE) for each in moved])  # (4, 2, side, side)
    start, *others = rest(covers, BLUR)
    slopes = start - np.stack([*others, rest(covers[:1], BLUR + 0.25)[0]])  # (4, 3 side side)
    solved = np.linalg.lstsq(slopes @ slopes.T, slopes @ start, rcond=None)[0]
    dx, dy, dradius, dblur = np.clip(solved, -2, 2)
    radius = np.clip(thing.radius + step * dradius, RADII[0] / SIDE, RADII[-1] / SIDE)
    thing = replace(thing, x=thing.x + step * dx, y=thing.y + step * dy, radius=radius)
    left = rest(coverage(thing, SIDE)[None], np.clip(BLUR + 0.25 * dblur, 0, 1.2))
    return thing, (left**2).sum()


def read_part(difference, background):
    """The object that explains (3, side, side) `difference` best, of shape "unknown" if badly."""
    candidates = candidates_for(difference, background)
    tried = [refined(thing, difference, background) for thing in candidates]
    thing, left = min(tried, key=lambda pair: pair[1])
    known = left < TOLERANCE * (difference**2).sum()
    shape = thing.shape if known else UNKNOWN
    return replace(thing, size="small" if thing.radius < MIDDLE else "large", shape=shape)


def read(image):
    """The scene in an image: (H, W, 3) uint8, or float in [0, 1]. What it cannot name is "unknown".

    Raises ValueError for an array of another shape or range.
    """
    image = standard(image)
    background = np.median(image, (0, 1))  # objects cover less than half of any image
    names = {
        name: np.linalg.norm(background - np.array(rgb) / 255) for name, rgb in BACKGROUNDS.items()
    }
    nearest = min(names, key=names.get)
    difference = soften((image - background).transpose(2, 0, 1))  # (3, side, side)
    found = parts(np.linalg.norm(difference, axis=0))[:4]
    things = []
    for part in found:
        others = sum((other for other in found if other is not part), np.zeros_like(part))
        own = part | neighbours(part, 2).any(0) & ~neighbours(others, 1).any(0)
        things.append(read_part(difference * own, background))
    return Scene(nearest if names[nearest] < 0.16 else UNKNOWN, tuple(things))


# ---- reading a caption ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Stated:
    """What a caption says; None for a relation or a background that it does not state."""

    things: tuple[dict[str, str], ...]  # "shape", "colour" and, if stated, "size", "texture"
    relation: str | None
    background: str | None


def either(options):
    return "(" + "|".join(sorted(options, key=len, reverse=True)) + ")"


def meanings(table):
    """{word: the name that the table has it for}."""
    found = {}
    for name, words in table.items():
        found.update(dict.fromkeys(words, name))
    return found


SIZE_WORDS = meanings(WORDS)
RELATION_WORDS = meanings(RELATIONS)
PHRASE = f"an? (?:{either(SIZE_WORDS)} )?(?:{either(TEXTURES)} )?{either(COLOURS)} {either(SHAPES)}"
CAPTION = re.compile(
    f"{PHRASE}(?: (?:is )?{either(RELATION_WORDS)} {PHRASE})?"
    f"(?:,? on a {either(BACKGROUNDS)} background)?"
)


def parse(caption):
    """What a caption states. Raises ValueError if `describe` could not have written it."""
    match = CAPTION.fullmatch(caption)
    if match is None:
        raise ValueError(
            f"caption {caption!r} is not like 'a large red circle above a striped blue square on a "
            f"white background', with a shape of {', '.join(SHAPES)} in {', '.join(COLOURS)}"
        )
    words = match.groups()
    things = []
    for size, texture, colour, shape in (words[:4], words[5:9]):
        stated = {"size": SIZE_WORDS.get(size), "texture": texture}
        stated |= {"colour": colour, "shape": shape}
        if shape:
            things.append({name: word for name, word in stated.items() if word})
    return Stated(tuple(things), RELATION_WORDS.get(words[4]), words[9])


# ---- grading an image ----------------------------------------------------------------------------


def marks(scene, things, stated):
    """Which attributes of `stated` hold if `things` are the objects it names; None is missing."""
    found = {"count": len(scene.things) == len(stated.things)}
    for number, (thing, wanted) in enumerate(zip(things, stated.things), 1):
        shown = vars(thing) if thing else {}
        for name, word in wanted.items():
            found[f"{name} {number}"] = shown.get(name) == word
    if stated.relation:
        found["relation"] = None not in things and relation(*things) == stated.relation
    if stated.background:
        found["background"] = scene.background == stated.background
    return found


def grade_scene(scene, caption):
    """As `grade`, for a scene that `read` has read."""
    stated = parse(caption)
    missing = (None,) * len(stated.things)
    orders = permutations(scene.things + missing, len(stated.things))
    tried = [marks(scene, things, stated) for things in orders]
    return max(tried, key=lambda found: sum(found.values()))


def grade(image, caption):
    """Which stated attributes the image shows: {"count": bool, "shape 1": bool, ...}.

    Objects are matched to the caption's in the order that makes most attributes hold. The image is
    as for `read`; raises ValueError for an image or a caption that cannot be read.
    """
    return grade_scene(read(image), caption)


def main():
    """Grades the test images of a data set and prints the share that shows all of its caption."""
    metadata = Path(sys.argv[-1], "test", "metadata.jsonl")
    if len(sys.argv) != 2 or not metadata.is_file():
        sys.exit("oracle.py: name a folder that prepare.py made: python data/shapes/oracle.py DIR")
    lines = [json.loads(line) for line in metadata.read_text().splitlines()]
    images = []
    for line in lines:
        with Image.open(metadata.with_name(line["file_name"])) as file:
            images.append(np.asarray(file.convert("RGB")))
    bank()  # drawn once, before the clock starts
    start = time.perf_counter()
    right = [all(grade(image, line["text"]).values()) for image, line in zip(images, lines)]
    each = (time.perf_counter() - start) / len(lines)
    print(
        f"{np.mean(right):.2%} of {len(lines)} images show all of their caption; "
        f"{1000 * each:.1f} ms an image"
    )


if __name__ == "__main__":
    main()
