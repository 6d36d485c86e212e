"""One stream's frames and sound by their time stamps, and the windows that they complete. NumPy only.

The server keeps one for each stream and cuts the windows; the client keeps one of what it may have to send again, and
knows from it which answers to wait for. Both go by the same rules, so they agree."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mubic_deploy.config import AUDIO_SAMPLES, SAMPLE_RATE, Config
from mubic_deploy.errors import UserError, whole
from mubic_deploy.media.sound import JUMP_S, Blocks, excerpt_start

SOUND_WAIT_S = 2.0  # sound that is later than this is missing: its window goes without
FRAMES_WAIT = 256  # frames of one window's wait for sound, whatever the frame rate
SOUND_KEPT_S = 60.0  # of sound without frames
BEHIND_S = 180.0  # of sound that is older than the newest frame, as it is wanted where frames are far apart
MAX_TIME_S = 2.0**33  # two and a half centuries


@dataclass(frozen=True)
class Window:
    """What the model sees, and the stream's frame that its map belongs to.

    frames       16 of uint8 [H, W, 3], RGB; the stream's own, to be read only
    audio        float32 [16608], 16 kHz in [-1, 1], centred on the middle frame (eq. 3.2 to 3.4)
    frame_index  of the middle frame in the stream, from 0
    time_s       its time stamp in seconds of the stream's clock
    heard        part of the excerpt that there was sound for, 0 to 1; what is missing is zero"""

    frames: tuple[np.ndarray, ...]
    audio: np.ndarray
    frame_index: int
    time_s: float
    heard: float

    @property
    def video(self) -> np.ndarray:
        """uint8 [16, H, W, 3]: a copy."""
        return np.stack(self.frames)


def check_stride(stride: int) -> int:
    """`stride` if it is 1 to 2^31 - 1, else UserError."""
    return whole("stride", stride, 1, 2**31 - 1, " frames")


class Timeline:
    """Frames and sound of one stream, in bounded memory.

    Window k is made of the frames k * stride .. k * stride + 15, as in a film (`media.clips`). It is complete as soon
    as its 16 frames are there and one of these is true:

    - the sound has arrived up to the end of its excerpt, middle frame + 8304 samples (0.519 s),
    - the stream has no sound, or it has ended (`end_sound`),
    - the frames are SOUND_WAIT_S, or FRAMES_WAIT frames, past the end of its excerpt's half: the sound is missing.

    A window of which a frame was left out is never complete and is passed over. What a window's excerpt lacks is
    zero. All times are seconds of one clock, the stream's."""

    def __init__(self, config: Config, stride: int = 4, kept_s: float = SOUND_KEPT_S) -> None:
        """kept_s: sound of this length at most is held, and as much of BEHIND_S as the next window needs. UserError
        for a stride that is none."""
        self.stride = check_stride(stride)
        self._config = config
        self._kept, self._behind = round(kept_s * SAMPLE_RATE), round(BEHIND_S * SAMPLE_RATE)
        self._frames: dict[int, tuple[float, Any]] = {}  # by index, oldest first
        self._sound = Blocks()
        self._heard: int | None = None  # the sample up to which sound has arrived
        self._sound_ended = not config.has_audio
        self._first = self._last = -1  # indices of the first and the newest frame
        self._last_s = -math.inf
        self._next: int | None = None  # window that `advance` looks at next

    @property
    def last_index(self) -> int:
        """Of the newest frame; -1 before the first."""
        return self._last

    @property
    def last_s(self) -> float:
        """Time of the newest frame; minus infinity before the first."""
        return self._last_s

    @property
    def heard(self) -> int | None:
        """The sample, of 16 kHz on the stream's clock, up to which sound has arrived. None before the first."""
        return self._heard

    @property
    def sound_ended(self) -> bool:
        return self._sound_ended

    @property
    def held(self) -> tuple[int, int]:
        """Frames and samples in memory."""
        return len(self._frames), self._sound.held

    def check_frames(self, indices: Sequence[int], times: Sequence[float]) -> None:
        """UserError unless these can be the next frames: both grow, and times are seconds."""
        if len(indices) != len(times):
            raise UserError(f"{len(indices)} frame numbers for {len(times)} time stamps: give one of each a frame")
        index, time_s = self._last, self._last_s
        for i, t in zip(indices, times, strict=True):
            if not abs(t) < MAX_TIME_S:
                raise UserError(f"frame {i} has the time stamp {t}: give seconds of the stream's clock")
            if t <= time_s:
                raise UserError(
                    f"time stamps go back or stand still: frame {i} is at {t:.6f} s, the one before at "
                    f"{time_s:.6f} s: begin a new stream where the clock jumps"
                )
            if i <= index:
                raise UserError(f"frame number {i} comes after {index}: number the frames from 0, one after the other")
            index, time_s = i, t

    def check_sound(self, start: int, count: int) -> None:
        """UserError unless `count` samples from `start` on can be the next sound. They may begin up to 10 ms before
        the end of the last ones: time stamps are rounded."""
        if count and self._sound_ended:
            raise UserError("sound came after the stream's sound had ended: begin a new stream, or send it earlier")
        if not abs(start) < MAX_TIME_S * SAMPLE_RATE:
            raise UserError(f"the sound's time stamp {start / SAMPLE_RATE} is none: give seconds of the stream's clock")
        if self._heard is not None and start < self._heard - JUMP_S * SAMPLE_RATE:
            raise UserError(
                f"time stamps of the sound go back: it goes on at {start / SAMPLE_RATE:.4f} s, but is known up to "
                f"{self._heard / SAMPLE_RATE:.4f} s: begin a new stream where the clock jumps"
            )

    def add_sound(self, start: int, samples: np.ndarray) -> int:
        """samples: float32 [n], 16 kHz mono, the first one at sample `start` of the stream's clock; what is known
        already is cut off. -> how many of the oldest had to go for them. UserError: see `check_sound`."""
        self.check_sound(start, len(samples))
        if self._heard is not None and start < self._heard:
            start, samples = self._heard, samples[self._heard - start :]
        if not len(samples):
            return 0
        self._sound.add(start, samples)
        end = start + len(samples)
        self._heard = end if self._heard is None else max(self._heard, end)
        behind = 0 if self._next is None else round(self._last_s * SAMPLE_RATE) - self._needed_from(self._next)
        return self._sound.keep(self._kept + min(behind, self._behind))

    def end_sound(self) -> None:
        """There is no sound, or no more."""
        self._sound_ended = True

    def add_frame(self, image: Any, time_s: float, index: int | None = None) -> None:
        """image: uint8 [H, W, 3], RGB, of the model's size; it is kept, not copied. index: of the frame in the
        stream, the last one's plus 1 by default. UserError: see `check_frames`."""
        index = self._last + 1 if index is None else index
        self.check_frames([index], [time_s])
        if self._next is None:
            self._first, self._next = index, -(-index // self.stride)
        if index % self.stride < self._config.frames:  # else it is in no window
            self._frames[index] = time_s, image
        self._last, self._last_s = index, time_s

    def advance(self) -> Iterator[int]:
        """The numbers k of the windows that became complete since the last call, in order."""
        while self._next is not None and self._last >= self._next * self.stride + self._config.frames - 1:
            k = self._next
            if not self._is_whole(k):
                self._next = self._after_gap(k)
            elif self._has_sound(k):
                self._next += 1
                yield k
            else:
                return

    def finish(self) -> Iterator[int]:
        """As `advance`, at the end of the stream: no sound is waited for any more. A stream that is shorter than a
        window makes one, window 0, with its last frame repeated."""
        self.end_sound()
        yield from self.advance()
        count = self._last + 1
        if self._first == 0 and count < self._config.frames and len(self._frames) == count:
            for index in range(count, self._config.frames):
                self._frames[index] = self._frames[count - 1]
            self._next = 1
            yield 0

    def forget(self, k: int | None = None) -> None:
        """Frees what only the windows before window k need; without k, before the next one to become complete."""
        k = self._next if k is None else k
        if k is None:
            return
        while self._frames and (oldest := next(iter(self._frames))) < k * self.stride:
            del self._frames[oldest]
        self._sound.trim(self._needed_from(k))

    def _needed_from(self, k: int) -> int:
        """The first sample of what window k hears, or of what it may hear: a frame that is still to come is later than
        the newest one."""
        middle = self._frames.get(k * self.stride + self._config.middle)
        return excerpt_start(self._last_s if middle is None else middle[0])

    def middle(self, k: int) -> tuple[int, float]:
        """Index and time stamp of the middle frame of a complete window. In a short stream it is the last one's."""
        index = min(k * self.stride + self._config.middle, self._last)
        return index, self._frames[index][0]

    def frames(self, first: int, last: int) -> Iterator[tuple[int, float, Any]]:
        """Number, time and image of each frame in memory from `first` to `last`."""
        for index, (time_s, image) in self._frames.items():
            if first <= index <= last:
                yield index, time_s, image

    def sound(self, start: int) -> list[tuple[int, np.ndarray]]:
        """The sound in memory from sample `start` on: first sample and float32 [n] of each piece."""
        return self._sound.pieces(start)

    def cut(self, k: int) -> Window:
        """Window k, complete and not yet forgotten."""
        index, time_s = self.middle(k)
        start = excerpt_start(time_s)
        audio, heard = self._sound.excerpt(start), self._sound.covered(start) / AUDIO_SAMPLES
        return Window(tuple(self._frames[i][1] for i in self._indices(k)), audio, index, time_s, heard)

    def _indices(self, k: int) -> range:
        return range(k * self.stride, k * self.stride + self._config.frames)

    def _after_gap(self, k: int) -> int:
        """The first window that lacks none of the frames that window k lacks: frame numbers may jump by any amount."""
        missing = next(i for i in reversed(self._indices(k)) if i not in self._frames)
        there = next((i for i in self._frames if i > missing), self._last + 1)
        return -(-there // self.stride)

    def _is_whole(self, k: int) -> bool:
        return all(i in self._frames for i in self._indices(k))

    def _has_sound(self, k: int) -> bool:
        _, time_s = self.middle(k)
        stop = excerpt_start(time_s) + AUDIO_SAMPLES
        if self._sound_ended or (self._heard is not None and self._heard >= stop):
            return True
        late = self._last_s - stop / SAMPLE_RATE > SOUND_WAIT_S
        return late or self._last - self._indices(k)[-1] >= FRAMES_WAIT
