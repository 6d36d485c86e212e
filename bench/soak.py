"""A long run: four live streams, a client killed and the server restarted on the way; memory, windows lost, gaps."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from bench.looped import RATE, Loop, clip, repository, server_of
from bench.results import Results, Row
from bench.serving import processes
from bench.timing import with_ends
from mubic_deploy import StreamClient
from mubic_deploy.config import DEMO
from mubic_deploy.triton.server import TritonServer

CLIENTS = 4
SAMPLED_S = 15.0  # between two looks at the server's memory; the clients' is looked at every second time
LOOKS = 6  # at memory, of which the lowest counts
LATEST_S = 300.0  # for a client to end after its last frame
FAILED: dict[str, Any] = {"failed": 1, "lost": math.nan}  # nobody knows how many
LAST_S = 1200.0  # of a run, whose growth counts


def soak(arguments: argparse.Namespace, results: Results) -> None:
    """Every client makes a map a second, so that four of them leave the server room to breathe."""
    seconds = 60 * arguments.minutes
    every = min(SAMPLED_S, seconds / 16)  # a short run shall have enough of them
    film = str((arguments.film or clip()).resolve())
    events: list[dict[str, Any]] = []
    memory: dict[str, list[tuple[float, float]]] = {}  # of whom: (seconds since the beginning, MB)
    with repository() as models, contextlib.ExitStack() as stack:
        server = stack.enter_context(server_of(models))
        clients = [_client(film, server.url, seconds) for _ in range(CLIENTS)]
        for process in clients:
            stack.callback(process.wait)  # after it was killed
            stack.callback(process.kill)
        began = time.monotonic()
        for n in range(int(seconds / every) + 1):
            at = n * every
            time.sleep(max(0.0, began + at - time.monotonic()))
            if not events and at >= seconds / 6:
                clients[0].kill()
                clients[0].wait()
                events.append({"what": "client killed", "at_s": at})
            if len(events) == 1 and at >= seconds / 4:
                server.stop()
                server = stack.enter_context(server_of(models, server.grpc_port))
                events.append({"what": "server restarted", "at_s": at, "took_s": time.monotonic() - began - at})
            at = time.monotonic() - began
            memory.setdefault("server", []).append((at, lowest(partial(server_mb, server))))
            if n % 2 == 0:
                for i, process in enumerate(clients[1:], 1):
                    with contextlib.suppress(OSError):  # it ended; how, is seen below
                        kept = lowest(partial(private_mb, process.pid))
                        memory.setdefault(f"client {i}", []).append((at, kept))
        reports = {f"client {i}": _said(process, i) for i, process in enumerate(clients[1:], 1)}
    for who, samples in memory.items():
        report = reports.get(who, {})
        values = with_ends("growth", (growth(samples), *growths(samples))) | {"private_mb": samples[-1][1]}
        values |= {name: value for name, value in report.items() if name != "gaps"}
        if report:
            values["gaps"] = len(report["gaps"])
            results.notes[f"gaps of {who}"] = report["gaps"]
        results.rows.append(Row("soak", who, values=values))
    results.notes |= {"events": events, "memory_mb": memory}


def growth(samples: Sequence[tuple[float, float]], last_s: float = LAST_S) -> float:
    """By which part memory grew: median over the last third of the run's end against median over its first third, minus
    1. The end is the last 20 minutes, or two thirds of a run that is shorter than 30. samples: (seconds, MB), in order;
    NaN where there are too few."""
    if not samples:
        return math.nan
    end = samples[-1][0]
    span = min(last_s, 2 / 3 * (end - samples[0][0]))
    first = [mb for at, mb in samples if end - span <= at <= end - 2 / 3 * span]
    last = [mb for at, mb in samples if at >= end - span / 3]
    return median(last) / median(first) - 1 if first and last and span else math.nan


def growths(samples: Sequence[tuple[float, float]], last_s: float = LAST_S) -> tuple[float, float]:
    """The least and the most that `growth` would have been, had the run stopped somewhere in the last third of its end:
    what comes and goes in minutes must not hang on when that was. NaN where there are too few samples."""
    if not samples:
        return math.nan, math.nan
    (began, _), (end, _) = samples[0], samples[-1]
    third = min(last_s, 2 / 3 * (end - began)) / 3
    stops = [i for i, (at, _) in enumerate(samples, 1) if at >= end - third]
    found = [growth(samples[:i], last_s) for i in stops]
    return float(np.min(found)), float(np.max(found))


def _client(film: str, url: str, seconds: float) -> subprocess.Popen[str]:
    """`client` in a process of its own."""
    code = "import sys; from bench.soak import client; client(sys.argv[1], sys.argv[2], float(sys.argv[3]))"
    command = [sys.executable, "-c", code, film, url, str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent)


def client(film: str, url: str, seconds: float) -> None:
    """A stream in its own time, a map a second. Prints how it went."""
    loop, gaps, indices = Loop(Path(film)), [], []
    frames = round(seconds * RATE)
    began = time.monotonic()
    with StreamClient(
        url,
        stride=RATE,
        on_lag="queue",
        max_waiting=60,  # a camera does not wait for a server that is away
        give_up_s=120,
        on_gap=lambda gap: gaps.append(gap.text),
    ) as feed:
        for i in range(frames):
            time.sleep(max(0.0, began + i / RATE - time.monotonic()))
            loop.feed(feed, i)
            while (found := feed.poll()) is not None:
                indices.append(found.frame_index)
        feed.finish()
        indices += [found.frame_index for found in feed]
    expected = {start + DEMO.middle for start in range(0, frames - DEMO.frames + 1, RATE)}
    lost, twice = len(expected - set(indices)), len(indices) - len(set(indices))
    print(json.dumps({"maps": len(indices), "lost": lost, "twice": twice, "gaps": gaps}))


def _said(process: subprocess.Popen[str], number: int) -> dict[str, Any]:
    """What a client printed; FAILED, and why, if it printed nothing of use."""
    try:
        out, _ = process.communicate(timeout=LATEST_S)
    except subprocess.TimeoutExpired:
        return {**FAILED, "gaps": [f"client {number} did not end within {LATEST_S:g} s"]}
    if process.returncode:
        return {**FAILED, "gaps": [f"client {number} ended with exit code {process.returncode}"]}
    report: dict[str, Any] = json.loads(out)
    return report


def lowest(look: Callable[[], float]) -> float:
    """The least of some looks within a second: what a request takes while it is computed comes and goes, and the looks
    of a run keep step with the clients."""
    found = []
    for _ in range(LOOKS):
        found.append(look())
        time.sleep(1 / LOOKS)
    return min(found)


def server_mb(server: TritonServer) -> float:
    """Of the server and its models' processes, and what they share in /dev/shm."""
    total = 0.0
    for file in Path("/dev/shm").glob(f"{server.shm_prefix}*"):
        with contextlib.suppress(OSError):
            total += file.stat().st_blocks * 512 / 1e6
    for process in processes(server):
        with contextlib.suppress(OSError):
            total += private_mb(process)
    return total


def private_mb(process: int) -> float:
    """MB of memory that a process shares with no other. OSError if it is gone."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) * 1024 / 1e6
