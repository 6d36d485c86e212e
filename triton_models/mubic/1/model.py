"""Triton's Python backend: the whole chain in one process, of AOTInductor's packages. Of other engines' graphs `mubic`
is an ensemble, and has no code."""

import os
import sys
import traceback
from typing import Any

import numpy as np
import torch
import triton_python_backend_utils as pb_utils  # a module of the server

from mubic_deploy import graphs
from mubic_deploy.diffusion import check_seeds
from mubic_deploy.engines import Arrays, HostArrays, aotinductor, cpu
from mubic_deploy.pipeline import Pipeline, StepsError, check_sound
from mubic_deploy.triton import parameters
from mubic_deploy.triton.graph_model import GraphModel


class Chain:
    """The pipeline as an engine: `graphs.pipeline`."""

    def __init__(self, settings: parameters.PackageSettings) -> None:
        self.pipeline = Pipeline.open(settings.check_folder(), "aotinductor")
        self.signature, self.sizes = graphs.pipeline(self.pipeline.config), settings.sizes
        for batch in self.sizes:
            # the sampler, if there is one, and the loop: 1 or 2 steps are its, whichever number the sampler has
            for steps in {1, 2, self.pipeline.fixed_steps or 1}:
                if steps <= self.pipeline.config.max_steps:
                    self(self.silence(batch, steps))

    def silence(self, batch: int, steps: int) -> HostArrays:
        """Black clips without a sound."""
        arrays = {t.name: np.zeros((batch, *t.shape), t.dtype) for t in self.signature.inputs}
        return {**arrays, "STEPS": np.full((batch, 1), steps, np.int32)}

    def __call__(self, inputs: Arrays) -> HostArrays:
        """On a GPU in parts of the sizes that have CUDA graphs: others would be captured while a client waits, and each
        keeps memory of its own."""
        arrays = {name: np.asarray(array) for name, array in inputs.items()}
        results, first, clips = [], 0, len(arrays["VIDEO"])
        while first < clips:
            size = next((n for n in self.sizes if n <= clips - first), clips)
            part = {name: array[first : first + size] for name, array in arrays.items()}
            seed, steps = part["SEED"][:, 0], part["STEPS"][:, 0]
            sound = part.get("AUDIO", np.empty((size, 0), np.float32))  # visual_only hears nothing
            results.append(self.pipeline.predict(part["VIDEO"], sound, seed, steps))
            first += size
        saliency, used = (np.concatenate(each) for each in zip(*results, strict=True))
        return {"SALIENCY": saliency, "STEPS_USED": used}


class TritonPythonModel(GraphModel):
    """A batch of requests is one call of the chain."""

    def initialize(self, args: dict[str, str]) -> None:
        settings = parameters.PackageSettings.from_strings(parameters.from_model_config(args["model_config"]))
        torch.set_num_threads(settings.threads or cpu.cores())
        self.engine = chain = Chain(settings)
        self.pipeline, self.allocate = chain.pipeline, chain.pipeline.allocate
        self.on_gpu = bool(settings.sizes)

    def execute(self, requests: list[Any]) -> list[Any]:
        try:
            return super().execute(requests)
        except StepsError:  # of one of them, which the others shall not suffer for
            return [self.alone(request) for request in requests]
        except Exception:
            if self.on_gpu and not aotinductor.computes():
                # every request would fail from now on: whoever watches the server sees a process that has ended
                traceback.print_exc()
                print("the GPU is lost to this process, which ends", file=sys.stderr, flush=True)
                os._exit(1)
            raise

    def alone(self, request: Any) -> Any:
        try:
            return super().execute([request])[0]
        except StepsError as error:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))

    def _check(self, request: Any, feed: HostArrays) -> None:
        check_seeds(feed["SEED"][:, 0])
        for n in feed["STEPS"][:, 0]:
            self.pipeline.config.check_steps(int(n))
        if "AUDIO" in feed:
            check_sound(feed["AUDIO"])
