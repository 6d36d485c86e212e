"""Where a stream's frames and maps go."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av

from mubic_deploy.console import forget_stdout
from mubic_deploy.errors import UserError
from mubic_deploy.live.lines import Lines
from mubic_deploy.live.measures import Measures, measure
from mubic_deploy.live.report import LiveMap
from mubic_deploy.live.source import FileSource, LiveSource
from mubic_deploy.live.stop import STOP_S, Stopped
from mubic_deploy.live.window import Window
from mubic_deploy.media.film import Frame
from mubic_deploy.media.maps import MapsWriter
from mubic_deploy.media.naming import naming
from mubic_deploy.media.overlay import SUFFIXES, OverlayWriter

KINDS = {"overlay": SUFFIXES, "maps": (".npz",), "ndjson": (".ndjson", ".jsonl")}
STDOUT = Path("-")
_LEAP_S = 600.0  # without a frame, and the overlay does not show the last one for so long
_TICK_S = 0.02  # between two looks at whether a reader takes lines
_PATIENCE_S = 10.0  # with a reader of lines that takes none, where nothing may wait for it
_LAST_S = 1.0  # for the reader, when the stream was stopped


class Outputs:
    """Where frames and maps go; a line of text or JSON as each map comes, the files when `finish` is called. An output
    that fails is given up, the others go on.

    count     how many maps came
    problem   what the first output failed of
    left_out  how many frames the overlay lacks because the stream was stopped
    warnings  one line each for lines that nobody read, and for those frames
    lines     "ndjson" and "text", where they are wanted"""

    def __init__(
        self,
        source: FileSource | LiveSource,
        staged: dict[str, Path],
        targets: dict[str, Path],
        plain: bool,
        window: Window | None,
        live: bool,
        stopped: Stopped,
    ) -> None:
        """staged: of the files that appear at the end, by kind; those that fail are taken out. live: frames do not wait
        for maps, and maps not for who reads their lines. stopped: says when frames are not written any more. UserError
        if an output cannot be opened."""
        self._source, self._targets, self._window, self._live = source, dict(targets), window, live
        self._stopped = stopped
        self._staged = staged
        self.warnings: list[str] = []
        self.problem: UserError | None = None
        self._last_pts: int | None = None
        self._shift = 0
        self.count = self.left_out = 0
        self.overlay: OverlayWriter | None = None
        self._maps: MapsWriter | None = None
        self.lines: dict[str, Lines] = {}
        with self._naming("overlay"):
            if "overlay" in staged:
                self.overlay = OverlayWriter(staged["overlay"], source, live, lambda: not stopped.overdue)
        with self._naming("maps"):
            if "maps" in staged:
                self._maps = MapsWriter(staged["maps"], source.map_shape)
        with self._naming("ndjson"):
            place = targets.get("ndjson")
            if place is not None:
                if place != STDOUT and place.exists() and not os.access(place, os.W_OK):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
                self.lines["ndjson"] = Lines(None if place == STDOUT else place)
        with self._naming("text"):
            if plain:
                self.lines["text"] = Lines(None)

    def __enter__(self) -> Outputs:
        return self

    def __exit__(self, *_: object) -> None:
        for kind in (*KINDS, "text"):
            self._close(kind)

    def _close(self, kind: str) -> None:
        outputs = {"overlay": self.overlay, "maps": self._maps, **self.lines}
        output = outputs.get(kind)
        if output is not None:
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

    @property
    def full(self) -> bool:
        """Whether maps should wait until somebody reads their lines."""
        return any(lines.full for lines in self.lines.values())

    @property
    def unread(self) -> bool:
        return any(lines.waiting for lines in self.lines.values())

    def refresh(self) -> None:
        """Between frames and maps, often: the window lives by it, and lines are read by it."""
        if self._window is not None:
            self._window.refresh()
        for kind, lines in list(self.lines.items()):
            with self._or_given_up(kind):
                lines.write()
            if lines.full and (self._live or (not lines.opened and lines.idle_s > _PATIENCE_S)):
                self._leave_unread(kind)

    def drain(self) -> None:
        """Waits for whoever reads the lines, as any program does; not long where nothing may wait, or nobody has begun
        to read, or once the stream was stopped."""
        for kind, lines in list(self.lines.items()):
            end: float | None = None
            while lines.waiting and kind in self.lines:
                with self._or_given_up(kind):
                    lines.write()
                if self._stopped.is_set() and end is None:
                    end = time.monotonic() + _LAST_S
                silent = (self._live or not lines.opened) and lines.idle_s > _PATIENCE_S
                over = silent or (end is not None and time.monotonic() > end)
                if over and lines.waiting and kind in self.lines:  # it may be through by now, or have failed
                    self._leave_unread(kind)
                time.sleep(_TICK_S)

    def _keep_growing(self, frame: Frame) -> None:
        """An overlay's time stamps must grow, and not leap, whatever the source's clock does."""
        image = frame.image
        pts = (image.pts or 0) + self._shift
        last, leap = self._last_pts, _LEAP_S / self._source.time_base
        leapt = last is not None and pts > last + leap and isinstance(self._source, LiveSource)  # a film has one clock
        if last is not None and (pts <= last or leapt):
            step = max(1, round(1 / (self._source.rate * self._source.time_base)))
            self._shift += last + step - pts
            pts = last + step
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
        if "ndjson" in self.lines:
            self._add_line("ndjson", json.dumps(record(found, measures)))
        if "text" in self.lines:
            x, y, _ = measures.peak
            late = f"{1000 * found.latency_s:6.0f} ms"
            self._add_line("text", f"{found.time_s:8.3f} s  peak at {x:.3f}, {y:.3f}  {late}")

    def _add_line(self, kind: str, line: str) -> None:
        with self._or_given_up(kind):
            self.lines[kind].add(line)

    def finish(self, whole: bool) -> None:
        """Completes the files. UserError if there was no map."""
        if not self.count:
            raise UserError(f"no map came of {self._source.name}: let it run for longer")
        if self.overlay is not None:
            with self._or_given_up("overlay"):
                self.overlay.finish(whole)
                self.left_out = self.overlay.left_out
        if self.left_out:
            self.warnings.append(
                f"overlay {self._where('overlay')}: the last {self.left_out} frame(s) are left out: it was more than "
                f"{STOP_S:g} s behind when the stream was stopped: send a smaller picture to have more of them"
            )
        if self._maps is not None:
            with self._or_given_up("maps"):
                self._maps.finish()
        if self._window is not None and whole:
            self._window.finish()

    def _where(self, kind: str) -> Path:
        return self._targets.get(kind, Path("on standard output"))  # which is that of the text

    def _naming(self, kind: str) -> contextlib.AbstractContextManager[None]:
        return naming(kind, self._where(kind))

    @contextlib.contextmanager
    def _or_given_up(self, kind: str) -> Iterator[None]:
        """An output that cannot be written inside is one no more, and its file stays as it was."""
        try:
            with self._naming(kind):
                yield
        except UserError as error:
            if isinstance(error.__cause__, BrokenPipeError) and self._targets.get(kind, STDOUT) == STDOUT:
                forget_stdout()
            self.problem = self.problem or error
            self._give_up(kind)

    def _leave_unread(self, kind: str) -> None:
        """The others go on; without another one there is nothing to go on for."""
        count = self.lines[kind].waiting
        text = f"{kind} {self._where(kind)}: nobody reads it, its last {count} line(s) are lost: check what reads it"
        self._give_up(kind)
        if self._window or self.overlay or self._maps or self.lines:
            self.warnings.append(text)
        else:
            self.problem = self.problem or UserError(text)

    def _give_up(self, kind: str) -> None:
        self._close(kind)
        self.lines.pop(kind, None)
        self._staged.pop(kind, None)
        self._targets.pop(kind, None)
        self.overlay = None if kind == "overlay" else self.overlay
        self._maps = None if kind == "maps" else self._maps


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
