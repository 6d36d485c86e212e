"""The report's charts. Each function makes a figure `width` CSS pixels wide whose text is 16 px, so that it can be
drawn anew for a phone instead of being scaled down.

What is what must be clear in black and white too: every series has a marker and a line style of its own, bars have
hatches, and names and figures stand beside what they belong to."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from bench import text
from bench.drawing import (
    COLOURS,
    DOTS,
    FEW,
    HALO,
    INK,
    LINES,
    NARROW,
    RC,
    Styles,
    Ticks,
    add_key,
    look_of,
    luminance,
    new_figure,
    place_ticks,
    scale,
)
from bench.timing import Timing

MARKED = (0.05, 0.25, 0.5, 0.75, 0.95)  # where a distribution's line carries its marker


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
    """A step of a waterfall: seconds with its interval, and how many times faster than the step before with its own,
    if known."""

    name: str
    seconds: float
    low: float
    high: float
    gain: tuple[float, float, float] | None = None

    @property
    def gained(self) -> str:
        """2.00 x (1.90 to 2.10)."""
        return text.gain(*self.gain) if self.gain else ""


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
        unbroken = {name: text.seconds(timing.median).replace(" ", "\N{NO-BREAK SPACE}") for name, timing in ordered}
        keys = {name: f"{name}, {median}" for name, median in unbroken.items()}
        figure, axes = new_figure(width, 300, keys.values())
        for name, timing in ordered:
            times = np.sort(timing.samples)
            # each sample is a step of 1 / n; thinned, or a page of 10 000 calls would be as many path nodes
            shown = np.unique(np.linspace(0, len(times) - 1, min(len(times), 200)).astype(int))
            places = [int(np.argmin(np.abs((shown + 1) / len(times) - q))) for q in MARKED]
            look = look_of(styles[name]) | {"markevery": sorted(set(places)), "drawstyle": "steps-post"}
            axes.plot(times[shown], 100 * (shown + 1) / len(times), label=keys[name], **look)
        ends = [t for timing in timings.values() for t in (min(timing.samples), max(timing.samples))]
        scale(axes, "x", ends, text.seconds)
        axes.set_ylim(0, 104)
        axes.set_yticks([0, 25, 50, 75, 100])
        axes.yaxis.set_major_formatter("{x:g} %")
        add_key(figure, axes)
    return figure


def lines(
    series: Mapping[str, Sequence[Point]], styles: Styles, labels: tuple[str, str], name: str, width: int
) -> Figure:
    """Curves over a number: a line a series, y as the value `name` is written. labels: of x and y."""
    with rc_context(RC):
        figure, axes = new_figure(width, 300, series)
        for key, points in series.items():
            x, y = [p.x for p in points], [p.y for p in points]
            bars = [(p.y if p.low is None else p.low, p.y if p.high is None else p.high) for p in points]
            error = [[max(0, v - low), max(0, high - v)] for v, (low, high) in zip(y, bars, strict=True)]
            axes.errorbar(x, y, yerr=np.transpose(error), capsize=4, elinewidth=1.2, label=key, **look_of(styles[key]))
        places = sorted({p.x for points in series.values() for p in points})
        far = place_ticks(axes, places, width)
        values = [p.y for points in series.values() for p in points]
        # both logarithmic or neither: what grows in proportion is a straight line
        scale(axes, "y", values, lambda v, _: text.figure(name, v), zero=True, few=FEW if far else math.inf)
        axes.set_xlabel(labels[0])
        axes.set_title(labels[1], loc="left")
        add_key(figure, axes)
    return figure


def throughput(series: Mapping[str, Sequence[Point]], styles: Styles, width: int) -> Figure:
    """Clips a second over the latency in seconds; each point has its label beside it where there is room."""
    with rc_context(RC):
        figure, axes = new_figure(width, 340, series)
        for key, points in series.items():
            axes.plot([p.x for p in points], [p.y for p in points], label=key, **look_of(styles[key]))
        scale(axes, "x", [p.x for points in series.values() for p in points], text.seconds)
        rates = [p.y for points in series.values() for p in points]
        from_zero = min(rates) < max(rates) / 2  # else lines that lie close could not be told apart
        scale(axes, "y", rates, text.digits, zero=from_zero)
        low, high = axes.get_ylim()
        axes.set_ylim(low, high * 1.1 if axes.get_yscale() == "log" else high + 0.08 * (high - low))
        axes.set_xlabel("latency, median")
        axes.set_title("clips a second" + ("" if from_zero else ", not from 0"), loc="left")
        add_key(figure, axes)
        figure.draw_without_rendering()  # lays out, so that places are known in pixels
        taken: list[Any] = []
        # from above, for a label stands over its point; points that lie close are of the same load
        for point in sorted((p for points in series.values() for p in points), key=lambda p: -p.y):
            place = axes.transData.transform((point.x, point.y))
            if all(abs(place[0] - x) > 24 or abs(place[1] - y) > 26 for x, y in taken):
                taken.append(place)
                axes.annotate(point.label, (point.x, point.y), (0, 8), textcoords="offset points", ha="center", **HALO)
    return figure


def waterfall(bars: Sequence[Bar], width: int) -> Figure:
    """A bar a technique: solid what is left of the time, striped what this one saved, crossed what it cost."""
    with rc_context(RC):
        names = [textwrap.wrap(f"{i + 1}. {bar.name}", int((width - 40) / 9)) for i, bar in enumerate(bars)]
        above = [20 * len(lines) for lines in names]
        below = [86 if bar.gain else 66 for bar in bars]
        tops = np.cumsum([0, *np.add(above, below)])  # px from above, of each name
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
            axes.text(0, y - 14, "\n".join(names[i]), va="bottom", linespacing=1.1)
            axes.text(0, y + 14, text.seconds(bar.seconds), va="top", weight="bold")
            axes.text(0, y + 34, bar.gained, va="top")
        axes.set_ylim(tops[-1], -4)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_xlim(0, 1.04 * max(max(b.seconds, b.high) for b in bars))
        axes.xaxis.set_major_locator(MaxNLocator(4 if width <= NARROW else 8, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(Ticks(text.seconds))
    return figure


def roofline(works: Sequence[Work], limits: Mapping[str, float], styles: Styles, width: int) -> Figure:
    """What the graphs reach beside what the machine does at best: matrix products (flat) and copies (slanted), both
    axes logarithmic. limits: as `Results.limits`."""
    with rc_context(RC):
        sides = list(dict.fromkeys(w.side for w in works))
        copy, tops = limits["copy"], {k: v for k, v in limits.items() if k.startswith("gemm_")}
        kinds = [f"matrix products, {k.removeprefix('gemm_')}: {text.scaled(top, 'FLOP/s')}" for k, top in tops.items()]
        figure, axes = new_figure(width, 400, sides + kinds)
        ridges = [top / copy for top in tops.values()]
        left = min([w.intensity for w in works] + ridges) / 3
        right = max([w.intensity for w in works] + ridges) * 3
        for kind, top, line in zip(kinds, tops.values(), LINES, strict=False):
            axes.plot([left, top / copy, right], [left * copy, top, top], color=INK, lw=2, ls=line, label=kind)
        for side in sides:
            of = [w for w in works if w.side == side]
            look = replace(styles[side], line="none")
            axes.plot([w.intensity for w in of], [w.rate for w in of], label=side, **look_of(look))
        bottom = min([w.rate for w in works] + [left * copy])
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(left, right)
        axes.set_ylim(bottom / 4, max(tops.values()) * 3)
        axes.xaxis.set_major_formatter(Ticks(text.digits))
        axes.yaxis.set_major_formatter(Ticks(lambda v, _: text.scaled(v, "")))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_minor_locator(NullLocator())
        axes.set_title("FLOP/s", loc="left")
        axes.set_xlabel("FLOP a byte")
        copied = f"slanted: copies at {text.scaled(copy, 'B/s')}"
        axes.annotate(copied, (0.02, 0.98), xycoords="axes fraction", va="top")
        add_key(figure, axes)
        figure.draw_without_rendering()  # lays out, so that places are known in pixels
        _names(axes, works)
    return figure


def heat_map(cells: Mapping[tuple[str, str], float], name: str, width: int) -> Figure:
    """Differences as shades, dark for small, white for NaN: keys are (row, engine). Wider than
    `width` if the engines need it."""
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
            shade = colormaps["cividis"](place) if math.isfinite(value) else (1.0, 1.0, 1.0, 1.0)
            axes.fill_between([x, x + 1], y, y + 1, color=shade, edgecolor=INK, lw=1)
            ink = "#ffffff" if luminance(shade) < 0.179 else "#000000"  # where both have the same contrast, 4.6 : 1
            axes.text(x + 0.5, y + 0.5, difference(name, value), ha="center", va="center", color=ink)
        axes.set_xlim(0, len(engines))
        axes.set_ylim(len(rows), 0)
        axes.set_xticks(np.arange(len(engines)) + 0.5, engines, rotation=90 if header > 40 else 0)
        axes.set_yticks(np.arange(len(rows)) + 0.5, rows)
        axes.tick_params(length=0, top=False, labeltop=True, labelbottom=False)
        for spine in axes.spines.values():
            spine.set_visible(False)
    return figure


def difference(name: str, value: float) -> str:
    """A difference as the heat map says it: unlike in a table, NaN is one."""
    return text.figure(name, value) if math.isfinite(value) else "NaN"


def _names(axes: Axes, works: Sequence[Work]) -> None:
    """A graph's name under its points, or where that would cover something, over them, or further away."""
    box = axes.get_window_extent()
    points = {w: axes.transData.transform((w.intensity, w.rate)) for w in works}
    taken = [(x - 8, x + 8, y - 8, y + 8) for x, y in points.values()]
    for graph in dict.fromkeys(w.graph for w in works):
        of = [points[w] for w in works if w.graph == graph]
        half, x = 4.7 * len(graph), of[0][0]
        x = min(max(x, box.x0 + half + 4), box.x1 - half)
        low, high = min(y for _, y in of), max(y for _, y in of)
        places = [y for away in (20, 40, 60) for y in (low - away, high + away)]
        free = [y for y in places if not any(_meet((x - half, x + half, y - 9, y + 9), other) for other in taken)]
        y = (free or places)[0]
        taken.append((x - half, x + half, y - 9, y + 9))
        place = tuple(axes.transAxes.inverted().transform((x, y)))
        axes.annotate(graph, place, xycoords="axes fraction", ha="center", va="center", **HALO)


def _meet(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    """Whether two boxes (left, right, bottom, top) have something in common."""
    return a[0] < b[1] and b[0] < a[1] and a[2] < b[3] and b[2] < a[3]
