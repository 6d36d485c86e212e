"""What the thesis reports of each variant (Table 4.3), to stand beside what is computed here."""

from __future__ import annotations

from typing import NamedTuple


class Reported(NamedTuple):
    title: str
    parameters: float | None  # millions, VGGish left out
    macs: float | None  # billions for one inference of 4 steps; the thesis says FLOPs


TABLE_4_3 = {
    "full": Reported("MUBiC", 79.60, 192.4),
    "no_beca": Reported("without BECA, one direction", 75.60, 171.2),
    "no_skip": Reported("without residual skip", 78.80, 191.0),
    "concat": Reported("concatenation, no gates", 77.00, 184.3),
    "no_diffusion": Reported("without diffusion decoder", None, None),
    "visual_only": Reported("visual only", None, None),
}
