"""Windows of a live stream: when they are complete, and what they hold. No server, no model.

25 frames a second where nothing else is said: window 0 has its middle frame at 8 / 25 = 0.32 s = sample 5120, so its
excerpt runs from 5120 - 8304 = -3184 to 5120 + 8304 = 13424."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest

from mubic_deploy.config import DEMO, get_config
from mubic_deploy.errors import UserError
from mubic_deploy.live.timeline import Timeline, Window

NTSC = Fraction(30_000, 1001)


def image(index: int) -> np.ndarray:
    """A frame that says its number; no size matters here."""
    return np.full((1, 1, 3), index % 256, np.uint8)


def ramp(start: int, count: int) -> np.ndarray:
    """Sound that says its sample's number, from 0 to 1 in 16 s."""
    return (np.arange(start, start + count) / 256_000).astype(np.float32)


def feed(timeline: Timeline, frames: int, first: int = 0, fps: int = 25) -> None:
    for i in range(first, first + frames):
        timeline.add_frame(image(i), i / fps)


def numbers(window: Window) -> list[int]:
    return window.video[:, 0, 0, 0].tolist()


def windows(timeline: Timeline) -> list[Window]:
    return [timeline.cut(k) for k in timeline.advance()]


def test_a_window_is_complete_when_its_sound_is() -> None:
    timeline = Timeline(DEMO, stride=1)
    feed(timeline, 17)
    timeline.add_sound(0, ramp(0, 13_423))
    assert windows(timeline) == []
    timeline.add_sound(13_423, ramp(13_423, 1))
    (window,) = windows(timeline)
    assert numbers(window) == list(range(16))
    assert (window.frame_index, window.time_s) == (8, 0.32)
    # silence before the stream, then its first sample at 3184
    assert not window.audio[:3185].any()
    np.testing.assert_allclose(window.audio[3184:], ramp(0, 13_424), atol=1e-7)
    assert window.heard == pytest.approx(13_424 / 16_608)
    timeline.add_sound(13_424, ramp(13_424, 639))
    assert windows(timeline) == []
    timeline.add_sound(14_063, ramp(14_063, 1))  # 640 samples a frame
    (window,) = windows(timeline)
    assert (window.frame_index, numbers(window)) == (9, list(range(1, 17)))


def test_a_window_is_complete_when_its_frames_are() -> None:
    timeline = Timeline(DEMO, stride=1)
    timeline.add_sound(0, ramp(0, 30_000))
    feed(timeline, 15)
    assert windows(timeline) == []
    feed(timeline, 1, first=15)
    assert [w.frame_index for w in windows(timeline)] == [8]


@pytest.mark.parametrize("when", ["before", "after"])
def test_without_sound_nothing_is_waited_for(when: str) -> None:
    timeline = Timeline(DEMO, stride=1)
    if when == "before":
        timeline.end_sound()
    feed(timeline, 17)
    if when == "after":
        assert windows(timeline) == []
        timeline.end_sound()
    found = windows(timeline)
    assert [w.frame_index for w in found] == [8, 9]
    assert not found[0].audio.any()
    assert found[0].heard == 0
    deaf = Timeline(get_config("demo", "visual_only"), stride=1)
    feed(deaf, 16)
    assert len(windows(deaf)) == 1


def test_the_end_fills_up_with_silence() -> None:
    timeline = Timeline(DEMO, stride=1)
    feed(timeline, 16)
    timeline.add_sound(0, ramp(0, 10_240))  # 0.64 s, as long as the frames
    assert windows(timeline) == []
    (k,) = timeline.finish()
    audio = timeline.cut(k).audio
    np.testing.assert_allclose(audio[3184:13_424], ramp(0, 10_240), atol=1e-7)
    assert not audio[13_424:].any()


def test_a_short_stream_repeats_its_last_frame() -> None:
    timeline = Timeline(DEMO, stride=4)
    feed(timeline, 10)
    (k,) = timeline.finish()
    window = timeline.cut(k)
    assert numbers(window) == [*range(10), 9, 9, 9, 9, 9, 9]
    assert (window.frame_index, window.time_s) == (8, 0.32)
    short = Timeline(DEMO, stride=4)
    feed(short, 3)
    window = short.cut(next(short.finish()))
    assert (window.frame_index, window.time_s, numbers(window)[8]) == (2, 2 / 25, 2)
    later = Timeline(DEMO, stride=4)  # a stream that goes on after an outage is not short
    later.add_frame(image(20), 0.8, 20)
    assert list(later.finish()) == []
    assert list(Timeline(DEMO).finish()) == []


@pytest.mark.parametrize(("stride", "expected"), [(1, range(8, 92)), (4, range(8, 89, 4)), (20, [8, 28, 48, 68, 88])])
def test_windows_by_stride(stride: int, expected: range) -> None:
    timeline = Timeline(DEMO, stride)
    found = []
    for i in range(99):
        timeline.add_frame(image(i), i / 25)
        timeline.add_sound(640 * i, ramp(640 * i, 640))
        found += windows(timeline)
        timeline.forget()
    found += [timeline.cut(k) for k in timeline.finish()]
    assert [w.frame_index for w in found] == list(expected)
    for w in found:
        assert numbers(w) == list(range(w.frame_index - 8, w.frame_index + 8))
        middle = 640 * w.frame_index
        if 8304 <= middle <= 99 * 640 - 8304:
            np.testing.assert_allclose(w.audio, ramp(middle - 8304, 16_608), atol=1e-7)
            assert w.heard == 1


def test_numbers_go_on_after_an_outage() -> None:
    """A new sequence begins with frame 22: with stride 4 its first window is the one of frames 24 to 39."""
    timeline = Timeline(DEMO, stride=4)
    timeline.end_sound()
    for i in range(22, 45):
        timeline.add_frame(image(i), i / 25, i)
    assert [w.frame_index for w in windows(timeline)] == [32, 36]


def test_windows_with_a_frame_left_out_are_passed_over() -> None:
    timeline = Timeline(DEMO, stride=4)
    timeline.end_sound()
    for i in [*range(18), *range(19, 40)]:
        timeline.add_frame(image(i), i / 25, i)
    # windows 4..19, 8..23, 12..27 and 16..31 need frame 18
    assert [w.frame_index for w in windows(timeline)] == [8, 28, 32]


@pytest.mark.parametrize("stride", [1, 4, 16, 23])
def test_windows_with_any_frames_left_out(stride: int) -> None:
    rng = np.random.default_rng(stride)
    timeline, found = Timeline(DEMO, stride), list[int]()
    timeline.end_sound()
    gaps = np.where(rng.random(400) < 0.05, rng.integers(2, 90, 400), 1)
    sent = np.cumsum(gaps).tolist()
    for i in sent:
        timeline.add_frame(image(i), i / 25, i)
        found += [timeline.cut(k).frame_index for k in timeline.advance()]
        timeline.forget()
    whole = [k for k in range(0, sent[-1], stride) if set(range(k, k + 16)) <= set(sent)]
    assert found == [k + 8 for k in whole]
    assert len(found) > 3


def test_a_frame_number_that_jumps_far_costs_nothing() -> None:
    """One by one, the windows of 2^62 frames would take for ever."""
    timeline = Timeline(DEMO, stride=1)
    timeline.end_sound()
    for i in [*range(16), *range(2**62, 2**62 + 16)]:
        timeline.add_frame(image(i), (i % 2**61) / 25 + (i > 99), i)
    assert [w.frame_index for w in windows(timeline)] == [8, 2**62 + 8]


@pytest.mark.parametrize(
    "times",
    [
        pytest.param([Fraction(i) / fps for i in range(120)], id=f"{float(fps):.2f} fps")
        for fps in (24, 25, NTSC, 30, 60)
    ]
    + [pytest.param([Fraction(i, 30) + Fraction(i * i, 9000) for i in range(80)], id="variable rate")],
)
def test_flash_and_click(times: list[Fraction]) -> None:
    """Frame 40 flashes and its time clicks: in every window that shows the flash, the click lies as far from the
    excerpt's middle, sample 8304, as the flash's time from the middle frame's."""
    flash = 40
    sound = np.zeros(16_000 * 8, np.float32)
    sound[round(times[flash] * 16_000)] = 1
    timeline = Timeline(DEMO, stride=1)
    found = []
    arrived = 0
    for i, t in enumerate(times):
        timeline.add_frame(np.full((1, 1, 3), 255 * (i == flash), np.uint8), float(t))
        while arrived < t * 16_000:  # in parts of 23 ms, as a sound card gives them
            timeline.add_sound(arrived, sound[arrived : arrived + 368])
            arrived += 368
        found += windows(timeline)
        timeline.forget()
    checked = 0
    for w in found:
        shown = np.flatnonzero(w.video[:, 0, 0, 0])
        if not len(shown):
            continue
        apart = times[flash] - times[w.frame_index]
        if abs(apart) > Fraction(1, 2):  # longer than half the excerpt: not heard in this window
            continue
        assert w.frame_index - 8 + shown[0] == flash
        (click,) = np.flatnonzero(w.audio)
        assert abs(click - (8304 + apart * 16_000)) <= 1
        assert abs(click - (8304 + apart * 16_000)) < 16_000 * min(b - a for a, b in pairwise(times)) / 2
        checked += 1
    assert checked >= 14


def test_a_gap_in_the_sound_is_silent() -> None:
    timeline = Timeline(DEMO, stride=1)
    feed(timeline, 16)
    timeline.add_sound(0, np.full(4000, 0.5, np.float32))
    timeline.add_sound(6000, np.full(9000, 0.25, np.float32))
    (window,) = windows(timeline)
    audio = window.audio[3184:]  # from the stream's sample 0 on
    assert (audio[:4000] == 0.5).all()
    assert not audio[4000:6000].any()
    assert (audio[6000:] == 0.25).all()
    assert window.heard == pytest.approx((13_424 - 2000) / 16_608)


def test_late_sound_is_waited_for_and_then_missing() -> None:
    """Window 0 wants sound to 0.839 s: 2 s later it goes without. At 2.839 s frame 70 has come and 71 not."""
    timeline = Timeline(DEMO, stride=16)
    timeline.add_sound(0, ramp(0, 1600))
    feed(timeline, 71)
    assert windows(timeline) == []
    feed(timeline, 1, first=71)  # 2.84 s
    (window,) = windows(timeline)
    assert window.frame_index == 8
    assert window.heard == pytest.approx(1600 / 16_608)
    timeline.forget()
    timeline.add_sound(1600, ramp(1600, 30_000))  # it comes at last: window 1 (middle 24, 0.96 s) has it all
    (window,) = windows(timeline)
    assert (window.frame_index, window.heard) == (24, 1)


def test_waiting_is_bounded_at_any_frame_rate() -> None:
    timeline = Timeline(DEMO, stride=1)
    for i in range(16 + 255):
        timeline.add_frame(image(i), i / 1000)
    assert windows(timeline) == []
    timeline.add_frame(image(0), 0.271)
    assert [w.frame_index for w in windows(timeline)] == [8]


@pytest.mark.parametrize("sound", ["none", "with it", "late", "ahead", "without frames"])
def test_memory_is_bounded(sound: str) -> None:
    timeline = Timeline(DEMO, stride=4)
    most_frames = most_samples = 0
    for i in range(5000):
        if sound != "without frames" or i < 20:
            timeline.add_frame(image(i), i / 25)
        lead = {"late": -12_000, "ahead": 200_000}.get(sound, 0)
        if sound != "none" and 640 * i + lead >= 0:
            timeline.add_sound(640 * i + lead, np.zeros(640, np.float32))
        for k in timeline.advance():
            timeline.cut(k)
        timeline.forget()
        frames, samples = timeline.held
        most_frames, most_samples = max(most_frames, frames), max(most_samples, samples)
    assert most_frames <= 16 + 8 + 13 + 4 + 50
    assert most_samples <= (61 if sound == "without frames" else 15) * 16_000


@pytest.mark.parametrize("count", [1, 160])
def test_sound_whose_time_stands_still_is_bounded(count: int) -> None:
    timeline = Timeline(DEMO, kept_s=2)
    for _ in range(2000):
        timeline.add_sound(0, np.zeros(count, np.float32))
    assert timeline.held[1] <= 2 * 16_000
    assert len(timeline.sound(0)) <= 2 * 80


@pytest.mark.parametrize(("apart_s", "whole"), [(2, True), (8, True), (20, True), (60, False)])
def test_frames_that_are_far_apart_have_their_sound(apart_s: int, whole: bool) -> None:
    """As slides with a talk: up to where it would take too much memory."""
    timeline, heard, most = Timeline(DEMO, stride=4), [], 0
    for i in range(40):
        for _ in range(apart_s):  # the client sends it 10 s ahead of the frames
            start = 10 * 16_000 if timeline.heard is None else timeline.heard
            timeline.add_sound(start, np.zeros(16_000, np.float32))
        timeline.add_frame(image(i), 10.0 + i * apart_s)
        most = max(most, timeline.held[1])
        for k in timeline.advance():
            heard.append(timeline.cut(k).heard)
        timeline.forget()
    assert len(heard) == 7
    assert (heard == [1.0] * 7) == whole
    assert most <= 240 * 16_000


def test_what_cannot_come_next() -> None:
    timeline = Timeline(DEMO, stride=1)
    feed(timeline, 3)
    timeline.add_sound(0, np.zeros(1000, np.float32))
    with pytest.raises(UserError, match=r"time stamps go back or stand still: frame 3 is at 0\.080000 s"):
        timeline.add_frame(image(3), 0.08)
    with pytest.raises(UserError, match="frame number 2 comes after 2"):
        timeline.add_frame(image(3), 0.12, 2)
    for t in (math.nan, math.inf, -math.inf):
        with pytest.raises(UserError, match=r"has the time stamp \S+: give seconds"):
            timeline.add_frame(image(3), t)
    with pytest.raises(UserError, match=r"sound go back: it goes on at 0\.0522 s, but is known up to 0\.0625 s"):
        timeline.add_sound(835, np.zeros(10, np.float32))
    timeline.add_sound(840, np.zeros(160, np.float32))  # 10 ms of rounding
    timeline.end_sound()
    with pytest.raises(UserError, match="sound came after the stream's sound had ended"):
        timeline.add_sound(1000, np.zeros(1, np.float32))
    with pytest.raises(UserError, match="stride 0 is out of range"):
        Timeline(DEMO, 0)
    timeline.add_frame(image(3), 0.12)  # nothing was taken from what was refused
    assert timeline.last_index == 3


@pytest.mark.parametrize("fps", [24, 25, NTSC, 30, 50, Fraction(60_000, 1001), 60])
@pytest.mark.parametrize("stride", [1, 2, 4])
def test_windows_share_no_slice_of_sound(fps: Fraction, stride: int) -> None:
    """Why no features of slices are kept: slice j of a window starts 336 j samples after its first, so two windows
    share one only where they lie 336, 672 or 1008 samples apart, exactly. At no usual rate two neighbours do."""
    starts = [round(Fraction(i * stride) / fps * 16_000) for i in range(200)]
    slices = [{start + 336 * j for j in range(4)} for start in starts]
    assert not any(a & b for a, b in pairwise(slices))
