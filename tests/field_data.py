"""A tiny data set in the field's layout: a bright square moves over a background that tells the frame's number."""

from __future__ import annotations

import wave
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

from mubic_deploy.training.layout import Video

LEVEL = 8  # grey levels of the background by frame number
SQUARE = 8  # pixels
SPREAD = 3.0  # pixels, of the density around the square's centre
RATE = 44_100  # Hz
TONE_HZ = 440
TONE = 0.2  # amplitude, in the left channel only


@dataclass(frozen=True)
class Spec:
    name: str
    frames: int = 24
    fps: float = 25.0
    size: tuple[int, int] = (36, 64)  # height, width
    click: int = 13  # the frame at whose time the sound clicks


SPECS = (Spec("one"), Spec("two", fps=12.5, click=9), Spec("short", frames=6, click=6))


def write_field(root: Path, specs: Sequence[Spec] = SPECS, dataset: str = "Scenes", split: int = 1) -> list[Video]:
    """Writes the videos and lists all of them in both parts of the split."""
    videos = [Video(root, dataset, spec.name, spec.frames, spec.fps) for spec in specs]
    for spec, video in zip(specs, videos, strict=True):
        for path in (video.frame(1), video.map(1), video.sound):
            path.parent.mkdir(parents=True)
        for i in range(1, spec.frames + 1):
            _save(video.frame(i), picture(spec, i))
            _save(video.map(i), density(spec, i))
            savemat(video.fixations(i), {"eyeMap": fixations(spec, i)})
        write_sound(video.sound, sound(spec), RATE)
    lists = root / "fold_lists"
    lists.mkdir(exist_ok=True)
    for part in ("train", "test"):
        lines = [f"{spec.name} {spec.frames} {spec.fps:g}\n" for spec in specs]
        (lists / f"{dataset}_list_{part}_{split}_fps.txt").write_text("".join(lines))
    return videos


def corner(spec: Spec, i: int) -> tuple[int, int]:
    """(row, column) of the square's top left pixel."""
    height, width = spec.size
    return (height - SQUARE) // 2 - 3, SQUARE // 2 + (i - 1) * (width - 2 * SQUARE) // max(spec.frames - 1, 1)


def picture(spec: Spec, i: int) -> np.ndarray:
    """uint8 [h, w, 3]: all of LEVEL * i but the square, which is brighter."""
    image = np.full((*spec.size, 3), LEVEL * i, np.uint8)
    y, x = corner(spec, i)
    image[y : y + SQUARE, x : x + SQUARE] = 255
    return image


def density(spec: Spec, i: int) -> np.ndarray:
    """uint8 [h, w]: a Gaussian about the square's centre, with a peak below 255."""
    y, x = (c + SQUARE / 2 - 0.5 for c in corner(spec, i))
    rows, columns = np.ogrid[: spec.size[0], : spec.size[1]]
    return np.rint(200 * np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / (2 * SPREAD**2))).astype(np.uint8)


def fixations(spec: Spec, i: int) -> np.ndarray:
    """uint8 [h, w]: two people looked at the square."""
    out = np.zeros(spec.size, np.uint8)
    y, x = corner(spec, i)
    out[y + 3, x + 3] = out[y + 4, x + 5] = 1
    return out


def sound(spec: Spec) -> np.ndarray:
    """float [n, 2]: a tone on the left, and on both sides a click of 1 ms centred on the time of frame `click`."""
    times = np.arange(round(spec.frames / spec.fps * RATE)) / RATE
    out = np.zeros((len(times), 2))
    out[:, 0] = TONE * np.sin(2 * np.pi * TONE_HZ * times)
    out[np.abs(times - (spec.click - 1) / spec.fps) <= 0.0005] = 0.9
    return out


def write_sound(path: Path, samples: np.ndarray, rate: int) -> None:
    """samples: float [n, channels] in [-1, 1], as a 16-bit WAV."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.rint(samples * 32767).astype("<i2").tobytes())


def truncate(path: Path) -> None:
    """Cuts the last fifth off: the headers stay whole."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 4 // 5])


def _save(path: Path, image: np.ndarray) -> None:
    Image.fromarray(image).save(path, quality=100, subsampling=0)
