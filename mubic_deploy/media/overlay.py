"""The film with its saliency over it: H.264 at the display size and the same time stamps, and the film's sound."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Protocol

import av
import numpy as np
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter

from mubic_deploy.media import heat
from mubic_deploy.media.film import Frame, Resizer, bytes_of, most_waiting
from mubic_deploy.media.maps import FilmMap
from mubic_deploy.media.track import SoundTrack

SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv")  # hold H.264 with any time stamps
NOTHING = np.zeros((16, 16), np.float32)  # a map without anything
CRF, PRESET = "20", "superfast"


class Shown(Protocol):
    """What an overlay is made over: see `Film`."""

    source: str
    size: tuple[int, int]
    display: tuple[int, int]
    rate: Fraction
    time_base: Fraction
    has_sound: bool


Matched = tuple[Frame, np.ndarray]


class Matcher:
    """Finds the map of every frame. Frames and maps go in as they come, in order, and frames with their maps, float32
    [h, w] in [0, 1], come out in order; a frame waits until the next map is there.

    Between two predicted frames the maps are interpolated linearly in time; before the first and after the last they
    stand still. No more than `most_waiting` frames wait: with a larger stride a map stands still first and then moves
    to the next one. Before the first map all wait, or in a live stream go without one."""

    def __init__(self, live: bool = False) -> None:
        """live: frames come whether there are maps or not."""
        self._live = live
        self._waiting: deque[Frame] = deque()
        self._before: FilmMap | None = None

    @property
    def waiting(self) -> int:
        """Frames that wait for a map."""
        return len(self._waiting)

    def add_frame(self, frame: Frame) -> Iterator[Matched]:
        self._waiting.append(frame)
        if len(self._waiting) <= most_waiting(bytes_of(frame.image)):
            return
        if self._before is not None:
            oldest = self._waiting.popleft()
            yield oldest, self._before.saliency
            self._before = replace(self._before, time_s=oldest.time_s)
        elif self._live:
            yield self._waiting.popleft(), NOTHING

    def add_map(self, item: FilmMap) -> Iterator[Matched]:
        """The frames up to this map's."""
        before = self._before or item
        span = item.time_s - before.time_s
        while self._waiting and self._waiting[0].index <= item.frame_index:
            frame = self._waiting.popleft()
            part = np.clip((frame.time_s - before.time_s) / span, 0, 1) if span > 0 else 1.0
            yield frame, before.saliency + np.float32(part) * (item.saliency - before.saliency)
        self._before = item

    def finish(self) -> Iterator[Matched]:
        """What is left; there must have been a map."""
        while self._waiting:
            assert self._before is not None, "a film has at least one map"
            yield self._waiting.popleft(), self._before.saliency

    def clear(self) -> None:
        """Gives up the frames that wait."""
        self._waiting.clear()


class OverlayWriter:
    """Frames and maps go in as they come, in order: see `Matcher`.

    left_out  frames that are not in the file because they were not wanted any more"""

    def __init__(self, path: Path, film: Shown, live: bool = False, wanted: Callable[[], bool] = lambda: True) -> None:
        """path must end in one of `SUFFIXES`; live: see `Matcher`; wanted: whether frames are still to be written,
        which ends for good; the first one is in any case. OSError or ValueError if it cannot be written."""
        self._size = height, width = overlay_size(film)
        # 4:2:0 has no odd sizes
        self._pixels = "yuv420p" if height % 2 == 0 and width % 2 == 0 else "yuv444p"
        self._film = film
        self._matcher = Matcher(live)
        self._resize = Resizer()
        self._heat = HeatBlend(self._pixels)
        self._output = av.open(path.absolute(), "w")  # what stands before a colon would be a protocol
        self._stream = self._output.add_stream("libx264", rate=film.rate, options={"crf": CRF, "preset": PRESET})
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, self._pixels
        self._stream.time_base = self._stream.codec_context.time_base = film.time_base
        self._colours_known = False
        self._wanted, self.left_out = wanted, 0
        self._last_s = 0.0  # of the last frame that was written
        self._sound = SoundTrack(film.source, self._output) if film.has_sound else None

    def add_frame(self, frame: Frame) -> None:
        self._write_all(self._matcher.add_frame(frame))

    def add_map(self, item: FilmMap) -> None:
        """Writes the frames up to this map's."""
        self._write_all(self._matcher.add_map(item))

    def finish(self, whole: bool = True) -> None:
        """Writes what is left and closes the file. whole: with the sound to the film's end, not only to the last
        frame's."""
        self._write_all(self._matcher.finish())
        packets = self._stream.encode(None)
        if packets and self._output.format.name in ("mp4", "mov"):
            _hold(packets)
        self._mux(packets)
        if self._sound is not None:
            self._sound.mux_until(None if whole else self._last_s)
        self._output.close()

    def close(self) -> None:
        """Gives up the files, finished or not."""
        self._matcher.clear()
        if self._sound is not None:
            self._sound.close()
        with suppress(av.FFmpegError, OSError):  # of a file that is thrown away
            self._output.close()

    def _write_all(self, matched: Iterator[Matched]) -> None:
        for frame, saliency in matched:
            self._write(frame, saliency)

    def _write(self, frame: Frame, saliency: np.ndarray) -> None:
        if self._colours_known and not self._wanted():
            self.left_out += 1
            return
        self._last_s = frame.time_s
        image = self._resize(frame.image, self._size, self._pixels)
        if not self._colours_known:
            self._tag_colours(image)
        out = self._heat(image, saliency)
        out.pts, out.time_base = frame.image.pts, self._film.time_base
        if frame.image.duration:
            out.duration = frame.image.duration
        self._mux(self._stream.encode(out))

    def _tag_colours(self, image: av.VideoFrame) -> None:
        """Players must read the colours as they were meant, and show each frame for as long. Before the first one."""
        context = self._stream.codec_context
        for name in ("colorspace", "color_primaries", "color_trc", "color_range"):
            setattr(context, name, int(getattr(image, name)))
        context.flags |= int(av.codec.context.Flags.frame_duration)  # or the last frame would not be held
        self._colours_known = True

    def _mux(self, packets: list[av.Packet]) -> None:
        for packet in packets:
            if self._sound is not None and packet.dts is not None:
                self._sound.mux_until(float(packet.dts * packet.time_base))
            self._output.mux(packet)


def _hold(packets: list[av.Packet]) -> None:
    """The last packets of an MP4, whose length is up to the end of the last one, until the last frame ends: that need
    not be in the last packet."""
    end = max((p.pts or 0) + (p.duration or 0) for p in packets)
    packets[-1].duration = end - (packets[-1].pts or 0)


def overlay_size(film: Shown) -> tuple[int, int]:
    """(height, width) of the overlay: the film's display size. Where a side is odd only because its pixels are not
    square, one more: few players and browsers show 4:4:4."""
    height, width = (d if d == s else d + d % 2 for d, s in zip(film.display, film.size, strict=True))
    return height, width


class HeatBlend:
    """Lays a map over frames of `pixels` ("yuv420p" or "yuv444p", video range), in integers."""

    def __init__(self, pixels: str) -> None:
        self._pixels = pixels
        self._growers = [VideoReformatter() for _ in range(5)]  # one for each call, each keeps its tables
        self._product = np.empty(0, np.uint16)

    def __call__(self, image: av.VideoFrame, saliency: np.ndarray) -> av.VideoFrame:
        """A new frame; `image` is not changed. saliency: float32 [h, w] in [0, 1], any size."""
        # what carries no tag is taken for BT.709 from 720 lines on, as players do
        untagged = image.colorspace in (Colorspace.DEFAULT, 2)
        bt709 = image.height >= 720 if untagged else image.colorspace == Colorspace.ITU709
        index = heat.levels(saliency)
        table = heat.yuv_table(bt709)
        cover = table[3][index]
        out = av.VideoFrame(image.width, image.height, self._pixels)
        grow = iter(self._growers)
        alpha = None
        for colours, source, target in zip(table, image.planes, out.planes, strict=False):
            size = source.width, source.height
            if alpha is None or alpha.shape != size[::-1]:
                alpha = _grow(next(grow), cover, size)
                rows = _touched(cover, source.height)
            colour = _grow(next(grow), colours[index], size)
            below, result = _plane(source), _plane(target)
            np.copyto(result, below)
            self._blend(below[rows], alpha[rows], colour[rows], result[rows])
        return out

    def _blend(self, below: np.ndarray, alpha: np.ndarray, colour: np.ndarray, out: np.ndarray) -> None:
        """below * (256 - alpha) / 256 + colour, all uint8 [h, w]. `below` itself where alpha is 0."""
        if self._product.size < below.size:
            self._product = np.empty(below.size, np.uint16)
        product = self._product[: below.size].reshape(below.shape)
        np.subtract(256, alpha, out=product, dtype=np.uint16)
        np.multiply(product, below, out=product)
        np.right_shift(product, 8, out=product)
        np.add(product, colour, out=product)
        np.minimum(product, 255, out=product)  # swscale rounds colour and alpha apart
        np.copyto(out, product, casting="unsafe")


def _touched(cover: np.ndarray, height: int) -> slice:
    """The rows of a plane of `height` that `cover` [h, w] reaches, with a margin for its interpolation."""
    rows = np.flatnonzero(cover.any(axis=1))
    if not rows.size:
        return slice(0, 0)
    scale = height / len(cover)
    return slice(max(0, int((rows[0] - 1) * scale)), int((rows[-1] + 2) * scale) + 1)


def _plane(plane: av.video.plane.VideoPlane) -> np.ndarray:
    """uint8 [height, width]: the plane's own memory."""
    return np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)[: plane.height, : plane.width]


def _grow(reformatter: VideoReformatter, values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [h, w] -> uint8 [height, width], bilinear. size: (width, height)."""
    image = av.VideoFrame.from_ndarray(values, "gray8")
    return _plane(reformatter.reformat(image, *size, interpolation=Interpolation.BILINEAR, threads=1).planes[0])
