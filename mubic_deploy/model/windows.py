"""Dense convolutions of channels last for NVIDIA GPUs in Triton: products with windows that are read where they lie.

A compiler gathers the windows, takes cuBLAS's product and gives what follows a kernel of its own. At a denoising step's
few rows these three start one after the other for longer than they compute. Here a tile's windows are read from the
grid, zeros beside it are a condition, and ReLU, modulation and residual are done before it is written."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton


class Tile(NamedTuple):
    """Of a program: m places by n columns of the result, k values of a window at a time, one of the parts into which
    windows are taken apart: `split` for a clip, fewer where several clips make as many programs; and how Triton is to
    build it."""

    m: int
    n: int
    k: int
    split: int
    warps: int
    stages: int


FINISH = (8, 64)  # places and columns of a program that adds parts up
DEFAULT = Tile(64, 64, 64, 1, 4, 4)
TILES = {  # by (N, K): those that were fastest for one clip on an H200
    (1024, 2304): Tile(64, 64, 64, 4, 4, 4),  # the noise encoder's stages, from the last one on
    (512, 4608): Tile(64, 64, 64, 8, 4, 4),
    (512, 1152): Tile(64, 32, 64, 1, 4, 5),
    (256, 2304): Tile(64, 64, 64, 4, 4, 4),
    (256, 576): Tile(64, 64, 64, 1, 4, 4),
    (128, 1152): Tile(64, 32, 128, 1, 4, 4),
    (128, 24): Tile(64, 128, 32, 1, 4, 2),
    (64, 576): Tile(64, 64, 64, 1, 4, 4),
    (24, 72): Tile(64, 32, 128, 1, 4, 1),  # the decoder's temporal convolutions
    (48, 144): Tile(128, 64, 64, 1, 4, 3),
    (128, 384): Tile(64, 64, 64, 1, 4, 5),
    (256, 768): Tile(64, 32, 128, 1, 4, 4),
    (24, 192): Tile(64, 32, 64, 1, 4, 3),  # its collapse
}


def tile(n: int, k: int) -> Tile:
    """Of windows of k values to n channels."""
    return TILES.get((n, k), DEFAULT)


@triton.jit
def _beside(
    rows,
    columns,
    bias_ptr,
    modulation_ptr,
    residual_ptr,
    M,
    N: tl.constexpr,
    PLACES: tl.constexpr,
    MODULATED: tl.constexpr,
    SHARED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    RESIDUAL_ROW: tl.constexpr,
    RESIDUAL_START: tl.constexpr,
):
    """What is read beside a product: bias, scale and shift, residual. Zeros where there is none."""
    inside = columns < N
    bias = tl.load(bias_ptr + columns, inside, 0.0).to(tl.float32)[None, :]
    scale = tl.zeros([1, 1], tl.float32)
    shift = scale
    residual = scale
    if MODULATED > 0:
        taken = columns < MODULATED
        if SHARED:
            scale = tl.load(modulation_ptr + columns, taken, 0.0).to(tl.float32)[None, :]
            shift = tl.load(modulation_ptr + MODULATED + columns, taken, 0.0).to(tl.float32)[None, :]
        else:
            at = (rows // PLACES * (2 * MODULATED))[:, None] + columns[None, :]
            taken = taken[None, :] & (rows < M)[:, None]
            scale = tl.load(modulation_ptr + at, taken, 0.0).to(tl.float32)
            shift = tl.load(modulation_ptr + MODULATED + at, taken, 0.0).to(tl.float32)
    if RESIDUAL:
        at = (rows.to(tl.int64) * RESIDUAL_ROW)[:, None] + (RESIDUAL_START + columns)[None, :]
        residual = tl.load(residual_ptr + at, inside[None, :] & (rows < M)[:, None], 0.0).to(tl.float32)
    return bias, scale, shift, residual


@triton.jit
def _relu(x):
    """NaN stays: where something is wrong, no map shall look right."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _finished(
    acc,
    bias,
    scale,
    shift,
    residual,
    rows,
    columns,
    out_ptr,
    M,
    N: tl.constexpr,
    MODULATED: tl.constexpr,
    RELU: tl.constexpr,
):
    """What follows a product, written."""
    acc += bias
    if MODULATED > 0:
        modulated = _relu(acc * (1 + scale) + shift)
        acc = tl.where((columns < MODULATED)[None, :], modulated, acc)
    if RELU == 2:  # BEFORE
        acc = _relu(acc)
    acc += residual
    if RELU == 1:  # LAST
        acc = _relu(acc)
    at = (rows.to(tl.int64) * N)[:, None] + columns[None, :]
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), (rows < M)[:, None] & (columns < N)[None, :])


@triton.jit(do_not_specialize=["M", "parts"])
def _window_product(
    x_ptr,
    weight_ptr,
    bias_ptr,
    modulation_ptr,
    residual_ptr,
    out_ptr,
    M,
    parts,
    T: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    TO: tl.constexpr,
    HO: tl.constexpr,
    WO: tl.constexpr,
    KT: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    ST: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PT: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    C: tl.constexpr,
    ROW: tl.constexpr,
    N: tl.constexpr,
    MODULATED: tl.constexpr,
    SHARED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    RESIDUAL_ROW: tl.constexpr,
    RESIDUAL_START: tl.constexpr,
    RELU: tl.constexpr,
    SPLIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """A tile of `window_product`, or of one part of it. Programs that share windows follow each other."""
    K: tl.constexpr = KT * KH * KW * C
    STEPS: tl.constexpr = (K + BK - 1) // BK
    COLUMNS: tl.constexpr = (N + BN - 1) // BN
    PLACES: tl.constexpr = TO * HO * WO
    number = tl.program_id(0)
    rows = number // COLUMNS * BM + tl.arange(0, BM)
    columns = number % COLUMNS * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    place = rows % PLACES
    # where a window begins, which may lie beside the grid
    t = place // (HO * WO) * ST - PT
    h = place // WO % HO * SH - PH
    w = place % WO * SW - PW
    first = (rows // PLACES).to(tl.int64) * (T * H * W * ROW) + ((t * H + h) * W + w) * ROW
    x_ptrs = x_ptr + first[:, None] + k[None, :]
    column = columns if N % BN == 0 else tl.minimum(columns, N - 1)
    w_ptrs = weight_ptr + column[:, None] * K + k[None, :]
    if SPLIT == 1:  # asked for before the product, so that it is there behind it
        bias, scale, shift, residual = _beside(
            rows,
            columns,
            bias_ptr,
            modulation_ptr,
            residual_ptr,
            M,
            N,
            PLACES,
            MODULATED,
            SHARED,
            RESIDUAL,
            RESIDUAL_ROW,
            RESIDUAL_START,
        )
    steps = STEPS if SPLIT == 1 else (STEPS + parts - 1) // parts
    begin = tl.program_id(1) * steps
    acc = tl.zeros([BM, BN], tl.float32)
    for i in range(begin, tl.minimum(begin + steps, STEPS)):
        if C % BK == 0:  # of one place of the windows
            tap = i // (C // BK)
            dt, dh, dw = tap // (KH * KW), tap // KW % KH, tap % KW
            there = (rows < M) & (t + dt >= 0) & (t + dt < T)
            there = there & (h + dh >= 0) & (h + dh < H) & (w + dw >= 0) & (w + dw < W)
            x = tl.load(x_ptrs + (((dt * H + dh) * W + dw) * ROW + i % (C // BK) * BK), there[:, None], 0.0)
            weight = tl.load(w_ptrs + i * BK)
        else:
            at = i * BK + k
            tap = at // C
            dt, dh, dw = (tap // (KH * KW))[None, :], (tap // KW % KH)[None, :], (tap % KW)[None, :]
            inside = (at < K)[None, :]
            there = inside & (rows < M)[:, None]
            if KT > 1 or PT > 0:
                there = there & (t[:, None] + dt >= 0) & (t[:, None] + dt < T)
            if KH > 1 or PH > 0:
                there = there & (h[:, None] + dh >= 0) & (h[:, None] + dh < H)
            if KW > 1 or PW > 0:
                there = there & (w[:, None] + dw >= 0) & (w[:, None] + dw < W)
            apart = ((dt * H + dh) * W + dw) * ROW + (at % C)[None, :]
            x = tl.load(x_ptr + first[:, None] + apart, there, 0.0)
            weight = tl.load(w_ptrs + i * BK, inside, 0.0)
        acc = tl.dot(x.to(weight.dtype), weight.T, acc, input_precision="ieee")
    if SPLIT == 1:
        _finished(acc, bias, scale, shift, residual, rows, columns, out_ptr, M, N, MODULATED, RELU)
    else:
        at = ((rows + tl.program_id(1) * M).to(tl.int64) * N)[:, None] + columns[None, :]
        tl.store(out_ptr + at, acc, (rows < M)[:, None] & (columns < N)[None, :])


@triton.jit(do_not_specialize=["M", "parts"])
def _parts_added(
    parts_ptr,
    bias_ptr,
    modulation_ptr,
    residual_ptr,
    out_ptr,
    M,
    parts,
    N: tl.constexpr,
    PLACES: tl.constexpr,
    MODULATED: tl.constexpr,
    SHARED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    RESIDUAL_ROW: tl.constexpr,
    RESIDUAL_START: tl.constexpr,
    RELU: tl.constexpr,
    SPLIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """The parts of `_window_product` and what follows them."""
    COLUMNS: tl.constexpr = (N + BN - 1) // BN
    number = tl.program_id(0)
    rows = number // COLUMNS * BM + tl.arange(0, BM)
    columns = number % COLUMNS * BN + tl.arange(0, BN)
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    acc = tl.zeros([BM, BN], tl.float32)
    for part in tl.static_range(SPLIT):  # unrolled, so that all are asked for at once
        at = ((rows + part * M).to(tl.int64) * N)[:, None] + columns[None, :]
        acc += tl.load(parts_ptr + at, inside & (part < parts), 0.0)
    bias, scale, shift, residual = _beside(
        rows,
        columns,
        bias_ptr,
        modulation_ptr,
        residual_ptr,
        M,
        N,
        PLACES,
        MODULATED,
        SHARED,
        RESIDUAL,
        RESIDUAL_ROW,
        RESIDUAL_START,
    )
    _finished(acc, bias, scale, shift, residual, rows, columns, out_ptr, M, N, MODULATED, RELU)


def launched(
    kernels: tuple[Any, Any],
    chosen: Tile,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    modulation: Tensor | None,
    residual: Tensor | None,
    kernel: list[int],
    stride: list[int],
    rim: list[int],
    start: int,
    relu: int,
) -> Tensor:
    """See `window_product`. kernels: `_window_product` and `_parts_added`, as they are or as a compiler takes them."""
    batch, *grid, row = x.shape
    n, k = weight.shape
    before, behind = rim[-2::-2], rim[::-2]
    sizes = zip(grid, kernel, stride, before, behind, strict=True)
    reached = [(size + p + q - width) // step + 1 for size, width, step, p, q in sizes]
    one, none = [1] * (3 - len(grid)), [0] * (3 - len(grid))
    shape: dict[str, Any] = dict(zip("THW", one + grid, strict=True))
    shape |= dict(zip(("TO", "HO", "WO"), one + reached, strict=True))
    shape |= dict(zip(("KT", "KH", "KW"), one + kernel, strict=True))
    shape |= dict(zip(("ST", "SH", "SW"), one + stride, strict=True))
    shape |= dict(zip(("PT", "PH", "PW"), none + before, strict=True))
    places = math.prod(reached)
    m = batch * places
    ending: dict[str, Any] = {"N": n, "RELU": relu, "SPLIT": chosen.split}
    ending |= {"MODULATED": 0 if modulation is None else modulation.shape[1] // 2}
    ending |= {"SHARED": modulation is not None and modulation.shape[0] == 1, "RESIDUAL": residual is not None}
    ending |= {"RESIDUAL_ROW": 0 if residual is None else residual.shape[-1], "RESIDUAL_START": start}
    out = torch.empty((batch, *reached, n), dtype=weight.dtype, device=x.device)
    parts = (chosen.split + batch - 1) // batch
    sums = torch.empty((parts, m, n), dtype=torch.float32, device=x.device) if chosen.split > 1 else out
    beside = (bias, weight if modulation is None else modulation, weight if residual is None else residual)
    product, added = kernels
    product[(-(-m // chosen.m) * -(-n // chosen.n), parts)](
        x,
        weight,
        *beside,
        sums,
        m,
        parts,
        **shape,
        C=k // math.prod(kernel),
        ROW=row,
        **ending,
        BM=chosen.m,
        BN=chosen.n,
        BK=chosen.k,
        num_warps=chosen.warps,
        num_stages=chosen.stages,
    )
    if chosen.split > 1:
        rows, columns = FINISH
        added[(-(-m // rows) * -(-n // columns),)](
            sums, *beside, out, m, parts, PLACES=places, **ending, BM=rows, BN=columns, num_warps=4, num_stages=1
        )
    return out


@triton_op("mubic_deploy::window_product", mutates_args=())
def window_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    modulation: Tensor | None,
    residual: Tensor | None,
    kernel: list[int],
    stride: list[int],
    rim: list[int],
    start: int,
    relu: int,
) -> Tensor:
    """A dense convolution over two or three axes, with what follows it. Sums are FP32, and so is all behind them.

    x           [B, *grid, row], contiguous; the convolution takes the first C channels, of which the weight tells
    weight      [N, prod(kernel) C], contiguous; bias [N]
    modulation  [1 or B, 2 D], scale and shift of the first D columns y: relu(y (1 + scale) + shift); or None
    residual    [B, *grid', row], contiguous, added to the columns; the first of it is `start`; or None
    rim         zeros before and behind each axis, the last axis first
    relu        of what is left, as `layers` names it: NO_RELU. LAST: relu(y + residual). BEFORE: relu(y) + residual
    -> [B, *grid', N], of the weight's type"""
    kernels = (wrap_triton(_window_product), wrap_triton(_parts_added))
    return launched(
        kernels, tile(*weight.shape), x, weight, bias, modulation, residual, kernel, stride, rim, start, relu
    )
