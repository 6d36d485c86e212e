"""A film's frames, upright and at their own times, read once from start to end in bounded memory."""

from __future__ import annotations

import shlex
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from mubic_deploy.errors import UserError
from mubic_deploy.media.fit import map_shape
from mubic_deploy.media.sound import Sound
from mubic_deploy.media.source import (
    Source,
    another_clock,
    comes_once,
    demux,
    is_another_clock,
    open_container,
    pictures_of,
    plain_source,
    reason,
    sound_of,
)

MAX_RATE = 240  # frames per second; containers that claim more have no rate, only time stamps
MOST_WAITING, LEAST_WAITING = 64, 24  # frames that wait for a map, or somewhere else on their way
WAITING_BYTES = 256 << 20  # of them, between these two
MISSING_S = 0.25  # a film that ends this much too early is cut off


@dataclass(frozen=True)
class Frame:
    """Frame `index` (from 0) of a film. `image` is upright; its `pts` counts the film's `time_base`."""

    index: int
    time_s: float
    image: av.VideoFrame


class Film:
    """An opened film: what is known before it is read, and its frames.

    source: a path, or a URL that FFmpeg can read. UserError if there is nothing to predict in it.

    size         (height, width) of its frames, upright
    display      the same in square pixels
    frame_bytes  of one of them in memory
    rate         average frames per second, for encoders; the time stamps are what counts
    expected     number of frames the container promises, None if it does not say
    warnings     one line each for what was found missing or damaged, complete when the frames were read"""

    def __init__(self, source: Source) -> None:
        self.source = plain_source(source)
        self.name = self.source.rsplit("/", 1)[-1] or self.source
        self.warnings: list[str] = []
        self._upright = Upright()
        self._damaged = 0
        self._container, self._stream = _open(self.source, self.name)
        self.has_sound = sound_of(self._container) is not None
        self.time_base = self._stream.time_base or Fraction(1, 90_000)
        rate = self._stream.average_rate or self._stream.guessed_rate or Fraction(25)
        self.rate = rate if 0 < rate <= MAX_RATE else Fraction(25)
        self.expected = self._count()
        self._decoded = self._decode()
        first = next(self._decoded, None)
        if first is None:
            self.close()
            raise UserError(f"{self.name}: no frame can be decoded: convert it to H.264 in MP4, or get it again")
        self._first = self._upright(first)
        self.size = self._first.height, self._first.width
        self.frame_bytes = bytes_of(self._first)
        self.display = self._upright.display(self._first, self._stream.sample_aspect_ratio)

    def __enter__(self) -> Film:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._decoded.close()  # it holds the film, which would wait with its decoder for the garbage collector
        self._container.close()

    @property
    def map_shape(self) -> tuple[int, int]:
        """(height, width) of the film's maps."""
        return map_shape(self.display)

    def frames(self) -> Iterator[Frame]:
        """All frames in display order, once. Times are seconds of the film's own clock, strictly increasing.

        UserError where that clock begins anew, and after the last frame if the container promises more."""
        previous: Frame | None = None
        for index, image in enumerate(self._images()):
            pts = image.pts
            if previous is not None:
                last = previous.image.pts
                assert last is not None
                if pts is not None and is_another_clock(previous.time_s, float(pts * self.time_base)):
                    raise another_clock(self.source, previous.time_s, float(pts * self.time_base))
                step = max(1, round(1 / (self.rate * self.time_base)))
                pts = last + step if pts is None else max(pts, last + 1)
            image.pts, image.time_base = pts or 0, self.time_base
            previous = Frame(index, float(image.pts * self.time_base), image)
            yield previous
        if previous is not None:
            self._check_end(previous)

    def sound(self) -> Sound | None:
        """The film's sound through a handle of its own, so that it may lie anywhere in the file. None, with a
        warning, if there is none."""
        if not self.has_sound:
            self.warnings.append(f"{self.name} has no sound: it is predicted as silent")
            return None
        return Sound(self.source, self.name)

    def _images(self) -> Iterator[av.VideoFrame]:
        yield self._first
        for image in self._decoded:
            yield self._upright(image)

    def _decode(self) -> Generator[av.VideoFrame]:
        packets = demux(self._container, self._stream, self.source)
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                return
            except av.FFmpegError:
                self._damaged += 1
                break
            try:
                yield from packet.decode()
            except av.FFmpegError:
                self._damaged += 1
        try:
            yield from self._stream.decode(None)
        except av.FFmpegError:
            self._damaged += 1

    def _seconds(self) -> float | None:
        """How long the container says the pictures last. None if it does not say."""
        if not self._is_matroska:
            return float(self._stream.duration * self.time_base) if self._stream.duration else None
        # a stream of it has a tag, as 00:01:02.5, or nothing: what FFmpeg fills in is that of all of them
        tag = self._stream.metadata.get("DURATION", "")
        try:
            hours, minutes, seconds = (float(part) for part in tag.split(":"))
        except ValueError:
            alone = len(self._container.streams) == 1
            return self._container.duration / av.time_base if alone and self._container.duration else None
        return hours * 3600 + minutes * 60 + seconds

    @property
    def _is_matroska(self) -> bool:
        return "matroska" in self._container.format.name

    def _count(self) -> int | None:
        stored = self._stream.frames
        seconds = self._seconds() or (self._container.duration or 0) / av.time_base
        shown = round(seconds * self.rate)
        # MP4 counts the frames that an edit list cuts off, too
        return shown or None if not stored or 0 < shown < 0.95 * stored else stored

    def _check_end(self, last: Frame) -> None:
        end = last.time_s + float((last.image.duration or 0) * self.time_base or 1 / self.rate)
        seconds = self._seconds()
        if self._container.format.name == "asf":  # whose streams all have the duration of the longest
            seconds = None
        if seconds is not None:
            # Matroska's durations count from the film's zero, the others from the stream's first frame
            start = 0 if self._is_matroska else (self._stream.start_time or 0) * self.time_base
            missing = float(start + seconds) - end
            if missing > max(MISSING_S, 2.5 / self.rate):
                repair = f"ffmpeg -i {shlex.quote(self.source)} -c copy REPAIRED.mkv"
                raise UserError(
                    f"{self.name} is cut off: its last frame is at {last.time_s:.2f} s, {missing:.2f} s before its "
                    f"end: get it again, or keep what is there with {repair}"
                )
        if self._damaged:
            self.warnings.append(
                f"{self.name} is damaged: {self._damaged} part(s) of its pictures could not be decoded; "
                f"the last frame read is at {last.time_s:.2f} s"
            )


def bytes_of(image: av.VideoFrame) -> int:
    """Of a frame in memory."""
    return sum(plane.buffer_size for plane in image.planes)


def most_waiting(frame_bytes: int) -> int:
    """How many frames of this size may wait in one place: all of 1080p, fewer of larger ones."""
    return max(LEAST_WAITING, min(MOST_WAITING, WAITING_BYTES // frame_bytes))


class Upright:
    """Turns and mirrors decoded frames as the display matrix of the first of them says: it is the stream's.

    PyAV's side data and its frame hold each other until the garbage collector comes, so to ask each frame would keep
    hundreds of them in memory."""

    def __init__(self) -> None:
        self.turned = False  # by 90 or 270 degrees, so that width and height change places
        self._filters: list[str] | None = None
        self._convert = Resizer()
        self._graph: Any = None
        self._key: object = None

    def __call__(self, image: av.VideoFrame) -> av.VideoFrame:
        """`image` itself where there is nothing to do."""
        if self._filters is None:
            self._filters = orientation(image)
            self.turned = "transpose" in self._filters
        if not self._filters:
            return image
        if (pixels := turnable(image.format)) != image.format.name:
            image = self._convert(image, (image.height, image.width), pixels)
        key = (image.format.name, image.width, image.height)
        if key != self._key:
            self._graph, self._key = _chain(self._filters, image), key
        self._graph.vpush(image)
        return self._graph.vpull()

    def display(self, upright: av.VideoFrame, ratio: Fraction | None) -> tuple[int, int]:
        """(height, width) in square pixels of a frame that was made upright. ratio: a pixel's width to its height, as
        it is stored: not yet turned."""
        height, width = upright.height, upright.width
        if self.turned:
            return round(height * (ratio or 1)) or height, width
        return height, round(width * (ratio or 1)) or width


def orientation(image: av.VideoFrame) -> list[str]:
    """The FFmpeg filters that make a decoded frame upright, by its display matrix."""
    side_data: Any = image.side_data
    matrix = side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return []
    # x' = a x + c y and y' = b x + d y, in 16.16 fixed point
    a, b, _, c, d = np.frombuffer(memoryview(matrix), np.int32)[:5].astype(int)
    if abs(a) + abs(d) >= abs(b) + abs(c):
        wanted = {"hflip": a < 0, "vflip": d < 0}
    else:
        wanted = {"transpose": True, "hflip": c < 0, "vflip": b < 0}
    return [name for name, needed in wanted.items() if needed]


def turnable(pixels: av.VideoFormat) -> str:
    """The format in which frames of `pixels` can be transposed: 4:4:4 for 4:2:2 and what else has less colour in one
    direction only. FFmpeg would convert these by itself, and forget their colour space and range."""
    even = all(part.width == part.height for part in av.VideoFormat(pixels.name, 64, 64).components)
    bits = pixels.components[0].bits
    return pixels.name if even else f"yuv444p{bits}le" if bits > 8 else "yuv444p"


def _chain(filters: list[str], image: av.VideoFrame) -> av.filter.Graph:
    graph = av.filter.Graph()
    time_base = image.time_base or Fraction(1, 90_000)
    nodes = [graph.add_buffer(width=image.width, height=image.height, format=image.format, time_base=time_base)]
    # FFmpeg's dir 0 is the plain transposition
    nodes += [graph.add(name, "dir=0" if name == "transpose" else None) for name in filters]
    graph.link_nodes(*nodes, graph.add("buffersink")).configure()
    return graph


class Resizer:
    """Resizes frames and converts their pixels with swscale; keeps its tables between frames of one kind."""

    def __init__(self) -> None:
        self._reformatter = VideoReformatter()

    def __call__(self, image: av.VideoFrame, size: tuple[int, int], pixels: str) -> av.VideoFrame:
        """`image` at `size` (height, width) as `pixels`, FFmpeg's name for the format. The image itself where
        nothing changes. Averages where it shrinks, bicubic where it grows; YUV in video range, BT.709 if it was RGB."""
        height, width = size
        shrinks = height * width < image.height * image.width
        full = image.color_range == ColorRange.JPEG or image.format.name.startswith("yuvj")
        return self._reformatter.reformat(
            image,
            width,
            height,
            pixels,
            dst_colorspace=Colorspace.ITU709 if image.format.is_rgb and pixels != "rgb24" else None,
            interpolation=Interpolation.AREA if shrinks else Interpolation.BICUBIC,
            src_color_range=ColorRange.JPEG if full else None,
            dst_color_range=ColorRange.JPEG if pixels == "rgb24" else ColorRange.MPEG,
        )


def _open(source: str, name: str) -> tuple[av.container.InputContainer, av.VideoStream]:
    try:
        if comes_once(source):
            raise UserError(
                f"{source} is a pipe or a device, which can be read only once: save it to a file, or use "
                "mubic-deploy stream"
            )
        if Path(source).is_file() and not Path(source).stat().st_size:
            raise UserError(f"{name} is empty (0 bytes): get the film again")
        container = open_container(source)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{source} does not exist: check the path") from error
    except IsADirectoryError as error:
        raise UserError(f"{source} is a folder: give a film file in it") from error
    except PermissionError as error:
        raise UserError(f"{source} may not be read: change its permissions") from error
    except (av.FFmpegError, OSError, ValueError) as error:
        if isinstance(error, av.error.InvalidDataError) and Path(source).is_file() and lacks_its_index(Path(source)):
            raise UserError(
                f"{name} ends before its index, as an MP4 does whose recording or copying was cut off: copy it again, "
                "or record to .mkv, which may end anywhere"
            ) from error
        raise UserError(f"{name} is not a film that FFmpeg can read ({reason(error)}): check or convert it") from error
    video = first_video(container, name)
    video.thread_type = "AUTO"
    return container, video


def lacks_its_index(path: Path) -> bool:
    """Whether a file begins as MP4 or QuickTime and has no `moov` box, without which none of its frames can be found
    (ISO/IEC 14496-12, 4.2: a box is its size, its type, and where the size is 1 its size in 64 bits)."""
    with path.open("rb") as file:
        at = boxes = 0
        while len(head := file.read(16)) >= 8:
            size, found = int.from_bytes(head[:4], "big"), head[4:8]
            if found == b"moov" or (not at and found not in (b"ftyp", b"wide", b"mdat")):
                return False
            size = int.from_bytes(head[8:], "big") if size == 1 else size
            boxes, at = boxes + 1, at + size
            if size < 8 or at >= path.stat().st_size:  # 0: to the end of the file
                break
            file.seek(at)
    return boxes > 0


def first_video(container: av.container.InputContainer, name: str) -> av.VideoStream:
    """The pictures of an opened container. UserError, and the container is closed, if it has none that can be
    decoded."""
    films = pictures_of(container)
    if not films:
        sound = " (sound only)" if container.streams.audio else ""
        container.close()
        raise UserError(f"{name} holds no video{sound}: give a file with pictures")
    if films[0].codec_context is None:
        container.close()
        raise UserError(f"{name}: its video codec is unknown here: convert it to H.264 in MP4")
    return films[0]
