"""The thread that carries a stream to the server and back, through whatever happens to the connection."""

from __future__ import annotations

import math
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from tritonclient.utils import InferenceServerException

from mubic_deploy.config import Config
from mubic_deploy.errors import UserError
from mubic_deploy.live.backlog import Backlog, Request, Waiting
from mubic_deploy.live.link import Answer, Link, Settings, lives
from mubic_deploy.live.report import KEPT, Gap, Report, percentiles

FLUSH_S = 0.5  # what completes no window is sent after this time
UNREAD = 64  # maps that nobody reads hold the stream back
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0  # s between two tries to connect
_TICK = 0.1  # s
_SLOWER = 2.0  # than the slowest map before: what takes so much longer does not come


@dataclass(frozen=True)
class Limits:
    """See `StreamClient`."""

    max_waiting: int
    in_flight: int
    timeout: float
    give_up_s: float


@dataclass(frozen=True)
class Found:
    """A map as it came: its tensors, its window, and when its middle frame was fed and the map arrived."""

    tensors: dict[str, np.ndarray]
    window: Waiting
    captured_s: float
    arrived_s: float


@dataclass(frozen=True)
class Moment:
    """On the client's clock and on the stream's, and how many windows had been dropped by then."""

    now_s: float
    time_s: float
    dropped: int


class Sender:
    """Whoever feeds or reads holds `changed`, and notifies it of what was fed.

    backlogs  one for each run of the stream; the last one is fed, the first one is sent
    results   maps that nobody has read yet
    failure   what ended the stream before its time
    through   everything was sent and answered"""

    def __init__(
        self, address: str, config: Config, settings: Settings, limits: Limits, on_gap: Callable[[Gap], None] | None
    ) -> None:
        self.changed = threading.Condition()
        self.backlogs = deque([Backlog(config, settings.stride)])
        self.results: deque[Found] = deque()
        self.failure: UserError | None = None
        self.through = False
        self.closed = False
        self._address, self._config, self._settings, self._limits = address, config, settings, limits
        self._on_gap = on_gap
        self._latencies: deque[float] = deque(maxlen=KEPT)
        self._maps = self._dropped = self._lost = self._gaps = self._bytes = 0
        self._link: Link | None = None
        self._broken: str | None = None  # why a new sequence must begin
        self._rested = False  # all of the sequence had been answered before what is outstanding was sent
        self._forgotten = False  # while it rested, by the server: another one begins
        self._renewed = False  # so, and no map has come since: the next time it counts as broken
        self._outstanding: dict[str, float] = {}  # when each request was sent
        self._silent = Moment(0.0, 0.0, 0)  # since when there was no answer, though one was due
        self._sent_s = 0.0  # when something was last sent
        self._asked_s = 0.0  # when it was last asked whether it lives, which it says without a map
        self._slowest_s: float | None = None  # that a map has taken on this connection; None before the first
        self._outage: tuple[Moment, float, str] | None = None  # since when, when it was noticed, why
        self._pause = _FIRST_PAUSE
        self._sound_late = False
        self._thread = threading.Thread(target=self._run, name="mubic-stream", daemon=True)
        self._thread.start()

    @property
    def over(self) -> bool:
        return self.closed or self.failure is not None

    @property
    def waiting(self) -> int:
        """Complete windows that were not sent."""
        return sum(len(backlog.ready) for backlog in self.backlogs)

    def drop(self) -> None:
        """Gives up windows, the oldest first, until few enough wait."""
        while self.waiting > self._limits.max_waiting:
            self._dropped += 1
            next(backlog for backlog in self.backlogs if backlog.ready).drop()

    def jump(self, time_s: float, text: str, now_s: float) -> None:
        """The source's clock goes back: the run so far ends, and another one begins. The windows over the seam are
        lost."""
        ended, lost = self.backlogs[-1].timeline.sound_ended, self.backlogs[-1].cut_off
        self.backlogs[-1].finish(now_s)
        self.backlogs.append(Backlog(self._config, self._settings.stride, self.backlogs[-1].next_index))
        if ended:
            self.backlogs[-1].end_sound(now_s)
        self.note(Gap("clock", time_s, 0.0, lost, text))

    def note(self, gap: Gap) -> None:
        self._gaps += 1
        self._lost += gap.lost
        if self._on_gap is not None:
            self._on_gap(gap)

    def report(self) -> Callable[[], Report]:
        """What makes the report, without the lock: percentiles take some ms after hours."""
        waiting = [window for backlog in self.backlogs for window in (*backlog.sent, *backlog.ready)]
        lag_s = time.monotonic() - min(window.ready_s for window in waiting) if waiting else 0.0
        counts = self._maps, self._dropped, self._lost, self._gaps, len(waiting), lag_s
        sent_bytes = self._bytes + (self._link.bytes if self._link else 0)
        latencies = list(self._latencies)
        return lambda: Report(*counts, *percentiles(latencies), sent_bytes)

    def close(self) -> None:
        """Ends the connection; what was not answered is given up. Not to be called with `changed` held."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()
        self._thread.join()

    # ---- the thread

    def _run(self) -> None:
        try:
            while not self.through:
                with self.changed:
                    if self.over:
                        break
                    action = self._next()
                    if action is None:
                        self.changed.wait(_TICK)
                if action is not None:
                    action()
        except UserError as error:
            with self.changed:
                self.failure = error
        except Exception as problem:  # it belongs to whoever reads the stream
            with self.changed:
                self.failure = UserError(f"the stream's client failed: {problem!r}")
        finally:
            self._close_link()
            with self.changed:
                self.changed.notify_all()

    def _next(self) -> Callable[[], None] | None:
        """What is to be done now; it will be without the lock. None to wait."""
        now = time.monotonic()
        backlog = self.backlogs[0]
        if self._broken is None and self._outstanding:
            since = self._silent.now_s
            longest = max(self._limits.timeout, self._limits.give_up_s)
            if now - since > longest:
                self._broken = f"it lives, but sent nothing for {longest:g} s"
            elif now - max(since, self._asked_s) > self._limits.timeout:
                return partial(self._ask, f"no answer for {self._limits.timeout:g} s")
        if self._broken is not None:
            return partial(self._mend, self._broken)
        if self._forgotten:
            return self._renew
        if len(self.results) < UNREAD:
            request = backlog.request(self._limits.in_flight, flush=now - self._sent_s > FLUSH_S)
            if request is not None:
                return partial(self._send, request)
        if self._outstanding:
            return None
        if backlog.finished and not backlog.ready and backlog.sent:
            lost = len(backlog.give_up_sent())
            text = f"the server left {lost} window(s) without an answer"
            self.note(Gap("connection", backlog.timeline.last_s, 0.0, lost, text))
        return self._end_run if backlog.done else None

    def _send(self, request: Request) -> None:
        with self.changed:  # an answer may come before the link is known
            if not self._outstanding:
                self._rested = self._link is not None
            if self._link is None:
                size = self._config.height, self._config.width
                self._link = Link(self._address, self._settings, size, self._receive)
                self._slowest_s = None
            link = self._link
            self._sent_s = time.monotonic()
            if not self._outstanding:
                self._silent = self._now()
            self._outstanding[link.next_id] = self._sent_s
        try:
            link.send(request)
        except InferenceServerException as error:
            with self.changed:
                self._broken = error.message()

    def _ask(self, why: str) -> None:
        """Whether the server lives. If it does, it is waited for: asking it for the same window again, which it cannot
        know to be the same, would only give it more to do.

        It may live while the connection is dead, of which a router on the way has forgotten all: that is asked on the
        connection itself. On a slow line the question stands behind frames of many seconds, so a connection on which
        maps have taken long, or none has come yet, is dead only where the server answers on no other either."""
        asked = time.monotonic()
        alive = self._link is not None and self._link.lives()
        with self.changed:
            slow = self._slowest_s is None or asked - self._silent.now_s < _SLOWER * self._slowest_s
        alive = alive or (slow and lives(self._address))
        with self.changed:
            self._asked_s = time.monotonic()
            if not alive and self._outstanding and self._silent.now_s < asked:
                self._broken = why

    def _now(self) -> Moment:
        return Moment(time.monotonic(), self.backlogs[0].timeline.last_s, self._dropped)

    def _end_run(self) -> None:
        self._close_link()
        with self.changed:
            if len(self.backlogs) > 1:
                self.backlogs.popleft()
            else:
                self.through = True

    def _renew(self) -> None:
        """Begins a new sequence for one that had nothing to send for longer than the server keeps it, as between
        windows that are far apart: all of it was answered, so nothing is lost, and there is no gap."""
        self._close_link()
        with self.changed:
            self._renewed = True
            self._restart()

    def _restart(self) -> None:
        self.backlogs[0].begin_again()
        self._outstanding.clear()
        self._broken, self._forgotten = None, False

    def _mend(self, why: str) -> None:
        """Begins a new sequence, after a pause."""
        self._close_link()
        with self.changed:
            now = time.monotonic()
            if self._outage is None:
                self._outage = self._silent if self._outstanding else self._now(), now, why
                self._pause = _FIRST_PAUSE
            self._restart()
            if now - self._outage[1] > self._limits.give_up_s:
                raise UserError(
                    f"the Triton server at {self._address} gave no answer for {self._limits.give_up_s:g} s ({why}): "
                    f"start it with mubic-deploy serve, check the network, or give it less to do"
                )
            # clients that lost the same server shall not all come back at once
            pause = self._pause * random.uniform(0.7, 1.3)
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
            self.changed.wait_for(lambda: self.over, pause)

    def _close_link(self) -> None:
        """Without the lock: the link's thread may be waiting for it."""
        with self.changed:
            link, self._link = self._link, None
            self._bytes += link.bytes if link else 0
        if link is not None:
            link.close()

    # ---- on a thread of the connection's

    def _receive(self, link: Link, answer: Answer) -> None:
        arrived = time.monotonic()
        with self.changed:
            if link is not self._link:  # of a sequence that was given up
                return
            if answer.error is None:
                backlog = self.backlogs[0]
                # frames are taken by a server whose model fails, too: only a map shows that it works
                if answer.tensors or not (backlog.sent or backlog.ready):
                    self._mended(arrived)
                if answer.tensors:
                    took_s = arrived - self._outstanding.get(answer.request, arrived)
                    self._slowest_s = max(self._slowest_s or 0.0, took_s)
                    self._take(answer.tensors, arrived)
                if answer.final:
                    self._outstanding.pop(answer.request, None)
                self._silent = self._now()
                self._rested = False
            elif answer.forgotten and self._rested and not self._renewed:
                self._forgotten = True
            elif answer.passing:
                self._broken = answer.error
            else:
                self.failure = UserError(f"the Triton server at {self._address} refused the stream: {answer.error}")
            self.changed.notify_all()

    def _mended(self, now_s: float) -> None:
        if self._outage is None:
            return
        began, _, why = self._outage
        self._outage = None
        lost, seconds = self._dropped - began.dropped, now_s - began.now_s
        text = f"no maps from {self._address} for {seconds:.1f} s ({why}): {lost} window(s) lost"
        # it may have begun with sound, before any frame
        time_s = began.time_s if math.isfinite(began.time_s) else self.backlogs[0].timeline.last_s
        # those are among the dropped ones already
        self.note(Gap("connection", time_s, seconds, 0, text))

    def _take(self, tensors: dict[str, np.ndarray], arrived: float) -> None:
        found = self.backlogs[0].answered(int(tensors["MAP_INDEX"][0]))
        if found is None:
            return
        self._renewed = False
        window, captured = found
        late = window.late and float(tensors["HEARD"][0]) < 1
        if late and not self._sound_late:
            time_s = float(tensors["MAP_TIME"][0])
            self.note(Gap("sound", time_s, 0.0, 0, f"no sound in time at {time_s:.3f} s: silence is used"))
        self._sound_late = late
        self._maps += 1
        self._latencies.append(arrived - captured)
        self.results.append(Found(tensors, window, captured, arrived))
