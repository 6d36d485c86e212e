"""A film's sound as 16 kHz mono, placed by its time stamps and read only as far as it is needed."""

from __future__ import annotations

from collections.abc import Generator

import av
import numpy as np

from mubic_deploy.config import AUDIO_SAMPLES, SAMPLE_RATE
from mubic_deploy.media.source import another_clock, demux, is_another_clock, open_again, sound_of

SHORTEST = SAMPLE_RATE // 80  # samples that a block has on average, at least
JOINED = SAMPLE_RATE // 10  # samples of a block up to which what goes on from it is joined to it
JUMP_S = 0.01  # time stamps that stray less than this are rounding: the sound runs on without a seam
NOTABLE_S = 0.25  # missing sound worth a warning


def excerpt_start(time_s: float) -> int:
    """First sample of the excerpt centred on a frame at `time_s` (eq. 3.2, whose `2/n_samples` is a misprint of
    `n_samples/2`). Negative where the excerpt starts before the film."""
    return round(time_s * SAMPLE_RATE) - AUDIO_SAMPLES // 2


class Blocks:
    """Sound that lies on the time line, in blocks by the number of their first sample. Between them is silence."""

    def __init__(self) -> None:
        self._blocks: list[tuple[int, np.ndarray]] = []  # (first sample, float32 [n])
        self._trimmed = -(1 << 62)  # nothing before this sample is needed any more
        self.held = 0  # samples in memory

    def add(self, start: int, samples: np.ndarray) -> None:
        """samples: float32 [n], 16 kHz. Where blocks overlap the later one counts."""
        if start + len(samples) <= self._trimmed:
            return
        self.held += len(samples)
        if self._blocks:
            at, last = self._blocks[-1]
            if start == at + len(last) and len(last) + len(samples) <= JOINED:
                self._blocks[-1] = at, np.concatenate([last, samples])
                return
        self._blocks.append((start, samples))

    def trim(self, start: int) -> None:
        """Forgets the blocks that end before sample `start`."""
        self._trimmed = start
        self._blocks = [(at, block) for at, block in self._blocks if at + len(block) > start]
        self.held = sum(len(block) for _, block in self._blocks)

    def keep(self, count: int) -> int:
        """Forgets the blocks that were added first, until `count` samples or fewer are held, in as many blocks as they
        would be in if each had SHORTEST. -> how many samples went."""
        before = self.held
        while self.held > count or len(self._blocks) > count // SHORTEST:
            self.held -= len(self._blocks.pop(0)[1])
        return before - self.held

    def excerpt(self, start: int, count: int = AUDIO_SAMPLES) -> np.ndarray:
        """float32 [count] in [-1, 1]: the samples from `start` on, zero where there are none."""
        out = np.zeros(count, np.float32)
        for at, block in self._blocks:
            begin, end = max(at, start), min(at + len(block), start + count)
            if begin < end:
                out[begin - start : end - start] = block[begin - at : end - at]
        return np.clip(out, -1, 1, out=out)

    def covered(self, start: int, count: int = AUDIO_SAMPLES) -> int:
        """How many of these samples lie in a block."""
        there = np.zeros(count, bool)
        for at, block in self._blocks:
            there[max(at - start, 0) : max(at + len(block) - start, 0)] = True
        return int(there.sum())

    def pieces(self, start: int) -> list[tuple[int, np.ndarray]]:
        """What lies at `start` and after it: (first sample, float32 [n]), in the order it was added."""
        return [(max(at, start), block[max(start - at, 0) :]) for at, block in self._blocks if at + len(block) > start]


class Placer:
    """Puts decoded sound on the time line as 16 kHz mono, by its time stamps.

    Channels are mixed by FFmpeg's downmix with weights that sum to 1, so that full scale stays in [-1, 1]; what floats
    of a file exceed it by is cut off. Time stamps that stray by less than 10 ms are rounding; one that strays by more,
    as that of a clock that drifts does in the end, is where the sound goes on."""

    def __init__(self) -> None:
        self.position = 0  # where the next resampled sample belongs
        self.damaged = 0  # frames that FFmpeg cannot mix, or that are not finite
        self.start_s: float | None = None
        self.end_s = 0.0
        self._resampler: av.AudioResampler | None = None
        self._kind: tuple[str, str, int] | None = None
        self.next_s = 0.0  # when the next decoded frame should start

    def push(self, frame: av.AudioFrame) -> list[tuple[int, np.ndarray]]:
        """The next decoded frame -> (first sample, float32 [n]) of what came out of the resampler."""
        if not frame.samples or not frame.sample_rate:
            return []
        out = []
        time_s = self.next_s if frame.time is None else frame.time
        kind = (frame.format.name, frame.layout.name, frame.sample_rate)
        if kind != self._kind or abs(time_s - self.next_s) > JUMP_S:
            out = self.flush()
            self._kind, self.next_s = kind, time_s
            self.position = round(time_s * SAMPLE_RATE)
            self._resampler = resampler()
        if self.start_s is None:
            self.start_s = time_s
        self.next_s += frame.samples / frame.sample_rate
        self.end_s = max(self.end_s, self.next_s)
        frame.pts = None  # placed here; the resampler must not compensate
        assert self._resampler is not None
        try:
            return out + self._placed(self._resampler.resample(known_layout(frame)))
        except av.FFmpegError:
            self.damaged += 1
            self._kind = self._resampler = None  # the next frame is where its own time stamp says
            return out

    def flush(self) -> list[tuple[int, np.ndarray]]:
        """What the resampler still holds, at the end or before a jump."""
        if self._resampler is None:
            return []
        rest, self._resampler = self._resampler.resample(None), None
        return self._placed(rest)

    def _placed(self, frames: list[av.AudioFrame]) -> list[tuple[int, np.ndarray]]:
        out = []
        for frame in frames:
            if frame is None:  # a resampler with nothing to do hands the end of the stream through
                continue
            samples = np.array(frame.to_ndarray()[0], np.float32)
            if not np.isfinite(samples).all():  # floats of a file can be anything
                samples[~np.isfinite(samples)] = 0
                self.damaged += 1
            out.append((self.position, np.clip(samples, -1, 1, out=samples)))
            self.position += len(samples)
        return out


class Sound:
    """The sound of `source` (`sound_of`), in bounded memory: excerpts must be asked for in increasing time."""

    def __init__(self, source: str, name: str) -> None:
        self._source, self._name = source, name
        self._container = open_again(source)
        sound = sound_of(self._container)
        assert sound is not None, "it is asked for where a film has one"
        self._stream = sound
        self._frames = self._decode()
        self._blocks = Blocks()
        self._placer = Placer()
        self._damaged = False
        self._end: int | None = None  # the sample up to which there was sound
        self.finished = False

    def close(self) -> None:
        self._frames.close()  # it holds this object, which would wait with its decoder for the garbage collector
        self._container.close()

    def excerpt(self, time_s: float) -> np.ndarray:
        """float32 [16608] in [-1, 1], 16 kHz, centred on `time_s` seconds of the film's clock; zero where the film
        has no sound."""
        start = excerpt_start(time_s)
        self._blocks.trim(start)
        while not self.finished and self.position < start + AUDIO_SAMPLES:
            for at, samples in self.read():
                self._blocks.add(at, samples)
        return self._blocks.excerpt(start)

    def read(self) -> list[tuple[int, np.ndarray]]:
        """What is decoded next: (first sample, float32 [n]) of each piece. Where time stamps go back, what is known
        already counts, and only what is new comes. `finished` is set at the end. UserError where they are of
        another clock."""
        frame = next(self._frames, None)
        if frame is None:
            self.finished = True
            pieces = self._placer.flush()
        else:
            last_s = None if self._placer.start_s is None else self._placer.next_s
            if last_s is not None and frame.time is not None and is_another_clock(last_s, frame.time):
                raise another_clock(self._source, last_s, frame.time)
            pieces = self._placer.push(frame)
        new = []
        for at, samples in pieces:
            known = 0 if self._end is None else max(0, self._end - at)
            if known < len(samples):
                new.append((at + known, samples[known:]))
                self._end = at + len(samples)
        return new

    @property
    def position(self) -> int:
        """Up to which sample there was sound; 0 before the first."""
        return self._end or 0

    def warnings(self, first_s: float, last_s: float) -> list[str]:
        """What was missing for a film whose frames run from `first_s` to `last_s`, one line each."""
        name, found = self._name, []
        start_s, end_s = self._placer.start_s, self._placer.end_s
        if start_s is None:
            return [f"the sound of {name} cannot be decoded: it is predicted as silent"] if self.finished else []
        if start_s > first_s + NOTABLE_S:
            found.append(f"the sound of {name} starts at {start_s:.2f} s: silence is used before")
        if self.finished and end_s < last_s - NOTABLE_S:
            found.append(f"the sound of {name} ends at {end_s:.2f} s of {last_s:.2f} s: silence is used after")
        elif self._damaged or self._placer.damaged:
            found.append(f"the sound of {name} is damaged: silence is used where it cannot be decoded")
        return found

    def _decode(self) -> Generator[av.AudioFrame]:
        packets = demux(self._container, self._stream, self._source)
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                return
            except av.FFmpegError:
                self._damaged = True
                return
            try:
                yield from packet.decode()
            except av.FFmpegError:
                self._damaged = True


def resampler() -> av.AudioResampler:
    """To 16 kHz mono float. By default FFmpeg lets float mixes exceed full scale (stereo by 3 dB, 5.1 by 11 dB)."""
    return av.AudioResampler("fltp", "mono", SAMPLE_RATE, options={"rematrix_maxval": "1.0"})


def is_named(layout: av.AudioLayout) -> bool:
    return not layout.name.endswith(" channels")


def is_ambisonic(layout: av.AudioLayout) -> bool:
    return layout.name.startswith("ambisonic")


def known_layout(frame: av.AudioFrame) -> av.AudioFrame:
    """FFmpeg mixes only channels of loudspeakers: unnamed ones ("6 channels") are averaged here, to mono, and of
    ambisonic sound the first counts, which hears all directions alike (W)."""
    ambisonic = is_ambisonic(frame.layout)
    if is_named(frame.layout) and not ambisonic:
        return frame
    planar = av.AudioResampler(frame.format.planar).resample(frame)[0].to_ndarray()
    planar = planar[:1] if ambisonic else planar
    full = 1.0 if planar.dtype.kind == "f" else 2.0 ** (8 * planar.itemsize - 1)
    zero = 128 if planar.dtype == np.uint8 else 0
    mono = ((planar.astype(np.float64) - zero) / full).mean(axis=0, keepdims=True)
    out = av.AudioFrame.from_ndarray(mono.astype(np.float32), "fltp", "mono")
    out.sample_rate, out.pts = frame.sample_rate, frame.pts
    if frame.time_base is not None:
        out.time_base = frame.time_base
    return out
