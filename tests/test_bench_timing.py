"""Timing: what is called how often, in which order, and what is said about it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from bench import timing
from bench.timing import QUICK, Rule, Timing


class Clock:
    """A clock by which each side takes as long as it says, without taking it."""

    def __init__(self, seconds: dict[str, list[float]]) -> None:
        self.seconds, self.calls = seconds, list[str]()
        self.indices: dict[str, list[int]] = {name: [] for name in seconds}

    def side(self, name: str) -> timing.Side:
        def call(i: int) -> None:
            self.calls.append(name)
            self.indices[name].append(i)

        return call

    def __call__(self, call) -> float:
        call()
        name = self.calls[-1]
        given = self.seconds[name]
        return given[min(len(self.indices[name]), len(given)) - 1]


def measured(seconds: dict[str, list[float]], rule: Rule, in_step: bool = False) -> tuple[dict[str, Timing], Clock]:
    clock = Clock(seconds)
    return timing.measure({name: clock.side(name) for name in seconds}, rule, clock, in_step=in_step), clock


@pytest.mark.parametrize(
    ("call_s", "calls"),
    [
        (0.1, 30),  # 30 calls are 3 s
        (0.001, 1000),  # and would be 0.03 s here: at least one second
        (1.0, 20),  # 20 s come first
        (30.0, 5),  # never fewer
    ],
)
def test_how_often_a_side_is_called(call_s: float, calls: int) -> None:
    assert Rule(repeats=30, seconds=20, short_s=1).calls(call_s) == calls


def test_warm_up_goes_on_until_calls_are_alike() -> None:
    slow_start = [8.0, 4.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    timings, clock = measured({"a": slow_start, "b": [1.0]}, Rule(5, 5, 0, 100))
    # medians of three: 4 and 1, 2 and 1, then 1 and 1
    assert timings["a"].warm_ups == 8
    assert timings["b"].warm_ups == 6
    assert set(timings["a"].samples) == {1.0}
    assert timings["a"].settled
    assert clock.indices["a"] == list(range(13))  # so that inputs take turns


def test_what_does_not_settle_is_marked() -> None:
    growing = [float(2**i) for i in range(60)]
    timings, _ = measured({"a": growing, "b": [50.0]}, Rule(5, 5, 0, 500))
    assert not timings["a"].settled
    assert timings["a"].wide
    assert timings["a"].warm_ups == 9  # 511 s


@pytest.mark.parametrize(
    ("seconds", "warm_ups", "settled"),
    [
        ([90.0, 50.0, 51.0], 3, True),  # the first is never compared
        ([50.0, 50.0, 60.0, 61.0], 4, True),
        ([50.0, 50.0, 60.0, 70.0, 80.0, 90.0, 90.0], 6, False),  # 60 s and 80 s, by medians of three
        ([150.0, 80.0, 90.0, 100.0, 110.0], 5, False),  # over four times as long
        ([400.0, 300.0, 200.0, 250.0, 300.0, 300.0], 5, False),  # however slow: at least five
        ([400.0, 300.0, 200.0, 200.0], 4, True),
    ],
)
def test_sides_that_are_too_slow_for_six_calls(seconds: list[float], warm_ups: int, settled: bool) -> None:
    timings, _ = measured({"a": seconds}, Rule(5, 5, 0, 90))
    assert (timings["a"].warm_ups, timings["a"].settled) == (warm_ups, settled)


def test_a_quick_look_need_not_compare_and_says_so() -> None:
    timings, _ = measured({"a": [50.0]}, Rule(5, 5, 0, 2, quick=True))
    assert (timings["a"].warm_ups, timings["a"].settled, timings["a"].wide) == (2, False, True)


def test_calls_go_on_until_the_seconds_are_spent() -> None:
    """However slow the warm-up was: 20 s of calls of 1 s, not the four that calls of 5 s would need."""
    warming = [60.0, 5.0, 5.0, 5.0]
    timings, clock = measured({"a": [*warming, 1.0], "b": [*warming, 5.0]}, Rule(30, 20, 0, 50))
    assert (timings["a"].warm_ups, timings["b"].warm_ups) == (3, 3)
    assert len(timings["a"].samples) == 16  # 5 s once, then 15 calls of 1 s
    assert len(timings["b"].samples) == 5
    assert clock.calls[-1] == "a"


def test_sides_in_step_are_called_as_often() -> None:
    timings, clock = measured({"a": [1.0], "b": [5.0]}, Rule(30, 20, 0, 50), in_step=True)
    assert [len(t.samples) for t in timings.values()] == [20, 20]
    of_a, of_b = ([i for i, name in enumerate(clock.calls[-40:]) if name == side] for side in "ab")
    assert max(abs(i - j) for i, j in zip(of_a, of_b, strict=True)) <= 3  # the k-th calls lie in the k-th pair
    slow_start = [60.0, 5.0, 5.0, 5.0, 1.0]  # 4 calls of 5 s would do, 20 of 1 s are made; and so of the other side
    timings, _ = measured({"a": slow_start, "b": [5.0]}, Rule(30, 20, 0, 50), in_step=True)
    assert len(timings["a"].samples) == len(timings["b"].samples) > 15


def test_in_step_what_slows_every_side_is_no_unrest_of_one() -> None:
    weather = [1.0, 2.0, 1.0, 2.0, 1.5, 1.0]
    sides = {"a": [w * 50 for w in weather], "b": [w * 20 for w in weather], "c": [w * 30 for w in weather]}
    rule = Rule(5, 5, 0, 10)
    timings, clock = measured(sides, rule, in_step=True)
    assert [(t.warm_ups, t.settled) for t in timings.values()] == [(3, True)] * 3
    assert clock.calls[:6] == ["a", "b", "c"] * 2
    assert not any(t.settled for t in measured(sides, rule)[0].values())  # each by itself
    timings, _ = measured({"a": sides["a"], "b": sides["b"]}, rule, in_step=True)
    assert not any(t.settled for t in timings.values())  # of two sides nobody knows which one it is


def test_in_step_a_side_that_warms_up_is_waited_for() -> None:
    weather = [1.0, 1.3, 0.9, 1.2, 1.0, 1.3]
    slow_start = [9.0, 3.0, 2.0, 1.0, 1.0, 1.0]
    sides = {"a": [w * s * 50 for w, s in zip(weather, slow_start, strict=True)]}
    sides |= {name: [w * 20 for w in weather] for name in "bc"}
    timings, _ = measured(sides, Rule(5, 5, 0, 10), in_step=True)
    assert [(t.warm_ups, t.settled) for t in timings.values()] == [(5, True)] * 3
    sides["a"] = [w * s * 50 for w, s in zip(weather, (16, 8, 4, 2, 1, 1), strict=True)]
    timings, _ = measured(sides, Rule(5, 5, 0, 10), in_step=True)
    assert [(t.warm_ups, t.settled) for t in timings.values()] == [(5, False), (5, True), (5, True)]


def test_a_ratio_of_one_run_is_that_of_its_pairs() -> None:
    """A machine that is half as fast in the second half: the medians wander with it, the pairs do not."""
    rng = np.random.default_rng(1)
    pace = np.repeat([1.0, 1.5], 20)
    a = Timing(tuple(1.1 * pace * rng.normal(1, 0.005, 40)), measurement=1)
    b = Timing(tuple(pace * rng.normal(1, 0.005, 40)), measurement=1)
    found, low, high = timing.ratio_in_run(a, b)
    assert found == pytest.approx(1.1, rel=0.005)
    assert low < found < high
    assert high - low < 0.02
    assert timing.ratio(a, b)[2] - timing.ratio(a, b)[1] > 0.2
    apart = (Timing(b.samples[:30], measurement=1), Timing(b.samples, measurement=2), Timing(b.samples))
    for other in apart:  # of whose calls nobody knows which were made together
        assert timing.ratio_in_run(a, other) == timing.ratio(a, other)
    loads = Timing(a.samples, rounds=(20, 20)), Timing(b.samples, rounds=(20, 20))
    assert timing.ratio_in_run(*loads) == timing.ratio(*loads)


def test_a_measurement_has_a_number_of_its_own() -> None:
    one, _ = measured({"a": [1.0], "b": [1.0]}, Rule(5, 5, 0, 10))
    other, _ = measured({"a": [1.0]}, Rule(5, 5, 0, 10))
    assert one["a"].measurement == one["b"].measurement is not None
    assert other["a"].measurement not in (None, one["a"].measurement)


def test_the_order_is_random_and_even() -> None:
    order = timing.shuffled({"a": 100, "b": 20}, seed=1)
    assert order != timing.shuffled({"a": 100, "b": 20}, seed=2)
    assert order == timing.shuffled({"a": 100, "b": 20}, seed=1)
    for part in range(4):  # each quarter has a quarter of both
        quarter = order[30 * part : 30 * (part + 1)]
        assert quarter.count("b") == pytest.approx(5, abs=1)
    runs = sum(a != b for a, b in itertools.pairwise(order))
    assert runs > 25  # not one after the other


def test_statistics_are_those_of_numpy_and_scipy() -> None:
    samples = tuple(np.random.default_rng(3).gamma(4.0, 0.01, 120))
    timed = Timing(samples)
    summary = timed.summary()
    for name, expected in (("median", 50), ("p90", 90), ("p95", 95), ("p99", 99)):
        assert summary[name] == pytest.approx(np.percentile(samples, expected))
    bootstrap = stats.bootstrap((samples,), np.median, n_resamples=20_000, method="percentile", rng=5)
    low, high = timed.interval
    assert low == pytest.approx(bootstrap.confidence_interval.low, rel=0.02)
    assert high == pytest.approx(bootstrap.confidence_interval.high, rel=0.02)


def test_a_wide_interval_is_marked() -> None:
    assert not Timing((1.0, 1.01, 0.99, 1.0, 1.02)).wide
    assert Timing((1.0, 2.0, 1.5, 3.0, 1.1)).wide


def series(r: float, rng: np.random.Generator, n: int = 200) -> np.ndarray:
    """AR(1) around 1, whose neighbours correlate by r."""
    out = rng.normal(0, 1, n)
    for i in range(1, n):
        out[i] = r * out[i - 1] + (1 - r**2) ** 0.5 * out[i]
    return 1 + 0.02 * out


def independent(samples: np.ndarray) -> tuple[float, float]:
    """The bootstrap that draws calls one by one."""
    drawn = np.random.default_rng(0).integers(0, len(samples), (timing.RESAMPLES, len(samples)))
    return timing.interval(np.median(samples[drawn], axis=1))


def test_calls_that_follow_each_other_are_not_independent() -> None:
    """The true median is 1: 95 of 100 intervals should hold it, and of pairs' ratios too."""
    rng = np.random.default_rng(0)
    held = {"blocks": 0, "pairs": 0, "one by one": 0}
    for _ in range(60):
        calls = series(0.8, rng)
        ends = {"blocks": Timing(tuple(calls)).interval, "one by one": independent(calls)}
        ends["pairs"] = timing.paired_ratio(calls.tolist(), [1.0] * len(calls))[1:]
        for name, (low, high) in ends.items():
            held[name] += low <= 1 <= high
    assert held["blocks"] == held["pairs"] >= 50  # of 60
    assert held["one by one"] <= 45


def test_independent_calls_are_drawn_as_ever() -> None:
    rng = np.random.default_rng(1)
    widths = []
    for _ in range(40):
        calls = series(0.0, rng)
        (low, high), (a, b) = Timing(tuple(calls)).interval, independent(calls)
        widths.append((high - low) / (b - a))
        if timing.block_length(calls.tolist()) == 1:
            assert (low, high) == (a, b)
    assert 0.97 < np.mean(widths) < 1.05
    assert np.min(widths) > 0.7


def test_the_length_of_a_block_is_carlsteins() -> None:
    """By hand: r = 0.5 gives (1 / 0.75)^(2/3) = 1.211 times n^(1/3)."""
    calls = series(0.5, np.random.default_rng(2), 8000)
    assert timing.block_length(calls.tolist()) == pytest.approx(1.211 * 20, abs=2)
    calls[::100] = 1000.0  # outliers, beside which a correlation of the values would see nothing
    assert timing.block_length(calls.tolist()) == pytest.approx(1.211 * 20, abs=3)
    assert timing.block_length([1.0, 2.0] * 50) == 1
    assert timing.block_length([1.0] * 50) == 1
    assert timing.block_length(list(range(50))) == 10  # five blocks, or there would be no interval
    assert timing.block_length([1.0]) == timing.block_length(list(range(8))) == 1


@pytest.mark.parametrize("n", [50, 367, 368, 500, 1000])
def test_the_interval_of_a_percentile_is_scipys(n: int) -> None:
    samples = np.random.default_rng(n).gamma(4.0, 0.01, n)
    for q in (50, 95, 99):
        found = stats.quantile_test(samples, p=q / 100).confidence_interval(0.95)
        low, high = Timing(tuple(samples)).percentile_interval(q)
        assert low == (0.0 if np.isnan(found.low) else found.low)
        assert high == (np.inf if np.isnan(found.high) else found.high)
    assert np.isfinite(Timing(tuple(samples)).percentile_interval(99)[1]) == (n >= 368)


def test_calls_of_one_round_are_not_independent() -> None:
    """Eight rounds of 50 calls, each round with a pace of its own: the true median is that of the paces."""
    rng = np.random.default_rng(0)
    held = {"pooled": 0, "by round": 0}
    for _ in range(40):
        calls = np.concatenate([pace + rng.normal(0, 0.005, 50) for pace in 1 + rng.normal(0, 0.1, 8)])
        load = Timing(tuple(calls), rounds=(50,) * 8)
        for name, (low, high) in {"pooled": independent(calls), "by round": load.interval}.items():
            held[name] += low <= 1 <= high
    assert held["by round"] >= 34  # of 40: 95 % of so few rounds is a little optimistic
    assert held["pooled"] < 20
    _, low, high = timing.ratio(load, Timing((1.0,)))
    assert (low, high) == load.interval


def test_too_few_rounds_tell_no_interval() -> None:
    """However alike they are: of one round the interval would be a point."""
    for rounds in (1, 4, 5):
        load = Timing((1.0, 1.001) * rounds, rounds=(2,) * rounds)
        told = rounds == 5
        assert (load.interval != timing.UNKNOWN, not load.wide) == (told, told)
        for ratio in (timing.ratio(load, Timing((0.5,) * 9)), timing.ratio(Timing((2.0,) * 9), load)):
            assert (ratio[0], ratio[1:] != timing.UNKNOWN) == (pytest.approx(2, rel=0.01), told)
        pairs = timing.paired_ratio([2.0, 2.002] * rounds, [1.0, 1.0] * rounds)
        assert (pairs[0], pairs[1:] != timing.UNKNOWN) == (pytest.approx(2, rel=0.01), rounds > 1)
    assert timing.paired_ratio([2.0] * 4, [1.0] * 4)[1:] == timing.UNKNOWN


def test_the_interval_of_a_ratio_holds_the_true_one() -> None:
    rng = np.random.default_rng(0)
    a, b = 2 + rng.normal(0, 0.1, 200), 1 + rng.normal(0, 0.1, 200)
    value, low, high = timing.ratio(Timing(tuple(a)), Timing(tuple(b)))
    assert low < 2 < high
    assert value == pytest.approx(np.median(a) / np.median(b))
    assert high - low < 0.15
    same, low, high = timing.ratio(Timing(tuple(b)), Timing(tuple(b)))
    assert same == 1
    assert low < 1 < high


def test_pairs_leave_out_what_changes_from_pair_to_pair() -> None:
    rng = np.random.default_rng(0)
    machine = rng.choice([1.0, 0.6], 20)
    a, b = 0.9 * machine + rng.normal(0, 0.01, 20), machine + rng.normal(0, 0.01, 20)
    value, low, high = timing.paired_ratio(a.tolist(), b.tolist())
    assert 0.87 < low < value < high < 0.93
    assert value == pytest.approx(np.median(a / b))
    _, low, high = timing.ratio(Timing(tuple(a)), Timing(tuple(b)))
    assert high - low > 0.2
    with pytest.raises(ValueError, match="zip"):
        timing.paired_ratio([1.0, 2.0], [1.0])


def test_wall_clock_times_the_call() -> None:
    import time

    assert timing.wall(lambda: time.sleep(0.05)) == pytest.approx(0.05, abs=0.045)
    real = timing.measure({"sleep": lambda i: time.sleep(0.01)}, QUICK)["sleep"]
    assert min(real.samples) >= 0.01
    assert len(real.samples) >= 5


def test_sides_that_were_called_again_are_not_paired() -> None:
    """Their last calls were made when the others had ended."""
    rule = Rule(repeats=12, seconds=2.0, short_s=0.0, warm_up_s=0.5)
    again, _ = measured({"a": [0.1], "b": [0.2] * 4 + [0.1]}, rule)
    assert len(again["a"].samples) == len(again["b"].samples) == 12
    assert again["a"].measurement is None
    once, _ = measured({"a": [0.1], "b": [0.1]}, rule)
    assert once["a"].measurement == once["b"].measurement is not None
