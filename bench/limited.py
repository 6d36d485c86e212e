"""A command with a limit: when its time is over, it and all that it started are killed."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from mubic_deploy.errors import UserError

ROOT = Path(__file__).parent.parent

TAIL = 20  # lines
# a crash as PyTorch writes it: the thread that crashed, then all others, each with its stack in C++
CRASH, FRAME = re.compile(r"SIG\w+\(\d+\), PID: "), re.compile(r" *frame #\d+: |<omitting python frames>")
GONE_S = 2.0


class EndedError(UserError):
    """A process that did not do its work. said: the last lines that it wrote."""

    def __init__(self, message: str, said: list[str]) -> None:
        super().__init__(message)
        self.said = said


class CutError(EndedError):
    """Its time was over."""


def run(command: Sequence[str], limit_s: float) -> None:
    """Runs a command in the checkout. Whatever becomes of it, nothing that it started in its process group is left.

    CutError after limit_s; EndedError if it failed."""
    with tempfile.TemporaryDirectory(prefix="mubic-limited-") as folder:
        log = Path(folder) / "log"
        with log.open("wb") as said:
            # a group of its own, but no session: whoever ends this one's session ends it too
            process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT, process_group=0
            )
        try:
            process.wait(max(0.0, limit_s))
        except subprocess.TimeoutExpired:
            raise CutError(f"cut after the {limit_s:.0f} s that it was given", tail(log)) from None
        finally:
            kill(process)
        if process.returncode != 0:
            lines, code = tail(log), process.returncode
            ended = f"{code}: {' '.join(lines[-1:])[:300]}" if code > 0 else signal.Signals(-code).name
            raise EndedError(f"its process ended with {ended}", lines)


def kill(leader: subprocess.Popen[bytes]) -> None:
    """Ends all of a process group, and waits until they are gone and their memory with them: for GONE_S at most, since
    where nobody takes care of orphans they stay in the table."""
    until = time.monotonic() + GONE_S
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader.pid, signal.SIGKILL)
        leader.wait()
        while time.monotonic() < until:
            os.killpg(leader.pid, signal.SIGKILL)
            time.sleep(0.02)
    leader.wait()


def tail(log: Path) -> list[str]:
    """The last lines of a file that are not empty, none where it is missing. Of a crash, first the stack of the thread
    that crashed, and none of the others'."""
    text = log.read_text(errors="replace") if log.exists() else ""
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    crash = next((i for i, line in enumerate(lines) if CRASH.match(line)), None)
    if crash is None:
        return lines[-TAIL:]
    stack = itertools.takewhile(FRAME.match, lines[crash + 1 :])
    rest = [line for line in lines[crash:] if not (CRASH.match(line) or FRAME.match(line))]
    return [lines[crash], *itertools.islice(stack, TAIL), *rest[-TAIL:]]
