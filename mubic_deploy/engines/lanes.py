"""Parts of a computation on a GPU beside each other, each a CUDA graph of its own.

A small batch leaves a GPU half empty: a part that is not waited for runs in the other half. And the first part's graph
is launched as soon as its inputs are there, while the host goes on to launch the others: of one graph with branches
every kernel would have to be launched first."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mubic_deploy.engines.replay import Places, Run, Uploads, captured, recorded
from mubic_deploy.graphs import Signature


class Part(NamedTuple):
    """Something that computes a signature's outputs from its inputs."""

    signature: Signature
    run: Run


class Step(NamedTuple):
    """beside: whether it runs on a stream of its own, or after the steps before it that do not."""

    part: Part
    beside: bool = False


def in_turn(parts: Sequence[Part], whole: Signature) -> Run:
    """Parts as one, one after the other: the inputs of `whole` in, its outputs out."""

    def run(*inputs: Tensor) -> Sequence[Tensor]:
        tensors = dict(zip(whole.input_names, inputs, strict=True))
        for signature, part in parts:
            outputs = part(*(tensors[name] for name in signature.input_names))
            tensors |= zip(signature.output_names, outputs, strict=True)
        return [tensors[name] for name in whole.output_names]

    return run


class Placed(NamedTuple):
    """The graphs of a batch size, one a step, where they read and write, and the events that each one's last replay is
    done."""

    graphs: list[torch.cuda.CUDAGraph]
    places: Places
    outputs: list[Tensor]
    done: list[torch.cuda.Event]


class Lanes:
    """Steps over tensors on a GPU: the inputs of `whole` in, its outputs out. As `Replayed`, but for every step a graph
    of its own, and those `beside` on streams of their own. Steps are launched in their order; each takes what the
    earlier ones gave where it lies."""

    def __init__(self, steps: Sequence[Step], whole: Signature, device: torch.device) -> None:
        self.steps, self.whole, self.device = steps, whole, device
        ahead = torch.cuda.Stream()
        self._streams = [torch.cuda.Stream() if step.beside else ahead for step in steps]
        self._uploads = Uploads()
        self._placed: dict[int, Placed] = {}
        # for each step: those before it on other streams whose outputs it takes; the inputs that it alone reads
        self._waits = [[j for j in range(i) if self._waits_for(i, j)] for i in range(len(steps))]
        taken = [step.part.signature.input_names for step in steps]
        self._read = [[i for i, name in enumerate(whole.input_names) if name in names] for names in taken]
        assert sorted(itertools.chain(*self._read)) == list(range(len(whole.input_names)))

    def _waits_for(self, i: int, j: int) -> bool:
        taken, made = self.steps[i].part.signature.input_names, self.steps[j].part.signature.output_names
        return self._streams[i] is not self._streams[j] and not set(taken).isdisjoint(made)

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        batch = len(inputs[0])
        if batch not in self._placed:
            self._placed[batch] = self._place(inputs)
        graphs, places, outputs, done = self._placed[batch]
        main = torch.cuda.current_stream()
        begun = recorded()  # nothing overtakes what came before: it may still read what the steps will write
        for i, step in enumerate(self.steps):
            stream = self._streams[i] if step.beside else main
            if step.beside:
                begun.wait(stream)
            for j in self._waits[i]:
                done[j].wait(stream)
            with torch.cuda.stream(stream):
                for index in self._read[i]:
                    places.fill(index, inputs[index], done[i])
                graphs[i].replay()
            done[i].record(stream)
        for i, step in enumerate(self.steps):
            if step.beside:
                done[i].wait(main)
        return [x.detach() for x in outputs]

    def _place(self, inputs: Sequence[Tensor]) -> Placed:
        places = Places(inputs, self.device, self._uploads)
        tensors = dict(zip(self.whole.input_names, places.tensors, strict=True))
        graphs, ahead = [], torch.cuda.graph_pool_handle()  # those that never run at the same time share memory
        for step, stream in zip(self.steps, self._streams, strict=True):
            given = [tensors[name] for name in step.part.signature.input_names]
            graph, outputs = captured(step.part.run, given, stream, None if step.beside else ahead)
            graphs.append(graph)
            tensors |= zip(step.part.signature.output_names, outputs, strict=True)
        # all that the steps hand on is kept until here, so that none of them was given another's memory
        return Placed(graphs, places, [tensors[n] for n in self.whole.output_names], [recorded() for _ in graphs])
