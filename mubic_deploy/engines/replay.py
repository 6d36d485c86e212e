"""CUDA graphs around PyTorch code: a batch size's kernels as one launch."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Run = Callable[..., Sequence[Tensor]]
WARM_UPS = 3  # before a capture: what is set up lazily must not be captured


class Given(NamedTuple):
    """What was copied to an input's place last, as long as it lives."""

    tensor: weakref.ref[Tensor]
    version: int


class Captured(NamedTuple):
    """A batch size's graph, and where it reads and writes."""

    graph: torch.cuda.CUDAGraph
    places: list[Tensor]
    outputs: Sequence[Tensor]
    given: list[Given | None]


class Replayed:
    """`run` over tensors on a GPU, captured for each batch size at its first call and replayed from then on.

    What it returns is valid until the next call of that batch size: the memory is the graph's own and is written again.
    Inputs are copied to the graph's places, but for one that is the very tensor of the call before and was not changed
    since, as the conditioning is in a loop. So every call returns tensors of its own, over the same memory: one that
    was replayed is another tensor to whoever gets it next, itself included."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._captured: dict[int, Captured] = {}

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        batch = len(inputs[0])
        if batch not in self._captured:
            self._captured[batch] = self._capture(inputs)
        graph, places, outputs, given = self._captured[batch]
        for index, (place, x) in enumerate(zip(places, inputs, strict=True)):
            if not same(given[index], x):
                place.copy_(x, non_blocking=True)
                given[index] = noted(x)
        graph.replay()
        return [x.detach() for x in outputs]

    def _capture(self, inputs: Sequence[Tensor]) -> Captured:
        # no inference tensors: they do not count their changes, and another graph's inputs these may be
        with torch.inference_mode(False), torch.no_grad():
            places = [torch.empty_like(x).copy_(x) for x in inputs]
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    self.run(*places)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                outputs = self.run(*places)
        return Captured(graph, places, outputs, [None] * len(places))


def noted(x: Tensor) -> Given | None:
    """None for a tensor that does not count its changes, as those made in inference mode."""
    return None if x.is_inference() else Given(weakref.ref(x), x._version)


def same(given: Given | None, x: Tensor) -> bool:
    """Whether `x` was given last, with the same values."""
    return given is not None and given.tensor() is x and given.version == x._version
