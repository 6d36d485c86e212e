"""CUDA graphs around PyTorch code: a batch size's kernels as one launch."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Run = Callable[..., Sequence[Tensor]]
WARM_UPS = 3  # before a capture: what is set up lazily must not be captured
PART = 2**20  # elements of the host's that go up at once: while they do, the next are brought into pinned memory


class Given(NamedTuple):
    """What was copied to an input's place last, as long as it lives."""

    tensor: weakref.ref[Tensor]
    version: int


class Captured(NamedTuple):
    """A batch size's graph, and where it reads and writes. replayed: the event that the last replay is done."""

    graph: torch.cuda.CUDAGraph
    places: list[Tensor]
    outputs: Sequence[Tensor]
    given: list[Given | None]
    replayed: torch.cuda.Event


class Replayed:
    """`run` over tensors on a GPU, captured for each batch size at its first call and replayed from then on.

    What it returns is valid until the next call of that batch size: the memory is the graph's own and is written again.
    Inputs are copied to the graph's places, but for one that is the very tensor of the call before and was not changed
    since, as the conditioning is in a loop. So every call returns tensors of its own, over the same memory: one that
    was replayed is another tensor to whoever gets it next, itself included.

    Inputs may be on the host as well, contiguous: they go through pinned memory on a stream of their own, beside
    whatever the GPU is doing, and may be changed once the call returned.

    device: where `run` runs; by default, where the inputs of a batch size's first call are"""

    def __init__(self, run: Run, device: torch.device | None = None) -> None:
        self.run, self.device = run, device
        self._captured: dict[int, Captured] = {}
        self._pinned: dict[int, Tensor] = {}  # by the input's index, for the largest batch so far

    @functools.cached_property
    def _copies(self) -> torch.cuda.Stream:
        return torch.cuda.Stream()

    @functools.cached_property
    def _uploaded(self) -> torch.cuda.Event:
        """That the last copies from pinned memory are done."""
        return torch.cuda.Event()

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        batch = len(inputs[0])
        if batch not in self._captured:
            self._captured[batch] = self._capture(inputs)
        captured = self._captured[batch]
        from_host = {}
        for index, (place, x) in enumerate(zip(captured.places, inputs, strict=True)):
            if x.device != place.device:
                from_host[index] = x
                captured.given[index] = None
            elif not same(captured.given[index], x):
                place.copy_(x, non_blocking=True)
                captured.given[index] = noted(x)
        if from_host:
            self._upload(captured, from_host)
        captured.graph.replay()
        captured.replayed.record()
        return [x.detach() for x in captured.outputs]

    def _upload(self, captured: Captured, inputs: dict[int, Tensor]) -> None:
        """Host tensors to their places, by index. The current stream waits for it, the host only for the upload before,
        which reads the same pinned memory."""
        self._uploaded.synchronize()
        with torch.cuda.stream(self._copies):
            captured.replayed.wait()
            for index, x in inputs.items():
                if index not in self._pinned or len(self._pinned[index]) < len(x):
                    self._pinned[index] = pinned(x)
                whole = (x, self._pinned[index][: len(x)], captured.places[index])
                parts = zip(*map(split, whole), strict=True) if whole[-1].is_contiguous() else [whole]
                for source, staged, place in parts:
                    staged.copy_(source)
                    place.copy_(staged, non_blocking=True)
            self._uploaded.record()
        self._uploaded.wait()

    def _capture(self, inputs: Sequence[Tensor]) -> Captured:
        # no inference tensors: they do not count their changes, and another graph's inputs these may be
        with torch.inference_mode(False), torch.no_grad():
            places = [torch.empty_like(x, device=self.device).copy_(x) for x in inputs]
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    self.run(*places)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                outputs = self.run(*places)
        replayed = torch.cuda.Event()
        replayed.record()  # or the first upload would not wait for the warm-ups
        return Captured(graph, places, outputs, [None] * len(places), replayed)


def pinned(x: Tensor) -> Tensor:
    """Memory like a host tensor's that a GPU copies from by itself."""
    with torch.inference_mode(False):  # it is written in other modes too
        return torch.empty_like(x, pin_memory=True)


def split(x: Tensor) -> Iterable[Tensor]:
    """PART elements of a contiguous tensor each."""
    return x.view(-1).split(PART)


def noted(x: Tensor) -> Given | None:
    """None for a tensor that does not count its changes, as those made in inference mode."""
    return None if x.is_inference() else Given(weakref.ref(x), x._version)


def same(given: Given | None, x: Tensor) -> bool:
    """Whether `x` was given last, with the same values."""
    return given is not None and given.tensor() is x and given.version == x._version
