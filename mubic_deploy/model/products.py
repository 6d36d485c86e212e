"""Linear maps for NVIDIA GPUs in Triton, with what stands before and behind them: LayerNorm, GELU, a residual.

A compiler takes cuBLAS's product and gives LayerNorm and GELU kernels of their own, which start, read and write the
tokens once more. Here a tile is normalised as it is read, and what follows is done before it is written."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton


class Tile(NamedTuple):
    """Of a program: m rows by n columns of the result, k values of a row at a time; and how Triton is to build it."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


# by (N, K), those that were fastest on an H200: of the visual encoder's scales what the attention is projected with and
# the first map of the MLP. Its other products, and the finest scale's projection, were faster with kernels of their own
TILES = {
    (384, 96): Tile(64, 128, 32, 4, 4),
    (192, 192): Tile(128, 64, 64, 4, 4),
    (768, 192): Tile(128, 128, 64, 4, 3),
    (384, 384): Tile(64, 128, 64, 4, 3),
    (1536, 384): Tile(128, 128, 64, 8, 3),
    (768, 768): Tile(64, 128, 64, 4, 4),
    (3072, 768): Tile(64, 256, 64, 8, 3),
}


def pays(n: int, k: int) -> bool:
    """Whether a map from k to n channels is faster so."""
    return (n, k) in TILES


def tile(n: int, k: int) -> Tile:
    """Of a map from k to n channels, which pays."""
    return TILES[n, k]


@triton.jit
def _gelu(x):
    """x Phi(x), with the error function, to 7e-7: max(x, 0) - |x| Phi(-|x|), the logarithm of which is a polynomial. A
    third of the instructions of the library's error function, which took as long as the product."""
    a = tl.abs(x)
    power = a * -4.8810204e-4 + 7.1987180e-3
    power = power * a - 5.2146631e-2
    power = power * a - 0.45959584
    power = power * a - 1.1510005
    power = power * a - 1.0
    return tl.maximum(x, 0.0) - a * tl.exp2(power)


@triton.jit
def _moments(x_ptrs, first_ptr, k, EPS: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):
    """Mean and 1 / standard deviation of whole rows: [BM] each. Sums are of differences from a row's first value, which
    is nearer to its mean than 0 where that is large."""
    first = tl.load(first_ptr).to(tl.float32)
    total = tl.zeros([BM, BK], tl.float32)
    squares = tl.zeros([BM, BK], tl.float32)
    for i in tl.static_range((K + BK - 1) // BK):
        if K % BK == 0:
            off = tl.load(x_ptrs + i * BK).to(tl.float32) - first[:, None]
        else:
            inside = (k < K - i * BK)[None, :]
            off = tl.where(inside, tl.load(x_ptrs + i * BK, inside, 0.0).to(tl.float32) - first[:, None], 0.0)
        total += off
        squares += off * off
    mean = tl.sum(total, 1) / K
    var = tl.maximum(tl.sum(squares, 1) / K - mean * mean, 0.0)
    return mean + first, tl.rsqrt(var + EPS)


@triton.jit
def _joined(means, squares, share, EPS: tl.constexpr, K: tl.constexpr):
    """The same from means and sums of squared differences [parts, BM] of parts of the rows; share [parts, 1]."""
    mean = tl.sum(means * share, 0)
    off = means - mean[None, :]
    return mean, tl.rsqrt(tl.sum(off * off * share + squares / K, 0) + EPS)


@triton.jit(do_not_specialize=["M"])
def _product(
    x_ptr,
    weight_ptr,
    bias_ptr,
    sums_ptr,
    given_ptr,
    residual_ptr,
    out_ptr,
    moments_ptr,
    M,
    EPS: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    NORMED: tl.constexpr,
    GIVEN: tl.constexpr,
    PARTS: tl.constexpr,
    SPAN: tl.constexpr,
    BIAS: tl.constexpr,
    GELU: tl.constexpr,
    RESIDUAL: tl.constexpr,
    MOMENTS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """A tile of `product`. Programs that share rows follow each other."""
    COLUMNS: tl.constexpr = (N + BN - 1) // BN
    WHOLE: tl.constexpr = K % BK == 0
    number = tl.program_id(0)
    rows = number // COLUMNS * BM + tl.arange(0, BM)
    columns = number % COLUMNS * BN + tl.arange(0, BN)
    # beyond the end the last is read again, and not written: so no load has a condition
    row = tl.minimum(rows, M - 1).to(tl.int64)
    column = columns if N % BN == 0 else tl.minimum(columns, N - 1)
    k = tl.arange(0, BK)
    x_ptrs = x_ptr + row[:, None] * K + k[None, :]
    w_ptrs = weight_ptr + column[:, None] * K + k[None, :]

    # what is read beside the product is asked for before it, where registers last
    EARLY: tl.constexpr = BM * BN <= 8192
    # columns as they are: of clamped ones nobody knows that they lie side by side, and each would be read by itself
    at = row[:, None] * N + columns[None, :]
    written = (rows < M)[:, None]
    if N % BN != 0:
        written = written & (columns < N)[None, :]
    if BIAS and EARLY:
        bias = tl.load(bias_ptr + column)
    if RESIDUAL and EARLY:
        residual = tl.load(residual_ptr + at, written, 0.0)
    if NORMED and EARLY:
        sums = tl.load(sums_ptr + column)
    if GIVEN > 0:
        part = tl.arange(0, PARTS)[:, None]
        part_ptrs = given_ptr + part.to(tl.int64) * 2 * M + row[None, :]
        means = tl.load(part_ptrs, part < GIVEN, 0.0)
        squares = tl.load(part_ptrs + M, part < GIVEN, 0.0)
        share = tl.where(part < GIVEN, tl.minimum(SPAN, K - part * SPAN), 0) / K
        if not EARLY:
            mean, rstd = _joined(means, squares, share, EPS, K)
    elif NORMED:
        mean, rstd = _moments(x_ptrs, x_ptr + row * K, k, EPS, K, BM, BK)

    acc = tl.zeros([BM, BN], tl.float32)
    for i in range((K + BK - 1) // BK):
        if WHOLE:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs)
        else:
            inside = (k < K - i * BK)[None, :]
            x = tl.load(x_ptrs, inside, 0.0)
            w = tl.load(w_ptrs, inside, 0.0)
        acc = tl.dot(x, w.T, acc, input_precision="ieee")
        x_ptrs += BK
        w_ptrs += BK

    if NORMED:
        if GIVEN > 0 and EARLY:
            mean, rstd = _joined(means, squares, share, EPS, K)
        if not EARLY:
            sums = tl.load(sums_ptr + column)
        acc = (acc - mean[:, None] * sums[None, :]) * rstd[:, None]
    if BIAS:
        if not EARLY:
            bias = tl.load(bias_ptr + column)
        acc += bias.to(tl.float32)[None, :]
    if GELU:
        acc = _gelu(acc)
    if RESIDUAL:
        if not EARLY:
            residual = tl.load(residual_ptr + at, written, 0.0)
        acc += residual.to(tl.float32)
    out = acc.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at, out, written)
    if MOMENTS:
        there = (columns < N)[None, :]
        taken = tl.where(there, out.to(tl.float32), 0.0)
        n = tl.minimum(BN, N - number % COLUMNS * BN)
        mean_out = tl.sum(taken, 1) / n
        off_out = tl.where(there, taken - mean_out[:, None], 0.0)
        moments_ptr += (number % COLUMNS).to(tl.int64) * 2 * M
        tl.store(moments_ptr + row, mean_out, rows < M)
        tl.store(moments_ptr + M + row, tl.sum(off_out * off_out, 1), rows < M)


def launched(
    kernel: Any,
    chosen: Tile,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    sums: Tensor | None,
    given: Tensor | None,
    eps: float,
    gelu: bool,
    moments: bool,
) -> tuple[Tensor, Tensor | None]:
    """See `product` and `product_moments`. kernel: `_product`, as it is or as a compiler takes it."""
    n, k = weight.shape
    m = math.prod(x.shape[:-1])
    out = torch.empty((*x.shape[:-1], n), dtype=x.dtype, device=x.device)
    columns = -(-n // chosen.n)
    parts = torch.empty((columns, 2, m), dtype=torch.float32, device=x.device) if moments else None
    count = 0 if given is None or sums is None else given.shape[0]
    # a number that is no constant would be FP64 in Inductor's hands, and what it is added to
    sizes: dict[str, Any] = {"EPS": eps, "N": n, "K": k, "NORMED": sums is not None, "GIVEN": count}
    sizes |= {"PARTS": triton.next_power_of_2(max(count, 1)), "SPAN": span(k, count)}
    sizes |= {"BIAS": bias is not None, "GELU": gelu, "RESIDUAL": residual is not None, "MOMENTS": moments}
    sizes |= {"BM": chosen.m, "BN": chosen.n, "BK": chosen.k}
    kernel[(-(-m // chosen.m) * columns,)](
        x,
        weight,
        weight if bias is None else bias,
        weight if sums is None else sums,
        weight if given is None else given,
        x if residual is None else residual,
        out,
        x if parts is None else parts,
        m,
        **sizes,
        num_warps=chosen.warps,
        num_stages=chosen.stages,
    )
    return out, parts


def span(k: int, parts: int) -> int:
    """The width of a tile, of which so many make k values: a power of 2."""
    return triton.next_power_of_2(-(-k // parts)) if parts else 1


@triton_op("mubic_deploy::product", mutates_args=())
def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    sums: Tensor | None,
    given: Tensor | None,
    eps: float,
    gelu: bool,
) -> Tensor:
    """A linear map of rows, perhaps of normalised ones, with GELU or a residual behind it. Sums are FP32.

    x         [..., K], contiguous
    weight    [N, K]; bias [N] or None
    residual  [..., N], contiguous, added last, or None
    sums      [N] FP32, of the weight's rows, or None. With them each row of x less its mean over its standard deviation
              is what is mapped: (x W^T - mean sums) / deviation. It rounds less than normalising x first, because x is
              not rounded again, and costs no arithmetic on x; but takes a mean that is many deviations large from a sum
              that contains it, to FP32
    given     the moments of x from `product_moments`, else they are computed of x, by each tile of columns again
    eps       of the variance
    -> [..., N], of x's type"""
    given_all = (x, weight, bias, residual, sums, given, eps, gelu)
    return launched(wrap_triton(_product), tile(*weight.shape), *given_all, moments=False)[0]


@triton_op("mubic_deploy::product_moments", mutates_args=())
def product_moments(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    sums: Tensor | None,
    given: Tensor | None,
    eps: float,
    gelu: bool,
) -> tuple[Tensor, Tensor]:
    """`product`, and of its rows, by tile of columns, mean and sum of squared differences from it: [tiles, 2, rows]."""
    given_all = (x, weight, bias, residual, sums, given, eps, gelu)
    out, parts = launched(wrap_triton(_product), tile(*weight.shape), *given_all, moments=True)
    assert parts is not None
    return out, parts
