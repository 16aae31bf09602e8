"""The exercises' checks accept every right answer and reject the usual wrong ones, saying what is wrong."""

import math
import sys

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "chapters"))
from book import check  # noqa: E402
from checks import CHECKS, end_of_line  # noqa: E402


def kept(betas):
    return torch.cumprod(1 - betas, 0)


def repaired(alpha_bars):
    root = alpha_bars.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def drawn(model, prompt, z, guidance=5.0, batch=False):
    *_, (_, z, _) = model.denoise([prompt], guidance=guidance, z=z)
    return model.decode(z) if batch else model.decode(z)[0]


def not_written(*_):
    raise NotImplementedError


def slopes(loss, weight, keep=False):
    return torch.autograd.grad(loss, weight, retain_graph=True, create_graph=keep)[0].norm()


RIGHT = {
    "1.1": [lambda b: 10 * (kept(b) / (1 - kept(b))).log10(), lambda b: 10 * (kept(b).log10() - (1 - kept(b)).log10()),
            lambda b: [10 * torch.log10(a / (1 - a)).item() for a in kept(b)]],
    "1.2a": [0.3642, 0.36, end_of_line(0.02, 100)],
    "1.2b": [0.189, 0.19],
    "1.3": [repaired],
    "1.4": [lambda s, t: ((t / s) ** 0.5, (1 - t / s) ** 0.5), lambda s, t: [(t / s).sqrt(), (1 - t - t / s * (1 - s)).sqrt()]],
}
RIGHT |= {
    "2.1": [lambda s, a: (1 - a) ** 0.5 / (a * s**2 + 1 - a)],
    "2.2": [lambda x, v, a: (1 - a).sqrt() * x + a.sqrt() * v],
    "2.3": [lambda a: a / (1 - a), lambda a: 1 / (1 / a - 1)],
    "2.4": [lambda b: torch.cat([b[:1] * 0, (b[1:] * (1 - kept(b)[:-1]) / (1 - kept(b)[1:])).sqrt()])],
}
RIGHT |= {
    "0.1": [12, 12.0, 3 * 1024**2 / (16 * 128**2)], "0.2a": [60], "0.2b": [30],
    "0.3": [drawn, lambda m, p, z: m.decode(list(m.denoise([p], guidance=5.0, z=z))[-1][2])[0]],
}
RIGHT |= {
    "3.1": [48, 48.0, 16 * 256 * 256 * 3 / (4 * 32 * 32 * 16)],
    "3.2": [lambda v, p: v.mean() if p == 2 else v.median(), lambda v, p: v.mean().item() if p == 2 else v.sort().values[2].item()],
    "3.3": [lambda a, s, b, r: math.log(r / s) + (s**2 + (a - b) ** 2) / (2 * r**2) - 0.5],
    "3.4": [lambda r, a, w: (slopes(r, w) / (slopes(a, w) + 1e-4)).clamp(max=1e4), lambda r, a, w: min(1e4, slopes(r, w).item() / (slopes(a, w).item() + 1e-4))],
    "4.1": [6.76, 2.6**2],
    "4.2": [lambda a, s: a / (a + s**2 * (1 - a)), lambda a, s: 1 / (1 + s**2 * (1 / a - 1))],
    "4.3": [lambda z: (z - z.mean(dim=(0, 2, 3), keepdim=True)) / z.std(dim=(0, 2, 3), keepdim=True),
            lambda z: (z - z.mean(dim=(0, 2, 3), keepdim=True)) / z.std(dim=(0, 2, 3), keepdim=True, correction=0)],
    "4.4": [lambda a, s: a * s**2 / (a * s**2 + 1 - a), lambda a, s: 1 - (1 - a) / (a * s * s + 1 - a)],
}
RIGHT |= {
    "8.1": [2302, 2301.4],
    "8.2": [lambda a, w, s, d=0.999: torch.lerp(a, w, 1 - min(d, (1 + s) / (10 + s)))],
    "8.3": [lambda g: sum(all(v.values()) for v in g) / len(g), lambda g: torch.tensor([all(v.values()) for v in g]).float().mean()],
    "8.4": [lambda d, t: torch.cdist(d.flatten(1), t.flatten(1)).argmin(dim=1), lambda d, t: [(t - x).square().sum(dim=(1, 2, 3)).argmin().item() for x in d]],
}
WRONG = {  # number: (answer, a word of the reply)
    "1.1": [(lambda b: (kept(b) / (1 - kept(b))).log10(), "bels"), (lambda b: 20 * (kept(b) / (1 - kept(b))).log10(), "20 log10"),
            (lambda b: 10 * ((1 - b) / b).log10(), "one step"), (lambda b: 10 * (kept(b) / (1 - kept(b))).log(), "base 10"),
            (lambda b: 10 * ((1 - kept(b)) / kept(b)).log10(), "turn the ratio"), (lambda b: kept(b), "others"), (lambda b: None, "`return` missing"),
            (lambda b: b.sqare(), "in the line `"), (lambda b: "ten", "kind that is asked for")],
    "1.2a": [(0.6, "square root"), (36.4, "per cent"), (0.5, "product"), (4e-5, "product")],
    "1.2b": [(0.2, "is left"), (0.02, "is left"), (0.15, "is left")],
    "1.3": [(lambda a: a - a[-1], "first"), (lambda a: (a - a[-1]) * a[0] / (a[0] - a[-1]), "square roots"), (lambda a: a, "must be 0"),
            (lambda a: a[:-1], "shape"), (lambda a: a.sqrt() - a[-1].sqrt(), "first"), (lambda a: repaired(a).sqrt(), "square them")],
    "1.4": [(lambda s, t: (t / s, (1 - t / s) ** 0.5), "a is not"), (lambda s, t: ((t / s) ** 0.5, (1 - t) ** 0.5), "b is not"),
            (lambda s, t: ((t / s) ** 0.5, (s - t) ** 0.5), "b is not"), (lambda s, t: ((t / s) ** 0.5, 1 - t / s), "its root")],
}
WRONG |= {
    "2.1": [(lambda s, a: (1 - a) / (a * s**2 + 1 - a), "not its square"), (lambda s, a: (1 - a) ** 0.5, "variance"), (lambda s, a: 1 / (1 - a) ** 0.5, "variance")],
    "2.2": [(lambda x, v, a: a.sqrt() * x - (1 - a).sqrt() * v, "clean picture"), (lambda x, v, a: v, "two equations")],
    "2.3": [(lambda a: (1 - a) / a, "turned over"), (lambda a: (a / (1 - a)) ** 0.5, "its square"), (lambda a: 1 / (1 - a), "subtract")],
    "2.4": [(lambda b: b.sqrt(), "must be 0"), (lambda b: RIGHT["2.4"][0](b) ** 2, "take the root"), (lambda b: b[1:], "shape"),
            (lambda b: torch.cat([b[:1] * 0, b[1:].sqrt()]), "forwards"), (lambda b: torch.cat([b[:1] * 0, b[1:]]), "the step before")],
}
WRONG |= {
    "0.1": [(48, "count both"), (64, "positions")], "0.2a": [(30, "twice"), (100, "twice")], "0.2b": [(60, "once"), (1, "once")],
    "0.3": [(lambda m, p, z: drawn(m, p, z, 7.5), "7.5"), (lambda m, p, z: drawn(m, p, torch.zeros_like(z)), "start from z"),
            (lambda m, p, z: drawn(m, p, z, batch=True), "batch of one"), (lambda m, p, z: z[0], "shape")],
}
WRONG |= {
    "3.1": [(256, "positions"), (1 / 48, "turned over"), (12, "count both")],
    "3.2": [(lambda v, p: v.mean(), "power 1"), (lambda v, p: v.median(), "power 2"), (lambda v, p: v.median() if p == 2 else v.mean(), "power 2")],
    "3.3": [(lambda a, s, b, r: math.log(s / r) + (r**2 + (a - b) ** 2) / (2 * s**2) - 0.5, "other way"), (lambda a, s, b, r: 0.5 * (a**2 + s**2 - 1 - math.log(s**2)), "log p_1"),
            (lambda a, s, b, r: (math.log(r / s) + (s**2 + (a - b) ** 2) / (2 * r**2) - 0.5) / math.log(2), "bits")],
    "3.4": [(lambda r, a, w: slopes(a, w) / (slopes(r, w) + 1e-4), "turned over"), (lambda r, a, w: slopes(r, w) / slopes(a, w), "delta"), (lambda r, a, w: slopes(r, w) / (slopes(a, w) + 1e-4), "1e4"),
            (lambda r, a, w: (r / a).clamp(max=1e4), "lengths"), (lambda r, a, w: (slopes(r, w, True) / (slopes(a, w) + 1e-4)).clamp(max=1e4), "detach")],
    "4.1": [(1, "meant"), (1 / 2.6, "every number")],
    "4.2": [(lambda a, s: a / (a + (1 - a) / s**2), "turned over"), (lambda a, s: a / (a + s * (1 - a)), "squared"), (lambda a, s: a / s**2, "solve")],
    "4.3": [(lambda z: (z - z.mean()) / z.std(), "one mean"), (lambda z: z / z.std(dim=(0, 2, 3), keepdim=True), "mean is not 0"), (lambda z: z - z.mean(dim=(0, 2, 3), keepdim=True), "not 1"),
            (lambda z: z.flatten(1), "shape"), (lambda z: (z - z.mean(dim=0)) / z.std(dim=0), "places")],
    "4.4": [(lambda a, s: (1 - a) / (a * s**2 + 1 - a), "what remains"), (lambda a, s: a * s / (a * s + 1 - a), "squared"), (lambda a, s: a * s**2, "another")],
}
WRONG |= {
    "8.1": [(1000, "1/e"), (900, "0.999^n"), (6905, "0.999^n")],
    "8.2": [(lambda a, w, s, d=0.999: d * a + (1 - d) * w, "warm-up"), (lambda a, w, s, d=0.999: (1 - min(d, (1 + s) / (10 + s))) * a + min(d, (1 + s) / (10 + s)) * w, "turned over"),
            (lambda a, w, s, d=0.999: max(d, (1 + s) / (10 + s)) * a + (1 - max(d, (1 + s) / (10 + s))) * w, "warm-up"), (lambda a, w, s, d=0.999: w, "smaller of the two")],
    "8.3": [(lambda g: sum(sum(v.values()) for v in g) / sum(len(v) for v in g), "share of attributes"), (lambda g: 100 * sum(all(v.values()) for v in g) / len(g), "per cent"),
            (lambda g: sum(any(v.values()) for v in g) / len(g), "three pictures")],
    "8.4": [(lambda d, t: torch.cdist(d.flatten(1), t.flatten(1)).argmax(dim=1), "farthest"), (lambda d, t: (d.flatten(1) @ t.flatten(1).T).argmax(dim=1), "others"),
            (lambda d, t: torch.cdist(d.flatten(1), t.flatten(1)), "shape")],
}
RIGHT |= {
    "9.1": [(12, 64, 4096), [12.0, 8**2, 8**4]],
    "9.2": [lambda c_in, c_out, k, side, stride=1: 2 * k * k * c_in * c_out * (side // stride) ** 2],
    "9.3": [lambda s, text, unet, decoder, guided=True: math.ceil(s / (1 - s) * (text + decoder) / (unet * (1 + guided))),
            lambda s, text, unet, decoder, guided=True: next(n for n in range(1, 999) if n * unet * (1 + guided) >= s * (n * unet * (1 + guided) + text + decoder))],
    "9.4": [(lambda s, r: (1 - s) * r**2 + s * r**4, lambda m, r: (m / r**2 - 1) / (r**2 - 1)), (lambda s, r: r**2 * (1 + s * (r**2 - 1)), lambda m, r: (m - r**2) / (r**4 - r**2))],
    "9.5": [lambda once, latent, pixel, fewer=1.0: once / (pixel - fewer * latent) if pixel > fewer * latent else math.inf],
}
WRONG |= {
    "9.1": [((48, 64, 4096), "16 numbers"), ((12, 64), "three"), ((1 / 12, 1 / 64, 1 / 4096), "turned over"), ((48, 64, 64), "numbers: 3 x"), ((12, 8, 64), "positions:"), ((12, 64, 128), "squared"),
            (12, "1 number; three"), ((16 * 128**2, 128**2, 128**4), "latent's")],
    "9.2": [(lambda c_in, c_out, k, side, stride=1: k * k * c_in * c_out * (side // stride) ** 2, "addition"), (lambda c_in, c_out, k, side, stride=1: 2 * k * c_in * c_out * side**2, "k x k"),
            (lambda c_in, c_out, k, side, stride=1: 2 * k * k * c_in * c_out * side**2, "half the side"), (lambda c_in, c_out, k, side, stride=1: 2 * k * k * c_in * c_out * side**2 / stride, "both sides"),
            (lambda c_in, c_out, k, side, stride=1: 2 * k * k * c_in * side**2, "PyTorch counts")],
    "9.3": [(lambda s, text, unet, decoder, guided=True: math.ceil(s / (1 - s) * (text + decoder) / unet), "makes two"), (lambda s, text, unet, decoder, guided=True: s / (1 - s) * (text + decoder) / (unet * (1 + guided)), "whole number"),
            (lambda s, text, unet, decoder, guided=True: math.ceil(s / (1 - s) * (text + decoder) / (2 * unet)), "one evaluation"), (lambda s, text, unet, decoder, guided=True: math.ceil(s / (1 - s) * decoder / (unet * (1 + guided))), "text's work"),
            (lambda s, text, unet, decoder, guided=True: math.ceil(s * (text + decoder) / (unet * (1 + guided))), "whole work"), (lambda s, text, unet, decoder, guided=True: 50, "it is")],
    "9.4": [((lambda s, r: (1 - s) * r + s * r**2, None), "sides"), ((lambda s, r: s * r**2 + (1 - s) * r**4, None), "turned over"), ((lambda s, r: r**2, None), "grows like"),
            ((lambda s, r: (1 - s) * r**2 + s * r**4, lambda m, r: (m - r**2) / (r**4 - r**2) * r**4 / m), "large map"), ((lambda s, r: (1 - s) * r**2 + s * r**4, lambda m, r: m / r**4), "turned round"),
            ((lambda s, r: (1 - s) * r**2 + s * r**4, not_written), "still to be written")],
    "9.5": [(lambda once, latent, pixel, fewer=1.0: once / (pixel - latent), "left out"), (lambda once, latent, pixel, fewer=1.0: fewer * once / (pixel - fewer * latent), "of the latent run"),
            (lambda once, latent, pixel, fewer=1.0: once / pixel, "own steps"), (lambda once, latent, pixel, fewer=1.0: once, "both costs equal"),
            (lambda once, latent, pixel, fewer=1.0: once / (pixel - fewer * latent) if pixel != fewer * latent else -1, "never pays"), (lambda once, latent, pixel, fewer=1.0: once / (pixel - fewer * latent), "never pays"),
            (lambda once, latent, pixel, fewer=1.0: once / (fewer * pixel - latent), "belongs to its steps")],
}


def leap(z, x_hat, a, b):
    return b**0.5 * x_hat + (1 - b) ** 0.5 * (z - a**0.5 * x_hat) / (1 - a) ** 0.5


def halfway(z, z_2, a, b):
    r = ((1 - b) / (1 - a)) ** 0.5
    return (z_2 - r * z) / (b**0.5 - r * a**0.5)


def turning(much, twice=False, end=1.0):
    """Exercise 7.5: Euler's step with `much` of the right correction; `twice`, Heun's with two guesses a step."""
    def walk(guess, x, alpha_bars, times):
        levels, before = [*alpha_bars[times].tolist(), end], None
        for i, (t, a, b) in enumerate(zip(times, levels, levels[1:])):
            eps, h = guess(x, t), ((1 - b) / b) ** 0.5 - ((1 - a) / a) ** 0.5
            way = eps if before is None else eps + much * h / (2 * before[1]) * (eps - before[0])
            if twice and i + 1 < len(times):
                way = (eps + guess(b**0.5 * (x / a**0.5 + h * eps), times[i + 1])) / 2
            x, before = b**0.5 * (x / a**0.5 + h * way), (eps, h)
        return x
    return walk


def plain_ab(guess, x, alpha_bars, times):
    """Exercise 7.5 as Stable Diffusion's PLMS has it: (3 eps - eps_before) / 2, as if all steps were equally long."""
    levels, before = [*alpha_bars[times].tolist(), 1.0], None
    for t, a, b in zip(times, levels, levels[1:]):
        eps = guess(x, t)
        way = eps if before is None else (3 * eps - before) / 2
        x, before = leap(x, (x - (1 - a) ** 0.5 * way) / a**0.5, a, b), eps
    return x


def mixture(noises, weights):
    return torch.tensordot(weights, noises, dims=1)


RIGHT |= {
    "7.1": [60, 60.0, 2 * len([599, *range(579, 0, -20)])],
    "7.2": [lambda n, w: mixture(n, w) / w.norm(), lambda n, w: sum(a * b for a, b in zip(w, n)) / (w**2).sum().sqrt()],
    "7.3": [lambda x, a, w: x * w / (a * w * w + 1 - a) ** 0.5, lambda x, a, w: torch.tensor(x) / (a + (1 - a) / w**2) ** 0.5],
    "7.4": [halfway],
    "7.5": [turning(1), plain_ab],
}
WRONG |= {
    "7.1": [(30, "guidance asks twice"), (100, "whole way"), (58, "count the times"), (50, "count the times")],
    "7.2": [(mixture, "variance is not 1"), (lambda n, w: mixture(n, w) / w.sum(), "variance is not 1"), (lambda n, w: mixture(n, w) / (w**2).sum(), "variance; "),
            (lambda n, w: mixture(n, w) / mixture(n, w).std(), "nearly"), (lambda n, w: n * w[:, None, None, None], "shape"), (lambda n, w: n.sum(dim=0) / 3**0.5, "variances add")],
    "7.3": [(lambda x, a, w: a**0.5 * w**2 * x / (a * w**2 + 1 - a), "one single step"), (lambda x, a, w: w * x, "spread of its own"),
            (lambda x, a, w: a**0.5 * w * x / (a * w**2 + 1 - a) ** 0.5, "too many"), (lambda x, a, w: w * x / (a * w**2 + 1 - a), "variance of x_t"), (lambda x, a, w: x / a**0.5, "how many spreads")],
    "7.4": [(lambda z, z_2, a, b: (z - a**0.5 * halfway(z, z_2, a, b)) / (1 - a) ** 0.5, "noise that the student"), (lambda z, z_2, a, b: z_2, "clean only if"),
            (lambda z, z_2, a, b: z_2 / b**0.5, "mean of 0"), (lambda z, z_2, a, b: (z_2 - z) / (b**0.5 - a**0.5), "does not arrive")],
    "7.5": [(turning(0), "still order 1"), (turning(-1), "order"), (turning(0.5), "still order 1"), (turning(1, twice=True), "one a step"), (turning(1, end=0.5), "last alpha_bar"),
            (lambda guess, x, alpha_bars, times: x, "last alpha_bar")],
}


def most_frequent_pair(words, once=False):
    count = {}
    for pieces, times in words.items():
        pairs = list(zip(pieces, pieces[1:]))
        for pair in set(pairs) if once else pairs:
            count[pair] = count.get(pair, 0) + times
    return max(count, key=count.get)


def attend_to_some(q, k, v, keep):
    return (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~keep[:, None], -torch.inf).softmax(-1) @ v


def shares_renewed(q, k, v, keep):
    shares = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) * keep[:, None]
    return shares / shares.sum(-1, keepdim=True) @ v


def whole_attention(q, k, v):
    return (q @ k.T / q.shape[-1] ** 0.5).softmax(-1) @ v


def attend_in_blocks(q, blocks, top=True, shrink=True, root=True):
    largest, total, result = torch.full((len(q), 1), -torch.inf, dtype=q.dtype), 0.0, 0.0
    for k, v in blocks:
        scores = q @ k.T / (q.shape[-1] ** 0.5 if root else 1)
        before, largest = largest, torch.maximum(largest, scores.amax(1, keepdim=True)) if top else 0 * largest.clamp(min=0)
        factor, powers = (before - largest).exp() if shrink and top else 1.0, (scores - largest).exp()
        total, result = factor * total + powers.sum(1, keepdim=True), factor * result + powers @ v
    return result / total




RIGHT |= {
    "5.1": [4096 / 77, 53.2, 53, torch.tensor(53.19)],
    "5.2": [most_frequent_pair, lambda words: list(most_frequent_pair(words))],
    "5.3": [attend_to_some, lambda q, k, v, keep: torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None]),
            lambda q, k, v, keep: torch.stack([(a @ b[c].T / 2).softmax(1) @ d[c] for a, b, d, c in zip(q, k, v, keep)]).float(), shares_renewed],
    "5.4": [attend_in_blocks, lambda q, blocks: whole_attention(q, *map(torch.cat, zip(*[(k.clone(), v.clone()) for k, v in blocks])))],
}
WRONG |= {
    "5.1": [(77 / 4096, "turned over"), (64 / 77, "a side"), (4096, "weights too"), (4096**2, "each pair"), (48, "each pair")],
    "5.2": [(lambda words: "ab", "pieces of the pair"), (lambda words: most_frequent_pair(dict.fromkeys(words, 1)), "as often as it occurs"),
            (lambda words: most_frequent_pair(words, once=True), "twice"), (lambda words: ("b", "a"), "neighbours"),
            (lambda words: most_frequent_pair({tuple("".join(w)): n for w, n in words.items()}), "neighbours"),
            (lambda words: ("a", "b"), "several letters")],
    "5.3": [(lambda q, k, v, keep: attend_to_some(q, k, v, ~keep), "only that"), (lambda q, k, v, keep: ((q @ k.mT / 2).softmax(-1) * keep[:, None]) @ v, "add up"),
            (lambda q, k, v, keep: attend_to_some(q, k * keep[..., None], v, keep | True), "exp(0)"), (lambda q, k, v, keep: attend_to_some(2 * q, k, v, keep), "root"),
            (lambda q, k, v, keep: attend_to_some(q, k, v, keep | True), "minus infinity"), (lambda q, k, v, keep: attend_to_some(q, k, v, keep)[0], "shape")],
    "5.4": [(lambda q, blocks: whole_attention(q, *map(torch.cat, zip(*blocks))), "used again"),
            (lambda q, blocks: torch.stack([whole_attention(q, k, v) for k, v in blocks]).mean(0), "alike"),
            (lambda q, blocks: attend_in_blocks(q, blocks, top=False), "overflows"), (lambda q, blocks: attend_in_blocks(q, blocks, shrink=False), "must shrink"),
            (lambda q, blocks: [next(blocks), q][1], "three things"), (lambda q, blocks: attend_in_blocks(q, blocks, root=False), "three things")],
}


def guided(unet, z, t, asked, empty, w):
    n, a = unet(torch.cat([z, z]), torch.cat([t, t]), torch.cat([empty, asked])).chunk(2)
    return n + w * (a - n)


def in_interval(outside=1.0, inside=lambda t, low, high: (t >= low) & (t <= high)):
    def limited(unet, z, t, context, w, low, high):
        empty, asked = context.chunk(2)
        return guided(unet, z, t, asked, empty, torch.where(inside(t, low, high), w, outside).view(-1, 1, 1, 1))
    return limited


def gaussian(m, s, S, w):
    variance = 1 / (w / s**2 + (1 - w) / S**2)
    return w * m / s**2 * variance, variance


RIGHT |= {
    "6.1a": [7.5, torch.tensor(7.5)], "6.1b": [400, 4 * 50 * 2.0],
    "6.2": [guided, lambda u, z, t, a, n, w: (lambda e: e[3:] * w + (1 - w) * e[:3])(u(z.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([n, a])))],
    "6.3": [gaussian, lambda m, s, S, w: (w * m * S**2 / (w * S**2 + (1 - w) * s**2), torch.tensor(s**2 * S**2 / (w * S**2 + (1 - w) * s**2)))],
    "6.4": [lambda n, a, b, w: n + w * (a - n) + w * (b - n), lambda n, a, b, w: (1 - 2 * w) * n + w * (a + b)],
    "6.5": [in_interval(),
            lambda u, z, t, c, w, low, high: torch.cat([guided(u, z[i:i + 1], t[i:i + 1], c[len(z) + i][None], c[i][None], w if low <= t[i] <= high else 1.0) for i in range(len(z))])],
}
WRONG |= {
    "6.1a": [(6.5, "theirs"), (5.5, "other way round"), (8.5, "factor")], "6.1b": [(200, "empty half"), (100, "passes"), (50, "passes"), (800, "times")],
    "6.2": [(lambda u, z, t, a, n, w: guided(u, z, t, n, a, w), "turned over"), (lambda u, z, t, a, n, w: u(z, t, n) + w * (u(z, t, a) - u(z, t, n)), "one batch"),
            (lambda u, z, t, a, n, w: guided(u, z, t, a, n, w + 1), "Ho & Salimans"), (lambda u, z, t, a, n, w: u(torch.cat([z, z]), torch.cat([t, t]), torch.cat([n, a])), "shape"),
            (lambda u, z, t, a, n, w: guided(u, z, t.flip(0), a, n, w), "its own t"), (lambda u, z, t, a, n, w: u(z, t, torch.cat([n, a])), "go in twice"),
            (lambda u, z, t, a, n, w: u(z, t), "in the line `")],
    "6.3": [(lambda m, s, S, w: (gaussian(m, s, S, w)[0], gaussian(m, s, S, w)[1] ** 0.5), "standard deviation"), (lambda m, s, S, w: (m, s**2 / w), "alone"),
            (lambda m, s, S, w: (w * m, gaussian(m, s, S, w)[1]), "mean is not"), (lambda m, s, S, w: (m, s**2), "another"), (lambda m, s, S, w: (gaussian(m, s, S, w)[0], 1 / gaussian(m, s, S, w)[1]), "turn it over"),
            (lambda m, s, S, w: gaussian(m, s, S, w)[::-1], "mean first"), (lambda m, s, S, w: m, "two are asked for")],
    "6.4": [(lambda n, a, b, w: n + w * (a + b - n), "both"), (lambda n, a, b, w: n + w * ((a + b) / 2 - n), "mean"), (lambda n, a, b, w: n + w * (a - n), "last two"),
            (lambda n, a, b, w: n + w * (a - n) + n + w * (b - n), "stands there once"), (lambda n, a, b, w: n, "last two")],
    "6.5": [(in_interval(0.0), "unconditional"), (in_interval(inside=lambda t, low, high: (t < low) | (t > high)), "turned over"), (in_interval(inside=lambda t, low, high: t > 0), "its own t"),
            (in_interval(inside=lambda t, low, high: (t[0] >= low) & (t[0] <= high)), "its own t"), (lambda u, z, t, c, w, low, high: u(torch.cat([z, z]), torch.cat([t, t]), c), "shape"),
            (in_interval(inside=lambda t, low, high: (t > low) & (t < high)), "belong to the interval"), (lambda u, z, t, c, w, low, high: w if low <= t <= high else 1.0, "row by row"),
            (lambda u, z, t, c, w, low, high: torch.where(t > low, w, 1.0) * z, "(B, 1, 1, 1)"), (lambda u, z, t, c, w, low, high: u(z, t, c), "go in twice")],
}


from ldm_minimal import stable_diffusion  # noqa: E402


def attention(scale=1.0, heads_count=False, queries=2, m_for_keys=lambda n, m: m):
    """Exercise 10.2, right or with one thing wrong."""
    def flops(n, m, width, context, heads):
        return scale * (queries * 2 * n * width**2 + 4 * m_for_keys(n, m) * context * width + 4 * n * m * width * (heads if heads_count else 1))
    return flops


def block_number(first=1, halving=1, more=1, up_first=0):
    """Exercise 10.3, right or with one thing wrong."""
    return lambda way, level, number, blocks: (first + level * (blocks + halving) + number if way == "down" else up_first + level * (blocks + more) + number)


def by_table(turn=None, leave=()):
    """Exercise 10.4: whole rows of the table; turn: a layer of ours whose two parts come in the wrong order."""
    def load(block, theirs):
        for ours, _, names in stable_diffusion.TRANSFORMER:
            for kind in ("weight", "bias"):
                parts = [theirs[f"{name}.{kind}"] for name in names.split() if f"{name}.{kind}" in theirs]
                if not parts or ours in leave:
                    continue
                whole = torch.cat(parts[::-1] if ours == turn else parts)
                for name, part in zip(ours.split()[::-1] if ours == turn else ours.split(), whole.chunk(len(ours.split()))):
                    target = block.get_parameter(f"{name}.{kind}")
                    target.data = part.reshape(target.shape).clone()
    return load


def by_state_dict(block, theirs):
    """Exercise 10.4 another way: all at once, new tensors for old ones."""
    get = lambda name: theirs[f"transformer_blocks.0.{name}"]  # noqa: E731
    state = {f"{ours}.{kind}": theirs[f"{name}.{kind}"] for ours, _, name in stable_diffusion.TRANSFORMER
             for kind in ("weight", "bias") if " " not in ours + name and f"{name}.{kind}" in theirs}
    state |= {f"attend_{way}.key_value.weight": torch.cat([get(f"attn{i}.to_k.weight"), get(f"attn{i}.to_v.weight")]) for i, way in ((1, "self"), (2, "cross"))}
    for kind in ("weight", "bias"):
        state[f"mlp_value.{kind}"], state[f"mlp_gate.{kind}"] = get(f"ff.net.0.proj.{kind}").chunk(2)
    for end in ("project_in", "project_out"):
        state[f"{end}.weight"] = state[f"{end}.weight"].flatten(1)
    block.load_state_dict(state, assign=True)


RIGHT |= {
    "10.1": [0.4375, 0.44, 2514.5 / (13.3 + 4 * 803.3 + 2514.5)],
    "10.2": [attention(), lambda n, m, c, d, h: torch.tensor(2.0 * (2 * n * c * c + 2 * m * d * c + h * 2 * n * m * (c // h)))],
    "10.3": [block_number()],
    "10.4": [by_table(), by_state_dict],
}
WRONG |= {
    "10.1": [(43.75, "per cent"), (0.559, "U-Net's share"), (0.28, "asks the U-Net once"), (0.75, "over those"), (0.03, "over those")],
    "10.2": [(attention(scale=0.5), "as one"), (attention(heads_count=True), "each head"), (attention(queries=1), "so is the result"), (lambda n, m, c, d, h: 4 * n * m * c, "alone"),
             (attention(m_for_keys=lambda n, m: n), "not of the n"), (attention(m_for_keys=lambda n, m: m / 2), "two products"),
             (lambda n, m, c, d, h: 4 * n * c * c + 4 * m * d * c + 2 * n * m * c, "two products"), (lambda n, m, c, d, h: n * m, "two projections of n")],
    "10.3": [(block_number(first=0), "one higher"), (block_number(halving=0), "of its own"), (block_number(more=0), "one residual block more"), (block_number(up_first=1), "begin at 0"),
             (lambda way, level, number, blocks: block_number()(way, 3 - level if way == "up" else level, number, blocks), "order in which"), (lambda *_: 7, "not 7")],
    "10.4": [(by_table(turn="mlp_value mlp_gate"), "value and gate"), (by_table(turn="attend_self.key_value"), "self-attention's keys"), (by_table(turn="attend_cross.key_value"), "cross-attention's keys"),
             (by_table(leave=("norm_cross",)), "norm_cross"), (lambda b, t: None, "of 2"), (lambda b, t: b.load_state_dict(t), "raised")],
}


def said(number, answer, capsys):
    check(number, answer)
    return capsys.readouterr().out.strip()


@pytest.mark.parametrize("number", CHECKS)
def test_right_answers_are_correct(number, capsys):
    for answer in RIGHT[number]:
        assert said(number, answer, capsys) == f"exercise {number}: correct"


@pytest.mark.parametrize("number", CHECKS)
def test_wrong_answers_are_told_what_is_wrong(number, capsys):
    for answer, word in WRONG[number]:
        reply = said(number, answer, capsys)
        assert reply.startswith(f"exercise {number}: not yet: ") and word in reply, reply


@pytest.mark.parametrize("number", CHECKS)
def test_a_stub_is_not_attempted(number, capsys):
    def stub(*_):
        raise NotImplementedError
    for answer in (stub, ...) if callable(RIGHT[number][0]) else (...,):
        assert said(number, answer, capsys) == f"exercise {number}: not attempted"
