"""Loads that are kept up, against a server whose rate is known."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from bench.load import Answers, Load, Run, in_turn, interleaved, kept_up
from bench.results import Results
from bench.sides import Context
from bench.suites import server as suite
from bench.timing import Rule, Side, Timing
from mubic_deploy.config import DEMO
from mubic_deploy.errors import UserError

CALL_S, BURST = 0.03, 4


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


class Bursts(Counter):
    """Answers requests together, BURST at a time, as a server does that merges them."""

    def __init__(self) -> None:
        super().__init__()
        self.together = threading.Barrier(BURST, lambda: time.sleep(BURST * CALL_S))

    def side(self, client: object) -> Side:
        def ask(turn: int) -> None:
            with contextlib.suppress(threading.BrokenBarrierError):  # the others have ended
                self.together.wait(timeout=1)

        return ask


@pytest.mark.parametrize("concurrency", [1, 4])
def test_rate_and_latency(concurrency: int) -> None:
    server = Counter()
    began = time.perf_counter()
    answers = kept_up(server.open, server.side, concurrency, 1.0)
    rate = len(server.turns) / (time.perf_counter() - began)  # as the server saw it, over all of the load
    # one at a time: the rate is the server's whoever asks, and each waits for those before it
    assert answers.clips / answers.seconds == pytest.approx(rate, rel=0.15)
    assert np.mean(answers.latencies) == pytest.approx(concurrency / rate, rel=0.2)
    assert 1.0 <= answers.seconds < 1.5
    assert (server.opened, server.closed) == (concurrency, concurrency)
    assert len(set(server.turns)) == len(server.turns)  # no two clients send the same clip at once


def test_bursts_do_not_mislead() -> None:
    """Whole answers between the first and the last of a burst would be 25 % too many or too few here."""
    server = Bursts()
    answers = kept_up(server.open, server.side, BURST, 3.5 * BURST * CALL_S)
    assert answers.clips / answers.seconds == pytest.approx(1 / CALL_S, rel=0.12)


def test_every_client_is_answered_before_and_within() -> None:
    """A server that is unfair: the last client is answered a tenth as often."""

    class Unfair(Counter):
        def side(self, client: object) -> Side:
            slow = self.opened == 3

            def ask(turn: int) -> None:
                time.sleep(10 * CALL_S if slow else CALL_S)
                with self.lock:
                    self.turns.append(turn % 3)

            return ask

    server = Unfair()
    answers = kept_up(server.open, server.side, 3, 0.0)
    assert all(server.turns.count(client) >= 2 for client in range(3))
    assert answers.seconds >= 9 * CALL_S


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
    answers = in_turn(lambda i: time.sleep(CALL_S), 8, 0.3)
    assert answers.clips == 8 * len(answers.latencies)
    assert answers.clips / answers.seconds == pytest.approx(8 / np.mean(answers.latencies), rel=0.1)


def test_loads_take_turns() -> None:
    order: list[str] = []

    def run(name: str, call_s: float) -> Run:
        def load(seconds: float) -> Answers:
            order.append(name)
            return in_turn(lambda i: time.sleep(call_s), 1, seconds)

        return load

    loads = interleaved({"slow": run("slow", 0.08), "fast": run("fast", 0.02)}, 0.8, 4)
    assert sorted(order[:2]) == sorted(order[2:4]) == ["fast", "slow"]
    assert loads["fast"].clips_per_s > 2 * loads["slow"].clips_per_s
    assert len(loads["fast"].answers) == 4
    assert len(loads["fast"].timing.samples) == sum(len(a.latencies) for a in loads["fast"].answers)


def test_perf_analyzer_is_one_of_the_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes turns with our clients, and is set against them round by round; of what fails there is no row."""
    order, asked = list[str](), list[int]()

    class Quick(Counter):
        def close(self) -> None: ...

        def predict(self, *_: object) -> tuple[np.ndarray, np.ndarray]:
            time.sleep(0.002)
            return np.zeros(1), np.zeros(1)

    def ours(where: str, protocol: str) -> Quick:
        order.append("ours")
        return Quick()

    def theirs(analyzer: object, where: str, protocol: str, concurrency: int, requests: int, inputs: Path) -> dict:
        if protocol == "http":
            raise UserError("perf_analyzer failed")
        order.append("theirs")
        asked.append(requests)
        tails = {f"p{q}_s": float(len(asked)) for q in (90, 99)}
        return {"clips_per_s": (300.0, 600.0, 900.0)[len(asked) - 1], "median_s": 1.0, **tails}

    monkeypatch.setattr(suite, "client", ours)
    monkeypatch.setattr(suite.perf_analyzer, "find", lambda folder: None)
    monkeypatch.setattr(suite.perf_analyzer, "write_inputs", lambda path, *_: path)
    monkeypatch.setattr(suite.perf_analyzer, "run", theirs)
    monkeypatch.setattr(suite, "ROUNDS", {"demo": (3, 0.1)})
    monkeypatch.setattr(suite, "CONCURRENCY", {"demo": (1,)})
    found = Results("server", {})
    found.add("whole", {"grpc": Timing((0.001,)), "http": Timing((0.001,))})
    context = Context("demo", 1, tmp_path)
    suite._throughput(context, None, {"grpc": "a", "http": "b"}, Rule(), found, dict)
    assert [set(order[i : i + 3]) for i in (0, 3, 6)] == [{"ours", "theirs"}] * 3
    assert asked == [33, 10, 20]  # of a tenth of a second in three windows, at the rate that is known
    row, mine = (found.row("server", side, protocol="grpc") for side in ("perf_analyzer", "our clients"))
    assert (row.values["clips_per_s"], row.values["p90_s"]) == (600.0, 2.0)
    assert "p99_s" not in row.values  # of 3 x 10 requests
    assert row.values["over_ours"] == pytest.approx(600 / mine.values["clips_per_s"], rel=0.3)
    assert "over_ours_low" not in row.values  # of three rounds
    assert found.left_out == {"perf_analyzer, 1 over http": "perf_analyzer failed"}
    assert [r.axes["protocol"] for r in found.rows if r.side == "perf_analyzer"] == ["grpc"]


def test_loads_are_told_by_their_rounds() -> None:
    """Ours as perf_analyzer's: medians over rounds, of which one was slow, and not the total and all calls together."""
    rounds = [Answers(c, 1.0, (1 / c,) * n, 5) for c, n in ((100.0, 100), (20.0, 20), (90.0, 100))]
    load = Load(rounds)
    values = suite.over_rounds([suite._said(a) for a in load.answers])
    assert values == pytest.approx({"clips_per_s": 90.0, "median_s": 1 / 90, "p90_s": 1 / 90, "p95_s": 1 / 90})
    assert load.clips_per_s == pytest.approx(70)
    assert set(suite._said(rounds[0])) - set(values) == {"p99_s"}  # which the slow round is too short for


def test_perf_analyzer_has_answers_enough_for_its_clients() -> None:
    asked = list[int]()

    def ask(requests: int) -> dict[str, float]:
        asked.append(requests)
        return {"clips_per_s": 1.0}

    suite.Analyzed(ask, 16, 1.0)(3.0)
    assert asked == [32]


def test_cpu_time_is_of_each_load_and_every_clip() -> None:
    """Clips that warm up are among those that took it."""
    spent = {"models": 5.0, "bench": 1.0}

    def work(share: float) -> Run:
        def call(i: int) -> None:
            time.sleep(0.01)
            spent["models"] += share * 4  # four clips a call

        return lambda seconds: in_turn(call, 4, seconds)

    loads = interleaved({"much": work(0.3), "little": work(0.1)}, 0.2, 2, used=lambda: dict(spent))
    assert loads["much"].cpu_s == pytest.approx({"models": 0.3, "bench": 0.0})
    assert loads["little"].cpu_s == pytest.approx({"models": 0.1, "bench": 0.0})


def test_loads_that_lie_apart_are_not_settled() -> None:
    def load(*rates: float) -> Load:
        return Load([Answers(rate, 1.0, (1 / rate,), 5) for rate in rates])

    assert load(10, 11).spread == pytest.approx(0.5 / 10.5)
    assert load(10, 11).timing.settled
    assert not load(10, 14).timing.settled
    assert math.isnan(load(10).spread)
    assert not load(10).timing.settled  # one alone says nothing about it
    assert load(10, 11, 12).timing.rounds == (1, 1, 1)
