"""`StreamClient` for asyncio."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any

import av
import numpy as np

from mubic_deploy.live.client import StreamClient
from mubic_deploy.live.report import LiveMap, Report

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

    async def __aenter__(self) -> AsyncStreamClient:
        self._client = await asyncio.to_thread(StreamClient, self._url, **self._options)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.client.close)

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
        return await asyncio.to_thread(self.client.frame, image, time_s, display)

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
        while not self.client.through:
            found = await asyncio.to_thread(self.client.poll, _TICK)
            if found is not None:
                return found
        raise StopAsyncIteration
