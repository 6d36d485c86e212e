"""`mubic-deploy stream`: a source to a server, its maps to files as they come."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import queue
import signal
import sys
import threading
import time
from argparse import Namespace
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import av

from mubic_deploy.commands import unfamiliar
from mubic_deploy.console import bar, forget_stdout, print_json, say, warn
from mubic_deploy.errors import UserError
from mubic_deploy.live.client import StreamClient
from mubic_deploy.live.measures import Measures, measure
from mubic_deploy.live.report import Gap, LiveMap, Report
from mubic_deploy.live.settings import DROP, QUEUE
from mubic_deploy.live.source import FileSource, Heard, LiveSource, open_source
from mubic_deploy.live.window import Window
from mubic_deploy.media.film import Frame
from mubic_deploy.media.maps import MapsWriter
from mubic_deploy.media.outputs import check_targets, replacing
from mubic_deploy.media.overlay import SUFFIXES, OverlayWriter
from mubic_deploy.media.source import is_file, mode_of, plain_source
from mubic_deploy.predict import naming

KINDS = {"overlay": SUFFIXES, "maps": (".npz",), "ndjson": (".ndjson", ".jsonl")}
FRAMES = 64  # that wait for the outputs
_TICK_S = 0.02  # between two looks at these
STDOUT = Path("-")
_STATUS_S = 0.5
_STOP_S = 5.0  # for the maps that are on their way when the stream is stopped


def stream(arguments: Namespace) -> int:
    """A source's maps from a running server, as they come."""
    given = {"overlay": arguments.overlay, "maps": arguments.maps, "ndjson": arguments.ndjson}
    targets = {kind: path for kind, path in given.items() if path is not None}
    piped = targets.get("ndjson") == STDOUT
    if piped and arguments.json:
        raise UserError("--json and --ndjson - would both write to standard output: give --ndjson a file")
    files = {kind: path for kind, path in targets.items() if path != STDOUT}
    gaps: deque[Gap] = deque(maxlen=1000)  # a camera may run for months
    with contextlib.ExitStack() as stack:
        window = stack.enter_context(Window()) if arguments.show else None
        named = plain_source(arguments.source)
        source = open_source(named, arguments.realtime)
        feeder: Feeder | None = None
        stack.callback(lambda: _let_go(source, feeder))
        # no file where it is -, pipe:0 or an address
        check_targets(files, KINDS, Path(named) if is_file(named) and mode_of(named) is not None else None)
        live = arguments.realtime or isinstance(source, LiveSource)
        on_lag = arguments.on_lag or (DROP if live else QUEUE)
        client = stack.enter_context(
            StreamClient(
                arguments.url,
                stride=arguments.stride,
                seed=arguments.seed,
                steps=arguments.steps,
                encoding=arguments.encoding,
                fit=arguments.fit,
                on_lag=on_lag,
                max_waiting=arguments.max_waiting,
                on_gap=gaps.append,
            )
        )
        staged = stack.enter_context(replacing({k: path for k, path in files.items() if k != "ndjson"}))
        plain = not arguments.json and not piped
        outputs = stack.enter_context(Outputs(source, staged, targets, plain, window, on_lag == DROP))
        stopped = stack.enter_context(_stop_with_a_signal())
        if window is not None:
            window.open(source.display, source.name, stopped.set)
        feeder = Feeder(source, client, stopped, frames=outputs.wants_frames)
        with bar("streaming") as progress:
            due = time.monotonic()
            for found in _maps(client, feeder, outputs, stopped):
                if found is not None:
                    outputs.add_map(found)
                if outputs.problem is not None:  # what came until then is kept in the others
                    stopped.set()
                    break
                if time.monotonic() >= due:
                    progress(_status(client.report()), feeder.fed, None)
                    due = time.monotonic() + _STATUS_S
        problem = feeder.problem or outputs.problem
        if problem is not None and not outputs.count:
            raise problem
        outputs.finish(whole=not stopped.is_set() and problem is None)
        report = client.report()
    warnings = unfamiliar(client.config, client.source["seed"], arguments.fit)
    warnings += source.warnings + [gap.text for gap in gaps]
    if arguments.json:
        print_json({**vars(report), "frames": feeder.fed, "gaps": [vars(gap) for gap in gaps], "warnings": warnings})
    else:
        warn(warnings)
        if not piped:
            say(_summary(report, feeder.fed))
    if problem := feeder.problem or outputs.problem:
        raise problem
    return 0


class Feeder:
    """The thread that reads the source and feeds the client.

    waiting  frames for the outputs, in order
    fed      how many frames the client got
    problem  what ended the source before its time"""

    def __init__(
        self, source: FileSource | LiveSource, client: StreamClient, stopped: threading.Event, frames: bool
    ) -> None:
        self.waiting: queue.Queue[Frame] = queue.Queue(FRAMES)
        self.fed = 0
        self.problem: UserError | None = None
        self._source, self._client, self._stopped, self._frames = source, client, stopped, frames
        self.thread = threading.Thread(target=self._run, name="mubic-source", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            for item in self._source.items():
                if self._stopped.is_set():
                    return
                self._feed(item)
        except UserError as error:
            if not self._stopped.is_set():  # else the client was finished under it
                self.problem = error
        except Exception as error:  # the thread's end must not pass for the source's
            self.problem = UserError(f"{self._source.name} cannot be read any further: {error!r}")
        finally:
            with contextlib.suppress(UserError):  # it is over already, and who reads it knows
                self._client.finish()

    def _feed(self, item: Any) -> None:
        if isinstance(item, Frame):
            while self._frames and not self._stopped.is_set():
                with contextlib.suppress(queue.Full):
                    self.waiting.put(item, timeout=0.1)
                    break
            self._client.frame(item.image, item.time_s, self._source.display)
            self.fed += 1
        elif isinstance(item, Heard):
            self._client.sound(item.samples, item.start / 16_000)
        else:
            self._client.end_sound()


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

    def add_frame(self, frame: Frame) -> None:
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

    def add_map(self, found: LiveMap) -> None:
        self.count += 1
        if self._window is not None:
            self._window.add_map(found)
        if self.overlay is not None:
            with self._or_given_up("overlay"):
                self.overlay.add_map(found)
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


def _maps(client: StreamClient, feeder: Feeder, outputs: Outputs, stopped: threading.Event) -> Iterator[LiveMap | None]:
    """Each map as it comes, after the frames before it; now and then None, so that somebody can say how it goes."""
    end = None
    while not client.through:
        if stopped.is_set() and end is None:
            end = time.monotonic() + _STOP_S
            feeder.thread.join(_STATUS_S)  # it may wait for a source that says nothing
            with contextlib.suppress(UserError):
                client.finish()
        if end is not None and time.monotonic() > end:
            break
        try:
            found = client.poll(_TICK_S if outputs.wants_frames else _STATUS_S)
        except UserError as error:  # the server is gone, or refused something: what came until then is kept
            feeder.problem = feeder.problem or error
            stopped.set()
            break
        while not feeder.waiting.empty():
            outputs.add_frame(feeder.waiting.get())
        yield found
        outputs.refresh()
    while not feeder.waiting.empty():
        outputs.add_frame(feeder.waiting.get())


def _let_go(source: FileSource | LiveSource, feeder: Feeder | None) -> None:
    """Closes the source, unless it is still being read: then it goes with the process."""
    if feeder is not None:
        feeder.thread.join(_STOP_S)
        if feeder.thread.is_alive():
            return
    source.close()


def _summary(report: Report, frames: int) -> str:
    seconds = {"median": report.median_s, "p95": report.p95_s, "p99": report.p99_s}
    latency = ", ".join(f"{1000 * s:.0f} ms {name}" for name, s in seconds.items())
    return f"{report.maps} maps of {frames} frames, {report.dropped} dropped; latency {latency}"


def _status(report: Report) -> str:
    late = "" if report.maps == 0 else f", {1000 * report.median_s:.0f} ms median, {1000 * report.p99_s:.0f} ms p99"
    return f"{report.maps} maps{late}, lag {report.lag_s:.1f} s, {report.dropped} dropped, frames"


@contextlib.contextmanager
def _stop_with_a_signal() -> Iterator[threading.Event]:
    """Set by the first Ctrl-C or SIGTERM, so that the outputs are completed; the next one is what it was before."""
    stopped = threading.Event()

    def stop(number: int, frame: object) -> None:
        restore()
        stopped.set()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, stop)
    try:
        yield stopped
    finally:
        restore()
