"""Clips of a film through a Triton server, several at once, with the maps' peaks in the film's order."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from mubic_deploy.errors import UserError
from mubic_deploy.triton.client import Result, TritonPredictor

_STOP_TIMEOUT = 10.0  # s


class Window(Protocol):
    """A clip of a film: what `stream_clips` reads of it."""

    @property
    def video(self) -> np.ndarray: ...  # uint8 [16, H, W, 3]
    @property
    def audio(self) -> np.ndarray: ...  # float32 [16608]
    @property
    def frame_index(self) -> int: ...  # of the film's frame that the map belongs to
    @property
    def time_s(self) -> float: ...  # of that frame


@dataclass(frozen=True)
class Point:
    """One map. x and y are the peak's position, 0..1 from the left and from the top. `latency_s` runs from sending the
    clip to its answer, `done_s` from the start of the stream to the answer."""

    frame_index: int
    time_s: float
    x: float
    y: float
    peak: float  # the map's value there, 0..1
    steps_used: int
    latency_s: float
    done_s: float


@dataclass(frozen=True)
class Summary:
    """Of a stream: how many maps, the latency of one in seconds (median and 95th percentile), and maps a second."""

    maps: int
    median_s: float
    p95_s: float
    maps_per_s: float


def summarize(points: Sequence[Point]) -> Summary:
    """UserError if there is no point."""
    if not points:
        raise UserError("the film has no window: it is shorter than one clip")
    latencies = [p.latency_s for p in points]
    median, p95 = np.percentile(latencies, (50, 95))
    return Summary(len(points), float(median), float(p95), len(points) / max(p.done_s for p in points))


def peak(saliency: np.ndarray) -> tuple[float, float]:
    """(x, y) of the largest value of a map [h, w], at the middle of its cell, both in 0..1."""
    row, column = np.unravel_index(np.argmax(saliency), saliency.shape)
    return (float(column) + 0.5) / saliency.shape[1], (float(row) + 0.5) / saliency.shape[0]


def stream_clips(
    clips: Iterable[Window],
    predictor: TritonPredictor,
    back: Callable[[np.ndarray], np.ndarray] | None = None,
    *,
    seed: int = 0,
    steps: int | None = None,
    in_flight: int = 4,
) -> Iterator[Point]:
    """A `Point` for each clip, in the order of the clips and as soon as it can be known.

    A thread reads `clips` and sends each one when there are less than `in_flight` (>= 1) unanswered, so a slow reader
    delays no answer and a slow server holds the reader back. back: takes a map [h, w] of the model's input to one over
    the film's frame, where its peak is looked for (`Fit.back`); without it the peak is one in the model's input. seed
    and steps: see `Pipeline.predict`; every clip starts from the same noise, which keeps a still scene's maps still.
    UserError: see `TritonPredictor.predict`; errors of `clips` pass through."""
    if in_flight < 1:
        raise UserError(f"{in_flight} requests in flight are too few: use 1 or more")
    sender = _Sender(clips, predictor, seed, steps, in_flight)
    sender.thread.start()
    try:
        while (sent := sender.sent.get()) is not None:
            if isinstance(sent, BaseException):
                raise sent
            yield sent.point(sender.start, back)
    finally:
        sender.stop()


@dataclass
class _Sent:
    """A clip on its way."""

    frame_index: int
    time_s: float
    start: float
    future: Future[Result]
    end: float = 0.0
    answered: threading.Event = field(default_factory=threading.Event)  # when `end` is known

    def point(self, stream_start: float, back: Callable[[np.ndarray], np.ndarray] | None) -> Point:
        self.answered.wait()
        maps, used = self.future.result()
        saliency = back(maps[0]) if back else maps[0]
        x, y = peak(saliency)
        return Point(
            frame_index=self.frame_index,
            time_s=self.time_s,
            x=x,
            y=y,
            peak=float(saliency.max()),
            steps_used=int(used[0, 0]),
            latency_s=self.end - self.start,
            done_s=self.end - stream_start,
        )


class _Sender:
    """The thread that reads clips and sends them. `sent` holds what it sent, an error that ended it, or None at the
    end."""

    def __init__(
        self, clips: Iterable[Window], predictor: TritonPredictor, seed: int, steps: int | None, in_flight: int
    ) -> None:
        self.clips, self.predictor, self.seed, self.steps = clips, predictor, seed, steps
        self.sent: queue.Queue[_Sent | BaseException | None] = queue.Queue()
        self.slots = threading.Semaphore(in_flight)
        self.wanted = True
        self.start = time.monotonic()
        self.thread = threading.Thread(target=self._run, name="mubic-stream", daemon=True)

    def stop(self) -> None:
        """Waits for the thread, so that the film can be closed. One that waits for a live source is left to itself."""
        self.wanted = False
        self.slots.release()
        self.thread.join(_STOP_TIMEOUT)

    def _run(self) -> None:
        try:
            for clip in self.clips:
                self.slots.acquire()
                if not self.wanted:
                    return
                self._send(clip)
            self.sent.put(None)
        except BaseException as error:  # it belongs to whoever reads the stream
            self.sent.put(error)

    def _send(self, clip: Window) -> None:
        start = time.monotonic()
        future = self.predictor.predict_async(clip.video[None], clip.audio[None], self.seed, self.steps)
        sent = _Sent(clip.frame_index, clip.time_s, start, future)

        def answered(_: Future[Result]) -> None:
            sent.end = time.monotonic()
            sent.answered.set()
            self.slots.release()

        future.add_done_callback(answered)
        self.sent.put(sent)
