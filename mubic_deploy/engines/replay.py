"""CUDA graphs around PyTorch code: a batch size's kernels as one launch."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mubic_deploy.engines.memory import is_short

Run = Callable[..., Sequence[Tensor]]
WARM_UPS = 3  # before a capture: what is set up lazily must not be captured
PART = 2**20  # elements of the host's that go up at once: while they do, the next are brought into pinned memory


class Given(NamedTuple):
    """What was copied to an input's place last, as long as it lives."""

    tensor: weakref.ref[Tensor]
    version: int


class Uploads:
    """The ways of inputs from the host, told apart by their index: each through pinned memory of its own, on a stream
    beside whatever the GPU is doing.

    One thread brings them there: PyTorch's others would have to be woken, which took 0.3 ms for the noise of one clip
    on a host of 16 cores, and then keep cores busy for a while."""

    def __init__(self) -> None:
        self._pinned: dict[int, Tensor] = {}  # for the largest batch so far
        self._done: dict[int, torch.cuda.Event] = {}

    @functools.cached_property
    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream()

    def __call__(self, index: int, x: Tensor, place: Tensor, free: torch.cuda.Event) -> torch.cuda.Event:
        """Copies x, on the host and contiguous, to a place on the GPU once that is free: the event that it is there.

        The host waits for nothing but the upload before of that index, which reads the same pinned memory. What is
        pinned itself is read where it is."""
        done = self._done.setdefault(index, torch.cuda.Event())
        there = is_pinned(x)
        if not there:
            done.synchronize()
        pinned_part = None if there else self._place_on_host(index, x)
        with torch.cuda.stream(self._stream):
            free.wait()
            if pinned_part is None:
                place.copy_(x, non_blocking=True)
            else:
                whole = (x, pinned_part, place)
                parts = zip(*map(split, whole), strict=True) if place.is_contiguous() else [whole]
                for source, staged, part in parts:
                    np.copyto(staged.numpy(), source.numpy())
                    part.copy_(staged, non_blocking=True)
            done.record()
        return done

    def _place_on_host(self, index: int, x: Tensor) -> Tensor | None:
        """Pinned memory for x; None where a machine has no more of that, and the driver finds some of its own."""
        if index not in self._pinned or len(self._pinned[index]) < len(x):
            try:
                self._pinned[index] = pinned(x)
            except RuntimeError as error:
                if not is_short(error):
                    raise
                return None
        return self._pinned[index][: len(x)]


class Places:
    """Where graphs of one batch size read their inputs."""

    def __init__(self, inputs: Sequence[Tensor], device: torch.device | None, uploads: Uploads) -> None:
        self.uploads = uploads
        # no inference tensors: they do not count their changes, and another graph's inputs these may be
        with torch.inference_mode(False), torch.no_grad():
            self.tensors = [torch.empty_like(x, device=device).copy_(x) for x in inputs]
        self._given: list[Given | None] = [None] * len(inputs)  # what was copied to each last

    def fill(self, index: int, x: Tensor, free: torch.cuda.Event) -> None:
        """Brings an input to its place, unless it is the very tensor of the call before and was not changed since, as
        the conditioning is in a loop. The current stream copies it, or waits until it is up. free: that the graphs have
        read the place."""
        place = self.tensors[index]
        if x.device != place.device:
            self._given[index] = None
            self.uploads(index, x, place, free).wait()
        elif not same(self._given[index], x):
            place.copy_(x, non_blocking=True)
            self._given[index] = noted(x)


class Captured(NamedTuple):
    """A batch size's graph, and where it reads and writes. replayed: the event that the last replay is done."""

    graph: torch.cuda.CUDAGraph
    places: Places
    outputs: Sequence[Tensor]
    replayed: torch.cuda.Event


class Replayed:
    """`run` over tensors on a GPU, captured for each batch size at its first call and replayed from then on.

    What it returns is valid until the next call of that batch size: the memory is the graph's own and is written again.
    Inputs are copied to places of the graph's own, but not the tensor of the call before (`Places.fill`). So every call
    returns tensors of its own, over the same memory: one that was replayed is another tensor to whoever gets it next,
    itself included.

    Inputs may be on the host as well, contiguous: see `Uploads`. They may be changed once the call returned, but in
    pinned memory only when what was computed of them has been fetched.

    device: where `run` runs; by default, where the inputs of a batch size's first call are"""

    def __init__(self, run: Run, device: torch.device | None = None) -> None:
        self.run, self.device = run, device
        self._uploads = Uploads()
        self._captured: dict[int, Captured] = {}

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        batch = len(inputs[0])
        if batch not in self._captured:
            places = Places(inputs, self.device, self._uploads)
            graph, outputs = captured(self.run, places.tensors, torch.cuda.Stream())
            self._captured[batch] = Captured(graph, places, outputs, recorded())
        now = self._captured[batch]
        for index, x in enumerate(inputs):
            now.places.fill(index, x, now.replayed)
        now.graph.replay()
        now.replayed.record()
        return [x.detach() for x in now.outputs]


def captured(
    run: Run, places: Sequence[Tensor], stream: torch.cuda.Stream, pool: Any = None
) -> tuple[torch.cuda.CUDAGraph, Sequence[Tensor]]:
    """The graph of `run` over `places`, and the outputs that it writes.

    It is warmed up and captured on one stream: what cuBLAS sets up for a stream is of no other graph then. pool: of
    memory, as `graph_pool_handle` gives one, which graphs may share that never run at the same time."""
    with torch.inference_mode(False), torch.no_grad():
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                run(*places)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # what other threads do meanwhile, on streams of theirs, is not in the way
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            outputs = run(*places)
    return graph, outputs


def recorded() -> torch.cuda.Event:
    """An event at the end of what the current stream has to do. Of a graph that was not replayed yet it says that the
    warm-ups are done."""
    event = torch.cuda.Event()
    event.record()
    return event


def pinned(x: Tensor) -> Tensor:
    """Memory on the host for a tensor like this one, which a GPU reads and writes by itself."""
    with torch.inference_mode(False):  # it is written in other modes too
        return torch.empty_like(x, device="cpu", pin_memory=True)


def is_pinned(x: Tensor) -> bool:
    """Whether a GPU copies from a host tensor by itself."""
    return x.is_pinned()


def split(x: Tensor) -> Iterable[Tensor]:
    """PART elements of a contiguous tensor each."""
    return x.view(-1).split(PART)


def noted(x: Tensor) -> Given | None:
    """None for a tensor that does not count its changes, as those made in inference mode."""
    return None if x.is_inference() else Given(weakref.ref(x), x._version)


def same(given: Given | None, x: Tensor) -> bool:
    """Whether `x` was given last, with the same values."""
    return given is not None and given.tensor() is x and given.version == x._version
