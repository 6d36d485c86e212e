"""What a user can get wrong, said in one line."""

from __future__ import annotations

import math
import operator
from numbers import Real
from typing import Any


class UserError(Exception):
    """Wrong input, file or setting. The message is one line: what is wrong, with the value, and what to do.

    The command line prints it and exits with code 2; the API raises it."""


def whole(name: str, value: Any, least: int, most: int | None = None, unit: str = "", use: str | None = None) -> int:
    """`value` if it is an integer from `least` to `most`, Python's or NumPy's, else UserError.

    unit: of what is counted, as " frames"; use: what may be given, where that is not these numbers alone."""
    if use is None:
        use = f"{least} or more{unit}" if most is None else f"{least} to {most}{unit}"
    try:
        number = operator.index(value)
    except TypeError:
        raise UserError(f"{name} {value!r} is no int: use {use}") from None
    if number < least or (most is not None and number > most):
        raise UserError(f"{name} {number} is out of range: use {use}")
    return number


def check_seconds(name: str, seconds: float) -> float:
    """`seconds` if it is a finite number above 0, else UserError."""
    if not isinstance(seconds, Real) or not 0 < seconds < math.inf:
        raise UserError(f"{name} {seconds} is out of range: use seconds above 0")
    return seconds
