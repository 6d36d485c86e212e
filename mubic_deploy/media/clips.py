"""Clips: 16 frames and the sound around their middle one, cut from a film as it is read."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mubic_deploy.config import AUDIO_SAMPLES, Config
from mubic_deploy.errors import whole
from mubic_deploy.media.film import Film, Frame, Resizer
from mubic_deploy.media.fit import make_fit


@dataclass(frozen=True)
class Clip:
    """What the model sees, and the film's frame that its map belongs to.

    video        uint8 [16, H, W, 3], RGB
    audio        float32 [16608], 16 kHz in [-1, 1], centred on the middle frame (eq. 3.2 to 3.4)
    frame_index  of the middle frame in the film, from 0
    time_s       its time stamp in seconds of the film's own clock"""

    video: np.ndarray
    audio: np.ndarray
    frame_index: int
    time_s: float


class Clipper:
    """Cuts window k from frames k * stride .. k * stride + 15 as the frames are pushed."""

    def __init__(self, film: Film, config: Config, stride: int = 4, fit: str | None = None) -> None:
        """fit: that of `config` for None. UserError for an unknown one or a stride below 1."""
        whole("stride", stride, 1, unit=" frames")
        self.fit = make_fit(fit or config.fit, film.display, (config.height, config.width))
        self._film, self._config, self._stride = film, config, stride
        self._sound = film.sound() if config.has_audio else None
        self._resize = Resizer()
        self._window: deque[tuple[int, float, np.ndarray]] = deque(maxlen=config.frames)
        self._count = 0
        self._first_s = self._last_s = 0.0

    def push(self, frame: Frame) -> Clip | None:
        """The clip that this frame completes, if any. Frames must come in order, all of them."""
        self._first_s = self._first_s if self._count else frame.time_s
        self._last_s = frame.time_s
        self._count += 1
        if frame.index % self._stride >= self._config.frames:  # in no window
            return None
        small = self._resize(frame.image, self.fit.scaled, "rgb24").to_ndarray()
        self._window.append((frame.index, frame.time_s, self.fit.place(small)))
        start = frame.index - self._config.frames + 1
        return self._clip() if start >= 0 and start % self._stride == 0 else None

    def finish(self) -> Clip | None:
        """The clip of a film shorter than a window, its last frame repeated; None for any other film.

        Completes the film's warnings."""
        clip = None
        if 0 < self._count < self._config.frames:
            self._film.warnings.append(
                f"{self._film.name} has only {self._count} frame(s): the last one is repeated to make "
                f"{self._config.frames}"
            )
            self._window.extend([self._window[-1]] * (self._config.frames - self._count))
            clip = self._clip()
        if self._sound is not None:
            self._film.warnings += self._sound.warnings(self._first_s, self._last_s)
        return clip

    def close(self) -> None:
        if self._sound is not None:
            self._sound.close()

    def _clip(self) -> Clip:
        index, time_s, _ = self._window[self._config.middle]
        audio = np.zeros(AUDIO_SAMPLES, np.float32) if self._sound is None else self._sound.excerpt(time_s)
        return Clip(np.stack([small for _, _, small in self._window]), audio, index, time_s)


def read_clips(film: Film, config: Config, stride: int = 4, fit: str | None = None) -> Iterator[Clip]:
    """All clips of a film, at the configuration's size. A film shorter than 16 frames makes one clip."""
    clipper = Clipper(film, config, stride, fit)
    try:
        for frame in film.frames():
            clip = clipper.push(frame)
            if clip is not None:
                yield clip
        clip = clipper.finish()
        if clip is not None:
            yield clip
    finally:
        clipper.close()
