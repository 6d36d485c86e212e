"""CUDA through pycuda: one GPU, its memory, a stream, captured graphs. No PyTorch.

Whatever fails says in one line what is missing and what to do."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from mubic_deploy.errors import UserError

CAPTURE_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: other threads may go on allocating
OLDEST_DRIVER = 12_000  # as cuDriverGetVersion counts: CUDA 12.0


@dataclass(frozen=True)
class Facts:
    """What an engine depends on. driver: the CUDA version that the driver supports, as 13000 for 13.0."""

    name: str
    compute_capability: str
    driver: int
    memory: int  # bytes


class GPU:
    """The first NVIDIA GPU that the process may see (CUDA_VISIBLE_DEVICES), through its primary context, which PyTorch
    and ONNX Runtime share. Take it from `gpu`: one for the life of the process, for one thread at a time.

    UserError if there is none, it cannot be had, or the driver or pycuda is missing or too old."""

    def __init__(self) -> None:
        try:
            import pycuda.driver as driver
        except ImportError as error:
            if "libcuda" in str(error):
                raise UserError(f"there is no NVIDIA driver here ({error}): use --engine onnxruntime") from None
            raise UserError(
                f"pycuda cannot be used ({error}): install it with pip install 'mubic-deploy[tensorrt]'"
            ) from None
        self.driver: Any = driver
        try:
            driver.init()
            device = driver.Device(0)
            version = driver.get_driver_version()
            if version < OLDEST_DRIVER:
                raise UserError(
                    f"the NVIDIA driver supports CUDA {version // 1000}.{version % 1000 // 10} at most: "
                    f"install one for CUDA {OLDEST_DRIVER // 1000} or newer"
                )
            major, minor = device.compute_capability()
            self.facts = Facts(device.name(), f"{major}.{minor}", version, device.total_memory())
            self._context = device.retain_primary_context()
            with self.active():
                self.stream = driver.Stream()
        except driver.Error as error:
            raise UserError(f"there is no NVIDIA GPU to use ({error}): use --engine onnxruntime") from None

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Inside, this thread's calls go to this GPU. What CUDA reports is a UserError."""
        self._context.push()
        try:
            yield
        except self.driver.Error as error:
            raise UserError(f"{self.facts.name} failed ({error}): see whether another process uses it") from None
        finally:
            self._context.pop()

    def allocate(self, count: int) -> Any:
        """Bytes on the GPU, which live as long as what is returned. UserError if there is not so much."""
        try:
            return self.driver.mem_alloc(count)
        except self.driver.MemoryError:
            free = self.driver.mem_get_info()[0]
            raise UserError(
                f"{count / 1e6:.0f} MB are wanted on {self.facts.name}, {free / 1e6:.0f} MB are free: "
                f"end what uses it, or build engines for a smaller --max-batch"
            ) from None

    def pinned(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array in host memory that the GPU can reach by itself. UserError if there is not so much."""
        try:
            return self.driver.pagelocked_empty(shape, dtype)
        except self.driver.MemoryError:
            raise UserError(
                f"the host cannot pin an array of {shape}: free memory, or build engines for a smaller --max-batch"
            ) from None


@functools.cache
def gpu() -> GPU:
    """The process's GPU."""
    return GPU()


class CapturedGraph:
    """What `enqueue` puts on the GPU's stream, as one launch. Call with the GPU active."""

    def __init__(self, gpu: GPU, enqueue: Callable[[], None]) -> None:
        self._cuda = ctypes.CDLL("libcuda.so.1")
        self._stream = ctypes.c_void_p(gpu.stream.handle)
        graph, self._executable = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuStreamBeginCapture_v2", self._stream, ctypes.c_int(CAPTURE_THREAD_LOCAL))
        try:
            enqueue()
        finally:
            # the stream must leave capture whatever happened, or nothing runs on it any more
            ended = self._cuda.cuStreamEndCapture(self._stream, ctypes.byref(graph))
        if ended:
            raise UserError(f"the GPU cannot replay this as a CUDA graph (error {ended}): use --no-cuda-graphs")
        try:
            self._call("cuGraphInstantiateWithFlags", ctypes.byref(self._executable), graph, ctypes.c_ulonglong(0))
        finally:
            self._call("cuGraphDestroy", graph)

    def __del__(self) -> None:
        if getattr(self, "_executable", None):
            self._cuda.cuGraphExecDestroy(self._executable)

    def launch(self) -> None:
        self._call("cuGraphLaunch", self._executable, self._stream)

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._cuda, name)(*arguments)
        if code:
            raise UserError(f"{name} failed with CUDA error {code}: use --no-cuda-graphs")
