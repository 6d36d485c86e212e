"""The report's charts. Each function makes a figure `width` CSS pixels wide whose text is 16 px, so that it can be
drawn anew for a phone instead of being scaled down.

What is what must be clear in black and white too: every series has a marker and a line style of its own, bars have
hatches, and names and figures stand beside what they belong to."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from bench import text
from bench.timing import Timing

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
MARKED = (0.05, 0.25, 0.5, 0.75, 0.95)  # where a distribution's line carries its marker
NARROW = 500  # px, up to which a figure is for a phone
FEW = 6  # ratio of an axis's ends from which on it is logarithmic
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


@dataclass(frozen=True)
class Point:
    """x, y and what to write beside them; low and high: y's interval."""

    x: float
    y: float
    label: str = ""
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Bar:
    """A step of a waterfall: seconds with its interval, and how many times faster than the step before, if known."""

    name: str
    seconds: float
    low: float
    high: float
    gain: float | None = None


@dataclass(frozen=True)
class Work:
    """A graph on the roofline: FLOP per byte, and FLOP/s reached."""

    graph: str
    side: str
    intensity: float
    rate: float


def cdf(timings: Mapping[str, Timing], styles: Styles, width: int) -> Figure:
    """Which part of the calls was done within which time, a line a side; the key is in the order of the medians."""
    with rc_context(RC):
        ordered = sorted(timings.items(), key=lambda item: item[1].median)
        keys = {name: f"{name}, {text.seconds(timing.median)}" for name, timing in ordered}
        figure, axes = _figure(width, 300, keys.values())
        for name, timing in ordered:
            times = np.sort(timing.samples)
            # each sample is a step of 1 / n; thinned, or a page of 10 000 calls would be as many path nodes
            shown = np.unique(np.linspace(0, len(times) - 1, min(len(times), 200)).astype(int))
            places = [int(np.argmin(np.abs((shown + 1) / len(times) - q))) for q in MARKED]
            look = _look(styles[name]) | {"markevery": sorted(set(places)), "drawstyle": "steps-post"}
            axes.plot(times[shown], 100 * (shown + 1) / len(times), label=keys[name], **look)
        ends = [t for timing in timings.values() for t in (min(timing.samples), max(timing.samples))]
        _scale(axes, "x", ends, text.seconds)
        axes.set_ylim(0, 104)
        axes.set_yticks([0, 25, 50, 75, 100])
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g} %"))
        _key(figure, axes)
    return figure


def lines(
    series: Mapping[str, Sequence[Point]], styles: Styles, labels: tuple[str, str], name: str, width: int
) -> Figure:
    """Curves over a number: a line a series, y as the value `name` is written. labels: of x and y."""
    with rc_context(RC):
        figure, axes = _figure(width, 300, series)
        for key, points in series.items():
            x, y = [p.x for p in points], [p.y for p in points]
            bars = [(p.y if p.low is None else p.low, p.y if p.high is None else p.high) for p in points]
            error = [[max(0, v - low), max(0, high - v)] for v, (low, high) in zip(y, bars, strict=True)]
            axes.errorbar(x, y, yerr=np.transpose(error), capsize=4, elinewidth=1.2, label=key, **_look(styles[key]))
        values = [p.y for points in series.values() for p in points]
        _scale(axes, "y", values, lambda v: text.figure(name, v), zero=True)
        places = sorted({p.x for points in series.values() for p in points})
        _places(axes, places, width)
        axes.set_xlabel(labels[0])
        axes.set_title(labels[1], loc="left")
        _key(figure, axes)
    return figure


def throughput(series: Mapping[str, Sequence[Point]], styles: Styles, width: int) -> Figure:
    """Clips a second over the latency in seconds; each point has its label beside it where there is room."""
    with rc_context(RC):
        figure, axes = _figure(width, 340, series)
        for key, points in series.items():
            axes.plot([p.x for p in points], [p.y for p in points], label=key, **_look(styles[key]))
        _scale(axes, "x", [p.x for points in series.values() for p in points], text.seconds)
        rates = [p.y for points in series.values() for p in points]
        from_zero = min(rates) < max(rates) / 2  # else lines that lie close could not be told apart
        _scale(axes, "y", rates, text.digits, zero=from_zero)
        low, high = axes.get_ylim()
        axes.set_ylim(low, high * 1.1 if axes.get_yscale() == "log" else high + 0.08 * (high - low))
        axes.set_xlabel("latency, median")
        axes.set_title("clips a second" + ("" if from_zero else ", not from 0"), loc="left")
        _key(figure, axes)
        figure.draw_without_rendering()  # lays out, so that places are known in pixels
        taken: list[Any] = []
        for point in (p for points in series.values() for p in points):
            place = axes.transData.transform((point.x, point.y))
            if all(abs(place[0] - x) > 24 or abs(place[1] - y) > 20 for x, y in taken):
                taken.append(place)
                axes.annotate(point.label, (point.x, point.y), (0, 8), textcoords="offset points", ha="center", **HALO)
    return figure


def waterfall(bars: Sequence[Bar], width: int) -> Figure:
    """A bar a technique: solid what is left of the time, striped what this one saved, crossed what it cost."""
    with rc_context(RC):
        names = [textwrap.wrap(f"{i + 1}. {bar.name}", int((width - 40) / 9)) for i, bar in enumerate(bars)]
        above = [20 * len(lines) for lines in names]
        tops = np.cumsum([0, *(size + 66 for size in above)])  # px from above, of each name
        figure = Figure((width / DOTS, (tops[-1] + 40) / DOTS), dpi=DOTS, layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.subplots()
        axes.patch.set_alpha(0)
        for i, bar in enumerate(bars):
            y = tops[i] + above[i] + 16
            before = bars[i - 1].seconds if i else bar.seconds
            kept = min(before, bar.seconds)
            axes.barh(y, kept, 24, color=COLOURS[0], edgecolor=INK)
            if before != bar.seconds:
                hatch, size = "///" if bar.seconds < before else "xxx", abs(before - bar.seconds)
                axes.barh(y, size, 24, left=kept, fill=False, edgecolor=INK, hatch=hatch, lw=1)
            spread = [[max(0, bar.seconds - bar.low)], [max(0, bar.high - bar.seconds)]]
            axes.errorbar(bar.seconds, y, xerr=spread, color=INK, capsize=4, elinewidth=1.2)
            times = text.seconds(bar.seconds) + (f", {bar.gain:.2f} x" if bar.gain is not None else "")
            axes.text(0, y - 14, "\n".join(names[i]), va="bottom", linespacing=1.1)
            axes.text(0, y + 14, times, va="top", weight="bold")
        axes.set_ylim(tops[-1], -4)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_xlim(0, 1.04 * max(max(b.seconds, b.high) for b in bars))
        axes.xaxis.set_major_locator(MaxNLocator(4 if width <= NARROW else 8))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: text.tick(text.seconds(v)) if v else "0"))
    return figure


def roofline(works: Sequence[Work], limits: Mapping[str, float], styles: Styles, width: int) -> Figure:
    """What the graphs reach beside what the machine does at best: matrix products (flat) and copies (slanted), both
    axes logarithmic. limits: as `Results.limits`."""
    with rc_context(RC):
        sides = list(dict.fromkeys(w.side for w in works))
        figure, axes = _figure(width, 400, sides)
        copy, tops = limits["copy"], {k: v for k, v in limits.items() if k.startswith("gemm_")}
        ridges = [top / copy for top in tops.values()]
        left = min([w.intensity for w in works] + ridges) / 3
        right = max([w.intensity for w in works] + ridges) * 3
        for i, (name, top) in enumerate(tops.items()):
            kind = name.removeprefix("gemm_")
            axes.plot([left, top / copy, right], [left * copy, top, top], color=INK, lw=2, ls=LINES[i])
            label = f"matrix products, {kind}: {text.scaled(top, 'FLOP/s')}"
            label = label if width > NARROW else f"{kind}: {text.scaled(top, 'FLOP/s')}"
            axes.annotate(label, (right, top), (0, 4), textcoords="offset points", ha="right")
        for side in sides:
            of = [w for w in works if w.side == side]
            look = replace(styles[side], line="none")
            axes.plot([w.intensity for w in of], [w.rate for w in of], label=side, **_look(look))
        bottom = min([w.rate for w in works] + [left * copy])
        _names(axes, works)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(left, right)
        axes.set_ylim(bottom / 4, max(tops.values()) * 3)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: text.tick(text.digits(v))))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: text.tick(text.scaled(v, "")).replace(" ", "")))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_minor_locator(NullLocator())
        axes.set_title("FLOP/s", loc="left")
        axes.set_xlabel("FLOP a byte")
        copied = f"slanted: copies at {text.scaled(copy, 'B/s')}"
        axes.annotate(copied, (0.02, 0.98), xycoords="axes fraction", va="top")
        _key(figure, axes)
    return figure


def heat_map(cells: Mapping[tuple[str, str], float], name: str, width: int) -> Figure:
    """Differences as shades, dark for small: keys are (row, engine). Wider than `width` if the engines need it."""
    with rc_context(RC):
        rows, engines = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
        margin, cell = 10 + 9.2 * max(map(len, rows)), 92.0
        header = 24 + 8.6 * max(map(len, engines)) if cell < 9.2 * max(map(len, engines)) else 40
        wide = max(min(width, margin + 150 * len(engines)), margin + cell * len(engines))
        figure = Figure((wide / DOTS, (header + 34 * len(rows) + 8) / DOTS), dpi=DOTS, layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.subplots()
        values = [v for v in cells.values() if v > 0 and math.isfinite(v)]
        low, high = (math.log10(f(values)) if values else 0.0 for f in (min, max))
        for (row, engine), value in cells.items():
            x, y = engines.index(engine), rows.index(row)
            place = 0.0 if value <= 0 or high == low else (math.log10(value) - low) / (high - low)
            shade = colormaps["cividis"](place)
            axes.fill_between([x, x + 1], y, y + 1, color=shade, edgecolor=INK, lw=1)
            ink = "#ffffff" if _luminance(shade) < 0.179 else "#000000"  # where both have the same contrast, 4.6 : 1
            axes.text(x + 0.5, y + 0.5, text.figure(name, value), ha="center", va="center", color=ink)
        axes.set_xlim(0, len(engines))
        axes.set_ylim(len(rows), 0)
        axes.set_xticks(np.arange(len(engines)) + 0.5, engines, rotation=90 if header > 40 else 0)
        axes.set_yticks(np.arange(len(rows)) + 0.5, rows)
        axes.tick_params(length=0, top=False, labeltop=True, labelbottom=False)
        for spine in axes.spines.values():
            spine.set_visible(False)
    return figure


def _figure(width: int, height: int, keys: Iterable[str]) -> tuple[Figure, Axes]:
    """height: without the key. The ground stays clear, so that it may be light or dark."""
    figure = Figure((width / DOTS, (height + _key_height(list(keys), width)) / DOTS), dpi=DOTS, layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.subplots()
    axes.patch.set_alpha(0)
    axes.grid(alpha=0.35)
    return figure, axes


def _look(style: Style) -> dict[str, Any]:
    look = {"color": style.colour, "marker": style.marker, "ls": style.line, "lw": 2.2, "ms": 8}
    return look | {"markeredgecolor": INK, "markeredgewidth": 0.8}


def _key(figure: Figure, axes: Axes) -> None:
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


def _scale(axes: Axes, which: str, values: Sequence[float], written: Any, zero: bool = False) -> None:
    """Logarithmic where the values' ends are far apart, else linear, from 0 if asked."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = min(values), max(values)
    limits = axes.set_xlim if which == "x" else axes.set_ylim
    if low > 0 and high / low > FEW:
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
        axis.set_major_locator(MaxNLocator(4))
    axis.set_major_formatter(FuncFormatter(lambda v, _: text.tick(written(v)) if v else "0"))


def _places(axes: Axes, places: Sequence[float], width: int) -> None:
    """Ticks at the places measured, as far as they have room."""
    if len(places) > 2 and places[0] > 0 and places[-1] / places[0] > FEW:
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


def _luminance(shade: Sequence[float]) -> float:
    """Relative luminance of sRGB as WCAG 2 defines it."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in shade[:3]]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def _names(axes: Axes, works: Sequence[Work]) -> None:
    """A graph's name under its points, or over them where the name on its left is near."""
    last, above = -math.inf, False
    for graph in sorted({w.graph for w in works}, key=lambda g: min(w.intensity for w in works if w.graph == g)):
        of = [w for w in works if w.graph == graph]
        x = math.log10(of[0].intensity)
        above = not above if x - last < 0.5 else False
        rate = (max if above else min)(w.rate for w in of)
        offset, side = ((0, 10), "bottom") if above else ((0, -10), "top")
        axes.annotate(graph, (of[0].intensity, rate), offset, textcoords="offset points", ha="center", va=side)
        last = x
