"""When frames of an address are handed on."""

from __future__ import annotations

from itertools import pairwise

import pytest

from mubic_deploy.live.pace import Pace


def handed_on(stamps: list[float], arrivals: list[float]) -> list[float]:
    """When each frame goes on that is read one after the other, not before it arrives."""
    pace, now, times = Pace(), 0.0, []
    for stamp, arrival in zip(stamps, arrivals, strict=True):
        now = max(now, arrival)
        wait_s = pace.wait_s(stamp, now)
        assert wait_s >= 0
        now += wait_s
        times.append(now)
    return times


def test_what_comes_at_once_goes_on_in_its_own_time() -> None:
    stamps = [7 + i / 25 for i in range(500)]
    times = handed_on(stamps, [3.0] * 500)
    assert times[0] == 3
    assert times == sorted(times)
    assert times[-1] - times[0] == pytest.approx(499 / 25, rel=0.03)
    assert min(b - a for a, b in pairwise(times)) > 0.039


def test_segments_at_once_fill_the_time_until_the_next() -> None:
    """Three segments of 6 s when it begins, then one every 6 s, each as a burst."""
    stamps = [i / 25 for i in range(3000)]
    arrivals = [max(0.0, 6.0 * (i // 150 - 2)) for i in range(3000)]
    times = handed_on(stamps, arrivals)
    assert max(b - a for a, b in pairwise(times[:450])) < 0.041  # what is there goes on evenly
    assert min(b - a for a, b in pairwise(times)) > 0.039
    assert max(time - arrival for time, arrival in zip(times, arrivals, strict=True)) < 18.1  # as at the beginning


def test_a_camera_with_a_fast_clock_is_not_held_ever_longer() -> None:
    """A day with a clock that gains a second in an hour and a jitter of 10 ms."""
    seconds = range(86_400)
    arrivals = [s + 0.01 * (s * 7 % 11) / 10 for s in seconds]
    times = handed_on([s * (1 + 1 / 3600) for s in seconds], arrivals)
    assert max(time - arrival for time, arrival in zip(times, arrivals, strict=True)) < 0.02


def test_after_a_pause_it_goes_on_evenly() -> None:
    """20 s without anything, then all that was missed at once: no window would wait for more than its own time."""
    stamps = [i / 25 for i in range(1000)]
    arrivals = [stamp if i < 300 else max(32.0, stamp) for i, stamp in enumerate(stamps)]
    times = handed_on(stamps, arrivals)
    assert times[300] == 32
    assert min(b - a for a, b in pairwise(times[300:])) > 0.039


@pytest.mark.parametrize("jump", [-3.0, 60.0])
def test_a_jump_of_the_clock_is_not_waited_for(jump: float) -> None:
    times = handed_on([1.0, 1.04, 1.04 + jump, 1.08 + jump], [0.0] * 4)
    assert times == pytest.approx([0, 0.04, 0.04, 0.08], abs=0.002)
