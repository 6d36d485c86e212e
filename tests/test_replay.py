"""CUDA graphs around PyTorch code, with a double of torch.cuda's: a graph is the operations that were called while it
was captured, and to replay it is to call them again on the same memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mubic_deploy.engines.replay import WARM_UPS, Replayed


class Recorder(TorchDispatchMode):
    """Notes every operation with its arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        self.calls.append((func, args, kwargs or {}, out))
        return out


class Graph:
    """torch.cuda.CUDAGraph."""

    def __init__(self) -> None:
        self.recorder = Recorder()

    def replay(self) -> None:
        for func, args, kwargs, out in self.recorder.calls:
            again = func(*args, **kwargs)
            for place, x in zip(tree_leaves(out), tree_leaves(again), strict=True):
                place.data.copy_(x)  # `data`: a GPU's graph does not count as a change of the tensor


@pytest.fixture(autouse=True)
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream:
        def wait_stream(self, other: Stream) -> None:
            pass

    @contextlib.contextmanager
    def graph(captured: Graph) -> Iterator[None]:
        with captured.recorder:
            yield

    for name, value in {
        "Stream": Stream,
        "current_stream": Stream,
        "stream": lambda _: contextlib.nullcontext(),
        "CUDAGraph": Graph,
        "graph": graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)


class Copies(TorchDispatchMode):
    """Counts the elements of what is copied into other tensors, but not by a graph."""

    def __init__(self, replayed: Replayed) -> None:
        super().__init__()
        self.places = {x.data_ptr() for captured in replayed._captured.values() for x in captured.places}
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default and args[0].data_ptr() in self.places:
            self.sizes.append(args[0].numel())
        return func(*args, **kwargs or {})


def counted(run: Callable[..., Sequence[Tensor]]) -> tuple[Replayed, list[int]]:
    """`run` replayed, and the batch of each of its calls in Python."""
    calls: list[int] = []

    def counting(*inputs: Tensor) -> Sequence[Tensor]:
        calls.append(len(inputs[0]))
        return run(*inputs)

    return Replayed(counting), calls


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
