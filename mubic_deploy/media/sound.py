"""A film's sound as 16 kHz mono, placed by its time stamps and read only as far as it is needed."""

from __future__ import annotations

from collections.abc import Iterator

import av
import numpy as np

from mubic_deploy.config import AUDIO_SAMPLES, SAMPLE_RATE

JUMP_S = 0.01  # time stamps that stray less than this are rounding: the sound runs on without a seam
NOTABLE_S = 0.25  # missing sound worth a warning


def excerpt_start(time_s: float) -> int:
    """First sample of the excerpt centred on a frame at `time_s` (eq. 3.2, whose `2/n_samples` is a misprint of
    `n_samples/2`). Negative where the excerpt starts before the film."""
    return round(time_s * SAMPLE_RATE) - AUDIO_SAMPLES // 2


class Sound:
    """The first sound track of `source`, in bounded memory: excerpts must be asked for in increasing time.

    Channels are mixed by FFmpeg's downmix with weights that sum to 1, so that full scale stays in [-1, 1]."""

    def __init__(self, source: str, name: str) -> None:
        self._name = name
        self._container = av.open(source)
        self._stream = self._container.streams.audio[0]
        self._frames = self._decode()
        self._blocks: list[tuple[int, np.ndarray]] = []  # (first sample, float32 [n])
        self._trimmed = -(1 << 62)  # nothing before this sample is needed any more
        self._resampler: av.AudioResampler | None = None
        self._kind: tuple[str, str, int] | None = None
        self._position = 0  # where the next resampled sample belongs
        self._next_s = 0.0  # when the next decoded frame should start
        self._damaged = False
        self.finished = False
        self.start_s: float | None = None
        self.end_s = 0.0

    def close(self) -> None:
        self._container.close()

    def excerpt(self, time_s: float) -> np.ndarray:
        """float32 [16608] in [-1, 1], 16 kHz, centred on `time_s` seconds of the film's clock; zero where the film
        has no sound."""
        start = excerpt_start(time_s)
        stop = start + AUDIO_SAMPLES
        self._trimmed = start
        self._blocks = [(at, block) for at, block in self._blocks if at + len(block) > start]
        while not self.finished and self._position < stop:
            self._read()
        out = np.zeros(AUDIO_SAMPLES, np.float32)
        for at, block in self._blocks:
            begin, end = max(at, start), min(at + len(block), stop)
            if begin < end:
                out[begin - start : end - start] = block[begin - at : end - at]
        return np.clip(out, -1, 1, out=out)

    def warnings(self, first_s: float, last_s: float) -> list[str]:
        """What was missing for a film whose frames run from `first_s` to `last_s`, one line each."""
        name, found = self._name, []
        if self.start_s is None:
            return [f"the sound of {name} cannot be decoded: it is predicted as silent"] if self.finished else []
        if self.start_s > first_s + NOTABLE_S:
            found.append(f"the sound of {name} starts at {self.start_s:.2f} s: silence is used before")
        if self.finished and self.end_s < last_s - NOTABLE_S:
            found.append(f"the sound of {name} ends at {self.end_s:.2f} s of {last_s:.2f} s: silence is used after")
        elif self._damaged:
            found.append(f"the sound of {name} is damaged: silence is used where it cannot be decoded")
        return found

    def _decode(self) -> Iterator[av.AudioFrame]:
        packets = self._container.demux(self._stream)
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

    def _read(self) -> None:
        frame = next(self._frames, None)
        if frame is None:
            self._flush()
            self.finished = True
            return
        if not frame.samples or not frame.sample_rate:
            return
        time_s = self._next_s if frame.time is None else frame.time
        kind = (frame.format.name, frame.layout.name, frame.sample_rate)
        if kind != self._kind or abs(time_s - self._next_s) > JUMP_S:
            self._flush()
            self._kind, self._next_s = kind, time_s
            self._position = round(time_s * SAMPLE_RATE)
            self._resampler = resampler()
        if self.start_s is None:
            self.start_s = time_s
        self._next_s += frame.samples / frame.sample_rate
        self.end_s = max(self.end_s, self._next_s)
        frame.pts = None  # placed here; the resampler must not compensate
        assert self._resampler is not None
        self._append(self._resampler.resample(known_layout(frame)))

    def _flush(self) -> None:
        if self._resampler is not None:
            self._append(self._resampler.resample(None))
            self._resampler = None

    def _append(self, frames: list[av.AudioFrame]) -> None:
        for frame in frames:
            if frame is None:  # a resampler with nothing to do hands the end of the stream through
                continue
            samples = np.array(frame.to_ndarray()[0], np.float32)
            if self._position + len(samples) > self._trimmed:
                self._blocks.append((self._position, samples))
            self._position += len(samples)


def resampler() -> av.AudioResampler:
    """To 16 kHz mono float. By default FFmpeg lets float mixes exceed full scale (stereo by 3 dB, 5.1 by 11 dB)."""
    return av.AudioResampler("fltp", "mono", SAMPLE_RATE, options={"rematrix_maxval": "1.0"})


def is_named(layout: av.AudioLayout) -> bool:
    return not layout.name.endswith(" channels")


def known_layout(frame: av.AudioFrame) -> av.AudioFrame:
    """FFmpeg mixes only channels that it can name: unnamed ones ("6 channels") are averaged here, to mono."""
    if is_named(frame.layout):
        return frame
    planar = av.AudioResampler(frame.format.planar).resample(frame)[0].to_ndarray()
    full = 1.0 if planar.dtype.kind == "f" else 2.0 ** (8 * planar.itemsize - 1)
    zero = 128 if planar.dtype == np.uint8 else 0
    mono = ((planar.astype(np.float64) - zero) / full).mean(axis=0, keepdims=True)
    out = av.AudioFrame.from_ndarray(mono.astype(np.float32), "fltp", "mono")
    out.sample_rate, out.pts = frame.sample_rate, frame.pts
    if frame.time_base is not None:
        out.time_base = frame.time_base
    return out
