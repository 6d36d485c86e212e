"""Where a stream comes from: files, addresses, capture devices, standard input; what PyAV opens."""

from __future__ import annotations

import os
import stat
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, wait
from fractions import Fraction

import av

from mubic_deploy.config import AUDIO_SAMPLES, SAMPLE_RATE
from mubic_deploy.errors import UserError
from mubic_deploy.live.items import Heard, Item, SoundEnd
from mubic_deploy.live.seam import one_seam
from mubic_deploy.media.film import MAX_RATE, Film, Frame, Upright, bytes_of, first_video
from mubic_deploy.media.fit import map_shape
from mubic_deploy.media.sound import Placer, excerpt_start
from mubic_deploy.media.source import STRAY_S, WRAP_S, comes_once, is_file, mode_of, reason, sound_of

STDIN = "-"
_TICK_S = 0.1  # in which a signal is heard
_PAUSE_S = 1.0  # before an address is opened again
_RTSP = ("rtsp://", "rtsps://")
_LIVE = (*_RTSP, "rtmp://", "rtmps://", "udp://", "rtp://", "srt://")  # these come back after they broke off


class FileSource(Film):
    """A film, read as `predict` reads it, as fast as it is wanted or in its own time."""

    def __init__(self, source: str, realtime: bool = False) -> None:
        super().__init__(source)
        self._realtime = realtime

    def __enter__(self) -> FileSource:
        return self

    def items(self) -> Iterator[Item]:
        """Sound goes before the frames whose windows need it, wherever it lies in the file; in its own time it does
        not come before its time."""
        sound = self.sound()
        began = None
        first_s = last_s = 0.0
        if sound is None:
            yield SoundEnd()
        try:
            for frame in self.frames():
                if began is None:
                    began, first_s = time.monotonic() - frame.time_s, frame.time_s
                last_s = frame.time_s
                if self._realtime:
                    time.sleep(max(0.0, began + frame.time_s - time.monotonic()))
                wanted = round(frame.time_s * SAMPLE_RATE)
                wanted = wanted if self._realtime else excerpt_start(frame.time_s) + 2 * AUDIO_SAMPLES
                while sound is not None and not sound.finished and sound.position < wanted:
                    yield from (Heard(*piece) for piece in sound.read())
                    if sound.finished:
                        yield SoundEnd()
                yield frame
            while sound is not None and not sound.finished:  # what the last windows still hear
                if sound.position > round(last_s * SAMPLE_RATE) + AUDIO_SAMPLES:
                    break
                yield from (Heard(*piece) for piece in sound.read())
            if sound is not None:
                self.warnings += sound.warnings(first_s, last_s)
        finally:
            if sound is not None:
                sound.close()


class LiveSource:
    """What comes once, frames and sound side by side: an address, a device, standard input.

    An address of a live stream that breaks off is opened again until `patience_s` has passed without a frame; its
    clock may have jumped by then. Everything else ends where it ends.

    size, display, rate, time_base, frame_bytes  see `Film`; they are what an overlay is made with
    has_sound  whether it can be opened a second time for its sound
    warnings   one line each for what was missing, complete at the end"""

    def __init__(self, source: str, patience_s: float = 30.0, timeout_s: float = 10.0) -> None:
        """patience_s: see above; also that the first frame may take once the source is open. timeout_s: that an
        address may take to answer, and to send something. UserError if it cannot be opened or has no picture."""
        self.source, self.name = source, "standard input" if source == STDIN else source
        self.has_sound = False  # it cannot be opened a second time
        self.warnings: list[str] = []
        self._patience_s, self._timeout_s = patience_s, timeout_s
        self._upright = Upright()
        self._damaged = 0
        self._broke_off = ""  # why, with a space before it; nothing where it just ended
        self._last_s = 0.0  # when somebody took the last frame, at first when it was opened
        self._deaf = False  # no sound was found when it was first opened: none is waited for, or taken, any more
        self._given_up = threading.Event()
        self._reading = self._read()
        self._first: list[Item] = []
        image = self._wait_for_a_frame()
        self.size = image.height, image.width
        self.frame_bytes = bytes_of(image)
        self.display = self._upright.display(image, self._video.sample_aspect_ratio)

    @property
    def map_shape(self) -> tuple[int, int]:
        """(height, width) of its maps."""
        return map_shape(self.display)

    def close(self) -> None:
        self._container.close()

    def items(self) -> Iterator[Item]:
        yield from self._first
        yield from self._reading

    def _wait_for_a_frame(self) -> av.VideoFrame:
        """The first one. FFmpeg goes on waiting after a signal, so it waits on a thread of its own."""
        begun: Future[av.VideoFrame] = Future()

        def run() -> None:
            try:
                begun.set_result(self._begin())
            except BaseException as error:
                begun.set_exception(error)

        threading.Thread(target=run, name="mubic-open", daemon=True).start()
        try:
            while not wait([begun], _TICK_S).done:
                if self._last_s and time.monotonic() > self._last_s + self._patience_s:
                    raise UserError(
                        f"{self.name}: no frame could be decoded in {self._patience_s:g} s: send H.264 with its key "
                        f"frames"
                    )
            return begun.result()
        except BaseException:
            self._given_up.set()
            raise

    def _begin(self) -> av.VideoFrame:
        self._open()
        self._last_s = time.monotonic()
        self._deaf = self._audio is None
        for item in self._reading:
            self._first.append(item)
            if isinstance(item, Frame):
                return item.image
        self.close()
        if self._broke_off:
            raise UserError(f"{self.name} broke off{self._broke_off} before its first frame: check it")
        raise UserError(f"{self.name}: no frame can be decoded: send H.264 with its key frames")

    def _open(self) -> None:
        self._container = open_live(self.source, self.name, self._timeout_s)
        self._video = first_video(self._container, self.name)
        self._video.thread_type = "SLICE"  # frame threads hold frames back
        self._audio = None if self._deaf else sound_of(self._container)
        self.time_base = self._video.time_base or Fraction(1, 90_000)
        rate = self._video.average_rate or self._video.guessed_rate or Fraction(25)
        self.rate = rate if 0 < rate <= MAX_RATE else Fraction(25)

    def _read(self) -> Iterator[Item]:
        index = 0
        while True:
            for item in one_seam(self._run(index)):
                index += isinstance(item, Frame)
                yield item
            if not self.source.startswith(_LIVE):
                if self._broke_off:
                    self.warnings.append(f"{self.name} broke off{self._broke_off}")
                break
            if not self._comes_back():
                break
        if self._damaged:
            self.warnings.append(f"{self.name}: {self._damaged} part(s) could not be decoded")

    def _comes_back(self) -> bool:
        self._container.close()
        while time.monotonic() < self._last_s + self._patience_s and not self._given_up.is_set():
            time.sleep(_PAUSE_S)
            try:
                self._open()
            except UserError:
                continue
            return True
        self.warnings.append(
            f"{self.name} broke off{self._broke_off} and did not come back within {self._patience_s:g} s"
        )
        return False

    def _run(self, index: int) -> Iterator[Item]:
        """From one opening to its end."""
        placer = Placer()
        last: int | None = None
        if self._deaf:
            yield SoundEnd()
        for decoded in self._decode():
            self._on_its_own_clock(decoded)
            if isinstance(decoded, av.AudioFrame):
                yield from (Heard(*piece) for piece in placer.push(decoded))
                continue
            image = self._upright(decoded)
            if image.pts is None:
                image.pts = 0 if last is None else last + max(1, round(1 / (self.rate * self.time_base)))
            if last is not None and image.pts <= last < image.pts + STRAY_S / self.time_base:
                image.pts = last + 1  # as in a film; what goes back further is another clock
            image.time_base = self.time_base
            last = image.pts
            yield Frame(index, float(image.pts * self.time_base), image)
            self._last_s = time.monotonic()  # now, because whoever took it may have had to wait for the server
            index += 1
        yield from (Heard(*piece) for piece in placer.flush())
        self._damaged += placer.damaged

    def _on_its_own_clock(self, decoded: av.VideoFrame | av.AudioFrame) -> None:
        """When a transport stream's clock is full, FFmpeg adds WRAP_S to the frames that were sent before that and are
        shown after it: other frames between which they are shown have none."""
        full = decoded.time is not None and decoded.time >= WRAP_S and self._container.format.name == "mpegts"
        if full and decoded.pts is not None and decoded.time_base is not None:
            decoded.pts -= round(WRAP_S / decoded.time_base)

    def _decode(self) -> Iterator[av.VideoFrame | av.AudioFrame]:
        streams = [stream for stream in (self._video, self._audio) if stream is not None]
        packets = self._container.demux(*streams)
        self._broke_off = ""
        while not self._given_up.is_set():
            try:
                packet = next(packets)
            except (StopIteration, av.error.EOFError):
                return
            except av.error.ExitError:  # PyAV's, for a timeout
                self._broke_off = f" (nothing came for {self._timeout_s:g} s)"
                return
            except av.FFmpegError as error:
                self._broke_off = f" ({reason(error)})"
                return
            try:
                for decoded in packet.decode():
                    if isinstance(decoded, (av.VideoFrame, av.AudioFrame)):
                        yield decoded
            except av.FFmpegError:
                self._damaged += 1


def open_source(source: str, realtime: bool = False) -> FileSource | LiveSource:
    """A file as such, everything else as live. UserError if there is nothing in it, or realtime asked of what is."""
    device = source.startswith("/dev/") and not stat.S_ISREG(mode_of(source) or 0)  # /dev/shm has files
    if source != STDIN and is_file(source) and not device and not comes_once(source):
        return FileSource(source, realtime)
    if realtime:
        raise UserError(f"--realtime is for files: {source} comes in its own time already")
    return LiveSource(source)


def open_live(source: str, name: str, timeout_s: float) -> av.container.InputContainer:
    """UserError if it cannot be opened."""
    # FFmpeg would take a transport stream that begins anew for one whose clock of 33 bits is full, and add 26.5 hours;
    # one that is full goes back then, too, and that the client knows
    options = {"correct_ts_overflow": "0"}
    if source.startswith(_RTSP):
        options["rtsp_transport"] = "tcp"
    place, kind = source, None
    if source.startswith("/dev/video"):
        kind = "v4l2"
    try:
        if source == STDIN:
            place = f"pipe:{os.dup(0)}"
        return av.open(place, format=kind, options=options, timeout=timeout_s if "://" in source else None)
    except av.error.ProtocolNotFoundError as error:
        scheme = source.partition("://")[0]
        raise UserError(
            f"{name} cannot be opened: FFmpeg was built without {scheme} here: pipe it in from an ffmpeg that has it"
        ) from error
    except (av.FFmpegError, OSError, ValueError) as error:
        raise UserError(
            f"{name} cannot be opened ({reason(error)}): check the address, and that something is sent"
        ) from error
