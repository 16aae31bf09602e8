"""What the four commands' argument parsers share."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """An argument parser that reports an error in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help lists what is allowed)\n")


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], int | float]:
    """For `type=` of an argument: an int or float in [low, high], or an error that says so."""

    def read(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if math.isfinite(value) and low <= value <= high:
            return value
        name = "a whole number" if kind is int else "a number"
        allowed = f"from {low:g} to {high:g}" if math.isfinite(high) else f"of at least {low:g}"
        raise argparse.ArgumentTypeError(f"{text!r} came, {name} {allowed} is allowed")

    return read


def add_seed(parser: argparse.ArgumentParser) -> None:
    """--seed, the same in each command."""
    parser.add_argument(
        "--seed", type=number(int, 0, 2**31), default=0, help="of all randomness (default 0)"
    )
