"""The GPU's kernels, without one: Triton's interpreter runs them on the CPU, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
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


def attention() -> tuple[torch.nn.Module, tuple]:
    """One whose queries and keys are pooled, and its inputs."""
    size, options = [2, 4, 6], {"residual_pool": True, "residual_with_cls_embed": False, "rel_pos_embed": True}
    module = FoldedAttention(size, 16, 16, 2, [3, 3, 3], [3, 3, 3], [1, 1, 1], [1, 2, 2], **options)
    module.__class__ = tokens.TokenAttention
    module.set_up()
    return module, (torch.randn(BATCH, 1 + 2 * 4 * 6, 16), (2, 4, 6))


def local_context() -> tuple[torch.nn.Module, tuple]:
    module = LocalContext(6, 12)
    tokens.local_tokens(module)
    return module, (torch.randn(BATCH, 2, 3, 4, 6),)


MODULES = (attention, local_context)


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
    half = [x.half() if isinstance(x, Tensor) else x for x in arguments(*CASES[0])]
    got = kernels.depthwise_norm(*half)
    assert got.dtype == torch.float16
    out["half"] = float((got - reference(*(x.float() if isinstance(x, Tensor) else x for x in half))).abs().max())
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
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", range(len(CASES)))
def test_a_depthwise_convolution_and_its_norm(found: dict[str, float], case: int) -> None:
    assert found[f"case {case}"] < 1e-5


def test_half_precision_is_summed_in_full(found: dict[str, float]) -> None:
    assert found["half"] < 2e-3  # of values up to 4, whose last place is 2e-3


@pytest.mark.parametrize("make", MODULES)
def test_a_module_of_kernels_is_the_same(found: dict[str, float], make: Callable) -> None:
    assert found[make.__name__] < 1e-4


if __name__ == "__main__":
    print(json.dumps(differences()))
