"""Triton's Python backend: the DDIM loop around the denoiser (thesis, Algorithm 2).

With an ONNX file among its parameters the model runs the denoiser itself; without one it calls the model `denoiser`
(BLS). Then the loop passes opaque tensors: it reads SEED and STEPS, and ADAPTIVE_STEPS where STEPS asks for it, which
the model `host` brings over if it lies on a device; what else lies there stays there."""

import asyncio
import traceback
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # a module of the server

from mubic_deploy import graphs
from mubic_deploy.diffusion import noise, schedule
from mubic_deploy.engines import Engine
from mubic_deploy.errors import UserError
from mubic_deploy.pipeline import StepsError, chosen_steps, sample
from mubic_deploy.triton import parameters


class CallError(Exception):
    """A model that the loop calls answered with an error."""


class TritonPythonModel:
    """COND, ADAPTIVE_STEPS, SEED and STEPS in; SALIENCY [B, 1, h, w] (config.pbtxt reshapes it) and STEPS_USED out."""

    def initialize(self, args: dict[str, str]) -> None:
        values = parameters.from_model_config(args["model_config"])
        self.config = parameters.config_from_string(values[parameters.CONFIG])
        self.denoiser: Engine | None = None
        if parameters.GraphSettings.from_strings(values):
            # an engine need not be installed where the denoiser is another model
            from mubic_deploy.triton.graph_model import load_engine

            self.denoiser = load_engine("denoiser", values)

    async def execute(self, requests: list[Any]) -> list[Any]:
        """One response a request. Those that call step side by side, so that the denoiser's batcher can merge them."""
        return await asyncio.gather(*(self.respond(request) for request in requests))

    async def respond(self, request: Any) -> Any:
        try:
            outputs = self.run_here(request, self.denoiser) if self.denoiser else await self.run_calls(request)
        except (CallError, StepsError) as error:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))
        except UserError as error:  # the client's
            wrong = pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG)
            return pb_utils.InferenceResponse(error=wrong)
        except Exception as error:  # as where the GPU has no room for an answer: the others in the batch go on
            pb_utils.Logger.log_error(traceback.format_exc())
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(f"{type(error).__name__}: {error}"))
        return pb_utils.InferenceResponse(outputs)

    def setting(self, request: Any, name: str) -> np.ndarray:
        """SEED or STEPS. UserError if the client put it on a device."""
        tensor = pb_utils.get_input_tensor_by_name(request, name)
        if not tensor.is_cpu():
            raise UserError(f"{name} lies on a GPU: send it from the host's memory")
        return tensor.as_numpy()

    def settings(self, request: Any, adaptive: Any) -> tuple[np.ndarray, np.ndarray]:
        """SEED int64 [B, 1], and the steps of each sample, int32 [B, 1]. `adaptive`: ADAPTIVE_STEPS, on the host if it
        is wanted. UserError if one is out of range."""
        seed, steps = (self.setting(request, name) for name in ("SEED", "STEPS"))
        for n in steps[:, 0]:
            self.config.check_steps(int(n))
        if (steps > 0).all():
            return seed, steps
        return seed, chosen_steps(self.config, steps, adaptive.as_numpy())

    def run_here(self, request: Any, denoiser: Engine) -> list[Any]:
        """The loop of the in-process pipeline, with the graph in this process."""
        seed, steps = self.settings(request, pb_utils.get_input_tensor_by_name(request, "ADAPTIVE_STEPS"))
        names = [t.name for t in (*graphs.conditioning(self.config), graphs.ADAPTIVE_STEPS)]
        cond = {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in names}
        results = sample(self.config, denoiser, cond, seed, steps)
        return [
            pb_utils.Tensor("SALIENCY", results["SALIENCY"][:, None]),
            pb_utils.Tensor("STEPS_USED", results["STEPS_USED"]),
        ]

    async def run_calls(self, request: Any) -> list[Any]:
        """The same loop over calls of the model `denoiser`; its tensors are renamed, never read."""
        adaptive = pb_utils.get_input_tensor_by_name(request, "ADAPTIVE_STEPS")
        if not (self.setting(request, "STEPS") > 0).all() and not adaptive.is_cpu():
            adaptive = await self.call("host", [adaptive], "ON_HOST")
        seed, steps = self.settings(request, adaptive)
        cond = [pb_utils.get_input_tensor_by_name(request, t.name) for t in graphs.conditioning(self.config)]
        s_t = pb_utils.Tensor("S_T", noise(seed[:, 0], self.config.map_size))
        calls = list(zip(*schedule(steps[:, 0]), strict=True))
        for left, arrays in zip(reversed(range(len(calls))), calls, strict=True):
            names = ("STEP", "ALPHA_NOW", "ALPHA_NEXT")
            step = [pb_utils.Tensor(name, array) for name, array in zip(names, arrays, strict=True)]
            # only the tensor that is needed comes back: the next S_T, at last the map, which goes to the host
            result = await self.call("denoiser", [*cond, s_t, *step], "S_NEXT" if left else "S_0", on_host=not left)
            s_t = pb_utils.Tensor.from_dlpack("S_T" if left else "SALIENCY", result)
        return [s_t, pb_utils.Tensor("STEPS_USED", steps)]

    async def call(self, model: str, inputs: list[Any], output: str, on_host: bool = False) -> Any:
        """A tensor of a model's answer, where the model leaves it, or on the host."""
        where = {"preferred_memory": pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0)} if on_host else {}
        request = pb_utils.InferenceRequest(model_name=model, requested_output_names=[output], inputs=inputs, **where)
        response = await request.async_exec()
        if response.has_error():
            raise CallError(f"{model}: {response.error().message()}")
        return pb_utils.get_output_tensor_by_name(response, output)
