"""Triton's Python backend: live streams. Keeps each stream's window of frames and sound, and calls the model `mubic`
for the map of every window that became complete (BLS).

One process, one event loop: requests are taken in the order in which they come, each wholly before the next, and while
a stream's map is made those of the others go on, so that the graphs' batchers can merge them."""

import asyncio
import contextlib
import traceback
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # a module of the server

from mubic_deploy import graphs
from mubic_deploy.errors import UserError
from mubic_deploy.live.settings import StreamSettings
from mubic_deploy.live.streams import Stream, Streams
from mubic_deploy.live.timeline import Window
from mubic_deploy.triton import parameters

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    """See `graphs.stream`."""

    def initialize(self, args: dict[str, str]) -> None:
        values = parameters.from_model_config(args["model_config"])
        self.config = parameters.config_from_string(values[parameters.CONFIG])
        self.names = graphs.stream(self.config).input_names
        settings = StreamSettings(int(values[parameters.MAX_STREAMS]), parameters.idle_s(args["model_config"]))
        self.streams = Streams(self.config, settings)
        self.pause_s = settings.idle_s / 4
        self.cleaner: asyncio.Task | None = None

    async def execute(self, requests: list[Any]) -> None:
        if self.cleaner is None:  # the event loop is there now
            self.cleaner = asyncio.create_task(self.clean())
        await asyncio.gather(*(self.respond(request) for request in requests))

    async def respond(self, request: Any) -> None:
        """Takes a request into its stream before anything is waited for, so that the order stays; then answers."""
        sender, error = request.get_response_sender(), None
        try:
            stream, windows = self.streams.push(
                request.correlation_id(),
                bool(request.flags() & pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START),
                bool(request.flags() & pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_END),
                self.arrays(request),
            )
            await self.answer(stream, windows, sender)
        except UserError as problem:
            error = str(problem)
        except Exception as problem:  # without an answer the client would wait for ever
            error = f"{type(problem).__name__}: {problem}"
            pb_utils.Logger.log_error(f"{graphs.STREAM}: {traceback.format_exc()}")
        if error is None:
            sender.send(flags=FINAL)
        else:
            sender.send(pb_utils.InferenceResponse(error=pb_utils.TritonError(error)), flags=FINAL)

    def arrays(self, request: Any) -> dict[str, np.ndarray]:
        tensors = {name: pb_utils.get_input_tensor_by_name(request, name) for name in self.names}
        return {name: tensor.as_numpy() for name, tensor in tensors.items() if tensor is not None}

    async def answer(self, stream: Stream, windows: list[Window], sender: Any) -> None:
        """A response a window, a stream's one after the other. UserError if that model fails."""
        waiting = iter(windows)
        try:
            async with stream.turn:
                for window in waiting:
                    try:
                        if sender.is_cancelled():  # the client is gone
                            return
                        sender.send(await self.map(stream, window))
                    finally:
                        stream.waiting -= 1
        finally:
            stream.waiting -= sum(1 for _ in waiting)

    async def map(self, stream: Stream, window: Window) -> Any:
        wanted = graphs.pipeline(self.config)
        arrays = {
            "VIDEO": window.video[None],
            "AUDIO": window.audio[None],
            "SEED": np.array([[stream.seed]], np.int64),
            "STEPS": np.array([[stream.steps]], np.int32),
        }
        request = pb_utils.InferenceRequest(
            model_name=wanted.name,
            requested_output_names=wanted.output_names,
            inputs=[pb_utils.Tensor(name, arrays[name]) for name in wanted.input_names],
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
        )
        response = await request.async_exec()
        if response.has_error():
            raise UserError(f"{wanted.name}: {response.error().message()}")
        outputs = [pb_utils.get_output_tensor_by_name(response, name) for name in wanted.output_names]
        tensors = [pb_utils.Tensor(tensor.name(), tensor.as_numpy()[0]) for tensor in outputs]
        of_window = {
            "MAP_INDEX": np.array([window.frame_index], np.int64),
            "MAP_TIME": np.array([window.time_s], np.float64),
            "HEARD": np.array([window.heard], np.float32),
        }
        return pb_utils.InferenceResponse([*tensors, *(pb_utils.Tensor(name, a) for name, a in of_window.items())])

    async def clean(self) -> None:
        """Frees what idle streams hold, though no request comes."""
        while True:
            await asyncio.sleep(self.pause_s)
            self.streams.expire()

    def finalize(self) -> None:
        if self.cleaner is not None:
            with contextlib.suppress(RuntimeError):  # its loop may have ended already
                self.cleaner.get_loop().call_soon_threadsafe(self.cleaner.cancel)
