"""A recording double of TensorRT, pycuda and the CUDA driver, for code that needs a GPU.

Memory of the "GPU" is bytes by address, plans are the ONNX files themselves, and running one is running ONNX Runtime on
what lies at the addresses: so results are right only if every copy, shape and address is. What the double offers is
held against the real bindings (`tensorrt_api.Api`): it has no class, attribute or member that they have not."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper
from tensorrt_api import Api

MAGIC = b"PLAN"
HANDLE = 77  # of the stream
TYPES = {"tensor(float)": "f4", "tensor(float16)": "f2", "tensor(uint8)": "u1", "tensor(int32)": "i4"}


class Driver(ModuleType):
    """pycuda.driver, and what libcuda does about graphs."""

    class Error(Exception):
        pass

    class MemoryError(Error):
        pass

    def __init__(self) -> None:
        super().__init__("pycuda.driver")
        self.name, self.capability, self.version, self.total = "NVIDIA H200", (9, 0), 13_000, 10**9
        self.present = True
        self.memory: dict[int, bytearray] = {}
        self.active = 0  # contexts pushed
        self.recording: list[Callable[[], None]] | None = None
        self.graphs: list[list[Callable[[], None]]] = []
        self.launched: list[str] = []  # "run" and "graph" in the order they happened
        self.copies: list[tuple[str, int]] = []  # kind and bytes
        self.waiting: list[Callable[[], None]] = []  # on the stream, until somebody waits for it
        self.refuses_capture = False
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
                return Context()

        class Context:
            def push(self) -> None:
                driver.active += 1

            def pop(self) -> None:
                driver.active -= 1

        class Stream:
            handle = HANDLE

            def __init__(self) -> None:
                driver.require_active()

            def synchronize(self) -> None:
                assert driver.recording is None, "synchronising inside a capture is an error"
                for action in driver.waiting:
                    action()
                driver.waiting.clear()

        self.Device, self.Stream = Device, Stream

    def init(self) -> None:
        pass

    def get_driver_version(self) -> int:
        return self.version

    def require_active(self) -> None:
        assert self.active > 0, "called outside of the GPU's context"

    def mem_get_info(self) -> tuple[int, int]:
        self.require_active()
        return self.total - sum(map(len, self.memory.values())), self.total

    def mem_alloc(self, count: int) -> int:
        self.require_active()
        if count > self.mem_get_info()[0]:
            raise self.MemoryError("cuMemAlloc failed: out of memory")
        address = 4096 * (1 + len(self.memory)) * 1024
        self.memory[address] = bytearray(count)
        return address

    def pagelocked_empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        self.require_active()
        return np.full(shape, 99, dtype)

    def do(self, action: Callable[[], None]) -> None:
        """What an asynchronous call does, as late as it may: when the stream is waited for, or after the graph that is
        being captured was launched. What was overwritten by then is lost, as on a GPU that is slow."""
        self.require_active()
        (self.waiting if self.recording is None else self.recording).append(action)

    def memcpy_htod_async(self, target: int, source: np.ndarray, stream: Any) -> None:
        assert stream.handle == HANDLE
        assert source.nbytes <= len(self.memory[target])
        self.copies.append(("to device", source.nbytes))

        def copy() -> None:
            self.memory[target][: source.nbytes] = source.tobytes()

        self.do(copy)

    def memcpy_dtod_async(self, target: int, source: int, count: int, stream: Any) -> None:
        assert stream.handle == HANDLE
        assert count <= min(len(self.memory[target]), len(self.memory[source]))
        self.copies.append(("on device", count))

        def copy() -> None:
            self.memory[target][:count] = self.memory[source][:count]

        self.do(copy)

    def memcpy_dtoh_async(self, target: np.ndarray, source: int, stream: Any) -> None:
        assert stream.handle == HANDLE
        self.copies.append(("to host", target.nbytes))

        def copy() -> None:
            target[...] = np.frombuffer(self.memory[source][: target.nbytes], target.dtype).reshape(target.shape)

        self.do(copy)

    def libcuda(self, name: str) -> Any:
        """In the place of ctypes.CDLL."""
        assert name == "libcuda.so.1"
        driver = self

        class Library:
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


def tensorrt(api: Api, driver: Driver) -> ModuleType:
    """The module `tensorrt`. Its list `built` gets the settings of each plan that is built."""
    trt = ModuleType("tensorrt")
    built: list[dict[str, Any]] = []

    class Member(int):
        pass

    enums = {
        "BuilderFlag": ("TF32", "VERSION_COMPATIBLE"),
        "NetworkDefinitionCreationFlag": ("STRONGLY_TYPED",),
        "ProfilingVerbosity": ("DETAILED",),
        "DataType": ("UINT8", "INT32", "HALF", "FLOAT"),
        "ExecutionContextAllocationStrategy": ("USER_MANAGED",),
    }
    for name, members in enums.items():
        setattr(trt, name, type(name, (), {m: Member(api.enums[name][m]) for m in members}))
    kinds = {n: trt.DataType.__dict__[n] for n in enums["DataType"]}
    names = {"uint8": "UINT8", "int32": "INT32", "float16": "HALF", "float32": "FLOAT"}

    class ILogger:
        class Severity:
            ERROR = Member(1)

    class Described:
        def __init__(self, text: str) -> None:
            self.text = text

        def desc(self) -> str:
            return self.text

    class ITensor:
        def __init__(self, value: onnx.ValueInfoProto) -> None:
            kind = value.type.tensor_type
            self.name = value.name
            self.dtype = kinds[names[str(helper.tensor_dtype_to_np_dtype(kind.elem_type))]]
            self.shape = tuple(d.dim_value or -1 for d in kind.shape.dim)

    class INetworkDefinition:
        def __init__(self) -> None:
            self._model = onnx.ModelProto()

        num_inputs = property(lambda self: len(self._model.graph.input))
        num_outputs = property(lambda self: len(self._model.graph.output))

        def get_input(self, index: int) -> ITensor:
            return ITensor(self._model.graph.input[index])

        def get_output(self, index: int) -> ITensor:
            return ITensor(self._model.graph.output[index])

    class OnnxParser:
        def __init__(self, network: INetworkDefinition, log: ILogger) -> None:
            self._network = network
            self._errors: list[str] = []

        num_errors = property(lambda self: len(self._errors))

        def parse_from_file(self, path: str) -> bool:
            try:
                self._network._model = onnx.load(path)
            except Exception as error:
                self._errors.append(str(error).splitlines()[0])
                return False
            return True

        def get_error(self, index: int) -> Described:
            return Described(self._errors[index])

    class ITimingCache:
        def __init__(self, content: bytes) -> None:
            self._content = content

        def serialize(self) -> bytes:
            return self._content

    class IOptimizationProfile:
        def __init__(self) -> None:
            self._shapes: dict[str, tuple] = {}

        def set_shape(self, name: str, low: tuple, best: tuple, high: tuple) -> None:
            self._shapes[name] = (low, best, high)

    class IBuilderConfig:
        builder_optimization_level: int
        profiling_verbosity: Any

        def __init__(self) -> None:
            self._flags = {"TF32"}
            self._profiles: list[IOptimizationProfile] = []

        def __setattr__(self, name: str, value: Any) -> None:
            assert name.startswith("_") or name in api.classes["IBuilderConfig"], name
            super().__setattr__(name, value)

        def set_flag(self, flag: int) -> None:
            self._flags.add(next(k for k, v in api.enums["BuilderFlag"].items() if v == flag))

        def clear_flag(self, flag: int) -> None:
            self._flags.discard(next(k for k, v in api.enums["BuilderFlag"].items() if v == flag))

        def create_timing_cache(self, content: bytes) -> ITimingCache:
            return ITimingCache(content)

        def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
            self._cache = cache
            return cache._content != b"of another GPU" or ignore_mismatch

        def get_timing_cache(self) -> ITimingCache:
            return self._cache

        def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
            self._profiles.append(profile)
            return len(self._profiles) - 1

    class Builder:
        def __init__(self, log: Any) -> None:
            self._log = log

        def create_network(self, flags: int) -> INetworkDefinition:
            assert flags == 1 << api.enums["NetworkDefinitionCreationFlag"]["STRONGLY_TYPED"]
            return INetworkDefinition()

        def create_builder_config(self) -> IBuilderConfig:
            return IBuilderConfig()

        def create_optimization_profile(self) -> IOptimizationProfile:
            return IOptimizationProfile()

        def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> bytes | None:
            driver.require_active()
            (profile,) = config._profiles
            assert profile._shapes.keys() == {v.name for v in network._model.graph.input}
            if any(high[0] > 64 for _, _, high in profile._shapes.values()):
                self._log.log(Member(1), " out of memory ")
                return None
            settings = {"flags": config._flags, "shapes": profile._shapes, "cache": config._cache._content}
            built.append({**settings, "level": config.builder_optimization_level})
            config._cache._content += b"+"
            return MAGIC + network._model.SerializeToString()

    class IExecutionContext:
        def __init__(self, session: ort.InferenceSession) -> None:
            self._session = session
            self._shapes: dict[str, tuple[int, ...]] = {}
            self._addresses: dict[str, int] = {}
            self._scratch = 0

        def set_device_memory(self, address: int, size: int) -> None:
            assert len(driver.memory[address]) >= size
            self._scratch = address

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            assert driver.recording is None, "shapes are set before a capture"
            self._shapes[name] = shape
            return True

        def set_tensor_address(self, name: str, address: int) -> bool:
            self._addresses[name] = address
            return True

        def execute_async_v3(self, stream_handle: int) -> bool:
            assert stream_handle == HANDLE
            assert self._scratch
            driver.do(self._run)
            return True

        def _run(self) -> None:
            driver.launched.append("run")
            feed = {}
            for value in self._session.get_inputs():
                dtype = np.dtype(
                    {"tensor(float)": "f4", "tensor(float16)": "f2", "tensor(uint8)": "u1"}.get(value.type, "i4")
                )
                shape = self._shapes[value.name]
                count = int(np.prod(shape)) * dtype.itemsize
                feed[value.name] = np.frombuffer(driver.memory[self._addresses[value.name]][:count], dtype).reshape(
                    shape
                )
            outputs = [value.name for value in self._session.get_outputs()]
            for name, array in zip(outputs, self._session.run(outputs, feed), strict=True):
                driver.memory[self._addresses[name]][: array.nbytes] = array.tobytes()

    class ICudaEngine:
        device_memory_size_v2 = 1000

        def __init__(self, content: bytes) -> None:
            self._session = ort.InferenceSession(content, providers=["CPUExecutionProvider"])

        def create_execution_context(self, strategy: int) -> IExecutionContext:
            driver.require_active()
            assert strategy == api.enums["ExecutionContextAllocationStrategy"]["USER_MANAGED"]
            return IExecutionContext(self._session)

    class Runtime:
        engine_host_code_allowed: bool

        def __init__(self, log: Any) -> None:
            self.logger = log

        def deserialize_cuda_engine(self, content: bytes) -> ICudaEngine | None:
            driver.require_active()
            if not content.startswith(MAGIC):
                self.logger.log(Member(1), "the plan file has a bad magic tag")
                return None
            return ICudaEngine(content[len(MAGIC) :])

    doubles = (INetworkDefinition, OnnxParser, ITimingCache, IOptimizationProfile, IBuilderConfig, Builder)
    for double in (*doubles, IExecutionContext, ICudaEngine, Runtime, ITensor):
        offered = {n for n in (*vars(double), *double.__annotations__) if not n.startswith("_")}
        assert offered <= set(api.classes[double.__name__]), f"{double.__name__} has no {offered}"
        setattr(trt, double.__name__, double)
    assert "Severity" in api.classes["ILogger"]
    trt.ILogger = ILogger  # type: ignore[attr-defined]
    trt.__version__ = api.version  # type: ignore[attr-defined]
    trt.built = built  # type: ignore[attr-defined]
    return trt


@contextlib.contextmanager
def installed(patch: Any, api: Api, driver: Driver) -> Any:
    """Inside, `import tensorrt`, `import pycuda.driver` and libcuda are the doubles."""
    import sys

    from mubic_deploy.engines import cuda

    cuda.gpu.cache_clear()
    package = ModuleType("pycuda")
    package.driver = driver  # type: ignore[attr-defined]
    module = tensorrt(api, driver)
    with patch.context() as inner:
        inner.setitem(sys.modules, "pycuda", package)
        inner.setitem(sys.modules, "pycuda.driver", driver)
        inner.setitem(sys.modules, "tensorrt", module)
        inner.setattr(ctypes, "CDLL", driver.libcuda)
        yield module
    cuda.gpu.cache_clear()
