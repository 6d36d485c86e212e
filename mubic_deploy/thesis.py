"""What the thesis reports, on AVAD, to stand beside what is computed here."""

from __future__ import annotations

from typing import NamedTuple


class Reported(NamedTuple):
    parameters: float | None  # millions, VGGish left out
    macs: float | None  # billions for one inference of 4 steps; the thesis says FLOPs
    cc: float
    nss: float
    sim: float


TABLE_4_2 = {  # 5 and 12 epochs, batch 8, mean of the three splits
    5: Reported(79.60, None, 0.798, 4.28, 0.683),
    12: Reported(79.60, None, 0.823, 4.38, 0.710),
}
TABLE_4_3 = {  # 12 epochs, batch 8
    "full": Reported(79.60, 192.4, 0.823, 4.38, 0.710),
    "no_beca": Reported(75.60, 171.2, 0.780, 4.15, 0.673),
    "no_skip": Reported(78.80, 191.0, 0.803, 4.20, 0.692),
    "concat": Reported(77.00, 184.3, 0.791, 4.29, 0.698),
    "no_diffusion": Reported(None, None, 0.764, 3.89, 0.659),
    "visual_only": Reported(None, None, 0.715, 3.47, 0.601),
}
