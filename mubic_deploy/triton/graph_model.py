"""A model of Triton's Python backend around an engine in its process. Runs inside the server's stub processes only."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # a module of the server

from mubic_deploy.engines import HostArrays, cpu
from mubic_deploy.engines.cpu import HostEngine
from mubic_deploy.errors import UserError
from mubic_deploy.graphs import signatures
from mubic_deploy.pipeline import ALLOCATE, Allocate, check_sound
from mubic_deploy.triton import parameters
from mubic_deploy.triton.parameters import GraphSettings


def load_engine(graph: str, values: dict[str, str]) -> HostEngine:
    """The engine of a graph from the parameters of a model. UserError if its file is missing or another."""
    settings = GraphSettings.from_strings(values)
    if settings is None:
        raise UserError(f"the configuration of {graph} names no ONNX file: write the model repository again")
    config = parameters.config_from_string(values[parameters.CONFIG])
    signature = signatures(config, settings.precision, sampler=True)[graph]
    return cpu.load_engine(settings.engine, settings.check_file(), signature, settings.threads)


def error_response(error: UserError) -> Any:
    """What a client did wrong."""
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG))


class GraphModel:
    """One graph. The requests of a batch become one run along the batch axis.

    engine    what runs it
    allocate  makes arrays from which the engine takes what was merged"""

    engine: HostEngine
    allocate: Allocate = staticmethod(ALLOCATE)

    def initialize(self, args: dict[str, str]) -> None:
        self.engine = load_engine(args["model_name"], parameters.from_model_config(args["model_config"]))

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response a request. A request with a wrong tensor gets an error and the others their results.

        If the engine fails, Triton answers the whole batch with its error and goes on."""
        responses: list[Any] = [None] * len(requests)
        feeds: dict[int, HostArrays] = {}
        for i, request in enumerate(requests):
            try:
                feeds[i] = self._feed(request)
            except UserError as error:
                responses[i] = error_response(error)
        if feeds:
            for i, outputs in zip(feeds, self._run(list(feeds.values())), strict=True):
                tensors = [pb_utils.Tensor(name, array) for name, array in outputs.items()]
                responses[i] = pb_utils.InferenceResponse(tensors)
        return responses

    def _feed(self, request: Any) -> HostArrays:
        inputs = self.engine.signature.inputs
        feed = {t.name: t.check(pb_utils.get_input_tensor_by_name(request, t.name).as_numpy()) for t in inputs}
        if len({len(array) for array in feed.values()}) > 1:
            raise UserError("the tensors of a request must have the same batch size")
        self._check(request, feed)
        return feed

    def _check(self, request: Any, feed: HostArrays) -> None:
        """UserError for what no signature tells."""
        sound = pb_utils.get_input_tensor_by_name(request, "AUDIO")
        if sound is not None and "AUDIO" not in feed:  # a client need not be ours, which looks at it too
            check_sound(sound.as_numpy())

    def _run(self, feeds: list[HostArrays]) -> list[HostArrays]:
        if len(feeds) == 1:  # the usual case with one client: nothing is copied
            return [self.engine(feeds[0])]
        merged = {name: self._merged([feed[name] for feed in feeds]) for name in feeds[0]}
        outputs = self.engine(merged)
        ends = accumulate((len(next(iter(feed.values()))) for feed in feeds), initial=0)
        return [{name: array[a:b] for name, array in outputs.items()} for a, b in pairwise(ends)]

    def _merged(self, arrays: list[np.ndarray]) -> np.ndarray:
        shape = (sum(map(len, arrays)), *arrays[0].shape[1:])
        return np.concatenate(arrays, out=self.allocate(shape, arrays[0].dtype))
