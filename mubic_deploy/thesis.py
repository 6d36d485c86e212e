"""What the thesis reports of each variant (Table 4.3), to stand beside what is computed here."""

from __future__ import annotations

from typing import NamedTuple


class Reported(NamedTuple):
    parameters: float | None  # millions, VGGish left out
    macs: float | None  # billions for one inference of 4 steps; the thesis says FLOPs


TABLE_4_3 = {
    "full": Reported(79.60, 192.4),
    "no_beca": Reported(75.60, 171.2),
    "no_skip": Reported(78.80, 191.0),
    "concat": Reported(77.00, 184.3),
    "no_diffusion": Reported(None, None),
    "visual_only": Reported(None, None),
}
