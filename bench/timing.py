"""Timing that can be compared: every side in one process, calls interleaved in a random order, medians with their
confidence."""

from __future__ import annotations

import itertools
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
PERCENTILES = (90, 95, 99)
WIDE = 0.05  # half of a confidence interval over its median, from which on a result is marked
STABLE = 0.05  # by how much two medians of WINDOW warm-up calls may differ
WINDOW = 3
SLOWER = 4  # times warm_up_s
ASLEEP = 2_000_000  # cycles, a millisecond on an H200: longer than the host takes to enqueue some graphs
AT_LEAST = 5  # calls of a side, however slow it is; and warm-up calls, before it counts as not settled
FEW = 5  # rounds, pairs, blocks: an interval of fewer says nothing, of one it would be a point
UNKNOWN = (0.0, math.inf)  # the interval then

numbers = itertools.count(1)  # of this process's measurements


@dataclass(frozen=True)
class Rule:
    """When a side was timed often enough: after `repeats` calls or `seconds`, whichever comes first; short calls go on
    for `short_s` all the same. warm_up_s: the longest that a side may take to settle, or SLOWER times that if it is too
    slow for 2 WINDOW calls within, or AT_LEAST calls; quick: a look, for which suites try less."""

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

    settled: whether the warm-up calls had stopped changing
    rounds: how many of the calls, in their order, belong together, as those of one round of a load, which are slow or
    fast together; empty where each stands for itself
    measurement: the number of the call of `measure` that they are of, whose sides took turns to the end; None of a
    load, or where some were called more often afterwards"""

    samples: tuple[float, ...]
    warm_ups: int = 0
    settled: bool = True
    rounds: tuple[int, ...] = ()
    measurement: int | None = None

    @property
    def median(self) -> float:
        return float(np.median(self.samples))

    def percentile(self, q: float) -> float:
        return float(np.percentile(self.samples, q))

    def percentile_interval(self, q: float) -> tuple[float, float]:
        """Calls between which the percentile lies with CONFIDENCE, whatever their distribution, if they are
        independent: how many of n are under it is binomial. 0 or infinity where none is low or high enough: a p99 has
        no upper end from fewer than 368 calls."""
        n, under = len(self.samples), np.arange(len(self.samples) + 1)
        factorial = np.concatenate([[0.0], np.cumsum(np.log(under[1:]))])  # its logarithm
        chosen = factorial[n] - factorial - factorial[::-1]
        at_most = np.cumsum(np.exp(chosen + under * math.log(q / 100) + (n - under) * math.log(1 - q / 100)))
        first, last = np.searchsorted(at_most, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        ordered = [0.0, *sorted(self.samples), math.inf]
        return ordered[first], ordered[last + 1]

    @property
    def interval(self) -> tuple[float, float]:
        """Bootstrap confidence interval of the median (percentile method, fixed seed); UNKNOWN of too few rounds."""
        return UNKNOWN if self.few else interval(self.resampled())

    @property
    def few(self) -> bool:
        """Whether it is of rounds, and of fewer than tell an interval."""
        return 0 < len(self.rounds) < FEW

    def resampled(self, seed: int = 0) -> np.ndarray:
        """RESAMPLES medians of what is drawn with replacement: calls, in blocks, or whole rounds."""
        if not self.rounds:
            return resampled_medians(self.samples, seed)
        rounds = np.split(np.asarray(self.samples), np.cumsum(self.rounds)[:-1])
        drawn = np.random.default_rng(seed).integers(0, len(rounds), (RESAMPLES, len(rounds)))
        return np.array([np.median(np.concatenate([rounds[i] for i in chosen])) for chosen in drawn])

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
            **{f"p{q}": self.percentile(q) for q in told(len(self.samples))},
            "min": min(self.samples),
            "max": max(self.samples),
            "wide": self.wide,
        }


def told(calls: int) -> list[int]:
    """Those of PERCENTILES that are more than about the slowest of so many calls: p90 from 10 on, p99 from 100."""
    return [q for q in PERCENTILES if calls * (100 - q) >= 100]


def resampled_medians(samples: Sequence[float], seed: int = 0) -> np.ndarray:
    """Medians of RESAMPLES series as long as `samples`, each of blocks of neighbours drawn from it with replacement,
    since a call is like the one before it where the machine wanders; after the last comes the first."""
    values, block = np.asarray(samples), block_length(samples)
    n = len(values)
    first = np.random.default_rng(seed).integers(0, n, (RESAMPLES, math.ceil(n / block)))
    drawn = (first[..., None] + np.arange(block)) % n  # [RESAMPLES, blocks, block]
    return np.median(values[drawn.reshape(RESAMPLES, -1)[:, :n]], axis=1)


def block_length(samples: Sequence[float]) -> int:
    """How many neighbours are drawn together: for an AR(1) series of n values whose neighbours correlate by r
    (2 r / (1 - r^2))^(2/3) n^(1/3) (Carlstein 1986), such that there are FEW blocks at least; 1 unless r > 0. r is that
    of the ranks, from which one slow call takes little."""
    _, places, counts = np.unique(samples, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - counts / 2)[places]  # the same of equal values
    apart = ranks - len(samples) / 2  # from their mean
    squares = apart @ apart
    r = apart[1:] @ apart[:-1] / squares if squares else 0.0
    if r <= 0:
        return 1
    length = (2 * r / (1 - r**2)) ** (2 / 3) * len(samples) ** (1 / 3)
    return max(1, min(round(length), len(samples) // FEW))


def interval(resampled: np.ndarray) -> tuple[float, float]:
    """The confidence interval of a figure whose value in each resample is given."""
    low, high = np.percentile(resampled, [50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)])
    return float(low), float(high)


def ratio(a: Timing, b: Timing) -> tuple[float, float, float]:
    """Median of `a` over median of `b`, and its bootstrap confidence interval; UNKNOWN if one has too few rounds."""
    ends = UNKNOWN if a.few or b.few else interval(a.resampled(0) / b.resampled(1))
    return a.median / b.median, *ends


def ratio_in_run(a: Timing, b: Timing) -> tuple[float, float, float]:
    """Of two sides of one run: the `paired_ratio` of their k-th calls where both made as many in one measurement, so
    that these were made together, else as `ratio`."""
    if a.measurement is None or a.measurement != b.measurement or len(a.samples) != len(b.samples):
        return ratio(a, b)
    return paired_ratio(a.samples, b.samples)


def paired_ratio(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """Median of a[i] over b[i], each pair measured together, and its bootstrap confidence interval: what changed from
    pair to pair, as a machine that is slow for a minute, is not in it. UNKNOWN of fewer than FEW pairs."""
    ratios = [float(x / y) for x, y in zip(a, b, strict=True)]
    return float(np.median(ratios)), *(UNKNOWN if len(ratios) < FEW else interval(resampled_medians(ratios)))


def with_ends(name: str, measured: tuple[float, float, float]) -> dict[str, float]:
    """A figure and its interval as a row states them."""
    return dict(zip((name, f"{name}_low", f"{name}_high"), measured, strict=True))


def wall(call: Callable[[], Any]) -> float:
    """By the host's clock: for calls that return when their result is there."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def cuda_events(call: Callable[[], Any]) -> float:
    """By events on PyTorch's current stream: for calls that only enqueue.

    The GPU is kept asleep until all is enqueued, so that it finds a full queue when its time begins to count: of an
    idle one the host's time to launch would be in the figure. A call that takes the host longer than ASLEEP still has
    the rest of it in."""
    import torch

    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(ASLEEP)
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
    in_step: bool = False,
) -> dict[str, Timing]:
    """Times every side. Each is first called until it settles; then the calls of all of them follow in one random
    order, each side's spread evenly over the whole time, so that what the machine does meanwhile meets all alike.

    in_step: each as often as the one that needs the most calls, so that the k-th calls of all are made together; the
    warm-up calls too, of which what is common to all sides is no unrest of one.
    `progress` hears a side's name, and how many calls of how many are done."""
    counts = dict.fromkeys(sides, 0)

    def timed(name: str) -> float:
        index = counts[name]
        counts[name] += 1
        return clock(lambda: sides[name](index))

    def warming_up(name: str) -> float:
        progress(f"{name}, warming up", list(sides).index(name), len(sides))
        return timed(name)

    warm: dict[str, list[float]] = {}
    settled: dict[str, bool] = {}
    for group in [list(sides)] if in_step else [[name] for name in sides]:
        times, calm = _warmed(group, warming_up, rule)
        warm |= times
        settled |= calm
    samples: dict[str, list[float]] = {name: [] for name in sides}
    plans = 0
    wanted = {name: rule.calls(float(np.median(w[1:][-WINDOW:]))) for name, w in warm.items()}
    missing = dict.fromkeys(wanted, max(wanted.values())) if in_step else wanted
    while plan := shuffled(missing, seed):
        plans += 1
        for done, name in enumerate(plan):
            progress(name, done, len(plan))
            samples[name].append(timed(name))
        # of the sides that were quicker than their last warm-up calls
        missing = {name: max(0, rule.calls(sum(s) / len(s)) - len(s)) for name, s in samples.items()}
        missing = dict.fromkeys(missing, max(missing.values())) if in_step else missing
    # where some were called again, the k-th calls of two sides lie apart
    number = next(numbers) if in_step or plans == 1 else None
    return {name: Timing(tuple(s), len(warm[name]), settled[name], measurement=number) for name, s in samples.items()}


def shuffled(calls: Mapping[str, int], seed: int) -> list[str]:
    """A random order in which each side's calls are spread evenly: the k-th of n lies in the k-th n-th of the order."""
    rng = np.random.default_rng(seed)
    places = [((k + rng.uniform()) / n, name) for name, n in calls.items() for k in range(n)]
    return [name for _, name in sorted(places)]


def _warmed(
    sides: Sequence[str], timed: Callable[[str], float], rule: Rule
) -> tuple[dict[str, list[float]], dict[str, bool]]:
    """Seconds of the calls, in turn, that it took until every side settled or was given up, and whether it settled:
    WINDOW calls are like the WINDOW before; or, where fewer than 2 WINDOW could be made in the time, two calls are
    alike, of which none is the first, whose time is that of loading and compiling too. Not before AT_LEAST calls is a
    side given up, however slow it is."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    settled = dict.fromkeys(sides, False)
    while True:
        for name in sides:
            times[name].append(timed(name))
        calls, pace, waiting = len(times[sides[0]]), _pace(times), False
        for name in sides:
            spent = sum(times[name])
            slow = calls < 2 * WINDOW and spent > rule.warm_up_s
            window = 1 if slow else WINDOW
            if calls >= (3 if slow else 2 * WINDOW) and not settled[name]:
                settled[name] = _alike(np.array(times[name]) / pace, window)
            longest = rule.warm_up_s * (SLOWER if slow else 1)
            over = calls > 1 and spent > longest and (calls >= AT_LEAST or rule.quick)
            waiting |= not (settled[name] or over)
        if not waiting:
            return times, settled


def _pace(times: Mapping[str, Sequence[float]]) -> np.ndarray:
    """How slow the machine was at each call, against the last: the median over the sides, or 1 where there are too few
    to tell it from one of them."""
    of_each = np.array(list(times.values()))
    return np.median(of_each / of_each[:, -1:], axis=0) if len(times) > 2 else np.ones(of_each.shape[1])


def _alike(times: Sequence[float] | np.ndarray, window: int) -> bool:
    """Whether the medians of the last `window` calls and of those before them are."""
    before, now = np.median(times[-2 * window : -window]), np.median(times[-window:])
    return bool(abs(now - before) <= STABLE * before)
