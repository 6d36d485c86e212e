"""A double of `triton_python_backend_utils`, the module that Triton's server gives to Python models: for what lies on a
GPU, or needs no server."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np


class Tensor:
    """As in Triton: NumPy's way to the values is barred while they are on a device."""

    def __init__(self, name: str, values: np.ndarray, on_device: bool = False) -> None:
        self.name, self.values, self.on_device = name, values, on_device

    def is_cpu(self) -> bool:
        return not self.on_device

    def as_numpy(self) -> np.ndarray:
        assert not self.on_device, "Tensor is stored in GPU and cannot be converted to NumPy"
        return self.values

    @classmethod
    def from_dlpack(cls, name: str, tensor: Tensor) -> Tensor:
        return cls(name, tensor.values, tensor.on_device)


class TritonError(str):
    """As in Triton, but that it is its message."""

    INTERNAL, INVALID_ARG = 1, 3

    def __new__(cls, message: str, code: int = INTERNAL) -> TritonError:
        error = super().__new__(cls, message)
        error.code = code
        return error

    code: int


def backend_utils(**more: Any) -> ModuleType:
    """The module. Requests and responses have `tensors` by name; an answer has `out`, its tensors, and `error`."""
    double = ModuleType("triton_python_backend_utils")

    def get(tensors: Any, name: str) -> Tensor | None:
        return tensors.tensors.get(name)

    vars(double).update(
        Tensor=Tensor,
        TritonError=TritonError,
        InferenceResponse=lambda output_tensors=None, error=None: SimpleNamespace(out=output_tensors, error=error),
        get_input_tensor_by_name=get,
        get_output_tensor_by_name=get,
        **more,
    )
    return double
