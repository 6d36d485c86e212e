"""Geometry: how frames of any size are placed in the model's input, and how maps come back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mubic_deploy.config import check_fit

BAR = 115  # 255 * 0.45, the mean that the visual encoder subtracts: bars are zero to the model
MAP_WIDTH = 384  # maps go back to the film's size, but are never wider than this


@dataclass(frozen=True)
class Fit:
    """Frames of `display` (height, width) in a model input of `size`, both in pixels.

    The whole frame is resized to `scaled`; its top left corner then lies at `corner` of the input, which is negative
    where a crop cuts off."""

    display: tuple[int, int]
    size: tuple[int, int]
    scaled: tuple[int, int]
    corner: tuple[int, int]

    def place(self, frame: np.ndarray, bar: int = BAR) -> np.ndarray:
        """[*scaled, channels] -> [*size, channels] of the same type, with bars of `bar` where it does not reach."""
        if self.scaled == self.size:
            return frame
        out = np.full((*self.size, frame.shape[2]), bar, frame.dtype)
        y, x = self.corner
        inside = frame[max(-y, 0) : self.size[0] - y, max(-x, 0) : self.size[1] - x]
        out[max(y, 0) : max(y, 0) + inside.shape[0], max(x, 0) : max(x, 0) + inside.shape[1]] = inside
        return out

    @property
    def map_shape(self) -> tuple[int, int]:
        """(height, width) of maps in the film's geometry: its display size, at most 384 wide."""
        return map_shape(self.display)

    def back(self, saliency: np.ndarray, shape: tuple[int, ...] | None = None) -> np.ndarray:
        """float32 [h, w] over the model's input, at any resolution, -> float32 [*shape] over the frame.

        shape: (height, width) of the wanted map, `map_shape` by default. Bilinear, pixel centres at half integers.
        Bars are cut off; what a crop did not see is 0."""
        height, width = self.map_shape if shape is None else shape
        out = saliency.astype(np.float32, copy=False)
        (above, below), (up, down) = self._taps(0, saliency.shape[0], height)
        out = up[:, None] * out[above] + down[:, None] * out[below]
        (before, behind), (left, right) = self._taps(1, saliency.shape[1], width)
        return left * out[:, before] + right * out[:, behind]

    def _taps(self, axis: int, n: int, wanted: int) -> tuple[np.ndarray, np.ndarray]:
        """int [2, wanted] and float32 [2, wanted]: the two of `n` map pixels that each of the `wanted` over the frame
        lies between, and their bilinear weights. (Not as a matrix: after a product the threads of NumPy's BLAS spin for
        100 ms, on cores that a model could have.)"""
        scale = n / self.size[axis]
        top, extent = self.corner[axis] * scale, self.scaled[axis] * scale
        centre = top + (np.arange(wanted) + 0.5) * extent / wanted
        below = np.floor(centre - 0.5)
        part = (centre - 0.5 - below).astype(np.float32)
        # taps stay on the pixels that the frame touches, so that no bar bleeds into its edge
        first, last = max(int(np.floor(top)), 0), min(int(np.ceil(top + extent)), n) - 1
        taps = np.clip([below, below + 1], first, last).astype(int)
        inside = (centre >= 0) & (centre <= n)
        return taps, np.stack([1 - part, part]) * inside


def map_shape(display: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of the maps of a film shown at `display`: the same, or 384 wide in the same shape."""
    height, width = display
    if width <= MAP_WIDTH:
        return display
    return max(1, round(height * MAP_WIDTH / width)), MAP_WIDTH


def make_fit(name: str, display: tuple[int, int], size: tuple[int, int]) -> Fit:
    """The fit `name` of frames of `display` (height, width) to a model input of `size`.

    `letterbox` shows the whole frame between bars, `crop` fills the input with the frame's centre, `stretch` changes
    the frame's shape. UserError for another name."""
    if check_fit(name) == "stretch":
        return Fit(display, size, size, (0, 0))
    ratios = [s / d for s, d in zip(size, display, strict=True)]
    ratio = min(ratios) if name == "letterbox" else max(ratios)
    height, width = (max(1, round(d * ratio)) for d in display)
    return Fit(display, size, (height, width), ((size[0] - height) // 2, (size[1] - width) // 2))
