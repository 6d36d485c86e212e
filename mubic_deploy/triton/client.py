"""A client of the models `mubic` and `mubic_fixed` on a Triton server, over gRPC, and through shared memory where the
server is on the same machine."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from mubic_deploy import graphs
from mubic_deploy.config import Config
from mubic_deploy.engines import HostArrays
from mubic_deploy.errors import UserError, check_seconds
from mubic_deploy.pipeline import request
from mubic_deploy.triton import parameters
from mubic_deploy.triton.shared_memory import UNFINISHED, NotSharedError, Region, SharedMemory, bytes_of

SCHEME = "triton://"
REMEDIES = {  # where the server does not serve one of our models
    graphs.ENSEMBLE: "start it with mubic-deploy serve",
    graphs.FIXED_ENSEMBLE: "export with --fixed-steps N and serve these graphs, or leave out the model's name",
}
MODELS = tuple(REMEDIES)
TIMEOUT_S = 60.0  # for a request
_REFUSED = "Request timeout expired"  # Triton's words for a request that waited too long in a queue
_UNWRITTEN = -1  # no map's value, and no number of steps
_CONNECT_TIMEOUT = 10.0  # s, to learn what is served

Result = tuple[np.ndarray, np.ndarray]  # saliency float32 [B, h, w], steps used int32 [B, 1]


def destination(url: str) -> tuple[str, str]:
    """ "HOST:PORT" and the model's name of `triton://HOST:PORT`, `triton://HOST:PORT/MODEL`, or the same without the
    scheme. UserError if it is none of these, or no model of ours."""
    place, slash, model = url.removeprefix(SCHEME).partition("/")
    host, _, port = place.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"{url!r} is no address of a Triton server: use [triton://]HOST:PORT, with the port of gRPC")
    if slash and model not in MODELS:
        raise UserError(f"{url!r} names no model of this package: use {' or '.join(MODELS)} after the slash, or none")
    return place, model or graphs.ENSEMBLE


def channel(address: str) -> list[tuple[str, int]]:
    """gRPC's options of a connection to "HOST:PORT": messages of any size, and to this machine no proxy, which gRPC
    would ask (`http_proxy`) for 127.0.0.1 too."""
    options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    return [*options, ("grpc.enable_http_proxy", 0)] if _is_here(address) else options


def _is_here(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class TritonPredictor:
    """A `Predictor` (see `pipeline`) that asks the server at `url`: triton://HOST:PORT or HOST:PORT, gRPC's port; with
    /mubic_fixed behind it, the ensemble whose number of steps is fixed.

    timeout: seconds above 0 for a request, waiting in the server's queues included. The configuration comes from the
    server.
    shared_memory: whether clips and maps lie in memory that both map (/dev/shm), or go through gRPC; None: where the
    server is on this machine and can (`transport` says which). A request for which no room is left there, or whose
    server was started again, goes through gRPC.
    UserError when made: the server does not answer, serves no such model of this version, or cannot share memory and
    must. Usable from several threads; close it, or use `with`."""

    config: Config
    source: dict[str, Any]  # of the weights, as `checkpoint.Source.to_json` says it

    def __init__(self, url: str, timeout: float = TIMEOUT_S, shared_memory: bool | None = None) -> None:
        self.address, self.model = destination(url)
        self.timeout = check_seconds("timeout", timeout)
        self._memory: SharedMemory | None = None
        self._client = triton.InferenceServerClient(self.address, channel_args=channel(self.address))
        connecting = min(timeout, _CONNECT_TIMEOUT)
        try:
            answer = self._client.get_model_config(self.model, client_timeout=connecting).config
            if not {parameters.CONFIG, parameters.SOURCE} <= set(answer.parameters):
                raise UserError(
                    f"the model {self.model} on {self.address} is not this package's: start it with mubic-deploy serve"
                )
            self.config = parameters.config_from_string(answer.parameters[parameters.CONFIG].string_value)
            self.source = json.loads(answer.parameters[parameters.SOURCE].string_value)
        except InferenceServerException as error:
            self.close()
            raise self._explained(error, connecting) from None
        except UserError:
            self.close()
            raise
        self.max_batch = answer.max_batch_size
        fixed = parameters.FIXED_STEPS in answer.parameters
        self.fixed_steps = int(answer.parameters[parameters.FIXED_STEPS].string_value) if fixed else None
        self.default_steps = self.fixed_steps or self.config.default_steps
        self.signature = graphs.fixed_pipeline(self.config) if fixed else graphs.pipeline(self.config)
        if shared_memory or (shared_memory is None and _is_here(self.address)):
            self._map(required=bool(shared_memory))

    def __enter__(self) -> TritonPredictor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._memory is not None:
            self._memory.close()
        self._client.close()

    def _map(self, required: bool) -> None:
        try:
            self._memory = SharedMemory(self._client, self._bytes(1))
        except NotSharedError as reason:
            if required:
                self.close()
                raise UserError(
                    f"the Triton server at {self.address} shares no memory with this process ({reason}): leave "
                    f"shared_memory out"
                ) from None

    @property
    def transport(self) -> str:
        """How clips and maps travel: "shared memory" or "gRPC"."""
        return "gRPC" if self._memory is None else "shared memory"

    def require_streams(self) -> None:
        """UserError unless the server takes live streams."""
        try:
            if self._client.is_model_ready(graphs.STREAM, client_timeout=_CONNECT_TIMEOUT):
                return
        except InferenceServerException as error:
            raise self._explained(error, _CONNECT_TIMEOUT) from None
        raise UserError(
            f"the Triton server at {self.address} takes no live streams: write its model repository again with this "
            f"version, it has no model {graphs.STREAM}"
        )

    def predict(
        self, video: np.ndarray, audio: np.ndarray, seed: np.ndarray | int = 0, steps: np.ndarray | int | None = None
    ) -> Result:
        """See `Pipeline.predict`. A batch that is larger than the server takes is sent in parts. UserError also for
        a server that is gone, too slow or answers with an error, and for other steps than the fixed ones."""
        arrays = self._request(video, audio, seed, steps)
        starts = range(0, len(video), self.max_batch)
        parts = [{name: array[i : i + self.max_batch] for name, array in arrays.items()} for i in starts]
        results = [self._submit(part).result() for part in parts]  # at once the last would wait for the timeout
        saliency, used = zip(*results, strict=True)
        return np.concatenate(saliency), np.concatenate(used)

    def predict_async(
        self, video: np.ndarray, audio: np.ndarray, seed: np.ndarray | int = 0, steps: np.ndarray | int | None = None
    ) -> Future[Result]:
        """As `predict`, without waiting, for at most `max_batch` clips. What the server answers comes with the
        future, as a result or a UserError; wrong arrays, or more clips, raise UserError at once."""
        arrays = self._request(video, audio, seed, steps)
        if len(video) > self.max_batch:
            raise UserError(
                f"{len(video)} clips at once are more than {self.address} takes: use predict, or send "
                f"{self.max_batch} at most"
            )
        return self._submit(arrays)

    def _request(
        self, video: np.ndarray, audio: np.ndarray, seed: np.ndarray | int, steps: np.ndarray | int | None
    ) -> HostArrays:
        arrays = request(self.config, video, audio, seed, self.default_steps if steps is None else steps)
        if self.fixed_steps is not None and (arrays["STEPS"] != self.fixed_steps).any():
            raise UserError(
                f"{self.model} on {self.address} takes {self.fixed_steps} steps, no others: "
                f"leave the steps out, or ask {graphs.ENSEMBLE}"
            )
        return arrays

    def _submit(self, arrays: HostArrays) -> Future[Result]:
        future: Future[Result] = Future()
        future.set_running_or_notify_cancel()  # what is on its way cannot be cancelled
        memory, region = self._memory, None
        if memory is not None:
            region = memory.take(self._bytes(len(arrays["VIDEO"])), self.timeout)
        if memory is None or region is None:
            self._send(arrays, future)
        else:
            self._share(arrays, future, memory, region)
        return future

    def _send(self, arrays: HostArrays, future: Future[Result]) -> None:
        """Everything goes through gRPC."""

        def done(result: triton.InferResult, error: InferenceServerException | None) -> None:
            if error is not None:
                future.set_exception(self._explained(error))
            else:
                _settle(future, self._found(lambda: self._result(arrays, result.as_numpy)))

        inputs, outputs = self._tensors(arrays)
        for tensor in inputs:
            tensor.set_data_from_numpy(arrays[tensor.name()])
        self._infer(inputs, outputs, done)

    def _share(self, arrays: HostArrays, future: Future[Result], memory: SharedMemory, region: Region) -> None:
        """Tensors lie in the region, and only their places go through gRPC."""
        places = region.tensors(self._all_tensors, len(arrays["VIDEO"]))

        def done(result: triton.InferResult, error: InferenceServerException | None) -> None:
            if error is None:

                def read(name: str) -> np.ndarray:
                    answer, array = result.get_output(name), places[name].array
                    if answer is None or tuple(answer.shape) != array.shape or (array == _UNWRITTEN).all():
                        raise ValueError(f"{name} is empty")
                    return array.copy()

                found = self._found(lambda: self._result(arrays, read))
                memory.give(region)  # before whoever waits asks for the next
                _settle(future, found)
            elif "shared memory" in (error.message() or "").lower():  # the server was started again, or has no room
                memory.abandon(region)
                memory.abandon_all()
                try:
                    self._send(arrays, future)
                except Exception as reason:  # also gRPC's own, if this client was closed meanwhile
                    future.set_exception(reason)
            else:
                (memory.abandon if error.status() in UNFINISHED else memory.give)(region)
                future.set_exception(self._explained(error))

        inputs, outputs = self._tensors(arrays)
        for tensor in inputs:
            np.copyto(places[tensor.name()].array, arrays[tensor.name()])
        for tensor in outputs:  # else what an earlier request left there could be taken for an answer
            places[tensor.name()].array.fill(_UNWRITTEN)
        for tensor in (*inputs, *outputs):
            place = places[tensor.name()]
            tensor.set_shared_memory(region.name, place.array.nbytes, place.offset)
        self._infer(inputs, outputs, done)

    def _found(self, read: Callable[[], Result]) -> Result | UserError:
        """An answer, or what is wrong with it, as with an empty one: an exception of this thread nobody would hear."""
        try:
            return read()
        except Exception as error:
            reason = f"answered with something else than maps ({error})"
            return UserError(f"the Triton server at {self.address} {reason}: see its log")

    @property
    def _all_tensors(self) -> tuple[graphs.Tensor, ...]:
        return self.signature.inputs + self.signature.outputs

    def _bytes(self, clips: int) -> int:
        return bytes_of(self._all_tensors, clips)

    def _tensors(self, arrays: HostArrays) -> tuple[list[triton.InferInput], list[triton.InferRequestedOutput]]:
        inputs = []
        for name in self.signature.input_names:
            array = arrays[name]
            inputs.append(triton.InferInput(name, array.shape, np_to_triton_dtype(array.dtype)))
        return inputs, [triton.InferRequestedOutput(name) for name in self.signature.output_names]

    def _result(self, arrays: HostArrays, read: Callable[[str], np.ndarray]) -> Result:
        """read: the output of this name."""
        saliency = read("SALIENCY")
        used = read("STEPS_USED") if self.fixed_steps is None else arrays["STEPS"]
        for tensor, array in (("SALIENCY", saliency), ("STEPS_USED", used)):
            if array is None or len(array) != len(arrays["VIDEO"]):
                raise ValueError(f"{tensor} is empty")
        return saliency, used

    def _infer(
        self,
        inputs: list[triton.InferInput],
        outputs: list[triton.InferRequestedOutput],
        done: Callable[[triton.InferResult, InferenceServerException | None], None],
    ) -> None:
        try:
            self._client.async_infer(self.model, inputs, done, outputs=outputs, client_timeout=self.timeout)
        except InferenceServerException as error:
            raise self._explained(error) from None

    def _explained(self, error: InferenceServerException, connecting: float | None = None) -> UserError:
        """The error in one line, with the address and what to do. connecting: the seconds that were allowed, of what is
        asked before any clip."""
        status = (error.status() or "").removeprefix("StatusCode.")
        message = " ".join((error.message() or "").split())
        if _REFUSED in message:
            return UserError(
                f"the Triton server at {self.address} is overloaded: the request waited there for longer than its "
                f"--queue-timeout, so send less at once, or try again later"
            )
        if status == "UNAVAILABLE":
            return UserError(
                f"no Triton server answers at {self.address}: start one with mubic-deploy serve, or check the address"
            )
        if status == "DEADLINE_EXCEEDED" and connecting is not None:
            more = ", or allow more (timeout, --timeout)" if connecting == self.timeout else ""
            return UserError(
                f"{self.address} did not answer as a Triton server within {connecting:g} s: check the address, and "
                f"that it is gRPC's port{more}"
            )
        if status == "DEADLINE_EXCEEDED":
            return UserError(
                f"the Triton server at {self.address} did not answer within {self.timeout:g} s: "
                f"allow more (timeout, --timeout) or send less at once"
            )
        if status == "NOT_FOUND" or "unknown model" in message:
            return UserError(
                f"the Triton server at {self.address} serves no model {self.model}: {REMEDIES[self.model]}"
            )
        return UserError(f"the Triton server at {self.address} answered with an error: {message}")


def _settle(future: Future[Result], found: Result | UserError) -> None:
    if isinstance(found, UserError):
        future.set_exception(found)
    else:
        future.set_result(found)
