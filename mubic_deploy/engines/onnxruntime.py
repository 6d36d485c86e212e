"""ONNX Runtime on the CPU."""

from __future__ import annotations

from pathlib import Path

import onnxruntime as ort

from mubic_deploy.artifacts import Artifacts
from mubic_deploy.engines import Arrays, Engine
from mubic_deploy.graphs import Signature, signatures

# How long a thread without work stays awake, in microseconds: longer than the gap between two operators, so that a
# graph runs as fast as with endless spinning, and too short to keep the cores from other processes.
SPIN_US = 50


class OnnxRuntimeEngine:
    """A session over one ONNX file. `threads` 0 means one a core."""

    def __init__(self, path: Path, signature: Signature, threads: int = 0) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_US))
        # or the threads of one graph go on spinning while the next one runs
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self.signature = signature
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def __call__(self, inputs: Arrays) -> Arrays:
        feed = {t.name: t.check(inputs[t.name]) for t in self.signature.inputs}
        names = self.signature.output_names
        return dict(zip(names, self.session.run(names, feed), strict=True))


def load_engines(artifacts: Artifacts, threads: int = 0) -> dict[str, Engine]:
    """An engine for each graph of the artefacts."""
    return {
        name: OnnxRuntimeEngine(artifacts.graph(name), signature, threads)
        for name, signature in signatures(artifacts.config, artifacts.precision).items()
    }
