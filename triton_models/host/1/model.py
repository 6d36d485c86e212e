"""Triton's Python backend: brings ADAPTIVE_STEPS from the GPU to the host, where `ddim` can read it.

Triton moves the inputs of a Python model to the host unless the model says otherwise, and this one does not."""

from typing import Any

import triton_python_backend_utils as pb_utils  # a module of the server


class TritonPythonModel:
    """ADAPTIVE_STEPS in, ON_HOST out, the same values."""

    def execute(self, requests: list[Any]) -> list[Any]:
        steps = [pb_utils.get_input_tensor_by_name(request, "ADAPTIVE_STEPS").as_numpy() for request in requests]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("ON_HOST", values)]) for values in steps]
