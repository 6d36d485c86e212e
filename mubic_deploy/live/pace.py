"""A film that an address sends as fast as it can, in its own time."""

from __future__ import annotations

FASTER = 1.02  # than its time stamps: a broadcast whose clock runs faster than ours must not lag ever further behind
GAP_S = 10.0  # between time stamps that nobody waits for


class Pace:
    """Says how long to hold each frame back. What comes later than that is not made up for."""

    def __init__(self) -> None:
        self._last_s = self._due_s = float("-inf")  # the last frame's time stamp, and when it was due

    def wait_s(self, time_s: float, now_s: float) -> float:
        """Seconds from now until the frame is due. time_s: its time stamp; now_s: on any clock that does not jump."""
        apart = time_s - self._last_s
        follows = 0 < apart < GAP_S
        self._last_s = time_s
        self._due_s = max(now_s, self._due_s + apart / FASTER) if follows else now_s
        return self._due_s - now_s
