"""Maps as a film is predicted, and the file that holds them all."""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from mubic_deploy.media.film import Frame


@dataclass(frozen=True)
class FilmMap:
    """The saliency of one frame.

    frame_index  in the film, from 0
    time_s       the frame's time stamp, seconds of the film's own clock
    saliency     float32 [height, width] in [0, 1], in the film's geometry, at most 384 wide
    steps_used   denoising steps that made it"""

    frame_index: int
    time_s: float
    saliency: np.ndarray
    steps_used: int


class MapsWriter:
    """MAPS.npz with `maps` float32 [n, height, width], `frame_index` int64 [n] and `time_s` float64 [n].

    The maps wait on disk until their number is known, so memory does not grow with the film."""

    def __init__(self, path: Path, shape: tuple[int, int]) -> None:
        self._path, self._shape = path, shape
        self._spool = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115 (closed in close)
        self._index: list[int] = []
        self._times: list[float] = []

    def add_frame(self, frame: Frame) -> None:
        """Only maps are written."""

    def add_map(self, item: FilmMap) -> None:
        """OSError if the disk is full."""
        self._spool.write(np.ascontiguousarray(item.saliency, np.float32).data)
        self._index.append(item.frame_index)
        self._times.append(item.time_s)

    def finish(self) -> None:
        header = {"descr": "<f4", "fortran_order": False, "shape": (len(self._index), *self._shape)}
        self._spool.seek(0)
        with zipfile.ZipFile(self._path, "w", zipfile.ZIP_STORED) as archive:
            with archive.open("maps.npy", "w", force_zip64=True) as file:
                npy.write_array_header_1_0(file, header)
                shutil.copyfileobj(self._spool, file, 1 << 20)
            for name, values in (
                ("frame_index", np.array(self._index, np.int64)),
                ("time_s", np.array(self._times, np.float64)),
            ):
                with archive.open(f"{name}.npy", "w") as file:
                    npy.write_array(file, values)

    def close(self) -> None:
        self._spool.close()
