"""The heat colours of a saliency map: nothing where it is low, blue over yellow to red where it is high."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

CLEAR, OPAQUE = 0.1, 0.7  # saliency below the first is left out, from the second on covered as much as it gets
COVER = 0.65  # how much of the frame the strongest colour hides


@lru_cache(maxsize=1)
def table() -> tuple[np.ndarray, np.ndarray]:
    """RGB uint8 [256, 3] and alpha float64 [256] in [0, 0.65] of saliency 0/255 .. 255/255."""
    from matplotlib import colormaps

    level = np.arange(256) / 255
    ramp = np.clip((level - CLEAR) / (OPAQUE - CLEAR), 0, 1)
    alpha = COVER * ramp * ramp * (3 - 2 * ramp)  # smooth at both ends: no visible rim
    # turbo's ends are nearly black: use what lies between
    rgb = colormaps["turbo"](0.12 + 0.8 * level)[:, :3]
    return np.rint(rgb * 255).astype(np.uint8), alpha


def levels(saliency: np.ndarray) -> np.ndarray:
    """[0, 1], any shape -> uint8 index into `table`."""
    return (np.clip(saliency, 0, 1) * 255 + 0.5).astype(np.uint8)


def blend_rgb(image: np.ndarray, saliency: np.ndarray) -> np.ndarray:
    """uint8 [h, w, 3] under float [h, w] in [0, 1] -> uint8 [h, w, 3]."""
    rgb, alpha = table()
    index = levels(saliency)
    cover = alpha[index][..., None]
    return np.rint(image * (1 - cover) + rgb[index] * cover).astype(np.uint8)


@lru_cache(maxsize=2)
def yuv_table(bt709: bool) -> np.ndarray:
    """uint8 [4, 256]: Y, U and V in video range times alpha, and alpha, of 256."""
    rgb, alpha = table()
    red, blue = (0.2126, 0.0722) if bt709 else (0.299, 0.114)
    r, g, b = rgb.T / 255
    y = red * r + (1 - red - blue) * g + blue * b
    yuv = np.stack([16 + 219 * y, 128 + 112 * (b - y) / (1 - blue), 128 + 112 * (r - y) / (1 - red)])
    cover = np.rint(256 * alpha)
    return np.rint(np.concatenate([yuv * cover / 256, cover[None]])).astype(np.uint8)
