"""Denoiser: noise encoder, four conditional denoising modules, and the DDIM update (thesis 3.2.3.2, 3.2.3.4)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mubic_deploy.config import Config
from mubic_deploy.diffusion import alpha_bar, step_pairs
from mubic_deploy.model.layers import Keys, TemporalEmbedding, attend, channels_first, channels_last

# a scale's tensors that no step changes, and the coarsest context's keys and values
Conditions = tuple[list[tuple[Tensor, ...]], tuple[Tensor, Tensor] | None]


class StepEmbedding(nn.Module):
    """STEP int32 [B, 1] -> [B, C]: sines and cosines of the step, then an MLP (eq. 3.20)."""

    frequencies: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        frequencies = torch.exp(-math.log(10_000) * torch.arange(half) / half)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(channels, channels), nn.SiLU(), nn.Linear(channels, channels), nn.SiLU())

    def forward(self, step: Tensor) -> Tensor:
        angles = step.float() * self.frequencies
        return self.mlp(torch.cat([angles.sin(), angles.cos()], -1))


class NoiseStage(nn.Module):
    """A residual stage that halves the grid, with scale and shift from the step (eq. 3.18 to 3.23)."""

    def __init__(self, inputs: int, outputs: int, step_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.modulation = nn.Linear(step_channels, 2 * outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride=2)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        y = self.modulated(self.norm1(self.conv1(x)), modulation)
        return F.relu(self.shortcut(x) + self.norm2(self.conv2(y)))

    @staticmethod
    def modulated(y: Tensor, modulation: Tensor) -> Tensor:
        """y [B, C, h, w] with scale and shift of `modulation` [B, 2 C]."""
        half = modulation.shape[1] // 2  # sliced, not split: of a constant, a slice folds away
        scale, shift = modulation[:, :half, None, None], modulation[:, half:, None, None]
        return F.relu(y * (1 + scale) + shift)


class NoiseEncoder(nn.Module):
    """S_T [B, 1, h, w] and the stages' modulations [B, 2 C] -> X_1..X_4 [B, C, h_i, w_i]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        widths = (1, *config.noise_channels)
        self.stages = nn.ModuleList(
            NoiseStage(widths[i], widths[i + 1], config.step_channels) for i in range(len(widths) - 1)
        )

    def forward(self, x: Tensor, modulations: list[Tensor]) -> list[Tensor]:
        features = []
        for stage, modulation in zip(self.stages, modulations, strict=True):
            x = stage(x, modulation)
            features.append(x)
        return features


class Context(nn.Module):
    """f_con_i of a finer scale: the coarser output upsampled (eq. 3.43) and mixed with A_i (eq. 3.44 to 3.46)."""

    def __init__(self, coarse: int, channels: int, gated: bool) -> None:
        super().__init__()
        self.upsample = nn.ConvTranspose3d(coarse, channels, (1, 2, 2), (1, 2, 2))
        self.project = nn.Linear(channels, channels)
        self.mix = nn.Linear(2 * channels, channels)
        self.gated = gated

    def condition(self, a: Tensor) -> tuple[Tensor, ...]:
        """What depends on A_i [B, T, h, w, C] alone, so is the same at every step."""
        return (a,)

    def forward(self, coarse: Tensor, a: Tensor) -> Tensor:
        h, w = a.shape[2:4]
        b = self.project(channels_last(self.upsample(channels_first(coarse))[..., :h, :w]))
        mixed = self.mix(torch.cat([a, b], -1))
        return b + mixed.sigmoid() * (a - b) if self.gated else mixed


class TemporalConv(nn.Module):
    """A convolution over 3 frames with residual (eq. 3.51) on [B, T, h, w, D]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels, channels, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, x: Tensor) -> Tensor:
        return x + channels_last(F.relu(self.conv(channels_first(x))))


class NoiseAttention(nn.Module):
    """The noise feature's places, at each of the T time steps, attend to the compressed context (eq. 3.47 to 3.50).

    x [B, C, h, w], context [B, T, h, w, D], keys and values [B, M, D] -> [B, T, h, w, D]."""

    def __init__(self, config: Config, scale: int) -> None:
        super().__init__()
        width = config.decoder_channels[scale]
        self.heads = config.decoder_heads[scale]
        self.q = nn.Linear(config.noise_channels[scale], width)
        self.time = TemporalEmbedding(config.time, width)
        self.project = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, context: Tensor, keys: tuple[Tensor, Tensor]) -> Tensor:
        # the projection before the time axis: it is the same for all T, and T times fewer products
        q = self.time(self.q(x.permute(0, 2, 3, 1))[:, None])
        attended = attend(q.flatten(1, 3), keys, self.heads)
        return self.norm(context + self.project(attended).view(context.shape))


class Decoder(nn.Module):
    """Coarse to fine over the four scales, then one map in [0, 1] (eq. 3.42 to 3.52).

    Without noise features (variant no_diffusion) the same chain regresses the map from the contexts alone; the norm
    that else follows the attention to them stays."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        widths = config.decoder_channels
        self.diffusion = config.variant != "no_diffusion"
        gated = config.variant != "concat"
        self.contexts = nn.ModuleList(Context(widths[i + 1], widths[i], gated) for i in range(3))
        self.temporal = nn.ModuleList(TemporalConv(n) for n in widths)
        if self.diffusion:
            self.keys = nn.ModuleList(Keys(widths[i], widths[i], 2 ** (4 - i)) for i in range(3))
            self.attention = nn.ModuleList(NoiseAttention(config, i) for i in range(4))
        else:
            self.norms = nn.ModuleList(nn.LayerNorm(n) for n in widths)
        self.collapse = nn.Conv3d(widths[0], widths[0], (config.time, 1, 1))
        self.head = nn.Conv2d(widths[0], 1, 3, padding=1)

    def conditions(self, contexts: list[Tensor]) -> list[tuple[Tensor, ...]]:
        """What of CONTEXT1..4 [B, D_i, T, h_i, w_i] is the same at every step, a scale."""
        tokens = [channels_last(x) for x in contexts]
        finer = (c for c in self.contexts if isinstance(c, Context))  # all of them: a list knows only modules
        return [*(context.condition(a) for context, a in zip(finer, tokens[:3], strict=True)), (tokens[3],)]

    def forward(
        self, conditions: list[tuple[Tensor, ...]], keys4: tuple[Tensor, Tensor] | None, noise: list[Tensor]
    ) -> Tensor:
        """What `conditions` gave -> [B, 1, h, w]."""
        (f,) = conditions[3]
        for i in (3, 2, 1, 0):
            if i < 3:
                f = self.contexts[i](f, *conditions[i])
            if self.diffusion:
                f = self.attention[i](noise[i], f, keys4 if i == 3 else self.keys[i](f))
            else:
                f = self.norms[i](f)
            f = self.temporal[i](f)
        x = F.relu(self.collapse(channels_first(f))[:, :, 0])
        return F.interpolate(self.head(x), scale_factor=2.0, mode="bilinear").sigmoid()


class Denoiser(nn.Module):
    """One DDIM step: COND, S_T, STEP, ALPHA_NOW, ALPHA_NEXT -> S_0 in [0, 1] and S_NEXT.

    S_T lives in [-1, 1]'s scale, where the map is 2 S_0 - 1, as the noise is centred on zero. With S_NEXT computed
    here (eq. 3.58) the loop around the graph only passes tensors on."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.diffusion = config.variant != "no_diffusion"
        if self.diffusion:
            self.step_embedding = StepEmbedding(config.step_channels)
            self.noise_encoder = NoiseEncoder(config)
        self.decoder = Decoder(config)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        *cond, s_t, step, alpha_now, alpha_next = inputs
        s_0 = self.predict(self.conditions(cond), s_t, self.modulations(step))
        return s_0, self.update(s_0, s_t, alpha_now, alpha_next)

    def modulations(self, step: Tensor) -> list[Tensor]:
        """Of each stage of the noise encoder, [B, 2 C]; none without diffusion."""
        if not self.diffusion:
            return []
        embedding = self.step_embedding(step)
        stages = (stage for stage in self.noise_encoder.stages if isinstance(stage, NoiseStage))
        return [stage.modulation(embedding) for stage in stages]

    def conditions(self, cond: list[Tensor]) -> Conditions:
        """What of COND is the same at every step."""
        return self.decoder.conditions(cond[:4]), (cond[4], cond[5]) if self.diffusion else None

    def predict(self, conditions: Conditions, s_t: Tensor, modulations: list[Tensor]) -> Tensor:
        """S_0: the clean map that the network sees behind s_t."""
        noise = self.noise_encoder(s_t, modulations) if self.diffusion else []
        return self.decoder(*conditions, noise)

    @staticmethod
    def update(s_0: Tensor, s_t: Tensor, alpha_now: Tensor, alpha_next: Tensor) -> Tensor:
        """S_NEXT of eq. 3.58; alphas are alpha-bar [B, 1]."""
        now, following = alpha_now[..., None, None], alpha_next[..., None, None]
        clean = 2 * s_0 - 1
        noise = (s_t - now.sqrt() * clean) / (1 - now).sqrt()
        return following.sqrt() * clean + (1 - following).sqrt() * noise


class Sampler(nn.Module):
    """The loop over a fixed number of steps as one graph: COND and S_T -> SALIENCY [B, h, w] in [0, 1] (Algorithm 2).

    Steps and alpha-bars are constants, the same for all samples. What depends on them alone is computed once, when the
    loop is made, of the weights as they are then."""

    def __init__(self, denoiser: Denoiser, steps: int) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.pairs = step_pairs(steps)
        device = next(denoiser.parameters()).device
        with torch.no_grad():
            each = [denoiser.modulations(torch.full((1, 1), now, device=device)) for now, _ in self.pairs]
        self.stages = len(each[0])
        for name, x in ((self._name(i, j), x) for i, step in enumerate(each) for j, x in enumerate(step)):
            self.register_buffer(name, x, persistent=False)

    @staticmethod
    def _name(step: int, stage: int) -> str:
        return f"modulation_{step}_{stage}"

    def forward(self, *inputs: Tensor) -> tuple[Tensor]:
        *cond, s_t = inputs

        def constant(value: float) -> Tensor:
            return torch.full((1, 1), value, device=s_t.device)

        conditions = self.denoiser.conditions(cond)
        for i, (now, following) in enumerate(self.pairs):
            modulations = [self.get_buffer(self._name(i, j)) for j in range(self.stages)]
            s_0 = self.denoiser.predict(conditions, s_t, modulations)
            if i < len(self.pairs) - 1:
                s_t = Denoiser.update(s_0, s_t, constant(alpha_bar(now)), constant(alpha_bar(following)))
        return (s_0[:, 0],)
