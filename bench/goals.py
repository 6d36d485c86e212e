"""What the results should show, and whether they do."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bench.results import Results, Row
from mubic_deploy.engines import cpu

DEFAULT = cpu.ENGINES[0]


@dataclass(frozen=True)
class Goal:
    """A figure of one results file. file: its name without .json; least, most: the bounds that it should keep, one or
    both; unit: that follows the figure"""

    name: str
    file: str
    figure: Callable[[Results], float]
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
    """measured: NaN where the results lack what the figure is made of."""

    goal: Goal
    measured: float

    @property
    def reached(self) -> bool | None:
        """None if it was not measured."""
        if math.isnan(self.measured):
            return None
        return self.goal.least <= self.measured <= self.goal.most


def faster(side: str, than: str, what: str = "whole") -> Callable[[Results], float]:
    """How many times faster a side is, by medians."""
    return lambda results: _median(results.row(what, than)) / _median(results.row(what, side))


def value(what: str, side: str, name: str, **axes: int | str) -> Callable[[Results], float]:
    return lambda results: results.row(what, side, **axes).values[name]


def extreme(pick: Callable[..., float], what: str, name: str) -> Callable[[Results], float]:
    """The least or the most of a value among all rows of a group that have it."""

    def of(results: Results) -> float:
        found = [row.values[name] for row in results.rows if row.what == what and name in row.values]
        return pick(found, default=math.nan)

    return of


def _median(row: Row) -> float:
    return row.timing.median if row.timing is not None else math.nan


def _memory(results: Results) -> float:
    """Peak memory of the longest film over that of the shortest."""
    rows = sorted((row for row in results.rows if row.what == "growth over film"), key=lambda row: row.axes["minutes"])
    return rows[-1].values["peak_bytes"] / rows[0].values["peak_bytes"] if len(rows) > 1 else math.nan


def _speed(engine: str) -> list[Goal]:
    against = {"eager, each step": 5, "eager, torchvision": 1.4, "torch.compile": 1.1}
    named = {"eager, each step": "eager with the encoders at each step", "eager, torchvision": "eager, encoders once"}
    goals = [
        Goal(f"full, {engine} against {named.get(side, side)}", "engines_full", faster(engine, side), least=least)
        for side, least in against.items()
    ]
    share = value("whole", engine, "share_of_limit")
    return [*goals, Goal(f"full, {engine}, share of the rate of matrix products", "engines_full", share, 0.55, unit="")]


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
    Goal("full, latency through Triton", "server_full", value("whole", "grpc", "over_in_process"), most=1.03),
    Goal("demo, latency through Triton", "server_demo", value("whole", "grpc", "over_in_process"), most=1.1),
    Goal(
        "demo, 4 clients against the best batch in process",
        "server_demo",
        value("server", "our clients", "over_in_process", protocol="grpc", concurrency=4),
        least=1,
    ),
    *(
        Goal(
            f"full, {engine}, loop of 8 steps minus 4 over four denoiser calls",
            "steps_full",
            value("8 steps over 4", engine, "loop_over_calls"),
            0.95,
            1.05,
        )
        for engine in cpu.ENGINES
    ),
    *(
        Goal(f"{size}, lowest CC of a map", f"parity_{size}", extreme(min, "parity of maps", "cc"), 0.9999, unit="")
        for size in ("full", "demo")
    ),
    Goal(
        "demo, largest difference of a metric",
        "parity_demo",
        extreme(max, "metrics", "largest_difference"),
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
    Goal("live streams, growth of memory", "streams_soak", extreme(max, "soak", "growth"), most=0.02, unit=""),
    Goal("live streams, windows lost", "streams_soak", extreme(max, "soak", "lost"), most=0, unit=""),
    Goal(
        "live stream, sound off its frame",
        "streams_align",
        extreme(max, "alignment", "offset_frames"),
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
            out.append(Outcome(goal, math.nan))
    return out
