"""Chapter 1, the noise schedule."""

import math

import torch

from ..grading import Exercise

EXERCISES = {}
BETAS = 0.01 + 0.1 * torch.rand(40, generator=torch.Generator().manual_seed(7)).double()


def kept(betas):
    return torch.cumprod(1 - betas, dim=0)


def snr(betas):
    return kept(betas) / (1 - kept(betas))


EXERCISES["1.1"] = Exercise(
    reference=lambda betas: 10 * snr(betas).log10(),
    inputs=[(BETAS,)],
    mistakes={
        "these are bels; a decibel is a tenth of one": lambda betas: snr(betas).log10(),
        "20 log10 is for amplitudes; SNR is a ratio of variances": lambda b: 20 * snr(b).log10(),
        "that is the ratio of one step; alpha_bar is the product of all steps so "
        "far": lambda betas: 10 * ((1 - betas) / betas).log10(),
        "the logarithm is the one to base 10": lambda betas: 10 * snr(betas).log(),
        "that is noise to signal: invert the ratio": lambda betas: -10 * snr(betas).log10(),
    },
    otherwise="the numbers are others; alpha_bar_t is the product of 1 - beta up to t, "
    "SNR is alpha_bar / (1 - alpha_bar)",
    also_right=[lambda betas: [10 * math.log10(ratio) for ratio in snr(betas)]],
    also_wrong={"others": kept},
)


def end_of_line(last_beta, T=100):
    """alpha_bar after T steps whose beta rises in a straight line from 0.0001 to `last_beta`."""
    return kept(torch.linspace(1e-4, float(last_beta), T, dtype=torch.float64))[-1].item()


EXERCISES["1.2a"] = Exercise(
    reference=end_of_line(0.02),
    tolerance=0.02,
    mistakes={
        "that is in per cent; alpha_bar is between 0 and 1": 100 * end_of_line(0.02),
        "that is its square root, the signal's amplitude": end_of_line(0.02) ** 0.5,
    },
    otherwise="the share is the product of all 1 - beta",
    also_right=[0.3642, 0.36],
    also_wrong={"product": [0.5, 4e-5]},
)

EXERCISES["1.2b"] = Exercise(
    reference=0.189,
    call=lambda last_beta: end_of_line(last_beta) / end_of_line(0.02, T=1000),
    tolerance=0.2,
    otherwise="with it {got:.2g} times as much of the image is left as after DDPM's thousand steps",
    also_right=[0.19],
    also_wrong={"is left": [0.2, 0.02, 0.15]},
)


def zero_terminal_snr(alpha_bars):
    root = alpha_bars.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def which_end_is_wrong(got, alpha_bars):
    last = got[-1].item()
    if not got.isfinite().all() or abs(last) > 1e-9:
        return f"the last alpha_bar is {last:.3g}; it must be 0"
    if not math.isclose(got[0], alpha_bars[0], rel_tol=1e-4):
        return "the first alpha_bar has changed; stretch after the shift"
    return "both ends are right, the middle is not: shift and stretch the square roots"


EXERCISES["1.3"] = Exercise(
    reference=zero_terminal_snr,
    inputs=[(kept(BETAS),)],
    mistakes={
        "these are the roots; square them": lambda a: zero_terminal_snr(a).sqrt(),
    },
    otherwise=which_end_is_wrong,
    also_wrong={
        "must be 0": lambda a: a,
        "first": [lambda a: a - a[-1], lambda a: a.sqrt() - a[-1].sqrt()],
        "square roots": lambda a: (a - a[-1]) * a[0] / (a[0] - a[-1]),
        "shape": lambda a: a[:-1],
    },
)


def jump(answer, alpha_bar_s, alpha_bar_t):
    a, b = answer(torch.tensor(alpha_bar_s).double(), torch.tensor(alpha_bar_t).double())
    return a, abs(b)  # -eps is as good a noise as eps


def which_factor_is_wrong(got, alpha_bar_s, alpha_bar_t):
    if not math.isclose(got[0], (alpha_bar_t / alpha_bar_s) ** 0.5, rel_tol=1e-6):
        return "a is not right: the signal must shrink from sqrt(alpha_bar_s) to sqrt(alpha_bar_t)"
    return (
        "b is not right: the noise that is there, shrunk by a, and the new noise must have "
        "variance 1 - alpha_bar_t together"
    )


EXERCISES["1.4"] = Exercise(
    reference=lambda s, t: ((t / s) ** 0.5, (1 - t / s) ** 0.5),
    inputs=[(0.9, 0.5), (0.4, 0.05)],
    call=jump,
    tolerance=1e-6,
    mistakes={
        "that is the noise's variance; b is its root": lambda s, t: ((t / s) ** 0.5, 1 - t / s),
    },
    otherwise=which_factor_is_wrong,
    also_right=[lambda s, t: [(t / s).sqrt(), (1 - t - t / s * (1 - s)).sqrt()]],
    also_wrong={
        "a is not": lambda s, t: (t / s, (1 - t / s) ** 0.5),
        "b is not": [
            lambda s, t: ((t / s) ** 0.5, (1 - t) ** 0.5),
            lambda s, t: ((t / s) ** 0.5, (s - t) ** 0.5),
        ],
    },
)
