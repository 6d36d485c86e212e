"""Parts beside each other on a GPU, with a double of torch.cuda."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from fake_torch_cuda import Gpu, Stream, host
from torch import Tensor

from mubic_deploy.engines.lanes import Lanes, Part, Step, in_turn
from mubic_deploy.engines.replay import WARM_UPS
from mubic_deploy.graphs import Signature
from mubic_deploy.graphs import Tensor as Named

CPU = torch.device("cpu")


def signature(name: str, inputs: str, outputs: str) -> Signature:
    named = ([Named(tensor, "float32", (5,)) for tensor in names.split()] for names in (inputs, outputs))
    return Signature(name, *map(tuple, named))


WHOLE = signature("whole", "X Y", "F1 F2 F3")


class Toys:
    """Parts as encoders and fusion are chained, which note on which stream they run."""

    def __init__(self, gpu: Gpu | None = None) -> None:
        self.gpu = gpu
        self.ran: list[tuple[str, Stream]] = []

    def part(self, name: str, inputs: str, outputs: str) -> Part:
        def run(*tensors: Tensor) -> Sequence[Tensor]:
            if self.gpu is not None:
                self.ran.append((name, self.gpu.current))
            total = torch.stack([x * (i + 2) for i, x in enumerate(tensors)]).sum(0)
            return [torch.tanh(total + i) for i in range(len(outputs.split()))]

        return Part(signature(name, inputs, outputs), run)

    @property
    def steps(self) -> list[Step]:
        return [
            Step(self.part("see1", "X", "V1 T1")),
            Step(self.part("hear", "Y", "A"), beside=True),
            Step(self.part("see2", "T1", "V2 T2")),
            Step(self.part("fuse1", "V1 A", "F1"), beside=True),
            Step(self.part("see3", "T2", "V3")),
            Step(self.part("fuse2", "V2 A", "F2"), beside=True),
            Step(self.part("fuse3", "V3 A", "F3")),
        ]

    def expected(self, *inputs: Tensor) -> Sequence[Tensor]:
        with torch.inference_mode():
            return in_turn([step.part for step in self.steps], WHOLE)(*(x + 0 for x in inputs))


def kept(x: Tensor) -> Tensor:
    """What is in `x` when the GPU is so far."""
    return torch.empty_like(x).copy_(x, non_blocking=True)


@pytest.mark.parametrize("newest_first", [False, True])
@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("on_host", [(True, True), (False, True), (True, False), (False, False)])
def test_each_step_waits_for_what_it_takes(
    gpu: Gpu, newest_first: bool, on_host: tuple[bool, bool], pinned: bool
) -> None:
    """However late the others are; nothing is read of the clip before, nor of the one behind."""
    lanes = Lanes(Toys().steps, WHOLE, CPU)
    clips = [[torch.randn(batch, 5) for _ in range(2)] for batch in (1, 1, 2, 1, 2, 2)]
    gpu.pinned += [x for clip in clips for x in clip] * pinned
    got = []
    with torch.inference_mode(), gpu.late(newest_first):
        for clip in clips:
            given = [host(x) if there else x for x, there in zip(clip, on_host, strict=True)]
            got.append([kept(x) for x in lanes(*given)])
    for clip, outputs in zip(clips, got, strict=True):
        for x, expected in zip(outputs, Toys().expected(*clip), strict=True):
            torch.testing.assert_close(x, expected, rtol=0, atol=0)


@pytest.mark.parametrize("newest_first", [False, True])
def test_nothing_overtakes_who_reads_the_results(gpu: Gpu, newest_first: bool) -> None:
    """What the caller put on its stream comes first, however little a step beside it waits for."""
    lanes = Lanes(Toys().steps, WHOLE, CPU)
    clips = [[torch.randn(1, 5) for _ in range(2)] for _ in range(3)]
    sums = []
    with torch.inference_mode():
        lanes(*clips[0])  # captured
        with gpu.late(newest_first):
            for clip in clips:
                outputs = lanes(*(host(x) for x in clip))
                sums.append([kept(x) for x in outputs])
    for clip, outputs in zip(clips, sums, strict=True):
        for x, expected in zip(outputs, Toys().expected(*clip), strict=True):
            torch.testing.assert_close(x, expected, rtol=0, atol=0)


def test_steps_beside_have_streams_of_their_own_and_the_others_one(gpu: Gpu) -> None:
    """Warm-ups as the capture; those of one stream share memory, the others have their own."""
    toys = Toys(gpu)
    lanes = Lanes(toys.steps, WHOLE, CPU)
    lanes(torch.zeros(1, 5), torch.zeros(1, 5))
    streams: dict[str, set[Stream]] = {}
    for name, stream in toys.ran:
        streams.setdefault(name, set()).add(stream)
    assert len(toys.ran) == (WARM_UPS + 1) * len(toys.steps)
    assert all(len(of_step) == 1 for of_step in streams.values())
    of = {name: next(iter(each)) for name, each in streams.items()}
    assert of["see1"] is of["see2"] is of["see3"] is of["fuse3"]
    assert len(set(of.values())) == 4
    shared, *others = gpu.pools
    assert shared is not None
    assert others == [None, shared, None, shared, None, shared]
    lanes(torch.zeros(2, 5), torch.zeros(2, 5))
    assert gpu.pools[7] not in (None, shared)  # another batch size runs at the same time as none, but keeps its results


def test_what_lies_on_the_gpu_already_is_not_copied_again(gpu: Gpu) -> None:
    lanes = Lanes(Toys().steps, WHOLE, CPU)
    x, y = torch.randn(1, 5), torch.randn(1, 5)
    with torch.no_grad(), gpu.late(newest_first=False):
        for _ in range(3):
            (first, *_) = lanes(x, y)
        assert len(gpu.copies) == 2
        x.neg_()
        first, *_ = (kept(z) for z in lanes(x, y))
    torch.testing.assert_close(first, Toys().expected(x, y)[0], rtol=0, atol=0)
