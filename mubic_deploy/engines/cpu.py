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


def quota() -> int:
    """How many cores' worth of time this process may use, where its container has fewer than it may run on; else 0."""
    try:
        used, period = map(int, QUOTA.read_text().split())
    except (OSError, ValueError):  # no control groups of version 2, or "max"
        return 0
    cores = math.ceil(used / period)
    return cores if cores < len(os.sched_getaffinity(0)) else 0


class HostEngine(Protocol):
    """An `Engine` whose results are on the host."""

    signature: Signature

    def __call__(self, inputs: Arrays) -> HostArrays: ...


def load_engine(engine: str, path: Path, signature: Signature, threads: int = 0) -> HostEngine:
    """One of ENGINES over one ONNX file; threads 0: one a core. UserError for an unknown or a missing one."""
    threads = threads or quota()  # or the threads of every core of the host would wait for each other
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
