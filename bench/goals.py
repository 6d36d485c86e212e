"""What the results should show, and whether they do."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import numpy as np

from bench.results import Results, Row
from bench.timing import UNKNOWN, Timing, interval, ratio, ratio_in_run
from mubic_deploy.engines import cpu

DEFAULT = cpu.ENGINES[0]
GPU = "gpu_full_*"  # a file a device
# sides of bench/gpu.py: who is to be fast, and against whom. The last of OURS is no engine of the package's: it shows
# what the model gives in PyTorch with the rewrites that pay there.
OURS = ("AOTInductor", "TensorRT", "ONNX Runtime CUDA", "PyTorch FP16, optimised")
FOR_BATCHES = "TensorRT for batches"  # kernels for the largest: counts where clips a second do
EAGER, EAGER_FP16 = ("eager FP32",), ("eager FP16, positions folded", "eager FP16, torchvision's attention")
MAX_AUTOTUNE = ("torch.compile max-autotune FP16", "torch.compile max-autotune FP16, limited search")

YES, NO, UNDECIDED, NOT_MEASURED = "yes", "no", "undecided", "not measured"


@dataclass(frozen=True)
class Figure:
    """interval: 95 %, where it has one; settled: False if it is of times whose warm-up still changed; of: which side's
    it is, where the goal leaves that open."""

    measured: float
    interval: tuple[float, float] | None = None
    settled: bool = True
    of: str = ""


@dataclass(frozen=True)
class Goal:
    """A figure of one results file. file: its name without .json, with * for any device; figure: KeyError where the
    results lack what it is made of; least, most: the bounds that it should keep, one or both; unit: that follows the
    figure"""

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
        """UNDECIDED where the interval reaches over a bound or too few rounds tell none, or the times never settled.
        NaN reaches nothing."""
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


Over = Callable[[Results], Sequence[Row]]  # rows that a figure is a ratio to


def value(what: str, side: str, name: str, over: Over = lambda _: (), **axes: int | str) -> Callable[[Results], Figure]:
    """A row's value, and its interval where NAME_low and NAME_high are beside it; UNKNOWN of too few rounds. It settled
    if the row did, and all that it is a ratio to."""

    def of(results: Results) -> Figure:
        row = results.row(what, side, **axes)
        values = row.values
        settled = all(r.timing is None or r.timing.settled for r in (row, *over(results)))
        if row.timing is not None and row.timing.few:
            return Figure(values[name], UNKNOWN, settled)
        ends = [values[end] for end in (f"{name}_low", f"{name}_high") if end in values]
        return Figure(values[name], (ends[0], ends[1]) if ends else None, settled)

    return of


def best_batch(results: Results) -> Sequence[Row]:
    """That in process with the most clips a second."""
    rows = [row for row in results.rows if (row.what, row.side) == ("batch", "in process")]
    return sorted(rows, key=lambda row: row.values["clips_per_s"])[-1:]


def rows_of(*whats: str, side: str) -> Over:
    return lambda results: [row for row in results.rows if row.what in whats and row.side == side]


def share_of_limit(side: str) -> Callable[[Results], Figure]:
    """Of the whole inference, with the interval of its time."""

    def of(results: Results) -> Figure:
        row = results.row("whole", side)
        timing, share = _timing(row), row.values["share_of_limit"]
        return Figure(share, _per(share * timing.median, timing), timing.settled)

    return of


def extreme(pick: Callable[[list[float]], float], what: str, name: str) -> Callable[[Results], Figure]:
    """The least or the most of a value among all rows of a group that have it, and of the ends of its interval. pick:
    NumPy's, which keep a NaN."""

    def of(results: Results) -> Figure:
        found = [row.values for row in results.rows if row.what == what and name in row.values]
        if not found:
            raise KeyError(name)
        picked, low, high = (
            float(pick([values.get(f"{name}{end}", values[name]) for values in found])) for end in ("", "_low", "_high")
        )
        return Figure(picked, (low, high) if any(f"{name}_low" in values for values in found) else None)

    return of


def _per(amount: float, timing: Timing) -> tuple[float, float]:
    """The interval of an amount over a time's median."""
    low, high = timing.interval
    return amount / high, amount / low if low > 0 else math.inf


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


def _fastest(results: Results, sides: Sequence[str], every: bool = False) -> tuple[str, Timing]:
    """Of the whole inference. every: only if all of them were measured."""
    timings = {
        row.side: row.timing
        for row in results.rows
        if row.what == "whole" and row.side in sides and row.timing is not None
    }
    if not timings or (every and len(timings) < len(sides)):
        raise KeyError(f"times of {', '.join(sides)}")
    side = min(timings, key=lambda name: timings[name].median)
    return side, timings[side]


def _latency_ms(results: Results) -> Figure:
    side, timing = _fastest(results, OURS)
    low, high = timing.interval
    return Figure(1000 * timing.median, (1000 * low, 1000 * high), timing.settled, side)


def _tail(results: Results) -> Figure:
    """p99 over the median, its interval from the ends of both."""
    side, timing = _fastest(results, OURS)
    (low, high), (least, most) = timing.percentile_interval(99), timing.interval
    ends = (low / most, high / least if least > 0 else math.inf)
    return Figure(timing.percentile(99) / timing.median, ends, timing.settled, side)


def _times_as_fast(baselines: Sequence[str], every: bool = False) -> Callable[[Results], Figure]:
    """Our fastest against the fastest of others."""

    def of(results: Results) -> Figure:
        (side, ours), (baseline, theirs) = _fastest(results, OURS), _fastest(results, baselines, every)
        measured, low, high = ratio(theirs, ours)  # they need not have run in turn
        return Figure(measured, (low, high), ours.settled and theirs.settled, f"{side} against {baseline}")

    return of


def _throughput(results: Results) -> Figure:
    """Clips a second at the best batch of the best engine, as a user gets them."""
    rows = [row for row in results.rows if row.what == "batch" and row.side in (*OURS, FOR_BATCHES)]
    if not rows:
        raise KeyError("batch")
    best = max(rows, key=lambda row: row.values["clips_per_s"])
    batch, timing = int(best.axes["batch"]), _timing(best)
    rate = batch / timing.median
    return Figure(rate, _per(batch, timing), timing.settled, f"{best.side}, batch {batch}")


def _step_ms(results: Results) -> Figure:
    """What a step more costs the engine whose steps cost least: a fourth of 8 steps minus 4."""
    found = []
    for row in results.rows:
        if row.what == "steps" and row.side in OURS and row.axes["steps"] == 8:
            eight, four = _timing(row), _timing(results.row("steps", row.side, steps=4))
            low, high = interval((eight.resampled(0) - four.resampled(1)) / 4)
            each = 1000 * (eight.median - four.median) / 4
            found.append(Figure(each, (1000 * low, 1000 * high), eight.settled and four.settled, row.side))
    if not found:
        raise KeyError("steps")
    return min(found, key=lambda figure: figure.measured)


def _worst_map(pick: Callable[[list[float]], int], name: str) -> Callable[[Results], Figure]:
    """Of all of ours. pick: NumPy's, which find a NaN."""

    def of(results: Results) -> Figure:
        rows = [row for row in results.rows if row.what == "parity" and row.side in OURS]
        if not rows:
            raise KeyError(name)
        worst = rows[pick([row.values[name] for row in rows])]
        return Figure(worst.values[name], of=worst.side)

    return of


def _on_gpu() -> list[Goal]:
    """Of one H100 or H200 (docs/benchmarks.md)."""
    one = "one clip, best engine"
    return [
        Goal(f"{one}, median", GPU, _latency_ms, most=4, unit="ms"),
        Goal(f"{one}, p99 over median", GPU, _tail, most=1.2),
        Goal(f"{one}, against eager FP32", GPU, _times_as_fast(EAGER), least=10),
        Goal(f"{one}, against the faster eager FP16", GPU, _times_as_fast(EAGER_FP16, every=True), least=4),
        Goal(f"{one}, against torch.compile max-autotune FP16", GPU, _times_as_fast(MAX_AUTOTUNE), least=1.2),
        Goal("best batch", GPU, _throughput, least=600, unit="clips/s"),
        Goal("a step more", GPU, _step_ms, most=0.35, unit="ms"),
        Goal("lowest CC of a map with eager FP32's", GPU, _worst_map(np.argmin, "cc"), least=0.999, unit=""),
        Goal(
            "largest difference of a map from eager FP32's",
            GPU,
            _worst_map(np.argmax, "largest_difference"),
            most=0.02,
            unit="",
        ),
    ]


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
        value("server", "our clients", "over_in_process", best_batch, protocol="grpc", concurrency=4),
        least=1,
    ),
    *(
        Goal(
            f"full, {engine}, loop of 8 steps minus 4 over four denoiser calls by themselves",
            "steps_full",
            value("8 steps over 4", engine, "loop_over_lone_calls", rows_of("loop", "denoiser alone", side=engine)),
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
    *_on_gpu(),
)


def outcomes(found: Mapping[str, Results], absent: bool = False) -> list[Outcome]:
    """Of all goals whose results file is among those found, by its name with .json; quick looks do not count. Where
    there may be one a device, the goal's name says of which it is. absent: those too that have no file, as not
    measured."""
    out = []
    for goal in GOALS:
        files = [n for n, r in found.items() if fnmatchcase(n, f"{goal.file}.json") and not r.settings.get("quick")]
        of_device = goal.file.endswith("*")
        if absent and not files:
            out.append(Outcome(replace(goal, name=f"GPU: {goal.name}") if of_device else goal, None))
        for name in files:
            device = name.removeprefix(goal.file.rstrip("*")).removesuffix(".json").replace("_", " ")
            named = replace(goal, name=f"{device}: {goal.name}") if of_device else goal
            try:
                out.append(Outcome(named, goal.figure(found[name])))
            except KeyError:
                out.append(Outcome(named, None))
    return out
