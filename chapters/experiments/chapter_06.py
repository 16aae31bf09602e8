"""Chapter 6: what guidance changes: accuracy, variety, colours; and what caption dropout is for."""

import collections

import numpy as np
import torch
import torch.nn.functional as F

import common
from book import load_data, load_evaluator, load_model
from ldm_minimal.metrics import draw_captions
from oracle import UNKNOWN, grade, parse, read
from prepare import (
    BACKGROUNDS,
    COLOURS,
    LINES,
    SIZES,
    Scene,
    Thing,
    coverage,
    pick,
)
from prepare import draw as draw_scene

# ---- measures ----


def variety(features):
    """(prompts, seeds, d) -> the mean of 1 - cosine over all pairs of images of one prompt."""
    f = F.normalize(features, dim=-1)
    seeds = f.shape[1]
    return ((1 - f @ f.mT).sum(dim=(1, 2)) / (seeds * (seeds - 1))).mean().item()


def backgrounds(x, prompts):
    """How many backgrounds a prompt is drawn on: exp of the entropy of their shares, 1 to 4.

    The mean over the prompts. x: (prompts * seeds, 3, H, W).
    """
    names = [read(image).background for image in common.for_the_oracle(x)]
    seeds = len(names) // prompts
    numbers = []
    for i in range(0, len(names), seeds):
        counts = collections.Counter(names[i : i + seeds])
        shares = np.array(list(counts.values())) / seeds
        numbers.append(np.exp(-(shares * np.log(shares)).sum()))
    return float(np.mean(numbers))


def colours(x):
    """Vividness and distance from the palette, of each plain object that the oracle finds: (n, 2).

    Both are relative to the palette's colour of that name.
    """
    found = []
    for image in common.for_the_oracle(x):
        for thing in read(image).things:
            if thing.shape != UNKNOWN and thing.texture == "plain":
                rgb = np.median(image[coverage(thing, 32)[0] > 0.99], axis=0)
                palette = np.array(COLOURS[thing.colour]) / 255
                found.append([np.ptp(rgb) / np.ptp(palette), np.abs(rgb - palette).mean()])
    return torch.tensor(found).view(-1, 2)


def guided_scores(model, guidance, count):
    """On the first `count` test captions.

    "accuracy": the share drawn entirely right; "attributes": the share of single attributes;
    "vividness" and "off": the means of `colours`.
    """
    captions = load_data("test").captions[:count]
    x = draw_captions(model, captions, guidance, seed=0)
    grades = [grade(image, caption) for image, caption in zip(common.for_the_oracle(x), captions)]
    single = [holds for found in grades for holds in found.values()]
    vividness, off = colours(x).mean(dim=0).tolist()
    return {
        "accuracy": round(sum(all(found.values()) for found in grades) / count, 4),
        "attributes": round(sum(single) / len(single), 4),
        "vividness": round(vividness, 4),
        "off": round(off, 4),
    }


# ---- the shipped model at every guidance ----

SHOWN = [
    "a red circle",
    "a large green star",
    "a small blue square",
    "a striped yellow heart",
    "a purple triangle above an orange cross",
    "a cyan heart left of a red circle",
]


def positions_for(relation, rng):
    low, middle, high = LINES
    if relation is None:
        return [(pick(rng, LINES), pick(rng, LINES))]
    row = [(low, middle), (high, middle)]
    column = [(middle, low), (middle, high)]
    pairs = {"left of": row, "right of": row[::-1], "above": column, "below": column[::-1]}
    return pairs[relation]


def size_for(texture, rng):
    """Textured objects are large in the data set, and 3 in 8 of the plain ones."""
    return "large" if texture != "plain" or rng.random() < 3 / 8 else "small"


def scene_for(caption, rng):
    """A scene of which `caption` is true; what it leaves open is as in the data set."""
    stated = parse(caption)
    things = []
    for said, (x, y) in zip(stated.things, positions_for(stated.relation, rng)):
        texture = said.get("texture", "plain")  # a caption names every other texture
        size = said.get("size") or size_for(texture, rng)
        things.append(Thing(said["shape"], said["colour"], size, texture, x, y, SIZES[size]))
    return Scene(stated.background or pick(rng, BACKGROUNDS), tuple(things))


def real_images(captions):
    """Images of which the captions are true: (N, 3, 32, 32)."""
    rng = np.random.default_rng(0)
    images = [torch.from_numpy(draw_scene(scene_for(caption, rng), 32)) for caption in captions]
    return torch.stack(images).permute(0, 3, 1, 2) / 127.5 - 1


@common.experiment(
    "06/sweep", weights=[0, 1, 2, 3, 5, 7.5, 10, 15], captions=128, prompts=SHOWN, seeds=8
)
def sweep(weights, captions, prompts, seeds):
    """Scores and variety at each w; images of six prompts, then of one with eight seeds."""
    model = load_model()
    image_encoder = load_evaluator().image_encoder
    test = load_data("test")
    unfinished = [caption for caption in test.captions if "background" not in caption][:8]
    repeated = [caption for caption in unfinished for _ in range(seeds)]

    @torch.no_grad()
    def varieties(x):
        features = image_encoder(x).unflatten(0, (len(unfinished), seeds))
        return {
            "variety": round(variety(features), 4),
            "backgrounds": round(backgrounds(x, len(unfinished)), 4),
        }

    found, rows, tiles = {}, [], []
    for w in weights:
        x = draw_captions(model, repeated, w, seed=1)
        found[f"{w:g}"] = guided_scores(model, w, captions) | varieties(x)
        rows.append(draw_captions(model, prompts, w, seed=2))
        tiles.append(x[:seeds])
    truth = varieties(real_images(repeated))
    return {"unfinished": unfinished, "truth": truth, "by_w": found}, torch.cat(rows + tiles)


@common.beginning("06/sweep")
def scores_at_5(record):
    now = guided_scores(load_model(), 5, record["captions"])
    return [[scores["accuracy"], scores["off"]] for scores in (now, record["by_w"]["5"])]


# ---- caption dropout ----

PROMPTS = [
    "a red circle",
    "a blue square",
    "a large green star",
    "a yellow heart",
    "a purple triangle",
    "an orange cross",
    "a pink circle on a black background",
    "a cyan square on a white background",
]


def is_legible(image):
    """Does the oracle read a scene of one or two whole objects?"""
    scene = read(image)
    if scene.background == UNKNOWN or not 1 <= len(scene.things) <= 2:
        return False
    return all(thing.shape != UNKNOWN for thing in scene.things)


def new_training(caption_dropout, steps, batch_size):
    model = common.model_with_new_unet()
    recipe = {"steps": steps, "batch_size": batch_size}
    return model, common.denoiser_losses(model, caption_dropout=caption_dropout, **recipe)


@common.experiment(
    "06/dropout", steps=600, batch=64, captions=128, t=list(range(50, 1000, 100)), prompts=PROMPTS
)
def dropout(steps, batch, captions, t, prompts):
    """Two short trainings that differ in how often the caption was dropped.

    Errors with and without a caption, scores by w, and eight images each at w = 0, 1 and 5.
    """
    found, tiles = {}, []
    for rate in (0.1, 0.0):
        model, training = new_training(rate, steps, batch)
        losses = list(training)
        captioned = common.held_out_errors(model, t)
        empty = common.held_out_errors(model, t, [""] * 128)
        uncaptioned = draw_captions(model, [""] * 64, 1.0, seed=0)
        legible = [is_legible(image) for image in common.for_the_oracle(uncaptioned)]
        tiles.append(uncaptioned[:8])
        for w in (1.0, 5.0):
            tiles.append(draw_captions(model, prompts, w, seed=2))
        by_w = {}
        for w in (1, 2, 3, 5, 10) if rate else (1, 5):
            by_w[f"{w:g}"] = guided_scores(model, w, captions)
        found[f"{rate:g}"] = {
            "mse": common.means(losses, 20),
            "captioned": captioned,
            "empty": empty,
            "legible": round(sum(legible) / len(legible), 4),
            "by_w": by_w,
        }
        print(rate, found[f"{rate:g}"], flush=True)
    return {"by_rate": found}, torch.cat(tiles)


@common.beginning("06/dropout")
def twenty_steps_without_dropout(record):
    _, training = new_training(0.0, record["steps"], record["batch"])
    return [common.first_mean(training, 20)], record["by_rate"]["0"]["mse"][:1]


if __name__ == "__main__":
    common.main("06")
