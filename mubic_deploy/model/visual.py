"""Visual encoder: torchvision's MViTv2 blocks with the relative position bias folded into the attention product."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.video.mvit import MSBlockConfig, MultiscaleAttention, MultiscaleBlock, Pool, PositionalEncoding

from mubic_deploy.config import Config
from mubic_deploy.model.layers import product

PIXEL_MEAN, PIXEL_STD = 0.45, 0.225  # of the Kinetics-400 weights
Grid = tuple[int, int, int]
STRIDE_KV = (8, 4, 2, 1)  # keys and values are pooled to the coarsest grid at every scale


def relative_vectors(weight: Tensor, q_size: int, k_size: int) -> Tensor:
    """weight [L, d], a vector a distance, interpolated to the grid's distances: [2 max(q, k) - 1, d]."""
    distances = 2 * max(q_size, k_size) - 1
    if weight.shape[0] != distances:
        weight = F.interpolate(weight.T[None], size=distances, mode="linear")[0].T
    return weight


def relative_index(q_size: int, k_size: int, device: torch.device) -> Tensor:
    """Which of `relative_vectors` belongs to each pair [q, k], int64: q and k of different size are compared at the
    scale of the larger."""
    q = torch.arange(q_size, device=device)[:, None] * max(k_size / q_size, 1.0)
    k = torch.arange(k_size, device=device)[None, :] * max(q_size / k_size, 1.0)
    return (q - k + (k_size - 1) * max(q_size / k_size, 1.0)).long()


def relative_table(weight: Tensor, q_size: int, k_size: int) -> Tensor:
    """R of eq. 3.10 along one axis: [q, k, d]."""
    return relative_vectors(weight, q_size, k_size)[relative_index(q_size, k_size, weight.device)]


def one_hot_positions(thw: tuple[int, int, int], like: Tensor) -> Tensor:
    """Indicators of each key's (t, h, w), the class token's row zero: [1 + t h w, t + h + w]."""
    t, h, w = thw
    # made where they are used: a copy from the host cannot be captured in a CUDA graph
    by_t, by_h, by_w = (torch.eye(n, dtype=like.dtype, device=like.device) for n in thw)
    rows = [
        by_t[:, None, None].expand(t, h, w, t),
        by_h[None, :, None].expand(t, h, w, h),
        by_w[None, None, :].expand(t, h, w, w),
    ]
    return F.pad(torch.cat(rows, -1).flatten(0, 2), (0, 0, 1, 0))


class FoldedAttention(MultiscaleAttention):
    """torchvision's pooling attention without its bias matrix; same weights, same result.

    The bias of query i and key j is q_i . (Rt[t_i, t_j] + Rh[h_i, h_j] + Rw[w_i, w_j]) (eq. 3.9, 3.10): a sum over
    one-hot indicators of the key's position. So [q scale, q.Rt, q.Rh, q.Rw] times [k, onehot_t, onehot_h, onehot_w]
    gives scaled product and bias at once, and plain scaled dot-product attention does the rest."""

    constants: tuple[str, ...] = ("table_t", "table_h", "table_w", "indicators")  # buffers, once positions are fixed

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._kept: tuple[tuple, list[Tensor], Tensor] | None = None
        self._fixed: tuple | None = None

    def fix_positions(self, q_thw: tuple[int, int, int], k_thw: tuple[int, int, int]) -> None:
        """Keeps tables and indicators of these grids as constants, whatever becomes of the weights: for a copy that
        will be traced or compiled, whose compiler would compute them again at every call."""
        with torch.no_grad():
            tables, indicators = self._positions(q_thw, k_thw)
        for name, x in zip(self.constants, (*tables, indicators), strict=True):
            self.register_buffer(name, x, persistent=False)
        self._kept, self._fixed = None, (q_thw, k_thw)

    def positions(self, q_thw: tuple[int, int, int], k_thw: tuple[int, int, int]) -> tuple[list[Tensor], Tensor]:
        """Tables [q, k, d] of the three axes and the key indicators; without gradients computed once a weight."""
        if self._fixed == (q_thw, k_thw):
            *fixed, ones = (self.get_buffer(name) for name in self.constants)
            return fixed, ones
        weights = (self.rel_pos_t, self.rel_pos_h, self.rel_pos_w)
        keep = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        # a tensor's version counts its changes in place
        key = (q_thw, k_thw, *((w.data_ptr(), w._version, w.device, w.dtype) for w in weights)) if keep else ()
        if keep and self._kept is not None and self._kept[0] == key:
            return self._kept[1:]
        tables, indicators = self._positions(q_thw, k_thw)
        if keep:
            self._kept = (key, tables, indicators)
        return tables, indicators

    def _positions(self, q_thw: tuple[int, int, int], k_thw: tuple[int, int, int]) -> tuple[list[Tensor], Tensor]:
        weights = (self.rel_pos_t, self.rel_pos_h, self.rel_pos_w)
        tables = [relative_table(r, q, k) for r, q, k in zip(weights, q_thw, k_thw, strict=True)]
        return tables, one_hot_positions(k_thw, tables[0])

    def forward(self, x: Tensor, thw: tuple[int, int, int]) -> tuple[Tensor, tuple[int, int, int]]:
        b = x.shape[0]  # not len(x), which would make it a constant in a graph
        # channels first straight from the product, as pooling takes them; the class token is not pooled
        grids = self.qkv.weight @ x[:, 1:].transpose(1, 2) + self.qkv.bias[:, None]
        tokens = self.qkv(x[:, :1]).reshape(b, 1, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        pools = (self.pool_q, self.pool_k, self.pool_v)
        pooled = [self._pooled(*each, thw) for each in zip(grids.chunk(3, 1), tokens, pools, strict=True)]
        (q, q_thw), (k, k_thw), (v, _) = pooled

        tables, indicators = self.positions(q_thw, k_thw)
        bias = self._bias(q[:, :, 1:].unflatten(2, q_thw), tables).flatten(2, 4)
        q_wide = torch.cat([q * self.scaler, F.pad(bias, (0, 0, 1, 0))], -1)  # the class token has no position
        k_wide = torch.cat([k, indicators.expand(b, self.num_heads, -1, -1)], -1)
        out = self._product(q_wide, k_wide, v)

        # residual pooling (eq. 3.11), not for the class token
        out = torch.cat([out[:, :, :1], out[:, :, 1:] + q[:, :, 1:]], 2)
        return self.project(out.transpose(1, 2).flatten(2)), q_thw

    def _pooled(
        self, grid: Tensor, token: Tensor, pool: Pool, thw: tuple[int, int, int]
    ) -> tuple[Tensor, tuple[int, int, int]]:
        """What torchvision's `Pool` computes. grid [B, heads d, t h w], the class token [B, heads, 1, d] ->
        [B, heads, 1 + t' h' w', d] and (t', h', w')."""
        x = pool.pool(grid.reshape(grid.shape[0] * self.num_heads, self.head_dim, *thw))
        x_thw = (x.shape[2], x.shape[3], x.shape[4])
        x = x.flatten(2).transpose(1, 2).unflatten(0, (-1, self.num_heads))
        return pool.norm_act(torch.cat([token, x], 2)), x_thw

    @staticmethod
    def _product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            # kernels that keep no attention matrix for the backward pass want values as wide as keys
            wide = F.pad(v, (0, k.shape[-1] - v.shape[-1]))
            return F.scaled_dot_product_attention(q, k, wide, scale=1.0)[..., : v.shape[-1]]
        return product(q, k, v, scale=1.0)

    @staticmethod
    def _bias(q: Tensor, tables: list[Tensor]) -> Tensor:
        """q [B, heads, t, h, w, d] -> [q.Rt, q.Rh, q.Rw]: [B, heads, t, h, w, k_t + k_h + k_w]."""
        r_t, r_h, r_w = (r.transpose(1, 2) for r in tables)  # [q, d, k]
        by_t = (q.flatten(3, 4) @ r_t).unflatten(3, q.shape[3:5])
        by_h = q @ r_h
        by_w = (q.transpose(3, 4) @ r_w).transpose(3, 4)
        return torch.cat([by_t, by_h, by_w], -1)


def pooled_size(thw: tuple[int, int, int], stride: list[int]) -> tuple[int, int, int]:
    """What a pooling convolution leaves of a grid: kernel 3, padding 1."""
    t, h, w = (-(-n // s) for n, s in zip(thw, stride, strict=True))
    return t, h, w


def block_settings(c: Config) -> list[MSBlockConfig]:
    """The blocks of all four scales; the first block of scales 2 to 4 halves the grid and widens."""
    settings = []
    channels = c.visual_channels[0]
    for scale, depth in enumerate(c.visual_depths):
        for block in range(depth):
            stride = 2 if scale > 0 and block == 0 else 1
            settings.append(
                MSBlockConfig(
                    num_heads=c.visual_heads[scale],
                    input_channels=channels,
                    output_channels=c.visual_channels[scale],
                    kernel_q=[3, 3, 3],
                    kernel_kv=[3, 3, 3],
                    stride_q=[1, stride, stride],
                    stride_kv=[1, STRIDE_KV[scale], STRIDE_KV[scale]],
                )
            )
            channels = c.visual_channels[scale]
    return settings


class VisualEncoder(nn.Module):
    """VIDEO uint8 [B, 16, H, W, 3] -> V1..V4 float32 [B, C_i, 8, h_i, w_i]: the last feature of each scale.

    The weights are named as in torchvision's `mvit_v2_s`. `folded=False` keeps torchvision's attention, to compare."""

    def __init__(self, config: Config, folded: bool = True) -> None:
        super().__init__()
        self.config = config
        c = config
        self.conv_proj = nn.Conv3d(3, c.visual_channels[0], (3, 7, 7), stride=(2, 4, 4), padding=(1, 3, 3))
        size = [c.time, *c.grids[0]]
        self.pos_encoding = PositionalEncoding(c.visual_channels[0], (size[1], size[2]), size[0], rel_pos_embed=True)
        nn.init.trunc_normal_(self.pos_encoding.class_token, std=0.02)
        self.blocks = nn.ModuleList()
        for setting in block_settings(c):
            self.blocks.append(self._block(size, setting, folded))
            size = [n // s for n, s in zip(size, setting.stride_q, strict=True)]

    def fix_positions(self) -> None:
        """`FoldedAttention.fix_positions` in every block, for the configured size. In place."""
        size = (self.config.time, *self.config.grids[0])
        for block, setting in zip(self.blocks, block_settings(self.config), strict=True):
            q_thw, k_thw = (pooled_size(size, stride) for stride in (setting.stride_q, setting.stride_kv))
            if isinstance(block.attn, FoldedAttention):
                block.attn.fix_positions(q_thw, k_thw)
            size = q_thw

    @staticmethod
    def _block(size: list[int], setting: MSBlockConfig, folded: bool) -> MultiscaleBlock:
        def norm(channels: int) -> nn.LayerNorm:
            return nn.LayerNorm(channels, eps=1e-6)

        options = {"residual_pool": True, "residual_with_cls_embed": False, "rel_pos_embed": True}
        # stochastic depth is the training's
        block = MultiscaleBlock(
            size, setting, proj_after_attn=True, stochastic_depth_prob=0.0, norm_layer=norm, **options
        )
        if folded:
            kernels = (setting.kernel_q, setting.kernel_kv, setting.stride_q, setting.stride_kv)
            channels = (setting.input_channels, setting.output_channels)
            block.attn = FoldedAttention(size, *channels, setting.num_heads, *kernels, norm_layer=norm, **options)
        return block

    def scale(self, index: int) -> list[nn.Module]:
        """The blocks of a scale."""
        ends = list(itertools.accumulate(self.config.visual_depths, initial=0))
        return list(self.blocks[ends[index] : ends[index + 1]])

    def parts(self) -> list[VisualScale]:
        """One after the other they are the encoder, of the same modules."""
        return [VisualScale(self, index) for index in range(4)]

    def forward(self, VIDEO: Tensor) -> tuple[Tensor, ...]:
        x, thw = embedded(VIDEO, self.conv_proj, self.pos_encoding)
        features = []
        for index in range(4):
            x, thw = through(self.scale(index), x, thw)
            features.append(feature(x, thw))
        return tuple(features)


class VisualScale(nn.Module):
    """One scale of a visual encoder: VIDEO, or [B, 1 + t h w, C], the tokens of the scale before -> V_i and, but for
    the last scale, its tokens."""

    def __init__(self, encoder: VisualEncoder, index: int) -> None:
        super().__init__()
        c = encoder.config
        self.first, self.last = index == 0, index == 3
        self.thw = (c.time, *c.grids[max(index - 1, 0)])  # of what comes in
        self.blocks = nn.ModuleList(encoder.scale(index))
        if self.first:
            self.conv_proj, self.pos_encoding = encoder.conv_proj, encoder.pos_encoding

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        thw = self.thw
        if self.first:
            x, thw = embedded(x, self.conv_proj, self.pos_encoding)
        x, thw = through(self.blocks, x, thw)
        return (feature(x, thw),) if self.last else (feature(x, thw), x)


def embedded(video: Tensor, conv_proj: nn.Module, pos_encoding: nn.Module) -> tuple[Tensor, Grid]:
    """VIDEO -> tokens [B, 1 + t h w, C], the class token first, and their grid."""
    x = video.float()  # before all else: TensorRT takes uint8 only to convert it
    x = conv_proj(x.permute(0, 4, 1, 2, 3).div(255).sub(PIXEL_MEAN).div(PIXEL_STD))
    thw = (x.shape[2], x.shape[3], x.shape[4])
    return pos_encoding(x.flatten(2).transpose(1, 2)), thw


def through(blocks: Iterable[nn.Module], x: Tensor, thw: Grid) -> tuple[Tensor, Grid]:
    """Tokens after some blocks, and their grid."""
    for block in blocks:
        x, thw = block(x, thw)
    return x, thw


def feature(x: Tensor, thw: Grid) -> Tensor:
    """Tokens -> [B, C, t, h, w], without the class token."""
    return x[:, 1:].transpose(1, 2).unflatten(2, thw)
