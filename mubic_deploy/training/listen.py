"""A first hearing: the audio encoder learns to tell the sounds of rendered scenes apart, before it meets pictures.

The thesis's VGGish comes from AudioSet, where it learned to name sounds. A small VGGish that starts from nothing has no
such past, and its features are nearly the same for all sounds; this gives it one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mubic_deploy.config import Config, check_seed
from mubic_deploy.errors import whole
from mubic_deploy.model.audio import AudioEncoder
from mubic_deploy.scenes.plan import KINDS, OFF_SCREEN, Plan, make_plan, streams
from mubic_deploy.scenes.sound import synthesize
from mubic_deploy.scenes.viewers import DELAY_S
from mubic_deploy.training.clips import INT16, excerpt

SCENES, CHECKED = 256, 64  # to learn from; of the next seed, to see what was learned
SECONDS = 6.0
CLASSES = (*KINDS, "silence")
MIDDLE_HZ = 300.0  # pitches are learned in octaves from here
BATCH = 32
RATE, WARMUP = 1e-3, 50
CHECKS = 512  # excerpts
FEWEST = 10  # steps


@dataclass(frozen=True)
class Heard:
    """Excerpts of scenes and what is heard in them.

    audio   float32 [n, 16608], 16 kHz in [-1, 1]
    kind    int64 [n], index into CLASSES: of who is heard a viewer's delay before the excerpt's middle
    octave  float32 [n], log2 of the pitch over MIDDLE_HZ, NaN in silence"""

    audio: Tensor
    kind: Tensor
    octave: Tensor


class Sounds:
    """Scenes to draw excerpts from."""

    def __init__(self, seed: int, scenes: int) -> None:
        self.plans: list[Plan] = []
        self.sounds: list[np.ndarray] = []  # int16
        for index in range(scenes):
            for_plan, _, for_sound, _ = streams(seed, index)
            plan = make_plan(for_plan, SECONDS)
            self.plans.append(plan)
            self.sounds.append(np.rint(synthesize(plan, for_sound) * (INT16 - 1)).astype(np.int16))

    def draw(self, rng: np.random.Generator, count: int) -> Heard:
        """Random excerpts, but none of somebody out of sight."""
        audio: list[np.ndarray] = []
        kinds, octaves = [], []
        while len(audio) < count:
            number, time_s = int(rng.integers(len(self.plans))), rng.uniform(0.3, SECONDS)
            plan = self.plans[number]
            heard = int(plan.heard(np.array([time_s - float(np.mean(DELAY_S))]))[0])
            if heard == OFF_SCREEN:
                continue
            source = plan.candidates[heard] if heard >= 0 else None
            audio.append(excerpt(self.sounds[number], time_s))
            kinds.append(CLASSES.index(source.kind if source else "silence"))
            octaves.append(np.log2(source.pitch / MIDDLE_HZ) if source else np.nan)
        return Heard(torch.from_numpy(np.stack(audio)), torch.tensor(kinds), torch.tensor(octaves, dtype=torch.float32))


class Listener(nn.Module):
    """The audio encoder under a linear answer: AUDIO -> logits [B, 4] and octaves [B]."""

    def __init__(self, encoder: AudioEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.answer = nn.Linear(encoder.refine.norm2.normalized_shape[0], len(CLASSES) + 1)

    def forward(self, audio: Tensor) -> tuple[Tensor, Tensor]:
        (features,) = self.encoder(audio)
        out = self.answer(features.mean((2, 3, 4)))
        return out[:, :-1], out[:, -1]


def listen(
    config: Config, seed: int = 1, steps: int = 600, progress: Callable[[str, int, int], None] = lambda *_: None
) -> tuple[AudioEncoder, float, float]:
    """Trains a fresh audio encoder -> it, and on scenes of seed + 1 how many kinds it names rightly (of 1) and by how
    many octaves it misses a pitch in the mean. The same settings give the same weights on the same machine. UserError
    for less than FEWEST steps."""
    whole("steps", steps, FEWEST)
    check_seed(seed)
    progress("making sounds", 0, steps)
    sounds = Sounds(seed, SCENES)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Listener(AudioEncoder(config)).train()
    adam = torch.optim.Adam(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, RATE, total_steps=steps, pct_start=min(0.5, WARMUP / steps))
    for step in range(steps):
        heard = sounds.draw(np.random.default_rng((seed, step)), BATCH)
        logits, octaves = model(heard.audio)
        pitched = ~heard.octave.isnan()
        loss = F.cross_entropy(logits, heard.kind) + F.mse_loss(octaves[pitched], heard.octave[pitched])
        adam.zero_grad()
        loss.backward()
        adam.step()
        schedule.step()
        progress(f"listening, loss {loss.item():.3f}", step + 1, steps)
    right, octaves_off = check(model.eval(), Sounds(seed + 1, CHECKED), seed)
    return model.encoder, right, octaves_off


@torch.no_grad()
def check(model: Listener, sounds: Sounds, seed: int) -> tuple[float, float]:
    """Share of kinds named rightly, mean distance of the pitch in octaves."""
    heard = sounds.draw(np.random.default_rng((seed, CHECKS)), CHECKS)
    parts = [model(part) for part in heard.audio.split(BATCH)]
    named = torch.cat([logits for logits, _ in parts]).argmax(1)
    octaves = torch.cat([octave for _, octave in parts])
    return float((named == heard.kind).float().mean()), float((octaves - heard.octave).abs().nanmean())
