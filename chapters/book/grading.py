"""check(): is a reader's answer to an exercise right, and if not, what went wrong?

The exercises are data, a table for each chapter in exercises/. An answer is compared with the
reference on inputs that no cell shows, so that copying an output never passes, and to a tolerance,
so that every right way passes. On the first input where it is not right, it is compared with
mistakes that readers often make; if it agrees with one of them, that mistake's hint is printed.
"""

from __future__ import annotations

import copy
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

import ldm_minimal

BOOK = Path(__file__).resolve().parent
LIBRARY = Path(ldm_minimal.__file__).resolve().parent


@dataclass(frozen=True)
class Exercise:
    """The right answer to an exercise, usual wrong ones, and what to say to each.

    An answer is a function, or, where there are no inputs, a value.
    """

    reference: object
    otherwise: str | Callable[..., str]  # the hint when no mistake is recognised; see `fallback`
    mistakes: dict[str, object] = field(default_factory=dict)  # see `pairs`
    inputs: Sequence[tuple] = ()  # the arguments of each call; the first ones should be generic
    call: Callable | None = None  # (answer, *arguments) -> result; may raise Hint. None: just call
    tolerance: float = 1e-4  # relative
    form: str = ""  # what a result of the right shape is
    # For the tests: more right answers, and wrong ones with some words of the reply they must get.
    also_right: Sequence = ()
    also_wrong: dict[str, object] = field(default_factory=dict)  # see `pairs`


def pairs(hints: dict[str, object]) -> list[tuple[object, str]]:
    """(mistake, hint) pairs from {hint: mistake}, where a list is several mistakes."""
    result = []
    for hint, mistakes in hints.items():
        for mistake in mistakes if isinstance(mistakes, list) else [mistakes]:
            result.append((mistake, hint))
    return result


class Hint(Exception):
    """Raised by an exercise's `call` where it already knows what is wrong: the text to print."""


def check(number: str, answer: Callable | object) -> None:
    """Print whether `answer` to exercise `number` is not attempted (`...`), not yet right or right.

    Raises ValueError if there is no such exercise.
    """
    from .exercises import EXERCISES  # here, because the tables are made of the classes above

    if number not in EXERCISES:
        raise ValueError(f"number is {number!r}; the exercises are {', '.join(EXERCISES)}")
    try:
        if answer is ...:
            raise NotImplementedError
        complaint = grade(EXERCISES[number], answer)
    except Hint as hint:
        complaint = str(hint)
    except Exception as error:  # whatever a reader's own code may raise
        if isinstance(error, NotImplementedError) and not error.args:  # PyTorch's have a message
            print(f"exercise {number}: not attempted")
            return
        complaint = cause(error)
    verdict = f"not yet: {complaint}" if complaint else "correct"
    print(f"exercise {number}: {verdict}")


def grade(exercise: Exercise, answer) -> str | None:
    """What is wrong with `answer`, or None if it is right on every input."""
    for arguments in exercise.inputs or [()]:
        got = result_of(exercise, answer, arguments)
        right = result_of(exercise, exercise.reference, arguments)
        if agree(got, right, exercise.tolerance):
            continue
        for mistake, hint in pairs(exercise.mistakes):
            if agree(got, result_of(exercise, mistake, arguments), exercise.tolerance):
                return hint
        return fallback(exercise, got, right, arguments)
    return None


def result_of(exercise: Exercise, answer, arguments: tuple):
    """What an answer gives for one input. It gets a copy: what it changes in place is its own."""
    arguments = copy.deepcopy(arguments)
    if exercise.call:
        return exercise.call(answer, *arguments)
    return answer(*arguments) if exercise.inputs else answer


def agree(got, right, tolerance: float) -> bool:
    """Are two results the same text, or the same numbers to a relative `tolerance`?"""
    if isinstance(right, str):
        return got == right
    got, right = as_numbers(got, right)
    if got.shape != right.shape:
        return False
    return torch.allclose(got, right, rtol=tolerance, atol=1e-3 * tolerance)


def as_numbers(got, right) -> tuple[Tensor, Tensor]:
    """Both as tensors of float64 on the CPU; a single number may come in any shape."""
    got, right = numbers(got), numbers(right)
    if got.numel() == right.numel() == 1:
        got = got.reshape(right.shape)
    return got, right


def numbers(value) -> Tensor:
    if isinstance(value, (list, tuple)):
        return torch.stack([numbers(part) for part in value])
    return torch.as_tensor(value).cpu().double()


def fallback(exercise: Exercise, got, right, arguments: tuple) -> str:
    """The hint when no mistake is recognised: of the shape, or the exercise's own.

    That is a function of (result, *arguments), or a text in which {got}, {right} and the arguments
    {0}, {1} … are filled in.
    """
    if not isinstance(right, str):
        got, right = as_numbers(got, right)
        if got.shape != right.shape:
            meaning = f", {exercise.form}" if exercise.form else ""
            return f"the answer has {shape_of(got)}; it must have {shape_of(right)}{meaning}"
    if callable(exercise.otherwise):
        return exercise.otherwise(got, *arguments)
    return exercise.otherwise.format(*arguments, got=got, right=right)


def shape_of(tensor: Tensor) -> str:
    return f"shape {tuple(tensor.shape)}" if tensor.ndim else "shape (), a single number"


def cause(error: Exception) -> str:
    """What an exception means: it names a line of the reader's own code, if it came from one."""
    others = (
        f"{BOOK}{os.sep}",
        f"{LIBRARY}{os.sep}",
        f"{sys.prefix}{os.sep}",
        f"{sys.base_prefix}{os.sep}",
        "<frozen",
    )
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(others)]
    raised = f"{type(error).__name__}: {' '.join(str(error).split())}"  # on one line
    if own:
        line = own[-1].line
        return f"it raised {raised}" + (f", in the line `{line.strip()}`" if line else "")
    if "NoneType" in str(error):
        return f"it gave None; is a `return` missing? (raised {raised})"
    return f"the answer is not of the kind that is asked for (raised {raised})"
