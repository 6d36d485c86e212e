"""`StreamClient` against the real server, over toy graphs."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from films import frame_times, write_film
from live_feed import feed, maps_of
from triton_serving import processes, serving, wait_until

from mubic_deploy import AsyncStreamClient, StreamClient, predict_clips
from mubic_deploy.artifacts import Artifacts
from mubic_deploy.config import DEMO
from mubic_deploy.errors import UserError
from mubic_deploy.live.items import Heard
from mubic_deploy.live.link import ALIVE_S, Link, Settings, lives
from mubic_deploy.live.report import Gap, LiveMap
from mubic_deploy.live.sender import Limits, Sender
from mubic_deploy.live.settings import StreamSettings
from mubic_deploy.live.source import FileSource, open_source
from mubic_deploy.media.film import Frame
from mubic_deploy.media.maps import FilmMap
from mubic_deploy.pipeline import Pipeline
from mubic_deploy.triton.server import TritonServer

pytest_plugins = ("triton_fixtures",)


def picture(index: int) -> np.ndarray:
    """A bright square that walks over a dim ramp."""
    image = np.tile(np.linspace(20, 120, 64, dtype=np.uint8)[None, :, None], (36, 1, 3))
    image[8:20, index % 50 : index % 50 + 12] = (240, 180, 40)
    return image


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return (0.3 * np.random.default_rng(seed).standard_normal((1, round(48_000 * seconds)))).astype(np.float32)


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """75 frames of 25 fps with sound that ends 0.3 s before the pictures."""
    path = tmp_path_factory.mktemp("films") / "film.mkv"
    return write_film(path, frame_times(25, 75), picture, sound=noise(2.7))


def same(found: list[LiveMap], expected: list[FilmMap]) -> None:
    assert [m.frame_index for m in found] == [m.frame_index for m in expected]
    assert [m.time_s for m in found] == [m.time_s for m in expected]
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a.saliency, b.saliency, atol=1e-5)
        assert a.steps_used == b.steps_used


@pytest.mark.parametrize(("stride", "realtime"), [(1, False), (4, False), (20, False), (4, True)])
def test_the_same_maps_as_predict(
    toy_server: TritonServer, toy_pipeline: Pipeline, film: Path, stride: int, realtime: bool
) -> None:
    expected = list(predict_clips(toy_pipeline, film, stride=stride, seed=3, steps=2))
    gaps: list[Gap] = []
    with StreamClient(toy_server.url, stride=stride, seed=3, steps=2, on_gap=gaps.append) as client:
        found = maps_of(client, film, realtime)
        report = client.report()
    same(found, expected)
    assert (report.maps, report.dropped, report.lost, report.waiting, report.gaps) == (len(found), 0, 0, 0, 0)
    assert gaps == []
    assert 0 < report.median_s <= report.p95_s <= report.p99_s
    if realtime:  # half the excerpt of sound has to be waited for; a busy machine may give a frame a little late
        assert [m.latency_s for m in found[:-4] if not 0.4 < m.latency_s < 3] == []


@pytest.mark.parametrize(
    "name",
    [
        "29.97 fps",
        "variable rate",
        "sound at the end of the file",
        "late sound",
        "gap",
        "overlap",
        "silent",
        "short",
        "portrait",
    ],
)
def test_the_same_maps_of_odd_films(
    toy_server: TritonServer, toy_pipeline: Pipeline, tmp_path: Path, name: str
) -> None:
    times, options = frame_times(25, 40), {"sound": noise(1.6)}
    if name == "29.97 fps":
        times = frame_times(Fraction(30_000, 1001), 50)
    elif name == "variable rate":
        times = [Fraction(i, 30) + Fraction(i * i, 9000) for i in range(45)]
    elif name == "sound at the end of the file":
        options["interleave"] = False  # type: ignore[assignment]
    elif name == "late sound":
        options["sound_start"] = Fraction(1, 2)  # type: ignore[assignment]
    elif name == "gap":
        options["gap"] = (24 * 1024, Fraction(2, 5))  # type: ignore[assignment]
    elif name == "overlap":  # by a packet, as where films were joined
        options["gap"] = (24 * 1024, -Fraction(1024, 48_000))  # type: ignore[assignment]
    elif name == "silent":
        del options["sound"]
    elif name == "short":
        times, options = frame_times(25, 5), {"sound": noise(0.2)}
    elif name == "portrait":
        options["rotation"] = 90  # type: ignore[assignment]
    path = write_film(tmp_path / "film.mkv" if name != "portrait" else tmp_path / "film.mp4", times, picture, **options)
    expected = list(predict_clips(toy_pipeline, path))
    with StreamClient(toy_server.url) as client:
        same(maps_of(client, path), expected)


@pytest.mark.parametrize("encoding", ["jpeg", "h264"])
def test_encoded_frames(toy_server: TritonServer, toy_pipeline: Pipeline, film: Path, encoding: str) -> None:
    expected = list(predict_clips(toy_pipeline, film, stride=1))
    with StreamClient(toy_server.url, stride=1, encoding=encoding) as client:
        found = maps_of(client, film)
        sent = client.report().sent_bytes
    assert [m.frame_index for m in found] == [m.frame_index for m in expected]
    # as if each of the 60 windows had been sent whole: 16 frames of 112 x 192 and 16 608 samples
    assert 100 * sent < len(found) * (16 * 112 * 192 * 3 + 4 * 16_608)


def test_bytes_of_raw_frames(toy_server: TritonServer, film: Path) -> None:
    with StreamClient(toy_server.url, stride=1) as client:
        found = maps_of(client, film)
        sent = client.report().sent_bytes
    # 60 windows of 75 frames: 16 frames to a window become 1.25
    assert 16 * 112 * 192 * 3 * len(found) > 12 * sent


def test_whether_a_server_lives(toy_server: TritonServer) -> None:
    for address, alive in ((toy_server.url, True), ("127.0.0.1:9", False)):  # where nobody listens
        link = Link(address, Settings(4, 0, 4, "raw"), (112, 192), lambda *_: None)
        assert (link.lives(), lives(address)) == (alive, alive)
        link.close()


def test_a_proxy_is_not_asked_for_this_machine(
    toy_server: TritonServer, film: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("no_proxy", "no_grpc_proxy", "grpc_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # where nobody listens
    with StreamClient(toy_server.url, stride=20, steps=1) as client:
        assert len(maps_of(client, film)) > 1


def test_asyncio(toy_server: TritonServer, toy_pipeline: Pipeline, film: Path) -> None:
    """Two tasks on one event loop, which goes on meanwhile."""
    expected = list(predict_clips(toy_pipeline, film))

    async def stream() -> tuple[list[LiveMap], int]:
        beats = 0

        async def feed(client: AsyncStreamClient, source: FileSource) -> None:
            nonlocal beats
            for item in source.items():
                if isinstance(item, Frame):
                    await client.frame(item.image, item.time_s, source.display)
                elif isinstance(item, Heard):
                    await client.sound(item.samples, item.start / 16_000)
                else:
                    await client.end_sound()
                beats += 1
            await client.finish()

        with FileSource(str(film)) as source:
            async with AsyncStreamClient(toy_server.url, max_waiting=2) as client:
                feeding = asyncio.create_task(feed(client, source))
                found = [m async for m in client]
                await feeding
                assert client.report().maps == len(found)
        return found, beats

    found, beats = asyncio.run(stream())
    same(found, expected)
    assert beats > 75


def test_asyncio_clients_whose_readers_pause(toy_server: TritonServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them wait than asyncio has threads: they can be read and closed all the same."""

    async def feed(client: AsyncStreamClient) -> None:
        for i in range(40):
            await client.frame(picture(i), i / 25)
        await client.finish()

    async def stream() -> list[list[int]]:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
        clients = [AsyncStreamClient(toy_server.url, stride=1, max_waiting=1, in_flight=1) for _ in range(3)]
        async with contextlib.AsyncExitStack() as stack:
            for client in clients:
                await stack.enter_async_context(client)
                await client.end_sound()
            feeding = [asyncio.create_task(feed(client)) for client in clients]
            await asyncio.sleep(1)
            found = [[m.frame_index async for m in client] for client in clients]
            await asyncio.gather(*feeding)
        with pytest.raises(UserError, match="the stream was finished or closed"):
            await clients[0].frame(picture(0), 0)
        assert [m async for m in clients[0]] == []
        return found

    before = threading.active_count()
    monkeypatch.setattr("mubic_deploy.live.sender.UNREAD", 4)
    assert asyncio.run(asyncio.wait_for(stream(), 30)) == [list(range(8, 33))] * 3
    end = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < end:
        time.sleep(0.1)
    assert threading.active_count() <= before


def test_asyncio_connecting_that_is_cancelled(toy_server: TritonServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client that a thread makes all the same is closed."""
    made: list[StreamClient] = []

    def late(*given: object, **options: object) -> StreamClient:
        time.sleep(0.3)
        made.append(StreamClient(*given, **options))  # type: ignore[arg-type]
        return made[-1]

    monkeypatch.setattr("mubic_deploy.live.aio.StreamClient", late)

    async def connect() -> None:
        async with AsyncStreamClient(toy_server.url):
            pytest.fail("it was not cancelled")

    before = threading.active_count()
    with pytest.raises(TimeoutError):
        asyncio.run(asyncio.wait_for(connect(), 0.05))
    wait_until(lambda: bool(made) and made[0]._sender.closed and threading.active_count() <= before)


def test_asyncio_connects_again(toy_server: TritonServer, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same client, when the server has come."""

    async def twice() -> bool:
        client = AsyncStreamClient(f"127.0.0.1:{port}")
        with pytest.raises(UserError, match="no Triton server answers"):
            async with client:
                pass
        client._url = toy_server.url
        async with client:
            return client.client.through

    assert asyncio.run(twice()) is False


def test_asyncio_reads_that_are_cancelled(toy_server: TritonServer) -> None:
    """As `wait_for` does it, while a thread waits for the map: none is lost."""

    async def stream() -> tuple[list[int], int]:
        found, cancelled = [], 0
        async with AsyncStreamClient(toy_server.url, stride=1, max_waiting=99) as client:
            await client.end_sound()
            for i in range(50):
                await client.frame(picture(i), i / 25)
            await client.finish()
            while True:
                try:
                    found.append((await asyncio.wait_for(anext(client), 0.002)).frame_index)
                except TimeoutError:
                    cancelled += 1
                except StopAsyncIteration:
                    return found, cancelled

    found, cancelled = asyncio.run(stream())
    assert found == list(range(8, 43))
    assert cancelled > 5


# ---- the clock, the size, the sound


def frames_of(client: StreamClient, indices: range, fps: int = 25, offset: float = 0.0) -> None:
    for i in indices:
        client.frame(picture(i), offset + i / fps)
        client.sound(np.full(640, (i % 10) / 20, np.float32), offset + i / fps)


def test_the_clock_goes_back(toy_server: TritonServer) -> None:
    gaps: list[Gap] = []
    with StreamClient(toy_server.url, max_waiting=99, on_gap=gaps.append) as client:
        frames_of(client, range(42), offset=100)
        frames_of(client, range(42), offset=3)
        client.finish()
        found = list(client)
    # frames 0..41: windows at 8, 12, .. 32; frame 42 is the new clock's first: windows start at 44
    assert [m.frame_index for m in found] == [*range(8, 33, 4), *range(52, 77, 4)]
    assert [m.time_s for m in found[:2]] == [100.32, 100.48]
    assert found[7].time_s == 3 + 10 / 25
    assert [(gap.kind, gap.lost) for gap in gaps] == [("clock", 4)]  # those that begin at 28, 32, 36 and 40
    assert "goes back from 101.640 s to 3.000 s" in gaps[0].text


def test_a_source_that_was_away(toy_server: TritonServer) -> None:
    gaps: list[Gap] = []
    with StreamClient(toy_server.url, max_waiting=99, on_gap=gaps.append) as client:
        frames_of(client, range(20))
        frames_of(client, range(20, 40), offset=10)
        client.finish()
        assert [m.frame_index for m in client] == [8, 12, 16, 20, 24, 28, 32]
    found = {(gap.kind, round(gap.time_s, 2), round(gap.seconds, 2)) for gap in gaps}
    # of the first window what it wanted to hear until 0.84 s did not come: it is said if it went before the next sound
    assert found - {("sound", 0.32, 0.0)} == {("clock", 0.76, 10.04), ("sound", 0.8, 10.0)}


def test_sound_that_does_not_come(toy_server: TritonServer) -> None:
    gaps: list[Gap] = []
    with StreamClient(toy_server.url, max_waiting=99, on_gap=gaps.append) as client:
        for i in range(90):
            client.frame(picture(i), i / 25)
        first = client.poll(20)
        assert first is not None
        assert (first.frame_index, first.heard) == (8, 0)
        client.finish()
        found = [first, *client]
    assert [m.frame_index for m in found] == list(range(8, 83, 4))
    assert [gap.kind for gap in gaps] == ["sound"]


def test_sound_that_comes_far_too_early(toy_server: TritonServer) -> None:
    """It is kept for ten minutes; what had to go is said, once."""
    gaps: list[Gap] = []
    with StreamClient(toy_server.url, on_gap=gaps.append) as client:
        client.sound(np.zeros(16_000 * 610, np.float32), 0.0)
        client.sound(np.zeros(16_000, np.float32), 610.0)
        assert [(gap.kind, gap.seconds) for gap in gaps] == [("sound", 10.0)]
        assert "the oldest 10.0 s of it are forgotten" in gaps[0].text
        for i in range(16):
            client.frame(picture(i), 12 + i / 25)
        client.finish()
        (found,) = client
    assert found.heard == 1


def test_frames_of_another_size(toy_server: TritonServer) -> None:
    """They are brought to the first one's shape, as in a film."""
    with StreamClient(toy_server.url) as client:
        client.end_sound()
        for i in range(16):
            client.frame(np.zeros((36, 64, 3) if i < 8 else (90, 120, 3), np.uint8), i / 25)
        client.finish()
        (found,) = client
    assert found.saliency.shape == (36, 64)


def test_sound_after_its_end_leaves_the_stream_as_it_was(toy_server: TritonServer) -> None:
    gaps: list[Gap] = []
    with StreamClient(toy_server.url, on_gap=gaps.append) as client:
        frames_of(client, range(10))
        client.end_sound()
        for time_s in (0.4, 9.0, -5.0):  # which would be a gap, or a jump of the clock
            with pytest.raises(UserError, match="sound came after the stream's sound had ended"):
                client.sound(noise(0.01)[0], time_s)
        for i in range(10, 20):
            client.frame(picture(i), i / 25)
        client.finish()
        assert [m.frame_index for m in client] == [8, 12]
    assert gaps == []


def test_bad_frames_and_sound_leave_the_stream_as_it_was(toy_server: TritonServer) -> None:
    gaps: list[Gap] = []
    bad_sound = noise(0.01)[0].copy()
    bad_sound[7] = np.nan
    with StreamClient(toy_server.url, on_gap=gaps.append) as client:
        frames_of(client, range(10))
        times: tuple[Any, ...] = (math.nan, math.inf, -math.inf, 1e300, None, "1")
        for time_s in times:
            with pytest.raises(UserError, match=r"the sound has the time stamp .*: give seconds"):
                client.sound(noise(0.01)[0], time_s)
            with pytest.raises(UserError, match=r"the frame has the time stamp .*: give seconds"):
                client.frame(picture(10), time_s)
        with pytest.raises(UserError, match="the sound holds NaN or infinite samples"):
            client.sound(bad_sound, 0.4)
        with pytest.raises(UserError, match=r"sound must be float32 \[n\], not list"):
            client.sound([0.0], 0.4)  # type: ignore[arg-type]
        for shape, dtype in (
            ((36, 64, 3), np.float32),
            ((36, 64), np.uint8),
            ((36, 64, 4), np.uint8),
            ((0, 64, 3), "u1"),
        ):
            with pytest.raises(
                UserError, match=r"a frame must be uint8 \[h, w, 3\], RGB, or PyAV's, not .*: convert it"
            ):
                client.frame(np.zeros(shape, dtype), 0.4)
        for given in (None, [[1]], SimpleNamespace(height=9, width=9)):  # as PIL's pictures have it
            with pytest.raises(UserError, match=r"a frame must be .*, or PyAV's, not "):
                client.frame(given, 0.4)  # type: ignore[arg-type]
        frames_of(client, range(10, 20))
        client.finish()
        found = list(client)
    assert [m.frame_index for m in found] == [8, 12]
    assert found[0].heard == pytest.approx(20 * 640 / 16_608)  # all that was given
    assert gaps == []


@pytest.mark.parametrize("starts", [(1000, 5), (2**33 / 90_000 - 4,)], ids=["restarted", "full"])
def test_a_transport_stream_whose_clock_goes_back(
    toy_server: TritonServer, tmp_path: Path, starts: tuple[float, ...]
) -> None:
    """Its decoders give the first sound after the seam before the last frame in front of it: one gap all the same."""
    with (tmp_path / "film.ts").open("wb") as film:
        for start in starts:
            part, times = tmp_path / "part.ts", [Fraction(start) + t for t in frame_times(25, 150)]
            write_film(part, times, picture, sound=noise(6), sound_start=Fraction(start), codec="aac")
            film.write(part.read_bytes())
    gaps: list[Gap] = []
    os.mkfifo(tmp_path / "pipe")
    writing = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes((tmp_path / "film.ts").read_bytes()))
    writing.start()
    source = open_source(str(tmp_path / "pipe"))
    with StreamClient(toy_server.url, steps=1, on_gap=gaps.append) as client:
        feeding = threading.Thread(target=feed, args=(client, source))
        feeding.start()
        found = list(client)
        feeding.join()
    writing.join()
    source.close()
    seam = 150 if len(starts) == 2 else 100
    frames = 150 * len(starts)
    assert [(gap.kind, gap.lost) for gap in gaps] == [("clock", len([*range(-(-(seam - 15) // 4) * 4, seam, 4)]))]
    # windows of 16 frames that begin at each fourth frame, but not over the seam
    whole = [k + 8 for k in range(0, frames - 15, 4) if k + 15 < seam or k >= seam]
    assert [m.frame_index for m in found] == whole
    assert all(m.heard == 1 for m in found if 12 < m.frame_index < seam - 16)


# ---- lag


def test_drop(toy_server: TritonServer) -> None:
    """Frames as fast as they are made: some windows go, the oldest first, and are counted."""
    with StreamClient(toy_server.url, stride=1, on_lag="drop", max_waiting=2, in_flight=1) as client:
        client.end_sound()
        for i in range(300):
            client.frame(picture(i), i / 25)
        client.finish()
        found = list(client)
        report = client.report()
    indices = [m.frame_index for m in found]
    assert indices == sorted(set(indices))
    assert indices[-2:] == [291, 292]  # the newest are never dropped
    assert report.dropped > 50
    assert len(found) + report.dropped == 285


def test_latency_counts_from_when_the_frame_was_given(toy_server: TritonServer) -> None:
    """Where `frame` waits for a server that is behind, too: half of the maps are read late, and the stream waits."""
    given: dict[int, float] = {}
    late: list[float] = []
    with StreamClient(toy_server.url, stride=1, max_waiting=1, in_flight=1) as client:
        client.end_sound()

        def source() -> None:
            for i in range(120):
                given[i] = time.monotonic()
                client.frame(picture(i), i / 25)
            client.finish()

        feeding = threading.Thread(target=source)
        feeding.start()
        count = -1
        while len(given) > count:  # 64 maps are held, then the source is
            count = len(given)
            time.sleep(1.5)
        for found in client:
            late.append(time.monotonic() - given[found.frame_index] - found.latency_s)
        feeding.join()
    assert len(late) == 105
    assert 70 < count < 100
    assert all(-0.01 < seconds < 0.7 for seconds in late[count - 10 :])


def test_queue_holds_the_source_back(toy_server: TritonServer) -> None:
    with StreamClient(toy_server.url, stride=1, max_waiting=3, in_flight=2) as client:
        client.end_sound()
        most = 0

        def source() -> None:
            nonlocal most
            for i in range(100):
                client.frame(picture(i), i / 25)
                most = max(most, client.report().waiting)
            client.finish()

        feeding = threading.Thread(target=source)
        feeding.start()
        found = list(client)
        feeding.join()
    assert [m.frame_index for m in found] == list(range(8, 93))
    assert most <= 3 + 2


def test_nothing_is_left_of_a_client(toy_server: TritonServer) -> None:
    """Neither a thread nor what it held, of a connection that was used or of one that never was one."""

    def once(url: str) -> None:
        sender = Sender(url, DEMO, Settings(1, 0, 4, "raw"), Limits(8, 4, 1.0, 60.0), None)
        with sender.changed:
            for i in range(16):
                sender.backlogs[-1].add_frame(np.zeros((112, 192, 3), np.uint8), i / 25, 0.0)
            sender.changed.notify_all()
        time.sleep(0.7)
        sender.close()

    with socket.create_server(("127.0.0.1", 0)) as nobody:
        closed = f"127.0.0.1:{nobody.getsockname()[1]}"
    once(toy_server.url)
    before = threading.active_count()
    for url in (toy_server.url, closed) * 3:
        once(url)
    end = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < end:
        time.sleep(0.1)
    assert threading.active_count() <= before


# ---- the server


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


@pytest.mark.parametrize("killed", [True, False])
def test_the_server_restarts(
    toy_artifacts: Artifacts, toy_pipeline: Pipeline, tmp_path: Path, film: Path, killed: bool
) -> None:
    """Killed, or asked to end, in the middle of a stream, with windows on their way: every window is answered, once,
    with the right map."""
    expected = list(predict_clips(toy_pipeline, film, stride=1))
    gaps: list[Gap] = []
    with serving(toy_artifacts, tmp_path) as first:
        port = first.grpc_port
        client = StreamClient(first.url, stride=1, max_waiting=2, timeout=5, on_gap=gaps.append)
        with client, FileSource(str(film)) as source:
            feeding = threading.Thread(target=feed, args=(client, source))
            feeding.start()
            found = [next(client) for _ in range(15)]
            (server,) = [
                pid for pid in processes(first.shm_prefix) if Path(f"/proc/{pid}/exe").resolve().name == "tritonserver"
            ]
            if killed:
                os.kill(server, signal.SIGKILL)
                while Path(f"/proc/{server}").exists():
                    time.sleep(0.05)
            else:
                first.stop()
            time.sleep(1)
            second = TritonServer(
                tmp_path / "repository", http_port=0, grpc_port=port, metrics_port=0, log=tmp_path / "log2"
            )
            with second:
                found += list(client)
            feeding.join()
            report = client.report()
    same(found, expected)
    assert (report.maps, report.dropped, report.lost) == (60, 0, 0)
    assert [gap.kind for gap in gaps] == ["connection"]
    assert gaps[0].seconds > 1
    assert f"no maps from 127.0.0.1:{port}" in gaps[0].text


def test_the_server_stands_still(toy_artifacts: Artifacts, toy_pipeline: Pipeline, tmp_path: Path, film: Path) -> None:
    """It is stopped until it cannot say in time that it lives, as when a network stalls."""
    expected = list(predict_clips(toy_pipeline, film, stride=1))
    gaps: list[Gap] = []
    with (
        serving(toy_artifacts, tmp_path) as server,
        StreamClient(server.url, stride=1, max_waiting=2, timeout=1, on_gap=gaps.append) as client,
        FileSource(str(film)) as source,
    ):
        feeding = threading.Thread(target=feed, args=(client, source))
        feeding.start()
        found = [next(client) for _ in range(10)]
        (pid,) = [p for p in processes(server.shm_prefix) if Path(f"/proc/{p}/exe").resolve().name == "tritonserver"]
        os.kill(pid, signal.SIGSTOP)
        time.sleep(1 + 2 * ALIVE_S + 2)  # it is asked on two connections
        os.kill(pid, signal.SIGCONT)
        found += list(client)
        feeding.join()
    same(found, expected)
    assert "connection" in {gap.kind for gap in gaps}


def test_a_sequence_that_the_server_forgot(
    toy_artifacts: Artifacts, toy_pipeline: Pipeline, tmp_path: Path, film: Path
) -> None:
    """Nothing is lost: the only gap is that of the source."""
    expected = list(predict_clips(toy_pipeline, film))
    gaps: list[Gap] = []
    with (
        serving(toy_artifacts, tmp_path, streams=StreamSettings(idle_s=1)) as server,
        StreamClient(server.url, max_waiting=99, on_gap=gaps.append) as client,
        FileSource(str(film)) as source,
    ):
        for item in source.items():
            if isinstance(item, Frame):
                client.frame(item.image, item.time_s)
                if item.index == 40:
                    time.sleep(2.5)  # the source stands still
            elif isinstance(item, Heard):
                client.sound(item.samples, item.start / 16_000)
        client.finish()
        same(list(client), expected)
    assert not [gap for gap in gaps if gap.kind == "connection"]


def test_windows_further_apart_than_the_server_keeps_a_stream(toy_artifacts: Artifacts, tmp_path: Path) -> None:
    """Of a silent stream nothing is sent between them."""
    gaps: list[Gap] = []
    with (
        serving(toy_artifacts, tmp_path, streams=StreamSettings(idle_s=1)) as server,
        StreamClient(server.url, stride=100, on_gap=gaps.append) as client,
    ):
        client.end_sound()
        found = []
        for i in range(216):
            if i in (60, 170):
                time.sleep(2.5)
            client.frame(picture(i), i / 25)
            if i % 100 == 15:
                found.append(next(client).frame_index)
        report = client.report()
    assert found == [8, 108, 208]
    assert gaps == []
    assert report.gaps == 0


def test_a_server_that_is_gone_for_good(toy_artifacts: Artifacts, tmp_path: Path, film: Path) -> None:
    with serving(toy_artifacts, tmp_path) as server:
        client = StreamClient(server.url, give_up_s=1.5)
    with client:
        for i in range(20):
            client.frame(picture(i), i / 25)
        with pytest.raises(UserError, match=r"gave no answer for 1\.5 s .*: start it with mubic-deploy serve"):
            next(client)
        with pytest.raises(UserError, match="gave no answer for"):
            client.frame(picture(20), 0.8)


def test_full(toy_artifacts: Artifacts, tmp_path: Path) -> None:
    """A server that holds as many streams as it may: the next one waits until there is room."""
    with (
        serving(toy_artifacts, tmp_path, streams=StreamSettings(max_streams=1)) as server,
        StreamClient(server.url) as one,
        StreamClient(server.url) as two,
    ):
        frames_of(one, range(30))
        assert next(one).frame_index == 8
        frames_of(two, range(20))
        assert two.poll(0.5) is None
        one.finish()
        assert [m.frame_index for m in one] == [12, 16, 20]
        two.finish()
        assert [m.frame_index for m in two] == [8, 12]


def test_what_is_wrong_at_once(toy_server: TritonServer, port: int) -> None:
    for options, message in (
        ({"stride": 0}, "stride 0 is out of range"),
        ({"stride": 2**32 + 4}, "stride 4294967300 is out of range"),
        ({"stride": 4.0}, "stride 4.0 is no int: use 1 to 2147483647 frames"),
        ({"seed": 0.5}, "seed 0.5 is no int"),
        ({"steps": 2.5}, "steps 2.5 is no int: use 1 to 12, or adaptive"),
        ({"max_waiting": 1.5}, "max_waiting 1.5 is no int"),
        ({"in_flight": "2"}, "in_flight '2' is no int"),
        ({"timeout": None}, "timeout None is out of range"),
        ({"seed": -1}, "seed -1 is out of range"),
        ({"seed": 2**63}, "seed 9223372036854775808 is out of range"),
        ({"timeout": 0.0}, "timeout 0.0 is out of range: use seconds above 0"),
        ({"give_up_s": math.nan}, "give_up_s nan is out of range"),
        ({"steps": 13}, "steps 13 is out of range"),
        ({"encoding": "gif"}, "unknown encoding 'gif'"),
        ({"fit": "zoom"}, "unknown fit 'zoom'"),
        ({"on_lag": "wait"}, "unknown on_lag 'wait': use queue or drop"),
        ({"max_waiting": 0}, "max_waiting 0 is out of range"),
        ({"in_flight": 0}, "in_flight 0 is out of range"),
    ):
        with pytest.raises(UserError, match=message):
            StreamClient(toy_server.url, **options)
    with pytest.raises(UserError, match=f"no Triton server answers at 127.0.0.1:{port}"):
        StreamClient(f"127.0.0.1:{port}")
    with pytest.raises(UserError, match="live streams are made by mubic, not mubic_fixed: leave out its name"):
        StreamClient(f"{toy_server.url}/mubic_fixed")
    with StreamClient(f"{toy_server.url}/mubic") as client:
        assert client.poll() is None
    with StreamClient(toy_server.url) as client:
        with pytest.raises(UserError, match=r"sound must be float32 \[n\], not int16 \[7\]: convert it"):
            client.sound(np.zeros(7, np.int16), 0)
        with pytest.raises(UserError, match=r"the sound reaches 2e\+04, as integers do: scale it to -1 to 1"):
            client.sound(np.array([7, -20_000], np.float32), 0)
        for display in ((0, 64), 64, (36.5, 64)):
            with pytest.raises(UserError, match=r"display"):
                client.frame(picture(0), 0, display)  # type: ignore[arg-type]
        assert client.fit is None  # nothing of them was taken
        client.finish()
        with pytest.raises(UserError, match="the stream was finished or closed"):
            client.frame(picture(0), 0)
        assert list(client) == []
