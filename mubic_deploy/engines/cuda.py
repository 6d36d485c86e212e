"""CUDA through pycuda: one GPU, its memory, a stream, captured graphs. No PyTorch.

Whatever fails says in one line what is missing and what to do."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from mubic_deploy.engines import Array, DeviceArray
from mubic_deploy.engines.memory import short_of_memory
from mubic_deploy.errors import UserError
from mubic_deploy.graphs import Tensor

CAPTURE_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: other threads may go on allocating
NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: while it captures, other threads may go on with the default stream
OLDEST_DRIVER = 12_000  # as cuDriverGetVersion counts: CUDA 12.0
OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY
NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
ELSEWHERE = "TensorRT wants one; elsewhere run exported graphs (mubic-deploy export) with --engine onnxruntime"
WAITING = 16  # uploads of one tensor that may wait for their turn: more than a clip has steps


@dataclass(frozen=True)
class Facts:
    """What an engine depends on. driver: the CUDA version that the driver supports, as 13000 for 13.0."""

    name: str
    compute_capability: str
    driver: int
    memory: int  # bytes


class GPU:
    """The first NVIDIA GPU that the process may see (CUDA_VISIBLE_DEVICES), through its primary context, which PyTorch
    and ONNX Runtime share. Take it from `gpu`: one for the life of the process, for one thread at a time. Drop what
    lies in its memory in the thread that first took it: elsewhere pycuda cannot free it, and it stays taken.

    UserError if there is none, it cannot be had, its memory is short, or the driver or pycuda is missing or too old."""

    def __init__(self) -> None:
        require_gpu()
        self.driver = driver = import_driver()
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
                self.stream = driver.Stream(NON_BLOCKING)
        except driver.MemoryError as error:
            raise short_of_memory("a context", error) from None
        except driver.Error as error:
            raise UserError(f"there is no NVIDIA GPU to use ({error}): {ELSEWHERE}") from None

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Inside, this thread's calls go to this GPU. What CUDA reports is a UserError."""
        self._context.push()
        try:
            yield
        except self.driver.MemoryError as error:
            raise short_of_memory("this", error) from None
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
                f"end what uses it (nvidia-smi), or build engines for a smaller --max-batch"
            ) from None

    def pinned(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array in host memory that the GPU can reach by itself. UserError if there is not so much."""
        try:
            return self.driver.pagelocked_empty(shape, dtype)
        except self.driver.MemoryError:
            raise UserError(
                f"the host cannot pin an array of {shape}: free memory, or build engines for a smaller --max-batch"
            ) from None


def require_gpu() -> None:
    """UserError unless the NVIDIA driver is here and finds a GPU. It is asked itself, without pycuda: who has no GPU
    shall not be told to install what wants one."""
    code = libcuda().cuInit(0)
    if code == NO_DEVICE:
        raise UserError(f"there is no NVIDIA GPU to use (CUDA error {code}): {ELSEWHERE}")
    if code:
        raise UserError(
            f"the NVIDIA driver does not start (cuInit failed with CUDA error {code}): see what nvidia-smi says; after "
            f"an update of the driver restart the machine"
        )


def libcuda() -> Any:
    """The driver's own library. UserError if there is none."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise UserError(f"there is no NVIDIA driver here ({error}): {ELSEWHERE}") from None


def import_driver() -> Any:
    """The module pycuda.driver, after `require_gpu`. UserError if it cannot be loaded: an old driver, or no pycuda."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pycuda's own, of what is said below
            import pycuda.driver as driver
    except ImportError as error:
        if missing := re.search(r"undefined symbol: (cu[A-Z]\w*)", str(error)):  # of libcuda, so the driver's
            raise UserError(
                f"the NVIDIA driver is too old for the CUDA that pycuda was built with (it lacks {missing[1]}): "
                f"install one for that CUDA version, {OLDEST_DRIVER // 1000} or newer"
            ) from None
        raise UserError(
            f"pycuda cannot be used ({error}): install it with pip install 'mubic-deploy[tensorrt]', which compiles it "
            f"and wants g++ and the CUDA toolkit (nvcc on the path)"
        ) from None
    return driver


@functools.cache
def gpu() -> GPU:
    """The process's GPU."""
    return GPU()


class Memory:
    """The tensors of a chain of engines on the GPU, one place a name: what one engine writes, the next one reads.

    Copies are enqueued on the GPU's stream, and nothing waits but `read`. Call with the GPU active."""

    def __init__(self, gpu: GPU, max_batch: int) -> None:
        self._gpu, self._max_batch = gpu, max_batch
        self._places: dict[str, Any] = {}
        self._staged: dict[str, list[np.ndarray]] = defaultdict(list)  # pinned, for uploads
        self._waiting: dict[str, int] = defaultdict(int)  # how many of them the stream may still read
        self._fetched: dict[str, np.ndarray] = {}  # pinned, for reading

    def place(self, tensor: Tensor) -> Any:
        """The device memory of a tensor, for the largest batch."""
        if tensor.name not in self._places:
            count = self._max_batch * tensor.nbytes
            self._places[tensor.name] = self._gpu.allocate(count)
        return self._places[tensor.name]

    def write(self, tensor: Tensor, array: Array) -> None:
        """`array` to the place of `tensor`: from the host, from another place, or not at all if it is there."""
        place = self.place(tensor)
        if isinstance(array, DeviceArray):
            if array.value is not place:
                count = math.prod(array.shape) * array.dtype.itemsize
                self._gpu.driver.memcpy_dtod_async(place, array.value, count, self._gpu.stream)
            return
        if self._waiting[tensor.name] == WAITING:
            self._synchronize()
        number = self._waiting[tensor.name]
        slots = self._staged[tensor.name]
        if number == len(slots):
            slots.append(self._pinned(tensor))
        staged = slots[number][: len(array)]
        staged[...] = array
        self._waiting[tensor.name] += 1
        self._gpu.driver.memcpy_htod_async(place, staged, self._gpu.stream)

    def array(self, tensor: Tensor, batch: int) -> DeviceArray:
        """What lies at the place of `tensor`."""
        return DeviceArray(
            self.place(tensor), (batch, *tensor.shape), np.dtype(tensor.dtype), lambda: self._read(tensor, batch)
        )

    def _read(self, tensor: Tensor, batch: int) -> np.ndarray:
        with self._gpu.active():
            if tensor.name not in self._fetched:
                self._fetched[tensor.name] = self._pinned(tensor)
            fetched = self._fetched[tensor.name][:batch]
            self._gpu.driver.memcpy_dtoh_async(fetched, self.place(tensor), self._gpu.stream)
            self._synchronize()
            return fetched.copy()

    def _pinned(self, tensor: Tensor) -> np.ndarray:
        return self._gpu.pinned((self._max_batch, *tensor.shape), np.dtype(tensor.dtype))

    def _synchronize(self) -> None:
        self._gpu.stream.synchronize()
        self._waiting.clear()


class CapturedGraph:
    """What `enqueue` puts on the GPU's stream, as one launch. Call with the GPU active."""

    def __init__(self, gpu: GPU, enqueue: Callable[[], None]) -> None:
        self._cuda = libcuda()
        self._stream = ctypes.c_void_p(gpu.stream.handle)
        graph, self._executable = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuStreamBeginCapture_v2", self._stream, ctypes.c_int(CAPTURE_THREAD_LOCAL))
        try:
            enqueue()
        finally:
            # the stream must leave capture whatever happened, or nothing runs on it any more
            ended = self._cuda.cuStreamEndCapture(self._stream, ctypes.byref(graph))
        if ended == OUT_OF_MEMORY:
            raise short_of_memory("a CUDA graph", f"CUDA error {ended}")
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
        if code == OUT_OF_MEMORY:
            raise short_of_memory("a CUDA graph", f"{name} failed with CUDA error {code}")
        if code:
            raise UserError(f"{name} failed with CUDA error {code}: use --no-cuda-graphs")
