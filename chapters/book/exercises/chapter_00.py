"""Chapter 0, the whole trick."""

import functools

import torch

from ..grading import Exercise
from ..loading import load_model

EXERCISES = {}

EXERCISES["0.1"] = Exercise(
    reference=3 * 1024**2 / (16 * 128**2),
    tolerance=1e-3,
    mistakes={
        "those are the positions; a pixel has 3 numbers, a position of this latent 16": 64,
    },
    otherwise="count both: 3 x 1024 x 1024 numbers, and 16 for each of 128 x 128 positions",
    also_right=[12],
    also_wrong={"count both": 48},
)

EXERCISES["0.2a"] = Exercise(
    reference=60,
    otherwise="every step asks the U-Net twice, with the prompt and without",
    also_wrong={"twice": [30, 100]},
)

EXERCISES["0.2b"] = Exercise(
    reference=30,
    otherwise="with guidance 1 a step asks the U-Net once",
    also_wrong={"once": [60, 1]},
)

NOISE = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(11))


shipped_model = functools.cache(functools.partial(load_model, version=2))


@torch.no_grad()
def draw(answer, z):
    return answer(shipped_model(), "a red circle", z)


def draw_from(model, prompt, z, guidance=5.0):
    *_, (_, z, _) = model.denoise([prompt], guidance=guidance, z=z)
    return model.decode(z)[0]


@functools.cache
def image(guidance):
    """What `draw` gives from NOISE: it takes seconds, so it is drawn once."""
    return draw(lambda model, prompt, z: draw_from(model, prompt, z, guidance), NOISE)


EXERCISES["0.3"] = Exercise(
    reference=lambda *_: image(5.0),
    inputs=[(NOISE,)],
    call=draw,
    tolerance=0.01,
    form="one image: decode the last latent",
    mistakes={
        "that is a batch of one, (1, 3, 32, 32); take its first image": lambda *_: image(5.0)[None],
        "that is guidance 7.5, what `denoise` does by itself": lambda *_: image(7.5),
    },
    otherwise="that is another image; does it start from z, and is it the last step's latent that "
    "is decoded?",
    also_right=[lambda m, p, z: m.decode(list(m.denoise([p], guidance=5.0, z=z))[-1][2])[0]],
    also_wrong={
        "start from z": lambda model, prompt, z: draw_from(model, prompt, torch.zeros_like(z)),
        "decode the last latent": lambda model, prompt, z: z[0],
    },
)

EXERCISES["0.4"] = Exercise(
    reference="CBA",
    mistakes={
        "right for mistake 1; splinters all over mean that noise was decoded": "CAB",
        "right for mistake 2; which of the others does not show the prompt at all?": "ABC",
    },
    otherwise="guidance 0 does not hear the prompt; a noised latent decodes to splinters "
    "everywhere; too much guidance gives colours that are too strong",
    also_wrong={"guidance 0 does not hear": ["BAC", "cba"]},
)
