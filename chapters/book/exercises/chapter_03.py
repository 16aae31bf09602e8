"""Chapter 3, a VAE with a perceptual loss."""

import math

import torch

from ..grading import Exercise

EXERCISES = {}

VALUES = torch.tensor([0.1, 0.2, 0.4, 0.9, 5.0])

EXERCISES["3.1"] = Exercise(
    reference=lambda values, power: values.mean() if power == 2 else values.median(),
    inputs=[(VALUES, 2), (VALUES, 1)],
    tolerance=0.01,
    otherwise="for power {1} another answer costs less; try some, and see which value wins",
    also_right=[lambda values, power: {2: values.mean().item(), 1: values.sort().values[2]}[power]],
    also_wrong={
        "power 1": lambda values, power: values.mean(),
        "power 2": [
            lambda values, power: values.median(),
            lambda values, power: values.median() if power == 2 else values.mean(),
        ],
    },
)

EXERCISES["3.2"] = Exercise(
    reference=lambda a, w: (w / (2 * a + w)) ** 0.5,
    inputs=[(0.8, 0.1), (3.0, 1.0), (0.2, 5.0)],
    mistakes={
        "that is the variance; sigma is its root": lambda a, w: w / (2 * a + w),
        "by sigma^2, the derivative of w/2 sigma^2 is w/2, not w": lambda a, w: (
            (w / (a + w)) ** 0.5
        ),
        "the KL has sigma^2 itself, too: for a = 0 the answer must be 1": lambda a, w: (
            (w / (2 * a)) ** 0.5
        ),
        "inverted: the more the noise harms the image, the smaller sigma must be": lambda a, w: (
            ((2 * a + w) / w) ** 0.5
        ),
    },
    otherwise="for a = {0} and w = {1} it is another number; take the derivative of the loss by "
    "sigma^2 and set it to 0",
    also_right=[lambda a, w: 1 / (1 + 2 * a / w) ** 0.5],
    also_wrong={"derivative": lambda a, w: w / a},
)


def kl(mean_1, std_1, mean_2, std_2):
    distance = (std_1**2 + (mean_1 - mean_2) ** 2) / (2 * std_2**2)
    return math.log(std_2 / std_1) + distance - 0.5


EXERCISES["3.3"] = Exercise(
    reference=kl,
    inputs=[
        tuple(torch.tensor(numbers, dtype=torch.float64))
        for numbers in ([0.3, 0.5, 0.0, 1.0], [1.0, 2.0, -0.5, 0.7], [0.2, 0.4, 0.9, 1.5])
    ],
    mistakes={
        "that is the KL the other way round; it is not symmetric": lambda *g: kl(*g[2:], *g[:2]),
        "that is in bits; nats come from the natural logarithm": lambda *g: kl(*g) / math.log(2),
    },
    otherwise="for ({0:g}, {1:g}, {2:g}, {3:g}) it is another number; start from the mean, over "
    "the first Gaussian, of log p_1 - log p_2",
    also_wrong={"log p_1": lambda m_1, s_1, m_2, s_2: kl(m_1, s_1, 0.0, 1.0)},
)


def patch_side(layers):
    side = 1
    for kernel, stride in reversed(layers):
        side = (side - 1) * stride + kernel
    return side


def forwards(layers):
    return patch_side(list(reversed(layers)))


def without_gaps(layers):
    side = 1
    for kernel, stride in reversed(layers):
        side = side * stride + kernel
    return side


EXERCISES["3.4"] = Exercise(
    reference=patch_side,
    inputs=[
        ([(3, 2), (5, 3), (4, 1)],),
        ([(4, 2), (4, 1), (4, 1)],),
        ([(4, 2), (4, 2), (4, 1), (4, 1)],),
    ],
    mistakes={
        "begin at the logit: the last layer comes first": forwards,
        "the strides are missing: neighbours of a layer lie stride places apart in the layer "
        "before": lambda layers: 1 + sum(kernel - 1 for kernel, _ in layers),
        "between side outputs there are side - 1 steps, not side": without_gaps,
    },
    otherwise="for the layers {0} it is another number; if side places are needed in a layer, how "
    "many are needed in the layer before it?",
    also_wrong={"how many": lambda layers: sum(kernel * stride for kernel, stride in layers)},
)

EXERCISES["3.5"] = Exercise(
    reference="BCA",
    mistakes={
        "right for mistake 1; which of the two other decoders has never seen a draw? Without the "
        "KL, noise only harms, and sigma becomes small": "BAC",
        "right for mistake 2; a KL of weight 100 spoils the image from the mean, too": "ACB",
        "right for mistake 3; where sigma is near 0 nothing held it up: no KL": "CBA",
    },
    otherwise="in 3.3, what became of sigma without the KL, and in 3.4, what did a heavy KL do to "
    "the restored images?",
    also_wrong={"in 3.3": ["ABC", "CAB"]},
)
