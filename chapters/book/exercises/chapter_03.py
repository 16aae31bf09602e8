"""Chapter 3, a VAE with a perceptual loss."""

import math

import torch

from ..grading import Exercise

EXERCISES = {}

EXERCISES["3.1"] = Exercise(
    reference=16 * 256 * 256 * 3 / (4 * 32 * 32 * 16),
    tolerance=1e-3,
    mistakes={
        "those are the positions; a pixel has 3 numbers, a position of this latent 16": 256,
        "inverted: the film has more numbers than its latent": 1 / 48,
    },
    otherwise="count both: 16 x 256 x 256 x 3 numbers, and how many positions with 16?",
    also_right=[48],
    also_wrong={"count both": 12},
)

VALUES = torch.tensor([0.1, 0.2, 0.4, 0.9, 5.0])

EXERCISES["3.2"] = Exercise(
    reference=lambda values, power: values.mean() if power == 2 else values.median(),
    inputs=[(VALUES, 2), (VALUES, 1)],
    tolerance=0.01,
    otherwise="for power {1} another guess costs less; try some, and see which value wins",
    also_right=[lambda values, power: {2: values.mean().item(), 1: values.sort().values[2]}[power]],
    also_wrong={
        "power 1": lambda values, power: values.mean(),
        "power 2": [
            lambda values, power: values.median(),
            lambda values, power: values.median() if power == 2 else values.mean(),
        ],
    },
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


def slope(loss, weight, create_graph=False):
    """The length of the loss's gradient."""
    (gradient,) = torch.autograd.grad(loss, weight, retain_graph=True, create_graph=create_graph)
    return gradient.norm()


def adaptive_weight(reconstruction, adversarial, weight, create_graph=False, most=1e4):
    numerator = slope(reconstruction, weight, create_graph)
    return (numerator / (slope(adversarial, weight) + 1e-4)).clamp(max=most)


def weigh(answer, adversarial_scale):
    """The weight, and whether a gradient flows through it."""
    last_weight = torch.tensor([3.0, 4.0], requires_grad=True)
    reconstruction = (last_weight**2).sum()  # a gradient of length 10
    adversarial = adversarial_scale * last_weight.sum()
    got = answer(reconstruction, adversarial, last_weight)
    has_graph = isinstance(got, torch.Tensor) and got.requires_grad
    return got, float(has_graph)


def why_it_weighs_wrong(got, adversarial_scale):
    if adversarial_scale == 0:
        return "where the discriminator's gradient is 0 the weight must stop at 1e4"
    return "another number; divide the two lengths (norms) of the gradients at last_weight"


EXERCISES["3.4"] = Exercise(
    reference=adaptive_weight,
    inputs=[(0.01,), (0.0,)],
    call=weigh,
    tolerance=1e-3,
    mistakes={
        "inverted: the discriminator must pull as hard as the reconstruction, so the "
        "reconstruction's gradient is divided by it": lambda r, a, w: adaptive_weight(a, r, w),
        "delta = 1e-4 is missing in the denominator": lambda r, a, w: slope(r, w) / slope(a, w),
        "a gradient still flows through it; detach it": lambda r, a, w: adaptive_weight(
            r, a, w, create_graph=True
        ),
    },
    otherwise=why_it_weighs_wrong,
    also_right=[lambda r, a, w: min(1e4, slope(r, w).item() / (slope(a, w).item() + 1e-4))],
    also_wrong={
        "1e4": lambda r, a, w: adaptive_weight(r, a, w, most=math.inf),
        "lengths": lambda r, a, w: (r / a).clamp(max=1e4),
    },
)
