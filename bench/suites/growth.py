"""Time and memory over steps, batch, the length of a film and the number of live streams."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np

from bench import child, timing
from bench.looped import Loop, clip
from bench.results import Results, Row
from bench.serving import serving
from bench.sides import Context, batches, call, installed_engines, on_cpu
from bench.streams import over_streams
from bench.suites.batch import BATCHES
from bench.timing import Rule
from mubic_deploy.config import DEFAULT_STEPS
from mubic_deploy.errors import UserError

STEPS = (1, 4, 8, 12)
MINUTES = (1, 2, 5, 10)
STRIDE = 16
MINUTE_S = 60  # of the film that is repeated
FPS, RATE = 30, 48_000  # of the film
STREAMS = (1, 2, 3, 4, 6)
STREAMED_S = 20.0


def measure(context: Context, rule: Rule, results: Results) -> None:
    """With the default engine. Peaks are of a process of its own for each row."""
    engine = installed_engines(results.left_out)[0]
    results.settings["engine"] = engine
    _steps(context, engine, rule, results)
    _batches(context, engine, rule, results)
    if context.size != "demo":
        results.left_out["films and live streams"] = "measured with demo: a minute of film takes full 3 minutes"
        return
    _films(context, engine, MINUTES[: 2 if rule.quick else None], results)
    _streams(context, engine, 5.0 if rule.quick else STREAMED_S, results)


def _steps(context: Context, engine: str, rule: Rule, results: Results) -> None:
    pipeline = on_cpu(engine, context)
    timings = timing.measure({str(n): call(context, pipeline, n) for n in STEPS}, rule, progress=context.count)
    for n in STEPS:
        values = _peak(context, engine, 1, n)
        results.rows.append(Row("growth over steps", engine, {"steps": n}, timings[str(n)], values))


def _batches(context: Context, engine: str, rule: Rule, results: Results) -> None:
    pipeline = on_cpu(engine, context)
    sides = {str(batch): batches(context, pipeline, batch) for batch in BATCHES[context.size]}
    for name, timed in timing.measure(sides, rule, progress=context.count).items():
        values = _peak(context, engine, int(name), DEFAULT_STEPS)
        results.rows.append(Row("growth over batch", engine, {"batch": int(name)}, timed, values))


def _peak(context: Context, engine: str, batch: int, steps: int) -> dict[str, float]:
    context.say(f"peak memory, batch {batch}, {steps} steps")
    given = (engine, context.artifacts.path, context.threads, batch, steps)
    return {"peak_bytes": child.run("infer", *(str(value) for value in given))["peak_bytes"]}


def _films(context: Context, engine: str, minutes: tuple[int, ...], results: Results) -> None:
    """`mubic-deploy predict` with an overlay and the maps, from the process's start to its end."""
    minute = context.folder / "minute.mp4"
    render_minute(minute)
    for length in minutes:
        context.say(f"a film of {length} minutes")
        film = context.folder / f"{length}.mp4"
        repeat(minute, film, length)
        given = ["predict", str(film), "--artifacts", str(context.artifacts.path), "--engine", engine]
        given += ["--stride", str(STRIDE), "--json"]
        given += ["-o", str(context.folder / "overlay.mp4"), "--maps", str(context.folder / "maps.npz")]
        answer = child.run("command", str(context.threads), *given)
        film.unlink()
        values = {name: float(answer[name]) for name in ("wall_s", "peak_bytes", "maps")}
        values["maps_per_s"] = values["maps"] / values["wall_s"]
        results.rows.append(Row("growth over film", engine, {"minutes": length}, values=values))


def _streams(context: Context, engine: str, seconds: float, results: Results) -> None:
    """Live streams of 25 frames and 5 maps a second each, and the server's memory with them."""
    try:
        film = Loop(clip())
        with serving(context.artifacts, context.folder, engine=engine, threads=context.threads) as server:
            results.rows += over_streams(server, film, STREAMS, seconds, context.say)
    except UserError as error:
        results.left_out["live streams"] = str(error)


def render_minute(path: Path) -> None:
    """A 1280 x 720 film of moving noise and a tone."""
    texture = np.random.default_rng(0).integers(0, 256, (720, 1280 + 64, 3), np.uint8)
    tone = (0.3 * np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)).astype(np.float32)[None]
    with av.open(path, "w") as out:
        video = out.add_stream("libx264", FPS, options={"preset": "ultrafast", "crf": "35"})
        video.width, video.height, video.pix_fmt = 1280, 720, "yuv420p"
        sound = out.add_stream("aac", RATE)
        for i in range(MINUTE_S * FPS):
            picture = np.ascontiguousarray(texture[:, i % 64 : i % 64 + 1280])
            out.mux(video.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
            if i % FPS == 0:
                second = av.AudioFrame.from_ndarray(tone, "fltp", "mono")
                second.sample_rate, second.pts = RATE, i // FPS * RATE
                out.mux(sound.encode(second))
        for stream in (video, sound):
            out.mux(stream.encode(None))


def repeat(minute: Path, path: Path, times: int) -> None:
    """The film over and over, its packets as they are."""
    with av.open(path, "w") as out:
        shift = 0.0
        for _ in range(times):
            with av.open(minute) as film:
                if not out.streams:
                    for stream in film.streams:
                        out.add_stream_from_template(stream)
                begin, end = 0.0, 0.0
                for packet in film.demux():
                    if packet.pts is None or packet.dts is None:
                        continue  # the end
                    begin = min(begin, float(packet.dts * packet.time_base))
                    end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
                    moved = round(shift / packet.time_base)
                    packet.pts, packet.dts = packet.pts + moved, packet.dts + moved
                    packet.stream = out.streams[packet.stream_index]
                    out.mux(packet)
            shift += end - begin
