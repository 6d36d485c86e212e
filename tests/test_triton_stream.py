"""A stream of clips through the server."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from triton_serving import clips

from mubic_deploy.errors import UserError
from mubic_deploy.pipeline import Pipeline
from mubic_deploy.triton.client import TritonPredictor
from mubic_deploy.triton.server import TritonServer
from mubic_deploy.triton.stream import Point, peak, stream_clips, summarize

pytest_plugins = ("triton_fixtures",)


@dataclass
class Clip:
    video: np.ndarray
    audio: np.ndarray
    frame_index: int
    time_s: float


def windows(pipeline: Pipeline, count: int) -> list[Clip]:
    video, audio = clips(pipeline.config, count)
    return [Clip(video[i], audio[i], 8 + 2 * i, (8 + 2 * i) / 25) for i in range(count)]


class Slow:
    """A predictor that answers after a while, the first ones last. The map of clip i has its peak in column i."""

    config: Any = None

    def __init__(self) -> None:
        self.waiting = self.most = 0
        self.lock = threading.Lock()

    def predict_async(self, video: np.ndarray, *_: object) -> Future:
        future: Future = Future()
        index = int(video[0, 0])
        with self.lock:
            self.waiting += 1
            self.most = max(self.most, self.waiting)

        def answer() -> None:
            with self.lock:
                self.waiting -= 1
            saliency = np.zeros((1, 4, 32), np.float32)
            saliency[0, 1, index] = 0.75
            future.set_result((saliency, np.array([[4]], np.int32)))

        threading.Timer(0.05 if index % 3 else 0.15, answer).start()
        return future


def numbered(count: int) -> Iterator[Any]:
    for i in range(count):
        yield SimpleNamespace(video=np.array([i]), audio=np.zeros(1), frame_index=i, time_s=i / 25)


def test_points_of_a_film(toy_server: TritonServer, toy_pipeline: Pipeline) -> None:
    film = windows(toy_pipeline, 6)
    with TritonPredictor(toy_server.url) as predictor:
        points = list(stream_clips(film, predictor, seed=2, steps=4, in_flight=3))
    assert [(p.frame_index, p.time_s) for p in points] == [(c.frame_index, c.time_s) for c in film]
    for point, clip in zip(points, film, strict=True):
        saliency, _ = toy_pipeline.predict(clip.video[None], clip.audio[None], 2, 4)
        assert (point.x, point.y) == peak(saliency[0])
        assert point.peak == pytest.approx(saliency.max(), abs=1e-5)
        assert point.steps_used == 4
        assert 0 < point.latency_s <= point.done_s


def test_order_and_number_in_flight() -> None:
    predictor = Slow()
    points = list(stream_clips(numbered(20), predictor, in_flight=4))  # type: ignore[arg-type]
    assert [p.frame_index for p in points] == list(range(20))
    assert [p.x for p in points] == [(i + 0.5) / 32 for i in range(20)]
    assert {p.y for p in points} == {1.5 / 4}
    assert predictor.most == 4
    assert points[0].latency_s == pytest.approx(0.15, abs=0.08)


def test_an_answer_does_not_wait_for_the_next_clip() -> None:
    def live() -> Iterator[Any]:
        yield from numbered(2)
        time.sleep(1)
        yield from numbered(1)

    stream = stream_clips(live(), Slow(), in_flight=4)  # type: ignore[arg-type]
    start = time.monotonic()
    next(stream)
    next(stream)
    assert time.monotonic() - start < 0.7
    stream.close()  # type: ignore[attr-defined]


def test_peak_in_the_film(toy_server: TritonServer, toy_pipeline: Pipeline) -> None:
    (clip,) = windows(toy_pipeline, 1)
    saliency, _ = toy_pipeline.predict(clip.video[None], clip.audio[None], 0)
    with TritonPredictor(toy_server.url) as predictor:
        (point,) = stream_clips([clip], predictor, lambda found: found[::-1])
    x, y = peak(saliency[0])
    assert (point.x, point.y) == pytest.approx((x, 1 - y))


def test_reading_has_ended_when_the_stream_is_closed() -> None:
    reading = []

    def film() -> Iterator[Any]:
        for clip in numbered(32):
            reading.append(True)
            time.sleep(0.05)
            reading.pop()
            yield clip

    stream = stream_clips(film(), Slow(), in_flight=2)  # type: ignore[arg-type]
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert not reading
    time.sleep(0.1)
    assert not reading


def test_errors_reach_the_reader(toy_server: TritonServer, toy_pipeline: Pipeline) -> None:
    def torn() -> Iterator[Clip]:
        yield from windows(toy_pipeline, 2)
        raise UserError("the film is cut off")

    film = windows(toy_pipeline, 3)
    film[1].audio = film[1].audio[:7]
    with TritonPredictor(toy_server.url) as predictor:
        stream = stream_clips(torn(), predictor)
        assert [next(stream).frame_index, next(stream).frame_index] == [8, 10]
        with pytest.raises(UserError, match="the film is cut off"):
            next(stream)
        stream = stream_clips(film, predictor)
        assert next(stream).frame_index == 8
        with pytest.raises(UserError, match="AUDIO must be float32"):
            next(stream)
        with pytest.raises(UserError, match="0 requests in flight are too few"):
            next(stream_clips(film, predictor, in_flight=0))


def test_summary() -> None:
    points = [
        Point(i, i / 25, 0.5, 0.5, 1.0, 4, latency, done)
        for i, (latency, done) in enumerate([(0.1, 0.1), (0.2, 0.3), (0.3, 0.4), (0.4, 0.8), (1.0, 2.0)])
    ]
    summary = summarize(points)
    assert (summary.maps, summary.median_s, summary.maps_per_s) == (5, 0.3, 2.5)
    assert summary.p95_s == pytest.approx(0.88)  # between the 4th and the 5th: 0.4 + 0.8 * 0.6
    with pytest.raises(UserError, match="shorter than one clip"):
        summarize([])
