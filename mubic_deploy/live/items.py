"""What a source gives, as it comes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mubic_deploy.media.film import Frame


@dataclass(frozen=True)
class Heard:
    """float32 [n] of 16 kHz sound, its first sample at sample `start` of the source's clock."""

    start: int
    samples: np.ndarray


class SoundEnd:
    """There is no sound, or no more of it."""


Item = Frame | Heard | SoundEnd
