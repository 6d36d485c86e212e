"""What a stream's client says of it: maps, gaps, and how late it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mubic_deploy.media.maps import FilmMap

KEPT = 100_000  # latencies that the percentiles are of, the newest


@dataclass(frozen=True)
class LiveMap(FilmMap):
    """The saliency of one frame of a stream. See `FilmMap`; time_s is of the stream's own clock.

    heard      part of the window's sound that there was, 0 to 1
    latency_s  from the moment when the frame was given to the client to the map
    wait_s     the part of it after the window was complete: the server's and the network's"""

    heard: float
    latency_s: float
    wait_s: float


@dataclass(frozen=True)
class Gap:
    """Something that was missing.

    kind     connection (no answer from the server), clock (the source's time stamps jumped), sound (it had a gap, or
             did not come in time)
    time_s   where in the stream, on its clock
    seconds  how long; without a connection, from the last answer, or the first request that got none, to the next map
    lost     windows that have no map because of it
    text     the same in one line"""

    kind: str
    time_s: float
    seconds: float
    lost: int
    text: str


@dataclass(frozen=True)
class Report:
    """Of a stream, so far.

    maps, dropped, lost  windows that were answered, that were given up because too many waited, and in gaps
    gaps                 how many
    waiting              complete windows that wait to be sent, and are on their way
    lag_s                how long the oldest of them has waited
    median_s, p95_s, p99_s  latency from capture to map (of the newest 100 000 maps); NaN before the first
    sent_bytes           of tensors, to the server"""

    maps: int
    dropped: int
    lost: int
    gaps: int
    waiting: int
    lag_s: float
    median_s: float
    p95_s: float
    p99_s: float
    sent_bytes: int


def percentiles(latencies: Sequence[float]) -> tuple[float, float, float]:
    """Median, 95th and 99th, in seconds; NaN without any."""
    if not latencies:
        return (np.nan,) * 3
    median, p95, p99 = np.percentile(latencies, (50, 95, 99))
    return float(median), float(p95), float(p99)
