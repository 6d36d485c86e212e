"""A client of `mubic_stream` that goes on through restarts of the server, stalls, and jumps of the source's clock."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from types import TracebackType

import av
import numpy as np

from mubic_deploy import graphs
from mubic_deploy.config import SAMPLE_RATE, check_fit, check_seed
from mubic_deploy.errors import UserError, as_float, check_seconds, shown, whole
from mubic_deploy.live.backlog import SOUND_KEPT_S
from mubic_deploy.live.link import Settings
from mubic_deploy.live.report import Gap, LiveMap, Report
from mubic_deploy.live.sender import Limits, Sender
from mubic_deploy.live.settings import DROP, IN_FLIGHT, MAX_IN_FLIGHT, ON_LAG, QUEUE, RAW, WAITING, check_encoding
from mubic_deploy.live.timeline import MAX_TIME_S, check_stride
from mubic_deploy.media.film import Resizer
from mubic_deploy.media.fit import Fit, make_fit
from mubic_deploy.media.sound import NOTABLE_S
from mubic_deploy.pipeline import check_sound
from mubic_deploy.triton.client import TritonPredictor, destination

SILENCE_S = 1.0  # a source that gives no frame for so long has a gap


class StreamClient:
    """Frames and sound in, maps out, in the order of the stream:

        with StreamClient("127.0.0.1:8001") as client:
            client.frame(image, time_s)       # as they come, on one thread
            client.sound(samples, time_s)
            client.finish()
            for found in client:              # at any time, on another thread
                print(found.time_s, found.saliency.max(), found.latency_s)

    With one thread for both, `poll` after each frame: maps that nobody reads hold the stream back in the end.

    url          HOST:PORT or triton://HOST:PORT of gRPC
    stride       frames between two maps; seed, steps: see `Pipeline.predict`; fit: see `make_fit`, None for what the
                 model was trained with
    encoding     how frames travel: raw (the same maps as `predict`'s), jpeg or h264
    on_lag       where windows are complete faster than they are answered: queue (`frame` waits) or drop (the oldest
                 waiting window goes, counted)
    max_waiting  windows that may wait to be sent; in_flight: windows that are on their way. By default as `WAITING`
                 and `IN_FLIGHT` have them: few where old ones are dropped, so that maps are as new as the server can
                 make them
    timeout      seconds without any answer after which the server is asked whether it lives, on the same connection
                 too; if it does not say so, the connection counts as lost
    give_up_s    seconds of a lost connection after which the client gives up; also those without an answer of a
                 server that lives, after which it is asked again
    on_gap       is called with each `Gap`, on the thread that finds it; it should be quick

    A connection that is lost is made again, with growing pauses, and a new sequence begins with the oldest window that
    was not answered: its frames and its sound are kept until then. UserError when made: no such server, or a setting
    out of range; from `frame`, `sound`, `poll` and iteration: the server refused something, or is gone for good; from
    `frame` and `sound` also for what is no frame, sound or time: nothing of it is taken, and the stream can go on.
    Close it, or use `with`."""

    def __init__(
        self,
        url: str,
        *,
        stride: int = 4,
        seed: int = 0,
        steps: int | None = None,
        encoding: str = RAW,
        fit: str | None = None,
        on_lag: str = QUEUE,
        max_waiting: int | None = None,
        in_flight: int | None = None,
        timeout: float = 10.0,
        give_up_s: float = 60.0,
        on_gap: Callable[[Gap], None] | None = None,
    ) -> None:
        if on_lag not in ON_LAG:
            raise UserError(f"unknown on_lag {on_lag!r}: use {' or '.join(ON_LAG)}")
        max_waiting = WAITING[on_lag] if max_waiting is None else max_waiting
        in_flight = IN_FLIGHT[on_lag] if in_flight is None else in_flight
        max_waiting = whole("max_waiting", max_waiting, 1, unit=" windows")
        in_flight = whole("in_flight", in_flight, 1, MAX_IN_FLIGHT, " windows")
        seed = check_seed(seed)
        timeout, give_up_s = check_seconds("timeout", timeout), check_seconds("give_up_s", give_up_s)
        if fit is not None:
            check_fit(fit)
        self._on_lag, self._max_waiting = on_lag, max_waiting
        stride = check_stride(stride)
        check_encoding(encoding)
        address, model = destination(url)
        if model != graphs.ENSEMBLE:
            raise UserError(f"{url!r}: live streams are made by {graphs.ENSEMBLE}, not {model}: leave out its name")
        with TritonPredictor(address, shared_memory=False) as served:
            self.config, self.source = served.config, served.source
            served.require_streams()
        steps = self.config.check_steps(self.config.default_steps if steps is None else steps)
        self.fit: Fit | None = None  # known with the first frame
        self._fit_name = fit or self.config.fit
        self._resize = Resizer()
        self._interval_s = math.inf  # between the last two frames
        self._finished = False
        self._too_early = False  # sound, so that some of it was forgotten
        settings, limits = Settings(stride, seed, steps, encoding), Limits(max_waiting, in_flight, timeout, give_up_s)
        self._sender = Sender(address, self.config, settings, limits, on_gap)

    def __enter__(self) -> StreamClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection; what was not answered is given up."""
        self._sender.close()

    # ---- what comes in

    def frame(self, image: np.ndarray | av.VideoFrame, time_s: float, display: tuple[int, int] | None = None) -> int:
        """The next frame. image: uint8 [h, w, 3], RGB, or PyAV's, upright, of any size; time_s: seconds of the
        source's clock; display: (height, width) in square pixels, the image's by default; the first frame's counts.
        -> its number in the stream, from 0.

        Waits if the server is too slow and on_lag is queue. A time stamp that does not grow is a jump of the source's
        clock: after a gap the stream goes on with the new time."""
        captured = time.monotonic()
        time_s = _check_time(time_s, "the frame")
        small = self._fitted(image, display)
        sender = self._sender
        with sender.changed:
            if self._on_lag == QUEUE:
                sender.changed.wait_for(lambda: sender.over or sender.waiting < self._max_waiting)
            self._check_open()
            now = time.monotonic()
            self._look_for_a_gap(time_s, now)
            backlog = sender.backlogs[-1]
            backlog.add_frame(small, time_s, now, captured)
            self._fed()
            return backlog.next_index - 1

    def sound(self, samples: np.ndarray, time_s: float) -> None:
        """The next sound. samples: float32 [n], 16 kHz mono in [-1, 1] (a mix may exceed it, but 8 was not scaled);
        time_s: of the first one, on the same clock as the frames'. A time stamp that goes back by more than a second is
        a jump of the clock; what overlaps with earlier sound by less is cut off. It never waits: sound may come up to
        10 minutes before its frames."""
        time_s = _check_time(time_s, "the sound")
        if not isinstance(samples, np.ndarray) or samples.ndim != 1 or samples.dtype != np.float32:
            raise UserError(f"sound must be float32 [n], not {_kind(samples)}: convert it, 16 kHz mono in [-1, 1]")
        check_sound(samples, "the sound")
        if not self.config.has_audio:
            return
        start = round(time_s * SAMPLE_RATE)
        sender = self._sender
        with sender.changed:
            self._check_open()
            now = time.monotonic()
            timeline = sender.backlogs[-1].timeline
            heard = timeline.heard
            if timeline.sound_ended:  # before anything is noted
                timeline.check_sound(start, len(samples))
            ahead_s = 0.0 if heard is None else (start - heard) / SAMPLE_RATE
            if ahead_s < -SILENCE_S:
                text = f"the sound's clock goes back by {-ahead_s:.3f} s to {time_s:.3f} s"
                sender.jump(time_s, text, now)
            elif ahead_s > NOTABLE_S:
                text = f"the sound has a gap of {ahead_s:.3f} s before {time_s:.3f} s: silence is used"
                sender.note(Gap("sound", time_s - ahead_s, ahead_s, 0, text))
            gone_s = sender.backlogs[-1].add_sound(start, samples, now) / SAMPLE_RATE
            if gone_s and not self._too_early:
                text = f"sound came {SOUND_KEPT_S:g} s before its frames: the oldest {gone_s:.1f} s of it are forgotten"
                sender.note(Gap("sound", time_s, gone_s, 0, text))
            self._too_early = gone_s > 0
            self._fed()

    def end_sound(self) -> None:
        """There is no sound, or no more: windows do not wait for it."""
        with self._sender.changed:
            self._check_open()
            self._sender.backlogs[-1].end_sound(time.monotonic())
            self._fed()

    def finish(self) -> None:
        """Nothing more comes. The maps of what was fed still do."""
        with self._sender.changed:
            self._check_open()
            self._finished = True
            self._sender.backlogs[-1].finish(time.monotonic())
            self._sender.changed.notify_all()

    def _fed(self) -> None:
        """What follows wherever windows may have become complete; with the lock."""
        if self._on_lag == DROP:
            self._sender.drop()
        self._sender.changed.notify_all()

    def _fitted(self, image: np.ndarray | av.VideoFrame, display: tuple[int, int] | None) -> np.ndarray:
        if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape[2:] == (3,) and image.size:
            image = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), "rgb24")
        if not isinstance(image, av.VideoFrame):
            raise UserError(f"a frame must be uint8 [h, w, 3], RGB, or PyAV's, not {_kind(image)}: convert it")
        fit = self.fit
        if fit is None:
            size = _display((image.height, image.width) if display is None else display)
            fit = make_fit(self._fit_name, size, (self.config.height, self.config.width))
        small = fit.place(self._resize(image, fit.scaled, "rgb24").to_ndarray())
        self.fit = fit
        return small

    def _look_for_a_gap(self, time_s: float, now_s: float) -> None:
        before = self._sender.backlogs[-1].timeline.last_s
        if time_s <= before:
            text = f"the source's clock goes back from {before:.3f} s to {time_s:.3f} s"
            self._sender.jump(before, text, now_s)
            return
        apart = time_s - before
        if SILENCE_S < apart < math.inf and apart > 3 * self._interval_s:
            text = f"the source gave no frame from {before:.3f} s to {time_s:.3f} s"
            self._sender.note(Gap("clock", before, apart, 0, text))
        self._interval_s = apart

    def _check_open(self) -> None:
        if self._sender.failure is not None:
            raise self._sender.failure
        if self._sender.closed or self._finished:
            raise UserError("the stream was finished or closed: make a new client for another one")

    # ---- what comes out

    def __iter__(self) -> StreamClient:
        return self

    def __next__(self) -> LiveMap:
        found = self.poll(None)
        if found is None:
            raise StopIteration
        return found

    def poll(self, timeout: float | None = 0.0) -> LiveMap | None:
        """The next map, waiting for it up to `timeout` seconds, without end if None. None if there is none in this
        time, or none any more (`through`)."""
        sender = self._sender
        with sender.changed:
            sender.changed.wait_for(lambda: sender.results or sender.over or sender.through, timeout)
            if not sender.results:
                if sender.failure is not None:
                    raise sender.failure
                return None
            found = sender.results.popleft()
            sender.changed.notify_all()
        assert self.fit is not None
        return LiveMap(
            frame_index=int(found.tensors["MAP_INDEX"][0]),
            time_s=float(found.tensors["MAP_TIME"][0]),
            saliency=self.fit.back(found.tensors["SALIENCY"]),
            steps_used=int(found.tensors["STEPS_USED"][0]),
            heard=float(found.tensors["HEARD"][0]),
            latency_s=found.arrived_s - found.captured_s,
            wait_s=found.arrived_s - found.window.ready_s,
        )

    @property
    def through(self) -> bool:
        """Whether there will be no more maps: all were read after `finish`, or the client was closed."""
        with self._sender.changed:
            return (self._sender.through or self._sender.closed) and not self._sender.results

    @property
    def pending(self) -> int:
        """Complete windows whose maps were not read yet."""
        sender = self._sender
        with sender.changed:
            return sum(len(backlog.ready) + len(backlog.sent) for backlog in sender.backlogs) + len(sender.results)

    def report(self) -> Report:
        """How the stream goes."""
        with self._sender.changed:
            make = self._sender.report()
        return make()


def _check_time(time_s: float, what: str) -> float:
    number = as_float(time_s)
    if not abs(number) < MAX_TIME_S:
        raise UserError(f"{what} has the time stamp {shown(time_s)}: give seconds of the stream's clock")
    return number


def _display(given: tuple[int, int]) -> tuple[int, int]:
    try:
        height, width = given
    except (TypeError, ValueError):
        raise UserError(f"display cannot be {shown(given)}: give (height, width) in pixels") from None
    return whole("the display's height", height, 1, unit=" pixels"), whole("its width", width, 1, unit=" pixels")


def _kind(given: object) -> str:
    return f"{given.dtype} {list(given.shape)}" if isinstance(given, np.ndarray) else type(given).__name__
