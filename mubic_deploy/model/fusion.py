"""Fusion: four multimodal interaction (MMI) blocks and the conditioning that the decoder reuses (thesis 3.2.3.3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mubic_deploy.config import AUDIO_SLICES, Config
from mubic_deploy.model.layers import FFN, Keys, TemporalEmbedding, attend, channels_first, channels_last


class AudioUpsample(nn.Module):
    """A [B, C_a, T_a, h_a, w_a] -> [B, 8, h_i, w_i, C_i]: a transposed convolution with kernel = stride
    (eq. 3.24); what exceeds the grid, where the sides do not divide, is cut off."""

    def __init__(self, config: Config, scale: int) -> None:
        super().__init__()
        self.grid = config.grids[scale]
        rows, columns = (-(-n // n_a) for n, n_a in zip(self.grid, config.audio_grid, strict=True))
        stride = (config.time // AUDIO_SLICES, rows, columns)
        self.conv = nn.ConvTranspose3d(config.vggish_channels[-1], config.visual_channels[scale], stride, stride)

    def forward(self, a: Tensor) -> Tensor:
        h, w = self.grid
        return channels_last(self.conv(a)[..., :h, :w])


class CrossAttention(nn.Module):
    """One direction of BECA: x attends to the other stream after STC (eq. 3.28 to 3.35), residual, LayerNorm."""

    def __init__(self, channels: int, width: int, heads: int, factor: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(channels, width)
        self.keys = Keys(channels, width, factor)
        self.project = nn.Linear(width, channels)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        attended = attend(self.q(x.flatten(1, 3)), self.keys(other), self.heads)
        return self.norm(x + self.project(attended).view(x.shape))


class LocalContext(nn.Module):
    """GLU, depth-wise 3-D convolution, residual, norm (eq. 3.36), then an FFN with residual and norm."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.glu = nn.Sequential(nn.Linear(channels, 2 * channels), nn.GLU(-1))
        self.conv = nn.Conv3d(channels, channels, 3, padding=1, groups=channels)
        self.norm1 = nn.LayerNorm(channels)
        self.ffn = FFN(channels, hidden)
        self.norm2 = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        local = channels_last(self.conv(channels_first(self.glu(x))))
        x = self.norm1(x + local)
        return self.norm2(x + self.ffn(x))


class GatedFusion(nn.Module):
    """F = alpha F_va + (1 - alpha) F_av, alpha = sigmoid(MLP([F_va, F_av])) (eq. 3.38, 3.39)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * channels, hidden), nn.ReLU(), nn.Linear(hidden, channels))

    def forward(self, f_va: Tensor, f_av: Tensor) -> Tensor:
        alpha = self.mlp(torch.cat([f_va, f_av], -1)).sigmoid()
        return f_av + alpha * (f_va - f_av)


class ConcatFusion(nn.Linear):
    """F = W [F_va, F_av]: the variant without gates."""

    def forward(self, f_va: Tensor, f_av: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(torch.cat([f_va, f_av], -1))


class MMI(nn.Module):
    """One block: V_i [B, C_i, 8, h_i, w_i] and A -> f_av_i [B, 8, h_i, w_i, C_i]."""

    def __init__(self, config: Config, scale: int) -> None:
        super().__init__()
        c = config
        channels, hidden = c.visual_channels[scale], c.ffn_channels[scale]
        beca = (channels, c.beca_channels[scale], c.beca_heads[scale], 2 ** (4 - scale))
        self.ffn_v = nn.Sequential(FFN(channels, hidden), FFN(channels, hidden))
        self.norm_v = nn.LayerNorm(channels)
        self.local_v = LocalContext(channels, hidden)
        if c.has_audio:
            self.upsample = AudioUpsample(c, scale)
            self.ffn_a = FFN(channels, hidden)
            self.norm_a = nn.LayerNorm(channels)
            self.time_v = TemporalEmbedding(c.time, channels)
            self.time_a = TemporalEmbedding(c.time, channels)
            self.vbeca = CrossAttention(*beca)
            self.abeca = CrossAttention(*beca) if c.variant != "no_beca" else None
            self.local_a = LocalContext(channels, hidden)
            concat = c.variant == "concat"
            self.fuse = (
                ConcatFusion(2 * channels, channels) if concat else GatedFusion(channels, c.gate_channels[scale])
            )
        self.has_audio = c.has_audio
        self.skip = nn.Linear(channels, channels) if c.variant != "no_skip" else None
        self.beta = nn.Parameter(torch.ones(())) if c.variant != "no_skip" else None

    def forward(self, v: Tensor, a: Tensor | None) -> Tensor:
        f_v = channels_last(v).contiguous()
        fused = self._interact(f_v, a) if a is not None else self.local_v(self.norm_v(self.ffn_v(f_v) + f_v))
        if self.skip is not None and self.beta is not None:
            fused = fused + self.beta * self.skip(f_v)  # eq. 3.41
        return fused

    def _interact(self, f_v: Tensor, a: Tensor) -> Tensor:
        f_a = self.upsample(a).contiguous()
        x_v = self.time_v(self.norm_v(self.ffn_v(f_v) + f_v))  # eq. 3.25, 3.27
        x_a = self.time_a(self.norm_a(self.ffn_a(f_a) + f_a))  # eq. 3.26
        f_va = self.local_v(self.vbeca(x_v, x_a))
        f_av = self.local_a(self.abeca(x_a, x_v) if self.abeca is not None else x_a)
        return self.fuse(f_va, f_av)


class AdaptiveSteps(nn.Module):
    """N = round(MLP(entropy of f_av_1)), clamped to 1..12 (section 3.2.6).

    The entropy is Shannon's, of the energy sum_c f^2 over all places and times as a distribution, divided by its
    largest value, so in [0, 1]. At the start the MLP says the default N for any entropy."""

    def __init__(self, config: Config, hidden: int = 16) -> None:
        super().__init__()
        self.max_steps = config.max_steps
        last = nn.Linear(hidden, 1)
        nn.init.zeros_(last.weight)
        nn.init.constant_(last.bias, config.default_steps)
        self.mlp = nn.Sequential(nn.Linear(1, hidden), nn.ReLU(), last)

    def forward(self, f: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T, h, w, C] -> entropy float32 [B, 1], N int32 [B, 1]."""
        energy = f.float().square().sum(-1).flatten(1)
        p = energy / energy.sum(1, keepdim=True)
        entropy = -(p * (p + 1e-12).log()).sum(1, keepdim=True) / math.log(p.shape[1])
        return entropy, self.mlp(entropy).round().clamp(1, self.max_steps).to(torch.int32)


class Fusion(nn.Module):
    """V1..V4 (and A) -> COND, ENTROPY, ADAPTIVE_STEPS. Runs once a clip, so it ends with all that does not depend on
    the noise or the step: the decoder's A_i (eq. 3.44) and the coarsest context with its keys and values."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(MMI(config, scale) for scale in range(4))
        pairs = zip(config.visual_channels, config.decoder_channels, strict=True)
        self.contexts = nn.ModuleList(nn.Linear(n, width) for n, width in pairs)
        width = config.decoder_channels[-1]
        self.keys4 = Keys(width, width, 2) if config.variant != "no_diffusion" else None
        self.adaptive = AdaptiveSteps(config)

    def forward(self, V1: Tensor, V2: Tensor, V3: Tensor, V4: Tensor, A: Tensor | None = None) -> tuple[Tensor, ...]:
        pairs = zip(self.blocks, (V1, V2, V3, V4), strict=True)
        fused = [block(v, A) for block, v in pairs]
        contexts = [project(f) for project, f in zip(self.contexts, fused, strict=True)]
        keys = self.keys4(contexts[-1]) if self.keys4 is not None else ()
        return (*(self.laid_out(x) for x in contexts), *keys, *self.adaptive(fused[0]))

    @staticmethod
    def laid_out(context: Tensor) -> Tensor:
        """[B, T, h, w, C] -> [B, C, T, h, w]."""
        return channels_first(context).contiguous()

    def parts(self) -> list[FusionScale]:
        """Together they are the fusion, of the same modules."""
        return [FusionScale(self, index) for index in range(4)]


class FusionScale(nn.Module):
    """One scale of a fusion, which no other scale waits for: V_i (and A) -> CONTEXT_i; after the first ENTROPY and
    ADAPTIVE_STEPS, after the last KEYS4 and VALUES4."""

    def __init__(self, fusion: Fusion, index: int) -> None:
        super().__init__()
        self.block, self.context = fusion.blocks[index], fusion.contexts[index]
        self.adaptive = fusion.adaptive if index == 0 else None
        self.keys4 = fusion.keys4 if index == 3 else None
        self.laid_out = fusion.laid_out

    def forward(self, v: Tensor, a: Tensor | None = None) -> tuple[Tensor, ...]:
        fused = self.block(v, a)
        context = self.context(fused)
        chosen = self.adaptive(fused) if self.adaptive is not None else ()
        keys = self.keys4(context) if self.keys4 is not None else ()
        return (self.laid_out(context), *chosen, *keys)
