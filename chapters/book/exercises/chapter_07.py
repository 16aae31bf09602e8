"""Chapter 7, DDIM."""

import math

import torch

from ..grading import Exercise, Hint

EXERCISES = {}
RANDOM = torch.Generator().manual_seed(2)

EXERCISES["7.1"] = Exercise(
    reference=2 * len([599, *range(579, 0, -20)]),
    mistakes={
        "those are the steps; guidance asks twice at each": 30,
        "that is the whole way from 999; the times above the start are left out": 100,
    },
    otherwise="count the times of fifty trailing steps that are not above 599, then how often "
    "each asks the U-Net",
    also_right=[60.0],
    also_wrong={"count the times": [58, 50]},
)

NOISES = torch.randn(3, 4, 8, 8, dtype=torch.float64, generator=RANDOM)
WEIGHTS = torch.tensor([2.0, 1.0, -2.0], dtype=torch.float64)


def mixture(noises, weights):
    return torch.tensordot(weights, noises, dims=1)


EXERCISES["7.2"] = Exercise(
    reference=lambda n, w: mixture(n, w) / w.norm(),
    inputs=[(NOISES, WEIGHTS)],
    form="one mixture",
    mistakes={
        "the weighted sum is there, its variance is not 1: divide by what its standard deviation "
        "is": [mixture, lambda n, w: mixture(n, w) / w.sum()],
        "that divides by the variance, not by its root": lambda n, w: mixture(n, w) / (w**2).sum(),
        "nearly: this fixes the length of every mixture, and noise has not one length; divide by "
        "a number that the weights alone give": [
            lambda n, w: mixture(n, w) / mixture(n, w).std(),
            lambda n, w: mixture(n, w) / mixture(n, w).std(correction=0),
            lambda n, w: mixture(n, w) / mixture(n, w).square().mean().sqrt(),
        ],
    },
    otherwise="divide the weighted sum by its standard deviation; the variance of w n is w^2, and "
    "variances add",
    also_right=[lambda n, w: sum(a * b for a, b in zip(w, n)) / (w**2).sum().sqrt()],
    also_wrong={
        "variances add": lambda n, w: n.sum(dim=0) / 3**0.5,
        "one mixture": lambda n, w: n * w[:, None, None, None],
    },
)

EXERCISES["7.3"] = Exercise(
    reference=lambda x, a, w: w * x / (a * w**2 + 1 - a) ** 0.5,
    inputs=[(1.3, 0.2, 0.5), (-0.4, 0.7, 2.0)],
    mistakes={
        "that is the mean of x_0 given x_t, where one single step ends; sampling keeps x_t's "
        "position among the others": lambda x, a, w: a**0.5 * w**2 * x / (a * w**2 + 1 - a),
        "x_t has a spread of its own, sqrt(alpha_bar w^2 + 1 - alpha_bar): divide by it "
        "first": lambda x, a, w: w * x,
        "a factor sqrt(alpha_bar) too many: x_t itself, not x_t / sqrt(alpha_bar), has that "
        "spread": lambda x, a, w: a**0.5 * w * x / (a * w**2 + 1 - a) ** 0.5,
        "that divides by the variance of x_t; its standard deviation is the root": lambda x, a, w: (
            w * x / (a * w**2 + 1 - a)
        ),
    },
    otherwise="for x_t = {0}, alpha_bar = {1}, w = {2} it is another number; how many spreads of "
    "x_t is it from 0, and how many of the data must x_0 be?",
    also_right=[lambda x, a, w: torch.tensor(x) / (a + (1 - a) / w**2) ** 0.5],
    also_wrong={"how many spreads": lambda x, a, w: x / a**0.5},
)

LATENT, CLEAN = torch.randn(2, 5, dtype=torch.float64, generator=RANDOM)


def ddim_step(z, x_hat, a, a_after):
    eps_hat = (z - a**0.5 * x_hat) / (1 - a) ** 0.5
    return a_after**0.5 * x_hat + (1 - a_after) ** 0.5 * eps_hat


def target(z, z_after, a, a_after):
    ratio = ((1 - a_after) / (1 - a)) ** 0.5
    return (z_after - ratio * z) / (a_after**0.5 - ratio * a**0.5)


def teach(answer, a, a_after):
    return answer(LATENT.clone(), ddim_step(LATENT, CLEAN, a, a_after), a, a_after)


EXERCISES["7.4"] = Exercise(
    reference=target,
    inputs=[(0.2, 0.6), (0.5, 0.9), (0.3, 1.0)],
    call=teach,
    mistakes={
        "that is the noise that the student should guess; its clean guess is asked "
        "for": lambda z, z_2, a, b: (z - a**0.5 * target(z, z_2, a, b)) / (1 - a) ** 0.5,
        "the teacher's end is clean only if alpha_bar'' = 1; here it still holds "
        "noise": lambda z, z_2, a, b: z_2,
        "the noise in z'' has a mean of 0 over many, but not here: replace it by eps_hat, written "
        "with x_0_hat and z": lambda z, z_2, a, b: z_2 / b**0.5,
    },
    otherwise="with it, one step from alpha_bar = {0} does not arrive at z'' for alpha_bar'' = {1}",
    also_right=[lambda z, z_2, a, b: CLEAN],
    also_wrong={"does not arrive": lambda z, z_2, a, b: (z_2 - z) / (b**0.5 - a**0.5)},
)

WIDTH = 0.5  # of the data, one Gaussian
ALPHA_BARS = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), dim=0)


def error_after(answer, steps):
    """How far the samples end from the exact ones, and how many guesses that took."""
    x = torch.tensor([1.0, -0.7, 0.2], dtype=torch.float64)
    exact = x * WIDTH / (ALPHA_BARS[-1] * WIDTH**2 + 1 - ALPHA_BARS[-1]) ** 0.5
    calls = []

    def guess(x_t, t):
        calls.append(t)
        a = ALPHA_BARS[int(t)]
        return (1 - a) ** 0.5 * x_t / (a * WIDTH**2 + 1 - a)

    times = list(range(999, -1, -1000 // steps))
    got = torch.as_tensor(answer(guess, x, ALPHA_BARS.clone(), times))
    return (got - exact).abs().mean().item(), len(calls)


def order(answer):
    """ "2", or by what factor five times the steps shrink the error."""
    coarse, _ = error_after(answer, 20)
    fine, guesses = error_after(answer, 100)
    if guesses > 110:
        raise Hint(
            f"{guesses} guesses for 100 steps; keep the guess of the step before, make one a step"
        )
    if not (coarse < 0.15 and math.isfinite(fine)):
        raise Hint(
            f"with 20 steps it ends {coarse:.3g} from the truth; plain DDIM ends 0.044 from it. "
            "Is the last alpha_bar 1, and h = s' - s?"
        )
    return "2" if fine <= 2e-3 else f"{coarse / fine:.1f}"


def two_step(correction=1.0, twice=False, end=1.0):
    """Exercise 7.5, right or with one mistake: `correction` is the share of the right correction,
    `twice` makes two guesses a step (Heun's method), `end` is the last alpha_bar."""

    def sample(guess, x, alpha_bars, times):
        levels = [*alpha_bars[times].tolist(), end]
        eps_before, h_before = 0.0, math.inf
        for i, (t, a, a_next) in enumerate(zip(times, levels, levels[1:])):
            eps = guess(x, t)
            h = ((1 - a_next) / a_next) ** 0.5 - ((1 - a) / a) ** 0.5
            direction = eps + correction * h / (2 * h_before) * (eps - eps_before)
            if twice and i + 1 < len(times):
                x_next = a_next**0.5 * (x / a**0.5 + h * eps)
                direction = (eps + guess(x_next, times[i + 1])) / 2
            x = a_next**0.5 * (x / a**0.5 + h * direction)
            eps_before, h_before = eps, h
        return x

    return sample


def plms(guess, x, alpha_bars, times):
    """Stable Diffusion's way: (3 eps - eps_before) / 2, as if all steps were equally long."""
    levels = [*alpha_bars[times].tolist(), 1.0]
    before = None
    for t, a, a_next in zip(times, levels, levels[1:]):
        eps = guess(x, t)
        direction = eps if before is None else (3 * eps - before) / 2
        x = ddim_step(x, (x - (1 - a) ** 0.5 * direction) / a**0.5, a, a_next)
        before = eps
    return x


EXERCISES["7.5"] = Exercise(
    reference=two_step(),
    call=order,
    otherwise="five times the steps make the error {got} times smaller: still order 1, and order "
    "2 makes it about 25 times. h / (2 h_0) times the change of the guess",
    also_right=[plms],
    also_wrong={
        "still order 1": [two_step(correction=0), two_step(correction=0.5)],
        "order": two_step(correction=-1),
        "make one a step": two_step(twice=True),
        "last alpha_bar": [two_step(end=0.5), lambda guess, x, alpha_bars, times: x],
    },
)
