"""Timing that can be compared: every side in one process, calls interleaved in a random order, medians with their
confidence."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Side = Callable[[int], Any]  # called with 0, 1, 2 ..., so that it can take its inputs in turn
Clock = Callable[[Callable[[], Any]], float]  # seconds of one call

CONFIDENCE = 0.95
RESAMPLES = 2000
WIDE = 0.05  # half of a confidence interval over its median, from which on a result is marked
STABLE = 0.05  # by how much two medians of WINDOW warm-up calls may differ
WINDOW = 3
AT_LEAST = 5  # calls of a side, however slow it is


@dataclass(frozen=True)
class Rule:
    """When a side was timed often enough: after `repeats` calls or `seconds`, whichever comes first; short calls go on
    for `short_s` all the same. warm_up_s: the longest that a side may take to settle; quick:
    a look, for which suites try less."""

    repeats: int = 30
    seconds: float = 20.0
    short_s: float = 1.0
    warm_up_s: float = 10.0
    quick: bool = False

    def calls(self, call_s: float) -> int:
        """Calls of a side that takes `call_s` each."""
        enough = min(self.repeats, math.ceil(self.seconds / call_s))
        return max(AT_LEAST, enough, math.ceil(self.short_s / call_s))


QUICK = Rule(repeats=5, seconds=3.0, short_s=0.2, warm_up_s=2.0, quick=True)


@dataclass(frozen=True)
class Timing:
    """Seconds of each call, in the order they were made, and the warm-up calls before them.

    settled: whether the warm-up calls had stopped changing"""

    samples: tuple[float, ...]
    warm_ups: int = 0
    settled: bool = True

    @property
    def median(self) -> float:
        return float(np.median(self.samples))

    def percentile(self, q: float) -> float:
        return float(np.percentile(self.samples, q))

    @property
    def interval(self) -> tuple[float, float]:
        """Bootstrap confidence interval of the median (percentile method, fixed seed)."""
        low, high = np.percentile(resampled_medians(self.samples), _tails())
        return float(low), float(high)

    @property
    def wide(self) -> bool:
        """Whether the interval is too wide, or the warm-up too short, to trust the median."""
        low, high = self.interval
        return not self.settled or (high - low) / 2 > WIDE * self.median

    def summary(self) -> dict[str, Any]:
        """As it goes into results: all in seconds."""
        low, high = self.interval
        return {
            "calls": len(self.samples),
            "warm_ups": self.warm_ups,
            "settled": self.settled,
            "median": self.median,
            "low": low,
            "high": high,
            **{f"p{q}": self.percentile(q) for q in (90, 95, 99)},
            "min": min(self.samples),
            "max": max(self.samples),
            "wide": self.wide,
        }


def resampled_medians(samples: Sequence[float], seed: int = 0) -> np.ndarray:
    """Medians of RESAMPLES samples drawn from `samples` with replacement."""
    values = np.asarray(samples)
    drawn = np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))
    return np.median(values[drawn], axis=1)


def ratio(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """Median of `a` over median of `b`, and its bootstrap confidence interval."""
    low, high = np.percentile(resampled_medians(a, 0) / resampled_medians(b, 1), _tails())
    return float(np.median(a) / np.median(b)), float(low), float(high)


def paired_ratio(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """Median of a[i] over b[i], each pair measured together, and its bootstrap confidence interval: what changed from
    pair to pair, as a machine that is slow for a minute, is not in it."""
    ratios = [float(x / y) for x, y in zip(a, b, strict=True)]
    low, high = np.percentile(resampled_medians(ratios), _tails())
    return float(np.median(ratios)), float(low), float(high)


def _tails() -> list[float]:
    return [50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)]


def wall(call: Callable[[], Any]) -> float:
    """By the host's clock: for calls that return when their result is there."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def cuda_events(call: Callable[[], Any]) -> float:
    """By events on PyTorch's current stream: for calls that only enqueue."""
    import torch

    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    began.record()
    call()
    ended.record()
    torch.cuda.synchronize()
    return began.elapsed_time(ended) / 1000


def measure(
    sides: Mapping[str, Side],
    rule: Rule = Rule(),
    clock: Clock = wall,
    progress: Callable[[str, int, int], None] = lambda *_: None,
    seed: int = 0,
) -> dict[str, Timing]:
    """Times every side. Each is first called until it settles; then the calls of all of them follow in one random
    order, each side's spread evenly over the whole time, so that what the machine does meanwhile meets all alike.

    `progress` hears a side's name, and how many calls of how many are done."""
    counts = dict.fromkeys(sides, 0)

    def timed(name: str) -> float:
        index = counts[name]
        counts[name] += 1
        return clock(lambda: sides[name](index))

    warm: dict[str, list[float]] = {}
    settled: dict[str, bool] = {}
    for i, name in enumerate(sides):
        progress(f"{name}, warming up", i, len(sides))
        warm[name], settled[name] = _warmed(lambda name=name: timed(name), rule.warm_up_s)  # type: ignore[misc]
    plan = shuffled({name: rule.calls(float(np.median(w[-WINDOW:]))) for name, w in warm.items()}, seed)
    samples: dict[str, list[float]] = {name: [] for name in sides}
    for done, name in enumerate(plan):
        progress(name, done, len(plan))
        samples[name].append(timed(name))
    return {name: Timing(tuple(s), len(warm[name]), settled[name]) for name, s in samples.items()}


def shuffled(calls: Mapping[str, int], seed: int) -> list[str]:
    """A random order in which each side's calls are spread evenly: the k-th of n lies in the k-th n-th of the order."""
    rng = np.random.default_rng(seed)
    places = [((k + rng.uniform()) / n, name) for name, n in calls.items() for k in range(n)]
    return [name for _, name in sorted(places)]


def _warmed(timed: Callable[[], float], longest_s: float) -> tuple[list[float], bool]:
    """Seconds of the calls that it took to settle, and whether they did: calls that are too slow to be made 2 WINDOW
    times in `longest_s` count as settled after the second."""
    times = [timed(), timed()]
    while len(times) < 2 * WINDOW or not _alike(times):
        if sum(times) > longest_s:
            return times, len(times) < 2 * WINDOW
        times.append(timed())
    return times, True


def _alike(times: Sequence[float]) -> bool:
    before, now = np.median(times[-2 * WINDOW : -WINDOW]), np.median(times[-WINDOW:])
    return bool(abs(now - before) <= STABLE * before)
