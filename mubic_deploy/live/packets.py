"""Frames on the wire: as they are, as JPEG, or as H.264 in Annex B, one packet a frame. Encoding loses a little, so
the maps are those of the frames as they arrive."""

from __future__ import annotations

from fractions import Fraction

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace

from mubic_deploy.errors import UserError
from mubic_deploy.live.settings import H264, JPEG, check_encoding
from mubic_deploy.media.film import Resizer

JPEG_QUALITY = 3  # FFmpeg's scale, 2 is the best
# every frame alone decodes to one frame, at once; headers come with each key frame
_X264 = {"preset": "veryfast", "tune": "zerolatency", "crf": "20", "x264-params": "annexb=1:repeat-headers=1"}
_TICKS = Fraction(1, 1000)


class Encoder:
    """Frames of one stream, from its start on, to packets. H.264 begins with a key frame."""

    def __init__(self, encoding: str, size: tuple[int, int]) -> None:
        """size: (height, width) of the frames. UserError for an unknown encoding, or H.264 where FFmpeg lacks x264."""
        self._resize, self._size, self._count = Resizer(), size, 0
        self._jpeg = check_encoding(encoding) == JPEG
        try:
            self._codec = av.CodecContext.create("mjpeg" if self._jpeg else "libx264", "w")
        except (av.FFmpegError, ValueError):
            raise UserError(f"this FFmpeg cannot encode {encoding}: choose another encoding") from None
        self._codec.height, self._codec.width = size
        self._codec.time_base = _TICKS
        self._codec.pix_fmt = "yuvj420p" if self._jpeg else "yuv420p"
        if self._jpeg:
            self._codec.color_range = ColorRange.JPEG
            self._codec.qmin = self._codec.qmax = JPEG_QUALITY
        else:
            self._codec.options = _X264
            self._codec.colorspace, self._codec.color_range = Colorspace.ITU709, ColorRange.MPEG

    def __call__(self, frame: np.ndarray) -> bytes:
        """frame: uint8 [H, W, 3], RGB."""
        image = av.VideoFrame.from_ndarray(frame, "rgb24")
        if self._jpeg:  # JPEG's colours are BT.601 in full range
            image = image.reformat(format="yuvj420p", dst_colorspace=Colorspace.ITU601, dst_color_range=ColorRange.JPEG)
        else:
            image = self._resize(image, self._size, "yuv420p")
        image.pts, image.time_base = self._count * 40, _TICKS
        self._count += 1
        return b"".join(bytes(packet) for packet in self._codec.encode(image))


class Decoder:
    """Packets of one stream to frames."""

    def __init__(self, encoding: str, size: tuple[int, int]) -> None:
        """size: (height, width) that every frame must have."""
        self._encoding, self._size, self._resize = check_encoding(encoding), size, Resizer()
        self._broken = False
        self._codec = av.CodecContext.create("mjpeg" if encoding == JPEG else "h264", "r")
        self._codec.thread_type, self._codec.thread_count = "SLICE", 1  # frame threads would hold frames back
        # nobody shall make the server decode a picture that fills its memory
        self._codec.options = {"max_pixels": str(4 * size[0] * size[1])}

    def __call__(self, packet: bytes) -> np.ndarray:
        """uint8 [H, W, 3], RGB. UserError if the packet is not one whole frame of the right size; of H.264 nothing
        more can be decoded after that."""
        if self._broken:
            raise UserError("a packet of this H.264 stream did not decode: begin a new stream with a key frame")
        try:
            frames = self._codec.decode(av.Packet(packet)) if packet else []
        except av.FFmpegError as error:
            raise self._refused(f"does not decode ({(error.strerror or 'invalid').splitlines()[0]})") from None
        if len(frames) != 1 or frames[0].is_corrupt:
            raise self._refused(f"holds {len(frames)} whole frames")
        (frame,) = frames
        if (frame.height, frame.width) != self._size:
            height, width = self._size
            raise self._refused(f"is {frame.width} x {frame.height}, not {width} x {height}")
        return self._resize(frame, self._size, "rgb24").to_ndarray()

    def _refused(self, why: str) -> UserError:
        self._broken = self._encoding == H264
        remedy = "begin a new stream" if self._broken else "leave it out"
        return UserError(f"a packet of {self._encoding} {why}: send one whole frame a packet, and {remedy}")
