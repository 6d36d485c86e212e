"""Where a stream's frames and maps go."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import av

from mubic_deploy.console import forget_stdout, say
from mubic_deploy.errors import UserError
from mubic_deploy.live.measures import Measures, measure
from mubic_deploy.live.report import LiveMap
from mubic_deploy.live.source import FileSource, LiveSource
from mubic_deploy.live.window import Window
from mubic_deploy.media.film import Frame
from mubic_deploy.media.maps import MapsWriter
from mubic_deploy.media.overlay import SUFFIXES, OverlayWriter
from mubic_deploy.predict import naming

KINDS = {"overlay": SUFFIXES, "maps": (".npz",), "ndjson": (".ndjson", ".jsonl")}
STDOUT = Path("-")


class Outputs:
    """Where frames and maps go; a line of text or JSON as each map comes, the files when `finish` is called. An output
    that fails is given up, the others go on.

    count    how many maps came
    problem  what the first output failed of"""

    def __init__(
        self,
        source: FileSource | LiveSource,
        staged: dict[str, Path],
        targets: dict[str, Path],
        plain: bool,
        window: Window | None,
        live: bool,
    ) -> None:
        """staged: of the files that appear at the end, by kind; those that fail are taken out. live: frames do not wait
        for maps. UserError if an output cannot be opened."""
        self._source, self._targets, self._plain, self._window = source, dict(targets), plain, window
        self._staged = staged
        self.problem: UserError | None = None
        self._last_pts: int | None = None
        self._shift = 0
        self.count = 0
        self.overlay: OverlayWriter | None = None
        self._maps: MapsWriter | None = None
        self._lines: TextIO | None = None
        with self._naming("overlay"):
            if "overlay" in staged:
                self.overlay = OverlayWriter(staged["overlay"], source, live)
        with self._naming("maps"):
            if "maps" in staged:
                self._maps = MapsWriter(staged["maps"], source.map_shape)
        with self._naming("ndjson"):
            place = targets.get("ndjson")
            if place == STDOUT:
                self._lines = sys.stdout
            elif place is not None and place.exists() and not os.access(place, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    def __enter__(self) -> Outputs:
        return self

    def __exit__(self, *_: object) -> None:
        for kind in KINDS:
            self._close(kind)

    def _close(self, kind: str) -> None:
        outputs = {"overlay": self.overlay, "maps": self._maps, "ndjson": self._lines}
        output = outputs[kind]
        if output is not None and output is not sys.stdout:
            with contextlib.suppress(OSError, av.FFmpegError):  # of a full disk; nobody reads that file
                output.close()

    @property
    def wants_frames(self) -> bool:
        return self.overlay is not None or self._window is not None

    def show_frame(self, frame: Frame) -> None:
        if self._window is not None:
            self._window.add_frame(frame)
        if self.overlay is not None:
            self._keep_growing(frame)
            with self._or_given_up("overlay"):
                self.overlay.add_frame(frame)

    def refresh(self) -> None:
        """Between frames and maps, often: the window lives by it."""
        if self._window is not None:
            self._window.refresh()

    def _keep_growing(self, frame: Frame) -> None:
        """An overlay's time stamps must grow, whatever the source's clock does."""
        image = frame.image
        pts = (image.pts or 0) + self._shift
        if self._last_pts is not None and pts <= self._last_pts:
            step = max(1, round(1 / (self._source.rate * self._source.time_base)))
            self._shift += self._last_pts + step - pts
            pts = self._last_pts + step
        image.pts = self._last_pts = pts

    def show_map(self, found: LiveMap) -> None:
        """Over the frames up to its own."""
        if self._window is not None:
            self._window.add_map(found)
        if self.overlay is not None:
            with self._or_given_up("overlay"):
                self.overlay.add_map(found)

    def add_map(self, found: LiveMap) -> None:
        """To all outputs but those that lay it over frames: see `show_map`."""
        self.count += 1
        if self._maps is not None:
            with self._or_given_up("maps"):
                self._maps.add_map(found)
        measures = measure(found.saliency)
        if "ndjson" in self._targets:
            with self._or_given_up("ndjson"):
                if self._lines is None:  # an earlier file stays until there is a map
                    self._lines = self._targets["ndjson"].open("w", encoding="utf-8")
                self._lines.write(json.dumps(record(found, measures)) + "\n")
                self._lines.flush()  # whoever reads along wants each line at once
        if self._plain:
            x, y, _ = measures.peak
            with self._or_given_up("text"):
                say(f"{found.time_s:8.3f} s  peak at {x:.3f}, {y:.3f}  {1000 * found.latency_s:6.0f} ms")

    def finish(self, whole: bool) -> None:
        """Completes the files. UserError if there was no map."""
        if not self.count:
            raise UserError(f"no map came of {self._source.name}: let it run for longer")
        if self.overlay is not None:
            with self._or_given_up("overlay"):
                self.overlay.finish(whole)
        if self._maps is not None:
            with self._or_given_up("maps"):
                self._maps.finish()
        if self._window is not None and whole:
            self._window.finish()

    def _naming(self, kind: str) -> contextlib.AbstractContextManager[None]:
        return naming(kind, self._targets.get(kind, Path("on standard output")))  # which is that of the text

    @contextlib.contextmanager
    def _or_given_up(self, kind: str) -> Iterator[None]:
        """An output that cannot be written inside is one no more, and its file stays as it was."""
        try:
            with self._naming(kind):
                yield
        except UserError as error:
            if isinstance(error.__cause__, BrokenPipeError):
                forget_stdout()
            self.problem = self.problem or error
            if kind != "text":
                self._close(kind)
            self._staged.pop(kind, None)
            self._targets.pop(kind, None)
            self._plain = self._plain and kind != "text"
            self.overlay = None if kind == "overlay" else self.overlay
            self._maps = None if kind == "maps" else self._maps
            self._lines = None if kind == "ndjson" else self._lines


def record(found: LiveMap, measures: Measures) -> dict[str, Any]:
    """A map as one line of NDJSON: see `Measures` and `LiveMap`."""
    (x, y, value), (left, top, width, height) = measures.peak, measures.box
    return {
        "time_s": found.time_s,
        "frame_index": found.frame_index,
        "peak": {"x": x, "y": y, "value": value},
        "centroid": {"x": measures.centroid[0], "y": measures.centroid[1]},
        "entropy": measures.entropy,
        "box": {"x": left, "y": top, "width": width, "height": height},
        "heard": found.heard,
        "steps_used": found.steps_used,
        "latency_s": found.latency_s,
    }
