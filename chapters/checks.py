"""Is a reader's answer right? One function an exercise: it returns what is wrong with the answer, or None if it is correct.

Answers are tried on numbers that no cell shows, so that copying an output never passes, and compared with a tolerance, so that
every right way passes.
"""

from __future__ import annotations

import torch

CHECKS = {}


def exercise(number: str):
    """Register a check under the exercise's number."""
    def register(function):
        CHECKS[number] = function
        return function
    return register


def far(answer, expected, tolerance: float = 1e-4) -> bool:
    """Is `answer` not, to a relative `tolerance`, what is `expected`? Any numbers or tensors; another shape is far."""
    answer, expected = (torch.as_tensor(value, dtype=torch.float64) for value in (answer, expected))
    return answer.shape != expected.shape or not torch.allclose(answer, expected, rtol=tolerance, atol=1e-3 * tolerance)


# ---- chapter 1: the noise schedule -----------------------------------------------------------------------------------

def random_betas(T: int = 40, seed: int = 7) -> torch.Tensor:
    return 0.01 + 0.1 * torch.rand(T, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@exercise("1.1")
def snr_in_decibels(answer):
    betas = random_betas()
    kept, got = torch.cumprod(1 - betas, 0), answer(betas)
    right = 10 * torch.log10(kept / (1 - kept))
    if not far(got, right):
        return None
    if not far(got, right / 10):
        return "these are bels; a decibel is a tenth of one"
    if not far(got, 2 * right):
        return "20 log10 is for amplitudes; the SNR is a ratio of variances"
    if not far(got, 10 * torch.log10((1 - betas) / betas)):
        return "that is the ratio of one step; alpha_bar is the product of all steps so far"
    if not far(got, 10 * torch.log(kept / (1 - kept))):
        return "the logarithm is the one to base 10"
    if not far(got, -right):
        return "that is noise to signal: turn the ratio over"
    return "the numbers are others; alpha_bar_t is the product of 1 - beta up to t, SNR is alpha_bar / (1 - alpha_bar)"


def end_of_line(last: float, T: int) -> float:
    return torch.cumprod(1 - torch.linspace(1e-4, last, T, dtype=torch.float64), 0)[-1].item()


@exercise("1.2a")
def left_after_100(answer):
    if not far(answer, end_of_line(0.02, 100), 0.02):
        return None
    if not far(answer, 100 * end_of_line(0.02, 100), 0.02):
        return "that is in per cent; alpha_bar is between 0 and 1"
    return "that is its square root, the signal's amplitude" if not far(answer, end_of_line(0.02, 100) ** 0.5, 0.02) else "the share is the product of all 1 - beta"


@exercise("1.2b")
def last_beta(answer):
    wanted, got = end_of_line(0.02, 1000), end_of_line(float(answer), 100)
    if 0.8 < got / wanted < 1.25:
        return None
    return f"with it {got:.2g} of the picture is left; DDPM's thousand steps leave {wanted:.2g}"


@exercise("1.3")
def zero_terminal_snr(answer):
    before = torch.cumprod(1 - random_betas(), 0)
    got = torch.as_tensor(answer(before.clone()))
    root = before.sqrt()
    if got.shape != before.shape:
        return f"the shape is {tuple(got.shape)}; it must stay {tuple(before.shape)}"
    if not torch.isfinite(got).all() or got[-1].abs() > 1e-9:
        return f"the last alpha_bar is {got[-1].item():.3g}; it must be 0"
    if not far(got[0], root[0]):
        return "these are the roots; square them to have alpha_bar again"
    if far(got[0], before[0]):
        return "the first alpha_bar has changed; stretch after the shift"
    if far(got[:-1], ((root - root[-1]) * root[0] / (root[0] - root[-1]))[:-1] ** 2):
        return "both ends are right, the middle is not: it is the square roots that are shifted and stretched"
    return None


@exercise("1.4")
def jump(answer):
    for s, t in ((0.9, 0.5), (0.4, 0.05)):
        a, b = (float(value) for value in answer(torch.tensor(s, dtype=torch.float64), torch.tensor(t, dtype=torch.float64)))
        if abs(a - (t / s) ** 0.5) > 1e-6:
            return "a is not right: the signal must shrink from sqrt(alpha_bar_s) to sqrt(alpha_bar_t)"
        if abs(b - (1 - t / s)) < 1e-6:
            return "b is not right: that is the variance of the new noise; b is its root"
        if abs(b * b - (1 - t / s)) > 1e-6:
            return "b is not right: the noise that is there, shrunk by a, and the new noise must have variance 1 - alpha_bar_t together"
    return None


# ---- chapter 2: a simple diffusion model -----------------------------------------------------------------------------

@exercise("2.1")
def slope(answer):
    for s, a in ((0.5, 0.8), (2.0, 0.1), (1.0, 0.3)):
        got, right = float(answer(s, a)), (1 - a) ** 0.5 / (a * s * s + 1 - a)
        if far(got, (1 - a) / (a * s * s + 1 - a)) is False:
            return "the covariance of eps and x_t is sqrt(1 - alpha_bar), not its square"
        if far(got, right):
            return f"for s = {s} and alpha_bar = {a} it is another number; x_t has variance alpha_bar s^2 + 1 - alpha_bar"
    return None


@exercise("2.2")
def eps_from_v(answer):
    random = torch.Generator().manual_seed(5)
    x_0, eps = torch.randn(2, 6, dtype=torch.float64, generator=random)
    a = torch.tensor(0.3, dtype=torch.float64)
    x_t, v = a.sqrt() * x_0 + (1 - a).sqrt() * eps, a.sqrt() * eps - (1 - a).sqrt() * x_0
    got = answer(x_t, v, a)
    if not far(got, eps):
        return None
    return "that is the clean picture, not the noise" if not far(got, x_0) else "solve the two equations of 2.6, of x_t and of v, for eps"


@exercise("2.3")
def factor(answer):
    for a in (0.9, 0.2):
        got = float(answer(a))
        if not far(got, (1 - a) / a):
            return "turned over: where there is little noise, a small error in x_0 is a large one in eps"
        if not far(got, (a / (1 - a)) ** 0.5):
            return "that is the factor of the error; the loss has its square"
        if far(got, a / (1 - a)):
            return "write eps_hat by x_0_hat, subtract the true ones, and square"
    return None


@exercise("2.4")
def sigmas(answer):
    betas = random_betas()
    a = torch.cumprod(1 - betas, 0)
    right = (betas[1:] * (1 - a[:-1]) / (1 - a[1:])).sqrt()
    got = torch.as_tensor(answer(betas))
    if got.shape != betas.shape:
        return f"the shape is {tuple(got.shape)}; it must be {tuple(betas.shape)}"
    if far(got[0], 0.0):
        return "sigma_0 must be 0: at the last step nothing is added"
    if not far(got[1:], right):
        return None
    if not far(got[1:], right**2):
        return "these are the variances; take the root"
    return "those are sqrt(beta_t), the noise of a step forwards" if not far(got[1:], betas[1:].sqrt()) else "sigma_t^2 = beta_t (1 - alpha_bar of the step before) / (1 - alpha_bar_t)"
