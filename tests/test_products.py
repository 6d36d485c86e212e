"""Linear maps with their LayerNorm, GELU and residual, without a GPU: Triton's interpreter runs them on the CPU, in a
process of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from interpreted import interpreted, report
from torch import Tensor

from mubic_deploy.config import DEMO, ON_GPU
from mubic_deploy.model import tokens
from mubic_deploy.model.mubic import random_model
from mubic_deploy.model.precision import prepared

BATCH, EPS = 2, 1e-6
# rows of a clip, N, K; norm, bias, GELU, residual; (m, n, k) of a tile
CASES: list[tuple[int, int, int, bool, bool, bool, bool, tuple[int, int, int]]] = [
    (16, 32, 32, False, True, False, False, (16, 32, 32)),  # whole tiles
    (13, 40, 32, False, False, False, True, (16, 32, 16)),
    (13, 24, 48, False, True, False, True, (16, 32, 32)),  # k is not whole either
    (13, 40, 32, True, True, False, False, (16, 32, 16)),
    (9, 24, 48, True, True, True, False, (16, 16, 32)),
    (13, 48, 96, True, True, True, True, (16, 16, 32)),
    (1, 8, 16, True, False, False, False, (16, 16, 16)),
]


def arguments(rows: int, n: int, k: int, bias: bool, residual: bool) -> dict[str, Any]:
    """With a mean that is some deviations large."""
    generator = torch.Generator().manual_seed(3)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    given = {"x": 2 * drawn(BATCH, rows, k) + 3, "weight": drawn(n, k) / k**0.5}
    return given | {"bias": drawn(n) if bias else None, "residual": drawn(BATCH, rows, n) if residual else None}


def reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, norm: bool, gelu: bool
) -> Tensor:
    """What `products.product` says that it is."""
    y = F.linear(F.layer_norm(x, x.shape[-1:], eps=EPS) if norm else x, weight, bias)
    y = F.gelu(y) if gelu else y
    return y if residual is None else y + residual


def rows_that_are_hard() -> dict[str, Tensor]:
    """Of a LayerNorm: a mean that is many deviations, where the mean of squares less the square of the mean has few
    places left; a first value, from which differences are taken, that is far off; deviations of eps; none."""
    drawn = torch.randn((BATCH, 9, 48), generator=torch.Generator().manual_seed(3))
    far = drawn.clone()
    far[..., 0] = 100
    return {"mean": drawn + 300, "first": far, "small": drawn * EPS**0.5, "constant": drawn[..., :1].repeat(1, 1, 48)}


def halved(given: dict[str, Any], back: bool = False) -> dict[str, Any]:
    """In FP16; back: and what they are in FP32."""
    out = {name: x.half() if isinstance(x, Tensor) else x for name, x in given.items()}
    return {name: x.float() if isinstance(x, Tensor) else x for name, x in out.items()} if back else out


def distance(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a.float() - b.float()).abs().max())


def differences() -> dict[str, float]:
    """The largest of each case."""
    from mubic_deploy.model import products

    vars(products)["wrap_triton"] = lambda kernel: kernel  # which takes only what is compiled
    out = {}
    for i, (rows, n, k, norm, bias, gelu, residual, (tile_m, tile_n, tile_k)) in enumerate(CASES):
        chosen = products.Tile(tile_m, tile_n, tile_k, 4, 2)
        vars(products)["tile"] = lambda n, k, chosen=chosen: chosen
        given = arguments(rows, n, k, bias, residual)
        more = {"sums": given["weight"].sum(1) if norm else None, "given": None, "eps": EPS, "gelu": gelu}
        got = products.product(**given, **more)
        out[f"case {i}"] = distance(got, reference(**given, norm=norm, gelu=gelu))
        half, rounded = halved(given), halved(given, back=True)
        got = products.product(**half, **more | {"sums": rounded["weight"].sum(1) if norm else None})
        assert got.dtype == torch.float16
        out[f"half {i}"] = distance(got, reference(**rounded, norm=norm, gelu=gelu))
        # one after the other: the second is told of what the first one wrote, which is not made of whole tiles
        first, parts = products.product_moments(**given, **more)
        assert parts.shape == (-(-n // tile_n), 2, BATCH * rows)
        out[f"first {i}"] = distance(first, reference(**given, norm=norm, gelu=gelu))
        weight = torch.randn(24, n, generator=torch.Generator().manual_seed(5)) / n**0.5
        got = products.product(first, weight, None, None, weight.sum(1), parts, EPS, False)
        out[f"second {i}"] = distance(got, reference(first, weight, None, None, True, False))
    vars(products)["tile"] = lambda n, k: products.Tile(16, 16, 16, 4, 2)
    for name, x in rows_that_are_hard().items():
        weight = torch.randn(24, x.shape[-1], generator=torch.Generator().manual_seed(5)) / x.shape[-1] ** 0.5
        expected = F.linear(F.layer_norm(x.double(), x.shape[-1:], eps=EPS), weight.double())
        got = products.product(x, weight, None, None, weight.sum(1), None, EPS, False)
        out[name] = float((got.double() - expected).abs().max())
        same, parts = products.product_moments(x, torch.eye(x.shape[-1]), None, None, None, None, EPS, False)
        assert torch.equal(same, x)
        got = products.product(x, weight, None, None, weight.sum(1), parts, EPS, False)
        out[f"{name}, told"] = float((got.double() - expected).abs().max())
    x = torch.cat([torch.linspace(-12, 12, 4096), torch.tensor([0.0, -100.0, 100.0, 6e4, -6e4])])[:, None]
    vars(products)["tile"] = lambda n, k: products.Tile(1024, 16, 16, 4, 2)
    got = products.product(x, torch.ones(1, 1), None, None, None, None, EPS, True)
    out["gelu"] = float((got.double() - F.gelu(x.double())).abs().max())
    vars(products)["tile"] = lambda n, k: products.Tile(64, 64, 32, 4, 2)
    return out | encoder_differences()


def encoder_differences() -> dict[str, float]:
    """Of the visual encoder in half precision: with kernels, as it is compiled, and as it was, each to FP32's; and what
    changes where kernels are."""
    config = replace(DEMO, height=32, width=48, visual_depths=(1, 1, 2, 1))
    model = random_model(config, 3)
    for module in model.visual_encoder.modules():
        if isinstance(module, torch.nn.LayerNorm):
            torch.nn.init.normal_(module.weight, 1, 0.2)
            torch.nn.init.normal_(module.bias, 0, 0.2)
    video = torch.randint(0, 256, (BATCH, config.frames, config.height, config.width, 3), dtype=torch.uint8)
    encoder, before = (prepared(model, "float16", names).visual_encoder for names in (ON_GPU, ()))
    with torch.no_grad():
        plain, old, expected = encoder(video), before(video), model.eval().visual_encoder(video)
        vars(tokens)["has_product"] = lambda x, _: x.dtype == torch.float16
        got = encoder(video)
    assert any(float((a - b).abs().max()) > 0 for a, b in zip(got, plain, strict=True))  # they were run
    sides = {"kernels": got, "plain": plain, "before": old}
    return {name: max(map(distance, side, expected)) for name, side in sides.items()}


@pytest.fixture(scope="module")
def found() -> dict[str, float]:
    return interpreted(__file__)


@pytest.mark.parametrize("case", range(len(CASES)))
def test_a_product_and_what_is_beside_it(found: dict[str, float], case: int) -> None:
    assert found[f"case {case}"] < 1e-5


@pytest.mark.parametrize("case", range(len(CASES)))
def test_half_precision_is_summed_in_full(found: dict[str, float], case: int) -> None:
    assert found[f"half {case}"] < 4e-3  # of values up to 8, whose last place is 4e-3


@pytest.mark.parametrize("case", range(len(CASES)))
def test_a_product_tells_the_next_one_of_its_rows(found: dict[str, float], case: int) -> None:
    assert found[f"first {case}"] < 1e-5
    assert found[f"second {case}"] < 2e-5


@pytest.mark.parametrize("told", ["", ", told"])
@pytest.mark.parametrize("rows", rows_that_are_hard())
def test_a_norm_of_hard_rows(found: dict[str, float], rows: str, told: str) -> None:
    # where a row is constant, what the sums are rounded by is a thousand times as large: it is divided by sqrt(eps)
    assert found[rows + told] < (2e-3 if rows == "constant" else 2e-4)


def test_gelu_is_exact_to_the_seventh_place(found: dict[str, float]) -> None:
    assert found["gelu"] < 1e-6


def test_the_encoder_is_as_exact_as_without_kernels(found: dict[str, float]) -> None:
    assert found["kernels"] < 1.5 * min(found["plain"], found["before"])


if __name__ == "__main__":
    report(differences)
