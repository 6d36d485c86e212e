"""One sequence of the model `mubic_stream` over one gRPC stream."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from mubic_deploy import graphs
from mubic_deploy.config import SAMPLE_RATE
from mubic_deploy.live.backlog import Request
from mubic_deploy.live.packets import Encoder
from mubic_deploy.live.settings import RAW
from mubic_deploy.live.streams import FULL, UNKNOWN
from mubic_deploy.triton.client import channel

# of a sequence that the server does not know: Triton's own words, and those of the model
_FORGOTTEN = ("must specify the START flag", UNKNOWN)
# what a new sequence cures, perhaps after a while; the first line is Triton's own
_PASSING = (
    "is not found", "is not ready", "unavailable", "no available versions", "Server is stopping", "is not healthy",
    FULL, f"{graphs.ENSEMBLE}:", *_FORGOTTEN,
)  # fmt: skip
ALIVE_S = 2.0  # in which a server says that it lives, however much it has to do
# no memory of a server that was gone: gRPC would try it less and less often
_FORGETFUL = ("grpc.use_local_subchannel_pool", 1)


@dataclass(frozen=True)
class Settings:
    """Of a stream: what `graphs.stream` says of its start."""

    stride: int
    seed: int
    steps: int
    encoding: str


@dataclass(frozen=True)
class Answer:
    """What the server sends. `request`: the id of the request that it belongs to, "" for an error.

    final      the request is done
    tensors    of a window's map, by name
    error      what the server says, in one line
    passing    whether a new sequence may cure it
    forgotten  the server does not know the sequence, or not any more"""

    request: str = ""
    final: bool = False
    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    error: str | None = None
    passing: bool = False
    forgotten: bool = False


def arrays(
    request: Request, settings: Settings, encode: Callable[[np.ndarray], bytes] | None = None
) -> dict[str, np.ndarray]:
    """The tensors of a request, by name; see `graphs.stream`. encode: makes packets of the frames."""
    tensors: dict[str, np.ndarray] = {}
    if request.start:
        tensors["STRIDE"] = np.array([settings.stride], np.int32)
        tensors["SEED"] = np.array([settings.seed], np.int64)
        tensors["STEPS"] = np.array([settings.steps], np.int32)
        tensors["ENCODING"] = np.array([settings.encoding.encode()], np.object_)
        tensors["SOUND_RATE"] = np.array([SAMPLE_RATE], np.int32)
    if request.frames:
        if encode is None:
            tensors["FRAMES"] = np.stack(request.frames)
        else:
            tensors["PACKETS"] = np.array([encode(frame) for frame in request.frames], np.object_)
        tensors["FRAME_INDEX"] = np.array(request.indices, np.int64)
        tensors["FRAME_TIME"] = np.array(request.times, np.float64)
    if len(request.sound):
        tensors["SOUND"] = request.sound
        tensors["SOUND_TIME"] = np.array([request.sound_start / SAMPLE_RATE], np.float64)
    if request.sound_end:
        tensors["SOUND_END"] = np.array([True])
    if request.skip:
        tensors["SKIP"] = np.array(request.skip, np.int64)
    return tensors


def lives(address: str) -> bool:
    """Whether a server answers at "HOST:PORT" within ALIVE_S, on a connection of its own."""
    with triton.InferenceServerClient(address, channel_args=[*channel(address), _FORGETFUL]) as client:
        return _lives(client)


def _lives(client: triton.InferenceServerClient) -> bool:
    try:
        return bool(client.is_server_live(client_timeout=ALIVE_S))
    except InferenceServerException:
        return False


class Link:
    """A sequence on a connection of its own. Answers and errors come on a thread of the connection's; everything else
    is for one thread."""

    def __init__(
        self, address: str, settings: Settings, size: tuple[int, int], receive: Callable[[Link, Answer], None]
    ) -> None:
        """Connects in the background: whether there is a server shows with the first request."""
        self._settings = settings
        self._encode = None if settings.encoding == RAW else Encoder(settings.encoding, size)
        self._receive = receive
        self._sequence = secrets.randbelow(2**63 - 1) + 1
        self._count = 1
        self._answers = 0  # requests that are done
        self.bytes = 0  # of tensors that were sent
        self._client = triton.InferenceServerClient(address, channel_args=[*channel(address), _FORGETFUL])
        self._client.start_stream(self._answered)

    @property
    def next_id(self) -> str:
        """Of the request that is sent next."""
        return str(self._count)

    def send(self, request: Request) -> None:
        """InferenceServerException if the connection is broken already."""
        inputs = []
        for name, array in arrays(request, self._settings, self._encode).items():
            inputs.append(triton.InferInput(name, array.shape, np_to_triton_dtype(array.dtype)))
            inputs[-1].set_data_from_numpy(array)
            self.bytes += sum(len(x) for x in array) if array.dtype == np.object_ else array.nbytes
        self._client.async_stream_infer(
            graphs.STREAM,
            inputs,
            request_id=self.next_id,
            sequence_id=self._sequence,
            sequence_start=request.start,
            sequence_end=request.end,
            enable_empty_final_response=True,
        )
        self._count += 1

    def lives(self) -> bool:
        """Whether the server answers within ALIVE_S on this connection, behind all that is on its way there."""
        return _lives(self._client)

    def close(self) -> None:
        """Gives up what is on its way. Where nothing is, the server has ALIVE_S to end the stream: of some streams that
        are cancelled after their last answer Triton (2.51) never lets go, and cannot unload the model then."""
        stream = self._client._stream
        # tritonclient tells the thread that waits for requests only if nothing is cancelled: it would stay for ever
        stream._request_queue.put(None)
        if self._answers == self._count - 1:
            stream._handler.join(ALIVE_S)
        self._client.stop_stream(cancel_requests=True)  # of a stream that has ended there is nothing to cancel
        self._client.close()

    def _answered(self, result: Any, error: InferenceServerException | None) -> None:
        if error is not None:
            text = " ".join((error.message() or "").split())
            # with a status it is the connection that failed, without one the server refused a request
            refused = error.status() is None
            passing = not refused or any(words in text for words in _PASSING)
            forgotten = refused and any(words in text for words in _FORGOTTEN)
            self._answers += refused
            self._receive(self, Answer(error=text, passing=passing, forgotten=forgotten))
            return
        response = result.get_response()
        tensors = {output.name: result.as_numpy(output.name) for output in response.outputs}
        final = response.parameters["triton_final_response"].bool_param
        self._answers += final
        self._receive(self, Answer(response.id, final, tensors))
