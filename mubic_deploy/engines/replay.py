"""CUDA graphs around PyTorch code: a batch size's kernels as one launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

Run = Callable[..., Sequence[torch.Tensor]]
WARM_UPS = 3  # before a capture: what is set up lazily must not be captured


class Replayed:
    """`run` over tensors on a GPU, captured for each batch size at its first call and replayed from then on.

    What it returns is valid until the next call of that batch size."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._captured: dict[int, tuple[list[torch.Tensor], torch.cuda.CUDAGraph, Sequence[torch.Tensor]]] = {}

    def __call__(self, *inputs: torch.Tensor) -> Sequence[torch.Tensor]:
        batch = len(inputs[0])
        if batch not in self._captured:
            self._captured[batch] = self._capture(inputs)
        fixed, graph, outputs = self._captured[batch]
        for place, given in zip(fixed, inputs, strict=True):
            place.copy_(given, non_blocking=True)
        graph.replay()
        return outputs

    def _capture(
        self, inputs: Sequence[torch.Tensor]
    ) -> tuple[list[torch.Tensor], torch.cuda.CUDAGraph, Sequence[torch.Tensor]]:
        fixed = [x.to("cuda", copy=True) for x in inputs]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._run(*fixed)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = self._run(*fixed)
        return fixed, graph, outputs
