"""The search of `bench tune`, and whether what it found is better: nothing here knows what is measured."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from bench import timing
from bench.compare import AT_LEAST
from bench.load import Load
from mubic_deploy.errors import UserError

T = TypeVar("T", bound=Hashable)
Rank = tuple[bool, float]  # whether it meets the target; then how good it is among those that do, or that do not
RATE, P99 = "clips a second", "p99"  # what a gain is of


def rank(clips_per_s: float, p99_s: float, target_s: float) -> Rank:
    """Throughput among those that meet the target, the lowest p99 among the others."""
    return (True, clips_per_s) if p99_s <= target_s else (False, 1 / p99_s)


def better(a: Rank, b: Rank) -> bool:
    """Whether `a` is worth a change from `b`: it meets the target and `b` does not, or is AT_LEAST times as good."""
    return a[0] > b[0] or (a[0] == b[0] and a[1] >= AT_LEAST * b[1])


def descend(
    start: T,
    groups: Sequence[Callable[[T], Iterable[T]]],
    measure: Callable[[T], Rank | None],
    rounds: int | None = None,
) -> tuple[T, dict[T, Rank | None]]:
    """Coordinate descent: the best setting found from `start`, and the rank of every one that was tried.

    groups: each gives the alternatives to a setting in one respect; the best of them is kept if it is `better`, then
    the next group's turn comes, until a whole round changed nothing, or after `rounds`. No setting is measured twice.
    measure: None for one that cannot be had. UserError if `start` is one of those."""
    tried: dict[T, Rank | None] = {}

    def ranked(setting: T) -> Rank | None:
        if setting not in tried:
            tried[setting] = measure(setting)
        return tried[setting]

    best, now = start, ranked(start)
    if now is None:
        raise UserError("the setting to begin from cannot be measured")
    done, changed = 0, True
    while changed and done != rounds:
        done, changed = done + 1, False
        for alternatives in groups:
            found = [(r, setting) for setting in alternatives(best) if (r := ranked(setting)) is not None]
            top = max(found, key=lambda pair: pair[0], default=None)
            if top is not None and better(top[0], now):
                (now, best), changed = top, True
    return best, tried


@dataclass(frozen=True)
class Verdict:
    """What a setting gives over the default, measured side by side. figure: RATE or P99; gain: how many times as good,
    with its interval; misses: the target, which the default meets; real: whether to change to it."""

    figure: str
    gain: float
    low: float
    high: float
    misses: bool
    real: bool


def judged(default: Load, found: Load, target_s: float) -> Verdict:
    """The gain in throughput; in p99 where the default misses the target. It is real, as `bench compare` says it, if
    it is AT_LEAST and its interval over the rounds leaves out 1, for which there must be enough of them; and never if
    the target is missed for it."""
    meets = [load.timing.percentile(99) <= target_s for load in (default, found)]
    if meets[0]:
        figure = RATE
        gain, low, high = timing.paired_ratio(found.rates, default.rates)
    else:
        figure = P99
        p99s = [[timing.Timing(a.latencies).percentile(99) for a in load.answers] for load in (default, found)]
        gain, low, high = timing.paired_ratio(*p99s)
    misses = meets[0] and not meets[1]
    return Verdict(figure, gain, low, high, misses, real=not misses and gain >= AT_LEAST and low > 1)
