"""A GPU that runs out of memory, and a driver that is too old, in PyTorch and ONNX Runtime: one line each. TensorRT's
are in test_tensorrt_bad_input.py."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mubic_deploy.engines import aotinductor, eager, onnxruntime
from mubic_deploy.engines.memory import REMEDY
from mubic_deploy.errors import UserError
from mubic_deploy.graphs import Signature, Tensor
from mubic_deploy.training.machine import Machine, make_fabric

GPU = torch.device("cuda")
SIGNATURE = Signature("fusion", (Tensor("X", "float32", (3,)),), (Tensor("Y", "float32", (3,)),))
INPUTS = {"X": np.zeros((1, 3), np.float32)}
OF_TORCH = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79 GiB."
)
OF_CUDA = RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported\n")
OF_A_PACKAGE = RuntimeError("create_func_( &handle) API call failed at model_container_runner.cpp, line 145")
OF_THE_ARENA = Exception(
    "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : bfc_arena.cc:376 AllocateRawInternal Failed to allocate memory for "
    "requested buffer of size 411041792"
)
OF_THE_PROVIDER = Exception("[ONNXRuntimeError] : 1 : FAIL : CUDA failure 2: out of memory ; GPU=0 ; expr=cudaMalloc")


def raising(error: Exception) -> Any:
    def fails(*_: object, **__: object) -> None:
        raise error

    return fails


def said(error: pytest.ExceptionInfo[UserError]) -> str:
    assert "\n" not in str(error.value)
    assert str(error.value).endswith(REMEDY)
    return str(error.value)


def test_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    module = torch.nn.Linear(3, 3)
    monkeypatch.setattr(module, "forward", raising(OF_TORCH))
    with pytest.raises(UserError) as error:
        eager.EagerEngine(module, SIGNATURE)(INPUTS)
    assert said(error).startswith("the GPU has not enough memory for fusion (CUDA out of memory. Tried")


@pytest.mark.parametrize("cause", [OF_TORCH, OF_CUDA, OF_A_PACKAGE], ids=["torch", "cuda", "package"])
@pytest.mark.parametrize("when", ["loaded", "run"])
def test_aotinductor(monkeypatch: pytest.MonkeyPatch, when: str, cause: RuntimeError) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (300_000_000, 80_000_000_000))
    monkeypatch.setattr(aotinductor, "to_torch", lambda array, device: torch.from_numpy(array))

    def load(*arguments: object) -> SimpleNamespace:
        assert arguments == ("fusion.pt2", "fusion", True, 1, -1)  # in one thread, or it cannot be captured
        if when == "loaded":
            raise cause
        return SimpleNamespace(boxed_run=raising(cause))

    monkeypatch.setattr(aotinductor, "AOTIModelPackageLoader", load)
    with pytest.raises(UserError) as error:
        aotinductor.AOTInductorEngine(aotinductor.loaded(Path("fusion.pt2"), SIGNATURE, GPU).run, SIGNATURE, GPU, 4)(
            INPUTS
        )
    what = "fusion.pt2" if when == "loaded" else "fusion"
    if cause is OF_A_PACKAGE:
        assert said(error).startswith(f"{what} failed on the GPU (create_func_(")
        assert "0.3 of 80.0 GB are free: if that is little, send fewer" in said(error)
    else:
        assert said(error).startswith(f"the GPU has not enough memory for {what} (CUDA")


def test_other_errors_of_a_package_are_not_about_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for device, cause in ((GPU, RuntimeError("a bug")), (torch.device("cpu"), OF_A_PACKAGE)):
        monkeypatch.setattr(aotinductor, "AOTIModelPackageLoader", raising(cause))
        with pytest.raises(RuntimeError) as error:
            aotinductor.loaded(Path("fusion.pt2"), SIGNATURE, device)
        assert error.value is cause


def test_a_gpu_that_is_lost_to_the_process_is_not_asked_for_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = RuntimeError("CUDA error: an illegal memory access was encountered")
    monkeypatch.setattr(torch.cuda, "synchronize", raising(lost))
    monkeypatch.setattr(torch.cuda, "mem_get_info", raising(lost))
    monkeypatch.setattr(aotinductor, "AOTIModelPackageLoader", raising(OF_A_PACKAGE))
    with pytest.raises(RuntimeError) as error:
        aotinductor.loaded(Path("fusion.pt2"), SIGNATURE, GPU)
    assert error.value is OF_A_PACKAGE
    assert not aotinductor.computes()


@pytest.mark.parametrize("cause", [OF_THE_ARENA, OF_THE_PROVIDER], ids=["arena", "provider"])
def test_onnxruntime(monkeypatch: pytest.MonkeyPatch, cause: Exception) -> None:
    session: Any = SimpleNamespace(run_with_iobinding=raising(cause))
    engine = onnxruntime.BoundEngine(session, SIGNATURE, onnxruntime.Places("cpu"), graph_replay=False)
    monkeypatch.setattr(engine, "_binding", lambda batch: ())
    with pytest.raises(UserError) as error:
        engine(INPUTS)
    assert said(error).startswith("the GPU has not enough memory for fusion at a batch of 1 ([ONNXRuntimeError]")
    monkeypatch.setattr(onnxruntime.ort, "InferenceSession", raising(cause))
    with pytest.raises(UserError) as error:
        onnxruntime._cuda_session(Path("fusion.onnx"), cuda_graphs=True)
    assert said(error).startswith("the GPU has not enough memory for fusion.onnx ([ONNXRuntimeError]")


def test_other_errors_of_onnxruntime_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    cause = Exception("[ONNXRuntimeError] : 2 : INVALID_ARGUMENT")
    session: Any = SimpleNamespace(run_with_iobinding=raising(cause))
    engine = onnxruntime.BoundEngine(session, SIGNATURE, onnxruntime.Places("cpu"), graph_replay=False)
    monkeypatch.setattr(engine, "_binding", lambda batch: ())
    with pytest.raises(Exception, match="INVALID_ARGUMENT") as error:
        engine(INPUTS)
    assert error.value is cause


def test_a_gpu_computes_fp32_with_all_its_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's convolutions on a GPU are TF32 by default. That they are not then was not run on one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA L4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    uses = (eager.gpu, lambda: aotinductor.facts(GPU), lambda: make_fabric(Machine("cpu"), "32-true"))
    for use in uses:
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
        use()
        assert not torch.backends.cudnn.allow_tf32
        assert not torch.backends.cuda.matmul.allow_tf32  # PyTorch's default


def test_a_driver_that_is_too_old_for_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda.is_available only warns of it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    old = "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver"
    monkeypatch.setattr(torch.cuda, "init", raising(RuntimeError(old)))
    says = r"^PyTorch .*: The NVIDIA driver .* too old \(found version 11040\): install a newer NVIDIA driver$"
    with pytest.raises(UserError, match=says):
        aotinductor.facts(GPU)
    with pytest.raises(UserError, match=says):
        eager.gpu()
    monkeypatch.setattr(torch.cuda, "init", raising(RuntimeError("Found no NVIDIA driver on your system.")))
    with pytest.raises(UserError, match="PyTorch finds no NVIDIA GPU here: use --engine eager"):
        eager.gpu()
