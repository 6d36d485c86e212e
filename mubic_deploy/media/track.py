"""The film's sound track in another file: its packets as they are, or AAC where the container cannot hold them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import suppress

import av

from mubic_deploy.media.sound import is_ambisonic, is_named, known_layout
from mubic_deploy.media.source import demux, open_container

LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1", 8: "7.1"}  # what unnamed channels are taken for
AAC_RATES = (32_000, 44_100, 48_000)


class SoundTrack:
    """The first sound track of `source`, muxed into `output` step by step beside the pictures."""

    def __init__(self, source: str, output: av.container.OutputContainer) -> None:
        self._source, self._output = source, output
        self._container = open_container(source)
        self._template = self._container.streams.audio[0]
        context = self._template.codec_context
        named, count = is_named(context.layout), context.layout.nb_channels
        self.copied = (named or count in LAYOUTS) and takes(output, self._template)
        if self.copied:
            self._stream = output.add_stream_from_template(self._template)
            if not named:  # MP4 refuses PCM without a layout
                self._stream.layout = LAYOUTS[count]
            self._packets = self._copy()
        else:
            rate = context.sample_rate if context.sample_rate in AAC_RATES else 48_000
            self._stream = output.add_stream("aac", rate=rate, bit_rate=160_000)
            mixed = named and count > 1 and not is_ambisonic(context.layout)
            self._stream.layout = "stereo" if mixed else "mono"
            self._packets = self._encode()
        self._next: av.Packet | None = None
        self._last_dts: int | None = None

    def close(self) -> None:
        self._container.close()

    def mux_until(self, time_s: float | None) -> None:
        """Writes the packets up to `time_s` of the film, or all that are left."""
        while True:
            packet = self._next or next(self._packets, None)
            self._next = packet
            if packet is None or (time_s is not None and (packet.dts or 0) * packet.time_base > time_s):
                return
            self._output.mux(packet)
            self._next = None

    def _demux(self) -> Iterator[av.Packet[av.AudioStream]]:
        try:
            yield from demux(self._container, self._template, self._source)
        except av.FFmpegError:  # the file is damaged from here on; the prediction warns of it
            return

    def _copy(self) -> Iterator[av.Packet]:
        for packet in self._demux():
            # containers refuse time stamps that do not grow, as damaged files have them
            if packet.dts is None or (self._last_dts is not None and packet.dts <= self._last_dts):
                continue
            self._last_dts = packet.dts
            packet.stream = self._stream
            yield packet

    def _encode(self) -> Iterator[av.Packet]:
        for packet in self._demux():
            try:
                frames = packet.decode()
            except av.FFmpegError:
                continue
            for frame in frames:
                yield from self._stream.encode(known_layout(frame))
        yield from self._stream.encode(None)


def takes(output: av.container.OutputContainer, template: av.AudioStream) -> bool:
    """Whether `output` holds the stream's packets as they are. Its list of codecs is not enough: MOV's names some that
    only MP4 takes, so that a header is written, in memory."""
    trial = av.open(io.BytesIO(), "w", format=output.format.name)
    try:
        trial.add_stream_from_template(template)
        trial.start_encoding()
    except (av.FFmpegError, ValueError):
        return False
    finally:
        with suppress(av.FFmpegError):
            trial.close()
    return True
