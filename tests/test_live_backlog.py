"""What a client sends, and sends again, against the very state that the server keeps; no server, no network."""

from __future__ import annotations

import random

import numpy as np
import pytest

from mubic_deploy.config import DEMO
from mubic_deploy.live.backlog import Backlog
from mubic_deploy.live.link import Settings, arrays
from mubic_deploy.live.settings import RAW
from mubic_deploy.live.streams import Stream
from mubic_deploy.live.timeline import Window

TONE = (np.arange(400_000) % 997 / 997).astype(np.float32)  # sound that says where it is


class Server:
    """One sequence at a time, which may be lost with all that is on its way."""

    def __init__(self, backlog: Backlog, stride: int, in_flight: int) -> None:
        self.backlog, self.in_flight = backlog, in_flight
        self.settings = Settings(stride, 0, 4, RAW)
        self.stream: Stream | None = None
        self.ended = False
        self.on_their_way: list[Window] = []
        self.found: list[Window] = []

    def send(self, flush: bool = False) -> None:
        """All there is to send. UserError if the server would refuse it."""
        while (request := self.backlog.request(self.in_flight, flush)) is not None:
            assert not self.ended, "a request after the last one"
            if request.start:
                self.stream = Stream(DEMO, arrays(request, self.settings))
            assert self.stream is not None, "a request before the first one"
            self.on_their_way += self.stream.push(arrays(request, self.settings), request.end)
            self.ended = request.end
            self.stream.waiting = len(self.on_their_way)  # it refuses more than it will hold

    def answer(self, count: int) -> None:
        for window in self.on_their_way[:count]:
            if self.backlog.answered(window.frame_index) is not None:
                self.found.append(window)
        del self.on_their_way[:count]
        if self.stream is not None:
            self.stream.waiting = len(self.on_their_way)

    def drain(self, at_once: int) -> None:
        """Sends and answers until nothing is left."""
        for _ in range(1000):
            self.send()
            self.answer(at_once)

    def lose(self) -> None:
        self.on_their_way.clear()
        self.stream, self.ended = None, False
        self.backlog.begin_again()


def check(server: Server, expected: list[int], sound: str, end: int) -> None:
    """Every window came once, with its own frames and the sound of its own time."""
    assert [w.frame_index for w in server.found] == expected
    for w in server.found:
        first = w.frame_index - 8
        assert w.video[:, 0, 0, 0].tolist() == [i % 256 for i in range(first, first + 16)]
        at = 640 * w.frame_index - 8304
        inside = np.arange(max(at, 0), min(at + 16_608, end))
        wanted = np.zeros(16_608, np.float32)
        if sound != "none":
            wanted[inside - at] = TONE[inside]
        np.testing.assert_array_equal(w.audio, wanted)


@pytest.mark.parametrize("sound", ["with it", "ahead", "none", "ends early"])
@pytest.mark.parametrize("stride", [1, 4, 16, 23])
@pytest.mark.parametrize("seed", range(4))
def test_no_window_is_lost(sound: str, stride: int, seed: int) -> None:
    """Frames and sound in random parts, answers late, the sequence lost again and again."""
    rng = random.Random(f"{sound} {stride} {seed}")
    backlog = Backlog(DEMO, stride)
    server = Server(backlog, stride, in_flight=rng.randint(1, 5))
    frames, heard, now = 150, 0, 0.0
    end = 640 * 90 if sound == "ends early" else 640 * frames
    for i in range(frames):
        now += 0.04
        ahead = 30_000 if sound == "ahead" else 640
        while sound != "none" and heard < min(end, 640 * i + ahead):
            count = min(rng.randint(1, 3000), end - heard)
            backlog.add_sound(heard, TONE[heard : heard + count], now)
            heard += count
        if (sound == "none" and i == 0) or (sound == "ends early" and i == 95):
            backlog.end_sound(now)
        backlog.add_frame(np.full((112, 192, 3), i % 256, np.uint8), i / 25, now)
        if rng.random() < 0.5:
            server.send(flush=rng.random() < 0.2)
        if rng.random() < 0.6:
            server.answer(rng.randint(0, 3))
        if rng.random() < 0.05:
            server.lose()
    backlog.finish(now)
    for _ in range(500):
        server.send()
        server.answer(2)
        if rng.random() < 0.05:
            server.lose()
        if backlog.done:
            break
    assert backlog.done
    server.send(flush=True)
    check(server, list(range(8, frames - 7, stride)), sound, end)
    assert backlog.timeline.held[0] <= stride + 16


@pytest.mark.parametrize(("fps", "stride"), [(25, 4), (25, 400), (1, 4), (0.5, 1)])
def test_sound_far_ahead_of_its_frames(fps: float, stride: int) -> None:
    """All of it at once, before the first frame: the server, which keeps a minute, gets it as the frames come."""
    backlog = Backlog(DEMO, stride)
    server = Server(backlog, stride, in_flight=4)
    frames = 2500 if fps == 25 else 100
    tone = (np.arange(200 * 16_000) % 997 / 997).astype(np.float32)
    backlog.add_sound(0, tone, 0)
    server.send(flush=True)
    for i in range(frames):
        backlog.add_frame(np.zeros((112, 192, 3), np.uint8), i / fps, i / fps)
        if i % 300 == 299:
            server.send()
            server.answer(9)
        if i == 1000:
            server.lose()
    backlog.finish(0)
    server.drain(2)
    assert backlog.done
    assert [w.frame_index for w in server.found] == list(range(8, frames - 7, stride))
    for w in server.found:
        at = round(w.time_s * 16_000) - 8304
        inside = np.arange(max(at, 0), min(at + 16_608, len(tone)))
        np.testing.assert_array_equal(w.audio[inside - at], tone[inside])
        assert w.heard == pytest.approx(len(inside) / 16_608)


def test_sound_of_another_clock_does_not_hold_windows_back() -> None:
    """An hour ahead, it says only that there is none for these frames."""
    backlog = Backlog(DEMO, 4)
    server = Server(backlog, 4, in_flight=2)
    for i in range(60):
        backlog.add_frame(np.zeros((112, 192, 3), np.uint8), i / 25, i / 25)
        backlog.add_sound(3600 * 16_000 + 640 * i, TONE[:640], i / 25)
        server.send()
        server.answer(2)
    backlog.finish(3)
    server.drain(2)
    assert backlog.done
    assert [(w.frame_index, w.heard) for w in server.found] == [(i, 0) for i in range(8, 53, 4)]


def test_dropped_windows_are_not_computed() -> None:
    backlog = Backlog(DEMO, 1)
    server = Server(backlog, 1, in_flight=2)
    backlog.end_sound(0)
    dropped = []
    for i in range(60):
        backlog.add_frame(np.full((112, 192, 3), i, np.uint8), i / 25, i / 25)
        while len(backlog.ready) > 3:
            dropped.append(backlog.drop())
        if i % 5 == 0:
            server.send()
            server.answer(1)
        if i == 40:
            server.lose()
    backlog.finish(60 / 25)
    server.drain(1)
    found = [w.frame_index for w in server.found]
    assert len(dropped) > 20
    assert sorted(found + dropped) == list(range(8, 53))
    assert found == sorted(found)


def test_late_sound() -> None:
    """The server must come to the same opinion of what is late, or the client waits for ever."""
    backlog = Backlog(DEMO, 4)
    server = Server(backlog, 4, in_flight=2)
    for i in range(150):
        backlog.add_frame(np.full((112, 192, 3), i, np.uint8), i / 25, i / 25)
        if i < 20 or i >= 110:  # 3.6 s are missing
            backlog.add_sound(640 * i, TONE[640 * i : 640 * i + 640], i / 25)
        server.send()
        server.answer(2)
    backlog.finish(6)
    server.drain(2)
    assert backlog.done
    assert [w.frame_index for w in server.found] == list(range(8, 143, 4))
    assert [w.heard == 1 for w in server.found[-4:-2]] == [True, True]


@pytest.mark.parametrize("sound", ["never", "late", "in bursts with gaps"])
@pytest.mark.parametrize(("stride", "drop"), [(1, False), (1, True), (4, False), (4, True)])
@pytest.mark.parametrize("seed", range(3))
def test_sound_that_comes_late_or_never(sound: str, stride: int, drop: bool, seed: int) -> None:
    """From a source that is too quick for the server. Each window comes once or was dropped, no more than is allowed is
    on its way at once, and the client knows what was heard."""
    rng = random.Random(f"{sound} {stride} {drop} {seed}")
    backlog = Backlog(DEMO, stride)
    server = Server(backlog, stride, in_flight=rng.randint(1, 4))
    dropped: list[int] = []
    late: dict[int, bool] = {}
    frames, heard, burst = 250, 0, rng.randint(20_000, 60_000)
    for i in range(frames):
        now = i / 25
        if sound == "late" and now > 3:
            backlog.add_sound(heard, TONE[heard : heard + 640], now)
            heard += 640
        while sound == "in bursts with gaps" and heard + burst < 640 * i:
            for start in range(heard, heard + burst, 4000):
                backlog.add_sound(start, TONE[start : start + 3680], now)
            heard += burst
        backlog.add_frame(np.full((112, 192, 3), i, np.uint8), now, now)
        while drop and len(backlog.ready) > 2:
            dropped.append(backlog.drop())
        server.send(flush=i % 12 == 0)
        late |= {window.index: window.late for window in backlog.sent}
        assert len(backlog.sent) <= server.in_flight + (sound == "in bursts with gaps")  # a gap may complete one more
        if i % 5 == 0:
            server.answer(1)
        if rng.random() < 0.01:
            server.lose()
    backlog.finish(frames / 25)
    for _ in range(1000):
        server.send()
        late |= {window.index: window.late for window in backlog.sent}
        server.answer(2)
    assert backlog.done
    found = [w.frame_index for w in server.found]
    assert found == sorted(found)
    assert sorted(found + dropped) == list(range(8, frames - 7, stride))
    assert all(w.heard < 1 for w in server.found if late[w.frame_index])


@pytest.mark.parametrize(("fps", "quiet_s"), [(25, 50), (60, 25)])
def test_windows_that_were_dropped_for_long(fps: int, quiet_s: int) -> None:
    """A server that lives and answers nothing for a while makes none of them then."""
    backlog = Backlog(DEMO, 1)
    server = Server(backlog, 1, in_flight=2)
    image = np.zeros((112, 192, 3), np.uint8)
    backlog.end_sound(0)
    dropped: list[int] = []
    for i in range(fps * quiet_s):
        backlog.add_frame(image, i / fps, i / fps)
        while len(backlog.ready) > 2:
            dropped.append(backlog.drop())
        server.send()
    assert len(dropped) > 1100
    backlog.finish(quiet_s)
    made = 0
    while not backlog.done:
        server.send()
        made += len(server.on_their_way[:1])
        server.answer(1)
    assert made == len(server.found) == fps * quiet_s - 15 - len(dropped)


def test_of_sound_that_overlaps_the_first_counts() -> None:
    """By a little too, which is within what a time stamp is rounded by."""
    backlog = Backlog(DEMO, 4)
    server = Server(backlog, 4, in_flight=4)
    half = np.full(8000, 0.5, np.float32)
    for start in (0, 7900, 15_000):
        backlog.add_sound(start, (start > 0) * half + 0.25, 0)
    for i in range(16):
        backlog.add_frame(np.zeros((112, 192, 3), np.uint8), i / 25, 0)
    backlog.finish(1)
    server.drain(1)
    (window,) = server.found
    at = 640 * 8 - 8304
    assert set(window.audio[-at : 8000 - at]) == {0.25}
    assert set(window.audio[8000 - at :]) == {0.75}


def test_a_short_stream() -> None:
    backlog = Backlog(DEMO, 4)
    server = Server(backlog, 4, in_flight=2)
    for i in range(3):
        backlog.add_frame(np.full((112, 192, 3), i, np.uint8), i / 25, i / 25)
    server.send(flush=True)
    server.lose()
    backlog.finish(1)
    server.send()
    server.answer(1)
    assert backlog.done
    (window,) = server.found
    assert (window.frame_index, window.video[:, 0, 0, 0].tolist()) == (2, [0, 1, *[2] * 14])
