"""Triton's Python backend: the noise that the sampler starts from."""

from typing import Any

import triton_python_backend_utils as pb_utils  # a module of the server

from mubic_deploy.diffusion import noise
from mubic_deploy.errors import UserError
from mubic_deploy.triton import parameters


class TritonPythonModel:
    """SEED in, S_T out. On a CPU something of fusion's comes too, only so that this is later."""

    def initialize(self, args: dict[str, str]) -> None:
        self.config = parameters.config_from_string(
            parameters.from_model_config(args["model_config"])[parameters.CONFIG]
        )

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self.respond(request) for request in requests]

    def respond(self, request: Any) -> Any:
        seeds = pb_utils.get_input_tensor_by_name(request, "SEED").as_numpy()
        try:
            return pb_utils.InferenceResponse([pb_utils.Tensor("S_T", noise(seeds[:, 0], self.config.map_size))])
        except UserError as error:
            wrong = pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG)
            return pb_utils.InferenceResponse(error=wrong)
