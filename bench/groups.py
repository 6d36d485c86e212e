"""Rows that belong together, and the charts that they make.

What a chart needs of the rows of a results file; where that is missing there is no chart, only the table:

latency    rows with times whose axes are all the same: a distribution a side
curve      ... whose axes differ in a number (steps, batch, minutes): a line a side. Rows of "growth ..." also get one
           for each of their values
throughput "batch": the axis batch; "server": the axes protocol and concurrency, the value clips_per_s; the value
           median_s, which loads say, or times
waterfall  "waterfall": in order, each side all before it and one technique more
roofline   the values macs and bytes (read and written at least once: weights, inputs, outputs) of the call that was
           timed, and the file's limits (results.Results.least_s)
parity     "parity ...": the axes graph and tensor, or step or steps; the value largest_difference"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from bench import charts, text, timing
from bench.charts import Bar, Point, Work
from bench.drawing import Styles
from bench.page import Chart
from bench.results import Results, Row

CELL_AXES = ("graph", "tensor", "step", "metric", "protocol")  # rows of these stay in one group
TABLES = ("tune",)  # one table, whatever the axes, and no chart: each row's side says how it differs
LOADS = {"batch": ("batch", "the batch"), "server": ("concurrency", "how many clients")}
DIFFERENCE = "largest_difference"


@dataclass(frozen=True)
class Group:
    """Rows of one table. fixed: axes that are the same wherever they are named; varying: names of the others."""

    what: str
    rows: list[Row]

    @property
    def varying(self) -> list[str]:
        named: dict[str, set[int | str]] = {}
        for row in self.rows:
            for name, value in row.axes.items():
                named.setdefault(name, set()).add(value)
        return [name for name, values in named.items() if len(values) > 1]

    @property
    def fixed(self) -> dict[str, int | str]:
        return {n: value for row in self.rows for n, value in row.axes.items() if n not in self.varying}

    @property
    def title(self) -> str:
        return f"{self.what}, {text.setting(self.fixed)}" if self.fixed else self.what

    @property
    def numbers(self) -> list[str]:
        """Axes that vary and hold numbers."""
        return [n for n in self.varying if any(isinstance(row.axes.get(n), int) for row in self.rows)]


def groups(rows: list[Row]) -> list[Group]:
    """By what was measured and by the axes that are text, unless those make one table (`CELL_AXES`, or a mixture with
    numbers: 1, 4, adaptive)."""
    numeric = {(row.what, name) for row in rows for name, value in row.axes.items() if isinstance(value, int)}
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        apart = [
            (name, value)
            for name, value in sorted(row.axes.items())
            if isinstance(value, str) and name not in CELL_AXES and (row.what, name) not in numeric
        ]
        if row.what in TABLES:
            apart = []
        found.setdefault((row.what, *apart), []).append(row)
    return [Group(key[0], of) for key, of in found.items()]


def first_of(group: Group, row: Row) -> Row | None:
    """The row that a row's time is set against: the first side's with the same axes."""
    for other in group.rows:
        if other.timing is not None and all(other.axes.get(n) == row.axes.get(n) for n in group.varying):
            return other
    return None


def group_charts(group: Group, name: str, styles: Styles) -> Iterator[Chart]:
    """The charts of one group. name: what their PNGs' names begin with."""
    if group.what in TABLES:
        return
    timed = [row for row in group.rows if row.timing is not None]
    if group.what == "waterfall":
        yield from _waterfall(group, timed, name)
    elif group.what in LOADS:
        yield from _throughput(group, name, styles)
    elif group.what.startswith("parity"):
        yield from _parity(group, name)
    elif group.numbers:
        yield from _curves(group, name, styles)
    if timed and not group.varying and group.what != "waterfall":  # whose bars say it all
        timings = {row.side: row.timing for row in timed if row.timing is not None}
        order = sorted(timings, key=lambda side: timings[side].median)
        medians = ", ".join(f"{side} {text.seconds(timings[side].median)}" for side in order)
        alt = f"Distribution of the latency of {group.title}; medians: {medians}."
        caption = "Part of the calls that took this long at most: further left is faster, steeper is steadier."
        yield Chart(f"{name}_latency", alt, caption, partial(charts.cdf, timings, styles))


def _named(name: str, kind: str) -> str:
    return name if name.endswith(kind) else f"{name}_{kind}"


def with_gains(rows: list[Row]) -> list[Row]:
    """A waterfall's rows with their gains over those before and the intervals, which older results do not state."""
    out: list[Row] = []
    before: timing.Timing | None = None
    for row in rows:
        if row.timing is not None and before is not None:
            gain = timing.with_ends("gain", timing.ratio_in_run(before, row.timing))
            row = replace(row, values=row.values | gain)
        before = row.timing or before
        out.append(row)
    return out


def _waterfall(group: Group, timed: list[Row], name: str) -> Iterator[Chart]:
    bars: list[Bar] = []
    for row in with_gains(timed):
        assert row.timing is not None
        seconds = row.timing.median
        ends = (seconds, seconds) if row.timing.few else row.timing.interval
        v = row.values
        gain = (v["gain"], v["gain_low"], v["gain_high"]) if bars else None
        bars.append(Bar(row.side, seconds, *ends, gain))
    if len(bars) < 2 or group.varying:
        return
    steps = "; ".join(", ".join(filter(None, (f"{b.name}: {text.seconds(b.seconds)}", b.gained))) for b in bars)
    total = bars[0].seconds / bars[-1].seconds
    alt = f"{group.title}, bars: {steps}. {total:.2f} x in all."
    caption = (
        "Each bar is all before it and one technique more: solid is the time that is left, striped what was saved, "
        f"crossed what was lost. In brackets the gain's interval, {text.UNSURE} where it includes 1. "
        f"{total:.2f} x in all."
    )
    yield Chart(_named(name, "waterfall"), alt, caption, partial(charts.waterfall, bars))


def _throughput(group: Group, name: str, styles: Styles) -> Iterator[Chart]:
    axis, what = LOADS[group.what]
    series: dict[str, list[Point]] = {}
    for row in group.rows:
        load = row.axes.get(axis)
        latency = row.values.get("median_s", row.timing.median if row.timing else math.nan)
        default = load / latency if axis == "batch" and isinstance(load, int) else math.nan
        rate = row.values.get("clips_per_s", default)
        if isinstance(load, int) and latency > 0 and rate > 0:
            key = ", ".join(str(part) for part in (row.side, row.axes.get("protocol")) if part is not None)
            series.setdefault(key, []).append(Point(latency, rate, str(load)))
    for points in series.values():
        points.sort(key=lambda p: int(p.label))
    if any(len(points) > 1 for points in series.values()):
        best = "; ".join(f"{k}: {text.digits(max(p.y for p in points))}" for k, points in series.items())
        alt = f"Throughput over latency of {group.title}. Most clips a second: {best}."
        caption = f"Further up is more, further left is sooner. Figures at the points: {what}."
        yield Chart(f"{name}_throughput", alt, caption, partial(charts.throughput, series, styles))


def _parity(group: Group, name: str) -> Iterator[Chart]:
    cells: dict[tuple[str, str], float] = {}
    for row in group.rows:
        parts = [str(row.axes[a]) for a in ("graph", "tensor") if a in row.axes]
        parts += [f"{a} {row.axes[a]}" for a in ("step", "steps") if a in group.varying and a in row.axes]
        if parts and DIFFERENCE in row.values:
            key = (" · ".join(parts), row.side)
            cells[key] = float(np.maximum(row.values[DIFFERENCE], cells.get(key, 0.0)))  # NaN stays
    if cells:
        worst = list(cells)[np.argmax(list(cells.values()))]  # NaN if there is one
        largest = charts.difference(DIFFERENCE, cells[worst])
        said = f"The largest: {largest}, {', '.join(worst)}."
        alt = f"Largest differences of {group.title}, by tensor and engine. {said}"
        caption = f"Largest differences; darker is smaller. {said}"
        yield Chart(_named(name, "parity"), alt, caption, partial(charts.heat_map, cells, DIFFERENCE))


def _curves(group: Group, name: str, styles: Styles) -> Iterator[Chart]:
    """Over the first axis of numbers; what else varies makes lines of its own."""
    axis = group.numbers[0]
    wanted = ["median_s"] if any(row.timing for row in group.rows) else []
    if group.what.startswith("growth"):
        wanted += list(dict.fromkeys(value for row in group.rows for value in row.values))
    for value in wanted:
        series: dict[str, list[Point]] = {}
        for row in group.rows:
            at = row.axes.get(axis)
            if (point := _point(row, value, at)) is not None:
                others = [f"{n} {row.axes[n]}" for n in group.varying if n != axis and n in row.axes]
                series.setdefault(", ".join([row.side, *others]), []).append(point)
        series = {key: sorted(points, key=lambda p: p.x) for key, points in series.items() if len(points) > 1}
        if not series:
            continue
        label = "latency, median" if value == "median_s" else text.heading(value)
        grown = "; ".join(
            f"{key}: {text.figure(value, p[0].y)} at {axis} {p[0].x:g}, {text.figure(value, p[-1].y)} at {p[-1].x:g}"
            for key, p in series.items()
        )
        alt = f"{label[0].upper()}{label[1:]} over {axis} of {group.what}. {grown}."
        draw = partial(charts.lines, series, styles, (text.heading(axis), label), value)
        yield Chart(f"{_named(name, axis)}_{value}", alt, f"{grown}.", draw)


def _point(row: Row, value: str, at: int | str | None) -> Point | None:
    if not isinstance(at, int):
        return None
    if value == "median_s" and row.timing is not None:
        low, high = row.timing.interval
        return Point(at, row.timing.median) if row.timing.few else Point(at, row.timing.median, low=low, high=high)
    y = row.values.get(value, math.nan)
    return Point(at, y) if math.isfinite(y) else None


@dataclass(frozen=True)
class Reached:
    """A graph beside the limit that binds it. seconds: that the limit allows at best, and that it took."""

    work: Work
    best_s: float
    took_s: float
    bound: str  # matrix products, copies


def reached(found: Results) -> list[Reached]:
    """Of all rows that say what they compute and move; empty without limits."""
    out = []
    for row in found.rows:
        least = found.least_s(row)
        if row.timing is None or least is None or "copies" not in least:
            continue
        took = row.timing.median
        flops = 2 * row.values["macs"]
        name = f"{row.what}, batch {row.axes['batch']}" if row.axes.get("batch", 1) != 1 else row.what
        work = Work(name, row.side, flops / row.values["bytes"], flops / took)
        bound = max(least, key=least.__getitem__)
        out.append(Reached(work, least[bound], took, bound))
    return out


def roofline(found: Results, name: str, styles: Styles) -> Chart | None:
    works = reached(found)
    if not works:
        return None
    shares = "; ".join(f"{r.work.graph}, {r.work.side}: {100 * r.best_s / r.took_s:.0f} % of the limit" for r in works)
    draw = partial(charts.roofline, [r.work for r in works], found.limits, styles)
    caption = "Lines are what the machine does at best, points what the graphs reach: the nearer, the better."
    return Chart(f"{name}_roofline", f"Roofline of the graphs. {shares}.", caption, draw)
