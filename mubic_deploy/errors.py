"""What a user can get wrong, said in one line."""

from __future__ import annotations

import math
import operator
from typing import Any

SHOWN = 60  # characters


class UserError(Exception):
    """Wrong input, file or setting. The message is one line: what is wrong, with the value, and what to do.

    The command line prints it and exits with code 2; the API raises it."""


def whole(name: str, value: Any, least: int, most: int | None = None, unit: str = "", use: str | None = None) -> int:
    """`value` as an int if it is an integer from `least` to `most`, Python's or NumPy's, else UserError.

    unit: of what is counted, as " frames"; use: what may be given, where that is not these numbers alone."""
    if use is None:
        use = f"{least} or more{unit}" if most is None else f"{least} to {most}{unit}"
    try:
        number = operator.index(value)
    except TypeError:
        raise UserError(f"{name} {shown(value)} is no int: use {use}") from None
    if number < least or (most is not None and number > most):
        raise UserError(f"{name} {number} is out of range: use {use}")
    return number


def check_seconds(name: str, seconds: Any) -> float:
    """`seconds` as a float if it is a finite number above 0, else UserError."""
    number = as_float(seconds)
    if not 0 < number < math.inf:
        raise UserError(f"{name} {shown(seconds)} is out of range: use seconds above 0")
    return number


def as_float(value: Any) -> float:
    """Of a number of any kind, NumPy's too; NaN for what is none."""
    try:
        return math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def shown(value: Any) -> str:
    """`repr`, in one line and not long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}.."
