"""OpenVINO on a CPU: the exported ONNX graphs, compiled when they are loaded."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import numpy as np

from mubic_deploy.engines import Arrays, HostArrays
from mubic_deploy.errors import UserError
from mubic_deploy.graphs import Signature


@functools.cache
def core() -> Any:
    """OpenVINO's entry, one a process. UserError if OpenVINO is not installed."""
    try:
        import openvino
    except ImportError as error:
        raise UserError(f"OpenVINO cannot be used ({error}): pip install openvino, or --engine onnxruntime") from None
    return openvino.Core()


class OpenVinoEngine:
    """One ONNX file. `threads` 0 means one a core.

    Single clips, the usual case, get kernels for fixed shapes, which are quicker; other batches share one graph whose
    batch is open, compiled when the first of them comes."""

    def __init__(self, path: Path, signature: Signature, threads: int = 0) -> None:
        self.signature = signature
        self._path = path
        self._settings = {
            "INFERENCE_PRECISION_HINT": "f32",  # or a CPU that has bfloat16 would compute in it
            "INFERENCE_NUM_THREADS": threads or len(os.sched_getaffinity(0)),
            "NUM_STREAMS": 1,  # one clip at a time gets all threads
        }
        self._single = self._compiled(1)
        self._open: Any = None

    def __call__(self, inputs: Arrays) -> HostArrays:
        feed = {t.name: np.asarray(t.check(inputs[t.name])) for t in self.signature.inputs}
        if {len(array) for array in feed.values()} == {1}:
            request = self._single
        else:
            if self._open is None:
                self._open = self._compiled(None)
            request = self._open
        outputs = request.infer(feed, share_inputs=True)
        return {name: outputs[name] for name in self.signature.output_names}

    def _compiled(self, batch: int | None) -> Any:
        model = core().read_model(str(self._path))
        if batch is not None:
            model.reshape({t.name: [batch, *t.shape] for t in self.signature.inputs})
        return core().compile_model(model, "CPU", self._settings).create_infer_request()
