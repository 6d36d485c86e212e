"""A double of torch.cuda on the CPU: streams, events, graphs and pinned memory.

A graph is the operations that were called while it was captured, each on its stream; to replay it is to call them again
on the same memory. Inside `Gpu.late` what is put on a stream happens as late as it may, and of streams that do not wait
for each other first the oldest one's or first the newest one's: so results are right only if every wait is there."""

from __future__ import annotations

import contextlib
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mubic_deploy.engines import replay

COPY = torch.ops.aten.copy_.default


class Host(Tensor):
    """A tensor on the host, where the GPU's are on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    device = property(lambda self: torch.device("cpu", 1))


def host(x: Tensor) -> Tensor:
    return x.as_subclass(Host)


@dataclass(eq=False)
class Mark:
    """Where an event was recorded."""

    stream: Stream
    captured: bool
    done: bool = False

    def reach(self) -> None:
        self.done = True


@dataclass(eq=False)
class Item:
    """What a stream does, once `after` is done."""

    do: Callable[[], object]
    after: Mark | None = None

    @property
    def ready(self) -> bool:
        return self.after is None or self.after.done


class Stream:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.work = gpu, deque[Item]()
        gpu.streams.append(self)

    def wait_stream(self, other: Stream) -> None:
        event = Event(self.gpu)
        event.record(other)
        event.wait(self)


class Event:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.mark: Mark | None = None

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or self.gpu.current
        self.mark = Mark(stream, stream in self.gpu.capture)
        self.gpu.put(stream, Item(self.mark.reach))

    def wait(self, stream: Stream | None = None) -> None:
        stream = stream or self.gpu.current
        if self.mark is None:
            return
        if self.mark.captured:
            self.gpu.capture.setdefault(stream, [])
        assert self.mark.captured or stream not in self.gpu.capture, "a capture cannot wait for what is outside of it"
        self.gpu.put(stream, Item(lambda: None, self.mark))

    def synchronize(self) -> None:
        assert not self.gpu.capture, "synchronising inside a capture is an error"
        if self.mark is not None:
            self.gpu.until(self.mark)


class Graph:
    """torch.cuda.CUDAGraph."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.work: dict[Stream, list[Item]] = {}

    def replay(self) -> None:
        self.gpu.put(self.gpu.current, Item(self._run))

    def _run(self) -> None:
        for item in (item for items in self.work.values() for item in items):
            if item.after is not None:
                item.after.done = False
        self.gpu.run(deque(items) for items in self.work.values())


class Recorder(TorchDispatchMode):
    """Captures every operation that is called on a stream of the capture."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self.gpu = gpu
        self.last: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        self.last = [x for x in tree_leaves(out) if isinstance(x, Tensor)]

        def again() -> None:
            for place, x in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs or {})), strict=True):
                if isinstance(place, Tensor) and place.data_ptr() != x.data_ptr():  # no view
                    place.data.copy_(x)  # `data`: a GPU's graph does not count as a change of the tensor

        if self.gpu.current in self.gpu.capture:
            self.gpu.put(self.gpu.current, Item(again))
        return out


class Late(TorchDispatchMode):
    """Puts asynchronous copies on the current stream, and notes it and their source."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        asynchronous = func is COPY and ((kwargs or {}).get("non_blocking") or args[2:] == (True,))
        if not asynchronous or self.gpu.capture:
            return func(*args, **kwargs or {})
        place, x = args[:2]
        self.gpu.copies.append((self.gpu.current, x))
        self.gpu.put(self.gpu.current, Item(lambda: place.data.copy_(x)))
        return place


class Gpu:
    """capture  what was captured so far, by stream; empty outside of a capture
    pinned   all pinned memory
    copies   of asynchronous copies inside `late` the stream and the source
    pools    of memory, of each graph that was captured"""

    def __init__(self) -> None:
        self.streams: list[Stream] = []
        self.current = self.default = Stream(self)
        self.capture: dict[Stream, list[Item]] = {}
        self.pinned: list[Tensor] = []
        self.copies: list[tuple[Stream, Tensor]] = []
        self.pools: list[object] = []
        self.kept: dict[object, list[weakref.ref[Tensor]]] = {}  # by pool, what its graphs computed last
        self._late = self._newest_first = False

    def put(self, stream: Stream, item: Item) -> None:
        if stream in self.capture:
            self.capture[stream].append(item)
            return
        stream.work.append(item)
        if not self._late:
            self.finish()

    def run(self, queues: Iterable[deque[Item]]) -> None:
        queues = list(queues)[:: -1 if self._newest_first else 1]
        while any(queues):
            next(queue for queue in queues if queue and queue[0].ready).popleft().do()

    def until(self, mark: Mark) -> None:
        """Nothing is done that it does not wait for."""
        while not mark.done:
            after = mark.stream.work[0].after
            if after is not None:
                self.until(after)
            mark.stream.work.popleft().do()

    def finish(self) -> None:
        self.run(stream.work for stream in self.streams)

    @contextlib.contextmanager
    def late(self, newest_first: bool) -> Iterator[None]:
        self._late, self._newest_first = True, newest_first
        with Late(self):
            yield
            self.finish()
        self._late = False

    @contextlib.contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    @contextlib.contextmanager
    def graph(self, graph: Graph, pool: object, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        self.finish()
        self.pools.append(pool)
        # else the memory of what was captured there before could be given away
        assert all(x() is not None for x in self.kept.get(pool, [])), "what another graph of the pool made is gone"
        origin = stream
        self.capture = {origin: []}
        with self.on(origin), Recorder(self) as recorder:
            yield
        graph.work, self.capture = self.capture, {}
        if pool is not None:
            self.kept.setdefault(pool, []).extend(weakref.ref(x) for x in recorder.last)
        waited_for = [item.after.reach for item in graph.work[origin] if item.after is not None]
        last = [items[-1].do for stream, items in graph.work.items() if stream is not origin]
        assert all(do in waited_for for do in last), "a stream of the capture was not joined"

    def empty_like(self, x: Tensor, *, device: torch.device | str | None = None, pin_memory: bool = False) -> Tensor:
        assert not (pin_memory and self.capture), "memory cannot be pinned inside a capture"
        assert not pin_memory or str(device) == "cpu", "only the host's memory can be pinned, and x may be on the GPU"
        out = x.new_full(x.shape, 99).as_strided(x.shape, x.stride())
        self.pinned += [out] * pin_memory
        return out


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    gpu = Gpu()
    for name, value in {
        "Stream": lambda: Stream(gpu),
        "Event": lambda: Event(gpu),
        "current_stream": lambda: gpu.current,
        "stream": gpu.on,
        "CUDAGraph": lambda: Graph(gpu),
        "graph": gpu.graph,
        "graph_pool_handle": object,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "empty_like", gpu.empty_like)
    monkeypatch.setattr(replay, "is_pinned", lambda x: any(x.data_ptr() == y.data_ptr() for y in gpu.pinned))
    return gpu
