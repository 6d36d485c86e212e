"""What a figure was measured on: the machine, its software, how busy it was, and how fast it could be at best."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from bench import timing
from mubic_deploy.engines import HostArrays, cpu
from mubic_deploy.graphs import Signature, Tensor
from mubic_deploy.sources import versions

PACKAGES = (
    "mubic-deploy",
    "torch",
    "torchvision",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "tensorrt",
    "numpy",
    "tritonclient",
    "nvidia-pytriton",
)
# rows, inner and columns, of which the best one counts: square ones, and on a CPU those of convolutions of 3 x 3
# values, whose weights stay in the cache
GEMM_SHAPES = {
    "cpu": ((1024, 1024, 1024), (2048, 2048, 2048), (1344, 1152, 256), (1344, 2304, 512), (336, 2304, 512)),
    "cuda": ((4096, 4096, 4096), (8192, 8192, 8192)),
}
COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31}
LIMIT_RULE = timing.Rule(repeats=10, seconds=3.0, short_s=0.3, warm_up_s=2.0)


def facts() -> dict[str, Any]:
    """The machine and its software, as they are for the whole run."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": versions(PACKAGES),
        "gpu": gpu_facts(),
    }


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two results' facts name the same hardware."""
    gpus = [(m["gpu"] or {}).get("name") for m in (a, b)]
    return (a["cpu"], a["cores"], gpus[0]) == (b["cpu"], b["cores"], gpus[1])


def state() -> dict[str, Any]:
    """What changes while it runs: the load, the clocks; noted before and after a run."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    clocks = [float(line.split(":")[1]) for line in lines if line.startswith("cpu MHz")]
    return {
        "load": list(os.getloadavg()),
        "cpu_mhz": round(float(np.mean(clocks)), 0) if clocks else None,
        "gpu": _gpu_state(),
    }


def commit() -> str | None:
    """The checkout's commit, with + for what was changed since; None outside of one."""
    here = Path(__file__).parent
    try:
        run = lambda *a: subprocess.run(["git", *a], cwd=here, capture_output=True, text=True, check=True).stdout  # noqa: E731
        return run("rev-parse", "HEAD").strip()[:12] + ("+" if run("status", "--porcelain", "-uno").strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return None


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """PyTorch computes with `count` threads within, and with as many as before after."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def limits(device: str = "cpu", threads: int = 0) -> dict[str, float]:
    """What this machine does at best, measured now: matrix products in FLOP/s, by precision (the median of the best of
    GEMM_SHAPES, and on a CPU of PyTorch and the engines that are installed, because the quickest library sets the
    limit; random values, for zeros can be faster), and a copy through PyTorch in bytes/s, read and written both
    counted. threads: of the engines, 0 for one a core; PyTorch uses those that it is set to."""
    import torch

    clock = timing.cuda_events if device == "cuda" else timing.wall
    rates = {}
    for precision in ("float32",) if device == "cpu" else ("float32", "float16"):
        rates[f"gemm_{precision}"] = max(_gemm(s, precision, device, threads, clock) for s in GEMM_SHAPES[device])
    source = torch.empty(COPY_BYTES[device] // 4, device=device).uniform_()
    target = torch.empty_like(source)
    copied = timing.measure({"copy": lambda i: target.copy_(source)}, LIMIT_RULE, clock)["copy"].median
    return {**rates, "copy": 2 * COPY_BYTES[device] / copied}


def best(*measured: dict[str, float]) -> dict[str, float]:
    """The highest of each rate: what a machine reached once, it can do."""
    return {name: max(limits[name] for limits in measured) for name in measured[0]}


def _gemm(shape: tuple[int, int, int], precision: str, device: str, threads: int, clock: timing.Clock) -> float:
    import torch

    m, k, n = shape
    a, b = (torch.randn(*of, device=device).to(getattr(torch, precision)) for of in ((m, k), (k, n)))
    out = torch.empty(m, n, device=device, dtype=a.dtype)
    sides: dict[str, timing.Side] = {"PyTorch": lambda i: torch.mm(a, b, out=out)}
    if device == "cpu":
        sides |= engines(a.numpy(), b.numpy(), threads)
    return 2 * m * k * n / min(timed.median for timed in timing.measure(sides, LIMIT_RULE, clock).values())


def engines(a: np.ndarray, b: np.ndarray, threads: int) -> dict[str, timing.Side]:
    """The product in each engine for a CPU that is installed, `b` a constant, as weights are."""
    import onnx

    (m, k), n, sides = a.shape, b.shape[1], dict[str, timing.Side]()
    node = onnx.helper.make_node("MatMul", ["A", "B"], ["C"])
    of = functools.partial(onnx.helper.make_tensor_value_info, elem_type=onnx.TensorProto.FLOAT)
    given, got = of("A", shape=["batch", m, k]), of("C", shape=["batch", m, n])
    graph = onnx.helper.make_graph([node], "gemm", [given], [got], [onnx.numpy_helper.from_array(b, "B")])
    opset = onnx.helper.make_opsetid("", 17)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10)
    signature = Signature("gemm", (Tensor("A", "float32", (m, k)),), (Tensor("C", "float32", (m, n)),))
    with tempfile.TemporaryDirectory(prefix="mubic-bench-") as folder:
        path = Path(folder) / "gemm.onnx"
        onnx.save(model, path)
        for name in cpu.ENGINES:
            if find_spec(name):
                engine = cpu.load_engine(name, path, signature, threads)
                sides[name] = functools.partial(_multiply, engine, a[None])
    return sides


def _multiply(engine: cpu.HostEngine, a: np.ndarray, _call: int) -> HostArrays:
    return engine({"A": a})


def gpu_facts() -> dict[str, Any] | None:
    """The first GPU, through NVIDIA's management library (nvidia-ml-py), or in fewer words from PyTorch, if that is
    loaded; None without one."""
    return _cuda_facts() if (found := _nvml_facts()) is None else found


def _cuda_facts() -> dict[str, Any] | None:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return {"name": properties.name, "memory_gb": round(properties.total_memory / 1e9, 1)}


def _nvml_facts() -> dict[str, Any] | None:
    return _nvml(
        lambda nvml, gpu: {
            "name": _text(nvml.nvmlDeviceGetName(gpu)),
            "memory_gb": round(nvml.nvmlDeviceGetMemoryInfo(gpu).total / 1e9, 1),
            "driver": _text(nvml.nvmlSystemGetDriverVersion()),
            "power_limit_w": nvml.nvmlDeviceGetEnforcedPowerLimit(gpu) / 1000,
        }
    )


def _gpu_state() -> dict[str, Any] | None:
    return _nvml(
        lambda nvml, gpu: {
            "sm_mhz": nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM),
            "memory_mhz": nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM),
            "power_w": nvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
            "temperature_c": nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU),
        }
    )


def _nvml(read: Callable[[Any, Any], dict[str, Any]]) -> dict[str, Any] | None:
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        return read(pynvml, pynvml.nvmlDeviceGetHandleByIndex(0))
    except pynvml.NVMLError:  # a driver without a GPU, or one that does not tell
        return None
    finally:
        pynvml.nvmlShutdown()


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"
