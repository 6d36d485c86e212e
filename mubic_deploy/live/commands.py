"""`mubic-deploy stream`: a source to a server, its maps to files as they come."""

from __future__ import annotations

import contextlib
import time
from argparse import Namespace
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from mubic_deploy.commands import unfamiliar
from mubic_deploy.console import bar, print_json, say, warn
from mubic_deploy.errors import UserError
from mubic_deploy.live.client import StreamClient
from mubic_deploy.live.feeder import Feeder
from mubic_deploy.live.outputs import KINDS, STDOUT, Outputs
from mubic_deploy.live.pictures import Pictures
from mubic_deploy.live.report import Gap, LiveMap, Report
from mubic_deploy.live.settings import DROP, QUEUE
from mubic_deploy.live.source import FileSource, LiveSource, open_source
from mubic_deploy.live.stop import Stopped, stop_with_a_signal
from mubic_deploy.live.window import Window
from mubic_deploy.media.outputs import check_targets, replacing
from mubic_deploy.media.source import is_file, mode_of, plain_source

_TICK_S = 0.02  # between two looks at these
_STATUS_S = 0.5
_READ_S = 1.0  # for the item that is being read at the end


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
        stopped = stack.enter_context(stop_with_a_signal())
        outputs = stack.enter_context(Outputs(source, staged, targets, plain, window, on_lag == DROP, stopped))
        if window is not None:
            window.open(source.display, source.name, stopped.stop)
        drop = on_lag == DROP
        # over HTTP a film comes at once, and a broadcast in segments: that is not the server's lag
        paced = drop and named.startswith(("http://", "https://"))
        feeder = Feeder(source, client, stopped, frames=outputs.wants_frames, drop=drop, paced=paced)
        pictures = Pictures(client, feeder, outputs, arguments.stride, in_order=not drop)
        with bar("streaming") as progress:
            due = time.monotonic()
            for found in _maps(client, feeder, outputs, pictures, stopped):
                if found is not None:
                    outputs.add_map(found)
                if outputs.problem is not None:  # what came until then is kept in the others
                    stopped.set()
                    break
                if time.monotonic() >= due:
                    progress(_status(client.report()), feeder.fed, None)
                    due = time.monotonic() + _STATUS_S
        pictures.finish()
        problem = feeder.problem or outputs.problem
        if problem is not None and not outputs.count:
            raise problem
        outputs.finish(whole=not stopped.is_set() and problem is None)
        outputs.drain()
        report = client.report()
    warnings = unfamiliar(client.config, client.source["seed"], arguments.fit)
    warnings += source.warnings + outputs.warnings + [gap.text for gap in gaps]
    if feeder.left_out:
        warnings.append(
            f"{feeder.left_out} of {feeder.fed} frames are not shown: they came faster than the overlay or the window "
            f"took them: send a smaller picture, or use --on-lag queue where the source can wait"
        )
    if arguments.json:
        counts = {"frames": feeder.fed, "left_out": feeder.left_out + outputs.left_out}
        print_json({**vars(report), **counts, "gaps": [vars(gap) for gap in gaps], "warnings": warnings})
    else:
        warn(warnings)
        if "text" in outputs.lines:
            say(_summary(report, feeder.fed))
    if problem := feeder.problem or outputs.problem:
        raise problem
    return 0


def _maps(
    client: StreamClient, feeder: Feeder, outputs: Outputs, pictures: Pictures, stopped: Stopped
) -> Iterator[LiveMap | None]:
    """Each map as it comes; now and then None, so that somebody can say how it goes. Between two of them the pictures
    go on: a map never waits for more than one of their steps."""
    ending = busy = False
    while not client.through:
        if stopped.is_set() and not ending:
            ending = True
            feeder.thread.join(_STATUS_S)  # it may wait for a source that says nothing
            with contextlib.suppress(UserError):
                client.finish()
        overdue = stopped.overdue  # then only what is there already is taken
        found = None
        try:
            if outputs.full and not ending:
                time.sleep(_TICK_S)
            else:
                restless = outputs.wants_frames or outputs.unread
                found = client.poll(0.0 if busy or overdue else _TICK_S if restless else _STATUS_S)
        except UserError as error:  # the server is gone, or refused something: what came until then is kept
            feeder.problem = feeder.problem or error
            stopped.set()
            break
        if found is not None:
            pictures.add_map(found)
        elif overdue:
            break
        yield found
        busy = found is not None or pictures.step()
        outputs.refresh()


def _let_go(source: FileSource | LiveSource, feeder: Feeder | None) -> None:
    """Closes the source, unless it is still being read: then it goes with the process."""
    if feeder is not None:
        feeder.thread.join(_READ_S)
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
