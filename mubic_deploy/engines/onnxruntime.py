"""ONNX Runtime: on the CPU, and on an NVIDIA GPU with I/O binding and CUDA graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from mubic_deploy.artifacts import Artifacts
from mubic_deploy.engines import Arrays, DeviceArray, Engine, HostArrays
from mubic_deploy.engines.memory import first_line, is_short, short_of_memory
from mubic_deploy.errors import UserError
from mubic_deploy.graphs import Signature, Tensor

# How long a thread without work stays awake, in microseconds: longer than the gap between two operators, so that a
# graph runs as fast as with endless spinning, and too short to keep the cores from other processes.
SPIN_US = 50
CUDA_PROVIDER = "CUDAExecutionProvider"
CPU_PROVIDER = "CPUExecutionProvider"
OF_SHAPES = {
    "Add", "Cast", "Concat", "Constant", "ConstantOfShape", "Div", "Equal", "Expand", "Gather", "Identity", "Mul",
    "Range", "Reshape", "Shape", "Size", "Slice", "Squeeze", "Sub", "Unsqueeze", "Where",
}  # fmt: skip


class OnnxRuntimeEngine:
    """A session over one ONNX file on the CPU."""

    def __init__(self, path: Path, signature: Signature, threads: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_US))
        # or the threads of one graph go on spinning while the next one runs
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self.signature = signature
        self.session = ort.InferenceSession(str(path), options, providers=[CPU_PROVIDER])

    def __call__(self, inputs: Arrays) -> HostArrays:
        feed = {t.name: np.asarray(t.check(inputs[t.name])) for t in self.signature.inputs}
        names = self.signature.output_names
        return dict(zip(names, self.session.run(names, feed), strict=True))


@dataclass
class Places:
    """The tensors of a chain of engines on a device, one place for each name and batch size: what one engine writes,
    the next one reads."""

    device: str
    values: dict[tuple[str, int], ort.OrtValue] = field(default_factory=dict)

    def place(self, tensor: Tensor, batch: int) -> ort.OrtValue:
        key = (tensor.name, batch)
        if key not in self.values:
            shape = (batch, *tensor.shape)
            self.values[key] = ort.OrtValue.ortvalue_from_shape_and_type(shape, np.dtype(tensor.dtype), self.device)
        return self.values[key]

    def write(self, tensor: Tensor, array: np.ndarray | DeviceArray) -> None:
        """From the host or another place, or not at all if it is there. ONNX Runtime has no copy within every device:
        the one tensor that changes its place, the loop's S_NEXT, goes over the host (86 KB at full size)."""
        place = self.place(tensor, len(array))
        if not (isinstance(array, DeviceArray) and array.value is place):
            place.update_inplace(np.ascontiguousarray(array))

    def array(self, tensor: Tensor, batch: int) -> DeviceArray:
        """What lies at a place."""
        place = self.place(tensor, batch)
        # a copy: where the device is the CPU, numpy() may look at the place itself
        return DeviceArray(place, (batch, *tensor.shape), np.dtype(tensor.dtype), lambda: place.numpy().copy())


class BoundEngine:
    """A session whose inputs and outputs stay on its device, in places that never move: so that with `graph_replay`
    ONNX Runtime captures a batch size's kernels as a CUDA graph at its first run and replays them afterwards.

    Each run waits for its device. The sessions of a chain have a CUDA stream each, which is not the one that copies go
    through: without the wait an engine could read what the one before has not written yet."""

    def __init__(self, session: ort.InferenceSession, signature: Signature, places: Places, graph_replay: bool) -> None:
        self.signature, self._session, self._places, self._replay = signature, session, places, graph_replay
        self._bindings: dict[int, tuple[ort.IOBinding, ort.RunOptions]] = {}

    def __call__(self, inputs: Arrays) -> dict[str, DeviceArray]:
        batch, arrays = self.signature.batch(inputs)
        with enough_memory(f"{self.signature.name} at a batch of {batch}"):
            for tensor in self.signature.inputs:
                self._places.write(tensor, arrays[tensor.name])
            self._session.run_with_iobinding(*self._binding(batch))
        return {t.name: self._places.array(t, batch) for t in self.signature.outputs}

    def _binding(self, batch: int) -> tuple[ort.IOBinding, ort.RunOptions]:
        if batch not in self._bindings:
            binding, options = self._session.io_binding(), ort.RunOptions()
            for tensor in self.signature.inputs:
                binding.bind_ortvalue_input(tensor.name, self._places.place(tensor, batch))
            for tensor in self.signature.outputs:
                binding.bind_ortvalue_output(tensor.name, self._places.place(tensor, batch))
            options.add_run_config_entry("gpu_graph_id", str(batch) if self._replay else "-1")  # -1: not captured
            self._bindings[batch] = (binding, options)
        return self._bindings[batch]


@contextlib.contextmanager
def enough_memory(what: str) -> Iterator[None]:
    """A GPU that runs out of memory inside is a UserError. what: that needed it."""
    try:
        yield
    except Exception as error:  # ONNX Runtime's own, of many kinds
        if not is_short(error):
            raise
        raise short_of_memory(what, error) from None


def require_cuda() -> None:
    """UserError if this ONNX Runtime was built without CUDA."""
    if CUDA_PROVIDER not in ort.get_available_providers():
        raise UserError(
            "this ONNX Runtime has no CUDA: pip uninstall -y onnxruntime onnxruntime-gpu, then pip install "
            "onnxruntime-gpu, because both are the same files; or use --engine onnxruntime"
        )


def load_cuda_engines(artifacts: Artifacts, cuda_graphs: bool = True) -> dict[str, Engine]:
    """An engine on the first NVIDIA GPU for each graph. UserError if this ONNX Runtime cannot use one, or would run a
    part of a graph elsewhere."""
    require_cuda()
    ort.preload_dlls()
    places = Places("cuda")
    return {
        name: BoundEngine(_cuda_session(artifacts.file(name), cuda_graphs), signature, places, cuda_graphs)
        for name, signature in artifacts.signatures.items()
    }


def _cuda_session(path: Path, cuda_graphs: bool) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    provider: dict[str, Any] = {"device_id": 0, "enable_cuda_graph": int(cuda_graphs), "use_tf32": 0}
    try:
        session = ort.InferenceSession(str(path), options, providers=[(CUDA_PROVIDER, provider)])
    except Exception as error:  # ONNX Runtime's own, of many kinds
        if is_short(error):
            raise short_of_memory(str(path), error) from None
        reason = first_line(error)
        raise UserError(f"ONNX Runtime cannot run {path} on a GPU ({reason}): use --engine onnxruntime") from None
    if CUDA_PROVIDER not in session.get_providers():  # it goes on without when a library is missing
        raise UserError(
            "ONNX Runtime cannot use the GPU (CUDA's libraries or the driver are missing): see nvidia-smi, or use "
            "--engine onnxruntime"
        )
    if elsewhere := on_cpu(session):  # an error, not a slow graph
        raise UserError(
            f"ONNX Runtime cannot run {', '.join(elsewhere)} of {path} on a GPU: use another version, or --engine "
            f"onnxruntime"
        )
    return session


def on_cpu(session: ort.InferenceSession) -> list[str]:
    """Kinds of nodes that a session runs on the CPU, but for the arithmetic of shapes, which ONNX Runtime always puts
    there. It must have been made with session.record_ep_graph_assignment_info."""
    graphs = session.get_provider_graph_assignment_info()
    found = {node.op_type for graph in graphs if graph.ep_name == CPU_PROVIDER for node in graph.get_nodes()}
    return sorted(found - OF_SHAPES)
