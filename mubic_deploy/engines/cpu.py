"""The engines that run exported graphs on a CPU."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Protocol

from mubic_deploy.artifacts import Artifacts
from mubic_deploy.engines import Arrays, Engine, HostArrays
from mubic_deploy.errors import UserError
from mubic_deploy.graphs import Signature

ENGINES = ("openvino", "onnxruntime")  # the first is the default: it was the quicker one (docs/measured.md)

QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds of CPU, or max, and of how many
TOPOLOGY = Path("/sys/devices/system/cpu")


def cores() -> int:
    """How many this process may run on, its hardware threads counted once, or as many as its container has time for:
    the threads that a graph gets. Told to the engines, because ONNX Runtime pins those that it counts itself."""
    found = len({_core(number) for number in os.sched_getaffinity(0)})
    try:
        used, period = map(int, QUOTA.read_text().split())
    except (OSError, ValueError):  # no control groups of version 2, or "max"
        return found
    return min(found, math.ceil(used / period))


def _core(number: int) -> str:
    """The same for the hardware threads of one core."""
    try:
        return (TOPOLOGY / f"cpu{number}" / "topology" / "thread_siblings_list").read_text()
    except OSError:  # not told in every virtual machine
        return str(number)


class HostEngine(Protocol):
    """An `Engine` whose results are on the host."""

    signature: Signature

    def __call__(self, inputs: Arrays) -> HostArrays: ...


def load_engine(engine: str, path: Path, signature: Signature, threads: int = 0) -> HostEngine:
    """One of ENGINES over one ONNX file; threads 0: one a core, as of `cores`. UserError for an unknown or a
    missing one."""
    threads = threads or cores()
    if engine == "openvino":
        from mubic_deploy.engines.openvino import OpenVinoEngine

        return OpenVinoEngine(path, signature, threads)
    if engine == "onnxruntime":
        from mubic_deploy.engines.onnxruntime import OnnxRuntimeEngine

        return OnnxRuntimeEngine(path, signature, threads)
    raise UserError(f"unknown engine {engine!r} for a CPU: use {' or '.join(ENGINES)}")


def load_engines(engine: str, artifacts: Artifacts, threads: int = 0) -> dict[str, Engine]:
    """One for each graph of the artefacts."""
    return {
        name: load_engine(engine, artifacts.file(name), signature, threads)
        for name, signature in artifacts.signatures.items()
    }
