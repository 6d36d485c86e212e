"""Peak memory of a process of its own: `python -m bench.child` runs one piece of work and says its peak.

The peak is VmHWM of /proc/self/status: of this program alone, where getrusage also counts what the parent was before it
began another program. This module imports no PyTorch, so the peak is what a deployment needs."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mubic_deploy import cli
from mubic_deploy.artifacts import Artifacts
from mubic_deploy.engines import cpu
from mubic_deploy.errors import UserError
from mubic_deploy.parity import random_clip
from mubic_deploy.pipeline import Pipeline

CALLS = 5


def peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def run(work: str, *arguments: str) -> dict[str, float]:
    """One of WORK in a process of its own: what it returned, peak_bytes, and wall_s from its start to its end.
    UserError with the end of what it printed if it failed."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "bench.child", work, *arguments]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UserError(f"{work} {' '.join(arguments)} failed ({' '.join(done.stderr.split())[-300:]})")
    return {**json.loads(done.stdout.splitlines()[-1]), "wall_s": time.perf_counter() - began}


def infer(engine: str, artifacts: str, threads: str, batch: str, steps: str) -> dict[str, float]:
    """Some calls of one engine."""
    graphs = Artifacts.open(Path(artifacts))
    pipeline = Pipeline(graphs.config, cpu.load_engines(engine, graphs, int(threads)))
    clip = random_clip(graphs.config, 0, int(batch))
    for i in range(CALLS):
        pipeline.predict(clip["VIDEO"], clip["AUDIO"], i, int(steps))
    return {}


def command(threads: str, *arguments: str) -> dict[str, float]:
    """The command line of the package, on so many cores, for not every command takes a number of threads; with --json
    its figures are returned."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(threads)])
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        status = cli.main(arguments)
    if status != 0:
        sys.exit(status)
    answer: dict[str, Any] = json.loads(said.getvalue()) if "--json" in arguments else {}
    return {name: value for name, value in answer.items() if isinstance(value, int | float)}


WORK: dict[str, Callable[..., dict[str, float]]] = {"infer": infer, "command": command}


def main(arguments: Sequence[str]) -> None:
    answer = WORK[arguments[0]](*arguments[1:])
    print(json.dumps({**answer, "peak_bytes": peak_bytes()}))


if __name__ == "__main__":
    main(sys.argv[1:])
