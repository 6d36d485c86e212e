"""What is minimised: the denoiser's squared error at a random step of the diffusion (thesis, Algorithm 1)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mubic_deploy.config import DIFFUSION_STEPS, Config
from mubic_deploy.diffusion import alpha_bar
from mubic_deploy.model.mubic import MUBiC


class Draw(NamedTuple):
    """Where on the diffusion the samples of a batch are, `noises` for each clip, one clip's after the other.

    step     int32 [B noises, 1], 0 to T - 1
    noise    float32 [B noises, 1, h, w], N(0, 1)
    guessed  bool [B noises, 1]: noise is added to the model's own first guess instead of to the truth"""

    step: Tensor
    noise: Tensor
    guessed: Tensor


def draw(
    config: Config, batch: int, generator: torch.Generator, noises: int = 1, power: float = 1.0, rollout: float = 0.0
) -> Draw:
    """Random steps and noise for `batch` clips, on the generator's device.

    Steps are t = T (1 - u^power) with u uniform in [0, 1): with power 1 uniform, as in Algorithm 1. A larger power
    draws more of the noisy steps. Where the noise is weak the answer shows through it, and only the noisy steps teach
    encoders and fusion anything; with power 3 every second step is above 0.87 T. rollout: how many of the samples are
    `guessed`, in [0, 1]."""
    n = batch * noises
    u = torch.rand(n, 1, generator=generator)
    step = ((1 - u**power) * DIFFUSION_STEPS).to(torch.int32).clamp(0, DIFFUSION_STEPS - 1)
    noise = torch.randn(n, 1, *config.map_size, generator=generator)
    guessed = torch.rand(n, 1, generator=generator) < rollout
    return Draw(step, noise, guessed)


class Objective(nn.Module):
    """VIDEO, AUDIO and TARGET of a batch and a `Draw` -> the loss of eq. 3.53 and 3.57, a scalar: squared error summed
    over the pixels of a map, mean over the batch (lambda = 1).

    A module of its own because that is what DistributedDataParallel wraps. alpha: float32 [T], alpha-bar of each
    step."""

    alpha: Tensor

    def __init__(self, model: MUBiC) -> None:
        super().__init__()
        self.model = model
        alphas = torch.tensor([alpha_bar(t) for t in range(DIFFUSION_STEPS)], dtype=torch.float32)
        self.register_buffer("alpha", alphas, persistent=False)

    def forward(self, batch: dict[str, Tensor], drawn: Draw) -> Tensor:
        predicted = self.predict(batch, drawn)
        copies = len(predicted) // len(batch["TARGET"])
        target = batch["TARGET"].repeat_interleave(copies, 0)
        return (predicted.float() - target).square().sum((1, 2, 3)).mean()

    def predict(self, batch: dict[str, Tensor], drawn: Draw) -> Tensor:
        """S_0 from TARGET with noise (eq. 3.55): float [B noises, 1, h, w] in [0, 1]. The noisy map lives in [-1, 1]'s
        scale, as in the denoiser.

        Where a sample is `guessed` the first DDIM step's answer to the same noise takes the truth's place, as it does
        in inference. Trained on the truth alone the denoiser takes what it sees behind the noise for evidence, and in
        inference sharpens its own uncertainty into one of the places that it wavered between. BatchNorm's
        running statistics take in that first pass too.

        In mixed precision the log-mel stays in 32 bits, as it does in inference."""
        model = self.model
        features = list(model.visual_encoder(batch["VIDEO"]))
        if model.config.has_audio:
            with torch.autocast(batch["AUDIO"].device.type, enabled=False):
                patches = model.audio_encoder.patches(batch["AUDIO"])
            features.append(model.audio_encoder.features(patches))
        *cond, _, _ = model.fusion(*features)
        copies = len(drawn.step) // len(batch["TARGET"])
        cond = [c.repeat_interleave(copies, 0) for c in cond]
        conditions = model.denoiser.conditions(cond)
        clean = batch["TARGET"].repeat_interleave(copies, 0)
        if drawn.guessed.any():
            with torch.no_grad():
                last = torch.full_like(drawn.step, DIFFUSION_STEPS - 1)
                guess = model.denoiser.predict(conditions, drawn.noise, model.denoiser.modulations(last)).float()
            torch.clear_autocast_cache()  # PyTorch 2.9 hands on its copies of weights, without their gradient
            clean = torch.where(drawn.guessed[..., None, None], guess, clean)
        clean = 2 * clean - 1
        alpha = self.alpha[drawn.step.long()][..., None, None]
        s_t = alpha.sqrt() * clean + (1 - alpha).sqrt() * drawn.noise
        return model.denoiser.predict(conditions, s_t, model.denoiser.modulations(drawn.step))
