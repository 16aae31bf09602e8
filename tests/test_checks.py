"""The exercises' checks accept every right answer and reject the usual wrong ones, saying what is wrong."""

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
WRONG = {  # number: (answer, a word of the reply)
    "1.1": [(lambda b: (kept(b) / (1 - kept(b))).log10(), "bels"), (lambda b: 20 * (kept(b) / (1 - kept(b))).log10(), "20 log10"),
            (lambda b: 10 * ((1 - b) / b).log10(), "one step"), (lambda b: 10 * (kept(b) / (1 - kept(b))).log(), "base 10"),
            (lambda b: 10 * ((1 - kept(b)) / kept(b)).log10(), "turn the ratio"), (lambda b: kept(b), "others"), (lambda b: None, "raised")],
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
