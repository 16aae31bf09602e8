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


# ---- chapter 0: the whole trick --------------------------------------------------------------------------------------


@exercise("0.1")
def times_fewer(answer):
    if not far(answer, 12, 1e-3):
        return None
    if not far(answer, 64, 1e-3):
        return "those are the positions; a pixel has 3 numbers, a position of this latent 16"
    return "count both: 3 x 1024 x 1024 numbers, and 16 for each of 128 x 128 positions"


@exercise("0.2a")
def passes_guided(answer):
    return None if answer == 60 else "every step asks the U-Net twice, with the prompt and without"


@exercise("0.2b")
def passes_plain(answer):
    return None if answer == 30 else "with guidance 1 a step asks the U-Net once"


@exercise("0.3")
def draw_from(answer):
    from book import load_model

    model, z = load_model(), torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(11))
    with torch.no_grad():
        wanted = [picture(model, "a red circle", z, guidance) for guidance in (5.0, 7.5)]
        got = answer(model, "a red circle", z.clone())
    if tuple(got.shape) == (1, 3, 32, 32):
        return "that is a batch of one, (1, 3, 32, 32); take its first picture"
    if tuple(got.shape) != (3, 32, 32):
        return f"the shape is {tuple(got.shape)}; a picture is (3, 32, 32): decode the last latent"
    if not far(got, wanted[0], 0.01):
        return None
    return (
        "that is guidance 7.5, what `denoise` does by itself"
        if not far(got, wanted[1], 0.01)
        else "the picture is another one; does it start from z, and is it the last step's latent that is decoded?"
    )


def picture(model, prompt, z, guidance):
    *_, (_, z, _) = model.denoise([prompt], guidance=guidance, z=z)
    return model.decode(z)[0]


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
    return (
        "that is its square root, the signal's amplitude"
        if not far(answer, end_of_line(0.02, 100) ** 0.5, 0.02)
        else "the share is the product of all 1 - beta"
    )


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
    return (
        "those are sqrt(beta_t), the noise of a step forwards"
        if not far(got[1:], betas[1:].sqrt())
        else "sigma_t^2 = beta_t (1 - alpha_bar of the step before) / (1 - alpha_bar_t)"
    )


# ---- chapter 3: a VAE with a perceptual loss -------------------------------------------------------------------------


@exercise("3.1")
def film(answer):
    if not far(answer, 48, 1e-3):
        return None
    if not far(answer, 256, 1e-3):
        return "those are the positions; a pixel has 3 numbers, a position of this latent 16"
    return (
        "turned over: the film has more numbers than its latent"
        if not far(answer, 1 / 48, 1e-3)
        else "count both: 16 x 256 x 256 x 3 numbers, and how many positions with 16?"
    )


@exercise("3.2")
def best_guess(answer):
    values = torch.tensor([0.1, 0.2, 0.4, 0.9, 5.0])
    for power, right in ((2, 1.32), (1, 0.4)):
        got = answer(values.clone(), power)
        if far(got, right, 1e-2):
            return f"for power {power} another guess costs less; try some, and look which value wins"
    return None


@exercise("3.3")
def kl_of_two(answer):
    for values in ((0.3, 0.5, 0.0, 1.0), (1.0, 2.0, -0.5, 0.7), (0.2, 0.4, 0.9, 1.5)):
        m1, s1, m2, s2 = torch.tensor(values, dtype=torch.float64)
        right, other = ((s_2 / s_1).log() + (s_1**2 + (m1 - m2) ** 2) / (2 * s_2**2) - 0.5 for s_1, s_2 in ((s1, s2), (s2, s1)))
        got = answer(*values)
        if far(got, right):
            if not far(got, other):
                return "that is the KL the other way round; it is not symmetric"
            if not far(got, right / torch.log(torch.tensor(2.0))):
                return "that is in bits; a nat is the unit of the natural logarithm"
            return f"for {values} the numbers differ; start from the mean, over the first Gaussian, of log p_1 - log p_2"
    return None


@exercise("3.4")
def weigh(answer):
    w = torch.tensor([3.0, 4.0], requires_grad=True)
    steep, flat = (w**2).sum(), 0.01 * w.sum()  # gradients of length 10 and 0.0141
    right = 10 / (0.01 * 2**0.5 + 1e-4)
    got = answer(steep, flat, w)
    if not far(got, (0.01 * 2**0.5) / (10 + 1e-4), 1e-3):
        return "turned over: the adversary must pull as hard as the reconstruction, so the reconstruction's gradient stands above"
    if not far(got, 10 / (0.01 * 2**0.5), 1e-3):
        return "delta = 1e-4 is missing below"
    if far(got, right, 1e-3):
        return "another number; divide the two lengths (norms) of the gradients at last_weight"
    if isinstance(got, torch.Tensor) and got.requires_grad:
        return "a gradient still flows through it; detach it"
    tiny = answer((1e6 * w).sum(), 0 * w.sum(), w)
    return None if not far(tiny, 1e4, 1e-3) else "where the adversary does not pull at all the weight must stop at 1e4"


# ---- chapter 4: latent rescaling -------------------------------------------------------------------------------------


@exercise("4.1")
def seen_width(answer):
    if not far(answer, 6.76, 1e-3):
        return None
    return (
        "that is what they meant to get; they multiply by 2.6 latents that are 2.6 wide already"
        if not far(answer, 1.0, 1e-3)
        else "a standard deviation of 2.6, and every number times 2.6"
    )


@exercise("4.2")
def new_alpha_bar(answer):
    for a, s in ((0.9, 5.49), (0.3, 0.18), (0.5, 2.0)):
        got = torch.as_tensor(answer(torch.tensor(a, dtype=torch.float64), s))
        if not far(got, a / (a + (1 - a) / s**2)):
            return "turned over: the new schedule must drown a wide latent faster, not slower"
        if not far(got, a / (a + s * (1 - a))):
            return "the SNR has s squared: it is a ratio of variances"
        if far(got, a / (a + s**2 * (1 - a))):
            return f"for alpha_bar = {a} and s = {s}: s^2 a' / (1 - a') must be a / (1 - a); solve it for a'"
    return None


@exercise("4.3")
def whiten(answer):
    random = torch.Generator().manual_seed(3)
    z = (
        torch.randn(50, 4, 8, 8, generator=random) * torch.tensor([0.5, 1.0, 2.0, 4.0])[:, None, None]
        + torch.tensor([1.0, 0.0, -1.0, 3.0])[:, None, None]
    )
    got = answer(z.clone())
    if tuple(got.shape) != tuple(z.shape):
        return f"the shape is {tuple(got.shape)}; it must stay {tuple(z.shape)}"
    if not far(got, (z - z.mean()) / z.std(), 1e-2):
        return "that is one mean and one spread for all; take each channel's own"
    if got.mean(dim=(0, 2, 3)).abs().max() > 0.01:
        return "a channel's mean is not 0"
    if (got.std(dim=(0, 2, 3)) - 1).abs().max() > 0.01:
        return "a channel's standard deviation is not 1"
    if far(got, (z - z.mean(dim=(0, 2, 3), keepdim=True)) / z.std(dim=(0, 2, 3), keepdim=True), 1e-2):
        return "mean and spread are right over all, but pictures or places were treated differently; every number of a channel is shifted and scaled alike"
    return None


@exercise("4.4")
def least_loss(answer):
    for a, s in ((0.9, 5.49), (0.3, 0.18), (0.5, 2.0)):
        got, right = float(answer(a, s)), a * s**2 / (a * s**2 + 1 - a)
        if not far(got, 1 - right):
            return "that is the part that the best guess explains; the loss is what remains of a variance of 1"
        if not far(got, a * s / (a * s + 1 - a)):
            return "the variance of s times something has s squared"
        if far(got, right):
            return f"for alpha_bar = {a} and s = {s} it is another number; 1 - Cov(eps, z_t)^2 / Var(z_t)"
    return None


# ---- chapter 5: cross-attention --------------------------------------------------------------------------------------


@exercise("5.1")
def times_as_many(answer):
    if not far(answer, 4096 / 77, 0.01):
        return None
    if not far(answer, 77 / 4096, 0.01):
        return "turned over: self-attention has the larger matrix"
    if not far(answer, 64 / 77, 0.01):
        return "64 is a side; count the places, 64 x 64"
    if not far(answer, 4096, 0.01):
        return "cross-attention has weights too: one for each place and token"
    return "self-attention has a weight for each pair of places, cross-attention one for each place and token"


@exercise("5.2")
def most_frequent_pair(answer):
    words = {("a", "b", "a", "b", "c</w>"): 3, ("x", "y</w>"): 5, ("q", "r", "s</w>"): 1, ("q", "r", "t</w>"): 1, ("q", "r", "u</w>"): 1}
    again = {("ti", "n", "t</w>"): 4, ("n", "t</w>"): 3, ("ti", "p</w>"): 6}
    got = answer(dict(words))
    if isinstance(got, str) or len(got) != 2:
        return f"that is {got!r}; give the two pieces of the pair, not what they are glued to"
    if tuple(got) == ("q", "r"):
        return "a word counts as often as it occurs, not once"
    if tuple(got) == ("x", "y</w>"):
        return "a pair that stands in a word twice counts twice"
    if tuple(got) != ("a", "b"):
        return f"that is {tuple(got)}; pairs are neighbours within a word, counted over all words"
    return None if tuple(answer(dict(again))) == ("n", "t</w>") else "a piece may have several letters: pairs are of neighbouring pieces"


@exercise("5.3")
def attend_to_some(answer):
    random = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, n, 4, dtype=torch.float64, generator=random) for n in (3, 6, 6))
    keep = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 0, 1, 1, 1, 0]], dtype=torch.bool)
    scores = q @ k.mT / 2

    def of(scores, keep):
        return scores.masked_fill(~keep[:, None], -torch.inf).softmax(-1) @ v

    got = torch.as_tensor(answer(q.clone(), k.clone(), v.clone(), keep.clone()))
    if not far(got, of(scores, keep)):
        return None
    if not far(got, of(scores, ~keep)):
        return "it sees what it should not, and only that: keep is true where a token may be seen"
    if not far(got, (scores.softmax(-1) * keep[:, None]) @ v):
        return "the shares that are left do not add up to 1"
    if not far(got, (scores * keep[:, None]).softmax(-1) @ v) or not far(got, (scores * keep[:, None]).softmax(-1) * keep[:, None] @ v):
        return "a score of 0 still gets a share, for exp(0) is 1; what score gets none?"
    if not far(got, of(scores * 2, keep)):
        return "the root of d is missing"
    return (
        "padding gets a score of minus infinity, before the softmax"
        if got.shape == q.shape
        else f"the shape is {tuple(got.shape)}; it must be {tuple(q.shape)}"
    )


@exercise("5.4")
def attend_in_blocks(answer):
    random = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(n, 4, dtype=torch.float64, generator=random) for n in (3, 20, 20))

    def blocks(k):
        here = torch.empty(2, 5, 4, dtype=torch.float64)  # the one memory that all blocks share
        for part in zip(k.split(5), v.split(5)):
            here.copy_(torch.stack(part))
            yield here[0], here[1]

    def whole(k, v):
        return (q @ k.mT / 2).softmax(-1) @ v

    got, means = torch.as_tensor(answer(q.clone(), blocks(k))), torch.stack([whole(*part) for part in zip(k.split(5), v.split(5))])
    if not far(got, whole(k, v)):
        large = torch.as_tensor(answer(q.clone(), blocks(1000 * k)))
        if not far(large, whole(1000 * k, v)):
            return None
        return (
            "right while scores are small; with large ones exp overflows: subtract the largest score so far"
            if not large.isfinite().all()
            else "with large scores the result is another"
        )
    if not far(got, whole(k[-5:], v[-5:])):
        return "that is the last block alone: its memory is used again, so take what you need before the next comes"
    if not far(got, means.mean(0)) or not far(got, means.sum(0)):
        return "the blocks do not count alike: keep sums of powers, and divide once at the end"
    top = (q @ k.mT / 2).view(3, 4, 5).amax(2)
    powers = torch.exp(q @ k.mT / 2 - top.cummax(1)[0].repeat_interleave(5, dim=1))
    if not far(got, powers @ v / powers.sum(1, keepdim=True)):
        return "when a block brings a larger score, both sums so far must shrink to the new one"
    return "keep three things for each query: the largest score, the sum of the powers, the weighted sum of the values"


# ---- chapter 6: guidance ---------------------------------------------------------------------------------------------


@exercise("6.1a")
def their_weight(answer):
    if not far(answer, 7.5):
        return None
    return {6.5: "that is theirs; ours is not the same number", 5.5: "the other way round: theirs is ours minus 1"}.get(
        round(float(answer), 4), "compare the factor of the guess with the caption: 1 + w' there, w here"
    )


@exercise("6.1b")
def guided_rows(answer):
    if not far(answer, 400):
        return None
    if not far(answer, 200):
        return "that is without the empty half; at w = 7.5 each prompt needs two guesses a step"
    return "these are passes; every pass holds several rows" if float(answer) in (50, 100) else "steps, times prompts, times guesses"


def pretended_unet(calls: list):
    """Something with a U-Net's signature that depends on all its inputs, row by row, and notes how many rows each call had."""

    def unet(z, t, context):
        calls.append(len(z))
        return z * context.mean(dim=(1, 2)).view(-1, 1, 1, 1) + 0.01 * t.view(-1, 1, 1, 1)

    return unet


def guidance_inputs():
    random = torch.Generator().manual_seed(11)
    z, asked, other = (torch.randn(*shape, dtype=torch.float64, generator=random) for shape in ((3, 4, 2, 2), (3, 7, 5), (3, 7, 5)))
    return z, torch.tensor([900, 500, 20]), asked, other


@exercise("6.2")
def away_from(answer):
    z, t, asked, negative = guidance_inputs()
    calls, w, unet = [], 4.0, pretended_unet([])
    a, n = unet(z, t, asked), unet(z, t, negative)
    try:
        got = torch.as_tensor(answer(pretended_unet(calls), z, t, asked, negative, w))
    except RuntimeError as error:
        if "size" not in str(error):
            raise
        return f"sizes do not agree ({error}): z_t and t go in twice, too, one copy for each half of the context"
    if got.shape != z.shape:
        return f"the shape is {tuple(got.shape)}; it must be {tuple(z.shape)}, that of z_t"
    if not far(got, a + w * (n - a)):
        return "turned over: this walks to the negative prompt; the negative half takes the place of the empty one"
    if not far(got, a + w * (a - n)):
        return "that is Ho & Salimans's w; with the book's, w = 1 is the plain guess of the prompt"
    if far(got, n + w * (a - n)):
        return "start from the guess with the negative prompt and add w times the difference; every row needs its own t"
    return None if calls == [6] else f"the numbers are right, in {len(calls)} calls; put both halves into one batch of six rows"


@exercise("6.3")
def sharpened_gaussian(answer):
    for m, s, S, w in ((1.0, 0.5, 1.5, 3.0), (-0.4, 0.8, 1.0, 2.0), (2.0, 1.0, 3.0, 1.0)):
        got = answer(m, s, S, w)
        if isinstance(got, (int, float)):
            return "one number came; two are asked for, (mean, variance)"
        mean, variance = (float(v) for v in got)
        precision = w / s**2 + (1 - w) / S**2
        right = w * m / s**2 / precision, 1 / precision
        if not (far(mean, right[0]) or far(variance, right[1])):
            continue
        if not far([variance, mean], right):
            return "the mean first, then the variance"
        if not far(variance, right[1] ** 0.5):
            return "that is the standard deviation; the variance is asked for"
        if not far(variance, precision):
            return "that is 1 over the variance: turn it over"
        if w > 1 and not far(variance, s**2 / w):
            return "that is p(x|y)^w alone; p(x)^(1 - w) is a Gaussian too, with a negative share of 1 / variance"
        if far(variance, right[1]):
            return f"for m = {m}, s = {s}, S = {S}, w = {w} the variance is another: add up what stands before -x^2 / 2 in the exponents"
        return f"for m = {m}, s = {s}, S = {S}, w = {w} the variance is right and the mean is not: it is where the exponent's slope is 0"
    return None


@exercise("6.4")
def two_captions(answer):
    nothing, first, second = torch.randn(3, 2, 4, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for w in (3.0, 1.0):
        got = answer(nothing, first, second, w)
        if not far(got, nothing + w * (first + second - nothing)):
            return "the second caption changes the empty guess too: subtract the empty guess from both"
        if not far(got, nothing + w * ((first + second) / 2 - nothing)):
            return "that is the mean of two guided guesses; by Bayes each caption pulls with its whole weight"
        if not far(got, 2 * nothing + w * (first + second - 2 * nothing)):
            return "that is the sum of two guided guesses; p(x), the empty guess, stands there once"
        if far(got, nothing + w * (first - nothing) + w * (second - nothing)):
            return "write p(x | y1, y2) as p(x) p(y1 | x) p(y2 | x) up to a factor, and take the last two w times"
    return None


@exercise("6.5")
def in_an_interval(answer):
    z, t, asked, empty = guidance_inputs()
    unet, w, context = pretended_unet([]), 5.0, torch.cat([empty, asked])
    a, n = unet(z, t, asked), unet(z, t, empty)
    inside, full = ((t >= 300) & (t <= 700)).view(-1, 1, 1, 1), n + w * (a - n)
    try:
        got = torch.as_tensor(answer(unet, z, t, context, w, 300, 700))
        bounds = torch.as_tensor(answer(unet, z, t, context, w, 20, 500))
    except RuntimeError as error:
        if "Boolean value" in str(error):
            return "t holds a time for each row, so one `if` cannot decide: torch.where chooses row by row"
        if "size" not in str(error):
            raise
        return f"sizes do not agree ({error}): z_t and t go in twice, and a weight for each row has the shape (B, 1, 1, 1)"
    if got.shape != z.shape:
        return f"the shape is {tuple(got.shape)}; it must be {tuple(z.shape)}, that of z_t"
    if not far(got, torch.where(inside, full, n)):
        return "outside of the interval that is the unconditional guess, w = 0; plain conditional is w = 1"
    if not far(got, torch.where(inside, a, full)):
        return "turned over: guided inside of the interval, plain outside"
    if not far(got, full) or not far(got, a):
        return "all rows came out alike; each row has its own t"
    if far(got, torch.where(inside, full, a)):
        return "w where low <= t <= high, 1 elsewhere, row by row, in the formula of 6.1"
    return "low and high belong to the interval: low <= t <= high" if far(bounds[1:], full[1:]) else None


# ---- chapter 7: DDIM -------------------------------------------------------------------------------------------------


@exercise("7.1")
def evaluations(answer):
    if not far(answer, 60):
        return None
    if not far(answer, 30):
        return "those are the steps; guidance asks twice at each"
    if not far(answer, 100):
        return "that is the whole way from 999; the times above the start are left out"
    return "count the times of fifty trailing steps that are not above 599, then how often each asks the U-Net"


@exercise("7.2")
def mix(answer):
    random = torch.Generator().manual_seed(2)
    noises, weights = torch.randn(3, 4, 8, 8, dtype=torch.float64, generator=random), torch.tensor([2.0, 1.0, -2.0], dtype=torch.float64)
    got, plain = torch.as_tensor(answer(noises.clone(), weights.clone())), (weights[:, None, None, None] * noises).sum(dim=0)
    if got.shape != plain.shape:
        return f"the shape is {tuple(got.shape)}; it must be {tuple(plain.shape)}, one mixture"
    if not far(got, plain / 3):
        return None
    if not far(got, plain) or not far(got, plain / weights.sum()):
        return "the weighted sum is there, its variance is not 1: divide by what its standard deviation is"
    if not far(got, plain / 9):
        return "that divides by the variance; the standard deviation is its root"
    if not far(got, plain / plain.std(), 0.2):
        return (
            "nearly: this fixes the length of every mixture, and noise has not one length; divide by a number that the weights alone give"
        )
    return "divide the weighted sum by its standard deviation; the variance of w n is w^2, and variances add"


@exercise("7.3")
def end_of_walk(answer):
    for x, a, w in ((1.3, 0.2, 0.5), (-0.4, 0.7, 2.0)):
        got, spread = float(answer(x, a, w)), (a * w * w + 1 - a) ** 0.5
        if not far(got, a**0.5 * w * w / spread**2 * x):
            return "that is the mean of x_0 given x_t, where one single step ends; the walk keeps x_t's place among the others"
        if not far(got, w * x):
            return "x_t has a spread of its own, sqrt(alpha_bar w^2 + 1 - alpha_bar): divide by it first"
        if not far(got, a**0.5 * w * x / spread):
            return "a factor sqrt(alpha_bar) too many: x_t itself, not x_t / sqrt(alpha_bar), has that spread"
        if not far(got, w * x / spread**2):
            return "that divides by the variance of x_t; its standard deviation is the root"
        if far(got, w * x / spread):
            return f"for x_t = {x}, alpha_bar = {a}, w = {w} it is another number; how many spreads of x_t is it from 0, and how many of the data must x_0 be?"
    return None


@exercise("7.4")
def target(answer):
    random = torch.Generator().manual_seed(4)
    z, x_hat = torch.randn(2, 5, dtype=torch.float64, generator=random)
    for a, a_after in ((0.2, 0.6), (0.5, 0.9), (0.3, 1.0)):
        eps = (z - a**0.5 * x_hat) / (1 - a) ** 0.5
        z_after = a_after**0.5 * x_hat + (1 - a_after) ** 0.5 * eps
        got = answer(z, z_after, a, a_after)
        if not far(got, eps):
            return "that is the noise that the student should guess; its clean guess is asked for"
        if a_after < 1 and not far(got, z_after):
            return "the teacher's end is clean only if alpha_bar'' = 1; here it still holds noise"
        if a_after < 1 and not far(got, z_after / a_after**0.5):
            return "the noise in z'' has a mean of 0 over many, but not here: put eps_hat, written with x_0_hat and z, in its place"
        if far(got, x_hat):
            return f"with it, one step from alpha_bar = {a} does not arrive at z'' for alpha_bar'' = {a_after}"
    return None


@exercise("7.5")
def two_step(answer):
    from ldm_minimal import NoiseSchedule

    w, alpha_bars, x = 0.5, NoiseSchedule("linear").alpha_bars, torch.tensor([1.0, -0.7, 0.2], dtype=torch.float64)
    calls = []

    def guess(x_t, t):
        a = alpha_bars[int(t)]
        calls.append(t)
        return (1 - a) ** 0.5 * x_t / (a * w**2 + 1 - a)

    def error(steps):
        calls.clear()
        got = torch.as_tensor(answer(guess, x.clone(), alpha_bars.clone(), list(range(999, -1, -1000 // steps))))
        return (got - x * w / (alpha_bars[-1] * w**2 + 1 - alpha_bars[-1]) ** 0.5).abs().mean().item()

    coarse, fine = error(20), error(100)
    if len(calls) > 110:
        return f"{len(calls)} guesses for 100 steps; keep the guess of the step before, and make one a step"
    if not (coarse == coarse and fine == fine and coarse < 0.15):
        return f"with 20 steps it ends {coarse:.3g} from the truth; plain DDIM ends 0.044 from it. Is the last alpha_bar 1, and h = s' - s?"
    if fine > 2e-3:
        return f"five times the steps make the error {coarse / fine:.1f} times smaller: still order 1, and order 2 makes it about 25 times. h / (2 h_0) times the change of the guess"
    return None


# ---- chapter 8: the full pipeline ------------------------------------------------------------------------------------


@exercise("8.1")
def steps_needed(answer):
    if 2301 <= float(answer) <= 2303:
        return None
    return (
        "that is where it has forgotten a share of 1/e of its start; 0.9 takes longer"
        if 990 < float(answer) < 1010
        else "after n steps the average is 1 - 0.999^n"
    )


@exercise("8.2")
def ema_step(answer):
    old, new = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -2.0])
    for step, decay in ((0, 0.999), (5, 0.999), (100_000, 0.99), (40, 0.6)):
        d = min(decay, (1 + step) / (10 + step))
        got = answer(old.clone(), new.clone(), step, decay)
        if not far(got, (1 - d) * old + d * new):
            return "turned over: the decay is the share of the old average that stays"
        if far(got, d * old + (1 - d) * new):
            if not far(got, decay * old + (1 - decay) * new):
                return "without the warm-up: early on, the decay must be smaller"
            return f"at step {step} with decay {decay} it is another average; decay is the smaller of the two"
    return None


@exercise("8.3")
def prompt_accuracy(answer):
    grades = [
        {"colour 1": True, "shape 1": True},
        {"colour 1": True, "shape 1": False, "relation": True},
        {"colour 1": True},
        {"shape 1": True, "size 1": True},
    ]
    got = float(answer([dict(g) for g in grades]))
    if not far(got, 0.75):
        return None
    if not far(got, 7 / 8):
        return "that is the share of attributes; a picture counts only if all of its attributes hold"
    return "that is in per cent; give a number between 0 and 1" if not far(got, 75.0) else "here three pictures of four are entirely right"


@exercise("8.4")
def nearest(answer):
    random = torch.Generator().manual_seed(2)
    training = torch.rand(40, 3, 8, 8, generator=random) * 2 - 1
    wanted = torch.tensor([31, 4, 17])
    drawn = training[wanted] + 0.3 * torch.randn(3, 3, 8, 8, generator=random)
    training[7] *= 0.01  # small, so nearest to 0 and the largest product with nobody
    training[22] = 3 * training[31]  # the same direction as the first, and far away
    got = torch.as_tensor(answer(drawn.clone(), training.clone()))
    if tuple(got.shape) != (3,):
        return f"the shape is {tuple(got.shape)}; one row number for each drawn picture is (3,)"
    if not far(got, wanted):
        return None
    return (
        "those are the farthest, not the nearest"
        if not far(got, torch.cdist(drawn.flatten(1), training.flatten(1)).argmax(dim=1))
        else "others are nearer; sum the squared differences over all 3 x H x W numbers"
    )


# ---- chapter 9: why latent? ------------------------------------------------------------------------------------------


@exercise("9.1")
def fewer(answer):
    got = [float(value) for value in (answer if isinstance(answer, (tuple, list, torch.Tensor)) else [answer])]
    if len(got) != 3:
        return f"{len(got)} number{'s' * (len(got) > 1)}; three are asked for, how many times fewer: scalars, positions, pairs"
    if not far(got, [16 * 128**2, 128**2, 128**4]):
        return "those are the latent's; asked for is how many times more the picture has"
    if got == [48.0, 64.0, 4096.0]:
        return "that is Stable Diffusion 1; here a position holds 16 numbers"
    if not far(got, [1 / 12, 1 / 64, 1 / 4096]):
        return "turned over: how many times FEWER"
    names = ("numbers: 3 x 1024 x 1024 against 16 x 128 x 128", "positions: 8 x 8 pixels become one", "pairs: the positions, squared")
    for value, right, name in zip(got, (12, 64, 4096), names):
        if far(value, right):
            return f"look again at the {name}"
    return None


@exercise("9.2")
def conv_flops(answer):
    def counted(c_in, c_out, k, side, stride):
        from torch.utils.flop_counter import FlopCounterMode

        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            torch.nn.Conv2d(c_in, c_out, k, stride, padding=k // 2)(torch.zeros(1, c_in, side, side))
        return counter.get_total_flops()

    for c_in, c_out, k, side, stride in ((6, 10, 3, 16, 1), (5, 7, 1, 12, 1), (4, 8, 5, 20, 2)):
        right, got = counted(c_in, c_out, k, side, stride), float(answer(c_in, c_out, k, side, stride))
        if not far(got, right):
            continue
        if not far(got, right / 2):
            return "those are the multiplications; each comes with an addition"
        if stride == 1 and not far(got, 2 * k * c_in * c_out * side**2):
            return "the kernel has k x k weights for each pair of channels"
        if stride > 1 and not far(got, right * stride**2):
            return "with a stride of 2 the map that is made has half the side: count the positions where a result is computed"
        if stride > 1 and not far(got, right * stride):
            return "the stride shortens both sides"
        return f"for {c_in} to {c_out} channels, k = {k}, side {side}, stride {stride} PyTorch counts {right:,}, you {got:,.0f}"
    return None


@exercise("9.3")
def steps_for(answer):
    from math import ceil

    for share, text, unet, decoder, guided in ((0.9, 0.03, 0.8, 2.51, True), (0.5, 0.03, 0.8, 2.51, False), (0.97, 1.0, 2.0, 30.0, True), (0.75, 0.0, 1.0, 3.1, False)):
        evaluations = share / (1 - share) * (text + decoder) / unet
        right, got = ceil(evaluations / (2 if guided else 1)), float(answer(share, text, unet, decoder, guided))
        if got == right:
            continue
        if guided and got == ceil(evaluations):
            return "those are evaluations; a guided step makes two"
        if not guided and got == ceil(evaluations / 2):
            return "without guidance a step is one evaluation"
        if text and got == ceil(evaluations * decoder / (text + decoder) / (2 if guided else 1)):
            return "the text's work counts, too"
        if not far(got, evaluations / (2 if guided else 1)) or got == right - 1:
            return "steps are whole: the first whole number at which the share is reached"
        if got == max(1, ceil(share * (text + decoder) / unet / (2 if guided else 1))):
            return "the share is of the whole work, the U-Net's own included"
        return f"for share {share}, text {text}, U-Net {unet}, decoder {decoder}, guided {guided} it is {right}, not {got:g}"
    return None


@exercise("9.4")
def dearer(answer):
    times_dearer, share_of_pairs = answer
    for s, r in ((0.1525, 8), (0.3, 2), (0.0, 4), (1.0, 3)):
        got, right = float(times_dearer(s, r)), (1 - s) * r**2 + s * r**4
        if s not in (0, 1) and not far(got, (1 - s) * r + s * r**2):
            return "r is the ratio of the sides; positions grow with its square"
        if s not in (0, 1) and not far(got, s * r**2 + (1 - s) * r**4):
            return "turned over: s is the share that grows with the pairs"
        if far(got, right):
            return f"for s = {s}, r = {r} it is not {got:g}; one part grows like the positions, the other like their square"
    for s, r in ((0.1525, 8), (0.4, 2)):
        m = (1 - s) * r**2 + s * r**4
        try:
            got = float(share_of_pairs(m, r))
        except NotImplementedError:
            return "times_dearer is right; share_of_pairs is still to be written"
        if not far(got, s * r**4 / m):
            return "that is the share on the large map; the share on the latent is asked for"
        if far(got, s, 1e-3):
            return f"times_dearer is right; turned round, m = {m:g} at r = {r} does not give s = {got:g}"
    return None


@exercise("9.5")
def pays_from(answer):
    for once, latent, pixel, share in ((40.0, 1.0, 3.0, 1.0), (40.0, 1.0, 3.0, 0.5), (12.0, 2.0, 3.0, 0.25), (5.0, 1.0, 3.0, 2.0)):
        got, right = float(answer(once, latent, pixel, share)), once / (pixel - share * latent)
        if share not in (1, latent / pixel) and not far(got, once / (share * pixel - latent)):
            return "it is the latent run that sees fewer pictures: `fewer` belongs to its steps"
        if share != 1 and not far(got, once / (pixel - latent)):
            return "`fewer` is left out: the latent run sees only that share of the pictures"
        if share != 1 and not far(got, share * right):
            return "those are the pictures of the latent run; asked for are those of the pixel run"
        if not far(got, once / pixel):
            return "the latent run's own steps cost something too"
        if far(got, right):
            return f"for once = {once:g}, latent = {latent:g}, pixel = {pixel:g}, fewer = {share:g} it is not {got:g}; set both costs equal"
    try:
        never = float(answer(1.0, 2.0, 2.0, 1.0)), float(answer(1.0, 1.0, 3.0, 4.0))
    except ZeroDivisionError:
        never = ()
    if never != (float("inf"), float("inf")):
        return "where the latent run costs as much a picture, or more, it never pays: infinity"
    return None


# ---- chapter 10: this is Stable Diffusion ----


@exercise("10.1")
def decoders_share(answer):
    text, unet, decoder = 13.2985, 803.2734, 2514.5189  # GFLOP
    right = decoder / (text + 4 * unet + decoder)
    if not far(answer, right, 0.01):
        return None
    if not far(answer, 100 * right, 0.01):
        return "that is in per cent; give a number between 0 and 1"
    if not far(answer, 1 - right, 0.01) or not far(answer, 4 * unet / (text + 4 * unet + decoder), 0.01):
        return "that is the U-Net's share"
    if not far(answer, decoder / (2 * text + 8 * unet + decoder), 0.01):
        return "without guidance each of the four steps asks the U-Net once"
    return "the decoder's FLOPs over those of one text encoding, four evaluations and one decode"


@exercise("10.2")
def attention_flops(answer):
    for n, m, width, context, heads in ((50, 77, 48, 20, 6), (4096, 77, 320, 768, 8), (64, 64, 96, 96, 3)):
        out, scores = 2 * n * width * width, 4 * n * m * width
        keys = 4 * m * context * width
        got = float(answer(n, m, width, context, heads))
        if not far(got, (2 * out + keys + scores) / 2):
            return "that counts a multiplication and its addition as one; a FLOP is either"
        if not far(got, 2 * out + keys + heads * scores):
            return "each head works on width / heads numbers, so all of them together cost as much as one of the whole width"
        if not far(got, 2 * out + keys + scores / 2) or not far(got, 2 * out + keys / 2 + scores):
            return "there are two products with m: keys and values, and scores and the weighted sum"
        if not far(got, out + keys + scores):
            return "the queries are projected, and so is the result"
        if not far(got, scores):
            return "that is the attention alone; queries, keys, values and the result are projections"
        if n != m and not far(got, 2 * out + 4 * n * context * width + scores):
            return "keys and values are made of the m vectors of the context, not of the n positions"
        if far(got, 2 * out + keys + scores):
            return f"for n = {n}, m = {m}, width {width}, context {context} it is {2 * out + keys + scores:,}: two projections of n, two of m, scores, weighted sum"
    return None


@exercise("10.3")
def compvis_number(answer):
    right = lambda way, level, number, blocks: level * (blocks + 1) + number + (way == "down")  # noqa: E731
    usual = {
        "input_blocks.0 is the first convolution, so the numbers going down are one higher": lambda *p: right(*p) - (p[0] == "down"),
        "going down, each halving has a number of its own": lambda *p: right(*p) - p[1] * (p[0] == "down"),
        "going up, a level has one residual block more": lambda *p: right(*p) - p[1] * (p[0] == "up"),
        "output_blocks begin at 0: no convolution comes before them": lambda *p: right(*p) + (p[0] == "up"),
        "going up, both count in the order in which the blocks run": lambda way, level, *p: right(way, 3 - level if way == "up" else level, *p),
    }
    places = [(way, level, number, blocks) for blocks in (2, 1, 3) for way in ("down", "up") for level in range(4) for number in range(blocks + (way == "up"))]
    got = [answer(*place) for place in places]
    for complaint, function in usual.items():
        if got == [function(*place) for place in places]:
            return complaint
    for found, (way, level, number, blocks) in zip(got, places):
        if found != right(way, level, number, blocks):
            side = "input" if way == "down" else "output"
            return f"{way}_blocks.{level}.resnets.{number} with {blocks} blocks a level is {side}_blocks.{right(way, level, number, blocks)}.0, not {found}"
    return None


@exercise("10.4")
def load_block(answer):
    from ldm_minimal import TransformerBlock

    torch.manual_seed(3)
    block, fresh = TransformerBlock(16, 12, heads=2, groups=4), TransformerBlock(16, 12, heads=2, groups=4)
    with torch.no_grad():
        for p in [*block.parameters(), *fresh.parameters()]:
            p.copy_(torch.randn(p.shape) / (p[0].numel() ** 0.5 if p.ndim > 1 else 1))
        theirs, x, context = in_diffusers_names(block), torch.randn(2, 16, 3, 3), torch.randn(2, 5, 12)
        wanted = block(x, context)
        answer(fresh, {name: tensor.clone() for name, tensor in theirs.items()})
        if not far(fresh(x, context), wanted, 1e-3):
            return None
        for what, turn in (
            ("value and gate have changed places: the value stands above, the gate below", lambda b: turned(b.mlp_value, b.mlp_gate)),
            ("self-attention's keys and values have changed places: keys above values", lambda b: halves(b.attend_self.key_value)),
            ("cross-attention's keys and values have changed places: keys above values", lambda b: halves(b.attend_cross.key_value)),
        ):
            turn(fresh)
            if not far(fresh(x, context), wanted, 1e-3):
                return what
            turn(fresh)
        own = dict(block.named_parameters())
        wrong = [name for name, p in fresh.named_parameters() if far(p, own[name], 1e-3)]
    return f"{len(wrong)} of {len(own)} tensors are others: {', '.join(wrong[:3])}"


def in_diffusers_names(block) -> dict:
    from ldm_minimal.stable_diffusion import TRANSFORMER

    own, theirs = block.state_dict(), {}
    for ours, _, names in TRANSFORMER:
        for kind in ("weight", "bias"):
            parts = [own[f"{name}.{kind}"] for name in ours.split() if f"{name}.{kind}" in own]
            if parts:
                for name, part in zip(names.split(), torch.cat(parts).chunk(len(names.split()))):
                    theirs[f"{name}.{kind}"] = part[:, :, None, None] if kind == "weight" and "proj_" in name else part
    return theirs


def turned(a, b) -> None:
    for p, q in zip(a.parameters(), b.parameters()):
        p.data, q.data = q.data, p.data


def halves(layer) -> None:
    for p in layer.parameters():
        p.data = torch.cat(p.data.chunk(2)[::-1])
