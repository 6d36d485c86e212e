"""The loop of `triton_models/ddim` over tensors that lie on a GPU: which models it calls with what, and what it reads.

The server's own module is a double here, because on a CPU no tensor is ever on a device; the loop in the real server is
in test_triton.py and test_triton_gpu.py."""

from __future__ import annotations

import asyncio
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_triton import Tensor, TritonError, backend_utils

from mubic_deploy import graphs
from mubic_deploy.config import DEMO
from mubic_deploy.diffusion import schedule
from mubic_deploy.sources import load_script, source_dir


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Tensor], list[str]]]:
    """Model, inputs and wanted outputs of each call. `denoiser` adds 1 to S_T; what it gives is on the device, unless
    it is wanted on the host."""
    made: list[tuple[str, dict[str, Tensor], list[str]]] = []

    class InferenceRequest:
        def __init__(
            self,
            model_name: str,
            requested_output_names: list[str],
            inputs: list[Tensor],
            preferred_memory: str | None = None,
        ) -> None:
            self.call = (model_name, {t.name: t for t in inputs}, requested_output_names)
            self.on_device = preferred_memory != "CPU 0"

        async def async_exec(self) -> Any:
            made.append(self.call)
            model, inputs, (output,) = self.call
            if model == "host":
                result = Tensor(output, inputs["ADAPTIVE_STEPS"].values)
            else:
                result = Tensor(output, inputs["S_T"].values + 1, self.on_device)
            return SimpleNamespace(has_error=lambda: False, tensors={output: result})

    logger = SimpleNamespace(log_error=lambda text: None)
    double = backend_utils(
        InferenceRequest=InferenceRequest,
        Logger=logger,
        PreferredMemory=lambda kind, number: f"{kind} {number}",
        TRITONSERVER_MEMORY_CPU="CPU",
    )
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", double)
    return made


def run(steps: list[int], adaptive: list[int], **on_device: bool) -> Any:
    """The answer to one request whose conditioning and ADAPTIVE_STEPS are on the device."""
    return asyncio.run(loop().execute([request(steps, adaptive, **on_device)]))[0]


def loop() -> Any:
    model = load_script(source_dir("triton_models") / "ddim" / "1" / "model.py").TritonPythonModel()
    model.config, model.denoiser = DEMO, None
    return model


def request(steps: list[int], adaptive: list[int], **on_device: bool) -> Any:
    count = len(steps)
    tensors = {t.name: Tensor(t.name, np.zeros((count, 1)), True) for t in graphs.conditioning(DEMO)}
    tensors["SEED"] = Tensor("SEED", np.arange(count)[:, None], on_device.get("SEED", False))
    tensors["STEPS"] = Tensor("STEPS", np.array(steps, np.int32)[:, None], on_device.get("STEPS", False))
    tensors["ADAPTIVE_STEPS"] = Tensor("ADAPTIVE_STEPS", np.array(adaptive, np.int32)[:, None], True)
    return SimpleNamespace(tensors=tensors)


def test_fixed_steps_bring_nothing_but_the_map_to_the_host(calls) -> None:
    answer = run([2, 2], [5, 5])
    assert [(model, wanted) for model, _, wanted in calls] == [("denoiser", ["S_NEXT"]), ("denoiser", ["S_0"])]
    saliency, used = answer.out
    assert (saliency.name, saliency.on_device) == ("SALIENCY", False)
    assert used.values.tolist() == [[2], [2]]
    for (_, inputs, _), step in zip(calls, schedule(np.array([2, 2])).step, strict=True):
        assert {t.name for t in graphs.conditioning(DEMO)} < set(inputs)
        assert inputs["STEP"].values.tolist() == step.tolist()
    assert not calls[0][1]["S_T"].on_device  # the noise
    assert calls[1][1]["S_T"].on_device  # what the first call gave, where it is


def test_a_call_that_fails_is_an_error_of_its_request_alone(calls, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server may have no GPU memory for what a call gives; it says so by an exception."""
    model, call = loop(), {}

    async def fails_once(name: str, inputs: list[Tensor], output: str, on_host: bool) -> Any:
        if "failed" not in call:
            call["failed"] = True
            raise RuntimeError("Failed to provide the GPU buffer")
        await asyncio.sleep(0.01)
        return await type(model).call(model, name, inputs, output, on_host)

    monkeypatch.setattr(model, "call", fails_once)
    broken, whole = asyncio.run(model.execute([request([2], [2]), request([2], [2])]))
    assert broken.error == "RuntimeError: Failed to provide the GPU buffer"
    assert whole.error is None
    assert whole.out[1].values.tolist() == [[2]]


def test_a_model_that_answers_with_an_error_is_no_fault_of_the_client(calls, monkeypatch: pytest.MonkeyPatch) -> None:
    double = sys.modules["triton_python_backend_utils"]

    async def fails(request: Any) -> Any:
        said = SimpleNamespace(message=lambda: "no memory")
        return SimpleNamespace(has_error=lambda: True, error=lambda: said)

    monkeypatch.setattr(double.InferenceRequest, "async_exec", fails)
    error = run([4], [4]).error
    assert (error, error.code) == ("denoiser: no memory", TritonError.INTERNAL)


def test_adaptive_steps_are_fetched_by_host(calls) -> None:
    answer = run([0, 4], [3, 9])
    assert [model for model, *_ in calls] == ["host"] + 4 * ["denoiser"]
    assert calls[0][2] == ["ON_HOST"]
    assert answer.out[1].values.tolist() == [[3], [4]]
    error = run([0], [13]).error
    assert error.startswith("ADAPTIVE_STEPS is out of range")
    assert error.code == TritonError.INTERNAL  # no client chose it


@pytest.mark.parametrize("name", ["SEED", "STEPS"])
def test_settings_on_a_gpu_are_an_error_of_their_request(calls, name: str) -> None:
    error = run([4], [4], **{name: True}).error
    assert (error, error.code) == (f"{name} lies on a GPU: send it from the host's memory", TritonError.INVALID_ARG)
    assert not calls


def test_the_double_bars_what_triton_bars() -> None:
    with pytest.raises(AssertionError, match="stored in GPU"):
        Tensor("X", np.zeros(1), True).as_numpy()
