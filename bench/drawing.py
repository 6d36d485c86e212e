"""What all charts have in common: size of text, colours, styles of series, axes, keys."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import Formatter, LogLocator, MaxNLocator, NullLocator

from bench import text

TEXT = 16  # px
DOTS = 72  # px an inch, so that a point is a pixel
INK, FAINT, GROUND = "#1b1b1a", "#6f6f6c", "#fdfdfb"
# Okabe and Ito's colours, darkened until they are 3 : 1 from a light ground
COLOURS = ("#0072b2", "#c2500a", "#00795a", "#a3427b", "#7a6000", "#4d4dbf", "#5a5a57")
DARK = {  # the same on a dark ground
    INK: "#eeeeec",
    FAINT: "#a0a09c",
    GROUND: "#161615",
    **dict(zip(COLOURS, ("#56b4e9", "#f2924a", "#2fc79b", "#e394c0", "#d9b52e", "#a3a3f5", "#b4b4b0"), strict=True)),
}
MARKERS = "osD^vPX<>"
LINES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (6, 2, 1, 2, 1, 2)))
NARROW = 500  # px, up to which a figure is for a phone
FEW = 6  # ratio of an axis's ends from which on it is logarithmic
FAR = 16  # the same of the numbers that a curve is drawn over, which are linear if they can be
PAD = 0.08  # of an axis's length, free at its ends
RC: Any = {
    "font.size": TEXT,
    "axes.titlesize": TEXT,
    "figure.titlesize": TEXT,
    "legend.fontsize": TEXT,
    "hatch.linewidth": 1.2,
    "hatch.color": INK,
    "svg.hashsalt": "mubic",
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    "grid.color": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
HALO: Any = {"path_effects": [withStroke(linewidth=3, foreground=GROUND)]}  # readable over a line


@dataclass(frozen=True)
class Style:
    colour: str
    marker: str
    line: Any


class Styles(dict[str, Style]):
    """A style a name, the same wherever the name comes again; new names get the next one."""

    def __missing__(self, name: str) -> Style:
        i = len(self)
        style = Style(COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)], LINES[i % len(LINES)])
        return self.setdefault(name, style)


class Ticks(Formatter):
    """Writes an axis's ticks with as many digits as they need. written: of a value and how many digits."""

    def __init__(self, written: Callable[[float, int], str]) -> None:
        self.written = written

    def format_ticks(self, values: Sequence[float]) -> list[str]:
        with_figures = {n: [self._one(value, n) for value in values] for n in (3, 4, 5, 6, 9)}
        return next(labels for labels in with_figures.values() if labels == with_figures[9])

    def __call__(self, x: float, pos: int | None = None) -> str:
        return self._one(x, 3)

    def _one(self, value: float, figures: int) -> str:
        return text.tick(self.written(value, figures)) if value else "0"


def new_figure(width: int, height: int, keys: Iterable[str]) -> tuple[Figure, Axes]:
    """height: without the key. The ground stays clear, so that it may be light or dark."""
    figure = Figure((width / DOTS, (height + _key_height(list(keys), width)) / DOTS), dpi=DOTS, layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.subplots()
    axes.patch.set_alpha(0)
    axes.grid(alpha=0.35)
    return figure, axes


def look_of(style: Style) -> dict[str, Any]:
    look = {"color": style.colour, "marker": style.marker, "ls": style.line, "lw": 2.2, "ms": 8}
    return look | {"markeredgecolor": INK, "markeredgewidth": 0.8}


def add_key(figure: Figure, axes: Axes) -> None:
    width = DOTS * figure.get_size_inches()[0]
    handles, labels = axes.get_legend_handles_labels()
    wrapped = ["\n".join(_wrapped(label, width)) for label in labels]
    place: Any = {"loc": "outside lower left", "ncols": _columns(width)}
    figure.legend(handles, wrapped, **place, frameon=False, handlelength=3)


def _key_height(labels: Sequence[str], width: float) -> float:
    """px; a key fills one column after the other."""
    each = math.ceil(len(labels) / _columns(width))
    columns = [labels[i : i + each] for i in range(0, len(labels), max(1, each))]
    return 14 + max((sum(7 + 19 * len(_wrapped(label, width)) for label in of) for of in columns), default=0)


def _columns(width: float) -> int:
    """Of a key."""
    return 2 if width > NARROW else 1


def _wrapped(label: str, width: float) -> list[str]:
    """Lines of a label of the key, at 9.3 px a character, beside 85 px of line and margins."""
    return textwrap.wrap(label, int((width / _columns(width) - 85) / 9.3)) or [""]


def scale(
    axes: Axes,
    which: str,
    values: Sequence[float],
    written: Callable[[float, int], str],
    zero: bool = False,
    few: float = FEW,
) -> None:
    """Logarithmic where the values' ends are more than `few` times apart, else linear, from 0 if asked."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = min(values), max(values)
    limits = axes.set_xlim if which == "x" else axes.set_ylim
    if low > 0 and high / low > few:
        (axes.set_xscale if which == "x" else axes.set_yscale)("log")
        room = (high / low) ** PAD
        limits(low / room, high * room)
        decades = math.log10(high / low)
        subs = (1.0, 2.0, 5.0) if decades < (1.3 if which == "x" else 2) else (1.0, 3.0) if decades < 2 else (1.0,)
        axis.set_major_locator(LogLocator(subs=subs, numticks=8))
        axis.set_minor_locator(NullLocator())
    else:
        room = PAD * (high - low) or PAD * abs(high) or 1
        from_zero = zero and low >= 0
        limits(0 if from_zero else low - room, high + (PAD * high if from_zero else room))
        axis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(Ticks(written))


def place_ticks(axes: Axes, places: Sequence[float], width: int) -> bool:
    """Ticks at the places measured, as far as they have room; whether they are so far apart that the axis is
    logarithmic."""
    far = len(places) > 2 and places[0] > 0 and places[-1] / places[0] > FAR
    if far:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_minor_locator(NullLocator())
        room = (places[-1] / places[0]) ** PAD
        axes.set_xlim(places[0] / room, places[-1] * room)
        position = [math.log(p) for p in places]
    else:
        position = list(places)
    gap, last, shown = 0.13 if width <= NARROW else 0.06, -math.inf, []
    for place, at in zip(places, position, strict=True):
        if at - last >= gap * (position[-1] - position[0]):
            shown.append(place)
            last = at
    axes.set_xticks(shown, [f"{p:g}" for p in shown])
    return far


def luminance(shade: Sequence[float]) -> float:
    """Relative luminance of sRGB as WCAG 2 defines it."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in shade[:3]]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))
