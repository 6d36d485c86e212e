"""Convolutions as products with windows, without a GPU: Triton's interpreter runs them on the CPU, in a process of its
own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from interpreted import interpreted, report
from torch import Tensor, nn

from mubic_deploy.model import tokens
from mubic_deploy.model.denoiser import NoiseStage, TemporalConv
from mubic_deploy.model.optimise import fold_batch_norm

BATCH = 2


class Case(NamedTuple):
    """more: columns that the kernel is wider. around: channels beside those taken, of x and of the residual."""

    grid: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    channels: tuple[int, int]
    tile: tuple[int, int, int, int]
    more: int = 0
    around: tuple[int, int] = (0, 0)
    modulated: int = 0
    samples: int = 1
    residual: bool = False
    relu: int = 0


CASES = [
    Case((5, 6), (3, 3), (2, 2), (1, 1), (16, 32), (16, 16, 16, 1)),  # a step is of one place of the windows
    Case((5, 6), (3, 3), (2, 2), (1, 1), (16, 32), (16, 16, 16, 1), modulated=16),
    Case((5, 6), (3, 3), (2, 2), (1, 1), (32, 40), (16, 32, 16, 1), modulated=24, samples=BATCH),
    Case((6, 4), (3, 3), (2, 2), (1, 1), (1, 16), (16, 16, 16, 1), more=5, modulated=8, samples=BATCH),
    Case((4, 3), (3, 3), (1, 1), (1, 1), (16, 16), (16, 16, 16, 1), around=(16, 16), residual=True, relu=1),
    Case((4, 3), (3, 3), (1, 1), (1, 1), (16, 16), (32, 16, 16, 7), around=(16, 16), residual=True, relu=1),
    Case((5, 6), (3, 3), (2, 2), (1, 1), (32, 40), (16, 32, 16, 9), modulated=24, samples=BATCH),
    Case((5, 6), (3, 3), (2, 2), (1, 1), (32, 40), (16, 32, 16, 2), modulated=24),
    Case((4, 2, 3), (3, 1, 1), (1, 1, 1), (1, 0, 0), (24, 24), (16, 32, 32, 1), residual=True, relu=2),
    Case((4, 2, 3), (3, 1, 1), (1, 1, 1), (1, 0, 0), (48, 48), (64, 16, 16, 1), residual=True, relu=2),
    Case((4, 3, 5), (4, 1, 1), (1, 1, 1), (0, 0, 0), (24, 24), (16, 32, 64, 1), relu=1),
    Case((4, 3), (1, 1), (1, 1), (1, 1), (24, 16), (16, 16, 16, 1)),  # a window that may be all beside the grid
]


def arguments(case: Case) -> dict[str, Any]:
    """Of `F.conv2d` or `F.conv3d` as the model has them, and what is beside."""
    generator = torch.Generator().manual_seed(3)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    c, n = case.channels
    each = zip(case.grid, case.kernel, case.stride, case.padding, strict=True)
    reached = [(size + 2 * pad - width) // step + 1 for size, width, step, pad in each]
    return {
        "x": drawn(BATCH, *case.grid, c + case.around[0]),
        "weight": drawn(n, c, *case.kernel) / (c * 3) ** 0.5,
        "bias": drawn(n),
        "modulation": drawn(case.samples, 2 * case.modulated) if case.modulated else None,
        "residual": drawn(BATCH, *reached, case.around[1] + n) if case.residual else None,
    }


def reference(case: Case, x: Tensor, weight: Tensor, bias: Tensor, modulation: Any, residual: Any) -> Tensor:
    """What `windows.window_product` says that it is."""
    convolution = F.conv2d if len(case.grid) == 2 else F.conv3d
    first = x[..., : case.channels[0]].movedim(-1, 1)
    y = convolution(first, weight, bias, case.stride, case.padding).movedim(1, -1)
    if modulation is not None:
        scale, shift = modulation.view(case.samples, *[1] * len(case.grid), -1).chunk(2, -1)
        first = F.relu(y[..., : case.modulated] * (1 + scale) + shift)
        y = torch.cat([first, y[..., case.modulated :]], -1)
    y = F.relu(y) if case.relu == 2 else y
    y = y if residual is None else y + residual[..., case.around[1] :]
    return F.relu(y) if case.relu == 1 else y


def product(case: Case, x: Tensor, weight: Tensor, bias: Tensor, modulation: Any, residual: Any) -> Tensor:
    """The kernel's, of a weight that is laid out as it wants it."""
    from mubic_deploy.model import windows

    vars(windows)["wrap_triton"] = lambda kernel: kernel  # which takes only what is compiled
    vars(windows)["tile"] = lambda n, k: windows.Tile(*case.tile, 4, 2)
    rows = F.pad(weight, (0, case.more)).movedim(1, -1).flatten(1).contiguous()
    *others, width = case.kernel
    rim = [p for n in reversed(case.padding) for p in (n, n)]
    rim[1] += case.more
    sizes = ([*others, width + case.more], list(case.stride), rim, case.around[1], case.relu)
    return windows.window_product(x, rows, bias, modulation, residual, *sizes)


def distance(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a.float() - b.float()).abs().max())


def stage(channels: int, samples: int) -> tuple[nn.Module, tuple]:
    module = NoiseStage(channels, 16, 8).eval()
    fold_batch_norm(module)  # type: ignore[arg-type]
    x = torch.randn(BATCH, 5, 6, channels).movedim(-1, 1)  # as a stage leaves it
    return tokens.TokenNoiseStage(module), (x, torch.randn(samples, 32))


def first_stage() -> tuple[nn.Module, tuple]:
    """The map's, in FP32, with a step of its own for each sample."""
    return stage(1, BATCH)


def later_stage() -> tuple[nn.Module, tuple]:
    """With the sampler's modulation, the same for all samples."""
    return stage(16, 1)


def temporal() -> tuple[nn.Module, tuple]:
    module = nn.Sequential(TemporalConv(24))
    tokens.tokens(module)
    return module, (torch.randn(BATCH, 4, 3, 5, 24),)


def collapse() -> tuple[nn.Module, tuple]:
    return tokens.WindowReLU(nn.Conv3d(24, 24, (4, 1, 1))), (torch.randn(BATCH, 4, 3, 5, 24).movedim(-1, 1),)


MODULES = (first_stage, later_stage, temporal, collapse)


def module_difference(make: Callable[[], tuple[nn.Module, tuple]]) -> float:
    """Between what a module in half precision computes with its kernels, and without them in FP32."""
    from mubic_deploy.model import windows

    asked = []

    def chosen(*sizes: int) -> windows.Tile:
        asked.append(sizes)
        return windows.Tile(32, 16, 16, 3, 4, 2)

    vars(windows)["tile"] = chosen
    torch.manual_seed(3)
    module, inputs = make()
    half = copy.deepcopy(module).half()
    given = [x if make is first_stage and i == 0 else x.half() for i, x in enumerate(inputs)]
    with torch.no_grad():
        expected = module(*inputs)
        vars(tokens)["has_kernels"] = lambda _: True
        got = half(*given)
        vars(tokens)["has_kernels"] = lambda _: False
        assert got.dtype == torch.float16
    assert len(asked) == (2 if len(inputs) > 1 else 1)  # products
    return distance(got, expected)


def differences() -> dict[str, float]:
    """The largest of each case and module."""
    out = {}
    for i, case in enumerate(CASES):
        given = arguments(case)
        out[f"case {i}"] = distance(product(case, **given), reference(case, **given))
        half: dict[str, Any] = {name: x if x is None else x.half() for name, x in given.items()}
        rounded: dict[str, Any] = {name: x if x is None else x.float() for name, x in half.items()}
        got = product(case, **half)
        assert got.dtype == torch.float16
        out[f"half {i}"] = distance(got, reference(case, **rounded))
    got = product(case, **half | {"x": half["x"].float()})  # of FP32 a product is FP16 where the weights are
    assert got.dtype == torch.float16
    out["single"] = distance(got, product(case, **half))
    return out | {make.__name__: module_difference(make) for make in MODULES}


@pytest.fixture(scope="module")
def found() -> dict[str, float]:
    return interpreted(__file__)


@pytest.mark.parametrize("case", range(len(CASES)))
def test_a_convolution_and_what_follows_it(found: dict[str, float], case: int) -> None:
    assert found[f"case {case}"] < 1e-5


@pytest.mark.parametrize("case", range(len(CASES)))
def test_half_precision_is_summed_in_full(found: dict[str, float], case: int) -> None:
    assert found[f"half {case}"] < 1e-2  # of values up to 16, whose last place is 8e-3


@pytest.mark.parametrize("make", MODULES)
def test_a_module_of_kernels_is_the_same(found: dict[str, float], make: Callable) -> None:
    assert found[make.__name__] < 1e-2


def test_an_input_in_fp32_is_rounded_as_the_weights_are(found: dict[str, float]) -> None:
    assert found["single"] == 0


if __name__ == "__main__":
    report(differences)
