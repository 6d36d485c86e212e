"""Kernels for NVIDIA GPUs in Triton, of what a compiler makes slow ones: depth-wise convolutions with a LayerNorm.

Inductor sums the 27 products of a place at a time, and reads the 27 rows of weights again for each; and it wants the
grid copied into one with a rim of zeros. Here neighbours share what they read, and the rim is a condition.

A program makes a tile of places: some side by side, at some times one after the other, which are read once for all of
them. In a row of its tensors lie channels of one group; another row is another group, or the next tile. Channels that
are three times a power of two lie in three tensors, so that no thread is without any."""

# mypy: disable-error-code="assignment"
# ruff: noqa: RUF005 (Triton knows sums of tuples, and no stars in them)
from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton


class Tile(NamedTuple):
    """What a program makes: places at `times` times x `columns` columns, `rows` times."""

    times: int
    columns: int
    rows: int


LANE = 2  # channels of a thread in a tensor
PAIRED = Tile(2, 4, 2)  # of queries, keys and values: of those tried on an H200 the fastest at nearly every scale


class Launch(NamedTuple):
    """The kernel's constants, its programs, places of the output, and warps of a program."""

    sizes: dict[str, Any]
    programs: int
    places: int
    warps: int


@triton.jit
def _columns(
    x_ptr,
    there,
    first,
    ALWAYS: tl.constexpr,
    W: tl.constexpr,
    STRIDE: tl.constexpr,
    ROW: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The columns that places side by side take from a row of the grid, in FP32, zeros where it is not `there` (which
    is so if ALWAYS) or beside it."""
    WO: tl.constexpr = (W + STRIDE - 1) // STRIDE
    out = ()
    for i in tl.static_range((COLUMNS - 1) * STRIDE + 3):
        if STRIDE < 3 or i % STRIDE < 3:  # else no place takes it: the last one stands there
            if i == 0:
                beside = first > 0
                if WO % WIDE != 0:  # then a program's other tile may be beyond the grid
                    beside = beside & (first * STRIDE <= W)
                x = tl.load(x_ptr, there & beside, 0.0)
            elif WO % WIDE != 0 or (WO - COLUMNS) * STRIDE + i > W:
                x = tl.load(x_ptr + i * ROW, there & (first * STRIDE + (i - 1) < W), 0.0)
            elif ALWAYS:
                x = tl.load(x_ptr + i * ROW)
            else:
                x = tl.load(x_ptr + i * ROW, there, 0.0)
            y = x.to(tl.float32)
        out = out + (y,)
    return out


@triton.jit
def _added(
    sums,
    x_ptr,
    weight_ptr,
    t,
    first,
    T: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    STRIDE: tl.constexpr,
    ROW: tl.constexpr,
    CHANNELS: tl.constexpr,
    TIMES: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The products of a tile with one row of the grid, at all times that it takes, on top of `sums`."""
    k = ()
    for i in tl.static_range(9):
        k = k + (tl.load(weight_ptr + (i // 3 * 9 + i % 3) * CHANNELS).to(tl.float32),)
    for i in tl.static_range(TIMES + 2):
        if TIMES < T or (i > 0 and i <= T):
            if TIMES >= T or (T % TIMES == 0 and i > 0 and i <= TIMES):
                x = _columns(x_ptr + i * (H * W * ROW), True, first, True, W, STRIDE, ROW, COLUMNS, WIDE)
            else:
                now = (t + (i - 1) >= 0) & (t + (i - 1) < T)
                x = _columns(x_ptr + i * (H * W * ROW), now, first, False, W, STRIDE, ROW, COLUMNS, WIDE)
            new = ()
            for j in tl.static_range(TIMES * COLUMNS):
                a = sums[j]
                if i - j // COLUMNS >= 0 and i - j // COLUMNS < 3:
                    a += x[j % COLUMNS * STRIDE] * k[(i - j // COLUMNS) * 3]
                    a += x[j % COLUMNS * STRIDE + 1] * k[(i - j // COLUMNS) * 3 + 1]
                    a += x[j % COLUMNS * STRIDE + 2] * k[(i - j // COLUMNS) * 3 + 2]
                new = new + (a,)
            sums = new
    return sums


@triton.jit
def _summed(
    x_ptr,
    weight_ptr,
    bias_ptr,
    t,
    h,
    first,
    T: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    STRIDE: tl.constexpr,
    ROW: tl.constexpr,
    CHANNELS: tl.constexpr,
    BIAS: tl.constexpr,
    TIMES: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The convolution of a tile, place by place."""
    a = tl.zeros(weight_ptr.shape, tl.float32)
    if BIAS:
        a += tl.load(bias_ptr).to(tl.float32)
    sums = ()
    for _ in tl.static_range(TIMES * COLUMNS):
        sums = sums + (a,)
    top = h * STRIDE - 1
    x_ptr += (((t - 1) * H + top) * W + first * STRIDE - 1) * ROW
    STEP: tl.constexpr = W * ROW
    for i in range(tl.maximum(-top, 0), tl.minimum(H - top, 3)):  # a loop is fewer instructions to fetch
        row, k = x_ptr + i * STEP, weight_ptr + i * (3 * CHANNELS)
        sums = _added(sums, row, k, t, first, T, H, W, STRIDE, ROW, CHANNELS, TIMES, COLUMNS, WIDE)
    return sums


@triton.jit
def _total(parts, PARTS: tl.constexpr):
    total = parts[0]
    for i in tl.static_range(PARTS - 1):
        total += parts[i + 1]
    return tl.sum(total, 1)[:, None]


@triton.jit
def _normed(
    parts,
    residual_ptr,
    out_ptr,
    at,
    inside,
    there,
    scale,
    shift,
    eps: tl.constexpr,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """LayerNorm of one place, whose channels are `inside`, written at `at` if it is `there`."""
    own = ()
    for i in tl.static_range(PARTS):
        a = parts[i]
        if RESIDUAL:
            a += tl.load(residual_ptr + at[i], there & inside, 0.0).to(tl.float32)
        own = own + (tl.where(inside, a, 0.0),)
    mean = _total(own, PARTS) / D
    offsets = ()
    squares = ()
    for i in tl.static_range(PARTS):
        offset = own[i] - tl.where(inside, mean, 0.0)
        offsets = offsets + (offset,)
        squares = squares + (offset * offset,)
    rstd = tl.rsqrt(_total(squares, PARTS) / D + eps)
    for i in tl.static_range(PARTS):
        y = offsets[i] * rstd * scale[i] + shift[i]
        tl.store(out_ptr + at[i], y.to(out_ptr.dtype.element_ty), there & inside)


@triton.jit
def _program(
    program,
    sample,
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    scale_ptr,
    shift_ptr,
    out_ptr,
    eps: tl.constexpr,
    FIRST: tl.constexpr,
    T: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    STRIDE: tl.constexpr,
    ROW: tl.constexpr,
    START: tl.constexpr,
    GROUPS: tl.constexpr,
    SHARED: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    TIMES: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One tile. See `depthwise_norm` and `Tile`."""
    HO: tl.constexpr = (H + STRIDE - 1) // STRIDE
    WO: tl.constexpr = (W + STRIDE - 1) // STRIDE
    CHANNELS: tl.constexpr = GROUPS * D
    BESIDE: tl.constexpr = GROUPS % ROWS != 0  # the rows are tiles side by side
    WIDE: tl.constexpr = COLUMNS * (ROWS if BESIDE else 1)
    TILES: tl.constexpr = (WO + WIDE - 1) // WIDE
    EACH: tl.constexpr = FIRST + (T + TIMES - 1) // TIMES * HO * TILES
    tile = program % EACH - FIRST
    each = tl.arange(0, ROWS)[:, None]
    if BESIDE:
        group = program // EACH + each * 0
        first = tile % TILES * WIDE + each * COLUMNS
    else:
        group = program // EACH * ROWS + each
        first = tile % TILES * WIDE
    c = tl.arange(0, BLOCK)[None, :]
    inside = True
    if BLOCK * PARTS > D:
        inside = c < D
        c = c % D
    scale = ()
    shift = ()
    at = ()
    for i in tl.static_range(PARTS):
        norm = group // SHARED * D + (i * BLOCK + c)
        scale = scale + (tl.load(scale_ptr + norm).to(tl.float32),)
        shift = shift + (tl.load(shift_ptr + norm).to(tl.float32),)
        at = at + (group * D + (i * BLOCK + c),)
    x_ptr += sample.to(tl.int64) * ((FIRST + T * H * W) * ROW) + START
    out_ptr += sample.to(tl.int64) * ((FIRST + T * HO * WO) * CHANNELS)
    residual_ptr += sample.to(tl.int64) * ((FIRST + T * HO * WO) * CHANNELS)
    if tile < 0:  # the class token, which is normalised only
        token = ()
        for i in tl.static_range(PARTS):
            token = token + (tl.load(x_ptr + at[i]).to(tl.float32),)
        _normed(token, residual_ptr, out_ptr, at, inside, True, scale, shift, eps, D, PARTS, RESIDUAL)
    else:
        t = tile // TILES // HO * TIMES
        h = tile // TILES % HO
        sums = ()
        for i in tl.static_range(PARTS):
            x, k, bias = x_ptr + FIRST * ROW + at[i], weight_ptr + at[i], bias_ptr + at[i]
            more = _summed(x, k, bias, t, h, first, T, H, W, STRIDE, ROW, CHANNELS, BIAS, TIMES, COLUMNS, WIDE)
            sums = sums + (more,)
        place = (FIRST + (t * HO + h) * WO + first) * CHANNELS
        for j in tl.static_range(TIMES * COLUMNS):
            there = True
            if WO % WIDE != 0:
                there = first + j % COLUMNS < WO
            if T % TIMES != 0:
                there = there & (t + j // COLUMNS < T)
            parts = ()
            to = ()
            for i in tl.static_range(PARTS):
                parts = parts + (sums[i][j],)
                to = to + (place + at[i],)
            step = (j // COLUMNS * HO * WO + j % COLUMNS) * CHANNELS
            residual, out = residual_ptr + step, out_ptr + step
            _normed(parts, residual, out, to, inside, there, scale, shift, eps, D, PARTS, RESIDUAL)


@triton.jit
def _depthwise_norm(
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    scale_ptr,
    shift_ptr,
    out_ptr,
    eps: tl.constexpr,
    FIRST: tl.constexpr,
    T: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    ROW: tl.constexpr,
    D: tl.constexpr,
    STRIDE: tl.constexpr,
    START: tl.constexpr,
    GROUPS: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    TIMES: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    program, sample = tl.program_id(0), tl.program_id(1)
    _program(
        program,
        sample,
        x_ptr,
        weight_ptr,
        bias_ptr,
        residual_ptr,
        scale_ptr,
        shift_ptr,
        out_ptr,
        eps,
        FIRST,
        T,
        H,
        W,
        STRIDE,
        ROW,
        START,
        GROUPS,
        SHARED,
        D,
        BLOCK,
        PARTS,
        BIAS,
        RESIDUAL,
        TIMES,
        COLUMNS,
        ROWS,
    )


@triton.jit
def _depthwise_norms(
    x_ptr,
    weight_ptr,
    scale_ptr,
    shift_ptr,
    out_ptr,
    weight2_ptr,
    scale2_ptr,
    shift2_ptr,
    out2_ptr,
    eps: tl.constexpr,
    FIRST: tl.constexpr,
    T: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    ROW: tl.constexpr,
    D: tl.constexpr,
    PROGRAMS: tl.constexpr,
    STRIDE: tl.constexpr,
    START: tl.constexpr,
    GROUPS: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    TIMES: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    STRIDE2: tl.constexpr,
    START2: tl.constexpr,
    GROUPS2: tl.constexpr,
    SHARED2: tl.constexpr,
    BLOCK2: tl.constexpr,
    PARTS2: tl.constexpr,
    TIMES2: tl.constexpr,
    COLUMNS2: tl.constexpr,
    ROWS2: tl.constexpr,
):
    """PROGRAMS programs for the first of two, the others for the second."""
    program, sample = tl.program_id(0), tl.program_id(1)
    if program < PROGRAMS:
        _program(
            program,
            sample,
            x_ptr,
            weight_ptr,
            x_ptr,
            x_ptr,
            scale_ptr,
            shift_ptr,
            out_ptr,
            eps,
            FIRST,
            T,
            H,
            W,
            STRIDE,
            ROW,
            START,
            GROUPS,
            SHARED,
            D,
            BLOCK,
            PARTS,
            False,
            False,
            TIMES,
            COLUMNS,
            ROWS,
        )
    else:
        _program(
            program - PROGRAMS,
            sample,
            x_ptr,
            weight2_ptr,
            x_ptr,
            x_ptr,
            scale2_ptr,
            shift2_ptr,
            out2_ptr,
            eps,
            FIRST,
            T,
            H,
            W,
            STRIDE2,
            ROW,
            START2,
            GROUPS2,
            SHARED2,
            D,
            BLOCK2,
            PARTS2,
            False,
            False,
            TIMES2,
            COLUMNS2,
            ROWS2,
        )


def tiled(first: int, grid: list[int], stride: int, start: int, channels: int, norms: Tensor, tile: Tile) -> Launch:
    """How a convolution of `channels` is launched in these tiles."""
    t, h, w = grid
    d = norms.shape[1]
    groups = channels // d
    third = d % 3 == 0 and triton.next_power_of_2(d // 3) == d // 3
    block = d // 3 if third else triton.next_power_of_2(d)
    together, beside = (tile.rows, 1) if groups % tile.rows == 0 else (1, tile.rows)
    columns = -(-w // stride)
    tiles = -(-t // tile.times) * -(-h // stride) * -(-columns // (tile.columns * beside))
    sizes = {"STRIDE": stride, "START": start, "GROUPS": groups, "SHARED": groups // norms.shape[0], "BLOCK": block}
    sizes |= {"PARTS": 3 if third else 1, "TIMES": tile.times, "COLUMNS": tile.columns, "ROWS": tile.rows}
    places = first + t * -(-h // stride) * columns
    warps = min(8, max(1, tile.rows * block // (32 * LANE)))
    return Launch(sizes, (first + tiles) * (groups // together), places, warps)


def chosen(d: int) -> Tile:
    """The tiles of a convolution by itself, by its channels: of those tried on an H200, among the fastest."""
    return Tile(2 if d <= 192 else 1, 4, 1)


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
    return launched(x, weight, bias, residual, scale, shift, eps, first, grid, stride, start)


def launched(
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
    *,
    tile: Tile | None = None,
) -> Tensor:
    """`depthwise_norm`, in these tiles."""
    t, h, w = grid
    tile = tile or chosen(scale.shape[1])
    sizes, programs, places, warps = tiled(first, grid, stride, start, weight.shape[1], scale, tile)
    out = torch.empty((x.shape[0], places, weight.shape[1]), dtype=x.dtype, device=x.device)
    wrap_triton(_depthwise_norm)[(programs, x.shape[0])](
        x,
        weight,
        weight if bias is None else bias,
        x if residual is None else residual,
        scale,
        shift,
        out,
        eps,
        FIRST=first,
        T=t,
        H=h,
        W=w,
        ROW=x.shape[2],
        D=scale.shape[1],
        BIAS=bias is not None,
        RESIDUAL=residual is not None,
        **sizes,
        num_warps=warps,
    )
    return out


@triton_op("mubic_deploy::depthwise_norms", mutates_args=())
def depthwise_norms(
    x: Tensor,
    weights: list[Tensor],
    scales: list[Tensor],
    shifts: list[Tensor],
    eps: float,
    first: int,
    grid: list[int],
    strides: list[int],
    starts: list[int],
) -> tuple[Tensor, Tensor]:
    """Two of `depthwise_norm` of one input and one d, without biases and residuals, as one kernel."""
    return launched_both(x, weights, scales, shifts, eps, first, grid, strides, starts)


def launched_both(
    x: Tensor,
    weights: list[Tensor],
    scales: list[Tensor],
    shifts: list[Tensor],
    eps: float,
    first: int,
    grid: list[int],
    strides: list[int],
    starts: list[int],
    *,
    tiles: list[Tile] | None = None,
) -> tuple[Tensor, Tensor]:
    """`depthwise_norms`, in these tiles."""
    t, h, w = grid
    d = scales[0].shape[1]
    tiles = tiles or [PAIRED, PAIRED]
    launches = [
        tiled(first, grid, stride, start, weight.shape[1], scale, tile)
        for weight, scale, stride, start, tile in zip(weights, scales, strides, starts, tiles, strict=True)
    ]
    one, other = launches
    q, kv = (
        torch.empty((x.shape[0], launch.places, weight.shape[1]), dtype=x.dtype, device=x.device)
        for launch, weight in zip(launches, weights, strict=True)
    )
    wrap_triton(_depthwise_norms)[(one.programs + other.programs, x.shape[0])](
        x,
        weights[0],
        scales[0],
        shifts[0],
        q,
        weights[1],
        scales[1],
        shifts[1],
        kv,
        eps,
        FIRST=first,
        T=t,
        H=h,
        W=w,
        ROW=x.shape[2],
        D=d,
        PROGRAMS=one.programs,
        **one.sizes,
        **{name + "2": size for name, size in other.sizes.items()},
        num_warps=max(one.warps, other.warps),
    )
    return q, kv
