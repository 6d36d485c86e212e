"""The client's thread, against servers that do what a real one seldom does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mubic_deploy.config import DEMO
from mubic_deploy.live import sender as module
from mubic_deploy.live.backlog import Request
from mubic_deploy.live.link import Answer, Settings, arrays
from mubic_deploy.live.report import Gap
from mubic_deploy.live.sender import Limits, Sender
from mubic_deploy.live.streams import Stream
from mubic_deploy.live.timeline import Window

SETTINGS = Settings(4, 0, 4, "raw")


class FakeLink:
    """A connection to a server that completes windows as the real one does; what becomes of a request's windows is
    `answer`'s to say."""

    answer: Callable[[FakeLink, str, list[Window]], None]

    def __init__(self, address: str, settings: Settings, size: tuple[int, int], receive: Callable[..., None]) -> None:
        self.bytes, self.count, self.receive = 0, 0, receive
        self.stream: Stream | None = None

    @property
    def next_id(self) -> str:
        return str(self.count + 1)

    def send(self, request: Request) -> None:
        self.count += 1
        tensors = arrays(request, SETTINGS)
        if request.start:
            self.stream = Stream(DEMO, tensors)
        assert self.stream is not None
        windows = self.stream.push(tensors, request.end)
        self.stream.waiting = 0
        type(self).answer(self, str(self.count), windows)

    def lives(self) -> bool:
        return True

    def close(self) -> None:
        pass

    def done(self, request: str) -> None:
        self.receive(self, Answer(request, final=True))

    def map(self, request: str, window: Window) -> None:
        tensors = {"MAP_INDEX": np.array([window.frame_index]), "MAP_TIME": np.array([window.time_s])}
        self.receive(self, Answer(request, tensors=tensors))


def started(
    monkeypatch: pytest.MonkeyPatch, answer: Callable[[Any, str, list[Window]], None], limits: Limits, gaps: list[Gap]
) -> Sender:
    monkeypatch.setattr(FakeLink, "answer", answer, raising=False)
    monkeypatch.setattr(module, "Link", FakeLink)
    return Sender("127.0.0.1:1", DEMO, SETTINGS, limits, gaps.append)


def feed(sender: Sender, frames: int, fps: float) -> None:
    """Frames without sound."""
    with sender.changed:
        sender.backlogs[-1].end_sound(time.monotonic())
        for i in range(frames):
            sender.backlogs[-1].add_frame(np.zeros((112, 192, 3), np.uint8), i / fps, time.monotonic())
        sender.changed.notify_all()


def wait_for(sender: Sender, what: Callable[[], Any], seconds: float = 10.0) -> None:
    with sender.changed:
        assert sender.changed.wait_for(what, seconds), "it did not happen"


@pytest.mark.parametrize("fps", [25, 1])
def test_a_model_that_fails_for_good(monkeypatch: pytest.MonkeyPatch, fps: float) -> None:
    """At 1 frame a second a window needs two requests, and the first of them is answered each time."""

    def failing(link: FakeLink, request: str, windows: list[Window]) -> None:
        if windows:
            link.receive(link, Answer(error="mubic: out of memory", passing=True))
        else:
            link.done(request)

    gaps: list[Gap] = []
    sender = started(monkeypatch, failing, Limits(8, 4, 10.0, 1.0), gaps)
    feed(sender, 20, fps)
    wait_for(sender, lambda: sender.failure, 6)
    assert "gave no answer for 1 s (mubic: out of memory)" in str(sender.failure)
    assert gaps == []
    sender.close()


def test_an_outage_before_any_window_is_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is over with any answer: no map is waited for."""
    down = threading.Event()
    down.set()

    def answer(link: FakeLink, request: str, windows: list[Window]) -> None:
        if down.is_set():
            link.receive(link, Answer(error="Server is stopping", passing=True))
        else:
            link.done(request)

    gaps: list[Gap] = []
    sender = started(monkeypatch, answer, Limits(8, 4, 10.0, 60.0), gaps)
    feed(sender, 3, 25)
    time.sleep(1)
    down.clear()
    wait_for(sender, lambda: gaps)
    assert [gap.kind for gap in gaps] == ["connection"]
    sender.close()


@pytest.mark.parametrize("alive", [True, False])
def test_a_server_that_has_much_to_do_is_waited_for(monkeypatch: pytest.MonkeyPatch, alive: bool) -> None:
    """One that lives is not asked twice for the same window; one that does not is."""
    late: list[tuple[FakeLink, str, Window]] = []
    asked: list[FakeLink] = []

    def slow(link: FakeLink, request: str, windows: list[Window]) -> None:
        late.extend((link, request, window) for window in windows)
        if not windows:
            link.done(request)

    def lives(link: FakeLink) -> bool:
        asked.append(link)
        return alive

    monkeypatch.setattr(FakeLink, "lives", lives)
    gaps: list[Gap] = []
    sender = started(monkeypatch, slow, Limits(8, 4, 0.3, 30.0), gaps)
    feed(sender, 16, 25)
    time.sleep(1.5)
    with sender.changed:
        assert 2 <= len(asked) <= 6  # again and again, not once
        assert len(set(asked)) == (1 if alive else len(asked))  # a new connection only where the old one is dead
        assert (len(late) == 1) == alive
    link, request, window = late[-1]
    if alive:
        link.map(request, window)
        link.done(request)
        wait_for(sender, lambda: sender.results)
        assert gaps == []
    sender.close()


def test_a_server_that_lives_and_sends_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    sender = started(monkeypatch, lambda *_: None, Limits(8, 4, 0.2, 1.0), [])
    feed(sender, 16, 25)
    wait_for(sender, lambda: sender.failure)
    assert "gave no answer for 1 s (it lives, but sent nothing for 1 s)" in str(sender.failure)
    sender.close()
