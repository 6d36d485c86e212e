"""Clips with their ground truth, for training and evaluation: the layout's videos as the model sees them."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from mubic_deploy.config import AUDIO_SAMPLES, Config, check_seed
from mubic_deploy.errors import UserError, whole
from mubic_deploy.media.fit import Fit, make_fit
from mubic_deploy.media.sound import excerpt_start
from mubic_deploy.training.layout import (
    Video,
    decode,
    labelled,
    listing,
    open_image,
    read_density,
    read_fixations,
    read_sound,
    require_shape,
)

INT16 = 32_768.0
SOUNDS = ("own", "muted", "swapped", "shifted")
SHIFT_S = 1.0


@dataclass(frozen=True)
class GroundTruth:
    """What people looked at in a clip's label frame, at its own size, and where that frame lies in the input.

    frame      from 1
    density    float32 [H, W] in [0, 1]
    fixations  bool [H, W]"""

    video: Video
    frame: int
    density: np.ndarray
    fixations: np.ndarray
    fit: Fit


class Clips(Dataset[dict[str, torch.Tensor]]):
    """Windows of 16 frames, `stride` apart, each labelled by its median frame rounded half up.

    A video shorter than a window makes one clip with its last frame repeated. Clips whose label has no map, or an
    empty one, are left out; `skipped` counts them by video. Sounds stay in memory at 115 MB an hour."""

    def __init__(
        self,
        videos: Sequence[Video],
        config: Config,
        *,
        stride: int = 4,
        fit: str | None = None,
        flip: bool = False,
        jitter: bool = False,
        sound: str = "own",
        seed: int = 0,
    ) -> None:
        """Reads every sound and looks at every label, about 1 ms each.

        fit: one of FITS, that of `config` unless another is asked for.
        flip: mirrors half of the clips; jitter: starts each up to stride - 1 frames later. Both are drawn from (seed,
        epoch, index) alone. sound: `own`, or to see what it is worth `muted`, `swapped` for the next video's, or
        `shifted`, heard a second late. UserError for an unknown fit or sound, a stride or a seed that is none, a sound
        or a first frame that is missing, and what of these or of the maps is damaged."""
        whole("stride", stride, 1, unit=" frames")
        check_seed(seed)
        if sound not in SOUNDS:
            raise UserError(f"unknown sound {sound!r}: choose one of {', '.join(SOUNDS)}")
        if sound == "swapped" and len(videos) < 2:
            raise UserError("the sound of one video cannot be swapped with another's: give two videos or more")
        self.videos, self.config = tuple(videos), config
        self.skipped: dict[Video, int] = {}
        self._flip, self._seed, self._epoch = flip, seed, 0
        self._jitter = stride if jitter else 1  # how many starts are drawn from
        self._fits: list[Fit] = []
        self._sounds: list[np.ndarray] = []  # int16
        windows: list[tuple[int, int]] = []  # (video, first frame)
        for number, video in enumerate(self.videos):
            self._fits.append(_fit(video, fit or config.fit, config))
            self._sounds.append(_int16(read_sound(video.sound)) if config.has_audio else np.zeros(0, np.int16))
            starts = self._labelled_starts(number, stride)
            windows += [(number, start) for start in starts]
        self._windows = np.array(windows, np.int64).reshape(-1, 2)
        self._last: tuple[int, dict[int, np.ndarray]] = 0, {}  # the clip before's video, and its frames by number
        self._late_s = SHIFT_S if sound == "shifted" else 0.0
        if sound == "muted":
            self._sounds = [np.zeros(0, np.int16)] * len(self._sounds)
        elif sound == "swapped":
            self._sounds = self._sounds[1:] + self._sounds[:1]

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """VIDEO   uint8 [16, H, W, 3], RGB
        AUDIO   float32 [16608] in [-1, 1], 16 kHz, centred on the label frame; zero beyond the sound's ends
        TARGET  float32 [1, h, w] in [0, 1], peak 1, zero in the bars"""
        number, start, mirrored = drawn = self._drawn(index)
        inputs = self._inputs(*drawn)
        target = place_density(self._density(number, self._label(number, start)), self._fits[number], self.config)
        if mirrored:
            target = np.flip(target, 1).copy()
        return {**inputs, "TARGET": torch.from_numpy(target / target.max())[None]}

    def inputs(self, index: int) -> dict[str, torch.Tensor]:
        """VIDEO and AUDIO alone: the label is not read."""
        return self._inputs(*self._drawn(index))

    def _inputs(self, number: int, start: int, mirrored: bool) -> dict[str, torch.Tensor]:
        video, fit = self.videos[number], self._fits[number]
        shown = [min(start + i, video.frames) for i in range(self.config.frames)]
        last, known = self._last  # neighbours have most frames in common
        small = {i: known[i] for i in shown if i in known} if last == number else {}
        small |= {i: fit.place(_read_small(video.frame(i), fit)) for i in sorted(set(shown) - set(small))}
        self._last = number, small
        clip = np.stack([small[i] for i in shown])
        if mirrored:
            clip = np.flip(clip, 2).copy()
        time_s = (self._label(number, start) - 1) / video.fps - self._late_s
        return {"VIDEO": torch.from_numpy(clip), "AUDIO": torch.from_numpy(excerpt(self._sounds[number], time_s))}

    def set_epoch(self, epoch: int) -> None:
        """Chooses which clips are mirrored, and how much later each starts. Call it before the epoch's DataLoader
        iterator is made: its worker processes take their copy of this object then. `persistent_workers=True` would keep
        the old one."""
        self._epoch = epoch

    def spread(self, wanted: int) -> list[int]:
        """The indices of `wanted` clips (or of all), evenly over the set."""
        return sorted({int(i) for i in np.linspace(0, len(self) - 1, min(len(self), wanted))})

    def ground_truth(self, index: int) -> GroundTruth:
        """The label at its own size, never mirrored."""
        number, start = self._window(index)
        video, label = self.videos[number], self._label(number, start)
        density, fixations = self._density(number, label), read_fixations(video.fixations(label))
        if density.shape != fixations.shape:
            raise UserError(
                f"{video.fixations(label)} is not of its density map's size: get the data set's annotations again"
            )
        return GroundTruth(video, label, density, fixations, self._fits[number])

    def digest(self) -> str:
        """8 hex digits by which it is noticed that there are other clips: CRC-32 over their videos' numbers and first
        frames, and where they start later by chance over the maps that this goes by."""
        crc = zlib.crc32(self._windows.astype("<i8").tobytes())
        if self._jitter > 1:
            for video in self.videos:
                names = listing(video.map(1).parent)
                there = bytes(video.map(i).name in names for i in range(1, video.frames + 1))
                crc = zlib.crc32(there, crc)
        return f"{crc:08x}"

    def video(self, index: int) -> Video:
        """The video that a clip is cut from."""
        return self.videos[self._window(index)[0]]

    def _window(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"clip {index} of {len(self)}")
        number, start = self._windows[index].tolist()
        return number, start

    def _label(self, number: int, start: int) -> int:
        return min(start + self.config.middle, self.videos[number].frames)

    def _density(self, number: int, label: int) -> np.ndarray:
        """float32 [H, W] in [0, 1]. UserError if it is not of the frames' shape: it would be squeezed."""
        path = self.videos[number].map(label)
        density = read_density(path)
        require_shape(path, density.shape, self._fits[number].display)
        return density

    def _labelled_starts(self, number: int, stride: int) -> list[int]:
        """The first frames of the windows whose label has a map that is not empty; counts the others."""
        video, fit = self.videos[number], self._fits[number]
        starts = range(1, max(video.frames - self.config.frames, 0) + 2, stride)
        present = set(labelled(video))
        labels = {start: self._label(number, start) for start in starts}
        kept = [s for s, i in labels.items() if i in present and _has_label(video.map(i), fit, self.config)]
        self.skipped[video] = len(starts) - len(kept)
        return kept

    def _drawn(self, index: int) -> tuple[int, int, bool]:
        """(video, first frame, mirrored) of a clip in this epoch."""
        number, start = self._window(index)
        # counter-based: no state, so worker processes and resumed runs agree
        bits = int(np.random.Philox(key=self._seed, counter=[0, 0, self._epoch, index]).random_raw())
        later = start + (bits >> 1) % self._jitter
        if later != start and later + self.config.frames - 1 <= self.videos[number].frames:
            label = self.videos[number].map(self._label(number, later))
            start = later if label.is_file() and _has_label(label, self._fits[number], self.config) else start
        return number, start, bool(self._flip and bits & 1)


def place_density(density: np.ndarray, fit: Fit, config: Config) -> np.ndarray:
    """float32 [H, W] over the frame -> float32 [h, w] over the model's map, zero outside the frame.

    The map is half of the input in size, and a bar may end in the middle of a map pixel: so the density is placed as
    the frame is, then averaged over 2 x 2 pixels."""
    height, width = fit.scaled
    # linear in both directions: bicubic overshoots below zero, and Pillow's box shifts by parts of a pixel
    image = Image.fromarray(density).resize((width, height), Image.Resampling.BILINEAR)
    placed = fit.place(np.asarray(image)[..., None], bar=0)[..., 0]
    h, w = config.map_size
    return placed.reshape(h, fit.size[0] // h, w, fit.size[1] // w).mean((1, 3))


def excerpt(sound: np.ndarray, time_s: float) -> np.ndarray:
    """int16 [n], 16 kHz -> float32 [16608] in [-1, 1], centred on `time_s` (eq. 3.2 to 3.4), zero beyond the ends."""
    start = excerpt_start(time_s)
    out = np.zeros(AUDIO_SAMPLES, np.float32)
    inside = sound[max(start, 0) : max(start + AUDIO_SAMPLES, 0)]
    at = max(-start, 0)
    out[at : at + len(inside)] = inside / np.float32(INT16)
    return out


def _fit(video: Video, name: str, config: Config) -> Fit:
    with open_image(video.frame(1)) as image:
        width, height = image.size
    return make_fit(name, (height, width), (config.height, config.width))


def _int16(sound: np.ndarray) -> np.ndarray:
    """Exact for the 16-bit files that the layout holds."""
    return np.clip(np.rint(sound * INT16), -INT16, INT16 - 1).astype(np.int16)


def _read_small(path: Path, fit: Fit) -> np.ndarray:
    """uint8 [*fit.scaled, 3]. Averages where it shrinks (of Pillow's filters HAMMING is
    nearest to the one that films are read with), bicubic where it grows."""
    height, width = fit.scaled
    with open_image(path) as image:
        if image.size != fit.display[::-1]:
            raise UserError(
                f"{path} is {image.width}x{image.height}, but the video's first frame "
                f"{fit.display[1]}x{fit.display[0]}: make them all of one size"
            )
        image.draft("RGB", (width, height))  # JPEG decodes to 1/2, 1/4 or 1/8, never below the size asked for
        pixels = decode(image, path, "RGB")
    shrinks = height * width < pixels.height * pixels.width
    return np.asarray(pixels.resize((width, height), Image.Resampling.HAMMING if shrinks else Image.Resampling.BICUBIC))


def _has_label(path: Path, fit: Fit, config: Config) -> bool:
    """Whether anything is left of the map in the model's input."""
    cropped = fit.scaled[0] > fit.size[0] or fit.scaled[1] > fit.size[1]
    if not cropped:
        with open_image(path) as image:
            image.draft("L", (1, 1))  # to 1/8: most maps show here, at a fraction of the time
            # the average of 8 x 8 pixels; a faint one may be rounding, or lie in the padding of the last block
            if np.asarray(decode(image, path, "L")).max() > 4:
                return True
    return bool(place_density(read_density(path), fit, config).max() > 0)
