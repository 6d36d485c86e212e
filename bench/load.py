"""Throughput under a load that is kept up: clients that ask again as soon as they are answered, each in a thread with a
connection of its own, until enough answers were counted."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

from bench.serving import Client
from bench.timing import AT_LEAST, Side, Timing

Open = Callable[[], Client]
Run = Callable[[float], "Answers"]  # loads for at least so many seconds


@dataclass(frozen=True)
class Answers:
    """What one load counted. clips: in all its answers; seconds: from the last answer that was not counted to the last
    that was; latencies: seconds of each request."""

    clips: int
    seconds: float
    latencies: tuple[float, ...]
    warm_ups: int


@dataclass(frozen=True)
class Load:
    """Several such loads together."""

    answers: Sequence[Answers]

    @property
    def clips_per_s(self) -> float:
        return sum(a.clips for a in self.answers) / sum(a.seconds for a in self.answers)

    @property
    def spread(self) -> float:
        """Half of the range of the loads' own rates, over the rate of all."""
        rates = [a.clips / a.seconds for a in self.answers]
        return (max(rates) - min(rates)) / 2 / self.clips_per_s

    @property
    def timing(self) -> Timing:
        """The latency of every counted request."""
        latencies = tuple(s for a in self.answers for s in a.latencies)
        return Timing(latencies, sum(a.warm_ups for a in self.answers))


def kept_up(open_client: Open, sides: Callable[[Client], Side], concurrency: int, seconds: float) -> Answers:
    """Loads with `concurrency` clients of their own. sides: what one client does, as `timing.measure` takes it.

    Not counted: until every client was answered AT_LEAST times in all and once each, so that queues and batches are as
    they stay. Then answers count for `seconds`, and until there was one for each client and AT_LEAST. The load goes on
    until the last counted answer is there. What a client raises is raised here, after all have ended."""
    lock, stop = threading.Lock(), threading.Event()
    done: list[tuple[float, float]] = []  # when each answer came, and its latency
    raised: list[BaseException] = []
    ready, began_counting = threading.Barrier(concurrency), [0.0]
    skipped = max(AT_LEAST, concurrency)

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
                        done.append((ended, ended - began))
                        if len(done) == skipped:
                            began_counting[0] = ended
                        counted = len(done) - skipped
                        if counted >= skipped and ended - began_counting[0] >= seconds:
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
    for thread in threads:
        thread.join()
    if raised:
        raise raised[0]
    end = next(i for i, (t, _) in enumerate(done) if i + 1 >= 2 * skipped and t - began_counting[0] >= seconds)
    counted = done[skipped : end + 1]
    latencies = tuple(latency for _, latency in counted)
    return Answers(len(counted), counted[-1][0] - began_counting[0], latencies, skipped)


def in_turn(side: Side, clips: int, seconds: float) -> Answers:
    """One caller in this process, `clips` a call: calls for `seconds`, and at least AT_LEAST."""
    for i in range(2):
        side(i)
    began, latencies = time.perf_counter(), list[float]()
    while len(latencies) < AT_LEAST or sum(latencies) < seconds:
        before = time.perf_counter()
        side(len(latencies))
        latencies.append(time.perf_counter() - before)
    return Answers(clips * len(latencies), time.perf_counter() - began, tuple(latencies), 2)


def interleaved(
    runs: Mapping[str, Run],
    seconds: float,
    rounds: int,
    progress: Callable[[str, int, int], None] = lambda *_: None,
    seed: int = 0,
) -> dict[str, Load]:
    """Every load for `seconds` in `rounds` parts, in a new random order each round, so that what the machine does
    meanwhile meets all alike."""
    answers: dict[str, list[Answers]] = {name: [] for name in runs}
    order = random.Random(seed)
    for i in range(rounds):
        for j, name in enumerate(order.sample(list(runs), len(runs))):
            progress(name, i * len(runs) + j, rounds * len(runs))
            answers[name].append(runs[name](seconds / rounds))
    return {name: Load(tuple(a)) for name, a in answers.items()}
