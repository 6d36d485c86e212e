"""Runs tritonserver for a parent process and cleans up behind it, even if that parent is killed.

A script of its own that imports nothing but the standard library. Its argument is JSON (see `server`). The parent
holds the other end of its standard input: when that closes, on purpose or because the parent is gone, the server is
shut down and what it left in shared memory and in its temporary folder is removed. A byte before that means that
nobody waits for an answer any more: the server is killed."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_POLL = 0.05  # s


def _die_with_parent() -> None:
    """The server must not outlive a watchdog that was killed. Safe here: the watchdog has one thread."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _has_ended(process: subprocess.Popen, seconds: float) -> bool:
    """Whether the process ends within this time. It stays a zombie, so that its process group keeps its number."""
    end = time.monotonic() + seconds
    while True:
        if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return True
        if time.monotonic() >= end:
            return False
        time.sleep(_POLL)


def _wait_for_end(process: subprocess.Popen) -> bool:
    """Returns when the process ends or the parent wants it to; whether it may take its time."""
    while not _has_ended(process, 0):
        readable, _, _ = select.select([sys.stdin], [], [], _POLL)
        if readable:
            return not os.read(sys.stdin.fileno(), 1)
    return True


def _stop(process: subprocess.Popen, grace: float) -> int:
    """Ends the server, with `grace` seconds for what it is doing, and then whatever is left in its process group.
    -> its exit status."""
    if grace and not _has_ended(process, 0):
        process.send_signal(signal.SIGINT)
        if not _has_ended(process, grace):
            process.terminate()
            _has_ended(process, 2.0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def main(argument: str) -> int:
    job = json.loads(argument)

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it came from a terminal: the parent decides
    try:
        kindly = True
        process = subprocess.Popen(
            job["command"],
            env=os.environ | job["env"],
            stdin=subprocess.DEVNULL,
            preexec_fn=_die_with_parent,
            process_group=0,
        )
        try:
            kindly = _wait_for_end(process)
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            status = _stop(process, job["grace"] if kindly else 0)
    finally:
        for region in Path("/dev/shm").glob(f"{job['shm_prefix']}*"):
            region.unlink(missing_ok=True)
        for folder in job["remove"]:
            shutil.rmtree(folder, ignore_errors=True)
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
