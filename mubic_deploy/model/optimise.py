"""Rewrites of the model for the kernels that a GPU has. Each gives the same result to rounding and can be left out.

They change a copy: the model itself, its weights' names and its training know nothing of them."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init
from torch.nn.utils.fusion import fuse_conv_bn_eval

from mubic_deploy.config import REWRITES, SPLIT_DEPTHWISE, TOKENS, check_optimisations
from mubic_deploy.errors import UserError
from mubic_deploy.model.audio import TemporalRefinement
from mubic_deploy.model.denoiser import NoiseAttention, NoiseStage
from mubic_deploy.model.fusion import CrossAttention
from mubic_deploy.model.layers import product
from mubic_deploy.model.mubic import MUBiC
from mubic_deploy.model.tokens import padded, tokens
from mubic_deploy.model.visual import FoldedAttention


def optimised(model: MUBiC, names: Collection[str]) -> MUBiC:
    """A copy of `model` in eval mode with the named rewrites, whatever their order: same signatures, same result to
    rounding. `precision.half` takes it as it takes the model. UserError for an unknown name, or two that exclude each
    other."""
    check_optimisations(names, REWRITES)
    if {SPLIT_DEPTHWISE, TOKENS} <= set(names):
        raise UserError(f"{TOKENS} has depth-wise convolutions of its own: leave out {SPLIT_DEPTHWISE}")
    out = copy.deepcopy(model)
    for name, rewrite in zip(REWRITES, (pad_heads, split_depthwise, as_tokens, channels_last), strict=True):
        if name in names:
            rewrite(out)
    return out.eval()


# ---- pad_heads


def pad_heads(model: MUBiC) -> None:
    """Gives query, key and value of every attention the same head size, a multiple of 8, by zeros. In place.

    Flash kernels take nothing else: the folded positions widen queries and keys but not values, by as many columns as
    the grid has. Where heads come straight from projections the zeros are rows of their weights, and cost nothing."""
    for module in model.modules():
        if isinstance(module, FoldedAttention):
            module.__class__ = PaddedAttention  # same weights and settings
            module._kept = module._fixed = None
        elif isinstance(module, CrossAttention | NoiseAttention | TemporalRefinement):
            widen_projections(module)


class PaddedAttention(FoldedAttention):
    """Folded attention whose product gets query, key and value of one head size. Torchvision's (folded=False) computes
    its own product, and stays."""

    def _positions(self, q_thw: tuple[int, int, int], k_thw: tuple[int, int, int]) -> tuple[list[Tensor], Tensor]:
        """Columns of zeros for the keys, and as many places more along the last axis for the queries: these are
        constants, so that neither queries nor keys are copied."""
        (by_t, by_h, by_w), indicators = super()._positions(q_thw, k_thw)
        size = self.head_dim + indicators.shape[-1]
        more = padded(size) - size
        return [by_t, by_h, F.pad(by_w, (0, 0, 0, more))], F.pad(indicators, (0, more))

    @staticmethod
    def _product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        wide = F.pad(v, (0, k.shape[-1] - v.shape[-1]))
        return product(q, k, wide, scale=1.0)[..., : v.shape[-1]]


def widen_projections(module: CrossAttention | NoiseAttention | TemporalRefinement) -> None:
    """Zero rows after each head in the projections to queries, keys and values, and zero columns in the one from heads.
    `layers.product` scales by the new head size: the queries' weights make up for it."""
    heads, width = module.heads, module.project.in_features
    size = width // heads
    new = padded(size)
    if new == size:
        return

    def widen(x: Tensor) -> Tensor:
        """[n size, ...] -> [n new, ...]."""
        x = x.unflatten(0, (-1, size))
        return torch.cat([x, x.new_zeros(len(x), new - size, *x.shape[2:])], 1).flatten(0, 1)

    def widen_outputs(linear: nn.Linear) -> None:
        for x in (linear.weight, linear.bias):
            x.data = widen(x.data)
        linear.out_features = len(linear.weight)

    q = module.qkv if isinstance(module, TemporalRefinement) else module.q
    queries = [q.weight.data[:width], q.bias.data[:width]]
    if isinstance(module, NoiseAttention):
        queries.append(module.time.weight.data)
    for x in queries:
        x.mul_((new / size) ** 0.5)
    widen_outputs(q)
    if isinstance(module, CrossAttention):
        widen_outputs(module.keys.k)
        widen_outputs(module.keys.v)
    if isinstance(module, NoiseAttention):
        module.time.weight.data = widen(module.time.weight.data.movedim(-1, 0)).movedim(0, -1)
        # the coarsest keys come from another graph, and signatures stay as they are
        module.register_forward_pre_hook(widen_keys)
    module.project.weight.data = widen(module.project.weight.data.T).T.contiguous()
    module.project.in_features = heads * new


def widen_keys(module: NoiseAttention, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Of the arguments of `NoiseAttention.forward`, keys and values [B, M, heads size] -> [B, M, heads new]."""
    x, context, keys = args
    by_head = [y.unflatten(-1, (module.heads, -1)) for y in keys]
    return x, context, tuple(F.pad(y, (0, padded(y.shape[-1]) - y.shape[-1])).flatten(-2) for y in by_head)


# ---- split_depthwise


class SplitDepthwise(nn.Module):
    """A depth-wise 3 x 3 x 3 convolution with time stride 1 as the sum of three 2-D ones, one a time offset.

    [B, C, T, H, W] -> [B, C, T, ceil(H / stride), ceil(W / stride)], for one T. Each place in time counts as channels
    of its own, so that the input is taken as it lies in memory; what is shifted in time is the output, which the
    stride has made small."""

    def __init__(self, conv: nn.Conv3d, time: int) -> None:
        super().__init__()
        self.time = time
        channels = conv.in_channels * time
        self.offsets = nn.ModuleList()
        for offset in range(3):
            # without a start of its own: it would draw from the global random state
            flat = skip_init(
                nn.Conv2d,
                channels,
                channels,
                3,
                stride=conv.stride[1:],
                padding=1,
                groups=channels,
                bias=offset == 1 and conv.bias is not None,
                device=conv.weight.device,
            )
            flat.weight.data = conv.weight.data[:, :, offset].repeat_interleave(time, 0)
            if flat.bias is not None and conv.bias is not None:
                flat.bias.data = conv.bias.data.repeat_interleave(time)
            self.offsets.append(flat)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1, 2)
        before, now, after = (conv(x).unflatten(1, (-1, self.time)) for conv in self.offsets)
        # cut and padded in two steps: TensorRT's parser refuses a negative padding
        before = F.pad(before[:, :, :-1], (0, 0, 0, 0, 1, 0))
        after = F.pad(after[:, :, 1:], (0, 0, 0, 0, 0, 1))
        return now + before + after


def is_depthwise(module: nn.Module) -> TypeGuard[nn.Conv3d]:
    """Whether it is what `SplitDepthwise` computes."""
    return (
        isinstance(module, nn.Conv3d)
        and module.groups == module.in_channels == module.out_channels
        and module.kernel_size == (3, 3, 3)
        and module.padding == (1, 1, 1)
        and module.stride[0] == 1
        and module.dilation == (1, 1, 1)
    )


def split_depthwise(model: MUBiC) -> None:
    """Replaces the pooling convolutions of the visual encoder and those of fusion's local context: cuDNN and
    TensorRT are slow at depth-wise kernels of three dimensions. In place."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if is_depthwise(child):
                setattr(module, name, SplitDepthwise(child, model.config.time))


# ---- tokens


def as_tokens(model: MUBiC) -> None:
    """Products over tokens and pointwise arithmetic, for a compiler that fuses: `mubic_deploy.model.tokens`. In
    place."""
    fold_batch_norm(model)
    tokens(model)


def fold_batch_norm(model: MUBiC) -> None:
    """Puts each BatchNorm's scale and shift into the convolution before it. In place, for eval mode only."""
    for stage in model.modules():
        # a rewrite may have folded it before
        if isinstance(stage, NoiseStage) and hasattr(stage, "norm1") and not isinstance(stage.norm1, nn.Identity):
            for conv, norm in (("conv1", "norm1"), ("conv2", "norm2")):
                setattr(stage, conv, fuse_conv_bn_eval(getattr(stage, conv), getattr(stage, norm)))
                setattr(stage, norm, nn.Identity())


# ---- channels_last


def channels_last(model: MUBiC) -> None:
    """Lays the weights of dense convolutions out channels last, as tensor cores read them. In place.

    PyTorch's convolutions then take and give activations in that layout too; most of ours come so, from tokens. A
    depth-wise kernel gains nothing and would have its input transposed. An exported graph is the same with and
    without: in ONNX layout is the engine's affair."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Conv3d | nn.ConvTranspose3d) and module.groups == 1:
            layout = torch.channels_last if module.weight.dim() == 4 else torch.channels_last_3d
            module.weight.data = module.weight.data.to(memory_format=layout)
