"""Our tokenizer beside transformers' CLIPTokenizer, with a vocabulary of ours and with CLIP's own.

Where the public tokenizers disagree, transformers is followed. OpenAI's own, and open_clip's, first
repair text with ftfy and replace HTML's entities ("&amp;" becomes "&"), which transformers 5 does
not. transformers normalises to NFC, which open_clip leaves to ftfy. And before version 5
transformers had a slow tokenizer that, without ftfy, separated Chinese characters and removed
accents.
"""

import gzip
import itertools
import json
import sys

import pytest
from transformers import CLIPTokenizer

import reference
from ldm_minimal import Tokenizer, stable_diffusion

CAPTIONS = [
    "a red circle",
    "A Red Circle",
    "a large blue striped square to the left of a small green star",
    "",
    " ",
    "   ",
    "\n",
    "a",
    "a  red\tcircle\n\non   grey",
    "  leading and trailing  ",
    "no\u00a0break\u2003space",
    "zero\u200bwidth",
    "tab\tand\r\nreturn",
    "don't",
    "it's we've I'm they'll he'd you're can't",
    "IT'S WE'VE",
    "''s",
    "'",
    "rock 'n' roll",
    "the 1990s' best",
    "o'clock",
    "don\u2019t",
    "3 circles and 12 squares",
    "1234567890",
    "3.14159",
    "\u00bd cup, \u2163 kings",
    "1,000,000",
    "v2.0-beta",
    "x1y2z3",
    "\u0663\u0664\u0665",
    "caf\u00e9 cre\u0300me br\u00fbl\u00e9e",
    "na\u00efve fa\u00e7ade",
    "e\u0301 and \u00e9",
    "STRA\u00dfE \u0130stanbul \u01c5",
    "\u00c5ngstr\u00f6m \u212b",
    "A\u0308",
    "\u732b\u3068\u72ac",
    "\u041a\u0440\u0430\u0441\u043d\u044b\u0439 \u043a\u0440\u0443\u0433",
    "\u0645\u0631\u0628\u0639 \u0623\u062d\u0645\u0631",
    "\u0928\u092e\u0938\u094d\u0924\u0947",
    "\ud55c\uad6d\uc5b4 \uadf8\ub9bc",
    "\U0001f600",
    "a cat \U0001f431\U0001f408 and a family \U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\U0001f44d\U0001f3fd thumbs",
    "\u2764\ufe0f",
    "\U0001f1ec\U0001f1e7",
    "hello, world!",
    "wait... what?!",
    "(red) [green] {blue}",
    "50% off & more",
    "a/b\\c|d",
    "#hash @at $5 ^ ~ `",
    '"quoted" \u201ccurly\u201d \u2014 dash',
    "semi;colon:colon",
    "under_score",
    "well-known state-of-the-art",
    "!!!???...",
    "C++ and C#",
    "http://example.com/a?b=c",
    "<|startoftext|>",
    "a <|endoftext|> b",
    "a <|EndOfText|> b",
    "</w>",
    "a</w> b</w>",
    "supercalifragilisticexpialidocious",
    "aaaaaaaaaaaaaaaaaaaaaaaa",
    "\x00\x01 control",
    "\ufeffbom",
    "\ufffd",
    "word " * 100,
    "circle," * 50,
    "x" * 300,
    "\U0001f600" * 30,
]

HOW = ("a photograph", "an oil painting", "Digital art", "3D render")
WHAT = (
    "an astronaut riding a horse",
    "two caf\u00e9s",
    "S\u00e3o Paulo's skyline",
    "\u6771\u4eac at night \U0001f303",
    "a 1960s r\u00f4tisserie (interior)",
)
WHERE = (
    "trending on artstation",
    "f/1.8, 85mm",
    "in the style of H\u00f6ch",
    "\u2014 highly detailed!!",
    "c. 1889",
    "4k; 8k; HDR",
    "don't look",
)
PROMPTS = [f"{how} of {what}, {where}" for how, what, where in itertools.product(HOW, WHAT, WHERE)]


def clip_tokenizer(vocab, merges, folder):
    """transformers' tokenizer, from the two files in which CLIP's vocabulary is published."""
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder)


def their_tokens(tokenizer, captions):
    return tokenizer(captions, padding="max_length", truncation=True, max_length=77).input_ids


# ---- a vocabulary that was trained here --------------------------------------------------------


@pytest.fixture(scope="module")
def ours():
    sizes, colours = ("large", "small"), ("red", "blue", "green")
    squares = [f"a {size} {colour} square" for size in sizes for colour in colours]
    return Tokenizer.train(3 * CAPTIONS + squares, 720)


@pytest.fixture(scope="module")
def theirs(ours, tmp_path_factory):
    return clip_tokenizer(ours.vocab, ours.merges, tmp_path_factory.mktemp("trained"))


@pytest.mark.parametrize("caption", CAPTIONS, ids=lambda caption: ascii(caption)[:30])
@pytest.mark.filterwarnings("ignore:the caption has")
def test_tokens_are_clip_tokens(ours, theirs, caption):
    assert ours([caption]).tolist() == their_tokens(theirs, [caption])


def test_tokenizer_merges_and_numbers_its_vocabulary_like_clip(ours, theirs):
    assert sorted(ours.vocab.values()) == list(range(720))
    assert len(ours.merges) == 720 - 514
    assert ours.vocab == theirs.get_vocab()
    by_number = sorted(ours.vocab, key=ours.vocab.get)
    letters = by_number[:256]
    assert letters == sorted(letters)
    assert by_number[256:512] == [letter + "</w>" for letter in letters]
    assert (ours.start, ours.end) == (718, 719)
    assert ours.pieces("a large square") == ["a</w>", "large</w>", "square</w>"]


def test_tokenizer_says_what_it_cut_off(ours):
    with pytest.warns(UserWarning, match="80 tokens, 75 fit; cut off: 'a a a a a'"):
        tokens = ours(["a " * 79 + "a"])
    assert tokens.tolist() == [[ours.start, *[ours.vocab["a</w>"]] * 75, ours.end]]


# ---- CLIP's own vocabulary ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip_ours():
    return stable_diffusion.load_tokenizer(reference.clip_vocabulary())


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("clip")


@pytest.fixture(scope="module")
def clip_theirs(clip_folder):
    """Numbered here as OpenAI does it, independently of ours: bytes, last bytes, merges, marks."""
    lines = gzip.decompress(reference.clip_vocabulary().read_bytes()).decode().split("\n")
    merges = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in printable] + [chr(256 + n) for n in range(256 - 188)]
    names = letters + [letter + "</w>" for letter in letters]
    names += ["".join(pair) for pair in merges] + ["<|startoftext|>", "<|endoftext|>"]
    vocab = {name: number for number, name in enumerate(names)}
    return clip_tokenizer(vocab, merges, clip_folder)


@pytest.mark.filterwarnings("ignore:the caption has")
def test_clips_numbers_are_transformers_on_200_captions(clip_ours, clip_theirs):
    captions = CAPTIONS + PROMPTS
    assert len(set(captions)) >= 200
    tokens = dict(zip(captions, clip_ours(captions).tolist()))
    assert tokens == dict(zip(captions, their_tokens(clip_theirs, captions)))


def test_clips_vocabulary_has_its_known_numbers(clip_ours):
    assert len(clip_ours.vocab) == 49408
    assert (clip_ours.start, clip_ours.end) == (49406, 49407)
    as_in_clips_own_examples = [49406, 320, 1125, 539, 320, 2368, 49407, 49407]
    assert clip_ours(["a photo of a cat"])[0, :8].tolist() == as_in_clips_own_examples
    assert "open_clip" not in sys.modules


def test_clips_vocabulary_is_the_same_from_a_folder(clip_ours, clip_theirs, clip_folder):
    from_folder = stable_diffusion.load_tokenizer(clip_folder)
    assert clip_ours.vocab == from_folder.vocab == clip_theirs.get_vocab()
    assert clip_ours.merges == from_folder.merges
