"""Where the sound lies in a live stream's windows: clips with a flash and a click at a known time, through all that a
stream goes through but the network: the source, the client's backlog, its requests, the server's state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from mubic_deploy.config import AUDIO_SAMPLES, DEMO, SAMPLE_RATE
from mubic_deploy.live.backlog import Backlog
from mubic_deploy.live.items import Heard
from mubic_deploy.live.link import Settings, arrays
from mubic_deploy.live.settings import MAX_IN_FLIGHT, RAW, StreamSettings
from mubic_deploy.live.source import FileSource
from mubic_deploy.live.streams import Streams
from mubic_deploy.live.timeline import Window
from mubic_deploy.media.film import Frame, Resizer
from mubic_deploy.media.fit import make_fit

SECONDS = 3  # of a clip
CLICK_S = 0.001  # how long it lasts
SOUND_RATE = 48_000
CLOCK = Fraction(1, 90_000)
NEAR = 4 * round(CLICK_S * SAMPLE_RATE)  # samples around the loudest one: an encoder smears the click


def _steady(rate: Fraction | int) -> list[Fraction]:
    return [Fraction(i) / rate for i in range(int(SECONDS * rate))]


# frame times of each clip in seconds; the last one's rate falls from 30 to 12 frames a second
RATES: dict[str, list[Fraction]] = {
    "24 fps": _steady(24),
    "25 fps": _steady(25),
    "29.97 fps": _steady(Fraction(30_000, 1001)),
    "30 fps": _steady(30),
    "60 fps": _steady(60),
    "variable rate": [Fraction(i, 30) + Fraction(i * i, 3000) for i in range(55)],
}


@dataclass(frozen=True)
class Offset:
    """Of one window that shows the flash.

    seconds  by which the click lies later in the window's sound than the flash in its frames
    frames   the same in parts of the flash's frame, which is `seconds` / how long it is shown, or the one before it
             if that is shorter"""

    frame_index: int
    seconds: float
    frames: float


def write_clip(path: Path, times: Sequence[Fraction], flash: int) -> None:
    """Dark frames at `times` but for a white one, `flash`, and a click of 1 ms at its time: H.264 with B frames, AAC;
    path must end in .mp4 or .mkv."""
    sound = np.zeros((1, round((float(times[-1]) + 0.5) * SOUND_RATE)), np.float32)
    at = round(times[flash] * SOUND_RATE)
    sound[:, at : at + round(CLICK_S * SOUND_RATE)] = 0.8
    with av.open(path, "w") as output:
        pictures = output.add_stream("libx264", rate=25, options={"preset": "veryfast"})
        pictures.width, pictures.height, pictures.pix_fmt = 64, 36, "yuv420p"
        pictures.time_base = pictures.codec_context.time_base = CLOCK
        track = output.add_stream("aac", rate=SOUND_RATE, layout="mono", bit_rate=128_000)
        samples = av.AudioFrame.from_ndarray(sound, "fltp", "mono")
        samples.sample_rate, samples.pts = SOUND_RATE, 0
        output.mux(track.encode(samples))
        output.mux(track.encode(None))
        for i, time in enumerate(times):
            image = av.VideoFrame.from_ndarray(np.full((36, 64, 3), 235 if i == flash else 20, np.uint8), "rgb24")
            image.pts, image.time_base = round(time / CLOCK), CLOCK
            output.mux(pictures.encode(image))
        output.mux(pictures.encode(None))


def windows(film: Path, stride: int = 1) -> Iterator[Window]:
    """What a server cuts of a film, each as soon as it is complete."""
    backlog, server = Backlog(DEMO, stride), Streams(DEMO, StreamSettings())
    resize = Resizer()
    with FileSource(str(film)) as source:
        fit = make_fit("letterbox", source.display, (DEMO.height, DEMO.width))
        for item in source.items():
            if isinstance(item, Frame):
                image = fit.place(resize(item.image, fit.scaled, "rgb24").to_ndarray())
                backlog.add_frame(image, item.time_s, 0.0)
            elif isinstance(item, Heard):
                backlog.add_sound(item.start, item.samples, 0.0)
            else:
                backlog.end_sound(0.0)
            yield from _delivered(backlog, server, stride)
        backlog.finish(0.0)
        yield from _delivered(backlog, server, stride)


def _delivered(backlog: Backlog, server: Streams, stride: int) -> Iterator[Window]:
    """The windows that the client's next requests complete; they are answered at once."""
    settings = Settings(stride, seed=0, steps=1, encoding=RAW)
    while (request := backlog.request(MAX_IN_FLIGHT, flush=True)) is not None:
        stream, complete = server.push("clip", request.start, request.end, arrays(request, settings))
        stream.waiting -= len(complete)
        for window in complete:
            backlog.answered(window.frame_index)
            yield window


def offsets(found: Iterable[Window], times: Sequence[Fraction], flash: int) -> list[Offset]:
    """Of all windows that show the flash of a clip and hold its click. What a window is told of its times does not
    count: the flash is looked for in its frames, the click in its sound, and `times` says how they should lie."""
    shown = float(min(times[flash + 1] - times[flash], times[flash] - times[flash - 1]))
    out = []
    for window in found:
        bright = np.flatnonzero(window.video[:, DEMO.height // 2, DEMO.width // 2, 1] > 128)
        if not len(bright):
            continue
        middle = flash - int(bright[0]) + DEMO.middle
        expected = AUDIO_SAMPLES / 2 + float(times[flash] - times[middle]) * SAMPLE_RATE
        if not NEAR <= expected < AUDIO_SAMPLES - NEAR:
            continue
        seconds = (_click(window.audio) - expected) / SAMPLE_RATE
        out.append(Offset(window.frame_index, seconds, seconds / shown))
    return out


def _click(audio: np.ndarray) -> float:
    """The sample at which the click begins: half its length before the centre of its energy."""
    loudest = int(np.abs(audio).argmax())
    first = max(0, loudest - NEAR)
    energy = audio[first : loudest + NEAR].astype(np.float64) ** 2
    centre = first + (energy @ np.arange(len(energy))) / energy.sum()
    return float(centre - (CLICK_S * SAMPLE_RATE - 1) / 2)
