"""A recording double of pycuda and the CUDA driver, for code that needs a GPU. `fake_tensorrt` is one of TensorRT.

Memory of the "GPU" is bytes by address, gone when its allocation is dropped; what is put on a stream happens as late as
it may. So results are right only if every copy and address is."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

HANDLE = 77  # of the stream
CU_STREAM_NON_BLOCKING = 1  # in cuda.h


class Driver(ModuleType):
    """pycuda.driver, and what libcuda does about graphs."""

    class Error(Exception):
        pass

    class MemoryError(Error):
        pass

    def __init__(self) -> None:
        super().__init__("pycuda.driver")
        self.name, self.capability, self.version, self.total = "NVIDIA H200", (9, 0), 13_000, 10**9
        self.present, self.starts = True, 0  # what cuInit says where there is a GPU
        self.memory: dict[int, bytearray] = {}
        self.active = 0  # contexts pushed
        self.recording: list[Callable[[], None]] | None = None
        self.graphs: list[list[Callable[[], None]]] = []
        self.launched: list[str] = []  # "run" and "graph" in the order they happened
        self.copies: list[tuple[str, int]] = []  # kind and bytes
        self.waiting: list[Callable[[], None]] = []  # on the stream, until somebody waits for it
        self.refuses_capture = False
        self.short: set[str] = set()  # what there is no memory for: "context", "graph", "plan", "execution context"
        self.allocated = 0
        driver = self

        class Device:
            def __init__(self, index: int) -> None:
                assert index == 0
                if not driver.present:
                    raise driver.Error("cuInit failed: no CUDA-capable device is detected")

            def name(self) -> str:
                return driver.name

            def compute_capability(self) -> tuple[int, int]:
                return driver.capability

            def total_memory(self) -> int:
                return driver.total

            def retain_primary_context(self) -> Any:
                if "context" in driver.short:
                    raise driver.MemoryError("cuDevicePrimaryCtxRetain failed: out of memory")
                return Context()

        class Context:
            def push(self) -> None:
                driver.active += 1

            def pop(self) -> None:
                driver.active -= 1

        class Stream:
            handle = HANDLE

            def __init__(self, flags: int = 0) -> None:
                driver.require_active()
                assert flags == CU_STREAM_NON_BLOCKING

            def synchronize(self) -> None:
                assert driver.recording is None, "synchronising inside a capture is an error"
                for action in driver.waiting:
                    action()
                driver.waiting.clear()

        class DeviceAllocation:
            """As pycuda's, which frees its memory with its last reference."""

            def __init__(self, address: int) -> None:
                self._address = address

            def __int__(self) -> int:
                return self._address

            def __del__(self) -> None:
                del driver.memory[self._address]

        self.Device, self.Stream, self.DeviceAllocation = Device, Stream, DeviceAllocation

    def init(self) -> None:
        pass

    def get_driver_version(self) -> int:
        return self.version

    def require_active(self) -> None:
        assert self.active > 0, "called outside of the GPU's context"

    def mem_get_info(self) -> tuple[int, int]:
        self.require_active()
        return self.total - sum(map(len, self.memory.values())), self.total

    def mem_alloc(self, count: int) -> Any:
        self.require_active()
        if count > self.mem_get_info()[0]:
            raise self.MemoryError("cuMemAlloc failed: out of memory")
        self.allocated += 1  # no address is given out twice
        address = 4096 * 1024 * self.allocated
        self.memory[address] = bytearray(count)
        return self.DeviceAllocation(address)

    def pagelocked_empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        self.require_active()
        return np.full(shape, 99, dtype)

    def do(self, action: Callable[[], None]) -> None:
        """What an asynchronous call does, as late as it may: when the stream is waited for, or after the graph that is
        being captured was launched. What was overwritten by then is lost, as on a GPU that is slow."""
        self.require_active()
        (self.waiting if self.recording is None else self.recording).append(action)

    def memcpy_htod_async(self, place: Any, source: np.ndarray, stream: Any) -> None:
        assert stream.handle == HANDLE
        target = int(place)
        assert source.nbytes <= len(self.memory[target])
        self.copies.append(("to device", source.nbytes))

        def copy() -> None:
            self.memory[target][: source.nbytes] = source.tobytes()

        self.do(copy)

    def memcpy_dtod_async(self, place: Any, other: Any, count: int, stream: Any) -> None:
        assert stream.handle == HANDLE
        target, source = int(place), int(other)
        assert count <= min(len(self.memory[target]), len(self.memory[source]))
        self.copies.append(("on device", count))

        def copy() -> None:
            self.memory[target][:count] = self.memory[source][:count]

        self.do(copy)

    def memcpy_dtoh_async(self, target: np.ndarray, place: Any, stream: Any) -> None:
        assert stream.handle == HANDLE
        source = int(place)
        self.copies.append(("to host", target.nbytes))

        def copy() -> None:
            target[...] = np.frombuffer(self.memory[source][: target.nbytes], target.dtype).reshape(target.shape)

        self.do(copy)

    def libcuda(self, name: str) -> Any:
        """In the place of ctypes.CDLL."""
        if name != "libcuda.so.1":  # PyTorch looks for NVIDIA's management library
            raise OSError(f"{name}: not found")
        driver = self

        class Library:
            def cuInit(self, flags: int) -> int:  # noqa: N802
                return driver.starts or (0 if driver.present else 100)

            def cuStreamBeginCapture_v2(self, stream: Any, mode: Any) -> int:  # noqa: N802
                assert (stream.value, mode.value, driver.recording) == (HANDLE, 1, None)
                driver.recording = []
                return 0

            def cuStreamEndCapture(self, stream: Any, graph: Any) -> int:  # noqa: N802
                assert driver.recording is not None
                if driver.refuses_capture:
                    driver.recording = None
                    return 901
                driver.graphs.append(driver.recording)
                graph._obj.value = len(driver.graphs)
                driver.recording = None
                return 0

            def cuGraphInstantiateWithFlags(self, executable: Any, graph: Any, flags: Any) -> int:  # noqa: N802
                if "graph" in driver.short:
                    return 2
                executable._obj.value = graph.value
                return 0

            def cuGraphExecDestroy(self, executable: Any) -> int:  # noqa: N802
                driver.launched.append("destroyed")
                return 0

            def cuGraphDestroy(self, graph: Any) -> int:  # noqa: N802
                return 0

            def cuGraphLaunch(self, executable: Any, stream: Any) -> int:  # noqa: N802
                driver.waiting.append(lambda: driver.launched.append("graph"))
                driver.waiting.extend(driver.graphs[executable.value - 1])
                return 0

        return Library()
