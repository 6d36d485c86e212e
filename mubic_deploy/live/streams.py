"""What the server keeps of its live streams: their state, its limits, and what a request is checked for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Hashable, Mapping

import numpy as np

from mubic_deploy.config import SAMPLE_RATE, Config
from mubic_deploy.errors import UserError
from mubic_deploy.live.packets import Decoder
from mubic_deploy.live.settings import MAX_IN_FLIGHT, RAW, StreamSettings, check_encoding
from mubic_deploy.live.timeline import FRAMES_WAIT, SOUND_KEPT_S, Timeline, Window
from mubic_deploy.pipeline import check_sound

MAX_FRAMES = 64  # of a request
RECLAIM_S = 5.0  # a stream that says nothing for so long makes room for another one, if there is none
SETTINGS = ("STRIDE", "SEED", "STEPS", "ENCODING", "SOUND_RATE")  # of a stream's first request
UNKNOWN = "no stream is known under this correlation id"
FULL = "the server holds"

Arrays = Mapping[str, np.ndarray]


class Stream:
    """One stream. Its settings come with its first request.

    seed, steps  of its maps
    waiting      windows that are complete and not yet answered; whoever answers them counts them off
    turn         held by whoever answers, so that a stream's maps come in order
    last_s       when its last request came"""

    def __init__(self, config: Config, arrays: Arrays) -> None:
        """UserError for settings out of range."""
        size = config.height, config.width
        self._config = config
        self._timeline = Timeline(config, _one(arrays, "STRIDE", 4))
        self.seed = _one(arrays, "SEED", 0)
        self.steps = config.check_steps(_one(arrays, "STEPS", config.default_steps))
        if self.seed < 0:
            raise UserError(f"seed {self.seed} is negative: use 0 or more")
        rate = _one(arrays, "SOUND_RATE", SAMPLE_RATE)
        if rate != SAMPLE_RATE:
            raise UserError(f"sound of {rate} Hz: resample it to {SAMPLE_RATE} Hz, mono, and send that")
        encoding = check_encoding(_text(arrays, "ENCODING", RAW))
        self._decode = None if encoding == RAW else Decoder(encoding, size)
        self._encoding = encoding
        self._skipped: set[int] = set()
        self.waiting = 0
        self.turn = asyncio.Lock()
        self.last_s = 0.0

    def push(self, arrays: Arrays, end: bool) -> list[Window]:
        """The windows that a request completes. UserError if something in it cannot be; then nothing of it is taken,
        but after a packet that does not decode H.264 does not go on."""
        timeline = self._timeline
        if self.waiting > MAX_IN_FLIGHT and not end:
            raise UserError(f"{self.waiting} windows of this stream wait for their maps: send no more before those")
        sound = arrays.get("SOUND", np.zeros(0, np.float32))
        start = self._sound_start(arrays)
        timeline.check_sound(start, len(sound))
        if len(sound) > SOUND_KEPT_S * SAMPLE_RATE:
            raise UserError(f"a request holds {len(sound) / SAMPLE_RATE:.0f} s of sound: send {SOUND_KEPT_S:g} at most")
        check_sound(sound, "SOUND")
        frames, indices, times = self._frames(arrays)  # last of what is checked: a decoder does not go back
        self._skip(arrays)
        # sound first: no window shall go without sound that is in the same request
        timeline.add_sound(start, np.array(sound))
        if _one(arrays, "SOUND_END", 0):
            timeline.end_sound()
        windows = []
        for frame, index, time_s in zip(frames, indices, times, strict=True):
            timeline.add_frame(frame, time_s, index)
            windows += self._complete(end=False)
        windows += self._complete(end)
        self.waiting += len(windows)
        return windows

    def _complete(self, end: bool) -> list[Window]:
        timeline, found = self._timeline, []
        for k in timeline.finish() if end else timeline.advance():
            if timeline.middle(k)[0] not in self._skipped:
                found.append(timeline.cut(k))
        timeline.forget()
        return found

    def _frames(self, arrays: Arrays) -> tuple[list[np.ndarray], list[int], list[float]]:
        """New frames, their numbers and their times."""
        given, other = ("FRAMES", "PACKETS") if self._decode is None else ("PACKETS", "FRAMES")
        if other in arrays:
            raise UserError(f"{other} in a stream that began with ENCODING {self._encoding}: send {given}")
        data = arrays.get(given, ())
        if len(data) > MAX_FRAMES:
            raise UserError(f"a request holds {len(data)} frames: send {MAX_FRAMES} at most")
        times = [float(t) for t in arrays.get("FRAME_TIME", ())]
        first = self._timeline.last_index + 1
        indices = [int(i) for i in arrays.get("FRAME_INDEX", range(first, first + len(data)))]
        if not len(data) == len(times) == len(indices):
            raise UserError(
                f"{len(data)} frames with {len(times)} time stamps and {len(indices)} numbers: send FRAME_TIME, and "
                f"FRAME_INDEX if there is one, for each"
            )
        self._timeline.check_frames(indices, times)  # before a decoder goes on
        if self._decode is None:
            return [np.array(frame) for frame in data], indices, times  # the request's memory is not ours
        return [self._decode(bytes(packet)) for packet in data], indices, times

    def _sound_start(self, arrays: Arrays) -> int:
        """The number of the new sound's first sample on the stream's clock."""
        if "SOUND_TIME" in arrays:
            time_s = float(arrays["SOUND_TIME"].flat[0])
            return round(time_s * SAMPLE_RATE) if np.isfinite(time_s) else 1 << 62
        return self._timeline.heard or 0

    def _skip(self, arrays: Arrays) -> None:
        self._skipped.update(int(i) for i in arrays.get("SKIP", ())[: 4 * FRAMES_WAIT])
        if len(self._skipped) > 4 * FRAMES_WAIT:  # what is behind is never looked at again
            self._skipped = set(sorted(self._skipped)[-4 * FRAMES_WAIT :])


class Streams:
    """All streams of a server, by correlation id. For one thread."""

    def __init__(self, config: Config, settings: StreamSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self._config, self._settings, self._clock = config, settings, clock
        self._streams: dict[Hashable, Stream] = {}
        self._ended: list[Stream] = []  # and replaced ones: they are held until their last windows are answered

    def push(self, key: Hashable, start: bool, end: bool, arrays: Arrays) -> tuple[Stream, list[Window]]:
        """One request of a sequence -> its stream and the windows that it completes. UserError: see `Stream`; for a
        request of a stream that did not start or was dropped; and if there are too many streams. The state of a stream
        is let go with its last request."""
        self.expire()
        if start:
            self._let_go(key)
            self._make_room()
            self._streams[key] = Stream(self._config, arrays)
        stream = self._streams.get(key)
        if stream is None:
            raise UserError(
                f"{UNKNOWN}: it did not start, or was dropped after {self._settings.idle_s:g} s: begin anew"
            )
        if end:
            self._let_go(key)
        stream.last_s = self._clock()
        odd = [] if start else [name for name in SETTINGS if name in arrays]
        if odd:
            raise UserError(f"{', '.join(odd)} after the stream's start: settings are for its first request")
        try:
            return stream, stream.push(arrays, end)
        except UserError:
            if start:  # a sequence whose first request is refused did not begin
                self._streams.pop(key, None)
            raise

    def expire(self) -> None:
        """Drops the streams that were idle for too long, and the ended ones that are answered."""
        before = self._clock() - self._settings.idle_s
        for key in [key for key, stream in self._streams.items() if not stream.waiting and stream.last_s < before]:
            del self._streams[key]
        self._ended = [stream for stream in self._ended if stream.waiting]

    def _let_go(self, key: Hashable) -> None:
        if key in self._streams:
            self._ended.append(self._streams.pop(key))

    def _make_room(self) -> None:
        self._ended = [stream for stream in self._ended if stream.waiting]
        held = len(self._streams) + len(self._ended)
        if held < self._settings.max_streams:
            return
        idle = [(stream.last_s, key) for key, stream in self._streams.items() if not stream.waiting]
        last_s, key = min(idle, key=lambda pair: pair[0], default=(self._clock(), None))
        if self._clock() - last_s < RECLAIM_S:
            raise UserError(f"{FULL} {held} streams, as many as it may: try again later")
        del self._streams[key]


def _one(arrays: Arrays, name: str, default: int) -> int:
    return int(arrays[name].flat[0]) if name in arrays else default


def _text(arrays: Arrays, name: str, default: str) -> str:
    return bytes(arrays[name].flat[0]).decode(errors="replace") if name in arrays else default
