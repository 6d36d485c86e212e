"""Layers that fusion and decoder share. Tokens are channels last: [B, T, h, w, C]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NO_RELU, LAST, BEFORE = 0, 1, 2  # where a convolution with a residual has its ReLU: after that is added, or before


def channels_last(x: Tensor) -> Tensor:
    """[B, C, T, h, w] -> [B, T, h, w, C]."""
    return x.permute(0, 2, 3, 4, 1)


def channels_first(x: Tensor) -> Tensor:
    """[B, T, h, w, C] -> [B, C, T, h, w]."""
    return x.permute(0, 4, 1, 2, 3)


class FFN(nn.Sequential):
    """C -> hidden -> C with ReLU (eq. 3.25)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels))


class STC(nn.Module):
    """Spatio-temporal compression: a depth-wise convolution, kernel = stride = 2^j in space, and LayerNorm.

    [B, T, h, w, C] -> [B, T ceil(h / 2^j) ceil(w / 2^j), C]. Zeros fill the last window where 2^j does not divide
    a side, so that no row or column is dropped."""

    def __init__(self, channels: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.conv = nn.Conv2d(channels, channels, factor, stride=factor, groups=channels)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, h, w, channels = x.shape
        x = x.permute(0, 1, 4, 2, 3).flatten(0, 1)  # [B T, C, h, w]
        x = self.conv(F.pad(x, (0, -w % self.factor, 0, -h % self.factor)))
        return self.norm(x.flatten(2).transpose(1, 2).reshape(batch, -1, channels))


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, D] -> [B, heads, N, D / heads]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


# Of an attention that is over soon: cuDNN's kernel, which PyTorch takes on Hopper, is quicker but starts 5 us later
FEW_KEYS, FEW_QUERIES = 256, 1024


def product(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """softmax(scale q k^T) v (eq. 3.31), the softmax in FP32. scale: 1 / sqrt(d) if None. [.., N, d] each."""
    if q.dtype == torch.float16 and torch.onnx.is_in_onnx_export():
        # the exporter's own attention takes the softmax in FP16; the scale goes to q, so that no sum overflows
        q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
        return (q @ k.transpose(-2, -1)).float().softmax(-1).half() @ v
    if takes_flash(q, k, v):
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[0]
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def takes_flash(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether a model in half precision should take PyTorch's own flash kernel, and can."""
    if not q.is_cuda or torch.is_grad_enabled() or torch.is_autocast_enabled("cuda"):
        return False  # a CPU, or training, on whichever GPU
    taken = q.dtype == k.dtype == v.dtype == torch.float16 and q.shape[-1] == v.shape[-1] and q.shape[-1] % 8 == 0
    return taken and (k.shape[-2] <= FEW_KEYS or q.shape[-2] <= FEW_QUERIES)


def attend(q: Tensor, keys: tuple[Tensor, Tensor], heads: int) -> Tensor:
    """Scaled dot-product attention (eq. 3.31). q [B, N, D], keys and values [B, M, D] each -> [B, N, D]."""
    k, v = keys
    out = product(split_heads(q, heads), split_heads(k, heads), split_heads(v, heads))
    return out.transpose(1, 2).flatten(2)


class Keys(nn.Module):
    """Compressed keys and values of a context (eq. 3.29, 3.30): [B, T, h, w, C] -> two [B, M, D]."""

    def __init__(self, channels: int, width: int, factor: int) -> None:
        super().__init__()
        self.stc = STC(channels, factor)
        self.k = nn.Linear(channels, width)
        self.v = nn.Linear(channels, width)

    def forward(self, context: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.stc(context)
        return self.k(tokens), self.v(tokens)


class TemporalEmbedding(nn.Module):
    """Adds a learned vector a time step (eq. 3.27) to [B, T, h, w, C]."""

    def __init__(self, time: int, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(time, 1, 1, channels))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight
