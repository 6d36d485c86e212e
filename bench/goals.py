"""What the results should show, and whether they do."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from bench.results import Results, Row
from bench.timing import Timing, ratio_in_run
from mubic_deploy.engines import cpu

DEFAULT = cpu.ENGINES[0]


YES, NO, UNDECIDED, NOT_MEASURED = "yes", "no", "undecided", "not measured"


@dataclass(frozen=True)
class Figure:
    """interval: 95 %, where it has one; settled: False if it is of times whose warm-up still changed."""

    measured: float
    interval: tuple[float, float] | None = None
    settled: bool = True


@dataclass(frozen=True)
class Goal:
    """A figure of one results file. file: its name without .json; figure: KeyError where the results lack what it is
    made of; least, most: the bounds that it should keep, one or both; unit: that follows the figure"""

    name: str
    file: str
    figure: Callable[[Results], Figure]
    least: float = -math.inf
    most: float = math.inf
    unit: str = "x"

    @property
    def bounds(self) -> str:
        at_least, at_most = f"{self.least:g} {self.unit}".rstrip(), f"{self.most:g} {self.unit}".rstrip()
        if math.isinf(self.most):
            return f"at least {at_least}"
        return f"at most {at_most}" if math.isinf(self.least) else f"{self.least:g} to {at_most}"


@dataclass(frozen=True)
class Outcome:
    """figure: None where the results lack what it is made of."""

    goal: Goal
    figure: Figure | None

    @property
    def reached(self) -> str:
        """UNDECIDED where the interval reaches over a bound, or the times never settled. NaN reaches nothing."""
        if self.figure is None:
            return NOT_MEASURED
        if not math.isfinite(self.figure.measured):
            return NO
        low, high = self.figure.interval or (self.figure.measured,) * 2
        if self.figure.settled and (high < self.goal.least or low > self.goal.most):
            return NO
        return YES if self.figure.settled and self.goal.least <= low and high <= self.goal.most else UNDECIDED


def faster(side: str, than: str, what: str = "whole") -> Callable[[Results], Figure]:
    """How many times faster a side is (see `ratio_in_run`)."""

    def of(results: Results) -> Figure:
        a, b = (_timing(results.row(what, name)) for name in (than, side))
        measured, low, high = ratio_in_run(a, b)
        return Figure(measured, (low, high), a.settled and b.settled)

    return of


def value(what: str, side: str, name: str, **axes: int | str) -> Callable[[Results], Figure]:
    """A row's value, and its interval where NAME_low and NAME_high are beside it."""

    def of(results: Results) -> Figure:
        values = results.row(what, side, **axes).values
        ends = [values[end] for end in (f"{name}_low", f"{name}_high") if end in values]
        return Figure(values[name], (ends[0], ends[1]) if ends else None)

    return of


def share_of_limit(side: str) -> Callable[[Results], Figure]:
    """Of the whole inference, with the interval of its time."""

    def of(results: Results) -> Figure:
        row = results.row("whole", side)
        timing, share = _timing(row), row.values["share_of_limit"]
        low, high = timing.interval
        return Figure(share, (share * timing.median / high, share * timing.median / low), timing.settled)

    return of


def extreme(pick: Callable[[list[float]], float], what: str, name: str) -> Callable[[Results], Figure]:
    """The least or the most of a value among all rows of a group that have it. pick: NumPy's, which keep a NaN."""

    def of(results: Results) -> Figure:
        found = [row.values[name] for row in results.rows if row.what == what and name in row.values]
        if not found:
            raise KeyError(name)
        return Figure(float(pick(found)))

    return of


def _timing(row: Row) -> Timing:
    if row.timing is None:
        raise KeyError(f"times of {row.what}, {row.side}")
    return row.timing


def _memory(results: Results) -> Figure:
    """Peak memory of the longest film over that of the shortest."""
    rows = sorted((row for row in results.rows if row.what == "growth over film"), key=lambda row: row.axes["minutes"])
    if len(rows) < 2:
        raise KeyError("films of two lengths")
    return Figure(rows[-1].values["peak_bytes"] / rows[0].values["peak_bytes"])


def _speed(engine: str) -> list[Goal]:
    against = {"eager, each step": 5, "eager, torchvision": 1.4, "torch.compile": 1.1}
    named = {"eager, each step": "eager with the encoders at each step", "eager, torchvision": "eager, encoders once"}
    goals = [
        Goal(f"full, {engine} against {named.get(side, side)}", "engines_full", faster(engine, side), least=least)
        for side, least in against.items()
    ]
    name = f"full, {engine}, share of the rate of matrix products"
    return [*goals, Goal(name, "engines_full", share_of_limit(engine), 0.55, unit="")]


GOALS = (
    *_speed(DEFAULT),
    *_speed("onnxruntime"),
    Goal("full, onnxruntime against OpenVINO", "engines_full", faster("onnxruntime", "openvino"), least=1),
    Goal(
        "full, visual encoder, onnxruntime against eager",
        "engines_full",
        faster("onnxruntime", "eager, torchvision", "visual_encoder"),
        least=1 / 0.8,
    ),
    Goal("full, latency through Triton", "server_full", faster("in process", "grpc"), most=1.03),
    Goal("demo, latency through Triton", "server_demo", faster("in process", "grpc"), most=1.1),
    Goal(
        "demo, 4 clients against the best batch in process",
        "server_demo",
        value("server", "our clients", "over_in_process", protocol="grpc", concurrency=4),
        least=1,
    ),
    *(
        Goal(
            f"full, {engine}, loop of 8 steps minus 4 over four denoiser calls by themselves",
            "steps_full",
            value("8 steps over 4", engine, "loop_over_lone_calls"),
            0.95,
            1.05,
        )
        for engine in cpu.ENGINES
    ),
    *(
        Goal(f"{size}, lowest CC of a map", f"parity_{size}", extreme(np.min, "parity of maps", "cc"), 0.9999, unit="")
        for size in ("full", "demo")
    ),
    Goal(
        "demo, largest difference of a metric",
        "parity_demo",
        extreme(np.max, "metrics", "largest_difference"),
        most=5e-4,
        unit="",
    ),
    Goal("demo, memory of predict, 10 minutes over 1", "growth_demo", _memory, most=1.05),
    Goal("live stream, bytes a map, tensors", "streams_bytes", value("wire", "raw", "gain"), least=14, unit="x fewer"),
    Goal("live stream, bytes a map, JPEG", "streams_bytes", value("wire", "jpeg", "gain"), least=100, unit="x fewer"),
    Goal(
        "live stream, work besides the engines",
        "streams_work",
        value("work", "mubic_stream", "share_besides_engines"),
        most=0.1,
        unit="",
    ),
    Goal("live streams, growth of memory", "streams_soak", extreme(np.max, "soak", "growth"), most=0.02, unit=""),
    Goal("live streams, windows lost", "streams_soak", extreme(np.max, "soak", "lost"), most=0, unit=""),
    Goal(
        "live stream, sound off its frame",
        "streams_align",
        extreme(np.max, "alignment", "offset_frames"),
        most=0.5,
        unit="frames",
    ),
)


def outcomes(found: Mapping[str, Results]) -> list[Outcome]:
    """Of all goals whose results file is among those found, by its name with .json; quick looks do not count."""
    out = []
    for goal in GOALS:
        results = found.get(f"{goal.file}.json")
        if results is None or results.settings.get("quick"):
            continue
        try:
            out.append(Outcome(goal, goal.figure(results)))
        except KeyError:
            out.append(Outcome(goal, None))
    return out
