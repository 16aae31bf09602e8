"""Chapter 5: where words are looked for while an image is drawn, and which vectors carry them."""

import collections
import dataclasses
import math
import random
from functools import partial

import torch
import torch.nn.functional as F

import common
from book import load_data, load_model
from ldm_minimal import ddim_sample, guided_eps
from oracle import grade, read
from prepare import BACKGROUNDS, COLOURS, SHAPES

GUIDANCE = 3.0


def named(tokenizer, row):
    """[(token of the colour, token of the shape, object)] for each object of a scene's caption."""
    pieces = [piece.removesuffix("</w>") for piece in tokenizer.pieces(row["text"])]
    things = {(thing["colour"], thing["shape"]): thing for thing in row["scene"]["things"]}
    found = []
    for i, piece in enumerate(pieces):
        if piece in SHAPES:
            found.append((i, i + 1, things[pieces[i - 1], piece]))  # token 0 is the start mark
    return found


def disc(thing, side):
    """The share of each of side x side positions that an object's disc covers: (side * side,)."""
    line = (torch.arange(64) + 0.5) / 64
    covered = (line - thing["x"]) ** 2 + (line[:, None] - thing["y"]) ** 2 < thing["radius"] ** 2
    return F.avg_pool2d(covered[None].float(), 64 // side).flatten()


# The chapter shows this definition; tests/test_experiments.py compares the two.
def inside(weights, tokens, discs):
    """The share of each token's map that lies in its disc, (B, K).

    weights: (B, N, 77). tokens: (B, K). discs: (B, N, K).
    """
    maps = weights.gather(2, tokens[:, None].expand(-1, weights.shape[1], -1))  # (B, N, K)
    return (maps * discs).sum(dim=1) / maps.sum(dim=1).clamp(min=1e-9)


@torch.no_grad()
def draw(model, context, steps=20, seed=1):
    """Images from contexts (B, 77, 96), whatever these were made of."""
    z = torch.randn(len(context), 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    empty = model.embed([""]).expand_as(context)
    kvs = model.unet.keys_values(torch.cat([empty, context]))
    predict = partial(guided_eps, model.unet, context=kvs, guidance=GUIDANCE)
    *_, (_, z, _) = ddim_sample(predict, model.schedule, z, steps=steps)
    return model.decode(z)


def grades(images, captions):
    """What the oracle finds of each caption in its image: a list of {"colour 1": True, ...}."""
    graded = zip(common.for_the_oracle(images), captions)
    return [grade(image, caption) for image, caption in graded]


def pairs(what, count, seed=0):
    """Two lists of captions that differ in one word, that of `what`."""
    chance = random.Random(seed)
    first, second = [], []
    for _ in range(count):
        colours = chance.sample(list(COLOURS), 3)
        shapes = chance.sample(list(SHAPES), 3)
        backgrounds = chance.sample(list(BACKGROUNDS), 2)
        relation = chance.choice(["left of", "above"])
        caption = f"a {colours[0]} {shapes[0]} {relation} a {colours[1]} {shapes[1]}"
        caption += f" on a {backgrounds[0]} background"
        exchanged = {
            "colour 1": (colours[0], colours[2]),
            "colour 2": (colours[1], colours[2]),
            "shape 1": (shapes[0], shapes[2]),
            "shape 2": (shapes[1], shapes[2]),
            "background": backgrounds,
        }
        old, new = exchanged[what]
        first.append(caption)
        second.append(caption.replace(f" {old} ", f" {new} "))
    return first, second


def parts(tokenizer, first, second):
    """Which of the 77 positions belong to what: {name: (B, 77) bool}."""
    word = tokenizer(first) != tokenizer(second)  # the one word in which they differ
    position = torch.arange(77)
    end = (tokenizer(first) == tokenizer.end).int().argmax(dim=1, keepdim=True)
    after_word = position > word.int().argmax(dim=1, keepdim=True)
    return {
        "the word itself": word,
        "later words": after_word & (position < end),
        "end mark": position == end,
        "padding": position > end,
    }


def scenes_of(things):
    """The rows of test scenes with so many objects, without the held-out pairs."""
    rows = []
    for row in load_data("test").rows:
        if row["split"] == "test" and len(row["scene"]["things"]) == things:
            rows.append(row)
    return rows


def stack_discs(objects, side):
    """(N, side * side, K) of the K objects in each of N images."""
    of_each = [torch.stack([disc(thing, side) for thing in things], dim=1) for things in objects]
    return torch.stack(of_each)


def follow_maps(rows, steps):
    """Draw the captions, read where the objects came to lie, and score every step's maps there.

    {"t": of each step, "colour": shares of the colour words' maps in their discs, by layer and
    step, "colour, other": in the other object's disc, likewise "shape" and "shape, other"}
    """
    model = load_model()
    layers = model.unet.cross_attentions()
    for layer in layers:
        layer.keep_weights = True
    timesteps, film = [], []
    captions = [row["text"] for row in rows]
    generator = torch.Generator().manual_seed(0)
    options = {"steps": steps, "guidance": GUIDANCE, "generator": generator}
    for t, z, _ in model.denoise(captions, **options):  # noqa: B007
        timesteps.append(t)
        # Of the batch's second half, which saw the caption: the mean over heads, (N, h * w, 77).
        film.append([layer.weights.chunk(2)[1].mean(dim=1) for layer in layers])
    with torch.no_grad():
        x = model.decode(z)

    as_asked, objects, tokens = [], [], []
    for i, image in enumerate(common.for_the_oracle(x)):
        seen = {(thing.colour, thing.shape): thing for thing in read(image).things}
        words = named(model.tokenizer, rows[i])
        kinds = [(thing["colour"], thing["shape"]) for *_, thing in words]
        if all(kind in seen for kind in kinds):
            as_asked.append(i)
            objects.append([dataclasses.asdict(seen[kind]) for kind in kinds])
            tokens.append([[colour, shape] for colour, shape, _ in words])
    tokens = torch.tensor(tokens)  # (N, K, 2)
    discs = {side: stack_discs(objects, side) for side in (4, 8)}

    def shares(tokens, flip):
        by_layer = [[] for _ in layers]
        for maps in film:
            for weights, by_step in zip(maps, by_layer):
                places = discs[math.isqrt(weights.shape[1])]
                places = places.flip(2) if flip else places
                by_step.append(round(inside(weights[as_asked], tokens, places).mean().item(), 3))
        return by_layer

    found = {
        "pictures": len(rows),
        "as asked": len(as_asked),
        "t": timesteps,
        "area": round(discs[8].mean().item(), 4),
    }
    for i, word in enumerate(("colour", "shape")):
        found[word] = shares(tokens[..., i], flip=False)
        found[f"{word}, other"] = shares(tokens[..., i], flip=True)
    return found


@common.experiment("05/drawn", steps=50, guidance=GUIDANCE)
def attention_while_drawing(steps, guidance):
    """64 captions of two objects and 64 of one."""
    two = follow_maps(scenes_of(2)[64:128], steps)
    return {"two": two, "one": follow_maps(scenes_of(1)[:64], steps)}, None


@common.beginning("05/drawn")
def one_object_drawn(record):
    before = record["one"]
    now = follow_maps(scenes_of(1)[: before["pictures"]], record["steps"])
    return [[found["as asked"], found["colour"][-1][0]] for found in (now, before)]


@common.experiment("05/swap", pictures=64, steps=25, guidance=GUIDANCE)
def swapped_vectors(pictures, steps, guidance):
    """Captions that differ in one word: with a part of the other's vectors, is its word drawn?"""
    model = load_model().requires_grad_(False)
    what = ["colour 1", "shape 1", "colour 2", "shape 2", "background"]
    follows = []
    for kind in what:
        first, second = pairs(kind, pictures)
        own, other = model.embed(first), model.embed(second)
        positions = parts(model.tokenizer, first, second)
        positions["all but the word"] = ~positions["the word itself"]
        shares = []
        for chosen in positions.values():
            drawn = draw(model, torch.where(chosen[..., None], other, own), steps)
            followed = sum(found[kind] for found in grades(drawn, second))
            shares.append(round(followed / pictures, 3))
        follows.append(shares)
    return {"what": what, "parts": list(positions), "follows": follows}, None


MARKS = ["all of it", "count", "colour", "shape", "relation", "background"]


@common.experiment("05/words", pictures=256, steps=25, guidance=GUIDANCE, marks=MARKS)
def spoilt_contexts(pictures, steps, guidance, marks):
    """What is right in images whose words lost their order, or whose padding is another's."""
    model = load_model().requires_grad_(False)
    tokenizer = model.tokenizer
    captions = [row["text"] for row in scenes_of(2)[64 : 64 + pictures]]
    chance = random.Random(0)
    shuffled = [" ".join(chance.sample(text.split(), len(text.split()))) for text in captions]
    end = (tokenizer(captions) == tokenizer.end).int().argmax(dim=1, keepdim=True)
    padding = (torch.arange(77) > end)[..., None]
    plain = model.embed(captions)
    contexts = {
        "as asked": plain,
        "words shuffled": model.embed(shuffled),
        "padding: zeros": torch.where(padding, 0.0, plain),
        "padding: of the empty caption": torch.where(padding, model.embed([""]), plain),
        "padding: of the next caption": torch.where(padding, plain.roll(1, dims=0), plain),
    }
    model.text_encoder.position_embedding.weight.data.zero_()
    contexts["positions forgotten"] = model.embed(captions)
    shares = []
    for context in contexts.values():
        drawn = [draw(model, part, steps, seed=i) for i, part in enumerate(context.split(64))]
        outcomes = collections.defaultdict(list)
        for found in grades(torch.cat(drawn), captions):
            outcomes["all of it"].append(all(found.values()))
            for name, holds in found.items():  # such as "colour 1"
                outcomes[name.split()[0]].append(holds)
        shares.append([round(sum(outcomes[name]) / len(outcomes[name]), 3) for name in marks])
    return {"contexts": list(contexts), "share": shares}, None


if __name__ == "__main__":
    common.main("05")
