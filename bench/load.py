"""Throughput under a load that is kept up: clients that ask again as soon as they are answered, each in a thread with a
connection of its own, until enough answers were counted."""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

from bench.serving import Client
from bench.timing import AT_LEAST, Side, Timing

Open = Callable[[], Client]
APART = 0.1  # a larger spread makes the loads' timing one that did not settle
Used = Callable[[], Mapping[str, float]]  # seconds of CPU time until now, by who took them
WARM_UPS = 2  # calls of one caller
Run = Callable[[float], "Answers"]  # loads for at least so many seconds


@dataclass(frozen=True)
class Answers:
    """What one load counted. clips: answered within, a request that reaches over an end by the part of its time that
    lies within; seconds: that it was counted for; latencies: seconds of each request that was answered within;
    answered: all clips, counted or not; cpu_s: seconds of CPU time for them, by who took them."""

    clips: float
    seconds: float
    latencies: tuple[float, ...]
    warm_ups: int
    answered: int = 0
    cpu_s: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Load:
    """Several such loads together."""

    answers: Sequence[Answers]

    @property
    def clips_per_s(self) -> float:
        return sum(a.clips for a in self.answers) / sum(a.seconds for a in self.answers)

    @property
    def rates(self) -> list[float]:
        """Clips a second of each."""
        return [a.clips / a.seconds for a in self.answers]

    @property
    def spread(self) -> float:
        """Half of the range of the loads' own rates, over the rate of all; NaN of one load alone."""
        return (max(self.rates) - min(self.rates)) / 2 / self.clips_per_s if len(self.answers) > 1 else math.nan

    @property
    def cpu_s(self) -> dict[str, float]:
        """Seconds of CPU time that a clip took, by who took them."""
        answered = sum(a.answered for a in self.answers)
        return {who: sum(a.cpu_s[who] for a in self.answers) / answered for who in self.answers[0].cpu_s}

    @property
    def timing(self) -> Timing:
        """The latency of every request that was answered. Not settled if the rates of the loads lie apart, or if there
        is one alone, of which that cannot be said."""
        latencies = tuple(s for a in self.answers for s in a.latencies)
        rounds = tuple(n for a in self.answers if (n := len(a.latencies)))
        return Timing(latencies, sum(a.warm_ups for a in self.answers), self.spread <= APART, rounds)


class _Window:
    """When answers count. It opens when every client was answered, and AT_LEAST were in all, so that queues and batches
    are as they stay. It closes after `seconds`, and not before the same is true of the answers in it. The load is kept
    up until each client was answered after that, so that what reaches over the end is as slow as the rest."""

    def __init__(self, concurrency: int, seconds: float) -> None:
        self.concurrency, self.seconds = concurrency, seconds
        self.opens = self.closes = math.inf
        self.done: list[tuple[float, float]] = []  # when each request began and ended, in the order of the ends
        self.warm_ups = 0
        self._answered: set[int] = set()  # clients, in this part
        self._count = 0  # answers in this part
        self._floor = math.inf  # when there were enough in the window

    def answered(self, client: int, began: float, ended: float) -> bool:
        """Notes an answer; whether the load may end."""
        self.done.append((began, ended))
        self._answered.add(client)
        self._count += 1
        enough = len(self._answered) == self.concurrency
        if self.opens == math.inf:
            if enough and self._count >= AT_LEAST:
                self.opens, self.warm_ups = ended, self._count
                self._next_part()
            return False
        if self.closes == math.inf:
            if enough and self._count >= AT_LEAST:
                self._floor = min(self._floor, ended)
            if ended < max(self._floor, self.opens + self.seconds):
                return False
            self.closes = max(self._floor, self.opens + self.seconds)
            self._next_part()
            self._answered.add(client)
        return len(self._answered) == self.concurrency

    def _next_part(self) -> None:
        self._answered, self._count = set(), 0

    def counted(self) -> Answers:
        inside = [(began, ended) for began, ended in self.done if ended > self.opens and began < self.closes]
        parts = [(min(e, self.closes) - max(b, self.opens)) / (e - b) for b, e in inside]
        latencies = tuple(e - b for b, e in inside if e <= self.closes)
        return Answers(sum(parts), self.closes - self.opens, latencies, self.warm_ups, len(self.done))


def kept_up(open_client: Open, sides: Callable[[Client], Side], concurrency: int, seconds: float) -> Answers:
    """Loads with `concurrency` clients of their own for `seconds` and some more: see `_Window`. sides: what one client
    does, as `timing.measure` takes it. What a client raises is raised here, after all have ended."""
    lock, stop = threading.Lock(), threading.Event()
    window, raised = _Window(concurrency, seconds), list[BaseException]()
    ready = threading.Barrier(concurrency)

    def work(index: int) -> None:
        try:
            with closing(open_client()) as client:
                side = sides(client)
                ready.wait()
                turn = index
                while not stop.is_set():
                    began = time.perf_counter()
                    side(turn)
                    ended = time.perf_counter()
                    turn += concurrency
                    with lock:
                        if window.answered(index, began, ended):
                            stop.set()
        except threading.BrokenBarrierError:
            pass  # another one failed, and says why
        except BaseException as error:
            raised.append(error)
            stop.set()
            ready.abort()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(concurrency)]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    finally:  # Ctrl-C too
        stop.set()
        ready.abort()
    if raised:
        raise raised[0]
    return window.counted()


def in_turn(side: Side, clips: int, seconds: float) -> Answers:
    """One caller in this process, `clips` a call: calls for `seconds`, and at least AT_LEAST."""
    for i in range(WARM_UPS):
        side(i)
    began, latencies = time.perf_counter(), list[float]()
    while len(latencies) < AT_LEAST or sum(latencies) < seconds:
        before = time.perf_counter()
        side(len(latencies))
        latencies.append(time.perf_counter() - before)
    counted, answered = clips * len(latencies), clips * (WARM_UPS + len(latencies))
    return Answers(counted, time.perf_counter() - began, tuple(latencies), WARM_UPS, answered)


def interleaved(
    runs: Mapping[str, Run],
    seconds: float,
    rounds: int,
    progress: Callable[[str, int, int], None] = lambda *_: None,
    seed: int = 0,
    used: Used = dict,
) -> dict[str, Load]:
    """Every load for `seconds` in all, in `rounds` parts and a new random order each round, so that what the machine
    does meanwhile meets all alike. What was `used` meanwhile is in the answers."""
    answers: dict[str, list[Answers]] = {name: [] for name in runs}
    order = random.Random(seed)
    for i in range(rounds):
        for j, name in enumerate(order.sample(list(runs), len(runs))):
            progress(name, i * len(runs) + j, rounds * len(runs))
            before = used()
            counted = runs[name](seconds / rounds)
            cpu_s = {who: now - before[who] for who, now in used().items()}
            answers[name].append(replace(counted, cpu_s=cpu_s))
    return {name: Load(tuple(a)) for name, a in answers.items()}
