"""TensorRT engines: a folder of plans, and what runs one. Device memory, streams and graphs are pycuda's; no PyTorch.

A plan belongs to the GPU model and the TensorRT version that built it. The folder's `engines.json` says which, and is
read before TensorRT sees a plan."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mubic_deploy.artifacts import PLANS_MANIFEST, SEED, Folder, Layout, Needs
from mubic_deploy.engines import Arrays, DeviceArray, Engine, cuda
from mubic_deploy.engines.cuda import GPU, CapturedGraph, Facts, Memory
from mubic_deploy.engines.memory import is_short, short_of_memory
from mubic_deploy.errors import UserError
from mubic_deploy.graphs import Signature

FORMAT = 2
AGAIN = "build it here with mubic-deploy engines"
WITHOUT = "it runs without CUDA graphs, use --no-cuda-graphs"
NEEDS: Needs = {
    **SEED,
    ("profile", "max"): int,
    ("tensorrt",): str,
    ("version_compatible",): bool,
    ("gpu", "name"): str,
    ("gpu", "compute_capability"): str,
}


def import_tensorrt() -> Any:
    """The module tensorrt. UserError if it is missing or cannot be loaded."""
    try:
        import tensorrt
    except (ImportError, OSError) as error:
        raise UserError(
            f"TensorRT cannot be used ({error}): install it with pip install 'mubic-deploy[tensorrt]'"
        ) from None
    return tensorrt


def logger(trt: Any) -> Any:
    """A logger that keeps what went wrong: `.errors`, the last messages of severity ERROR and worse."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if int(severity) <= int(trt.ILogger.Severity.ERROR):
                self.errors.append(message.strip())

    return Log()


def created(make: Callable[[Any], Any], log: Any) -> Any:
    """A Builder or a Runtime. UserError if TensorRT cannot start, as with a driver that is older than its CUDA."""
    try:
        return make(log)
    except TypeError:  # pybind11's, for a constructor that gave nothing
        reason = "; ".join(log.errors[-2:]) or "no reason given"
        raise UserError(f"TensorRT cannot start ({reason}): install an NVIDIA driver for its CUDA version") from None


class Plans(Folder):
    """TensorRT plans."""

    LAYOUT = Layout(PLANS_MANIFEST, FORMAT, "plans", NEEDS, AGAIN)

    @property
    def max_batch(self) -> int:
        return self.manifest["profile"]["max"]

    def require(self, facts: Facts, version: str) -> None:
        """UserError if the plans were built for another kind of GPU or another TensorRT than these."""
        built = self.manifest["gpu"]
        if (built["name"], built["compute_capability"]) != (facts.name, facts.compute_capability):
            raise UserError(
                f"{self.path} was built on {built['name']} (compute capability {built['compute_capability']}), this is "
                f"{facts.name} ({facts.compute_capability}): {AGAIN}"
            )
        theirs = self.manifest["tensorrt"]
        compatible = self.manifest["version_compatible"] and theirs.split(".")[0] == version.split(".")[0]
        if theirs != version and not (compatible and _number(version) >= _number(theirs)):
            raise UserError(f"{self.path} was built with TensorRT {theirs}, this is {version}: {AGAIN}")


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3])


class TensorRTEngine:
    """One plan on the GPU. All engines of a process share a stream: they are for one thread at a time.

    The engines of a chain share `memory`, so a tensor lies where the next one reads it. Each batch size gets an
    execution context, over one block of scratch memory, because a captured graph needs the context that it was captured
    with as it was; from the second call of a size on, the kernels are one launch."""

    def __init__(
        self,
        trt: Any,
        gpu: GPU,
        runtime: Any,
        path: Path,
        signature: Signature,
        memory: Memory,
        max_batch: int,
        cuda_graphs: bool,
    ) -> None:
        self.signature, self.max_batch = signature, max_batch
        self._trt, self._gpu, self._runtime, self._replay = trt, gpu, runtime, cuda_graphs
        self._memory = memory
        self._contexts: dict[int, Any] = {}
        self._graphs: dict[int, CapturedGraph] = {}
        with gpu.active():
            self._engine = runtime.deserialize_cuda_engine(path.read_bytes())
            if self._engine is None:
                raise self._failure(f"{path} cannot be loaded", str(path), AGAIN)
            self._scratch = gpu.allocate(max(1, self._engine.device_memory_size_v2))
            for tensor in (*signature.inputs, *signature.outputs):
                memory.place(tensor)

    def __call__(self, inputs: Arrays) -> dict[str, DeviceArray]:
        self._runtime.logger.errors.clear()  # what is said below is of this call
        batch, arrays = self.signature.batch(inputs)
        if batch > self.max_batch:
            raise UserError(
                f"a batch of {batch} is above the engine's {self.max_batch}: send fewer at once, or build with "
                f"--max-batch {batch}"
            )
        with self._gpu.active():
            for tensor in self.signature.inputs:
                self._memory.write(tensor, arrays[tensor.name])
            if not self._replay:
                self._enqueue(batch)
            elif batch in self._graphs:
                self._graphs[batch].launch()
            else:
                self._enqueue(batch)  # once outside of a graph: what TensorRT sets up at first must not be captured
                self._gpu.stream.synchronize()
                self._graphs[batch] = CapturedGraph(self._gpu, lambda: self._enqueue(batch, WITHOUT))
        return {t.name: self._memory.array(t, batch) for t in self.signature.outputs}

    def _context(self, batch: int) -> Any:
        """The execution context of a batch size, its shapes and addresses set."""
        if batch not in self._contexts:
            context = self._engine.create_execution_context(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)
            name = self.signature.name
            if context is None:
                raise self._failure(f"TensorRT cannot run {name}", name, "end what else uses the GPU")
            context.set_device_memory(int(self._scratch), self._engine.device_memory_size_v2)
            taken = [context.set_input_shape(t.name, (batch, *t.shape)) for t in self.signature.inputs]
            tensors = (*self.signature.inputs, *self.signature.outputs)
            taken += [context.set_tensor_address(t.name, int(self._memory.place(t))) for t in tensors]
            if not all(taken):
                raise self._failure(f"TensorRT does not take a batch of {batch} for {name}", name, AGAIN)
            for t in self.signature.outputs:  # now that the inputs' are known: until then a plan may leave them open
                shape = tuple(context.get_tensor_shape(t.name))
                if shape != (batch, *t.shape):
                    raise UserError(f"{t.name} of {name} is {shape} in the plan, not {(batch, *t.shape)}: {AGAIN}")
            self._contexts[batch] = context
        return self._contexts[batch]

    def _enqueue(self, batch: int, remedy: str = "see whether another process uses the GPU") -> None:
        context = self._context(batch)
        if not context.execute_async_v3(self._gpu.stream.handle):
            said = f"TensorRT could not run {self.signature.name} at a batch of {batch}"
            raise self._failure(said, self.signature.name, remedy)

    def _failure(self, said: str, what: str, remedy: str) -> UserError:
        """`said`, with what TensorRT logged last, and the remedy; if that is about memory, what says so of `what`."""
        reason = "; ".join(self._runtime.logger.errors[-2:]) or "no reason given"
        return short_of_memory(what, reason) if is_short(reason) else UserError(f"{said} ({reason}): {remedy}")


def load_engines(plans: Plans, cuda_graphs: bool = True) -> dict[str, Engine]:
    """An engine for each plan, on the first GPU. UserError if there is none, or the plans are not for it."""
    gpu = cuda.gpu()  # first: who has none shall not be told to install TensorRT
    trt = import_tensorrt()
    plans.require(gpu.facts, trt.__version__)
    runtime = created(trt.Runtime, logger(trt))
    if plans.manifest["version_compatible"]:
        runtime.engine_host_code_allowed = True  # such a plan carries its own lean runtime
    memory = Memory(gpu, plans.max_batch)
    return {
        name: TensorRTEngine(trt, gpu, runtime, plans.file(name), signature, memory, plans.max_batch, cuda_graphs)
        for name, signature in plans.signatures.items()
    }
