"""Audio encoder: log-mel, VGGish's convolutions and temporal refinement (thesis 3.2.3.1)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchaudio.functional import melscale_fbanks

from mubic_deploy.config import AUDIO_SLICES, SAMPLE_RATE, SLICE_HOP, SLICE_SAMPLES, Config
from mubic_deploy.model.layers import FFN, attend

WINDOW, HOP, FFT = 400, 160, 512  # 25 ms, 10 ms
MELS, MEL_LOW, MEL_HIGH = 64, 125.0, 7500.0  # Hz
LOG_OFFSET = 0.01
# [log 0.01, 5.5] goes to [0, 1]: silence is 0, a full-scale sine stays below 1, what is louder is clipped.
LOG_LOW, LOG_HIGH = math.log(LOG_OFFSET), 5.5


def fourier_filters() -> Tensor:
    """Real and imaginary DFT filters under a periodic Hann window: [2 (FFT / 2 + 1), 1, WINDOW] for conv1d."""
    n = torch.arange(WINDOW, dtype=torch.float64)
    window = 0.5 - 0.5 * torch.cos(2 * math.pi * n / WINDOW)
    phase = 2 * math.pi / FFT * torch.arange(FFT // 2 + 1, dtype=torch.float64)[:, None] * n
    return torch.cat([phase.cos(), -phase.sin()]).mul(window)[:, None].float()


def mel_filters() -> Tensor:
    """Triangles, linear in Hz between centres spaced evenly on HTK's mel scale: [FFT / 2 + 1, MELS]."""
    with torch.device("cpu"):  # it looks at its values, which the meta device has not
        return melscale_fbanks(FFT // 2 + 1, MEL_LOW, MEL_HIGH, MELS, SAMPLE_RATE)


class LogMel(nn.Module):
    """AUDIO float32 [B, 16608], 16 kHz in [-1, 1] -> log-mel [B, T_a, 96, 64]: log(mel + 0.01) of T_a slices of
    15 600 samples, one every 336. DFT and framing are one convolution: TensorRT has no STFT."""

    fourier: Tensor
    mel: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("fourier", fourier_filters(), persistent=False)
        self.register_buffer("mel", mel_filters(), persistent=False)

    def forward(self, audio: Tensor) -> Tensor:
        slices = [audio[:, i * SLICE_HOP : i * SLICE_HOP + SLICE_SAMPLES] for i in range(AUDIO_SLICES)]
        x = torch.stack(slices, 1).flatten(0, 1)[:, None]  # [B T_a, 1, 15600]
        real, imaginary = F.conv1d(x, self.fourier, stride=HOP).chunk(2, 1)  # [B T_a, 257, 96]
        magnitude = (real.square() + imaginary.square()).sqrt()
        mel = magnitude.transpose(1, 2) @ self.mel
        return (mel + LOG_OFFSET).log().unflatten(0, (-1, AUDIO_SLICES))


class TemporalRefinement(nn.Module):
    """Self-attention over the T_a slices at each place and FFN, residual and LayerNorm after each (eq. 3.5 to 3.8).

    [B, T_a, C, h_a, w_a] -> [B, C, T_a, h_a, w_a]."""

    def __init__(self, channels: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.position = nn.Parameter(torch.empty(AUDIO_SLICES, channels))
        nn.init.trunc_normal_(self.position, std=0.02)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.project = nn.Linear(channels, channels)
        self.norm1 = nn.LayerNorm(channels)
        self.ffn = FFN(channels, hidden)
        self.norm2 = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        x = (x.permute(0, 3, 4, 1, 2) + self.position).flatten(0, 2)  # [B h w, T_a, C]
        q, k, v = self.qkv(x).chunk(3, -1)
        x = self.norm1(x + self.project(attend(q, (k, v), self.heads)))
        x = self.norm2(x + self.ffn(x))
        return x.unflatten(0, (-1, h, w)).permute(0, 4, 3, 1, 2)


class AudioEncoder(nn.Module):
    """AUDIO float32 [B, 16608] -> A float32 [B, C_a, T_a, h_a, w_a]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.patch = config.audio_patch
        self.log_mel = LogMel()
        c1, c2, c3, c4 = config.vggish_channels
        layers: list[nn.Module] = []
        previous = 1
        for width in (c1, "pool", c2, "pool", c3, c3, "pool", c4, c4, "pool"):
            if isinstance(width, int):
                layers += [nn.Conv2d(previous, width, 3, padding=min(len(layers), 1)), nn.ReLU()]
                previous = width
            else:
                layers.append(nn.MaxPool2d(2))
        for layer in layers:
            if isinstance(layer, nn.Conv2d):  # PyTorch's own start leaves 1 % of the sound after six layers
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)
        self.vggish = nn.Sequential(*layers)
        self.refine = TemporalRefinement(c4, config.audio_heads, config.audio_ffn)

    def patches(self, audio: Tensor) -> Tensor:
        """[B, 16608] -> [B T_a, 1, H_a + 2, W_a + 2] in [0, 1], the mel axis up, time across.

        The rim belongs to VGGish's first convolution, which pads with a log-mel of 0: its weights know it so."""
        x = self.log_mel(audio).flatten(0, 1).transpose(1, 2)[:, None]
        x = ((x - LOG_LOW) / (LOG_HIGH - LOG_LOW)).clamp(0, 1)
        if tuple(x.shape[-2:]) != self.patch:
            x = F.interpolate(x, size=self.patch, mode="bilinear")
        return F.pad(x, (1, 1, 1, 1), value=-LOG_LOW / (LOG_HIGH - LOG_LOW))

    def features(self, patches: Tensor) -> Tensor:
        """float32 [B T_a, 1, H_a + 2, W_a + 2], as `patches` makes them -> A."""
        return self.refine(self.vggish(patches).unflatten(0, (-1, AUDIO_SLICES)))

    def forward(self, AUDIO: Tensor) -> tuple[Tensor]:
        return (self.features(self.patches(AUDIO)),)
