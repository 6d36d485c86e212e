"""Sources of live streams: what comes, when, and on which clock."""

from __future__ import annotations

import contextlib
import http.server
import itertools
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from films import click, flash_and_click, frame_times, quadrants, write_film

from mubic_deploy.errors import UserError
from mubic_deploy.live.items import Heard, Item, SoundEnd
from mubic_deploy.live.seam import one_seam
from mubic_deploy.live.source import FileSource, LiveSource, open_source
from mubic_deploy.media.film import Film, Frame
from mubic_deploy.media.sound import excerpt_start

DARK = np.full((36, 64, 3), 20, np.uint8)

# sends a file to an address in its own time, twice with a pause, as a camera does that is restarted
CAMERA = """
import sys, time, av
for _ in range(2):
    with av.open(sys.argv[1]) as source, av.open(sys.argv[2], "w", format="mpegts") as out:
        streams = {s.index: out.add_stream_from_template(s) for s in source.streams}
        began = time.monotonic()
        for packet in source.demux():
            if packet.dts is not None:
                time.sleep(max(0, began + float(packet.dts * packet.time_base) - time.monotonic()))
                packet.stream = streams[packet.stream.index]
                out.mux(packet)
    time.sleep(4)
"""


@contextlib.contextmanager
def web(answer: Callable[[http.server.BaseHTTPRequestHandler], None]) -> Iterator[str]:
    """The address of a server that answers each GET with this."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/film"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def blind(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2 s of sound and of pictures that cannot be decoded: no key frame is among them."""
    folder = tmp_path_factory.mktemp("blind")
    path = write_film(folder / "film.ts", frame_times(25, 50), DARK, sound=click(0.5, 2), codec="aac")
    with av.open(str(path)) as source, av.open(folder / "blind.ts", "w") as out:
        streams = {stream.index: out.add_stream_from_template(stream) for stream in source.streams}
        for packet in source.demux():
            if packet.dts is not None and not (packet.stream.type == "video" and packet.is_keyframe):
                packet.stream = streams[packet.stream.index]
                out.mux(packet)
    return folder / "blind.ts"


def kinds(items: list[Item]) -> tuple[int, int, int]:
    """How many frames, pieces of sound, and ends of the sound."""
    return tuple(sum(isinstance(i, kind) for i in items) for kind in (Frame, Heard, SoundEnd))  # type: ignore[return-value]


@pytest.mark.parametrize("interleave", [True, False])
def test_a_file_gives_sound_before_the_frames_that_need_it(tmp_path: Path, interleave: bool) -> None:
    sound = click(0.5, 4)
    path = write_film(tmp_path / "film.mkv", frame_times(25, 100), DARK, sound=sound, interleave=interleave)
    heard = 0
    with FileSource(str(path)) as source:
        for item in source.items():
            if isinstance(item, Heard):
                assert item.start == heard
                heard += len(item.samples)
            elif isinstance(item, Frame):
                assert heard >= min(excerpt_start(item.time_s) + 16_608, 64_000 - 2000)
    assert heard == pytest.approx(64_000, abs=2)


def test_a_silent_file_says_so_at_once(tmp_path: Path) -> None:
    path = write_film(tmp_path / "film.mkv", frame_times(25, 20), DARK)
    with FileSource(str(path)) as source:
        items = list(source.items())
        assert isinstance(items[0], SoundEnd)
        assert kinds(items) == (20, 0, 1)
        assert source.warnings == ["film.mkv has no sound: it is predicted as silent"]


def test_what_comes_once_has_its_flash_with_its_click(tmp_path: Path) -> None:
    path = flash_and_click(tmp_path / "film.mkv", frame_times(Fraction(30_000, 1001), 60), 30)
    source = LiveSource(str(path))
    items = list(source.items())
    source.close()
    (flash,) = [i.time_s for i in items if isinstance(i, Frame) and i.image.to_ndarray(format="gray")[18, 32] > 128]
    clicks = [
        (i.start + np.flatnonzero(np.abs(i.samples) > 0.3)[0]) / 16_000
        for i in items
        if isinstance(i, Heard) and np.abs(i.samples).max() > 0.3
    ]
    assert flash == pytest.approx(30 * 1001 / 30_000, abs=0.001)
    assert clicks[0] == pytest.approx(flash, abs=0.5 * 1001 / 30_000)
    assert (source.display, source.map_shape) == ((36, 64), (36, 64))


@pytest.mark.parametrize(
    ("rotation", "sar", "display", "upright"),
    [
        (0, Fraction(4, 3), (48, 107), (48, 80)),
        (90, Fraction(1), (80, 48), (80, 48)),
        (90, Fraction(2), (160, 48), (80, 48)),
        (270, Fraction(1, 2), (40, 48), (80, 48)),
    ],
)
def test_what_comes_once_has_the_size_that_its_film_has(
    tmp_path: Path, rotation: int, sar: Fraction, display: tuple[int, int], upright: tuple[int, int]
) -> None:
    path = write_film(tmp_path / "film.mkv", frame_times(25, 20), quadrants(48, 80), rotation=rotation, sar=sar)
    source = LiveSource(str(path))
    image = next(i.image for i in source.items() if isinstance(i, Frame))
    source.close()
    assert (source.display, source.map_shape) == (display, display)
    assert (image.height, image.width) == upright
    with Film(path) as film:
        assert film.display == display


def test_a_time_stamp_that_stands_still_is_no_jump(tmp_path: Path) -> None:
    """As in a film, the frame comes one tick later; a clock that begins anew is left to the client."""
    path = write_film(tmp_path / "film.mkv", frame_times(25, 40), DARK)
    odd = tmp_path / "odd.mkv"
    with av.open(str(path)) as source, av.open(str(odd), "w") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        at = None
        for i, packet in enumerate(p for p in source.demux(video=0) if p.dts is not None):
            packet.pts = packet.dts = at if i == 20 else packet.dts
            at = packet.dts
            packet.stream = stream
            out.mux(packet)
    live = LiveSource(str(odd))
    times = [i.time_s for i in live.items() if isinstance(i, Frame)]
    live.close()
    assert len(times) == 40
    assert times[20] - times[19] == pytest.approx(0.001)  # Matroska's tick
    assert times[21] - times[19] == pytest.approx(0.08)


def test_sound_that_overlaps_is_heard_once(tmp_path: Path) -> None:
    """What came first counts, in a stream and in a film."""
    noise = (0.3 * np.random.default_rng(0).standard_normal((1, 76_800))).astype(np.float32)
    back = -Fraction(1024, 48_000)
    path = write_film(tmp_path / "film.mkv", frame_times(25, 40), DARK, sound=noise, gap=(24 * 1024, back))
    with FileSource(str(path)) as source:
        pieces = [i for i in source.items() if isinstance(i, Heard)]
    assert all(b.start == a.start + len(a.samples) for a, b in itertools.pairwise(pieces))
    heard = np.concatenate([piece.samples for piece in pieces])
    with Film(str(path)) as film:
        sound = film.sound()
        assert sound is not None
        excerpt = sound.excerpt(0.52)  # from 16 to 16 624; the seam is at 8192
        sound.close()
    np.testing.assert_array_equal(excerpt, heard[16:16_624])


def test_an_address_that_breaks_off_and_comes_back(tmp_path: Path) -> None:
    """A camera on UDP that sends for 2 s, is away, and sends again with a clock that starts anew."""
    sound = click(0.5, 2)
    path = write_film(tmp_path / "film.mp4", frame_times(25, 50), DARK, sound=sound, codec="aac")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    address = f"udp://127.0.0.1:{port}"
    camera = subprocess.Popen([sys.executable, "-c", CAMERA, str(path), f"{address}?pkt_size=1316"])
    source = LiveSource(address, patience_s=8, timeout_s=2)
    try:
        items = list(source.items())
    finally:
        source.close()
        assert camera.wait(20) == 0
    frames, pieces, _ = kinds(items)
    assert 75 <= frames <= 100  # what is sent while nobody listens is lost
    assert pieces > 50
    assert [i.index for i in items if isinstance(i, Frame)] == list(range(frames))
    times = [i.time_s for i in items if isinstance(i, Frame)]
    assert sum(b <= a for a, b in itertools.pairwise(times)) == 1
    assert f"{address} broke off (nothing came for 2 s) and did not come back within 8 s" in source.warnings


def test_an_address_that_comes_back_without_a_frame(
    tmp_path: Path, blind: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is given up after its last frame, however often it opens."""
    address = "udp://127.0.0.1:9"
    path = write_film(tmp_path / "film.ts", frame_times(25, 50), DARK, sound=click(0.5, 2), codec="aac")
    opened: list[Path] = []

    def open_live(*_: object) -> av.container.InputContainer:
        opened.append(path if len(opened) in (0, 2) else blind)
        assert len(opened) < 12
        return av.open(str(opened[-1]))

    monkeypatch.setattr("mubic_deploy.live.source.open_live", open_live)
    source = LiveSource(address, patience_s=3.5)
    frames, _, _ = kinds(list(source.items()))
    source.close()
    assert frames == 100
    assert opened[:4] == [path, blind, path, blind]
    assert len(opened) <= 7  # one a second
    assert source.warnings[0] == f"{address} broke off and did not come back within 3.5 s"


def test_a_broadcast_without_a_frame(blind: Path) -> None:
    """Its sound goes on and on; it is given up, and read no further."""
    end = time.monotonic() + 15

    def answer(to: http.server.BaseHTTPRequestHandler) -> None:
        to.send_response(200)
        to.end_headers()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < end:
                to.wfile.write(blind.read_bytes())
                time.sleep(0.1)

    with web(answer) as address:
        with pytest.raises(UserError, match=f"{address}: no frame could be decoded in 2 s: send H.264"):
            LiveSource(address, patience_s=2)
        while "mubic-open" in {thread.name for thread in threading.enumerate()}:
            assert time.monotonic() < end - 5
            time.sleep(0.05)


@pytest.mark.parametrize("part", [0.5, 1.0])
def test_what_breaks_off_says_so(tmp_path: Path, part: float) -> None:
    """An answer that is shorter than it promised; a whole one ends without a word."""
    film = write_film(tmp_path / "film.mkv", frame_times(25, 100), DARK, sound=click(0.5, 4)).read_bytes()

    def answer(to: http.server.BaseHTTPRequestHandler) -> None:
        to.send_response(200)
        to.send_header("Content-Length", str(len(film)))
        to.end_headers()
        with contextlib.suppress(ConnectionError):
            to.wfile.write(film[: round(part * len(film))])

    with web(answer) as address:
        source = LiveSource(address)
        frames, _, _ = kinds(list(source.items()))
        source.close()
    if part == 1:
        assert (frames, source.warnings) == (100, [])
    else:
        assert 40 < frames < 60
        assert source.warnings == [f"{address} broke off (Input/output error)"]


def test_a_pipe_is_read_once(tmp_path: Path) -> None:
    path = write_film(tmp_path / "film.ts", frame_times(25, 40), DARK, sound=click(0.5, 2), codec="aac")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(path.read_bytes()))
    writer.start()
    source = open_source(str(pipe))
    assert isinstance(source, LiveSource)
    frames, pieces, _ = kinds(list(source.items()))
    source.close()
    writer.join()
    assert frames == 40
    assert pieces > 50


FULL_S = Fraction(2**33, 90_000)  # what a transport stream's clock can count


@pytest.mark.parametrize("b_frames", [0, 3])
@pytest.mark.parametrize(
    ("starts", "seam"),
    [((1000, 5), (1006, 5)), ((5, 1000), (11, 1000)), ((FULL_S - 4,), (float(FULL_S), 0))],
    ids=["restarted", "ahead", "full"],
)
def test_a_transport_stream_whose_clock_jumps(
    tmp_path: Path, starts: tuple[Fraction | int, ...], seam: tuple[float, float], b_frames: int
) -> None:
    """An encoder that was restarted goes back to where its clock says; so does one whose clock of 33 bits is full, also
    for frames that were sent before that and are shown after it."""
    parts = []
    for i, start in enumerate(starts):
        times = [start + t for t in frame_times(25, 25 * 6)]
        sound = np.zeros((2, 48_000 * 6), np.float32)
        path = tmp_path / f"{i}.ts"
        options = {"sound_start": Fraction(start), "codec": "aac", "b_frames": b_frames}
        write_film(path, times, DARK, sound=sound, **options)
        parts.append(path.read_bytes())
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(b"".join(parts)))
    writer.start()
    source = open_source(str(pipe))
    items = list(source.items())
    source.close()
    writer.join()
    for kind, length in ((Frame, 0.04), (Heard, 1024 / 48_000)):
        clock = [i.time_s if isinstance(i, Frame) else i.start / 16_000 for i in items if isinstance(i, kind)]
        jumps = [(a, b) for a, b in itertools.pairwise(clock) if abs(b - a) > 1]
        assert len(clock) == pytest.approx(len(starts) * 6 / length, rel=0.05)
        assert len(jumps) == 1
        assert jumps[0] == pytest.approx(seam, abs=0.1)


@pytest.mark.parametrize(
    ("came", "given"),
    [
        ("f9.0 s9.0 s1.0 f9.1 s1.1 f1.0 s1.2 f1.1", "f9.0 s9.0 f9.1 f1.0 s1.0 s1.1 s1.2 f1.1"),
        ("f9.0 s9.0 f1.0 s9.1 f1.1 s1.0 s1.1 f1.2", "f9.0 s9.0 f1.0 f1.1 s1.0 s1.1 f1.2"),
        ("f9.0 s9.0 s1.0 f9.1 s2.0 f9.2 s3.1 f9.3 s3.2", "f9.0 s9.0 f9.1 f9.2 s1.0 s2.0 s3.1 f9.3 s3.2"),
        ("f9.0 s9.0 f1.0 s9.5 f1.1 s11.1 s11.2", "f9.0 s9.0 f1.0 f1.1 s11.1 s11.2"),
        ("f9.0 s9.0 s8.5 f9.1 s9.1", "f9.0 s9.0 s8.5 f9.1 s9.1"),
    ],
    ids=["sound first", "frames first", "only sound", "only frames", "a stray time stamp"],
)
def test_frames_and_sound_go_back_together(came: str, given: str) -> None:
    """f9.0 is a frame at 9.0 s, s9.0 sound from then on."""

    def item(word: str) -> Item:
        time_s = float(word[1:])
        if word[0] == "f":
            return Frame(0, time_s, av.VideoFrame(16, 16))
        return Heard(round(16_000 * time_s), np.zeros(0, np.float32))

    def word(item: Item) -> str:
        assert not isinstance(item, SoundEnd)
        return f"f{item.time_s:.1f}" if isinstance(item, Frame) else f"s{item.start / 16_000:.1f}"

    assert " ".join(map(word, one_seam(map(item, came.split())))) == given


def test_a_file_in_shared_memory_is_a_file() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        path = write_film(Path(folder) / "film.mp4", frame_times(25, 20), DARK)
        source = open_source(str(path))
        assert isinstance(source, FileSource)
        source.close()


def test_what_is_no_source(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        open_source(str(tmp_path / "none.mp4"))
    for name in ("A" * 300, "/dev/" + "A" * 300):
        with pytest.raises(UserError, match=f"{name} (is not a film .*|cannot be opened )\\(File name too long\\)"):
            open_source(name)
    with pytest.raises(UserError, match=r"FFmpeg was built without gone here: pipe it in from an ffmpeg that has it"):
        open_source("gone://127.0.0.1:9/x")
    with pytest.raises(UserError, match="/dev/video99 cannot be opened"):
        open_source("/dev/video99")
    with pytest.raises(UserError, match="--realtime is for files: - comes in its own time"):
        open_source("-", realtime=True)
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9/x cannot be opened"):
        LiveSource("http://127.0.0.1:9/x", timeout_s=2)
