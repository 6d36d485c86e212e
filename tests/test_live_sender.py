"""The client's thread, against servers that do what a real one seldom does."""

from __future__ import annotations

import functools
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


def feed(sender: Sender, frames: int, fps: float, drop: bool = False) -> None:
    """So many more frames, without sound. drop: gives up the windows that are too many."""
    with sender.changed:
        backlog = sender.backlogs[-1]
        backlog.end_sound(time.monotonic())
        for _ in range(frames):
            backlog.add_frame(np.zeros((112, 192, 3), np.uint8), backlog.next_index / fps, time.monotonic())
            if drop:
                sender.drop()
        sender.changed.notify_all()


def wait_for(sender: Sender, what: Callable[[], Any], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    with sender.changed:
        while not what():
            assert time.monotonic() < end, "it did not happen"
            sender.changed.wait(0.02)


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


def test_a_server_that_forgets_every_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes what begins one and knows nothing of it afterwards. Once it is begun again at once, as after a rest;
    then it is an outage, with its pauses and its end."""
    made = []

    def forgetful(link: FakeLink, request: str, windows: list[Window]) -> None:
        if link not in made:
            made.append(link)
            link.done(request)
        else:
            link.receive(link, Answer(error="no stream is known", passing=True, forgotten=True))

    gaps: list[Gap] = []
    sender = started(monkeypatch, forgetful, Limits(8, 4, 10.0, 1.0), gaps)
    feed(sender, 20, 1)  # of whose windows each takes two requests
    wait_for(sender, lambda: sender.failure, 6)
    assert "gave no answer for 1 s (no stream is known)" in str(sender.failure)
    assert 3 <= len(made) <= 8
    assert gaps == []
    sender.close()


def found(sender: Sender, maps: int) -> bool:
    return len(sender.results) == maps


def test_a_sequence_is_begun_again_at_once_after_each_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where maps come in between."""
    forgotten = []

    def answer(link: FakeLink, request: str, windows: list[Window]) -> None:
        if request == "2" and link not in forgotten:
            forgotten.append(link)
            link.receive(link, Answer(error="no stream is known", passing=True, forgotten=True))
            return
        for window in windows:
            link.map(request, window)
        link.done(request)

    gaps: list[Gap] = []
    sender = started(monkeypatch, answer, Limits(8, 1, 10.0, 60.0), gaps)
    for count in (20, 24, 28):
        feed(sender, count - sender.backlogs[-1].next_index, 25)
        wait_for(sender, functools.partial(found, sender, (count - 12) // 4))
    assert len(forgotten) >= 2
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


@pytest.mark.parametrize("answered_late", [False, True])
def test_an_outage_begins_with_the_silence(monkeypatch: pytest.MonkeyPatch, answered_late: bool) -> None:
    """Not when it is noticed: with the oldest request that was not answered, or with an answer after that one; and
    what was dropped since then is lost."""
    sent: list[tuple[float, FakeLink, str, list[Window]]] = []

    def answer(link: FakeLink, request: str, windows: list[Window]) -> None:
        sent.append((time.monotonic(), link, request, windows))
        if len(sent) == 1 or link is not sent[0][1]:
            for window in windows:
                link.map(request, window)
            link.done(request)

    monkeypatch.setattr(FakeLink, "lives", lambda link: False)
    gaps: list[Gap] = []
    sender = started(monkeypatch, answer, Limits(2, 2, 1.0, 30.0), gaps)
    feed(sender, 16, 25)
    wait_for(sender, lambda: sender.results)
    time.sleep(0.5)
    feed(sender, 4, 25)
    wait_for(sender, lambda: len(sent) == 2)
    feed(sender, 4, 25)
    wait_for(sender, lambda: len(sent) == 3)
    began = sent[1][0]  # two windows are on their way, of frames 12 and 16
    time.sleep(0.3)
    feed(sender, 20, 25, drop=True)  # five more, of which two wait
    before = 3
    if answered_late:
        began = time.monotonic()
        _, link, request, windows = sent[1]
        link.map(request, windows[0])
        link.done(request)
        time.sleep(0.2)  # one that waits takes its place
        before = 0
    feed(sender, 24, 25, drop=True)
    wait_for(sender, lambda: gaps)
    over = time.monotonic()
    ((kind, seconds, text),) = [(gap.kind, gap.seconds, gap.text) for gap in gaps]
    assert kind == "connection"
    assert seconds == pytest.approx(over - began, abs=0.1)
    assert seconds > 1.0
    # six more windows came, for the places that were left
    lost = before + 6 - answered_late
    assert text.endswith(f"for {seconds:.1f} s (no answer for 1 s): {lost} window(s) lost")
    assert gaps[0].time_s == pytest.approx((43 if answered_late else 19) / 25)
    sender.close()
