"""A map in a few numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

CELLS = 32  # of the grid that the box lies on, in both directions


@dataclass(frozen=True)
class Measures:
    """Of one map. Positions are 0..1 from the left and from the top of the frame.

    peak      (x, y) of the largest value, and the value
    centroid  (x, y) of the centre of mass
    entropy   Shannon's, of the map as a distribution, in parts of its largest: 0 a point, 1 the same everywhere
    box       (x, y, width, height) of the smallest box that holds half the mass, on a grid of 32 x 32 cells"""

    peak: tuple[float, float, float]
    centroid: tuple[float, float]
    entropy: float
    box: tuple[float, float, float, float]


def measure(saliency: np.ndarray) -> Measures:
    """saliency: float32 [h, w] in [0, 1]. A map of zeros counts as the same everywhere."""
    height, width = saliency.shape
    row, column = np.unravel_index(np.argmax(saliency), saliency.shape)
    peak = (float(column) + 0.5) / width, (float(row) + 0.5) / height, float(saliency.max())
    mass = np.maximum(saliency, 0, dtype=np.float64)
    total = mass.sum()
    mass = mass / total if total > 0 else np.full(saliency.shape, 1 / saliency.size)
    x = (mass.sum(axis=0) * (np.arange(width) + 0.5)).sum() / width
    y = (mass.sum(axis=1) * (np.arange(height) + 0.5)).sum() / height
    there = mass[mass > 0]
    entropy = -(there * np.log(there)).sum() / np.log(mass.size) if mass.size > 1 else 0.0
    return Measures(peak, (float(x), float(y)), float(entropy), _half(mass))


def _half(mass: np.ndarray) -> tuple[float, float, float, float]:
    """See `Measures.box`. mass: float64 [h, w] that sums to 1."""
    height, width = mass.shape
    rows, columns = (np.unique(np.linspace(0, n, min(n, CELLS) + 1).round().astype(int)) for n in mass.shape)
    summed = np.zeros((height + 1, width + 1))
    summed[1:, 1:] = mass.cumsum(axis=0).cumsum(axis=1)
    summed = summed[np.ix_(rows, columns)]
    best, box = np.inf, (0.0, 0.0, 1.0, 1.0)
    for top in range(len(rows) - 1):
        for bottom in range(top + 1, len(rows)):
            band = summed[bottom] - summed[top]
            right = np.searchsorted(band, band + 0.5 - 1e-12)
            left = np.flatnonzero(right < len(columns))
            if not len(left):
                continue
            widths = columns[right[left]] - columns[left]
            i = int(np.argmin(widths))
            area = int(widths[i]) * int(rows[bottom] - rows[top])
            if area < best:
                corner = columns[left[i]] / width, rows[top] / height
                best, box = area, (*corner, widths[i] / width, (rows[bottom] - rows[top]) / height)
    x, y, w, h = (float(value) for value in box)
    return x, y, w, h
