"""Chapter 4, latent rescaling."""

import torch

from ..grading import Exercise

EXERCISES = {}
ALPHA_BARS_AND_SPREADS = [(0.9, 5.49), (0.3, 0.18), (0.5, 2.0)]

EXERCISES["4.1"] = Exercise(
    reference=2.6**2,
    tolerance=1e-3,
    mistakes={
        "that is what they wanted; they multiply by 2.6 latents that are 2.6 wide already": 1,
    },
    otherwise="a standard deviation of 2.6, and every number times 2.6",
    also_right=[6.76],
    also_wrong={"every number": 1 / 2.6},
)

EXERCISES["4.2"] = Exercise(
    reference=lambda a, s: a / (a + s**2 * (1 - a)),
    inputs=[(torch.tensor(a).double(), s) for a, s in ALPHA_BARS_AND_SPREADS],
    mistakes={
        "inverted: the new schedule must drown a wide latent faster, not slower": lambda a, s: (
            a / (a + (1 - a) / s**2)
        ),
        "the SNR has s squared: it is a ratio of variances": lambda a, s: a / (a + s * (1 - a)),
    },
    otherwise="for alpha_bar = {0:g} and s = {1}: s^2 a' / (1 - a') must be a / (1 - a); "
    "solve it for a'",
    also_right=[lambda a, s: 1 / (1 + s**2 * (1 / a - 1))],
    also_wrong={"solve": lambda a, s: a / s**2},
)

STD = torch.tensor([0.5, 1.0, 2.0, 4.0])[:, None, None]
MEAN = torch.tensor([1.0, 0.0, -1.0, 3.0])[:, None, None]
Z = MEAN + STD * torch.randn(50, 4, 8, 8, generator=torch.Generator().manual_seed(3))


def whiten(z, over=(0, 2, 3), correction=1):
    spread = z.std(dim=over, keepdim=True, correction=correction)
    return (z - z.mean(dim=over, keepdim=True)) / spread


def what_is_not_white(got, z):
    if got.mean(dim=(0, 2, 3)).abs().max() > 0.01:
        return "a channel's mean is not 0"
    if (got.std(dim=(0, 2, 3)) - 1).abs().max() > 0.01:
        return "a channel's standard deviation is not 1"
    return (
        "each channel's mean and spread are right, but images or positions were treated "
        "differently; shift and scale every number of a channel alike"
    )


EXERCISES["4.3"] = Exercise(
    reference=whiten,
    inputs=[(Z,)],
    tolerance=0.01,
    mistakes={
        "that is one mean and one spread for all; take each channel's own": lambda z: (
            (z - z.mean()) / z.std()
        ),
    },
    otherwise=what_is_not_white,
    also_right=[lambda z: whiten(z, correction=0)],
    also_wrong={
        "mean is not 0": lambda z: z / z.std(dim=(0, 2, 3), keepdim=True),
        "not 1": lambda z: z - z.mean(dim=(0, 2, 3), keepdim=True),
        "positions": lambda z: whiten(z, over=0),
        "shape": lambda z: z.flatten(1),
    },
)

EXERCISES["4.4"] = Exercise(
    reference=lambda a, s: a * s**2 / (a * s**2 + 1 - a),
    inputs=ALPHA_BARS_AND_SPREADS,
    mistakes={
        "that is the part that the best guess explains; the loss is what remains of a variance of "
        "1": lambda a, s: (1 - a) / (a * s**2 + 1 - a),
        "the variance of s times something has s squared": lambda a, s: a * s / (a * s + 1 - a),
    },
    otherwise="for alpha_bar = {0} and s = {1} it is another number; "
    "1 - Cov(eps, z_t)^2 / Var(z_t)",
    also_right=[lambda a, s: 1 - (1 - a) / (a * s**2 + 1 - a)],
    also_wrong={"another": lambda a, s: a * s**2},
)
