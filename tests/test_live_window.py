"""`mubic-deploy stream --show`, on a screen in memory (Xvfb)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from films import COLOURS, corners, frame_times, quadrants, write_film

from mubic_deploy.live import window
from mubic_deploy.live.window import Window, picture_size
from mubic_deploy.media.film import Frame
from mubic_deploy.media.maps import FilmMap
from mubic_deploy.triton.server import TritonServer

pytest_plugins = ("triton_fixtures",)


@pytest.fixture(scope="module")
def screen() -> Iterator[str]:
    """The name of a screen of 1280 x 1024."""
    pytest.importorskip("tkinter", reason="this Python has no tkinter")
    if shutil.which("Xvfb") is None:
        pytest.skip("Xvfb is not installed")
    reading, writing = os.pipe()
    command = ["Xvfb", "-displayfd", str(writing), "-screen", "0", "1280x1024x24", "-nolisten", "tcp"]
    server = subprocess.Popen(command, pass_fds=[writing], stderr=subprocess.DEVNULL)
    os.close(writing)
    with os.fdopen(reading) as said:
        name = f":{said.readline().strip()}"
    yield name
    server.terminate()
    server.wait()


@pytest.fixture
def shown(screen: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("DISPLAY", screen)
    return screen


def grab(name: str, size: tuple[int, int]) -> np.ndarray:
    """uint8 [h, w, 3]: what stands in the upper left of the screen, where a window goes without a window manager."""
    from PIL import ImageGrab

    height, width = size
    return np.asarray(ImageGrab.grab(bbox=(0, 0, width, height), xdisplay=name).convert("RGB"))


def frame(index: int, picture: np.ndarray, fps: int = 25) -> Frame:
    image = av.VideoFrame.from_ndarray(picture, "rgb24")
    image.pts, image.time_base = index, Fraction(1, fps)
    return Frame(index, index / fps, image)


def film_map(index: int, saliency: np.ndarray, fps: int = 25) -> FilmMap:
    return FilmMap(index, index / fps, saliency.astype(np.float32), 1)


def settle(showing: Window, seconds: float = 0.2) -> None:
    import time

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        showing.refresh()
        time.sleep(0.01)


def test_colours_of_frames_and_of_the_map(shown: str) -> None:
    """Each frame keeps its colours where the map is 0, and is red where it is 1."""
    picture = quadrants(180, 320)
    saliency = np.zeros((36, 64), np.float32)
    saliency[14:22, 26:38] = 1
    with Window() as showing:
        showing.open((180, 320), "film.mp4", lambda: None)
        assert showing.is_open
        showing.add_frame(frame(0, picture))
        showing.add_map(film_map(0, saliency))
        settle(showing)
        height, width = picture_size((180, 320), (1024, 1280))
        assert (height, width) == (540, 960)
        seen = grab(shown, (height, width))
    assert corners(seen) == ["red", "green", "blue", "yellow"]
    for (y, x), name in zip(
        [(30, 30), (30, 930), (510, 30), (510, 930)], ["red", "green", "blue", "yellow"], strict=True
    ):
        np.testing.assert_allclose(seen[y, x], COLOURS[name], atol=6)
    red, green, blue = seen[270, 480]
    assert red > green + 60
    assert red > blue + 60


def test_a_frame_waits_for_its_map_and_its_time(shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(window.time, "monotonic", lambda: now)
    drawn: list[tuple[int, float]] = []
    monkeypatch.setattr(Window, "_draw", lambda self, f, saliency: drawn.append((f.index, float(saliency[0, 0]))))
    picture = quadrants(18, 32)
    with Window() as showing:
        showing.open((18, 32), "film.mp4", lambda: None)
        for i in range(12):
            showing.add_frame(frame(i, picture))
        showing.refresh()
        assert drawn == []
        showing.add_map(film_map(4, np.zeros((9, 16))))
        showing.refresh()
        showing.refresh()
        assert drawn == [(0, 0)]
        now += 0.05
        showing.refresh()
        assert drawn == [(0, 0), (1, 0)]
        now += 0.08  # two frames are due: the newer one is drawn
        showing.refresh()
        assert drawn[2:] == [(3, 0)]
        showing.add_map(film_map(8, np.ones((9, 16))))
        now += 0.12
        showing.refresh()
        assert drawn[3:] == [(6, pytest.approx(0.5))]
        showing.close()
        assert not showing.is_open
        showing.add_frame(frame(20, picture))
        showing.refresh()
    assert len(drawn) == 4


def test_what_comes_faster_than_it_plays_is_skipped(shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(window.time, "monotonic", lambda: now)
    drawn: list[int] = []
    monkeypatch.setattr(Window, "_draw", lambda self, f, saliency: drawn.append(f.index))
    with Window() as showing:
        showing.open((18, 32), "film.mp4", lambda: None)
        for i in [*range(50), *range(1500, 1510)]:
            showing.add_frame(frame(i, quadrants(18, 32)))
            showing.add_map(film_map(i, np.zeros((9, 16))))
            if i in (40, 49):
                showing.refresh()
        assert drawn == [14, 23]  # a second, the 25 frames from the next one on, may wait
        now += 0.01
        showing.refresh()  # a minute without frames is not waited for
        assert drawn[2:] == [1500]


@pytest.mark.parametrize("event", ["<q>", "<Escape>", "close"])
def test_whoever_looks_ends_it(shown: str, event: str) -> None:
    stopped: list[bool] = []
    with Window() as showing:
        showing.open((180, 320), "film.mp4", lambda: stopped.append(True))
        root = showing._root
        assert root is not None
        if event == "close":
            root.tk.call("eval", root.tk.call("wm", "protocol", ".", "WM_DELETE_WINDOW"))
        else:
            root.focus_force()
            root.event_generate(event)
        settle(showing)
        assert not showing.is_open
    assert stopped == [True]


@pytest.mark.parametrize(
    ("display", "size"),
    [((1080, 1920), (540, 960)), ((36, 64), (540, 960)), ((1920, 1080), (720, 404)), ((100, 1), (720, 8))],
)
def test_sizes(display: tuple[int, int], size: tuple[int, int]) -> None:
    assert picture_size(display, (1200, 1600)) == size


def test_a_small_screen() -> None:
    assert picture_size((1080, 1920), (480, 640)) == (288, 512)


# ---- the command


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """132 frames of 25 a second, silent."""
    return write_film(tmp_path_factory.mktemp("films") / "film.mp4", frame_times(25, 132), quadrants(180, 320))


def test_q_ends_a_stream_with_complete_files(
    run, shown: str, film: Path, toy_server: TritonServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[np.ndarray] = []
    draw = Window._draw

    def counted(self: Window, f: Frame, saliency: np.ndarray) -> None:
        draw(self, f, saliency)
        assert self._root is not None
        self._root.update()
        drawn.append(grab(shown, (540, 960)))
        if len(drawn) == 10:
            self._root.focus_force()
            self._root.event_generate("<q>", when="tail")  # as a key that is pressed meanwhile

    monkeypatch.setattr(Window, "_draw", counted)
    files = ("-o", tmp_path / "o.mp4", "--maps", tmp_path / "m.npz")
    ran = run("stream", film, "--url", toy_server.url, "--realtime", "--show", "--json", *files)
    assert ran.code == 0, ran.err
    report = json.loads(ran.out)
    assert len(drawn) == 10
    assert 16 <= report["frames"] < 132
    assert len(np.load(tmp_path / "m.npz")["maps"]) == report["maps"] >= 2
    with av.open(tmp_path / "o.mp4") as overlay:
        assert len(list(overlay.decode(video=0))) == report["frames"]
    assert all(np.ptp(seen.astype(int), axis=(0, 1)).min() > 100 for seen in drawn)


def test_a_film_is_shown_to_its_end(
    run, shown: str, film: Path, toy_server: TritonServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    monkeypatch.setattr(Window, "_draw", lambda self, f, saliency: drawn.append(f.index))
    ran = run("stream", film, "--url", toy_server.url, "--show", "--stride", 16, "--steps", 1)
    assert ran.code == 0, ran.err
    assert drawn[-1] == 131
    assert drawn == sorted(drawn)


def test_without_a_screen(run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Said before anything is opened: there is no such film, and no such server."""
    pytest.importorskip("tkinter", reason="this Python has no tkinter")
    monkeypatch.delenv("DISPLAY", raising=False)
    arguments = ("stream", tmp_path / "none.mp4", "--url", "127.0.0.1:9", "--show", "-o", tmp_path / "o.mp4")
    ran = run(*arguments)
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert "--show needs a screen (no display name and no $DISPLAY environment variable): set DISPLAY" in ran.err
    monkeypatch.setitem(sys.modules, "tkinter", None)
    ran = run(*arguments)
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert "--show needs tkinter" in ran.err
    assert list(tmp_path.iterdir()) == []
