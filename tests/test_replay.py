"""CUDA graphs around PyTorch code, with a double of torch.cuda."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from fake_torch_cuda import Gpu, host
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mubic_deploy.engines import replay
from mubic_deploy.engines.replay import WARM_UPS, Replayed

pytestmark = pytest.mark.usefixtures("gpu")


class Copies(TorchDispatchMode):
    """Counts the elements of what is copied into other tensors, but not by a graph."""

    def __init__(self, replayed: Replayed) -> None:
        super().__init__()
        self.places = {x.data_ptr() for captured in replayed._captured.values() for x in captured.places.tensors}
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default and args[0].data_ptr() in self.places:
            self.sizes.append(args[0].numel())
        return func(*args, **kwargs or {})


def counted(run: Callable[..., Sequence[Tensor]], device: torch.device | None = None) -> tuple[Replayed, list[int]]:
    """`run` replayed, and the batch of each of its calls in Python."""
    calls: list[int] = []

    def counting(*inputs: Tensor) -> Sequence[Tensor]:
        calls.append(len(inputs[0]))
        return run(*inputs)

    return Replayed(counting, device), calls


@pytest.fixture(params=[False, True], ids=["no_grad", "inference_mode"])
def mode(request: pytest.FixtureRequest) -> Iterator[None]:
    """Engines call in inference mode, whose tensors do not count their changes."""
    with torch.inference_mode() if request.param else torch.no_grad():
        yield


def step(cond: Tensor, s_t: Tensor) -> tuple[Tensor, Tensor]:
    """As the denoiser: S_0 and S_NEXT."""
    s_0 = torch.tanh(cond + s_t)
    return s_0, s_t + s_0


@pytest.mark.usefixtures("mode")
def test_a_batch_size_is_captured_once_and_replayed() -> None:
    replayed, calls = counted(step)
    for batch in (2, 1, 2, 1, 3, 2):
        inputs = (torch.randn(batch, 5), torch.randn(batch, 5))
        outputs = replayed(*inputs)
        for got, expected in zip(outputs, step(*inputs), strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=0)
    each = WARM_UPS + 1
    assert calls == [2] * each + [1] * each + [3] * each


@pytest.mark.usefixtures("mode")
def test_results_lie_where_the_graph_writes_them() -> None:
    """Nothing is copied out: what was returned is overwritten by the next call of that size, and by no other."""
    replayed, _ = counted(step)
    one, two = torch.randn(1, 5), torch.randn(2, 5)
    first, _ = replayed(one, one)
    replayed(two, two)
    torch.testing.assert_close(first, torch.tanh(2 * one))
    second, _ = replayed(2 * one, one)
    assert second.data_ptr() == first.data_ptr()
    torch.testing.assert_close(first, torch.tanh(3 * one))


@pytest.mark.usefixtures("mode")
def test_a_loop_copies_its_conditioning_once() -> None:
    """The conditioning is another graph's; S_NEXT is the graph's own, and goes back in."""
    fusion, denoiser = Replayed(lambda x: (2 * x,)), Replayed(step)
    for clip in range(3):
        features = torch.randn(2, 500)
        (cond,) = fusion(features)
        s_t = torch.randn(2, 500)
        expected = s_t.clone()
        for n in range(4):
            with Copies(denoiser) as copied:
                s_0, s_t = denoiser(cond, s_t)
            if clip or n:
                assert len(copied.sizes) == 1 + (n == 0)
            expected_map, expected = step(2 * features, expected)
            torch.testing.assert_close(s_0, expected_map, rtol=0, atol=0)


@pytest.mark.usefixtures("mode")
def test_a_graph_that_was_replayed_gives_another_tensor() -> None:
    """A replay writes memory that no tensor knows of: the reader of a later result must not take it for the former."""
    fusion, denoiser = Replayed(lambda x: (2 * x,)), Replayed(step)
    s_t, features = torch.randn(1, 5), torch.randn(1, 5)
    (before,) = fusion(features)
    denoiser(before, s_t)
    (after,) = fusion(-features)
    assert after.data_ptr() == before.data_ptr()
    s_0, _ = denoiser(after, s_t)
    torch.testing.assert_close(s_0, step(-2 * features, s_t)[0])


@pytest.mark.usefixtures("mode")
def test_what_was_changed_in_place_is_copied_again() -> None:
    replayed, _ = counted(step)
    cond, s_t = torch.randn(1, 5), torch.randn(1, 5)
    replayed(cond, s_t)
    cond.neg_()
    s_0, _ = replayed(cond, s_t)
    torch.testing.assert_close(s_0, step(cond, s_t)[0])


def test_tensors_that_are_gone_are_not_remembered() -> None:
    """Nor is another one taken for them that got their place."""
    replayed, _ = counted(step)
    for n in range(20):
        cond, s_t = torch.full((1, 5), float(n)), torch.full((1, 5), -float(n))
        s_0, _ = replayed(cond, s_t)
        torch.testing.assert_close(s_0, torch.zeros(1, 5))
        del cond, s_t
    with torch.no_grad():
        s_0, _ = replayed(torch.ones(1, 5), torch.ones(1, 5))
    torch.testing.assert_close(s_0, torch.tanh(torch.full((1, 5), 2.0)))


def test_other_batch_sizes_keep_their_own_inputs() -> None:
    replayed, _ = counted(step)
    one, two = torch.randn(1, 5), torch.randn(2, 5)
    for x in (one, two, one, two):
        torch.testing.assert_close(replayed(x, x)[0], torch.tanh(2 * x))


def test_a_transposed_input_keeps_its_layout() -> None:
    seen: list[tuple[int, ...]] = []

    def run(x: Tensor) -> tuple[Tensor]:
        seen.append(x.stride())
        return (x + 1,)

    x = torch.randn(2, 3, 4).transpose(1, 2)
    (got,) = Replayed(run)(x)
    assert set(seen) == {x.stride()}
    torch.testing.assert_close(got, x + 1)


def kept(x: Tensor) -> Tensor:
    """What is in `x` when the GPU is so far."""
    return torch.empty_like(x).copy_(x, non_blocking=True)


@pytest.mark.usefixtures("mode")
@pytest.mark.parametrize("newest_first", [False, True])
@pytest.mark.parametrize("part", [3, 100])
def test_what_is_on_the_host_is_read_as_it_was_when_it_was_given(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, newest_first: bool, part: int
) -> None:
    """Neither before it is there, nor what was given next, though the host waits for nothing of the graphs."""
    monkeypatch.setattr(replay, "PART", part)
    replayed, calls = counted(step, torch.device("cpu"))
    cond, s_t = host(torch.zeros(2, 5)), host(torch.zeros(2, 5))
    given, got = [], []
    with gpu.late(newest_first):
        for _ in range(4):
            cond.normal_()
            s_t.normal_()
            given.append((cond + 0, s_t + 0))
            got.append([kept(x) for x in replayed(cond, s_t)])
    for inputs, outputs in zip(given, got, strict=True):
        for x, expected in zip(outputs, step(*inputs), strict=True):
            torch.testing.assert_close(x, expected, rtol=0, atol=0)
    assert calls == [2] * (WARM_UPS + 1)


@pytest.mark.usefixtures("mode")
def test_the_host_waits_for_the_upload_before_and_for_no_graph(gpu: Gpu) -> None:
    replayed = Replayed(lambda x: (2 * x,), torch.device("cpu"))
    x = host(torch.ones(1, 5))
    replayed(x)
    waiting = []
    with gpu.late(newest_first=False):
        for _ in range(3):
            replayed(x)
            waiting.append(len(gpu.default.work))
    each = waiting[0]
    assert waiting == [each, 2 * each, 2 * each]  # the second upload waited for the first graph


@pytest.mark.usefixtures("mode")
def test_uploads_go_through_pinned_memory_on_a_stream_of_their_own(gpu: Gpu) -> None:
    """Once an input, until a batch is larger."""
    replayed = Replayed(step, torch.device("cpu"))
    with gpu.late(newest_first=False):
        for batch in (1, 2, 1, 2):
            replayed(host(torch.ones(batch, 5)), torch.ones(batch, 5))
    assert [x.shape for x in gpu.pinned] == [(1, 5), (2, 5)]
    places = {x.data_ptr() for x in gpu.pinned}
    streams = {stream for stream, x in gpu.copies if x.data_ptr() in places}
    assert len(streams) == 1
    assert gpu.default not in streams
    assert {stream for stream, x in gpu.copies if x.data_ptr() not in places} == {gpu.default}


def test_a_place_may_lie_otherwise_than_what_the_host_gives(gpu: Gpu) -> None:
    """The first call laid it out."""
    replayed, _ = counted(lambda x: (x + 1,), torch.device("cpu"))
    replayed(torch.zeros(1, 3, 4).transpose(1, 2))
    x = torch.randn(1, 4, 3)
    with gpu.late(newest_first=False):
        (y,) = (kept(y) for y in replayed(host(x)))
    torch.testing.assert_close(y, x + 1, rtol=0, atol=0)


def test_batch_sizes_share_pinned_memory(gpu: Gpu) -> None:
    """It is as large as the largest wants; a smaller batch's upload waits for that of the larger, which reads it."""
    replayed, _ = counted(lambda x: (x + 1,), torch.device("cpu"))
    batches = [torch.randn(n, 5) for n in (2, 4, 1, 3, 4)]
    with gpu.late(newest_first=True):
        got = [kept(y) for x in batches for y in replayed(host(x))]
    for y, x in zip(got, batches, strict=True):
        torch.testing.assert_close(y, x + 1, rtol=0, atol=0)
    assert [len(x) for x in gpu.pinned] == [2, 4]


def test_a_host_that_has_no_more_pinned_memory_is_only_slower(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "CUDA error: out of memory"

    def none_left(x: Tensor) -> Tensor:
        raise RuntimeError(said)

    monkeypatch.setattr(replay, "pinned", none_left)
    replayed, _ = counted(lambda x: (x + 1,), torch.device("cpu"))
    given = [torch.randn(2, 5) for _ in range(3)]
    with gpu.late(newest_first=True):
        got = [kept(y) for x in given for y in replayed(host(x))]
    for y, x in zip(got, given, strict=True):
        torch.testing.assert_close(y, x + 1, rtol=0, atol=0)
    said = "CUDA error: an illegal memory access was encountered"
    with pytest.raises(RuntimeError, match="illegal"):
        replayed(host(torch.randn(2, 5)), host(torch.randn(2, 5)))


def test_pinned_memory_is_written_in_other_modes_too() -> None:
    replayed, x = Replayed(lambda x: (2 * x,), torch.device("cpu")), host(torch.randn(1, 5))
    for mode in (torch.inference_mode(), torch.no_grad()):
        with mode:
            torch.testing.assert_close(replayed(x)[0], 2 * x)


@pytest.mark.usefixtures("mode")
def test_a_place_that_the_host_filled_is_filled_again() -> None:
    """By the tensor on the GPU that was there before, unchanged."""
    replayed, _ = counted(step, torch.device("cpu"))
    on_gpu, s_t = torch.randn(1, 5), torch.randn(1, 5)
    for cond in (on_gpu, host(-on_gpu), on_gpu):
        torch.testing.assert_close(replayed(cond, s_t)[0], step(cond + 0, s_t)[0])


@pytest.mark.usefixtures("mode")
@pytest.mark.parametrize("newest_first", [False, True])
def test_what_is_pinned_is_read_where_it_is(gpu: Gpu, newest_first: bool) -> None:
    """After the graph before has read its place, and before the next one does."""
    replayed, _ = counted(step, torch.device("cpu"))
    given = [[host(torch.randn(1, 5)) for _ in range(2)] for _ in range(3)]
    replayed(*given[0])
    own = len(gpu.pinned)
    gpu.pinned += [x for inputs in given for x in inputs]
    with gpu.late(newest_first):
        got = [[kept(y) for y in replayed(*inputs)] for inputs in given]
    for inputs, outputs in zip(given, got, strict=True):
        for y, expected in zip(outputs, step(*(x + 0 for x in inputs)), strict=True):
            torch.testing.assert_close(y, expected, rtol=0, atol=0)
    assert len(gpu.pinned) == own + 6  # nothing more was pinned
    sources = [x.data_ptr() for stream, x in gpu.copies if stream is not gpu.default]
    assert sources == [x.data_ptr() for inputs in given for x in inputs]
