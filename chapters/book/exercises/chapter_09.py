"""Chapter 9, why latent?"""

import itertools
import math

from ..grading import Exercise, Hint

EXERCISES = {}


def which_number_is_wrong(got):
    if abs(got[0] - 12) > 1e-3:
        return "look again at the numbers: 3 x 1024 x 1024 against 16 x 128 x 128"
    if abs(got[1] - 64) > 1e-3:
        return "look again at the positions: 8 x 8 pixels become one"
    return "look again at the pairs: the positions, squared"


EXERCISES["9.1"] = Exercise(
    reference=(12, 64, 4096),
    form="three numbers: how many times fewer scalars, positions and pairs",
    mistakes={
        "those are the latent's; asked for is how many times more the image has": (
            16 * 128**2,
            128**2,
            128**4,
        ),
        "that is Stable Diffusion 1; here a position holds 16 numbers": (48, 64, 4096),
        "inverted: how many times FEWER": (1 / 12, 1 / 64, 1 / 4096),
    },
    otherwise=which_number_is_wrong,
    also_right=[[12.0, 8**2, 8**4]],
    also_wrong={
        "numbers: 3 x": (48, 64, 64),
        "positions:": (12, 8, 64),
        "squared": (12, 64, 128),
        "three": [(12, 64), 12],
    },
)


def conv_flops(c_in, c_out, k, side, stride=1):
    return 2 * k**2 * c_in * c_out * (side // stride) ** 2


EXERCISES["9.2"] = Exercise(
    reference=conv_flops,
    inputs=[(6, 10, 3, 16, 1), (5, 7, 1, 12, 1), (4, 8, 5, 20, 2)],
    mistakes={
        "each multiplication comes with an addition": lambda *sizes: conv_flops(*sizes) / 2,
        "the kernel has k x k weights for each pair of "
        "channels": lambda c_in, c_out, k, side, stride: 2 * k * c_in * c_out * side**2,
        "with a stride of 2 the map that is made has half the side: count the positions where a "
        "result is computed": lambda *sizes_and_stride: conv_flops(*sizes_and_stride[:-1]),
        "the stride shortens both sides": lambda *sizes: conv_flops(*sizes) * sizes[-1],
    },
    otherwise="for {0} to {1} channels, k = {2}, side {3}, stride {4} PyTorch counts {right:,.0f}, "
    "you {got:,.0f}",
    also_wrong={
        "PyTorch counts": lambda c_in, c_out, k, side, stride: 2 * k**2 * c_in * side**2,
    },
)


def steps_unrounded(share, text, unet, decoder, guided=True):
    return share / (1 - share) * (text + decoder) / (2 * unet if guided else unet)


def steps_for(*costs):
    return math.ceil(steps_unrounded(*costs))


def steps_by_search(share, text, unet, decoder, guided=True):
    for steps in itertools.count(1):
        work = steps * (2 * unet if guided else unet)
        if work >= share * (work + text + decoder):
            return steps


def steps_of_the_rest(share, text, unet, decoder, guided=True):
    return max(1, math.ceil(share * (text + decoder) / (2 * unet if guided else unet)))


EXERCISES["9.3"] = Exercise(
    reference=steps_for,
    inputs=[
        (0.9, 0.03, 0.8, 2.51, True),
        (0.5, 0.03, 0.8, 2.51, False),
        (0.97, 1.0, 2.0, 30.0, True),
        (0.75, 0.0, 1.0, 3.1, False),
    ],
    mistakes={
        "those are evaluations; a guided step makes two": lambda *c: steps_for(*c[:4], False),
        "without guidance a step is one evaluation": lambda *costs: steps_for(*costs[:4], True),
        "the text's work counts, too": lambda share, text, *costs: steps_for(share, 0, *costs),
        "steps are whole: the first whole number at which the share is reached": [
            steps_unrounded,
            lambda *costs: math.floor(steps_unrounded(*costs)),
        ],
        "the share is of the whole work, the U-Net's own included": steps_of_the_rest,
    },
    otherwise="for share {0}, text {1}, U-Net {2}, decoder {3}, guided {4} it is {right:.0f}, "
    "not {got:g}",
    also_right=[steps_by_search],
    also_wrong={"it is 15, not 50": lambda *costs: 50},
)


def one_of_two(answer, which, x, r):
    times_dearer, share_of_pairs = answer
    if which == "times_dearer":
        return times_dearer(x, r)
    try:
        return share_of_pairs(x, r)
    except NotImplementedError:
        raise Hint("times_dearer is right; share_of_pairs is still to be written") from None


def dearer(s, r):
    return (1 - s) * r**2 + s * r**4


def share(m, r):
    return (m - r**2) / (r**4 - r**2)


def not_written(*_):
    raise NotImplementedError


def which_of_two_is_wrong(got, which, x, r):
    if which == "share_of_pairs":
        return (
            f"times_dearer is right; solved for s, m = {x:g} at r = {r} does not give s = {got:g}"
        )
    return (
        f"for s = {x}, r = {r} it is not {got:g}; one part grows like the positions, the other "
        "like their square"
    )


EXERCISES["9.4"] = Exercise(
    reference=(dearer, share),
    inputs=[
        ("times_dearer", 0.1525, 8),
        ("times_dearer", 0.3, 2),
        ("times_dearer", 0.0, 4),
        ("times_dearer", 1.0, 3),
        ("share_of_pairs", dearer(0.1525, 8), 8),
        ("share_of_pairs", dearer(0.4, 2), 2),
    ],
    call=one_of_two,
    mistakes={
        "r is the ratio of the sides; positions grow with its square": (
            lambda s, r: dearer(s, r**0.5),
            share,
        ),
        "inverted: s is the share that grows with the pairs": (
            lambda s, r: dearer(1 - s, r),
            share,
        ),
        "that is the share on the large map; the share on the latent is asked for": (
            dearer,
            lambda m, r: share(m, r) * r**4 / m,
        ),
    },
    otherwise=which_of_two_is_wrong,
    also_right=[
        (lambda s, r: r**2 * (1 + s * (r**2 - 1)), lambda m, r: (m / r**2 - 1) / (r**2 - 1)),
    ],
    also_wrong={
        "grows like": (lambda s, r: r**2, not_written),
        "solved for s": (dearer, lambda m, r: m / r**4),
        "still to be written": (dearer, not_written),
    },
)


def images_until_it_pays(answer, once, latent, pixel, fewer):
    try:
        return answer(once, latent, pixel, fewer)
    except ZeroDivisionError:
        if pixel > fewer * latent:
            raise
        return math.nan  # it should have been infinity


def pays_from(once, latent, pixel, fewer):
    return once / (pixel - fewer * latent) if pixel > fewer * latent else math.inf


def why_it_pays_later(got, once, latent, pixel, fewer):
    if pixel <= fewer * latent:
        return "where the latent run costs as much an image, or more, it never pays: infinity"
    return (
        f"for once = {once:g}, latent = {latent:g}, pixel = {pixel:g}, fewer = {fewer:g} it is not "
        f"{got:g}; set both costs equal"
    )


EXERCISES["9.5"] = Exercise(
    reference=pays_from,
    inputs=[
        (40.0, 1.0, 3.0, 1.0),
        (40.0, 1.0, 3.0, 0.5),
        (12.0, 2.0, 3.0, 0.25),
        (5.0, 1.0, 3.0, 2.0),
        (1.0, 2.0, 2.0, 1.0),  # here and in the next it never pays
        (1.0, 1.0, 3.0, 4.0),
    ],
    call=images_until_it_pays,
    mistakes={
        "it is the latent run that sees fewer images: `fewer` belongs to its "
        "steps": lambda once, latent, pixel, fewer: once / (fewer * pixel - latent),
        "`fewer` is left out: the latent run sees only that share of the "
        "images": lambda once, latent, pixel, fewer: once / (pixel - latent),
        "those are the images of the latent run; asked for are those of the pixel "
        "run": lambda once, latent, pixel, fewer: fewer * pays_from(once, latent, pixel, fewer),
        "the latent run's own steps cost something": lambda once, latent, pixel, _: once / pixel,
    },
    otherwise=why_it_pays_later,
    also_wrong={
        "both costs equal": lambda once, *costs: once,
        "never pays": [
            lambda once, latent, pixel, fewer: once / (pixel - fewer * latent),
            lambda *costs: -1 if math.isinf(pays_from(*costs)) else pays_from(*costs),
        ],
    },
)
