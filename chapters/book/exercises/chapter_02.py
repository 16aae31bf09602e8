"""Chapter 2, a simple diffusion model."""

import torch

from ..grading import Exercise
from .chapter_01 import BETAS, kept

EXERCISES = {}

EXERCISES["2.1"] = Exercise(
    reference=lambda s, a: (1 - a) ** 0.5 / (a * s**2 + 1 - a),
    inputs=[(0.5, 0.8), (2.0, 0.1), (1.0, 0.3)],
    mistakes={
        "the covariance of eps and x_t is sqrt(1 - alpha_bar), not its square": lambda s, a: (
            (1 - a) / (a * s**2 + 1 - a)
        ),
    },
    otherwise="for s = {0} and alpha_bar = {1} it is another number; "
    "x_t has variance alpha_bar s^2 + 1 - alpha_bar",
    also_wrong={"variance": [lambda s, a: (1 - a) ** 0.5, lambda s, a: 1 / (1 - a) ** 0.5]},
)

X_T, V = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))

EXERCISES["2.2"] = Exercise(
    reference=lambda x, v, a: (1 - a) ** 0.5 * x + a**0.5 * v,
    inputs=[(X_T, V, torch.tensor(0.3, dtype=torch.float64))],
    mistakes={
        "that is the clean image, not the noise": lambda x, v, a: a**0.5 * x - (1 - a) ** 0.5 * v,
    },
    otherwise="solve the two equations of 2.8, of x_t and of v, for eps",
    also_wrong={"two equations": lambda x, v, a: v},
)

EXERCISES["2.3"] = Exercise(
    reference=lambda a: a / (1 - a),
    inputs=[(0.9,), (0.2,)],
    mistakes={
        "inverted: where there is little noise, a small error in x_0 is a large one in "
        "eps": lambda a: (1 - a) / a,
        "that is the factor of the error; the loss has its square": lambda a: (a / (1 - a)) ** 0.5,
    },
    otherwise="write eps_hat by x_0_hat, subtract the true ones, and square",
    also_right=[lambda a: 1 / (1 / a - 1)],
    also_wrong={"subtract": lambda a: 1 / (1 - a)},
)


def sigmas(betas):
    before = torch.cat([torch.ones(1), kept(betas)[:-1]])
    return (betas * (1 - before) / (1 - kept(betas))).sqrt()


def from_zero(values):
    return torch.cat([torch.zeros(1), values[1:]])


def which_sigma_is_wrong(got, betas):
    if abs(got[0]) > 1e-7:
        return "sigma_0 must be 0: at the last step nothing is added"
    return "sigma_t^2 = beta_t (1 - alpha_bar of the step before) / (1 - alpha_bar_t)"


EXERCISES["2.4"] = Exercise(
    reference=sigmas,
    inputs=[(BETAS,)],
    mistakes={
        "these are the variances; take the root": lambda betas: sigmas(betas) ** 2,
        "those are sqrt(beta_t), the noise of a forward step": lambda b: from_zero(b.sqrt()),
    },
    otherwise=which_sigma_is_wrong,
    also_wrong={
        "must be 0": torch.sqrt,
        "shape": lambda betas: betas[1:],
        "the step before": from_zero,
    },
)

EXERCISES["2.5"] = Exercise(
    reference="CAB",
    mistakes={
        "right for mistake 1; a network that only knows t = 500 is wrong at every other t": "CBA",
    },
    otherwise="section 2.7 shows what the missing fresh noise does; which of the other two still "
    "has two heaps near the right places?",
    also_wrong={"section 2.7": ["ABC", "BAC"]},
)
