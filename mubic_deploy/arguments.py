"""Command lines: a parser that says what is wrong in one line, and the types of its arguments."""

from __future__ import annotations

import argparse
import math
from typing import Any, NoReturn

from mubic_deploy.config import ADAPTIVE, MAX_STEPS
from mubic_deploy.errors import UserError

MOST_PORT = 65_535


class Parser(argparse.ArgumentParser):
    """argparse with one line an error."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, but what is unknown is said by the command that does not know it."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            command = getattr(found, "command", None)
            named = f"{self.prog} {command}" if command else self.prog
            raise UserError(f"unrecognized arguments: {' '.join(unknown)} (see {named} --help)")
        return found


def steps(text: str) -> int:
    """N, or ADAPTIVE for "adaptive". A variant may allow fewer."""
    if text == "adaptive":
        return ADAPTIVE
    if not text.isdecimal() or not 1 <= int(text) <= MAX_STEPS:
        raise argparse.ArgumentTypeError(f"{text} is no number of steps: use 1 to {MAX_STEPS}, or adaptive")
    return int(text)


def natural(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number, 0 or more")
    return int(text)


def positive(text: str) -> int:
    if natural(text) == 0:
        raise argparse.ArgumentTypeError("0 is too small: use 1 or more")
    return int(text)


def port(text: str) -> int:
    if natural(text) > MOST_PORT:  # the system would take it modulo 65 536
        raise argparse.ArgumentTypeError(f"{text} is no port: use 0 to {MOST_PORT}")
    return int(text)


def seconds(text: str, unit: str = "seconds") -> float:
    value = number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no time: use {unit} above 0")
    return value


def minutes(text: str) -> float:
    return seconds(text, "minutes")


def instances(text: str) -> tuple[str | None, int]:
    """MODEL=COUNT, or COUNT with None for the model."""
    model, equals, count = text.rpartition("=")
    if equals and not model:
        raise argparse.ArgumentTypeError(f"{text} names no model: use COUNT or MODEL=COUNT")
    return model or None, positive(count)


def number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not a number") from None
