"""Chapter 6, guidance."""

import torch

from ..grading import Exercise, Hint

EXERCISES = {}
RANDOM = torch.Generator().manual_seed(11)

EXERCISES["6.1a"] = Exercise(
    reference=7.5,
    mistakes={
        "that is theirs; ours is not the same number": 6.5,
        "the other way round: theirs is ours minus 1": 5.5,
    },
    otherwise="compare the factor of the guess with the caption: 1 + w' there, w here",
    also_right=[torch.tensor(7.5)],
    also_wrong={"factor": 8.5},
)

EXERCISES["6.1b"] = Exercise(
    reference=4 * 50 * 2,
    mistakes={
        "that is without the empty half; at w = 7.5 each prompt needs two guesses a step": 200,
        "these are passes; every pass holds several rows": [50, 100],
    },
    otherwise="steps, times prompts, times guesses",
    also_right=[400.0],
    also_wrong={"times": 800},
)

Z = torch.randn(3, 4, 2, 2, dtype=torch.float64, generator=RANDOM)
T = torch.tensor([900, 500, 20])
ASKED, OTHER = torch.randn(2, 3, 7, 5, dtype=torch.float64, generator=RANDOM)


def pretended_unet(calls: list):
    """A U-Net that depends on all its inputs, row by row, and notes the rows of each call."""

    def unet(z, t, context):
        if not len(z) == len(t) == len(context):
            raise Hint(
                "the sizes do not agree: z_t and t go in twice, too, one copy for each half of "
                "the context"
            )
        calls.append(len(z))
        return z * context.mean(dim=(1, 2)).view(-1, 1, 1, 1) + 0.01 * t.view(-1, 1, 1, 1)

    return unet


def both_guesses(unet, z, t, asked, other):
    return unet(torch.cat([z, z]), torch.cat([t, t]), torch.cat([other, asked]))


def guided(unet, z, t, asked, other, w):
    eps_other, eps_asked = both_guesses(unet, z, t, asked, other).chunk(2)
    return eps_other + w * (eps_asked - eps_other)


def guide(answer, wanted, *arguments):
    calls = []
    guess = answer(pretended_unet(calls), *arguments)
    return guess if wanted == "guess" else len(calls)


def why_guided_wrong(got, wanted, *arguments):
    if wanted == "guess":
        return (
            "start from the guess with the negative prompt and add w times the difference; every "
            "row needs its own t"
        )
    return f"the numbers are right, in {got:g} calls; put both halves into one batch of six rows"


EXERCISES["6.2"] = Exercise(
    reference=guided,
    inputs=[("guess", Z, T, ASKED, OTHER, 4.0), ("number of calls", Z, T, ASKED, OTHER, 4.0)],
    call=guide,
    form="that of z_t",
    mistakes={
        "inverted: this moves towards the negative prompt; the negative half replaces the empty "
        "one": lambda u, z, t, asked, negative, w: guided(u, z, t, negative, asked, w),
        "that is Ho & Salimans's w; with the book's, w = 1 is the plain guess of the "
        "prompt": lambda u, z, t, asked, negative, w: guided(u, z, t, asked, negative, w + 1),
    },
    otherwise=why_guided_wrong,
    also_right=[
        lambda u, z, t, a, n, w: torch.lerp(*both_guesses(u, z, t, a, n).chunk(2), weight=w),
    ],
    also_wrong={
        "one batch": lambda u, z, t, a, n, w: u(z, t, n) + w * (u(z, t, a) - u(z, t, n)),
        "shape": lambda u, z, t, a, n, w: both_guesses(u, z, t, a, n),
        "its own t": lambda u, z, t, a, n, w: guided(u, z, t.flip(0), a, n, w),
        "go in twice": lambda u, z, t, a, n, w: u(z, t, torch.cat([n, a])),
    },
)


def sharpened(m, s, S, w, power=1):
    variance = 1 / (w / s**2 + (1 - w) / S**2)
    return w * m / s**2 * variance, variance**power


def sharpened_otherwise(m, s, S, w):
    denominator = w * S**2 + (1 - w) * s**2
    return w * m * S**2 / denominator, torch.tensor(s**2 * S**2 / denominator)


def which_moment_is_wrong(got, m, s, S, w):
    where = f"for m = {m}, s = {s}, S = {S}, w = {w} the variance is"
    variance = sharpened(m, s, S, w)[1]
    if abs(got[1] - variance) < 1e-4 * variance:
        return f"{where} right and the mean is not: it is where the exponent's slope is 0"
    return f"{where} another: add up what stands before -x^2 / 2 in the exponents"


EXERCISES["6.3"] = Exercise(
    reference=sharpened,
    inputs=[(1.0, 0.5, 1.5, 3.0), (-0.4, 0.8, 1.0, 2.0), (2.0, 1.0, 3.0, 1.0)],
    form="two numbers, (mean, variance)",
    mistakes={
        "the mean first, then the variance": lambda *g: sharpened(*g)[::-1],
        "that is the standard deviation; give the variance": lambda *g: sharpened(*g, power=0.5),
        "that is 1 over the variance: invert it": lambda *g: sharpened(*g, power=-1),
        "that is p(x|y)^w alone; p(x)^(1 - w) is a Gaussian too, with a negative share of "
        "1 / variance": lambda m, s, S, w: (m, s**2 / w),
    },
    otherwise=which_moment_is_wrong,
    also_right=[sharpened_otherwise],
    also_wrong={
        "the mean is not": lambda m, s, S, w: (w * m, sharpened(m, s, S, w)[1]),
        "is another": lambda m, s, S, w: (m, s**2),
        "two numbers": lambda m, s, S, w: m,
    },
)

EPS = torch.randn(3, 2, 4, 3, 3, dtype=torch.float64, generator=RANDOM)

EXERCISES["6.4"] = Exercise(
    reference=lambda n, a, b, w: n + w * (a - n) + w * (b - n),
    inputs=[(*EPS, 3.0), (*EPS, 1.0)],
    mistakes={
        "the second caption changes the empty guess too: subtract the empty guess from "
        "both": lambda n, a, b, w: n + w * (a + b - n),
        "that is the mean of two guided guesses; by Bayes each caption pulls with its whole "
        "weight": lambda n, a, b, w: n + w * ((a + b) / 2 - n),
        "that is the sum of two guided guesses; p(x), the empty guess, stands there "
        "once": lambda n, a, b, w: n + w * (a - n) + n + w * (b - n),
    },
    otherwise="write p(x | y1, y2) as p(x) p(y1 | x) p(y2 | x) up to a factor, and take the last "
    "two w times",
    also_right=[lambda n, a, b, w: (1 - 2 * w) * n + w * (a + b)],
    also_wrong={"last two": [lambda n, a, b, w: n + w * (a - n), lambda n, a, b, w: n]},
)


def limit(answer, *arguments):
    try:
        return answer(pretended_unet([]), *arguments)
    except RuntimeError as error:
        if "Boolean value" in str(error):
            raise Hint(
                "t holds a time for each row, so one `if` cannot decide: torch.where chooses row "
                "by row"
            ) from error
        if "size of tensor" in str(error):
            raise Hint(
                "the sizes do not agree: a weight for each row has the shape (B, 1, 1, 1)"
            ) from error
        raise


def between(t, low, high):
    return (t >= low) & (t <= high)


def limited(inside=between, outside=1.0):
    """Exercise 6.5, right or with one mistake: which t are guided, and the weight of the others."""

    def guided_inside(unet, z, t, context, w, low, high):
        empty, asked = context.chunk(2)
        weight = torch.where(inside(t, low, high), w, outside).view(-1, 1, 1, 1)
        return guided(unet, z, t, asked, empty, weight)

    return guided_inside


def row_by_row(unet, z, t, context, w, low, high):
    rows = []
    for z_i, t_i, empty, asked in zip(z[:, None], t[:, None], *context[:, None].chunk(2)):
        weight = w if low <= t_i <= high else 1.0
        rows.append(guided(unet, z_i, t_i, asked, empty, weight))
    return torch.cat(rows)


EXERCISES["6.5"] = Exercise(
    reference=limited(),
    inputs=[
        (Z, T, torch.cat([OTHER, ASKED]), 5.0, 300, 700),
        (Z, T, torch.cat([OTHER, ASKED]), 5.0, 20, 500),
    ],
    call=limit,
    form="that of z_t",
    mistakes={
        "outside of the interval that is the unconditional guess, w = 0; plain conditional is "
        "w = 1": limited(outside=0.0),
        "inverted: guided inside of the interval, plain outside": limited(
            lambda t, low, high: ~between(t, low, high)
        ),
        "low and high belong to the interval: low <= t <= high": [
            limited(lambda t, low, high: (t > low) & (t < high)),
            limited(lambda t, low, high: (t > low) & (t <= high)),
            limited(lambda t, low, high: (t >= low) & (t < high)),
        ],
        "all rows came out alike; each row has its own t": [
            limited(lambda t, low, high: t >= 0),
            limited(lambda t, low, high: between(t[0], low, high)),
        ],
    },
    otherwise="w where low <= t <= high, 1 elsewhere, row by row, in the formula of 6.1",
    also_right=[row_by_row],
    also_wrong={
        "in the formula of 6.1": limited(outside=2.0),
        "shape": lambda u, z, t, c, w, low, high: both_guesses(u, z, t, *c.chunk(2)),
        "row by row": lambda u, z, t, c, w, low, high: w if low <= t <= high else 1.0,
        "(B, 1, 1, 1)": lambda u, z, t, c, w, low, high: torch.where(t > low, w, 1.0) * z,
        "go in twice": lambda u, z, t, c, w, low, high: u(z, t, c),
    },
)
