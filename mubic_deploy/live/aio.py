"""`StreamClient` for asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, TypeVar

import av
import numpy as np

from mubic_deploy.live.client import StreamClient
from mubic_deploy.live.report import LiveMap, Report

T = TypeVar("T")
_TICK = 0.2  # s that a thread waits for a map, so that one that nobody waits for any more ends


class AsyncStreamClient:
    """A `StreamClient` whose calls wait without holding up the event loop:

        async with AsyncStreamClient("127.0.0.1:8001") as client:
            await client.frame(image, time_s)     # in one task
            await client.finish()
            async for found in client:            # in another one
                ...

    Options and errors are `StreamClient`'s; `on_gap` is called on another thread."""

    def __init__(self, url: str, **options: Any) -> None:
        self._url, self._options = url, options
        self._client: StreamClient | None = None
        self._closed = False
        self._reading = asyncio.Lock()
        self._next: asyncio.Task[LiveMap | None] | None = None  # what the reader waits for

    async def __aenter__(self) -> AsyncStreamClient:
        # threads of its own for what waits: those of asyncio are few, and all clients that wait would take them all
        self._feeder, self._reader = ThreadPoolExecutor(1, "mubic-feed"), ThreadPoolExecutor(1, "mubic-read")
        connecting = self._feeder.submit(StreamClient, self._url, **self._options)
        try:
            self._client = await asyncio.wrap_future(connecting)
        except BaseException:  # a thread cannot be cancelled, and nobody has what it makes
            threading.Thread(target=_close, args=(connecting,), name="mubic-close").start()
            self._shut()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await asyncio.to_thread(self.client.close)
        finally:
            self._closed = True
            self._shut()

    def _shut(self) -> None:
        for threads in (self._feeder, self._reader):
            threads.shutdown(wait=False)  # they end by themselves, since nothing waits any more

    async def _on(self, threads: ThreadPoolExecutor, call: Callable[..., T], *given: object) -> T:
        if self._closed:
            return call(*given)
        return await asyncio.get_running_loop().run_in_executor(threads, call, *given)

    @property
    def client(self) -> StreamClient:
        """The client behind it, for what does not wait."""
        if self._client is None:
            raise RuntimeError("use it with `async with`: the client is connected there")
        return self._client

    async def frame(
        self, image: np.ndarray | av.VideoFrame, time_s: float, display: tuple[int, int] | None = None
    ) -> int:
        """See `StreamClient.frame`."""
        return await self._on(self._feeder, self.client.frame, image, time_s, display)

    async def sound(self, samples: np.ndarray, time_s: float) -> None:
        """See `StreamClient.sound`."""
        await asyncio.to_thread(self.client.sound, samples, time_s)

    async def end_sound(self) -> None:
        """See `StreamClient.end_sound`."""
        await asyncio.to_thread(self.client.end_sound)

    async def finish(self) -> None:
        """See `StreamClient.finish`."""
        await asyncio.to_thread(self.client.finish)

    def report(self) -> Report:
        """See `StreamClient.report`."""
        return self.client.report()

    def __aiter__(self) -> AsyncStreamClient:
        return self

    async def __anext__(self) -> LiveMap:
        """The next map. May be cancelled: the map that it waited for is the next call's."""
        async with self._reading:
            while self._next is not None or not self.client.through:
                if self._next is None:
                    self._next = asyncio.create_task(self._on(self._reader, self.client.poll, _TICK))
                try:
                    found = await asyncio.shield(self._next)
                except Exception:
                    self._next = None
                    raise
                self._next = None
                if found is not None:
                    return found
        raise StopAsyncIteration


def _close(connecting: Future[StreamClient]) -> None:
    """When it is there, if it comes."""
    with contextlib.suppress(CancelledError):
        if connecting.exception() is None:
            connecting.result().close()
