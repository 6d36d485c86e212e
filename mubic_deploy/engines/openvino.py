"""OpenVINO on a CPU: the exported ONNX graphs, compiled when they are loaded."""

from __future__ import annotations

import functools
import threading
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
    """One ONNX file.

    Compiled for a single clip, because kernels for fixed shapes are quicker; a batch goes through one clip after the
    other, which is as quick as a graph compiled for that batch and takes the memory of one clip (docs/measured.md)."""

    def __init__(self, path: Path, signature: Signature, threads: int) -> None:
        self.signature = signature
        settings = {
            "INFERENCE_PRECISION_HINT": "f32",  # or a CPU that has bfloat16 would compute in it
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,  # one clip at a time gets all threads
            # or each process keeps its threads on the first cores, where those of the server's other models are too
            "ENABLE_CPU_PINNING": False,
        }
        model = core().read_model(str(path))
        model.reshape({t.name: [1, *t.shape] for t in signature.inputs})
        self._free = threading.Lock()  # a request takes one call at a time, and all threads work for that one
        self._request = core().compile_model(model, "CPU", settings).create_infer_request()

    def __call__(self, inputs: Arrays) -> HostArrays:
        batch, arrays = self.signature.batch(inputs)
        feed = {name: np.asarray(array) for name, array in arrays.items()}
        clips = [self._infer({name: array[i : i + 1] for name, array in feed.items()}) for i in range(batch)]
        if batch == 1:
            return clips[0]
        return {name: np.concatenate([clip[name] for clip in clips]) for name in self.signature.output_names}

    def _infer(self, feed: HostArrays) -> HostArrays:
        with self._free:
            outputs = self._request.infer(feed, share_inputs=True)
            return {name: outputs[name] for name in self.signature.output_names}
