"""Kernels for NVIDIA GPUs in Triton, of what a compiler makes slow ones: depth-wise convolutions with a LayerNorm.

Inductor sums the 27 products of a place at a time, and reads the 27 rows of weights again for each; and it wants the
grid copied into one with a rim of zeros. Here neighbours share what they read, and the rim is a condition."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

PLACES = 4  # side by side, of which a program makes the sums; the kernel is written for as many
LANE = 4  # channels of a thread


@triton.jit
def _column(row_ptr, w, there, W: tl.constexpr, ROW: tl.constexpr, inside):
    """Channels of one place in FP32, zeros beside the grid."""
    return tl.load(row_ptr + w * ROW, inside & (there & (w >= 0) & (w < W)), 0.0).to(tl.float32)


@triton.jit
def _summed(a, x0, x1, x2, k0, k1, k2):
    """The products of a place with three columns, on top of `a`."""
    a += x0 * k0
    a += x1 * k1
    a += x2 * k2
    return a


@triton.jit
def _normed(acc, residual_ptr, out_ptr, at, inside, scale, shift, eps, D: tl.constexpr, RESIDUAL: tl.constexpr):
    """LayerNorm of one place, written at `at` where that is inside."""
    if RESIDUAL:
        acc += tl.load(residual_ptr + at, inside, 0.0).to(tl.float32)
    mean = tl.sum(acc, 0) / D  # what is not inside is 0
    offset = tl.where(inside, acc - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(offset * offset, 0) / D + eps)
    tl.store(out_ptr + at, (offset * rstd * scale + shift).to(out_ptr.dtype.element_ty), inside)


@triton.jit
def _depthwise_norm(
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    scale_ptr,
    shift_ptr,
    out_ptr,
    eps,
    FIRST: tl.constexpr,
    T: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    HO: tl.constexpr,
    WO: tl.constexpr,
    STRIDE: tl.constexpr,
    ROW: tl.constexpr,
    START: tl.constexpr,
    GROUPS: tl.constexpr,
    SHARED: tl.constexpr,
    D: tl.constexpr,
    D_BLOCK: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """Four places side by side of one group of channels, which share the weights and, where the stride is small, the
    columns that they read. See `depthwise_norm`."""
    tile, group, sample = tl.program_id(0) - FIRST, tl.program_id(1), tl.program_id(2)
    c = tl.arange(0, D_BLOCK)
    inside = c < D
    column = group * D + c
    x_ptr += sample.to(tl.int64) * ((FIRST + T * H * W) * ROW) + START + column
    out_ptr += sample.to(tl.int64) * ((FIRST + T * HO * WO) * GROUPS * D)
    residual_ptr += sample.to(tl.int64) * ((FIRST + T * HO * WO) * GROUPS * D)
    norm = group // SHARED * D + c
    scale = tl.load(scale_ptr + norm, inside, 0.0).to(tl.float32)
    shift = tl.load(shift_ptr + norm, inside, 0.0).to(tl.float32)
    if tile < 0:  # the class token, which is normalised only
        token = tl.load(x_ptr, inside, 0.0).to(tl.float32)
        _normed(token, residual_ptr, out_ptr, column, inside, scale, shift, eps, D, RESIDUAL)
    else:
        TILES: tl.constexpr = (WO + 3) // 4
        row = tile // TILES  # of places
        t, h = row // HO, row % HO
        first = (tile % TILES) * 4
        a0 = tl.zeros([D_BLOCK], tl.float32)
        if BIAS:
            a0 += tl.load(bias_ptr + column, inside, 0.0).to(tl.float32)
        a1 = a0
        a2 = a0
        a3 = a0
        for i in tl.static_range(9):
            t_in = t + (i // 3 - 1)
            h_in = h * STRIDE + (i % 3 - 1)
            there = (t_in >= 0) & (t_in < T) & (h_in >= 0) & (h_in < H)
            row_ptr = x_ptr + (FIRST + (t_in * H + h_in) * W) * ROW
            w = first * STRIDE - 1
            k = weight_ptr + i * 3 * GROUPS * D + column
            k0 = tl.load(k, inside, 0.0).to(tl.float32)
            k1 = tl.load(k + GROUPS * D, inside, 0.0).to(tl.float32)
            k2 = tl.load(k + 2 * GROUPS * D, inside, 0.0).to(tl.float32)
            x0 = _column(row_ptr, w, there, W, ROW, inside)
            x1 = _column(row_ptr, w + 1, there, W, ROW, inside)
            x2 = _column(row_ptr, w + 2, there, W, ROW, inside)
            a0 = _summed(a0, x0, x1, x2, k0, k1, k2)
            if STRIDE == 1:
                x3 = _column(row_ptr, w + 3, there, W, ROW, inside)
                x4 = _column(row_ptr, w + 4, there, W, ROW, inside)
                x5 = _column(row_ptr, w + 5, there, W, ROW, inside)
                a1 = _summed(a1, x1, x2, x3, k0, k1, k2)
                a2 = _summed(a2, x2, x3, x4, k0, k1, k2)
                a3 = _summed(a3, x3, x4, x5, k0, k1, k2)
            else:
                x0 = x2 if STRIDE == 2 else _column(row_ptr, w + STRIDE, there, W, ROW, inside)
                x1 = _column(row_ptr, w + STRIDE + 1, there, W, ROW, inside)
                x2 = _column(row_ptr, w + STRIDE + 2, there, W, ROW, inside)
                a1 = _summed(a1, x0, x1, x2, k0, k1, k2)
                x0 = x2 if STRIDE == 2 else _column(row_ptr, w + 2 * STRIDE, there, W, ROW, inside)
                x1 = _column(row_ptr, w + 2 * STRIDE + 1, there, W, ROW, inside)
                x2 = _column(row_ptr, w + 2 * STRIDE + 2, there, W, ROW, inside)
                a2 = _summed(a2, x0, x1, x2, k0, k1, k2)
                x0 = x2 if STRIDE == 2 else _column(row_ptr, w + 3 * STRIDE, there, W, ROW, inside)
                x1 = _column(row_ptr, w + 3 * STRIDE + 1, there, W, ROW, inside)
                x2 = _column(row_ptr, w + 3 * STRIDE + 2, there, W, ROW, inside)
                a3 = _summed(a3, x0, x1, x2, k0, k1, k2)
        at = (FIRST + row * WO + first) * (GROUPS * D) + column
        _normed(a0, residual_ptr, out_ptr, at, inside, scale, shift, eps, D, RESIDUAL)
        at += GROUPS * D
        _normed(a1, residual_ptr, out_ptr, at, inside & (first + 1 < WO), scale, shift, eps, D, RESIDUAL)
        at += GROUPS * D
        _normed(a2, residual_ptr, out_ptr, at, inside & (first + 2 < WO), scale, shift, eps, D, RESIDUAL)
        at += GROUPS * D
        _normed(a3, residual_ptr, out_ptr, at, inside & (first + 3 < WO), scale, shift, eps, D, RESIDUAL)


@triton_op("mubic_deploy::depthwise_norm", mutates_args=())
def depthwise_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    first: int,
    grid: list[int],
    stride: int,
    start: int,
) -> Tensor:
    """A depth-wise 3 x 3 x 3 convolution with padding 1 and stride (1, stride, stride), and LayerNorm, in FP32 between.

    x         [B, first + t h w, row], contiguous; the convolution takes the channels from `start` on
    weight    [27, groups d]; bias [groups d] or None
    residual  [B, first + t h' w', groups d], added before the norm, or None
    scale, shift  [norms, d]: groups side by side share them, groups / norms of them
    first     1 where a class token is first, which is normalised only; else 0
    grid      [t, h, w]
    -> [B, first + t h' w', groups d], of x's type"""
    t, h, w = grid
    rows, columns = -(-h // stride), -(-w // stride)
    norms, d = scale.shape
    channels = weight.shape[1]
    groups = channels // d
    out = torch.empty((x.shape[0], first + t * rows * columns, channels), dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(d)
    sizes: dict[str, Any] = {"FIRST": first, "T": t, "H": h, "W": w, "HO": rows, "WO": columns, "STRIDE": stride}
    sizes |= {"ROW": x.shape[2], "START": start, "GROUPS": groups, "SHARED": groups // norms, "D": d}
    sizes |= {"D_BLOCK": block, "BIAS": bias is not None, "RESIDUAL": residual is not None}
    tiles = first + t * rows * -(-columns // PLACES)
    wrap_triton(_depthwise_norm)[(tiles, groups, x.shape[0])](
        x,
        weight,
        weight if bias is None else bias,
        x if residual is None else residual,
        scale,
        shift,
        out,
        eps,
        **sizes,
        num_warps=min(8, max(1, block // (32 * LANE))),
    )
    return out
