"""Lines of text for a reader that may be slow, late, or gone to sleep."""

from __future__ import annotations

import errno
import os
import select
import stat
import sys
import time
from collections import deque
from pathlib import Path

LINES = 1000  # that may wait for their reader


class Lines:
    """Goes out as far as the reader takes it, and never waits for that: a signal would not end a write.

    opened   whether there is somewhere to write to: a named pipe has that when somebody reads it
    waiting  how many lines were not taken yet"""

    def __init__(self, place: Path | None) -> None:
        """place: None for standard output; a file is opened, and emptied, with the first line. OSError if there is no
        standard output."""
        self._place = place
        self._file: int | None = None
        if place is None:
            if sys.stdout is None:  # it was closed before this program began
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            self._file = sys.stdout.fileno()
        self._ready = select.poll()
        if self._file is not None:
            self._ready.register(self._file, select.POLLOUT)
        self._waiting: deque[bytes] = deque()
        self._since_s = 0.0

    @property
    def opened(self) -> bool:
        return self._file is not None

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def full(self) -> bool:
        return len(self._waiting) >= LINES

    @property
    def idle_s(self) -> float:
        """How long nothing has been taken of what waits."""
        return time.monotonic() - self._since_s if self._waiting else 0.0

    def add(self, line: str) -> None:
        """line: without its end. OSError as from `write`."""
        if not self._waiting:
            self._since_s = time.monotonic()
        self._waiting.append(f"{line}\n".encode())
        self.write()

    def write(self) -> None:
        """What is taken now. OSError if it cannot be written."""
        if self._waiting and self._file is None:
            self._open()
        while self._waiting and self._file is not None and self._ready.poll(0):
            line = self._waiting[0]
            try:
                written = os.write(self._file, line[: select.PIPE_BUF])  # no more surely goes without waiting
            except BlockingIOError:
                return
            self._since_s = time.monotonic()
            if written < len(line):
                self._waiting[0] = line[written:]
            else:
                self._waiting.popleft()

    def _open(self) -> None:
        assert self._place is not None
        try:
            self._file = os.open(self._place, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NONBLOCK, 0o666)
        except OSError as error:
            if error.errno == errno.ENXIO and stat.S_ISFIFO(self._place.stat().st_mode):  # nobody reads it yet
                return
            raise
        self._ready.register(self._file, select.POLLOUT)

    def close(self) -> None:
        """Gives up what waits."""
        self._waiting.clear()
        if self._place is not None and self._file is not None:
            file, self._file = self._file, None
            os.close(file)
