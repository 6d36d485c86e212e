"""The model as matrix products over tokens, channels last, with nothing but pointwise arithmetic between them.

A compiler that fuses such arithmetic (Inductor) then needs a kernel a product and few others: no transposes, no copies
between layouts, no kernels of cuDNN's that are slow at small or depth-wise convolutions.

| what                                                 | becomes                                                     |
| ---------------------------------------------------- | ----------------------------------------------------------- |
| a dense convolution                                  | windows, gathered, times a matrix                           |
| a depth-wise convolution and its LayerNorm           | a kernel of its own on a GPU, else 27 shifted products      |
| LayerNorm, GELU, residuals of the visual encoder     | part of its products, whose kernels are our own on a GPU    |
| modulation, ReLU, residuals of the denoiser          | part of its convolutions, the same                          |
| STC's depth-wise convolution                         | products over windows, summed                               |
| a transposed convolution (kernel = stride)           | a matrix whose columns are the places of a window           |
| linear maps that follow each other                   | one (FFN after FFN; upsampling, projection and mixing)      |
| ReLU after a linear map                              | the end of its product                                      |
| keys and values; a stage's convolution and shortcut  | one product                                                 |
| a query's products with each axis's position vectors | one with all of them, from which each pair takes its column |

The result is the same to rounding. Without a compiler windows are copies."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.video.mvit import MultiscaleBlock, Pool

from mubic_deploy.model.audio import AudioEncoder
from mubic_deploy.model.denoiser import Context, Decoder, NoiseEncoder, NoiseStage, TemporalConv
from mubic_deploy.model.fusion import MMI, AudioUpsample, CrossAttention, Fusion, LocalContext
from mubic_deploy.model.layers import BEFORE, FFN, LAST, NO_RELU, STC, Keys, channels_first, product
from mubic_deploy.model.visual import (
    FoldedAttention,
    Grid,
    VisualEncoder,
    one_hot_positions,
    relative_index,
    relative_vectors,
)

# Inductor's settings: sums over up to 4 x 4 places become pointwise arithmetic, which is fused with what follows. A
# LayerNorm of 24 channels must not: a thread would read a row alone
INDUCTOR = {"unroll_reductions_threshold": 24}
MULTIPLE = 8  # FP16 values in 16 bytes, which the fast kernels of products and attention want a row to be made of
Kind = TypeVar("Kind", bound=nn.Module)


def padded(size: int) -> int:
    """The next multiple of MULTIPLE."""
    return size + -size % MULTIPLE


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """With these weights [out, in]."""
    out = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0], bias is not None, device=weight.device)
    out.weight.data = weight.detach().contiguous()
    if bias is not None:
        out.bias.data = bias.detach().clone()
    return out


def typed(modules: nn.Module, kind: type[Kind]) -> list[Kind]:
    """Those of a ModuleList or Sequential that are of a kind: a list of modules says no more than that they are."""
    return [module for module in modules.children() if isinstance(module, kind)]


def composed(first: nn.Linear, second: nn.Linear) -> nn.Linear:
    """`second` of `first` as one map. Multiplied in FP64."""
    w1, b1, w2, b2 = (x.detach().double() for x in (first.weight, first.bias, second.weight, second.bias))
    return linear((w2 @ w1).float(), (w2 @ b1 + b2).float())


class LinearReLU(nn.Linear):
    """A linear map and ReLU in one kernel."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch._addmm_activation(self.bias, x.flatten(0, -2), self.weight.T)
        return y.unflatten(0, x.shape[:-1])


def with_relu(layers: nn.Sequential) -> nn.Sequential:
    """`layers` with LinearReLU where a ReLU follows a linear map, whose weights these are."""
    out: list[nn.Module] = []
    for layer in layers:
        if isinstance(layer, nn.ReLU) and type(out[-1]) is nn.Linear:
            out[-1].__class__ = LinearReLU
        else:
            out.append(layer)
    return nn.Sequential(*out)


# ---- convolutions


def windowed(x: Tensor, kernel: Iterable[int], stride: Iterable[int]) -> Tensor:
    """[B, *grid, C] -> [B, *grid', C, *kernel], a view."""
    for axis, (size, step) in enumerate(zip(kernel, stride, strict=True), 1):
        x = x.unfold(axis, size, step)
    return x


class WindowProduct(nn.Module):
    """A dense convolution as a product: [B, C, *grid] -> [B, D, *grid'], both views of channels last.

    Zeros widen the kernel until a row of it is a multiple of 8 values, which lie side by side in the input and are read
    together. once: what the windows are taken of is a tensor, because it takes long to compute."""

    def __init__(self, conv: nn.Conv2d | nn.Conv3d, once: bool = False) -> None:
        super().__init__()
        *others, width = conv.kernel_size
        more = -width % (MULTIPLE // math.gcd(MULTIPLE, conv.in_channels))
        self.kernel, self.stride, self.once = (*others, width + more), conv.stride, once
        assert not isinstance(conv.padding, str)
        self.padding = [p for n in reversed(conv.padding) for p in (n, n)]
        self.padding[1] += more
        weight = F.pad(conv.weight.detach(), (0, more)).movedim(1, -1).flatten(1)
        self.linear = linear(weight, conv.bias)

    def windows(self, x: Tensor) -> Tensor:
        """[B, C, *grid] -> [B, *grid', prod(kernel) C]."""
        axes = len(self.kernel)
        x = F.pad(x.movedim(1, -1).to(self.linear.weight.dtype), [0, 0, *self.padding])
        x = windowed(aligned(x) if self.once else x, self.kernel, self.stride)
        return x.movedim(axes + 1, -1).flatten(axes + 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.windows(x)).movedim(-1, 1)

    def has_kernel(self, x: Tensor) -> bool:
        """Whether `followed` runs on x: in FP32 it would be slow, or not FP32."""
        return has_kernels(x) and self.linear.weight.dtype == torch.float16

    def followed(
        self,
        x: Tensor,
        modulation: Tensor | None = None,
        residual: Tensor | None = None,
        start: int = 0,
        relu: int = NO_RELU,
    ) -> Tensor:
        """On a GPU, with what follows it: [B, *grid, row] -> [B, *grid', D]. See `windows.window_product`."""
        from mubic_deploy.model import windows  # as in `depthwise_norm`

        beside = [y if y is None else y.contiguous() for y in (modulation, residual)]
        sizes = (list(self.kernel), list(self.stride), self.padding, start, relu)
        return windows.window_product(x.contiguous(), self.linear.weight, self.linear.bias, *beside, *sizes)


class WindowReLU(WindowProduct):
    """As `WindowProduct`, and ReLU, which may follow once more."""

    def forward(self, x: Tensor) -> Tensor:
        if self.has_kernel(x):
            return self.followed(x.movedim(1, -1), relu=LAST).movedim(-1, 1)
        return F.relu(super().forward(x))


class WindowSum(WindowProduct):
    """As `WindowProduct`, to one channel: a sum, which needs no product's kernel."""

    def forward(self, x: Tensor) -> Tensor:
        out = (self.windows(x).float() * self.linear.weight[0].float()).sum(-1) + self.linear.bias.float()
        return out.to(self.linear.weight.dtype)[:, None]


def kept(x: Tensor) -> Tensor:
    """x [B, ...], contiguous, as it is. Inductor makes a tensor of what `as_strided` is asked of; else it would compute
    x again wherever it is read, such as the 27 masks of a padded window."""
    return x.as_strided(x.shape, x.stride())


def aligned(x: Tensor) -> Tensor:
    """x [..., W, C] as part of a tensor whose rows are a multiple of MULTIPLE values, so that they can be read together
    in every row."""
    width, channels = x.shape[-2:]
    more = -width % (MULTIPLE // math.gcd(MULTIPLE, channels))
    return kept(F.pad(x, (0, 0, 0, more)))[..., :width, :]


class ShiftedSum(nn.Module):
    """A depth-wise 3 x 3 x 3 convolution: [B, T, H, W, C] -> [B, T', H', W', C], summed in FP32. Of several, which have
    one stride, each takes its share of C. repeats: of each one's kernels along C."""

    bias: nn.Parameter | None

    def __init__(self, *convs: nn.Conv3d, repeats: int = 1) -> None:
        super().__init__()
        self.kernel, self.stride = convs[0].kernel_size, convs[0].stride
        assert self.stride == (1, self.stride[1], self.stride[1])  # as the GPU's kernel has it
        weight = torch.cat([conv.weight.detach().flatten(1).repeat(repeats, 1) for conv in convs])
        self.weight = nn.Parameter(weight.T.contiguous())  # [27, C], so that channels side by side are read together
        biases = [conv.bias.detach().repeat(repeats) for conv in convs if conv.bias is not None]
        self.bias = nn.Parameter(torch.cat(biases)) if biases else None

    def forward(self, x: Tensor) -> Tensor:
        rimmed = kept(F.pad(x, (0, 0, 1, 1, 1, 1, 1, 1)))
        out = (windowed(rimmed, self.kernel, self.stride).flatten(5).float() * self.weight.T.float()).sum(-1)
        if self.bias is not None:
            out = out + self.bias.float()
        return out.to(x.dtype)


def has_kernels(x: Tensor) -> bool:
    """Whether x is where the kernels of `mubic_deploy.model.kernels` run."""
    return x.is_cuda


def depthwise_norm(
    x: Tensor,
    conv: ShiftedSum,
    norm: nn.LayerNorm,
    grid: Grid,
    residual: Tensor,
) -> Tensor:
    """`conv` and `norm` of tokens on a GPU: see `kernels.depthwise_norm`."""
    from mubic_deploy.model import kernels  # Triton's, which machines without a GPU need not have

    scale, shift = (y.view(-1, norm.normalized_shape[0]) for y in (norm.weight, norm.bias))
    given = (x.contiguous(), conv.weight, conv.bias, residual.contiguous(), scale, shift, norm.eps)
    return kernels.depthwise_norm(*given, 0, list(grid), conv.stride[-1], 0)


def has_product(x: Tensor, linear: nn.Linear) -> bool:
    """Whether `linear` of x is one of `mubic_deploy.model.products`, which in FP32 would be slow, or not FP32."""
    if not has_kernels(x) or x.dtype != torch.float16:
        return False
    from mubic_deploy.model import products  # as in `depthwise_norm`

    return products.pays(*linear.weight.shape)


class NormedLinear(nn.Linear):
    """Linear maps of what one LayerNorm leaves, as one map, with the norm's scale and shift in its weights."""

    sums: Tensor

    def __init__(self, norm: nn.LayerNorm, *maps: nn.Linear) -> None:
        weight, bias = (torch.cat([getattr(x, name).detach().double() for x in maps]) for name in ("weight", "bias"))
        scale, shift = norm.weight.detach().double(), norm.bias.detach().double()
        super().__init__(weight.shape[1], weight.shape[0], device="meta")
        self.weight = nn.Parameter((weight * scale).float())
        self.bias = nn.Parameter((bias + weight @ shift).float())
        self.eps = norm.eps
        # of the weights as a half-precision model has them, the only one that asks
        self.register_buffer("sums", self.weight.detach().half().float().sum(1), persistent=False)

    def forward(self, x: Tensor, moments: Tensor | None = None, gelu: bool = False) -> Tensor:
        """moments: of x, as `added` returns them. gelu: GELU of the result."""
        if has_product(x, self):
            from mubic_deploy.model import products

            x = kept(x.contiguous())  # which also stands for what is not there, and may be asked for again
            given = (x, self.weight, self.bias, None, self.sums, moments, self.eps, gelu)
            return products.product(*given)
        x = F.layer_norm(x.float(), x.shape[-1:], eps=self.eps).to(self.weight.dtype)
        y = super().forward(x)
        return F.gelu(y) if gelu else y


def added(residual: Tensor, linear: nn.Linear, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """residual + linear(x), and its rows' moments where there is a kernel that gives them."""
    if has_product(x, linear):
        from mubic_deploy.model import products

        given = (x.contiguous(), linear.weight, linear.bias, residual.contiguous())
        return products.product_moments(*given, None, None, 0.0, False)
    return residual + linear(x), None


def depthwise_norms(x: Tensor, pools: tuple[HeadsPool, HeadsPool], grid: Grid) -> tuple[Tensor, Tensor]:
    """What two pools make of a product of both on a GPU: see `kernels.depthwise_norms`."""
    from mubic_deploy.model import kernels

    weights = [pool.conv.weight for pool in pools]
    scales, shifts = ([getattr(pool.norm, name)[:, 0] for pool in pools] for name in ("weight", "bias"))
    strides, starts = [pool.conv.stride[-1] for pool in pools], [pool.start for pool in pools]
    assert pools[0].norm.eps == pools[1].norm.eps
    assert pools[0].conv.bias is pools[1].conv.bias is None
    more = (pools[0].norm.eps, 1, list(grid), strides, starts)
    q, kv = kernels.depthwise_norms(x.contiguous(), weights, scales, shifts, *more)
    return q.unflatten(-1, pools[0].sizes), kv.unflatten(-1, pools[1].sizes)


class ChannelsFirst(nn.Module):
    """A module of channels last between views: [B, C, ...] -> [B, D, ...]."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x.movedim(1, -1)).movedim(-1, 1)


class PlacesProduct(nn.Module):
    """A transposed convolution with kernel = stride: [B, T, H, W, C] -> [B, kt T, kh H, kw W, D]."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        """weight [C, D, kt, kh, kw], bias [D]."""
        super().__init__()
        self.kernel = tuple(weight.shape[2:])
        columns = weight.detach().permute(2, 3, 4, 1, 0).flatten(0, 3)
        self.linear = linear(columns, bias.detach().repeat(math.prod(self.kernel)))

    def forward(self, x: Tensor) -> Tensor:
        kt, kh, kw = self.kernel
        x = self.linear(x.contiguous()).unflatten(-1, (kt, kh, kw, -1))  # [B, T, H, W, kt, kh, kw, D]
        return x.permute(0, 1, 4, 2, 5, 3, 6, 7).flatten(1, 2).flatten(2, 3).flatten(3, 4)


class TokenSTC(STC):
    """Spatio-temporal compression as products summed over windows, in FP32.

    Its weights lie as they are read, [f, 1, f, C]. As the convolution's, Inductor would normalise in a loop over
    channels, through memory that it wrote in the loop before: on a GPU without a barrier, so that a warp may read what
    another one has not written yet. So it does so at once, in registers."""

    def set_up(self) -> None:
        """Takes the convolution apart. In place."""
        assert self.conv.bias is not None
        self.weight = nn.Parameter(self.conv.weight.detach()[:, 0].permute(1, 2, 0)[:, None].contiguous())
        self.bias = nn.Parameter(self.conv.bias.detach())
        del self.conv

    def forward(self, x: Tensor) -> Tensor:
        (h, w), f = x.shape[2:4], self.factor
        x = F.pad(x, (0, 0, 0, -w % f, 0, -h % f)).unflatten(3, (-1, f)).unflatten(2, (-1, f))
        out = (x.float() * self.weight.float()).sum((3, 5)) + self.bias.float()
        return self.norm(out.to(x.dtype).flatten(1, 3))


def compression_tokens(stc: STC) -> None:
    """In place."""
    stc.__class__ = TokenSTC
    cast(TokenSTC, stc).set_up()


class TokenKeys(Keys):
    """Keys and values from one product."""

    def __init__(self, keys: Keys) -> None:
        nn.Module.__init__(self)
        self.stc = keys.stc
        weight, bias = (torch.cat([getattr(x, name).detach() for x in (keys.k, keys.v)]) for name in ("weight", "bias"))
        self.kv = linear(weight, bias)

    def forward(self, context: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self.kv(self.stc(context)).chunk(2, -1)
        return k, v


# ---- visual encoder


class JointNorm(nn.LayerNorm):
    """Some LayerNorms of one size as one, each with weights of its own: [..., norms, heads, d]."""

    def __init__(self, *norms: nn.LayerNorm) -> None:
        super().__init__(list(norms[0].normalized_shape), norms[0].eps, elementwise_affine=False)
        self.weight = nn.Parameter(torch.stack([norm.weight.detach() for norm in norms])[:, None])
        self.bias = nn.Parameter(torch.stack([norm.bias.detach() for norm in norms])[:, None])

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, eps=self.eps) * self.weight + self.bias


class HeadsPool(nn.Module):
    """torchvision's `Pool`s of all heads of queries, or of keys and values together, from one product with all three:
    [B, 1 + t h w, row] and (t, h, w) -> [B, 1 + t' h' w', pools, heads, d]. On a GPU a kernel does so for two of them,
    see `depthwise_norms`.

    start: of the row's channels, the first that is theirs."""

    def __init__(self, *pools: Pool, heads: int, start: int) -> None:
        super().__init__()
        self.conv = ShiftedSum(*(pool.pool for pool in pools), repeats=heads)
        self.norm = JointNorm(*(pool.norm_act[0] for pool in pools))
        self.sizes, self.start = (len(pools), heads, *self.norm.normalized_shape), start

    def pooled(self, thw: Grid) -> Grid:
        """What it leaves of a grid."""
        t, h, w = thw
        stride = self.conv.stride[-1]
        return t, -(-h // stride), -(-w // stride)

    def forward(self, x: Tensor, thw: Grid) -> Tensor:
        x = x[..., self.start : self.start + math.prod(self.sizes)]
        x = torch.cat([x[:, :1], self.conv(x[:, 1:].unflatten(1, thw)).flatten(1, 3)], 1)
        return self.norm(x.unflatten(-1, self.sizes))


class TokenAttention(FoldedAttention):
    """Folded attention on tokens as they come: pooling takes keys and values together, and position vectors meet
    queries in one product.

    Queries, keys and values have one head size, a multiple of 8."""

    constants = ("relative", "columns", "indicators")
    heads_q: HeadsPool
    heads_kv: HeadsPool

    def set_up(self) -> None:
        """Takes the pools apart. In place."""
        heads = self.num_heads
        self.heads_q = HeadsPool(self.pool_q, heads=heads, start=0)
        self.heads_kv = HeadsPool(self.pool_k, self.pool_v, heads=heads, start=heads * self.head_dim)
        del self.pool_q, self.pool_k, self.pool_v
        self._kept = self._fixed = None

    def _positions(self, q_thw: Grid, k_thw: Grid) -> tuple[list[Tensor], Tensor]:
        """The vectors of all axes' distances [d, L], at least one of them zero; which of them a query's pairs with the
        places of each axis take, int32 [1 + q, 1, k_t + k_h + k_w], the class token's the zero; and the indicators of
        keys, behind d columns of zeros, beside zeros for the values: [1 + k, 2, 1, d + wide]."""
        weights = (self.rel_pos_t, self.rel_pos_h, self.rel_pos_w)
        vectors = [relative_vectors(r, q, k) for r, q, k in zip(weights, q_thw, k_thw, strict=True)]
        starts = itertools.accumulate([0, *map(len, vectors[:-1])])
        device = weights[0].device
        by_t, by_h, by_w = (relative_index(q, k, device) + n for q, k, n in zip(q_thw, k_thw, starts, strict=True))
        axes = (by_t[:, None, None], by_h[:, None], by_w)
        columns = torch.cat([index.expand(*q_thw, -1) for index in axes], -1).flatten(0, 2)
        relative = torch.cat(vectors)
        columns = F.pad(columns, (0, 0, 1, 0), value=len(relative))[:, None].int()
        relative = F.pad(relative, (0, 0, 0, padded(len(relative) + 1) - len(relative))).T.contiguous()
        indicators = F.pad(one_hot_positions(k_thw, relative), (self.head_dim, self._wide(k_thw) - sum(k_thw)))
        return [relative, columns], F.pad(indicators[:, None, None], (0, 0, 0, 0, 0, 1))

    def _wide(self, k_thw: Grid) -> int:
        """Columns of a query behind its own."""
        return padded(self.head_dim + sum(k_thw)) - self.head_dim

    def attended(self, qkv: Tensor, thw: Grid) -> tuple[Tensor, Grid]:
        """All between the first product and the last. qkv [B, 1 + t h w, 3 C and more] -> [B, 1 + t' h' w', C]."""
        pools = (self.heads_q, self.heads_kv)
        q_thw, k_thw = (pool.pooled(thw) for pool in pools)
        q, kv = depthwise_norms(qkv, pools, thw) if has_kernels(qkv) else (pool(qkv, thw) for pool in pools)
        q = q[:, :, 0]

        (relative, columns), indicators = self.positions(q_thw, k_thw)
        d, wide = self.head_dim, self._wide(k_thw)
        products = q @ relative  # [B, 1 + q, heads, L]
        taken = products.gather(-1, columns.long().expand(*products.shape[:-1], -1))
        # sums, which are one kernel where a concatenation is two
        q_wide = F.pad(q * self.scaler, (0, wide)) + F.pad(taken, (d, wide - taken.shape[-1]))
        k_wide, v_wide = kept(F.pad(kv, (0, wide)) + indicators).unbind(2)
        q_wide, k_wide, v_wide = (y.transpose(1, 2) for y in (q_wide, k_wide, v_wide))
        out = product(q_wide, k_wide, v_wide, scale=1.0)[..., :d].transpose(1, 2)

        # residual pooling (eq. 3.11), not for the class token
        return (out + F.pad(q[:, 1:], (0, 0, 0, 0, 1, 0))).flatten(2), q_thw


class TokenMaxPool(nn.Module):
    """torchvision's `Pool` around a maximum over windows: [B, 1 + t h w, C] and (t, h, w)."""

    def __init__(self, pool: nn.MaxPool3d) -> None:
        super().__init__()
        sizes = (pool.kernel_size, pool.stride, pool.padding)
        self.kernel, self.stride, self.padding = (nn.modules.utils._triple(x) for x in sizes)

    def forward(self, x: Tensor, thw: Grid) -> tuple[Tensor, Grid]:
        rim = [p for n in reversed(self.padding) for p in (n, n)]
        grid = F.pad(x[:, 1:].unflatten(1, thw), [0, 0, *rim], value=-math.inf)
        out = windowed(grid, self.kernel, self.stride).amax((-3, -2, -1))
        t, h, w = out.shape[1:4]
        return torch.cat([x[:, :1], out.flatten(1, 3)], 1), (t, h, w)


class TokenBlock(MultiscaleBlock):
    """torchvision's block as four products and the attention: LayerNorms share the weights of the products behind them.
    GELU and the attention's residual are part of those before. A projected residual comes from the first product.

    Dropout and stochastic depth are the training's."""

    def set_up(self) -> None:
        """Takes norms and MLP apart. In place."""
        assert self.proj_after_attn
        attention, also = cast(TokenAttention, self.attn), [] if self.project is None else [self.project]
        self.joint = NormedLinear(self.norm1, attention.qkv, *cast(list[nn.Linear], also))
        self.last = typed(attention.project, nn.Linear)[0]
        first, self.second = typed(self.mlp, nn.Linear)
        self.first = NormedLinear(self.norm2, first)
        self.projects = self.project is not None
        del attention.qkv, attention.project, self.norm1, self.norm2, self.mlp, self.project, self.stochastic_depth

    def forward(self, x: Tensor, thw: Grid) -> tuple[Tensor, Grid]:
        attention = cast(TokenAttention, self.attn)
        joint = self.joint(x)
        skip = joint[..., 3 * attention.output_dim :] if self.projects else x
        if self.pool_skip is not None:
            skip, _ = cast(TokenMaxPool, self.pool_skip)(skip, thw)
        out, thw = attention.attended(joint, thw)
        x, moments = added(skip, self.last, out)
        return x + self.second(self.first(x, moments=moments, gelu=True)), thw


def visual_tokens(encoder: VisualEncoder) -> None:
    """In place."""
    encoder.conv_proj = WindowProduct(encoder.conv_proj, once=True)  # type: ignore[assignment]
    for block in encoder.blocks:
        attention = block.attn
        if isinstance(block.pool_skip, Pool) and isinstance(block.pool_skip.pool, nn.MaxPool3d):
            block.pool_skip = TokenMaxPool(block.pool_skip.pool)
        if isinstance(attention, FoldedAttention):
            attention.__class__ = TokenAttention
            attention.set_up()
            block.__class__ = TokenBlock
            cast(TokenBlock, block).set_up()


# ---- audio encoder


def audio_tokens(encoder: AudioEncoder) -> None:
    """In place."""
    for name, layer in encoder.vggish.named_children():
        if isinstance(layer, nn.Conv2d):
            setattr(encoder.vggish, name, WindowProduct(layer))


# ---- fusion


class TokenLocalContext(LocalContext):
    """With its convolution, residual and norm as one on a GPU."""

    conv: ShiftedSum  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        gated = self.glu(x)
        if has_kernels(x):
            t, h, w = x.shape[1:4]
            given = (gated.flatten(1, 3), self.conv, self.norm1, (t, h, w), x.flatten(1, 3))
            x = depthwise_norm(*given).view(x.shape)
        else:
            x = self.norm1(x + self.conv(gated))
        return self.norm2(x + self.ffn(x))


def local_tokens(context: LocalContext) -> None:
    """In place."""
    context.conv = ShiftedSum(context.conv)  # type: ignore[assignment]
    context.__class__ = TokenLocalContext


def fusion_tokens(block: MMI) -> None:
    """In place."""
    first, second, third, last = (y for ffn in typed(block.ffn_v, FFN) for y in typed(ffn, nn.Linear))
    block.ffn_v = with_relu(nn.Sequential(first, nn.ReLU(), composed(second, third), nn.ReLU(), last))
    for module in block.modules():
        for name in ("ffn_a", "ffn", "mlp"):
            if isinstance(layers := getattr(module, name, None), nn.Sequential):
                setattr(module, name, with_relu(layers))


class TokenFusion(Fusion):
    """Its contexts lie as it computes them, channels last."""

    @staticmethod
    def laid_out(context: Tensor) -> Tensor:
        return channels_first(context)


# ---- denoiser


class TokenNoiseStage(NoiseStage):
    """The first convolution and the shortcut as one product: the shortcut takes the middle of the same windows."""

    def __init__(self, stage: NoiseStage) -> None:
        nn.Module.__init__(self)
        self.modulation = stage.modulation
        first, shortcut = stage.conv1, stage.shortcut
        widths, device = (first.in_channels, 2 * first.out_channels), first.weight.device
        both = nn.utils.skip_init(nn.Conv2d, *widths, 3, stride=2, padding=1, device=device)
        assert first.bias is not None  # of BatchNorm's, folded
        assert shortcut.bias is not None
        both.weight.data = torch.cat([first.weight.detach(), F.pad(shortcut.weight.detach(), (1, 1, 1, 1))])
        both.bias.data = torch.cat([first.bias.detach(), shortcut.bias.detach()])
        self.both = WindowProduct(both)
        self.conv2: WindowProduct = WindowProduct(stage.conv2)  # type: ignore[assignment]

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        if self.both.has_kernel(x):
            y = self.both.followed(x.movedim(1, -1), modulation)
            return self.conv2.followed(y, residual=y, start=y.shape[-1] // 2, relu=LAST).movedim(-1, 1)
        y, x = self.both(x).chunk(2, 1)
        return F.relu(x + self.conv2(self.modulated(y, modulation)))


class TokenTemporalConv(TemporalConv):
    """Its ReLU and residual are part of its product on a GPU."""

    conv: WindowProduct  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        if self.conv.has_kernel(x):
            x = kept(x.contiguous())  # which is asked for twice
            return self.conv.followed(x, residual=x, relu=BEFORE)
        return super().forward(x)


class TokenContext(Context):
    """Upsampling, projection and their share of the mixture as one product: no bend lies between them."""

    def __init__(self, context: Context) -> None:
        nn.Module.__init__(self)
        self.gated = context.gated
        up, project, mix = context.upsample, context.project, context.mix
        channels = project.out_features
        assert up.bias is not None
        w_up, b_up, w_project, b_project, w_mix = (
            x.detach().double() for x in (up.weight, up.bias, project.weight, project.bias, mix.weight)
        )
        of_a, of_b = w_mix.chunk(2, 1)
        both = torch.cat([torch.eye(channels, dtype=w_mix.dtype, device=w_mix.device), of_b]) @ w_project
        bias = both @ b_up + torch.cat([b_project, of_b @ b_project])
        self.places = PlacesProduct(torch.einsum("cdthw,ed->cethw", w_up, both).float(), bias.float())
        self.mix = linear(of_a.float(), mix.bias)

    def condition(self, a: Tensor) -> tuple[Tensor, ...]:
        a = a.contiguous()
        return a, self.mix(a)

    def forward(self, coarse: Tensor, a: Tensor, of_a: Tensor) -> Tensor:  # type: ignore[override]
        h, w = a.shape[2:4]
        b, of_b = self.places(coarse)[:, :, :h, :w].chunk(2, -1)
        mixed = of_a + of_b
        return b + mixed.sigmoid() * (a - b) if self.gated else mixed


class TokenDecoder(Decoder):
    """With contexts that are laid out as they are read."""

    def conditions(self, contexts: list[Tensor]) -> list[tuple[Tensor, ...]]:
        *finer, (coarsest,) = super().conditions(contexts)
        return [*finer, (coarsest.contiguous(),)]


def decoder_tokens(decoder: Decoder) -> None:
    """In place."""
    decoder.__class__ = TokenDecoder
    decoder.contexts = nn.ModuleList(TokenContext(context) for context in typed(decoder.contexts, Context))
    if decoder.diffusion:
        decoder.keys = nn.ModuleList(TokenKeys(keys) for keys in typed(decoder.keys, Keys))
    decoder.collapse = WindowReLU(decoder.collapse)  # type: ignore[assignment]
    decoder.head = WindowSum(decoder.head)  # type: ignore[assignment]


# ---- the whole


def tokens(model: nn.Module) -> None:
    """Rewrites `model`, whose BatchNorm is folded already. In place."""
    for module in list(model.modules()):
        match module:
            case VisualEncoder():
                visual_tokens(module)
            case AudioEncoder():
                audio_tokens(module)
            case AudioUpsample():
                conv = module.conv
                assert conv.bias is not None
                module.conv = ChannelsFirst(PlacesProduct(conv.weight, conv.bias))  # type: ignore[assignment]
            case CrossAttention():
                module.keys = TokenKeys(module.keys)
            case LocalContext():
                local_tokens(module)
            case MMI():
                fusion_tokens(module)
            case Fusion():
                module.__class__ = TokenFusion
            case STC():
                compression_tokens(module)
            case TemporalConv():
                module.__class__ = TokenTemporalConv
                module.conv = WindowProduct(module.conv)  # type: ignore[assignment]
            case NoiseEncoder():
                module.stages = nn.ModuleList(TokenNoiseStage(stage) for stage in typed(module.stages, NoiseStage))
            case Decoder():
                decoder_tokens(module)
