"""Chapter 4, latent rescaling."""

import torch

from ldm_minimal import NoiseSchedule

from ..grading import Exercise

EXERCISES = {}
ALPHA_BARS_AND_SPREADS = [(0.9, 5.49), (0.3, 0.18), (0.5, 2.0)]


def crossing(factor):
    """The t at which factor times the SNR of unit width is nearest to 1."""
    return int((factor * NoiseSchedule().snr() - 1).abs().argmin())


EXERCISES["4.1"] = Exercise(
    reference=crossing(2.6**4),
    tolerance=4e-3,
    mistakes={
        "that is where 6.76 times the SNR is 1; which width does the U-Net see, and what does its "
        "square do to the SNR?": crossing(2.6**2),
        "that is for a width of 1, as the right factor gives it; they multiplied": crossing(1),
        "that is for a width of 1 / 2.6; they multiplied latents that are 2.6 wide": crossing(
            2.6**-2
        ),
        "that is the width; at which t is the SNR of such latents 1?": 2.6**2,
    },
    otherwise="take the width that the U-Net sees; its square times `schedule.snr()` is the SNR; "
    "at which t is it nearest to 1?",
    also_right=[crossing(2.6**4) + 1, crossing(2.6**4) - 1],
    also_wrong={"at which t is it nearest": [500, 999]},
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


def standardise(z, over=(0, 2, 3), correction=1):
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
    reference=standardise,
    inputs=[(Z,)],
    tolerance=0.01,
    mistakes={
        "that is one mean and one spread for all; take each channel's own": lambda z: (
            (z - z.mean()) / z.std()
        ),
    },
    otherwise=what_is_not_white,
    also_right=[lambda z: standardise(z, correction=0)],
    also_wrong={
        "mean is not 0": lambda z: z / z.std(dim=(0, 2, 3), keepdim=True),
        "not 1": lambda z: z - z.mean(dim=(0, 2, 3), keepdim=True),
        "positions": lambda z: standardise(z, over=0),
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
EXERCISES["4.5"] = Exercise(
    reference="BCA",
    mistakes={
        "right for mistake 1; which of the other two sheets has an object in the wrong place, and "
        "which has the right places and distorted outlines?": "BAC",
        "the backgrounds and outlines of A are clean, so its decoder got latents of the right "
        "size": ["ABC", "ACB"],
        "the backgrounds of C are clean, so its decoder got latents of the right size; which sheet "
        "is wrong everywhere?": ["CAB", "CBA"],
    },
    otherwise='answer with the letters A, B and C, each once, such as "ABC"',
    also_wrong={"each once": ["A", "BBA"]},
)
