"""A contact sheet: a few predicted frames of a film, each above the same frame with its map."""

from __future__ import annotations

from collections import deque
from pathlib import Path

import numpy as np

from mubic_deploy.media import heat
from mubic_deploy.media.film import Frame, Resizer
from mubic_deploy.media.maps import FilmMap

PAIRS = 8


class ContactSheet:
    """Picks `pairs` predicted frames evenly over a film whose length is not known, and draws them as a PNG.

    Between `pairs` and 2 * `pairs` of them are kept at any time: when there are too many, every second one goes."""

    def __init__(self, path: Path, name: str, window: int, pairs: int = PAIRS) -> None:
        """window: the frames of a clip; a map comes with its last one."""
        self._path, self._name, self._pairs = path, name, pairs
        self._waiting: deque[Frame] = deque(maxlen=window)
        self._kept: list[tuple[float, np.ndarray, np.ndarray]] = []  # time, RGB, saliency
        self._every, self._maps = 1, 0
        self._resize = Resizer()

    def add_frame(self, frame: Frame) -> None:
        self._waiting.append(frame)

    def add_map(self, item: FilmMap) -> None:
        while self._waiting[0].index < item.frame_index:
            self._waiting.popleft()
        if self._maps % self._every == 0:
            size = item.saliency.shape[0], item.saliency.shape[1]
            image = self._resize(self._waiting[0].image, size, "rgb24").to_ndarray()
            self._kept.append((item.time_s, image, item.saliency))
            if len(self._kept) == 2 * self._pairs:
                self._kept, self._every = self._kept[::2], 2 * self._every
        self._maps += 1

    def finish(self) -> None:
        """Draws the sheet. OSError if it cannot be written."""
        chosen = np.unique(np.linspace(0, len(self._kept) - 1, self._pairs).round().astype(int))
        draw_sheet(self._path, self._name, [self._kept[i] for i in chosen])

    def close(self) -> None:
        self._waiting.clear()


def draw_sheet(path: Path, name: str, pairs: list[tuple[float, np.ndarray, np.ndarray]]) -> None:
    """pairs: (time in seconds, RGB uint8 [h, w, 3], saliency float32 [h, w] in [0, 1]) -> a PNG of frame over overlay,
    each with its time."""
    from matplotlib.figure import Figure

    height, width = pairs[0][1].shape[:2]
    columns = min(len(pairs), 4 if width > height else 8)
    rows = -(-len(pairs) // columns)
    cell = 3.0 if width > height else 1.5  # inches
    tall = cell * height / width
    margin, gap, label, title = 0.2, 0.08, 0.26, 0.4
    block = label + 2 * tall + gap
    size = (2 * margin + columns * cell + (columns - 1) * gap, title + margin + rows * (block + gap))
    figure = Figure(figsize=size, dpi=128, facecolor="white")
    heading = figure.text(margin / size[0], 1 - 0.6 * title / size[1], name, fontsize=11, weight="bold", va="center")
    heading.set_parse_math(False)  # a $ in a name is a $
    for i, (time_s, image, saliency) in enumerate(pairs):
        left = margin + i % columns * (cell + gap)
        top = size[1] - title - i // columns * (block + gap)
        figure.text(left / size[0], (top - 0.6 * label) / size[1], f"{time_s:.2f} s", fontsize=9, va="center")
        for j, picture in enumerate((image, heat.blend_rgb(image, saliency))):
            bottom = top - label - (j + 1) * tall - j * gap
            axes = figure.add_axes((left / size[0], bottom / size[1], cell / size[0], tall / size[1]))
            axes.imshow(picture, aspect="auto", interpolation="bilinear")
            axes.set_axis_off()
    figure.savefig(path, format="png")
