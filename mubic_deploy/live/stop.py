"""The end of a stream before its source's."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator

STOP_S = 5.0  # for the maps that are on their way, and the frames that are to be shown, when somebody stops the stream


class Stopped(threading.Event):
    """Set where a stream ends before its source, for an error too.

    until_s  when what is not done yet is given up, on the monotonic clock; infinity unless somebody stops the stream"""

    until_s = math.inf

    def stop(self) -> None:
        """For whoever wants no more."""
        self.until_s = min(self.until_s, time.monotonic() + STOP_S)
        self.set()

    @property
    def overdue(self) -> bool:
        return time.monotonic() > self.until_s


@contextlib.contextmanager
def stop_with_a_signal() -> Iterator[Stopped]:
    """Set by the first Ctrl-C or SIGTERM, so that the outputs are completed; the next one is what it was before."""
    stopped = Stopped()

    def stop(number: int, frame: object) -> None:
        restore()
        stopped.stop()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, stop)
    try:
        yield stopped
    finally:
        restore()
