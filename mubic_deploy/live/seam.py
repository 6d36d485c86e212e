"""Where the clock of a source's frames and sound goes back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from mubic_deploy.config import SAMPLE_RATE
from mubic_deploy.live.items import Heard, Item
from mubic_deploy.media.film import Frame
from mubic_deploy.media.source import STRAY_S

APART_S = 2.0  # of sound that frames and sound go back apart, at most: decoders and multiplexers hold some back


def one_seam(items: Iterable[Item]) -> Iterator[Item]:
    """The items with sound and frames going back to a new clock together: for a client each of the two ends a run.

    Sound of the new clock waits for the new clock's first frame, and what comes of the old clock's sound after that is
    left out: its windows are over. Where only one of them goes back, the sound goes on as it is after APART_S."""
    last_s = heard_s = -math.inf
    early: list[Heard] = []  # of the new clock
    over_s = -math.inf  # up to which sound is of the old clock
    for item in items:
        if isinstance(item, Frame):
            back, last_s = item.time_s < last_s, item.time_s
            yield item
            if back and not early:
                over_s = heard_s + APART_S
            if back:
                yield from early
                early = []
        elif isinstance(item, Heard):
            start_s = item.start / SAMPLE_RATE
            back, heard_s = start_s < heard_s - STRAY_S, start_s
            if early or (back and over_s == -math.inf):
                early.append(item)
                if start_s - early[0].start / SAMPLE_RATE > APART_S:
                    yield from early
                    early = []
                continue
            if back or start_s > over_s:
                over_s = -math.inf
            if over_s == -math.inf:
                yield item
        else:
            yield from early
            early = []
            yield item
    yield from early
