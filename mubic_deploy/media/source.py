"""What a film is read from: a file, or an address that FFmpeg can read."""

from __future__ import annotations

import os
import shlex
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import av

from mubic_deploy.errors import UserError

Source = str | os.PathLike[str]
PATIENCE_S = 30.0  # that an address may take to open, and for each packet
STRAY_S = 1.0  # by which time stamps may go back; more is another clock
WRAP_S = 2**33 / 90_000  # after which a transport stream's clock begins anew: FFmpeg adds it where that goes back
Stream = TypeVar("Stream", av.VideoStream, av.AudioStream)


def plain_source(source: Source) -> str:
    """A file: address as the path that FFmpeg takes it for, anything else as it is."""
    return os.fspath(source).removeprefix("file:")


def is_file(source: Source) -> bool:
    """False for a URL."""
    return "://" not in os.fspath(source)


def mode_of(source: str) -> int | None:
    """What lies at a path, as stat says it. None where nothing does, or where nothing can: the name is too long."""
    try:
        return Path(source).stat().st_mode
    except (OSError, ValueError):
        return None


def comes_once(source: str) -> bool:
    """True for a pipe or a device: what was read of it is gone, and a film is opened several times."""
    if source.startswith(("pipe:", "fd:")):
        return True
    mode = mode_of(source)
    return mode is not None and not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def reason(error: Exception) -> str:
    """Why, in one line, without the number."""
    return str(getattr(error, "strerror", None) or error).splitlines()[0]


def open_container(source: str) -> av.container.InputContainer:
    """UserError if an address is silent; FFmpeg's own errors for everything else."""
    try:
        return av.open(for_ffmpeg(source), timeout=None if is_file(source) else PATIENCE_S)
    except av.error.ExitError as error:
        raise _silent(source) from error


def for_ffmpeg(source: str) -> str:
    """A path as FFmpeg takes it: what stands before a colon, as in 10:30:00.mp4, is a protocol to it."""
    return str(Path.cwd() / source) if ":" in source and mode_of(source) is not None else source


def open_again(source: str) -> av.container.InputContainer:
    """For the sound of a film whose pictures are open already. UserError if an address does not allow that."""
    try:
        return open_container(source)
    except (av.FFmpegError, OSError) as error:
        raise UserError(
            f"{source} could be opened once, but not again for its sound ({reason(error)}): save it to a file first"
        ) from error


def pictures_of(container: av.container.InputContainer) -> list[av.VideoStream]:
    """The films in a container: cover pictures of sound files are streams too, and "tty" shows any text as a film."""
    covers = av.stream.Disposition.attached_pic
    return [s for s in container.streams.video if not s.disposition & covers and container.format.name != "tty"]


def sound_of(container: av.container.InputContainer) -> av.AudioStream | None:
    """The first sound track that belongs to the first film: a transport stream may hold several programmes, and radio
    before television. The first of all where that is not said. None without sound, or where nobody knows its codec."""
    films, sounds = pictures_of(container)[:1], container.streams.audio
    best = (container.streams.best("video", related=sound) for sound in sounds)
    own = [sound for sound, film in zip(sounds, best, strict=True) if film in films]
    sound = next(iter(own or sounds), None)
    return None if sound is None or sound.codec_context is None else sound


def demux(container: av.container.InputContainer, stream: Stream, source: str) -> Iterator[av.Packet[Stream]]:
    """The packets of `stream`. UserError if an address falls silent."""
    try:
        yield from container.demux(stream)
    except av.error.ExitError as error:
        raise _silent(source) from error


def is_another_clock(at_s: float, to_s: float) -> bool:
    """Whether a time stamp is of another clock than the one before: further back than stray ones, or so far on as it
    is where FFmpeg took a clock that begins anew for one that was full."""
    return to_s < at_s - STRAY_S or to_s > at_s + WRAP_S / 2


def another_clock(source: str, at_s: float, to_s: float) -> UserError:
    """For a film with a clock that begins anew: pictures and sound do it at different places, so that what belongs
    together after it is not known here."""
    way = "go back" if to_s < at_s else "leap"
    return UserError(
        f"{source}: its time stamps {way} from {at_s:.2f} s to {to_s:.2f} s, as where films were joined: give it one "
        f"clock with ffmpeg -i {shlex.quote(source)} -c copy JOINED.mkv"
    )


def _silent(source: str) -> UserError:
    return UserError(f"{source} sent too little for {PATIENCE_S:g} s: check it, or save it to a file first")
