"""Reads a picture of `shapes` back into its scene, and grades it against a caption; no network anywhere.

    python data/shapes/oracle.py DIR        # grades the test pictures of a data set against their own captions

Analysis by synthesis: a bank holds what prepare.py would draw for every shape, radius, place and texture. The picture
minus its background is cut into connected parts, and each part is explained by the drawing that leaves the least of
it unexplained. All drawings are compared at once: if m is the share of a pixel that a thing covers, k the share that
it covers darkly, and D the picture minus its background, then the drawing in a colour with contrast c and a dark
stroke d is m c + k d, and

    |D - (m c + k d)|^2 = |D|^2 - 2 (c . m'D + d . k'D) + c.c m'm + 2 c.d m'k + d.d k'k

needs only the products m'D and k'D with the picture: two matrix products. Everything is compared after one light blur
(see `soften`), so noise and a blurred autoencoder cost little.
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

from prepare import (BACKGROUNDS, COLOURS, RELATIONS, SHADE, SHAPES, SIZES, TEXTURES, WORDS, Scene, Thing, coverage,
                     relation)

SIDE = 32  # pictures of another size are resized to this
WINDOW = 23  # pixels around a part that the bank looks at
RADII = (3.5, 3.8, 4.15, 4.5, 5.0, 5.5, 6.0, 6.4, 6.75, 7.1, 7.45, 7.9)  # pixels
OFFSETS = (-0.8, -0.4, 0.0, 0.4, 0.8)  # pixels from the part's centre of mass, each way
BLUR = 0.4  # how blurred the bank expects a picture (see soften); each candidate is then fitted more exactly
KEEP = 4  # candidates of the bank that are fitted more exactly
MIDDLE = (SIZES["small"] + SIZES["large"]) / 2  # the radius between small and large
# The share of a part's energy that may stay unexplained; above it the shape is "unknown". Drawn, blurred and noisy
# things leave up to 0.04 (99 of 100), half-drawn ones 0.10 or more (90 of 100).
TOLERANCE = 0.07
FAINT = 0.13  # less contrast than this (of RGB in [0, 1]) is noise
FEW = 6  # a part of fewer pixels is a speck, not an object
UNKNOWN = "unknown"
PALETTE = np.array(list(COLOURS.values())) / 255  # (8, 3)


# ---- reading a picture -----------------------------------------------------------------------------------------

def neighbours(plane, reach):
    """The (H, W) plane shifted by every step of up to `reach` pixels, its edge repeated: (steps, H, W)."""
    padded = np.pad(plane, reach, mode="edge")
    height, width = plane.shape
    return np.stack([padded[i:i + height, j:j + width] for i, j in product(range(2 * reach + 1), repeat=2)])


@lru_cache
def blurring(side, times):
    """The matrix that blurs a line of `side` pixels by 1/4, 1/2, 1/4, its ends repeated, `times` times."""
    line = np.eye(side) / 2 + (np.eye(side, k=1) + np.eye(side, k=-1)) / 4
    line[0, 0] = line[-1, -1] = 3 / 4
    return np.linalg.matrix_power(line, times)


def soften(planes, blur=0.0):
    """Blurs (..., side, side): once at `blur` 0, three times at 1, and a mixture of the two between."""
    light, strong = blurring(planes.shape[-1], 1), blurring(planes.shape[-1], 3)
    return (1 - blur) * (light @ planes @ light.T) + blur * (strong @ planes @ strong.T)


def standard(picture):
    """(H, W, 3) uint8, or float in [0, 1], to (32, 32, 3) float in [0, 1]."""
    picture = np.asarray(picture)
    if picture.ndim != 3 or picture.shape[2] != 3 or min(picture.shape[:2]) < 16:
        raise ValueError(f"picture has shape {picture.shape}; it must be (H, W, 3) with H and W at least 16")
    if picture.dtype != np.uint8 and not (np.isfinite(picture).all() and picture.min() >= 0 and picture.max() <= 1):
        raise ValueError(f"picture of {picture.dtype} must be uint8, or finite and in [0, 1]")
    if picture.shape[:2] != (SIDE, SIDE):
        whole = picture if picture.dtype == np.uint8 else np.round(picture * 255).astype(np.uint8)
        picture = np.asarray(Image.fromarray(whole).resize((SIDE, SIDE), Image.Resampling.BOX))
    return picture / 255.0 if picture.dtype == np.uint8 else picture.astype(float)


def connected(mask, start):
    """The pixels of `mask` that a walk from the pixel `start`, one of them, can reach: (H, W) bool."""
    part = np.zeros_like(mask)
    part[start] = True
    while ((grown := neighbours(part, 1).any(0) & mask) != part).any():
        part = grown
    return part


def parts(contrast):
    """Cuts a (H, W) map of contrast into connected parts, largest first: a list of (H, W) bool."""
    # Half as strong as the strongest nearby: so the soft edges of two things do not join them.
    left = (contrast > FAINT) & (contrast > 0.42 * neighbours(contrast, 2).max(0))
    found = []
    while left.any():
        found.append(connected(left, np.unravel_index(np.argmax(left), left.shape)))
        left = left & ~found[-1]
    return sorted((part for part in found if part.sum() >= FEW), key=np.sum, reverse=True)


def centre_of_mass(weight):
    """(x, y) in pixels, a pixel's middle standing at a half."""
    rows, columns = np.indices(weight.shape) + 0.5
    return (weight * columns).sum() / weight.sum(), (weight * rows).sum() / weight.sum()


@lru_cache(maxsize=1)
def bank():
    """Every candidate for a part: a list of N (shape, texture, x, y, radius), in pixels from the window's middle; their
    softened m and k, (N, 2, WINDOW * WINDOW) float32; and m'm, m'k, k'm, k'k, (N, 4)."""
    middle, candidates, covers = WINDOW / 2, [], []
    for shape, radius in product(SHAPES, RADII):
        whole = coverage(Thing(shape, "", "", "plain", 0.5, 0.5, radius / WINDOW), WINDOW)[0]
        mass_x, mass_y = np.array(centre_of_mass(whole)) - middle
        for texture, dx, dy in product(TEXTURES if radius > MIDDLE * SIDE else ("plain",), OFFSETS, OFFSETS):
            x, y = dx - mass_x, dy - mass_y
            thing = Thing(shape, "", "", texture, (middle + x) / WINDOW, (middle + y) / WINDOW, radius / WINDOW)
            candidates.append((shape, texture, x, y, radius))
            covers.append(soften(coverage(thing, WINDOW), BLUR).reshape(2, -1))
    covers = np.array(covers, np.float32)
    return candidates, covers, (covers @ covers.transpose(0, 2, 1)).reshape(-1, 4)


def strokes(background):
    """The contrast c of each colour, and its dark stroke d: (8, 2, 3)."""
    return np.stack([PALETTE - background, (SHADE - 1) * PALETTE], 1)


def candidates_for(difference, background):
    """The best things of the bank for a part's (3, side, side) difference, each of another shape or texture: a list."""
    column, row = (int(place) for place in centre_of_mass((difference ** 2).sum(0)))
    reach = WINDOW // 2
    window = np.pad(difference, ((0, 0), (reach, reach), (reach, reach)))[:, row:row + WINDOW, column:column + WINDOW]
    kinds, covers, energy = bank()
    stroke = strokes(background)
    products = covers.reshape(-1, WINDOW * WINDOW) @ window.reshape(3, -1).T.astype(np.float32)  # m'D and k'D
    explained = (2 * products.reshape(-1, 6) @ stroke.reshape(-1, 6).T
                 - energy @ (stroke @ stroke.transpose(0, 2, 1)).reshape(-1, 4).T)  # (N, 8)
    best = {}
    for place in np.argsort(-explained.max(1)):
        shape, texture, x, y, radius = kinds[place]
        colour = list(COLOURS)[explained[place].argmax()]
        thing = Thing(shape, colour, "", texture, (column + 0.5 + x) / SIDE, (row + 0.5 + y) / SIDE, radius / SIDE)
        best.setdefault((shape, texture), thing)
        if len(best) == KEEP:
            return list(best.values())


def refined(thing, difference, background, step=0.25 / SIDE):
    """One Gauss-Newton step on (x, y, radius, blur): the moved thing and the energy that it leaves unexplained."""
    stroke = strokes(background)[list(COLOURS).index(thing.colour)]

    def rest(thing, blur):
        return (difference - np.tensordot(stroke.T, soften(coverage(thing, SIDE), blur), 1)).ravel()

    start = rest(thing, BLUR)
    moved = [rest(replace(thing, **{name: getattr(thing, name) + step}), BLUR) for name in ("x", "y", "radius")]
    slopes = start - np.stack(moved + [rest(thing, BLUR + 0.25)])  # (4, 3 side side)
    dx, dy, dradius, dblur = np.clip(np.linalg.lstsq(slopes @ slopes.T, slopes @ start, rcond=None)[0], -2, 2)
    radius = np.clip(thing.radius + step * dradius, RADII[0] / SIDE, RADII[-1] / SIDE)
    thing = replace(thing, x=thing.x + step * dx, y=thing.y + step * dy, radius=radius)
    return thing, (rest(thing, np.clip(BLUR + 0.25 * dblur, 0, 1.2)) ** 2).sum()


def read_part(difference, background):
    """The thing that explains (3, side, side) `difference` best; the shape "unknown" if even that explains it badly."""
    tried = [refined(thing, difference, background) for thing in candidates_for(difference, background)]
    thing, left = min(tried, key=lambda pair: pair[1])
    known = left < TOLERANCE * (difference ** 2).sum()
    return replace(thing, size="small" if thing.radius < MIDDLE else "large", shape=thing.shape if known else UNKNOWN)


def read(picture):
    """The scene in a picture: (H, W, 3) uint8, or float in [0, 1]. What it cannot name is "unknown".

    Raises ValueError for an array of another shape or range.
    """
    picture = standard(picture)
    background = np.median(picture, (0, 1))  # things cover less than half of any picture
    names = {name: np.linalg.norm(background - np.array(rgb) / 255) for name, rgb in BACKGROUNDS.items()}
    nearest = min(names, key=names.get)
    difference = soften((picture - background).transpose(2, 0, 1))  # (3, side, side)
    found = parts(np.linalg.norm(difference, axis=0))[:4]
    things = []
    for part in found:
        others = sum((other for other in found if other is not part), np.zeros_like(part))
        own = part | neighbours(part, 2).any(0) & ~neighbours(others, 1).any(0)
        things.append(read_part(difference * own, background))
    return Scene(nearest if names[nearest] < 0.16 else UNKNOWN, tuple(things))


# ---- reading a caption -----------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Stated:
    """What a caption says: a dict per thing (of "shape", "colour" and, if stated, "size", "texture"); else None."""
    things: tuple[dict[str, str], ...]
    relation: str | None
    background: str | None


def either(options):
    return "(" + "|".join(sorted(options, key=len, reverse=True)) + ")"


MEANING = {word: name for table in (WORDS, RELATIONS) for name, words in table.items() for word in words}
PHRASE = (f"an? (?:{either(word for words in WORDS.values() for word in words)} )?(?:{either(TEXTURES)} )?"
          f"{either(COLOURS)} {either(SHAPES)}")
CAPTION = re.compile(f"{PHRASE}(?: (?:is )?{either(word for words in RELATIONS.values() for word in words)} {PHRASE})?"
                     f"(?:,? on a {either(BACKGROUNDS)} background)?")


def parse(caption):
    """What a caption states. Raises ValueError if `describe` could not have written it."""
    match = CAPTION.fullmatch(caption)
    if match is None:
        raise ValueError(f"caption {caption!r} is not like 'a large red circle above a striped blue square on a white "
                         f"background', with a shape of {', '.join(SHAPES)} in {', '.join(COLOURS)}")
    words = [MEANING.get(word, word) for word in match.groups()]
    phrases = [dict(zip(("size", "texture", "colour", "shape"), words[start:start + 4])) for start in (0, 5)]
    things = tuple({name: word for name, word in one.items() if word} for one in phrases if one["shape"])
    return Stated(things, words[4], words[9])


# ---- grading a picture -----------------------------------------------------------------------------------------

def marks(scene, things, stated):
    """Which attributes of `stated` hold if `things` are the ones it names, in its order; None is a missing one."""
    found = {"count": len(scene.things) == len(stated.things)}
    for number, (thing, wanted) in enumerate(zip(things, stated.things), 1):
        found |= {f"{name} {number}": getattr(thing, name, None) == word for name, word in wanted.items()}
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
    return max((marks(scene, things, stated) for things in orders), key=lambda found: sum(found.values()))


def grade(picture, caption):
    """Which stated attributes the picture shows: {"count": bool, "shape 1": bool, "relation": bool, ...}.

    Things are matched to the caption's in the order that makes most attributes hold. The picture is as for `read`;
    raises ValueError for a picture or a caption that cannot be read.
    """
    return grade_scene(read(picture), caption)


def main():
    """Grades the test pictures of a data set against their own captions and prints the share that holds whole."""
    if len(sys.argv) != 2 or not (metadata := Path(sys.argv[1], "test/metadata.jsonl")).is_file():
        sys.exit("oracle.py: name one folder that prepare.py wrote: python data/shapes/oracle.py DIR")
    lines = [json.loads(line) for line in metadata.read_text().splitlines()]
    pictures = [np.asarray(Image.open(metadata.with_name(line["file_name"])).convert("RGB")) for line in lines]
    bank()  # drawn once, before the clock starts
    start = time.perf_counter()
    right = [all(grade(picture, line["text"]).values()) for picture, line in zip(pictures, lines)]
    each = (time.perf_counter() - start) / len(lines)
    print(f"{np.mean(right):.2%} of {len(lines)} pictures hold all of their caption; {1000 * each:.1f} ms a picture")


if __name__ == "__main__":
    main()
