"""What can be chosen of a stream, for whoever needs the choices and not what is behind them."""

from __future__ import annotations

from dataclasses import dataclass

from mubic_deploy.errors import UserError, whole

RAW, JPEG, H264 = "raw", "jpeg", "h264"
ENCODINGS = (RAW, JPEG, H264)  # of frames on the wire
QUEUE, DROP = "queue", "drop"
ON_LAG = (QUEUE, DROP)  # where too many windows wait: whoever feeds waits too, or the oldest one goes
WAITING = {QUEUE: 8, DROP: 2}  # windows that may wait to be sent, unless the client says otherwise
IN_FLIGHT = {QUEUE: 4, DROP: 2}  # ... and that may be on their way
MAX_IN_FLIGHT = 16  # windows of a stream that may wait for their maps on the server


def check_encoding(encoding: str) -> str:
    """`encoding` if it is one of ENCODINGS, else UserError."""
    if encoding not in ENCODINGS:
        raise UserError(f"unknown encoding {encoding!r} of frames: use {', '.join(ENCODINGS)}")
    return encoding


@dataclass(frozen=True)
class StreamSettings:
    """max_streams  that the server holds at once
    idle_s       seconds without a request after which a stream is dropped"""

    max_streams: int = 64
    idle_s: float = 30.0

    def __post_init__(self) -> None:
        whole("max_streams", self.max_streams, 1)
        if not 0.1 <= self.idle_s <= 86_400:
            raise UserError(f"idle_s {self.idle_s} is out of range: use 0.1 to 86400 seconds")


DEFAULTS = StreamSettings()
