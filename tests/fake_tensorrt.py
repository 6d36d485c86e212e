"""A recording double of TensorRT over `fake_gpu`, the double of pycuda and the driver.

Plans are the ONNX files themselves, and running one is running ONNX Runtime on what lies at the addresses. What the
double offers is held against the real bindings (`tensorrt_api.Api`): it has no class, attribute or member that they
have not, and its methods take as many arguments."""

from __future__ import annotations

import contextlib
import ctypes
import inspect
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from fake_gpu import HANDLE, Driver
from onnx import helper
from tensorrt_api import Api

MAGIC = b"PLAN"
COMPATIBLE = b"LEAN"  # what a version-compatible plan begins with, after that
TYPES = {"tensor(float)": "f4", "tensor(float16)": "f2", "tensor(uint8)": "u1", "tensor(int32)": "i4"}


def require_arguments(api: Api, kind: str, method: str, function: FunctionType) -> None:
    """AssertionError if a double's method can be called as none of the real one's overloads can."""
    parameters = list(inspect.signature(function).parameters.values())[1:]
    least = sum(p.default is p.empty for p in parameters)
    for count in range(least, len(parameters) + 1):
        overloads = api.arguments[kind][method]
        assert any(low <= count <= high for low, high in overloads), f"{kind}.{method} takes {overloads}, not {count}"


def tensorrt(api: Api, driver: Driver) -> ModuleType:
    """The module `tensorrt`. Its list `built` gets the settings of each plan that is built."""
    trt = ModuleType("tensorrt")
    built: list[dict[str, Any]] = []

    class Member(int):
        pass

    enums = {
        "BuilderFlag": ("TF32", "VERSION_COMPATIBLE"),
        "NetworkDefinitionCreationFlag": ("STRONGLY_TYPED",),
        "DataType": ("UINT8", "INT32", "HALF", "FLOAT"),
        "ExecutionContextAllocationStrategy": ("USER_MANAGED",),
    }
    for name, members in enums.items():
        setattr(trt, name, type(name, (), {m: Member(api.enums[name][m]) for m in members}))
    kinds = {n: trt.DataType.__dict__[n] for n in enums["DataType"]}
    names = {"uint8": "UINT8", "int32": "INT32", "float16": "HALF", "float32": "FLOAT"}

    class ILogger:
        class Severity:
            ERROR = Member(api.enums["ILogger.Severity"]["ERROR"])

    class ParserError:
        def __init__(self, text: str) -> None:
            self.text = text

        def desc(self) -> str:
            return self.text

    class ITensor:
        def __init__(self, value: onnx.ValueInfoProto, known: bool) -> None:
            kind = value.type.tensor_type
            self.name = value.name
            self.dtype = kinds[names[str(helper.tensor_dtype_to_np_dtype(kind.elem_type))]]
            self.shape = tuple((known and d.dim_value) or -1 for d in kind.shape.dim)

    class INetworkDefinition:
        def __init__(self) -> None:
            self._model = onnx.ModelProto()

        num_inputs = property(lambda self: len(self._model.graph.input))
        num_outputs = property(lambda self: len(self._model.graph.output))

        def get_input(self, index: int) -> ITensor:
            return ITensor(self._model.graph.input[index], True)

        def get_output(self, index: int) -> ITensor:
            # TensorRT does not find every size of an output while it parses: here none of every second one
            return ITensor(self._model.graph.output[index], index % 2 == 1)

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

        def get_error(self, index: int) -> ParserError:
            return ParserError(self._errors[index])

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

        def create_timing_cache(self, content: bytes) -> ITimingCache | None:
            return None if content == b"damaged" else ITimingCache(content)

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
            own = COMPATIBLE if "VERSION_COMPATIBLE" in config._flags else b""
            return MAGIC + own + network._model.SerializeToString()

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

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            """Its first size is the batch, which is open until every input's shape is set."""
            values = (*self._session.get_inputs(), *self._session.get_outputs())
            sizes = next(value.shape for value in values if value.name == name)
            complete = {value.name for value in self._session.get_inputs()} == self._shapes.keys()
            batch = next(iter(self._shapes.values()))[0] if complete else -1
            return tuple(n if isinstance(n, int) else batch for n in sizes)

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
            assert self._scratch in driver.memory, "the scratch memory was freed"
            feed = {}
            for value in self._session.get_inputs():
                dtype, shape = np.dtype(TYPES[value.type]), self._shapes[value.name]
                content = driver.memory[self._addresses[value.name]][: int(np.prod(shape)) * dtype.itemsize]
                feed[value.name] = np.frombuffer(content, dtype).reshape(shape)
            outputs = [value.name for value in self._session.get_outputs()]
            for name, array in zip(outputs, self._session.run(outputs, feed), strict=True):
                driver.memory[self._addresses[name]][: array.nbytes] = array.tobytes()

    class ICudaEngine:
        device_memory_size_v2 = 1000

        def __init__(self, content: bytes, log: Any) -> None:
            self._session = ort.InferenceSession(content, providers=["CPUExecutionProvider"])
            self._log = log

        def create_execution_context(self, strategy: int) -> IExecutionContext | None:
            driver.require_active()
            assert strategy == api.enums["ExecutionContextAllocationStrategy"]["USER_MANAGED"]
            if "execution context" in driver.short:
                self._log.log(Member(1), "Error Code 2: OutOfMemory (no further information)")
                return None
            return IExecutionContext(self._session)

    class Runtime:
        engine_host_code_allowed: bool

        def __init__(self, log: Any) -> None:
            self.logger, self.engine_host_code_allowed = log, False

        def deserialize_cuda_engine(self, content: bytes) -> ICudaEngine | None:
            driver.require_active()
            if not content.startswith(MAGIC):
                self.logger.log(Member(1), "the plan file has a bad magic tag")
                return None
            if "plan" in driver.short:
                self.logger.log(Member(1), "Requested amount of GPU memory (9 bytes) could not be allocated.")
                return None
            content = content.removeprefix(MAGIC)
            if content.startswith(COMPATIBLE) and not self.engine_host_code_allowed:
                self.logger.log(Member(1), "the plan has host code, which is not allowed")
                return None
            return ICudaEngine(content.removeprefix(COMPATIBLE), self.logger)

    doubles = (ParserError, INetworkDefinition, OnnxParser, ITimingCache, IOptimizationProfile, IBuilderConfig, Builder)
    for double in (*doubles, IExecutionContext, ICudaEngine, Runtime, ITensor):
        offered = {n for n in (*vars(double), *double.__annotations__) if not n.startswith("_")}
        assert offered <= set(api.classes[double.__name__]), f"{double.__name__} has no {offered}"
        for method, function in vars(double).items():
            if isinstance(function, FunctionType) and method in api.arguments[double.__name__]:
                require_arguments(api, double.__name__, method, function)
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
