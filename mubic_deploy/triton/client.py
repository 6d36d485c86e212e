"""A client of the ensemble `mubic` on a Triton server, over gRPC."""

from __future__ import annotations

import json
from concurrent.futures import Future
from types import TracebackType
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from mubic_deploy import graphs
from mubic_deploy.config import Config
from mubic_deploy.engines import Arrays
from mubic_deploy.errors import UserError
from mubic_deploy.pipeline import request
from mubic_deploy.triton import parameters

SCHEME = "triton://"
_CONNECT_TIMEOUT = 10.0  # s, to learn what is served

Result = tuple[np.ndarray, np.ndarray]  # saliency float32 [B, h, w], steps used int32 [B, 1]


def address(url: str) -> str:
    """ "HOST:PORT" of `triton://HOST:PORT` or `HOST:PORT`. UserError if it is neither."""
    host, _, port = url.removeprefix(SCHEME).rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"{url!r} is no address of a Triton server: use triton://HOST:PORT, with the port of gRPC")
    return f"{host}:{port}"


class TritonPredictor:
    """A `Predictor` (see `pipeline`) that asks the server at `url`: triton://HOST:PORT or HOST:PORT, gRPC's port.

    timeout: seconds for a request, waiting in the server's queues included. The configuration comes from the server.
    UserError when made: the server does not answer, or serves no ensemble `mubic` of this version. Usable from several
    threads; close it, or use `with`."""

    config: Config
    source: dict[str, Any]  # of the weights, as `checkpoint.Source.to_json` says it

    def __init__(self, url: str, timeout: float = 60.0) -> None:
        self.address = address(url)
        self.timeout = timeout
        self._client = triton.InferenceServerClient(self.address)
        try:
            answer = self._client.get_model_config(
                graphs.ENSEMBLE, client_timeout=min(timeout, _CONNECT_TIMEOUT)
            ).config
            if not {parameters.CONFIG, parameters.SOURCE} <= set(answer.parameters):
                raise UserError(
                    f"the model {graphs.ENSEMBLE} on {self.address} is not this package's: start it with "
                    f"mubic-deploy serve"
                )
            self.config = parameters.config_from_string(answer.parameters[parameters.CONFIG].string_value)
            self.source = json.loads(answer.parameters[parameters.SOURCE].string_value)
        except InferenceServerException as error:
            self.close()
            raise self._explained(error) from None
        except UserError:
            self.close()
            raise
        self.max_batch = answer.max_batch_size

    def __enter__(self) -> TritonPredictor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._client.close()

    def predict(
        self, video: np.ndarray, audio: np.ndarray, seed: np.ndarray | int = 0, steps: np.ndarray | int | None = None
    ) -> Result:
        """See `Pipeline.predict`. A batch that is larger than the server takes is sent in parts. UserError also for
        a server that is gone, too slow or answers with an error."""
        arrays = request(self.config, video, audio, seed, steps)
        starts = range(0, len(video), self.max_batch)
        parts = [{name: array[i : i + self.max_batch] for name, array in arrays.items()} for i in starts]
        results = [self._submit(part).result() for part in parts]  # at once the last would wait for the timeout
        saliency, used = zip(*results, strict=True)
        return np.concatenate(saliency), np.concatenate(used)

    def predict_async(
        self, video: np.ndarray, audio: np.ndarray, seed: np.ndarray | int = 0, steps: np.ndarray | int | None = None
    ) -> Future[Result]:
        """As `predict`, without waiting, for at most `max_batch` clips. What the server answers comes with the
        future, as a result or a UserError; wrong arrays raise UserError at once."""
        return self._submit(request(self.config, video, audio, seed, steps))

    def _submit(self, arrays: Arrays) -> Future[Result]:
        future: Future[Result] = Future()

        def done(result: Any, error: InferenceServerException | None) -> None:
            if error is not None:
                future.set_exception(self._explained(error))
            else:
                future.set_result((result.as_numpy("SALIENCY"), result.as_numpy("STEPS_USED")))

        inputs = []
        for name, array in arrays.items():
            inputs.append(triton.InferInput(name, array.shape, np_to_triton_dtype(array.dtype)))
            inputs[-1].set_data_from_numpy(array)
        outputs = [triton.InferRequestedOutput(t.name) for t in graphs.results(self.config)]
        try:
            self._client.async_infer(graphs.ENSEMBLE, inputs, done, outputs=outputs, client_timeout=self.timeout)
        except InferenceServerException as error:
            raise self._explained(error) from None
        return future

    def _explained(self, error: InferenceServerException) -> UserError:
        """The error in one line, with the address and what to do."""
        status = (error.status() or "").removeprefix("StatusCode.")
        message = " ".join((error.message() or "").split())
        if status == "UNAVAILABLE":
            return UserError(
                f"no Triton server answers at {self.address}: start one with mubic-deploy serve, or check the address"
            )
        if status == "DEADLINE_EXCEEDED":
            return UserError(
                f"the Triton server at {self.address} did not answer within {self.timeout:g} s: "
                f"allow more time or send less at once"
            )
        if status == "NOT_FOUND" or "unknown model" in message:
            return UserError(
                f"the Triton server at {self.address} serves no model {graphs.ENSEMBLE}: start it with "
                f"mubic-deploy serve"
            )
        return UserError(f"the Triton server at {self.address} answered with an error: {message}")
