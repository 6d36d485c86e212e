"""The film's sound track in another file: its packets as they are, or AAC where the container cannot hold them."""

from __future__ import annotations

import io
import itertools
from collections.abc import Generator, Iterable, Iterator
from contextlib import suppress
from fractions import Fraction

import av

from mubic_deploy.media.sound import is_ambisonic, is_named, known_layout
from mubic_deploy.media.source import demux, open_again, sound_of

LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1", 8: "7.1"}  # what unnamed channels are taken for
AAC_RATES = (32_000, 44_100, 48_000)


class SoundTrack:
    """The sound of `source` (`sound_of`), muxed into `output` step by step beside the pictures."""

    def __init__(self, source: str, output: av.container.OutputContainer) -> None:
        self._source, self._output = source, output
        self._container = open_again(source)
        sound = sound_of(self._container)
        assert sound is not None, "it is asked for where a film has one"
        self._template = sound
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

    def close(self) -> None:
        self._packets.close()  # it holds this object, which would wait with its encoder for the garbage collector
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

    def _copy(self) -> Generator[av.Packet]:
        for packet in self._growing(self._demux()):
            packet.stream = self._stream
            yield packet

    def _growing(self, packets: Iterable[av.Packet]) -> Generator[av.Packet]:
        """Containers refuse time stamps that do not grow, as damaged files have them, or joined ones."""
        last: int | None = None
        for packet in packets:
            if packet.dts is not None and (last is None or packet.dts > last):
                last = packet.dts
                yield packet

    def _encode(self) -> Generator[av.Packet]:
        frames = itertools.chain(self._resampled(), [None])
        return self._growing(packet for frame in frames for packet in self._stream.encode(frame))

    def _resampled(self) -> Iterator[av.AudioFrame]:
        """As the encoder wants it, whatever the sound changes to: broadcasts go from stereo to mono and back."""
        kind: tuple[str, str, int] | None = None
        resampler: av.AudioResampler | None = None
        for frame in self._decoded():
            now = (frame.format.name, frame.layout.name, frame.sample_rate)
            if now != kind or resampler is None:
                yield from _given(resampler, None)
                kind, resampler = now, av.AudioResampler("fltp", self._stream.layout, self._stream.rate)
            yield from _given(resampler, frame)
        yield from _given(resampler, None)

    def _decoded(self) -> Iterator[av.AudioFrame]:
        for packet in self._demux():
            with suppress(av.FFmpegError):
                yield from map(known_layout, packet.decode())


def _given(resampler: av.AudioResampler | None, frame: av.AudioFrame | None) -> Iterator[av.AudioFrame]:
    """What comes out of a resampler, its time stamps in samples; None for a frame is the end."""
    for out in resampler.resample(frame) if resampler is not None else ():
        if out is None:
            continue
        if out.pts is not None and out.time_base is not None:  # of a frame that needed nothing they are the container's
            out.pts = round(out.pts * out.time_base * out.sample_rate)
        out.time_base = Fraction(1, out.sample_rate)
        yield out


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
