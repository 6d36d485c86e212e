"""`mubic-deploy stream`, over toy graphs in the real server."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import re
import select
import shlex
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from films import frame_times, quadrants, write_film
from triton_serving import processes, serving

from mubic_deploy.artifacts import Artifacts
from mubic_deploy.errors import UserError
from mubic_deploy.live.client import StreamClient
from mubic_deploy.live.items import Item
from mubic_deploy.live.outputs import Outputs
from mubic_deploy.live.report import LiveMap
from mubic_deploy.live.source import FileSource
from mubic_deploy.media.film import Frame
from mubic_deploy.media.maps import FilmMap, MapsWriter
from mubic_deploy.media.overlay import HeatBlend, OverlayWriter
from mubic_deploy.triton.server import TritonServer

pytest_plugins = ("triton_fixtures",)


def picture(index: int) -> np.ndarray:
    image = np.full((180, 320, 3), 40, np.uint8)
    image[40:90, 2 * index : 2 * index + 50] = (240, 180, 40)
    return image


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """132 frames at 25 frames a second with a sound of as long, AAC."""
    sound = np.sin(np.arange(132 * 1920) / 17)[None].astype(np.float32) / 3
    path = tmp_path_factory.mktemp("films") / "film.mp4"
    return write_film(path, frame_times(25, 132), picture, sound=sound, codec="aac")


def test_stream_prints_each_map_and_a_summary(run, film: Path, toy_server: TritonServer) -> None:
    ran = run("stream", film, "--url", toy_server.url, "--stride", 16, "--steps", 1, "--json")
    assert ran.code == 0, ran.err
    report = json.loads(ran.out)
    assert (report["maps"], report["frames"], report["dropped"], report["gaps"]) == (8, 132, 0, [])
    assert 0 < report["median_s"] <= report["p99_s"]
    lines = run("stream", film, "--url", toy_server.url, "--stride", 32, "--steps", 1).out.splitlines()
    assert len(lines) == 5  # four maps and the summary
    assert "0.320 s  peak at" in lines[0]
    assert lines[4].startswith("4 maps of 132 frames, 0 dropped; latency ")


def test_stream_writes_what_predict_writes(
    run, film: Path, toy_artifacts: Artifacts, toy_server: TritonServer, tmp_path: Path
) -> None:
    here = run(
        "predict",
        film,
        "-o",
        tmp_path / "a.mp4",
        "--maps",
        tmp_path / "a.npz",
        "--stride",
        16,
        "--artifacts",
        toy_artifacts.path,
    )
    assert here.code == 0, here.err
    outputs = ("-o", tmp_path / "b.mp4", "--maps", tmp_path / "b.npz", "--ndjson", tmp_path / "b.ndjson")
    there = run("stream", film, "--url", toy_server.url, *outputs, "--stride", 16)
    assert there.code == 0, there.err
    a, b = (np.load(tmp_path / f"{name}.npz") for name in "ab")
    assert a["frame_index"].tolist() == b["frame_index"].tolist()
    assert a["time_s"].tolist() == b["time_s"].tolist()
    assert np.abs(a["maps"] - b["maps"]).max() < 1e-5
    lines = [json.loads(line) for line in (tmp_path / "b.ndjson").read_text().splitlines()]
    assert [line["frame_index"] for line in lines] == a["frame_index"].tolist()
    for line, saliency in zip(lines, b["maps"], strict=True):
        row, column = np.unravel_index(saliency.argmax(), saliency.shape)
        assert line["peak"] == pytest.approx(
            {"x": (column + 0.5) / 320, "y": (row + 0.5) / 180, "value": saliency.max()}
        )
        box = line["box"]
        left, top = round(box["x"] * 320), round(box["y"] * 180)
        inside = saliency[top : top + round(box["height"] * 180), left : left + round(box["width"] * 320)]
        assert inside.sum() >= 0.499 * saliency.sum()
        assert line["latency_s"] > 0
        assert 0 < line["entropy"] <= 1
    with av.open(tmp_path / "a.mp4") as one, av.open(tmp_path / "b.mp4") as two:
        assert [f.time for f in one.decode(video=0)] == [f.time for f in two.decode(video=0)]
        assert two.streams.audio[0].codec_context.name == one.streams.audio[0].codec_context.name


@pytest.fixture(scope="module")
def long_film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 frames without sound."""
    picture = np.full((90, 160, 3), 40, np.uint8)
    return write_film(tmp_path_factory.mktemp("films") / "long.mp4", frame_times(25, 300), picture)


@pytest.mark.parametrize(
    ("stride", "slow"),
    [(4, "overlay"), (16, "maps"), (100, "overlay")],
    ids=["slow to encode", "maps far behind", "more frames between two maps than are held"],
)
def test_the_overlay_is_that_of_predict(
    run,
    long_film: Path,
    toy_artifacts: Artifacts,
    toy_server: TritonServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stride: int,
    slow: str,
) -> None:
    """Every frame has the map over it that it has there, whatever of the stream is slow. A map is its frame's number
    here, everywhere in it."""
    shown: dict[int, float] = {}
    wanted: dict[int, float] = {}  # what `predict` shows
    write, poll, add_map = OverlayWriter._write, StreamClient.poll, OverlayWriter.add_map

    def numbered(self: OverlayWriter, item: FilmMap) -> None:
        add_map(self, replace(item, saliency=np.full((9, 16), item.frame_index, np.float32)))

    def written(self: OverlayWriter, frame: Frame, saliency: np.ndarray) -> None:
        shown[frame.index] = float(saliency[0, 0])
        write(self, frame, saliency / 300)
        if slow == "overlay" and wanted:
            time.sleep(0.01)

    def polled(self: StreamClient, timeout: float | None = 0.0) -> LiveMap | None:
        found = poll(self, timeout)
        if found is not None and slow == "maps":
            time.sleep(0.1)
        return found

    monkeypatch.setattr(OverlayWriter, "add_map", numbered)
    monkeypatch.setattr(OverlayWriter, "_write", written)
    monkeypatch.setattr(StreamClient, "poll", polled)
    settings = (long_film, "--stride", stride, "-o", tmp_path / "o.mp4")
    here = run("predict", *settings, "--artifacts", toy_artifacts.path)
    assert here.code == 0, here.err
    wanted.update(shown)
    shown.clear()
    there = run("stream", *settings, "--url", toy_server.url)
    assert there.code == 0, there.err
    assert list(shown) == list(wanted) == list(range(300))
    assert shown == pytest.approx(wanted)


def test_a_source_that_cannot_wait_is_not_held_back_by_a_slow_overlay(
    run, film: Path, toy_server: TritonServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """132 frames at 25 a second; 7 a second can be written. Maps come all the same, as soon as they are made."""
    fed: list[float] = []
    late: list[float] = []
    feed, write, add_map = StreamClient.frame, OverlayWriter._write, Outputs.add_map

    def timed(self: StreamClient, image: Any, time_s: float, *rest: Any) -> int:
        fed.append(time.monotonic())
        return feed(self, image, time_s, *rest)

    def written(self: OverlayWriter, frame: Frame, saliency: np.ndarray) -> None:
        time.sleep(0.15)
        write(self, frame, saliency)

    def mapped(self: Outputs, found: LiveMap) -> None:
        late.append(time.monotonic() - (fed[found.frame_index] + found.latency_s))
        add_map(self, found)

    monkeypatch.setattr(StreamClient, "frame", timed)
    monkeypatch.setattr(OverlayWriter, "_write", written)
    monkeypatch.setattr(Outputs, "add_map", mapped)
    monkeypatch.setattr("mubic_deploy.live.feeder.most_waiting", lambda _: 16)
    settings = ("--realtime", "--stride", 8, "--steps", 1, "-o", tmp_path / "o.mp4", "--json")
    ran = run("stream", film, "--url", toy_server.url, *settings)
    assert ran.code == 0, ran.err
    report = json.loads(ran.out)
    assert len(fed) == report["frames"] == 132
    assert fed[-1] - fed[0] == pytest.approx(131 / 25, abs=1)
    assert len(late) == report["maps"] == 15 - report["dropped"]
    assert max(late) < 2.5  # one step of the overlay: the frames up to a map
    with av.open(tmp_path / "o.mp4") as overlay:
        shown = len(list(overlay.decode(video=0)))
    assert report["left_out"] == 132 - shown > 30
    (warning,) = report["warnings"]
    assert warning.startswith(f"{132 - shown} of 132 frames are not shown: ")


@pytest.fixture(scope="module")
def transport(film: Path) -> Path:
    """The film as a pipe can carry it."""
    path = film.with_name("film.ts")
    with av.open(str(film)) as source, av.open(path, "w") as out:
        video = out.add_stream_from_template(source.streams.video[0])
        sound = out.add_stream("aac", 48_000)
        resampler = av.AudioResampler("fltp", "stereo", 48_000)
        for packet in source.demux(source.streams.video[0], source.streams.audio[0]):
            if packet.stream.type == "video" and packet.dts is not None:
                packet.stream = video
                out.mux(packet)
            elif packet.stream.type == "audio":
                for decoded in packet.decode():
                    assert isinstance(decoded, av.AudioFrame)
                    for block in resampler.resample(decoded):
                        out.mux(sound.encode(block))
        out.mux(sound.encode(None))
    return path


@pytest.fixture
def playlist(transport: Path, tmp_path: Path) -> Iterator[str]:
    """The film as HLS: its playlist's address."""
    folder = tmp_path / "hls"
    folder.mkdir()
    options = {"hls_time": "1", "hls_playlist_type": "vod"}
    with av.open(str(transport)) as source, av.open(str(folder / "film.m3u8"), "w", options=options) as out:
        streams = {stream.index: out.add_stream_from_template(stream) for stream in source.streams}
        for packet in source.demux():
            if packet.dts is not None:
                packet.stream = streams[packet.stream.index]
                out.mux(packet)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/film.m3u8"
        server.shutdown()


@pytest.mark.parametrize("lag", [None, "queue"])
def test_a_film_over_http_loses_no_window_for_coming_at_once(
    run, playlist: str, toy_server: TritonServer, monkeypatch: pytest.MonkeyPatch, lag: str | None
) -> None:
    """It goes on in its own time, 5.24 s, unless it may wait."""
    fed: list[float] = []
    feed = StreamClient.frame

    def timed(self: StreamClient, *frame: Any) -> int:
        fed.append(time.monotonic())
        return feed(self, *frame)

    monkeypatch.setattr(StreamClient, "frame", timed)
    settings = ("--stride", 8, "--steps", 1, "--json", *(["--on-lag", lag] if lag else []))
    ran = run("stream", playlist, "--url", toy_server.url, *settings)
    assert ran.code == 0, ran.err
    report = json.loads(ran.out)
    assert (report["frames"], report["maps"], report["dropped"]) == (132, 15, 0)
    if lag is None:
        assert 5 < fed[-1] - fed[0] < 9
    else:
        assert fed[-1] - fed[0] < 4


@pytest.mark.parametrize("source", ["-", "pipe:0"])
def test_stream_from_a_pipe(transport: Path, toy_server: TritonServer, tmp_path: Path, source: str) -> None:
    """Standard input, as from another program; lines of JSON to standard output. The overlay is there already."""
    (tmp_path / "o.mp4").touch()
    command = ["stream", source, "--url", toy_server.url, "--stride", "32", "--ndjson", "-", "--on-lag", "queue"]
    command += ["-o", str(tmp_path / "o.mp4")]
    with transport.open("rb") as stdin:
        ran = subprocess.run(
            [sys.executable, "-m", "mubic_deploy.cli", *command],
            stdin=stdin,
            capture_output=True,
            text=True,
            check=False,
        )
    assert ran.returncode == 0, ran.stderr
    lines = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [line["frame_index"] for line in lines] == [8, 40, 72, 104]
    assert all(line["heard"] == 1 for line in lines[1:3])
    with av.open(tmp_path / "o.mp4") as overlay:
        assert len(list(overlay.decode(video=0))) == 132


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_stream_with_complete_files(
    film: Path, toy_server: TritonServer, tmp_path: Path, number: int
) -> None:
    command = ["stream", str(film), "--url", toy_server.url, "--realtime", "--stride", "8", "--json"]
    command += [
        "-o",
        str(tmp_path / "o.mp4"),
        "--maps",
        str(tmp_path / "m.npz"),
        "--ndjson",
        str(tmp_path / "m.ndjson"),
    ]
    running = subprocess.Popen([sys.executable, "-m", "mubic_deploy.cli", *command], stdout=subprocess.PIPE, text=True)
    lines = tmp_path / "m.ndjson"
    end = time.monotonic() + 30
    while not lines.exists() or lines.read_text().count("\n") < 2:
        assert time.monotonic() < end
        time.sleep(0.05)
    running.send_signal(number)
    output, _ = running.communicate(timeout=30)
    assert running.returncode == 0
    report = json.loads(output)
    assert 16 <= report["frames"] < 132
    assert len(np.load(tmp_path / "m.npz")["maps"]) == report["maps"] == lines.read_text().count("\n") >= 2
    with av.open(tmp_path / "o.mp4") as overlay:
        assert len(list(overlay.decode(video=0))) == report["frames"]
    with av.open(tmp_path / "o.mp4") as overlay:
        seconds = [f.time or 0 for f in overlay.decode(audio=0)]
    assert seconds[-1] < report["frames"] / 25 + 0.1
    assert {p.name for p in tmp_path.iterdir()} == {"o.mp4", "m.npz", "m.ndjson"}


@pytest.mark.parametrize("lag", ["queue", "drop"])
def test_a_signal_ends_a_stream_whose_overlay_is_behind(
    run, long_film: Path, toy_server: TritonServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lag: str
) -> None:
    """Over a hundred frames wait to be encoded, 0.2 s each; what is not in the overlay in time is left out of it."""
    monkeypatch.setattr("mubic_deploy.live.stop.STOP_S", 1.0)
    blend, count, signalled = HeatBlend.__call__, 0, 0.0

    def slow(self: HeatBlend, *given: Any) -> av.VideoFrame:
        nonlocal count, signalled
        count += 1
        if count == 5:
            signalled = time.monotonic()
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        return blend(self, *given)

    monkeypatch.setattr(HeatBlend, "__call__", slow)
    files = ("-o", tmp_path / "o.mp4", "--maps", tmp_path / "m.npz")
    settings = ("--stride", 20, "--steps", 1, "--on-lag", lag, "--max-waiting", 64, "--json")
    ran = run("stream", long_film, "--url", toy_server.url, *settings, *files)
    assert time.monotonic() - signalled < 5
    assert ran.code == 0, ran.err
    report = json.loads(ran.out)
    assert len(np.load(tmp_path / "m.npz")["maps"]) == report["maps"] >= 1
    with av.open(tmp_path / "o.mp4") as overlay:
        shown = len(list(overlay.decode(video=0)))
    assert 5 <= shown <= 12
    assert shown == report["frames"] - report["left_out"]
    assert any(line.startswith(f"overlay {tmp_path / 'o.mp4'}: the last ") for line in report["warnings"])


def test_a_lost_server_leaves_what_came(
    run, film: Path, toy_artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mubic_deploy.live.commands.StreamClient", partial(StreamClient, timeout=2, give_up_s=1))
    folder = tmp_path / "out"
    folder.mkdir()
    overlay, maps, lines = (folder / name for name in ("o.mp4", "m.npz", "m.ndjson"))
    with serving(toy_artifacts, tmp_path / "triton") as server:

        def lose() -> None:
            end = time.monotonic() + 30
            while time.monotonic() < end and not (lines.exists() and lines.read_text().count("\n") >= 2):
                time.sleep(0.05)
            (pid,) = (
                p for p in processes(server.shm_prefix) if Path(f"/proc/{p}/exe").resolve().name == "tritonserver"
            )
            os.kill(pid, signal.SIGKILL)  # to stop takes it longer

        losing = threading.Thread(target=lose)
        losing.start()
        outputs = ("-o", overlay, "--maps", maps, "--ndjson", lines)
        ran = run("stream", film, "--url", server.url, "--realtime", "--stride", 8, *outputs, "--json")
        losing.join()
    assert ran.code == 2
    assert ran.err.startswith(f"mubic-deploy: the Triton server at {server.url} gave no answer for 1 s (")
    assert ran.err.count("\n") == 1
    report = json.loads(ran.out)
    assert len(np.load(maps)["maps"]) == report["maps"] == lines.read_text().count("\n") >= 2
    with av.open(overlay) as written:
        assert 16 <= len(list(written.decode(video=0))) <= 132
    assert {p.name for p in folder.iterdir()} == {"o.mp4", "m.npz", "m.ndjson"}


@pytest.mark.parametrize("lines", ["text", "ndjson"])
def test_an_output_that_nobody_reads_leaves_the_others(
    film: Path, toy_server: TritonServer, tmp_path: Path, lines: str
) -> None:
    """As `| head -1` ends."""
    overlay, maps = tmp_path / "o.mp4", tmp_path / "m.npz"
    options = ["--url", toy_server.url, "--stride", "4", "--steps", "1", "--realtime"]
    options += ["-o", str(overlay), "--maps", str(maps)]
    options += ["--ndjson", "-"] if lines == "ndjson" else []
    command = [sys.executable, "-m", "mubic_deploy.cli", "stream", str(film), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        try:
            assert running.stdout is not None
            assert running.stderr is not None
            assert running.stdout.readline()
            running.stdout.close()
            said = running.stderr.read()
            assert running.wait(30) == 2
        finally:
            running.kill()
    where = "ndjson -" if lines == "ndjson" else "text on standard output"
    assert said == f"mubic-deploy: {where} cannot be written (Broken pipe): whatever read it has ended\n"
    found = np.load(maps)["maps"]
    assert 1 <= len(found) < 30
    with av.open(overlay) as written:
        assert 1 <= len(list(written.decode(video=0))) < 132
    assert {p.name for p in tmp_path.iterdir()} == {"o.mp4", "m.npz"}


def waiting(pipe: int) -> int:
    """Bytes in it."""
    return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("lines", ["text", "ndjson"])
def test_a_signal_ends_a_stream_whose_lines_nobody_reads(
    film: Path, toy_server: TritonServer, tmp_path: Path, number: int, lines: str
) -> None:
    """As `| less` that shows its first page."""
    command = ["stream", str(film), "--url", toy_server.url, "--stride", "1", "--steps", "1"]
    command += ["--maps", str(tmp_path / "m.npz")] + (["--ndjson", "-"] if lines == "ndjson" else [])
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    with subprocess.Popen(
        [sys.executable, "-m", "mubic_deploy.cli", *command], stdout=writing, stderr=subprocess.PIPE, text=True
    ) as running:
        try:
            end = time.monotonic() + 60
            while not select.select([reading], [], [], 0.05)[0]:
                assert time.monotonic() < end
            held = 0
            while held < (held := waiting(reading)):  # until it is full
                time.sleep(0.5)
            running.send_signal(number)
            _, said = running.communicate(timeout=20)
        finally:
            running.kill()
            os.close(reading)
            os.close(writing)
    assert running.returncode == 0, said
    where = "ndjson -" if lines == "ndjson" else "text on standard output"
    assert re.fullmatch(rf"warning: {where}: nobody reads it, its last \d+ line\(s\) are lost: .*\n", said)
    assert 10 < len(np.load(tmp_path / "m.npz")["maps"]) <= 117
    assert [p.name for p in tmp_path.iterdir()] == ["m.npz"]


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "m.ndjson")
    return tmp_path / "m.ndjson"


def read_later(fifo: Path, seconds: float) -> Future[str]:
    """What a reader gets that begins after so long."""
    found: Future[str] = Future()

    def read() -> None:
        time.sleep(seconds)
        found.set_result(fifo.read_text())

    threading.Thread(target=read, daemon=True).start()
    return found


def test_a_film_waits_for_a_late_reader(
    run, film: Path, toy_server: TritonServer, fifo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mubic_deploy.live.lines.LINES", 3)
    found = read_later(fifo, 2)
    ran = run("stream", film, "--url", toy_server.url, "--stride", 8, "--ndjson", fifo)
    assert (ran.code, ran.err) == (0, "")
    lines = [json.loads(line) for line in found.result(5).splitlines()]
    assert [line["frame_index"] for line in lines] == list(range(8, 125, 8))


@pytest.mark.parametrize(("lag", "lost"), [("queue", 15), ("drop", 5)])
def test_a_reader_that_never_comes_leaves_the_other_outputs(
    run,
    film: Path,
    toy_server: TritonServer,
    fifo: Path,
    monkeypatch: pytest.MonkeyPatch,
    lag: str,
    lost: int,
) -> None:
    """A film waits a while for it, a camera only as long as there is room for its lines."""
    monkeypatch.setattr("mubic_deploy.live.outputs._PATIENCE_S", 1.0)
    monkeypatch.setattr("mubic_deploy.live.lines.LINES", 5 if lag == "drop" else 1000)
    read_later(fifo, 30)  # so that a wrong implementation ends, too
    maps = fifo.with_name("m.npz")
    settings = ("--stride", 8, "--on-lag", lag, "--max-waiting", 64, "--ndjson", fifo, "--maps", maps, "--json")
    ran = run("stream", film, "--url", toy_server.url, *settings)
    assert ran.code == 0, ran.err
    (warning,) = json.loads(ran.out)["warnings"]
    assert warning.startswith(f"ndjson {fifo}: nobody reads it, its last {lost} line(s) are lost: ")
    assert len(np.load(maps)["maps"]) == 15


def test_without_another_output_a_reader_that_never_comes_is_an_error(
    run, film: Path, toy_server: TritonServer, fifo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mubic_deploy.live.outputs._PATIENCE_S", 1.0)
    read_later(fifo, 30)
    ran = run("stream", film, "--url", toy_server.url, "--stride", 16, "--ndjson", fifo, "--json")
    assert ran.code == 2
    assert ran.err.startswith(f"mubic-deploy: ndjson {fifo}: nobody reads it, its last 8 line(s) are lost: ")


@pytest.mark.parametrize("kind", ["overlay", "maps", "ndjson"])
def test_a_file_that_cannot_be_written_leaves_the_others(
    run, film: Path, toy_server: TritonServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A disk that is full after a while, for one of them; what was there before stays."""
    files = {"overlay": tmp_path / "o.mp4", "maps": tmp_path / "m.npz", "ndjson": tmp_path / "m.ndjson"}
    if kind == "ndjson":
        files["ndjson"].symlink_to("/dev/full")
    else:
        files[kind].write_text("of an earlier run")
        writer: Any = {"overlay": OverlayWriter, "maps": MapsWriter}[kind]
        add_map, maps = writer.add_map, []

        def full(self: Any, found: Any) -> None:
            maps.append(found)
            if len(maps) > 3:
                raise OSError(errno.ENOSPC, "No space left on device")
            add_map(self, found)

        monkeypatch.setattr(writer, "add_map", full)
    outputs = ("-o", files["overlay"], "--maps", files["maps"], "--ndjson", files["ndjson"])
    ran = run("stream", film, "--url", toy_server.url, "--stride", 4, "--steps", 1, *outputs)
    assert ran.code == 2
    assert ran.err == f"mubic-deploy: {kind} {files[kind]} cannot be written (No space left on device): make room\n"
    if kind != "ndjson":
        assert files[kind].read_text() == "of an earlier run"
        assert files["ndjson"].read_text().count("\n") >= 4
    if kind != "maps":
        assert len(np.load(files["maps"])["maps"]) >= (1 if kind == "ndjson" else 4)
    if kind != "overlay":
        with av.open(files["overlay"]) as written:
            assert list(written.decode(video=0))
    assert {p.name for p in tmp_path.iterdir()} == {path.name for path in files.values()}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_silent_pipe_can_be_stopped(number: int, code: int) -> None:
    """FFmpeg, which waits for its first byte, goes on waiting after a signal."""
    script = """
import signal, sys, mubic_deploy.live.commands
from mubic_deploy import cli
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
print("reading", flush=True)
sys.exit(cli.main(["stream", "-", "--url", "127.0.0.1:9"]))
"""
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as running:
        try:
            assert running.stdout is not None
            assert running.stdout.readline() == b"reading\n"
            time.sleep(1)
            running.send_signal(number)
            assert running.wait(5) == code
        finally:
            running.kill()


def test_a_standard_input_that_is_closed_is_said() -> None:
    command = f"exec {shlex.quote(sys.executable)} -m mubic_deploy.cli stream - --url 127.0.0.1:9 <&-"
    ran = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    said = "mubic-deploy: standard input cannot be opened (Bad file descriptor): check the address"
    assert (ran.returncode, ran.stdout, ran.stderr[: len(said)]) == (2, "", said)
    assert ran.stderr.count("\n") == 1


@pytest.mark.parametrize("start", [0, 7, 36_000])
def test_an_overlay_does_not_leap_with_the_clock_of_its_source(
    run, toy_server: TritonServer, tmp_path: Path, start: int
) -> None:
    """Of an encoder that was restarted; an MP4 counts no more than some hours."""
    parts = []
    for first in (5, start):
        times = [first + t for t in frame_times(25, 50)]
        parts.append(write_film(tmp_path / f"{first}.ts", times, quadrants(48, 80)).read_bytes())
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(b"".join(parts)))
    writer.start()
    ran = run("stream", pipe, "--url", toy_server.url, "--on-lag", "queue", "-o", tmp_path / "o.mp4")
    writer.join()
    assert ran.code == 0
    with av.open(tmp_path / "o.mp4") as overlay:
        clock = [frame.time for frame in overlay.decode(video=0)]
    assert len(clock) == 100
    assert max(b - a for a, b in itertools.pairwise(clock)) < 0.1


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("odd planes"), "film.mp4 cannot be read any further: ValueError('odd planes')"),
        (UserError("film.mp4 is cut off"), "film.mp4 is cut off"),
    ],
    ids=["unforeseen", "foreseen"],
)
@pytest.mark.parametrize("after", [0, 60])
def test_a_source_that_fails_is_no_success(
    run,
    film: Path,
    toy_server: TritonServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    line: str,
    after: int,
) -> None:
    """The files hold what came until then; without a map there are none, or those that were there before."""
    items = FileSource.items

    def failing(self: FileSource) -> Iterator[Item]:
        frames = 0
        for item in items(self):
            frames += hasattr(item, "image")
            if frames > after:
                raise error
            yield item

    monkeypatch.setattr(FileSource, "items", failing)
    overlay, maps, lines = tmp_path / "o.mp4", tmp_path / "m.npz", tmp_path / "m.ndjson"
    lines.write_text("of an earlier run")
    outputs = ("-o", overlay, "--maps", maps, "--ndjson", lines)
    ran = run("stream", film, "--url", toy_server.url, "--stride", 8, *outputs)
    assert (ran.code, ran.err) == (2, f"mubic-deploy: {line}\n")
    if not after:
        assert list(tmp_path.iterdir()) == [lines]
        assert lines.read_text() == "of an earlier run"
        return
    assert lines.read_text().count("\n") == 6
    assert np.load(maps)["frame_index"].tolist() == [8, 16, 24, 32, 40, 48]
    with av.open(overlay) as written:
        assert len(list(written.decode(video=0))) == 60
    with av.open(overlay) as written:  # the film's sound lasts 5.28 s
        assert max(f.time or 0 for f in written.decode(audio=0)) < 60 / 25 + 0.1
