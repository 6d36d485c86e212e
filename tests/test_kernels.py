"""The GPU's kernels, without one: Triton's interpreter runs them on the CPU, in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from interpreted import interpreted, report
from torch import Tensor

from mubic_deploy.model import tokens
from mubic_deploy.model.fusion import LocalContext
from mubic_deploy.model.visual import FoldedAttention

# first, grid, stride, channels before and behind, groups, norms, their size, bias, residual
CASES = [
    (1, (2, 2, 6), 1, (0, 48), 2, 1, 6, False, False),
    (1, (2, 3, 5), 2, (12, 24), 4, 2, 6, False, False),
    (1, (1, 8, 16), 8, (8, 0), 2, 2, 8, False, False),
    (0, (3, 2, 8), 1, (0, 0), 1, 1, 12, True, True),
    (0, (2, 3, 1), 1, (0, 0), 1, 1, 3, True, True),
    # tiles of strided places, whole ones and others
    (1, (1, 2, 18), 2, (0, 6), 1, 1, 6, False, False),
    (1, (1, 1, 35), 4, (0, 0), 1, 1, 6, True, True),
    (0, (1, 1, 70), 8, (0, 0), 2, 1, 5, True, False),
]
BATCH = 2
# grid, heads, strides of queries and of keys and values, size
BOTH = [((2, 2, 5), 2, 1, 2, 6), ((3, 3, 9), 1, 2, 4, 5), ((1, 2, 17), 2, 4, 8, 4), ((2, 1, 3), 4, 1, 1, 3)]


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, scale: Tensor, *more) -> Tensor:
    """What `kernels.depthwise_norm` says that it is."""
    shift, eps, first, grid, stride, start = more
    norms, d = scale.shape
    x = x[..., start : start + weight.shape[1]]
    volume = x[:, first:].unflatten(1, grid).permute(0, 4, 1, 2, 3)
    kernel = weight.T.reshape(-1, 1, 3, 3, 3)
    y = F.conv3d(volume, kernel, bias, (1, stride, stride), padding=1, groups=len(kernel))
    y = torch.cat([x[:, :first], y.flatten(2).transpose(1, 2)], 1)
    y = y if residual is None else y + residual
    y = F.layer_norm(y.unflatten(-1, (norms, -1, d)), (d,), eps=eps)
    return (y * scale[:, None] + shift[:, None]).flatten(2)


def arguments(first, grid, stride, around, groups, norms, d, bias, residual) -> list:
    generator, channels = torch.Generator().manual_seed(3), groups * d
    t, h, w = grid
    places = first + t * -(-h // stride) * -(-w // stride)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return [
        drawn(BATCH, first + t * h * w, sum(around) + channels),
        drawn(27, channels),
        drawn(channels) if bias else None,
        drawn(BATCH, places, channels) if residual else None,
        drawn(norms, d),
        drawn(norms, d),
        1e-6,
        first,
        list(grid),
        stride,
        around[0],
    ]


def both(grid: tuple, heads: int, stride: int, other: int, d: int) -> tuple[list, list[Tensor]]:
    """What `kernels.depthwise_norms` is given and should give."""
    first, c = 1, heads * d
    q = arguments(first, grid, stride, (0, 2 * c), heads, 1, d, False, False)
    kv = arguments(first, grid, other, (c, 0), 2 * heads, 2, d, False, False)
    pairs = [[q[i], kv[i]] for i in (1, 4, 5)]
    given = [q[0], *pairs, 1e-6, first, list(grid), [stride, other], [0, c]]
    return given, [reference(q[0], *part[1:]) for part in (q, kv)]


def attention() -> tuple[torch.nn.Module, tuple]:
    """One whose queries and keys are pooled, and its inputs."""
    size, options = [2, 4, 6], {"residual_pool": True, "residual_with_cls_embed": False, "rel_pos_embed": True}
    module = FoldedAttention(size, 16, 16, 2, [3, 3, 3], [3, 3, 3], [1, 1, 1], [1, 2, 2], **options)
    module.__class__ = tokens.TokenAttention
    module.set_up()
    module.forward = lambda x, thw: module.attended(module.qkv(x), thw)  # type: ignore[method-assign]
    return module, (torch.randn(BATCH, 1 + 2 * 4 * 6, 16), (2, 4, 6))


def local_context() -> tuple[torch.nn.Module, tuple]:
    module = LocalContext(6, 12)
    tokens.local_tokens(module)
    return module, (torch.randn(BATCH, 2, 3, 4, 6),)


MODULES = (attention, local_context)
# whole tiles and others, of every stride
TILED = [
    (1, (2, 2, 8), 1, (0, 3), 2, 2, 3, False, False),
    (1, (3, 3, 5), 2, (6, 0), 2, 1, 6, False, False),
    (0, (1, 2, 5), 1, (0, 0), 1, 1, 5, True, True),
    (1, (4, 4, 16), 4, (0, 0), 1, 1, 3, False, False),
    (1, (2, 1, 33), 8, (0, 0), 2, 1, 4, True, False),
]


def tiles() -> dict[str, Any]:
    from mubic_deploy.model.kernels import Tile

    sizes = [(1, 4, 2), (2, 4, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2), (4, 1, 4), (1, 4, 1)]
    return {str(tile): tile for tile in (Tile(*size) for size in sizes)}


def differences() -> dict[str, float]:
    """The largest of each case and module."""
    from mubic_deploy.model import kernels

    vars(kernels)["wrap_triton"] = lambda kernel: kernel  # which takes only what is compiled
    out = {}
    for i, case in enumerate(CASES):
        given = arguments(*case)
        got, expected = kernels.depthwise_norm(*given), reference(*given)
        assert got.shape == expected.shape
        out[f"case {i}"] = float((got - expected).abs().max())
    for i, sizes in enumerate(BOTH):
        given, wanted = both(*sizes)
        for j, (a, b) in enumerate(zip(kernels.depthwise_norms(*given), wanted, strict=True)):
            assert a.shape == b.shape
            out[f"both {i} {j}"] = float((a - b).abs().max())
    for i, (name, tile) in enumerate(tiles().items()):
        out[name] = 0.0
        for case in (TILED[i % len(TILED)], TILED[(i + 2) % len(TILED)]):
            given = arguments(*case)
            given = [x[:1] if isinstance(x, Tensor) and x.dim() == 3 else x for x in given]
            got = kernels.launched(*given, tile=tile)
            out[name] = max(out[name], float((got - reference(*given)).abs().max()))
    for i, case in enumerate(CASES):
        half = [x.half() if isinstance(x, Tensor) else x for x in arguments(*case)]
        expected = reference(*(x.float() if isinstance(x, Tensor) else x for x in half)).half()
        got = kernels.depthwise_norm(*half)
        assert got.dtype == torch.float16
        out[f"half {i}"] = float((got != expected).float().mean())
    for make in MODULES:
        torch.manual_seed(3)
        module, inputs = make()
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter)
        with torch.no_grad():
            expected = module.eval()(*inputs)
            vars(tokens)["has_kernels"] = lambda _: True
            got = module(*inputs)
            vars(tokens)["has_kernels"] = lambda _: False
        pairs = zip(got, expected, strict=True) if isinstance(got, tuple) else [(got, expected)]
        out[make.__name__] = max(float((a - b).abs().max()) for a, b in pairs if isinstance(a, Tensor))
        assert float((got[0] - expected[0]).abs().max()) > 0  # other sums were made: the kernels'
    return out


@pytest.fixture(scope="module")
def found() -> dict[str, float]:
    return interpreted(__file__)


@pytest.mark.parametrize("case", range(len(CASES)))
def test_a_depthwise_convolution_and_its_norm(found: dict[str, float], case: int) -> None:
    assert found[f"case {case}"] < 1e-5


@pytest.mark.parametrize("case", range(len(BOTH)))
def test_queries_and_keys_in_one_launch(found: dict[str, float], case: int) -> None:
    assert max(found[f"both {case} {i}"] for i in (0, 1)) < 1e-5


def test_all_tiles_give_the_same(found: dict[str, float]) -> None:
    of_tiles = {name: found[name] for name in found if name.startswith("Tile")}
    assert len(of_tiles) == 7
    assert {name: x for name, x in of_tiles.items() if not x < 1e-5} == {}


@pytest.mark.parametrize("case", range(len(CASES)))
def test_half_precision_is_summed_in_full(found: dict[str, float], case: int) -> None:
    """It is rounded once, at the end: hardly any value is another than FP32's, rounded."""
    assert found[f"half {case}"] < 0.01


@pytest.mark.parametrize("make", MODULES)
def test_a_module_of_kernels_is_the_same(found: dict[str, float], make: Callable) -> None:
    assert found[make.__name__] < 1e-4


if __name__ == "__main__":
    report(differences)
