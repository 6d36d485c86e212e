"""What a client holds of a stream: what is to be sent, what was sent and is not answered, and so may be sent again."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from mubic_deploy.config import AUDIO_SAMPLES, SAMPLE_RATE, Config
from mubic_deploy.live.streams import MAX_FRAMES
from mubic_deploy.live.timeline import Timeline
from mubic_deploy.media.sound import excerpt_start

SOUND_KEPT_S = 600.0  # of sound without frames
MAX_SOUND = 30 * SAMPLE_RATE  # samples of a request, about
AHEAD_S = 10.0  # that sound is sent before its frames, and that frames of a request are apart: the server keeps only so
# much sound (`timeline.SOUND_KEPT_S`), and the first of these frames needs some of before it
PIECE = SAMPLE_RATE // 10  # samples of sound that are kept together
_BEGINNING = -(1 << 62)  # before any sample


@dataclass(frozen=True)
class Waiting:
    """A window that is complete.

    k        its number
    index    of its middle frame
    until    the frame with which it is complete
    ready_s  when it became so, on the client's clock
    late     its sound was waited for in vain"""

    k: int
    index: int
    until: int
    ready_s: float
    late: bool


@dataclass
class Request:
    """New frames and new sound for the server; `skip`: middle frames of windows that are not wanted."""

    start: bool
    end: bool = False
    frames: list[np.ndarray] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    sound: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    sound_start: int = 0
    sound_end: bool = False
    skip: list[int] = field(default_factory=list)


class Backlog:
    """One run of a stream: from its start, or from a jump of its clock, to its end or to the next jump.

    Frames and sound stay until the maps of all the windows that need them have come, so that a new sequence can begin
    where the last one broke off. Frames are held back so that only a number of windows is on its way: where a server
    is too slow, windows wait here. For one thread at a time.

    ready    complete windows that were not sent, oldest first
    sent     windows that were sent and are not answered, oldest first"""

    def __init__(self, config: Config, stride: int, first: int = 0) -> None:
        """first: number of the run's first frame in the stream. UserError for a stride below 1."""
        self.timeline = Timeline(config, stride, SOUND_KEPT_S)
        self.ready: deque[Waiting] = deque()
        self.sent: deque[Waiting] = deque()
        self.next_index = self._first = first  # of the frame that comes next
        self.finished = False  # nothing more is fed
        self._config, self._stride = config, stride
        self._captured: dict[int, float] = {}  # when each frame was fed
        self._dropped: deque[int] = deque()  # middle frames, of which a new sequence must tell the server
        self._begin()

    def _begin(self) -> None:
        self._started = self._ended = self._told_end = False
        self._sent_frame = -1
        self._sent_sound: int | None = None  # the sample up to which sound was sent
        first = self.ready[0].index if self.ready else self.next_index
        self._skip = [index for index in self._dropped if index > first]

    @property
    def done(self) -> bool:
        """Everything was fed and answered, and the server knows that nothing more comes."""
        return self.finished and not self.ready and not self.sent and (self._ended or not self._started)

    # ---- what comes in; `now_s` is the client's clock

    def add_frame(self, image: np.ndarray, time_s: float, now_s: float, captured_s: float | None = None) -> None:
        """image: uint8 [H, W, 3] of the model's size; captured_s: when it was there, if not just now. UserError: see
        `Timeline.check_frames`."""
        self.timeline.add_frame(image, time_s, self.next_index)
        self._captured[self.next_index] = now_s if captured_s is None else captured_s
        self.next_index += 1
        self._note(self.timeline.advance(), now_s)

    def add_sound(self, start: int, samples: np.ndarray, now_s: float) -> int:
        """samples: float32 [n], the first one at sample `start`. What is known already is cut off. -> how many of the
        oldest samples had to go for these."""
        heard = self.timeline.heard
        if heard is not None and start < heard:
            start, samples = heard, samples[heard - start :]
        parts = range(0, len(samples), PIECE)
        gone = sum(self.timeline.add_sound(start + at, samples[at : at + PIECE]) for at in parts)
        self._note(self.timeline.advance(), now_s)
        return gone

    def end_sound(self, now_s: float) -> None:
        self.timeline.end_sound()
        self._note(self.timeline.advance(), now_s)

    def finish(self, now_s: float) -> None:
        """Nothing more comes."""
        self.finished = True
        self._note(self.timeline.finish(), now_s)

    @property
    def cut_off(self) -> int:
        """Windows that began and would need frames that come after `finish`."""
        first = max(self._first, self.next_index - self._config.frames + 1)
        begun = range(-(-first // self._stride) * self._stride, self.next_index, self._stride)
        short = self._first == 0 and 0 < self.next_index < self._config.frames  # it makes a window of what there is
        return len(begun) - short

    def _note(self, complete: Iterable[int], now_s: float) -> None:
        timeline = self.timeline
        for k in complete:
            late = not self._has_sound(k)
            # where sound is late, the server must see from the frames how late it is
            until = timeline.last_index if late else min(self._last(k), timeline.last_index)
            self.ready.append(Waiting(k, timeline.middle(k)[0], until, now_s, late))

    def _look_again(self) -> None:
        """Sound that was late may have come meanwhile, or ended: then the server waits no longer than for any other
        window, and gets no frames beyond."""
        for i, window in enumerate(self.ready):
            if window.late and self._has_sound(window.k):
                until = min(self._last(window.k), self.timeline.last_index)
                self.ready[i] = replace(window, late=False, until=until)

    def _has_sound(self, k: int) -> bool:
        """Whether all the sound of a window that there will be is there."""
        heard = self.timeline.heard
        return self.timeline.sound_ended or (heard is not None and heard >= self._stop(k))

    def _last(self, k: int) -> int:
        return k * self._stride + self._config.frames - 1

    def _stop(self, k: int) -> int:
        """The sample at which a window's sound ends."""
        return excerpt_start(self.timeline.middle(k)[1]) + AUDIO_SAMPLES

    # ---- what goes out

    def drop(self) -> int:
        """Gives up the oldest window that was not sent. -> its middle frame."""
        window = self.ready.popleft()
        self._dropped.append(window.index)
        self._skip.append(window.index)
        self._forget()
        return window.index

    def begin_again(self) -> None:
        """The sequence is lost: the next request starts another one, with the oldest window that was not answered."""
        self.ready.extendleft(reversed(self.sent))
        self.sent.clear()
        self._begin()

    def request(self, in_flight: int, flush: bool = False) -> Request | None:
        """What to send next, so that at most `in_flight` windows are on their way; None if there is nothing.

        flush: also what completes no window yet. Call it until it gives None."""
        if self._ended:
            return None
        self._look_again()
        room = in_flight - len(self.sent)
        going = list(self.ready)[: max(0, room)]
        ending = self.finished and self._started
        if not going and (self.ready or not (ending or (flush and room > 0))):
            return None
        request = Request(start=not self._started)
        free = len(going) == len(self.ready) and not self.finished  # nothing is to be held back
        until, stop = self.timeline.last_index, math.inf
        if going and not free:
            until = going[-1].until
            stop = math.inf if going[-1].late else self._stop(going[-1].k)
        frames = self._next_frames(until if going or free else -1)
        whole = self._take_sound(request, min(stop, self._reach(frames)))
        if whole:
            self._take_frames(request, frames)
        while self.ready and self._is_sent(self.ready[0]):  # the sound alone may complete one
            self.sent.append(self.ready.popleft())
        if whole:
            request.end = self._ended = self.finished and not self.ready
        if not (request.frames or len(request.sound) or request.sound_end or request.end):
            return None
        # windows of later frames go with those, so that no request has more of them than the server looks at
        request.skip = [index for index in self._skip if index <= self._sent_frame]
        self._skip = [index for index in self._skip if index > self._sent_frame]
        self._started = True
        return request

    def _is_sent(self, window: Waiting) -> bool:
        """Whether the server has all that completes the window."""
        if window.until > self._sent_frame:
            return False
        if window.late or self._told_end:
            return True
        return self._sent_sound is not None and self._sent_sound >= self._stop(window.k)

    def _next_frames(self, until: int) -> list[tuple[int, float, np.ndarray]]:
        """Number, time and image of those that are sent together: the first is sent in any case."""
        found: list[tuple[int, float, np.ndarray]] = []
        for frame in self.timeline.frames(self._sent_frame + 1, until):
            if len(found) == MAX_FRAMES or (found and frame[1] > found[0][1] + AHEAD_S):
                break
            found.append(frame)
        return found

    def _reach(self, frames: list[tuple[int, float, np.ndarray]]) -> float:
        """The sample up to which sound is sent with these frames, or after the newest, or before the first."""
        time_s = frames[-1][1] if frames else self.timeline.last_s
        if math.isfinite(time_s):
            return (time_s + AHEAD_S) * SAMPLE_RATE
        held = self.timeline.sound(_BEGINNING)
        return held[0][0] + AHEAD_S * SAMPLE_RATE if held else math.inf

    def _take_frames(self, request: Request, frames: list[tuple[int, float, np.ndarray]]) -> None:
        for index, time_s, image in frames:
            request.frames.append(image)
            request.indices.append(index)
            request.times.append(time_s)
            self._sent_frame = index

    def _take_sound(self, request: Request, stop: float) -> bool:
        """The next sound without a gap in it, until `stop` is reached. Of what lies behind a gap over `stop` one sample
        goes: only that says that the gap is one. -> whether that was all to `stop`."""
        taken: list[np.ndarray] = []
        start = end = 0
        whole, held_back = True, False
        for at, samples in self.timeline.sound(self._sound_from()):
            if self._sent_sound is not None and self._sent_sound >= stop:
                held_back = True
                break
            if taken and (at != end or end - start >= MAX_SOUND):
                whole = False
                break
            start = start if taken else at
            if stop < at + len(samples):
                samples, held_back = samples[: max(1, math.ceil(stop) - at)], True
            taken.append(samples)
            end = self._sent_sound = at + len(samples)
        if taken:
            request.sound, request.sound_start = np.concatenate(taken), start
        if self.timeline.sound_ended and whole and not held_back and not self._told_end:
            request.sound_end = self._told_end = True
        return whole

    def _sound_from(self) -> int:
        """The first sample that the server has not got and may need."""
        if self._sent_sound is not None:
            return self._sent_sound
        first = self._first_needed()
        return _BEGINNING if first is None else excerpt_start(self.timeline.middle(first)[1])

    # ---- what is answered

    def answered(self, index: int) -> tuple[Waiting, float] | None:
        """The window of middle frame `index`, and when that frame was fed; it is done now. None if nobody waits for
        it. Windows before it that were not answered will not be."""
        if not any(window.index == index for window in (*self.sent, *self.ready)):
            return None
        while True:
            window = (self.sent or self.ready).popleft()
            if window.index == index:
                break
        captured = self._captured[index]
        self._forget()
        return window, captured

    def give_up_sent(self) -> list[int]:
        """Middle frames of the windows that were sent: the server is through with all and did not answer them."""
        lost = [window.index for window in self.sent]
        self.sent.clear()
        self._forget()
        return lost

    def _first_needed(self) -> int | None:
        """Number of the first window that is not done; None where none is complete."""
        return self.sent[0].k if self.sent else self.ready[0].k if self.ready else None

    def _forget(self) -> None:
        first = self._first_needed()
        self.timeline.forget(first)
        while self._dropped and (first is None or self._dropped[0] < self.timeline.middle(first)[0]):
            self._dropped.popleft()
        kept = next((index for index, _, _ in self.timeline.frames(0, self.next_index)), self.next_index)
        while self._captured and (oldest := next(iter(self._captured))) < kept:
            del self._captured[oldest]
