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

LARGEST_TILE = 8  # places
WARP_VALUES = 256  # of a tile, that a warp keeps in registers


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
    TILE: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """TILE places side by side of one group of channels. See `depthwise_norm`."""
    tile, group, sample = tl.program_id(0) - FIRST, tl.program_id(1), tl.program_id(2)
    c = tl.arange(0, D_BLOCK)
    inside = c < D
    column = group * D + c
    x_ptr += sample.to(tl.int64) * ((FIRST + T * H * W) * ROW) + START
    TILES: tl.constexpr = (WO + TILE - 1) // TILE
    row = tile // TILES  # of places
    t, h = row // HO, row % HO
    w = (tile % TILES) * TILE + tl.arange(0, TILE)
    if tile < 0:  # the class token, which is normalised only
        acc = tl.zeros([TILE, D_BLOCK], tl.float32)
        acc += tl.load(x_ptr + column, inside, 0.0).to(tl.float32)[None, :]
        token = tl.arange(0, TILE)
        kept = token < 1
    else:
        acc = tl.zeros([TILE, D_BLOCK], tl.float32)
        for tap in tl.static_range(27):
            t_in = t + (tap // 9 - 1)
            h_in = h * STRIDE + (tap // 3 % 3 - 1)
            w_in = w * STRIDE + (tap % 3 - 1)
            there = (t_in >= 0) & (t_in < T) & (h_in >= 0) & (h_in < H) & (w_in >= 0) & (w_in < W)
            place = FIRST + (t_in * H + h_in) * W + w_in
            values = tl.load(x_ptr + place[:, None] * ROW + column[None, :], there[:, None] & inside[None, :], 0.0)
            weights = tl.load(weight_ptr + tap * (GROUPS * D) + column, inside, 0.0)
            acc += values.to(tl.float32) * weights.to(tl.float32)[None, :]
        if BIAS:
            acc += tl.load(bias_ptr + column, inside, 0.0).to(tl.float32)[None, :]
        token = FIRST + row * WO + w
        kept = w < WO
    out = sample.to(tl.int64) * ((FIRST + T * HO * WO) * GROUPS * D) + token[:, None] * (GROUPS * D) + column[None, :]
    mask = kept[:, None] & inside[None, :]
    if RESIDUAL:
        acc += tl.load(residual_ptr + out, mask, 0.0).to(tl.float32)
    mean = tl.sum(acc, 1) / D  # what is not inside is 0
    offset = tl.where(inside[None, :], acc - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(offset * offset, 1) / D + eps)
    norm = group // SHARED * D + c
    scale, shift = tl.load(scale_ptr + norm, inside, 0.0), tl.load(shift_ptr + norm, inside, 0.0)
    y = offset * rstd[:, None] * scale.to(tl.float32)[None, :] + shift.to(tl.float32)[None, :]
    tl.store(out_ptr + out, y.to(out_ptr.dtype.element_ty), mask)


def tiling(width: int, channels: int) -> tuple[int, int]:
    """Places of a tile and warps, for a row of `width` places with groups of so many channels."""
    tile = 1
    while tile < LARGEST_TILE and width % (2 * tile) == 0:
        tile *= 2
    block = triton.next_power_of_2(channels)
    return tile, max(1, min(8, tile * block // WARP_VALUES))


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
    tile, warps = tiling(columns, d)
    sizes: dict[str, Any] = {"FIRST": first, "T": t, "H": h, "W": w, "HO": rows, "WO": columns, "STRIDE": stride}
    sizes |= {"ROW": x.shape[2], "START": start, "GROUPS": groups, "SHARED": groups // norms, "D": d}
    sizes |= {"D_BLOCK": triton.next_power_of_2(d), "TILE": tile}
    sizes |= {"BIAS": bias is not None, "RESIDUAL": residual is not None}
    tiles = first + t * rows * (-(-columns // tile))
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
        num_warps=warps,
    )
    return out
