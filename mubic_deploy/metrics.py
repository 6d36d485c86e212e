"""Saliency metrics, in NumPy."""

from __future__ import annotations

import numpy as np


def cc(prediction: np.ndarray, target: np.ndarray) -> float:
    """Pearson's correlation of two maps [h, w] (eq. 3.59), in [-1, 1]; NaN if one of them is constant."""
    a = np.asarray(prediction, np.float64).ravel()
    b = np.asarray(target, np.float64).ravel()
    a, b = a - a.mean(), b - b.mean()
    norm = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / norm) if norm > 0 else float("nan")
