"""Loads that are kept up, against a server whose rate is known."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from bench.load import in_turn, interleaved, kept_up
from bench.timing import AT_LEAST, Side
from mubic_deploy.config import DEMO

CALL_S = 0.01


class Counter:
    """Serves one request at a time, each CALL_S long."""

    config, default_steps = DEMO, 4

    def __init__(self) -> None:
        self.lock, self.opened, self.closed, self.turns = threading.Lock(), 0, 0, list[int]()

    def open(self) -> Counter:
        self.opened += 1
        return self

    def close(self) -> None:
        self.closed += 1

    def predict(self, *_: object) -> tuple[np.ndarray, np.ndarray]:
        raise NotImplementedError

    def side(self, client: object) -> Side:
        def ask(turn: int) -> None:
            with self.lock:
                self.turns.append(turn)
                time.sleep(CALL_S)

        return ask


@pytest.mark.parametrize("concurrency", [1, 4])
def test_rate_and_latency(concurrency: int) -> None:
    server = Counter()
    answers = kept_up(server.open, server.side, concurrency, 0.5)
    # one at a time: the rate is the server's whoever asks, and each waits for those before it
    assert answers.clips / answers.seconds == pytest.approx(1 / CALL_S, rel=0.3)
    assert answers.clips / answers.seconds < 1.001 / CALL_S
    assert np.mean(answers.latencies) == pytest.approx(concurrency * CALL_S, rel=0.4)
    assert answers.seconds >= 0.5
    assert (server.opened, server.closed) == (concurrency, concurrency)
    assert len(set(server.turns)) == len(server.turns)  # no two clients send the same clip at once


def test_a_short_load_counts_every_client() -> None:
    server = Counter()
    answers = kept_up(server.open, server.side, 2 * AT_LEAST, 0.0)
    assert answers.clips >= 2 * AT_LEAST


def test_what_a_client_raises_ends_the_load() -> None:
    server = Counter()

    def sides(client: object) -> Side:
        side = server.side(client)

        def ask(turn: int) -> None:
            if turn == 7:
                raise ValueError("the server is gone")
            side(turn)

        return ask

    with pytest.raises(ValueError, match="the server is gone"):
        kept_up(server.open, sides, 3, 60.0)
    assert server.closed == server.opened == 3

    def refused() -> Counter:
        raise ValueError("no server")

    with pytest.raises(ValueError, match="no server"):
        kept_up(refused, server.side, 3, 60.0)


def test_batches_count_their_clips() -> None:
    answers = in_turn(lambda i: time.sleep(CALL_S), 8, 0.1)
    assert answers.clips == 8 * len(answers.latencies)
    assert answers.clips / answers.seconds == pytest.approx(8 / CALL_S, rel=0.2)


def test_loads_take_turns() -> None:
    order: list[str] = []

    def run(name: str, rate: int):
        def load(seconds: float):
            order.append(name)
            return in_turn(lambda i: time.sleep(1 / rate), 1, seconds)

        return load

    loads = interleaved({"slow": run("slow", 50), "fast": run("fast", 200)}, 0.4, 4)
    assert sorted(order[:2]) == sorted(order[2:4]) == ["fast", "slow"]
    assert loads["fast"].clips_per_s > 3 * loads["slow"].clips_per_s
    assert len(loads["fast"].answers) == 4
    assert loads["fast"].spread < 0.2
    assert len(loads["fast"].timing.samples) == sum(len(a.latencies) for a in loads["fast"].answers)
