"""What a training run is made of. The defaults are the thesis's (3.2.5, tables 4.1 and 4.2), and where it is silent
those that docs/architecture.md gives reasons for ("Training: choices")."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from mubic_deploy.config import CONFIGS, FITS, VARIANTS, check_seed
from mubic_deploy.errors import UserError, whole

# of the field's layout (layout.py); here because the command line wants them before it reads anything
DATASETS = ("AVAD", "DIEM", "SumMe", "ETMD_av", "Coutrot_db1", "Coutrot_db2", "Scenes")
PARTS = ("train", "test")
SPLITS = (1, 2, 3)
NEGATIVES = ("others", "video")  # of the shuffled AUC: fixations of other videos, or of the own one
OTHERS = NEGATIVES[0]

SCHEDULES = ("piecewise", "plateau", "cosine")
LIGHTNING_PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")  # Lightning Fabric's names
PIECES = ((0.5, 1.0), (0.75, 0.1), (1.0, 0.01))  # up to this part of the epochs, this part of the learning rate
COSINE_END = 0.01


@dataclass(frozen=True)
class Settings:
    """Everything that decides the weights of a run, but for the data, the pretrained files and the machine.

    batch              clips a step, over all devices
    learning_rate      of Adam; `schedule` scales it: piecewise (1e-4, 1e-5, 1e-6 in 12 epochs: 6, 3, 3), plateau
                       (ReduceLROnPlateau on the epoch's loss, to a hundredth), cosine (to a hundredth)
    warmup             steps over which the learning rate rises from 0
    noises             diffusion steps drawn for each clip, which share its encoders and fusion
    timestep_power     1 draws the diffusion's steps uniformly, more prefers noisy ones (objective.draw)
    rollout            how many of the samples get their noise on the model's own first guess, as in inference, instead
                       of on the truth (objective.py)
    stochastic_depth   of the visual encoder's last block, falling to 0 at the first
    freeze_vggish      keep VGGish's convolutions as they are (they should be pretrained then)
    stride             frames between the starts of two clips
    flip               mirror half of the clips
    jitter             start each clip up to stride - 1 frames later, anew in each epoch
    validate           clips of the test part that are evaluated after each epoch"""

    config: str = "full"
    variant: str = "full"
    epochs: int = 12
    batch: int = 8
    learning_rate: float = 1e-4
    schedule: str = "piecewise"
    warmup: int = 0
    noises: int = 1
    timestep_power: float = 1.0
    rollout: float = 0.0
    stochastic_depth: float = 0.2
    freeze_vggish: bool = True
    stride: int = 4
    fit: str = FITS[0]
    flip: bool = True
    jitter: bool = True
    precision: str = "32-true"
    validate: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in {
            "config": tuple(CONFIGS),
            "variant": VARIANTS,
            "schedule": SCHEDULES,
            "precision": LIGHTNING_PRECISIONS,
            "fit": FITS,
        }.items():
            if getattr(self, name) not in known:
                raise UserError(f"unknown {name} {getattr(self, name)!r}: choose one of {', '.join(known)}")
        for name in ("epochs", "batch", "noises", "stride", "validate"):
            object.__setattr__(self, name, whole(name, getattr(self, name), 1))
        object.__setattr__(self, "warmup", whole("warmup", self.warmup, 0))
        object.__setattr__(self, "seed", check_seed(self.seed))
        if not 0 < self.learning_rate < math.inf:
            raise UserError(f"learning rate {self.learning_rate} is out of range: use a positive number, such as 1e-4")
        if not 1 <= self.timestep_power <= 100:
            raise UserError(f"timestep power {self.timestep_power} is out of range: use 1 (uniform) to 100")
        if not 0 <= self.rollout <= 1:
            raise UserError(f"rollout {self.rollout} is out of range: use 0 (none) to 1")
        if not 0 <= self.stochastic_depth < 1:
            raise UserError(f"stochastic depth {self.stochastic_depth} is out of range: use 0 to below 1")

    def factor(self, epoch: int, step: int, steps: int) -> float:
        """What the learning rate is multiplied with at `step` of `steps` of `epoch`, all from 0. `plateau` adds its own
        factor to this one."""
        done = epoch * steps + step
        rise = min(1.0, (done + 1) / self.warmup) if self.warmup else 1.0
        if self.schedule == "piecewise":
            return rise * next(factor for end, factor in PIECES if epoch < end * self.epochs)
        if self.schedule == "cosine":
            part = done / (self.epochs * steps)
            return rise * (COSINE_END + (1 - COSINE_END) * (1 + math.cos(math.pi * part)) / 2)
        return rise

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> Settings:
        """Inverse of `to_json`. UserError if the fields are not this version's."""
        known = {f.name for f in fields(cls)}
        if not isinstance(data, dict) or set(data) != known:
            odd = sorted(set(data) ^ known) if isinstance(data, dict) else [type(data).__name__]
            raise UserError(
                f"the settings of the run do not fit this version (fields {', '.join(odd)}): start a new run"
            )
        return cls(**data)

    def differences(self, other: Settings) -> str:
        """The fields in which the two differ, for people; empty if none."""
        mine, theirs = self.to_json(), other.to_json()
        return ", ".join(
            f"{k} {json.dumps(theirs[k])} instead of {json.dumps(mine[k])}" for k in mine if mine[k] != theirs[k]
        )


# By the name that --recipe takes. `demo` starts from nothing but what `mubic-deploy listen` taught its VGGish: so
# VGGish is trained too, the learning rate is higher, and what little time there is goes to the noisy steps, which
# teach encoders and fusion.
RECIPES = {
    "thesis": Settings(),
    "demo": Settings(
        config="demo",
        epochs=6,
        batch=4,
        learning_rate=7e-4,
        schedule="cosine",
        warmup=100,
        noises=2,
        timestep_power=3.0,
        rollout=0.75,
        stochastic_depth=0.0,
        freeze_vggish=False,
        stride=24,
        seed=1,
    ),
}
