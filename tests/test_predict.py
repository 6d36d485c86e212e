"""`predict_film` from end to end: what is written, what is left after errors, what is refused."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from collections import Counter
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from films import Brightness, frame_times, quadrants, write_film

from mubic_deploy.config import DEMO, FULL
from mubic_deploy.errors import UserError
from mubic_deploy.media.clips import Clip, Clipper
from mubic_deploy.media.film import Film, Resizer
from mubic_deploy.media.overlay import OverlayWriter
from mubic_deploy.predict import _beside, _read, predict_clips, predict_film

BRIGHT_RIGHT = np.zeros((90, 160, 3), np.uint8)
BRIGHT_RIGHT[:, 80:] = 200


@pytest.fixture
def film(tmp_path):
    (tmp_path / "in").mkdir()
    return write_film(tmp_path / "in" / "film.mp4", frame_times(25, 40), BRIGHT_RIGHT)


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def names(folder) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_everything(film, out):
    calls = []
    predictor = Brightness()
    result = predict_film(
        predictor,
        film,
        overlay=out / "o.mp4",
        maps=out / "m.npz",
        contact_sheet=out / "s.png",
        steps=3,
        seed=7,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert names(out) == ["m.npz", "o.mp4", "s.png"]
    assert (result.maps, result.frames, result.steps_used) == (7, 40, {3: 7})
    assert result.seconds > 0
    assert result.warnings == ["film.mp4 has no sound: it is predicted as silent"]
    assert predictor.calls == [(7, 3)] * 7  # the noise stays, so the maps do not flicker
    assert calls == [(i, 40) for i in range(1, 41)]


@pytest.mark.parametrize("fit", ["letterbox", "stretch", "crop"])
def test_maps_lie_over_the_film(film, out, fit):
    """The predictor's map is the frame's brightness: it must come back where the frame is bright."""
    predict_film(Brightness(), film, maps=out / "m.npz", fit=fit)
    with np.load(out / "m.npz") as archive:
        maps, index, times = archive["maps"], archive["frame_index"], archive["time_s"]
    np.testing.assert_array_equal(index, [8, 12, 16, 20, 24, 28, 32])
    np.testing.assert_allclose(times, index / 25)
    assert maps.shape == (7, 90, 160)
    np.testing.assert_allclose(maps[:, 4:-4, 4:77], 0, atol=0.02)
    np.testing.assert_allclose(maps[:, 4:-4, 83:-4], 200 / 255, atol=0.02)


def test_frames_are_fitted_as_the_model_was_trained(film, out):
    predictor = Brightness()
    for fit in ("crop", None):
        predict_film(predictor, film, maps=out / f"{fit}.npz", stride=8, fit=fit)
        predictor.config = replace(predictor.config, fit="crop")
    maps = [np.load(out / f"{fit}.npz")["maps"] for fit in ("crop", None)]
    np.testing.assert_array_equal(*maps)
    predict_film(predictor, film, maps=out / "letterbox.npz", stride=8, fit="letterbox")
    assert (np.load(out / "letterbox.npz")["maps"] != maps[0]).any()


def test_predict_clips_yields_the_same(film, out):
    predict_film(Brightness(), film, maps=out / "m.npz", stride=8)
    warnings: list[str] = []
    items = list(predict_clips(Brightness(), film, stride=8, warnings=warnings))
    assert [i.frame_index for i in items] == [8, 16, 24, 32]
    assert warnings == ["film.mp4 has no sound: it is predicted as silent"]
    np.testing.assert_array_equal(np.stack([i.saliency for i in items]), np.load(out / "m.npz")["maps"])


@pytest.mark.parametrize("batch", [2, 3, 7, 50])
def test_a_batch_changes_nothing_but_the_calls(tmp_path, out, batch):
    """Seven clips of a film that gets brighter: each map stays with its frame, and the overlay is the same to a bit."""
    film = write_film(tmp_path / "film.mp4", frame_times(25, 40), lambda i: np.full((90, 160, 3), 6 * i, np.uint8))
    sizes = []

    class Counting(Brightness):
        def predict(self, video, audio, seed=0, steps=None):
            sizes.append(len(video))
            return super().predict(video, audio, seed, steps)

    alone = predict_film(Brightness(), film, overlay=out / "o.mp4", maps=out / "m.npz", contact_sheet=out / "s.png")
    together = {"overlay": out / "o2.mp4", "maps": out / "m2.npz", "contact_sheet": out / "s2.png"}
    result = predict_film(Counting(), film, **together, batch=batch)
    assert sizes == [batch] * (7 // batch) + [7 % batch] * (7 % batch > 0)
    assert (result.maps, result.frames, result.steps_used) == (alone.maps, alone.frames, alone.steps_used)
    with np.load(out / "m.npz") as a, np.load(out / "m2.npz") as b:
        assert len(np.unique(a["maps"].mean(axis=(1, 2)))) == 7
        for key in a.files:
            np.testing.assert_array_equal(a[key], b[key])
    assert (out / "o.mp4").read_bytes() == (out / "o2.mp4").read_bytes()
    assert (out / "s.png").read_bytes() == (out / "s2.png").read_bytes()


def test_a_short_film(tmp_path, out):
    path = write_film(tmp_path / "short.mp4", frame_times(25, 3), quadrants(48, 80))
    result = predict_film(Brightness(), path, overlay=out / "o.mp4", maps=out / "m.npz", contact_sheet=out / "s.png")
    assert (result.maps, result.frames, len(result.warnings)) == (1, 3, 2)


class Failing(Brightness):
    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def predict(self, *args, **kwargs):
        if len(self.calls) == 3:
            raise self.error
        return super().predict(*args, **kwargs)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("engine"), UserError("server gone")])
def test_nothing_half_written_stays(film, out, error):
    (out / "o.mp4").write_bytes(b"old")
    (out / "m.npz").write_bytes(b"old")
    with pytest.raises(type(error)):
        predict_film(
            Failing(error), film, overlay=out / "o.mp4", maps=out / "m.npz", contact_sheet=out / "s.png", stride=1
        )
    assert names(out) == ["m.npz", "o.mp4"]
    assert (out / "o.mp4").read_bytes() == (out / "m.npz").read_bytes() == b"old"


def test_targets_are_replaced_and_links_kept(film, out, tmp_path):
    (tmp_path / "real.npz").write_bytes(b"old")
    (out / "m.npz").symlink_to(tmp_path / "real.npz")
    predict_film(Brightness(), film, maps=out / "m.npz")
    assert (out / "m.npz").is_symlink()
    assert len(np.load(tmp_path / "real.npz")["maps"]) == 7


class Untouched(Brightness):
    def predict(self, *args, **kwargs):
        raise AssertionError("refused too late")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing to write"),
        ({"contact_sheet": "s.png"}, "nothing to write"),
        ({"overlay": "gone/o.mp4"}, "the folder .*gone does not exist"),
        ({"overlay": "dir.mp4"}, "dir.mp4 is a folder"),
        ({"overlay": "o.webm"}, r"o.webm: the name must end in .mp4 or .m4v or .mov or .mkv"),
        ({"overlay": "o"}, "the name must end in"),
        ({"maps": "m.npy"}, "m.npy: the name must end in .npz"),
        ({"maps": "m.npz", "contact_sheet": "s.pdf"}, "s.pdf: the name must end in .png"),
        ({"overlay": "../in/film.mp4"}, "film.mp4 is the film itself"),
        ({"overlay": "link.mp4"}, "link.mp4 is the film itself"),
        ({"maps": "m.npz", "stride": 0}, "stride 0"),
        ({"maps": "m.npz", "steps": 13}, "steps 13"),
        ({"maps": "m.npz", "seed": -1}, "seed -1"),
        ({"maps": "m.npz", "batch": 0}, "batch 0 is out of range: use 1 or more clips"),
        ({"maps": "m.npz", "batch": 1.5}, "batch 1.5 is no int"),
        ({"maps": "m.npz", "stride": 2.5}, "stride 2.5 is no int: use 1 or more frames"),
        ({"maps": "m.npz", "stride": float("nan")}, "stride nan is no int"),
        ({"maps": "m.npz", "steps": 2.5}, "steps 2.5 is no int"),
        ({"maps": "m.npz", "seed": 0.5}, "seed 0.5 is no int"),
        ({"maps": "m.npz", "fit": "zoom"}, "'zoom'"),
    ],
)
def test_refused_before_the_work(film, out, options, message):
    (out / "dir.mp4").mkdir()
    (out / "link.mp4").symlink_to(film)
    before = film.read_bytes()
    outputs = {k: out / v if isinstance(v, str) and k != "fit" else v for k, v in options.items()}
    with pytest.raises(UserError, match=message) as caught:
        predict_film(Untouched(), film, **outputs)
    assert "\n" not in str(caught.value)
    assert film.read_bytes() == before
    assert names(out) == ["dir.mp4", "link.mp4"]


def test_clips_refuse_settings_when_they_are_asked_for(film):
    with pytest.raises(UserError, match="stride 0 is out of range"):
        predict_clips(Untouched(), film, stride=0)
    maps = predict_clips(Untouched(), film.with_name("gone.mp4"))
    with pytest.raises(UserError, match=r"gone.mp4 does not exist"):
        next(maps)


def test_a_sheet_of_a_model_with_longer_clips(tmp_path, out, monkeypatch):
    """Its maps come 24 frames after their own."""
    film = write_film(tmp_path / "film.mp4", frame_times(25, 60), lambda i: np.full((90, 160, 3), 4 * i, np.uint8))
    predictor = Brightness(replace(DEMO, frames=48))
    drawn = []

    def draw_sheet(path, name, pairs):
        drawn.extend(pairs)
        path.touch()

    monkeypatch.setattr("mubic_deploy.media.sheet.draw_sheet", draw_sheet)
    predict_film(predictor, film, maps=out / "m.npz", contact_sheet=out / "s.png")
    assert [round(25 * time_s) for time_s, _, _ in drawn] == [24, 28, 32, 36]
    for time_s, image, _ in drawn:
        assert abs(image.mean() - 4 * 25 * time_s) < 4


def test_a_folder_that_may_not_be_written(film, out):
    out.chmod(0o500)
    if os.access(out, os.W_OK):
        pytest.skip("root may write anywhere")
    with pytest.raises(UserError, match=r"m\.npz cannot be written \(Permission denied\)"):
        predict_film(Untouched(), film, maps=out / "m.npz")


def test_a_folder_that_cannot_be_written(film):
    """/proc takes no files, not even root's."""
    with pytest.raises(UserError, match=r"cannot be written \(.+\): choose another folder"):
        predict_film(Untouched(), film, maps="/proc/m.npz")


def test_a_disk_that_fills_up(film, out, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mubic_deploy.media.maps.MapsWriter.add_map", full)
    with pytest.raises(UserError, match=r"maps .*m\.npz cannot be written \(No space left on device\)"):
        predict_film(Brightness(), film, maps=out / "m.npz", overlay=out / "o.mp4")
    assert names(out) == []


def test_what_the_container_refuses_is_no_fault_of_the_disk(film, out, monkeypatch):
    def refused(*_):
        raise av.error.ArgumentError(22, "Invalid argument")

    monkeypatch.setattr("mubic_deploy.media.overlay.OverlayWriter.add_map", refused)
    with pytest.raises(UserError, match=r"o\.mov cannot be written \(Invalid argument\): write it as \.mkv"):
        predict_film(Brightness(), film, overlay=out / "o.mov")
    assert names(out) == []


def test_needs_no_torch():
    """A client has neither PyTorch nor picture libraries; matplotlib is loaded only to draw."""
    code = "import sys, mubic_deploy.predict; print(sorted({'torch', 'cv2', 'PIL', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_frames_are_let_go_without_the_garbage_collector(tmp_path):
    """Frames in cycles would wait for it by the hundred; at 720p that is gigabytes."""
    path = write_film(tmp_path / "film.mp4", frame_times(25, 60), np.full((48, 80, 3), 90, np.uint8))
    gc.collect()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        predict_film(Brightness(), path, overlay=tmp_path / "out.mp4", maps=tmp_path / "maps.npz")
        gc.collect()
        frames = [o for o in gc.garbage if isinstance(o, av.VideoFrame)]
        coders = [o for o in gc.garbage if isinstance(o, av.CodecContext | av.container.Container)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
    assert len(frames) <= 2
    assert not coders  # x264 holds some 80 MB of a film of 720p


def test_reading_and_writing_go_on_while_clips_are_predicted(film, out, monkeypatch):
    """The third clip is not predicted before 30 frames were read and 10 written, of 24 and 0 that must have been."""
    enough, threads = threading.Event(), {}
    counts: Counter[str] = Counter()
    resize, add_frame = Resizer.__call__, OverlayWriter.add_frame

    def counted(what):
        counts[what] += 1
        threads[what] = threading.current_thread()
        if counts["read"] >= 30 and counts["written"] >= 10:
            enough.set()

    def read(self, image, size, pixels):
        if pixels == "rgb24":
            counted("read")
        return resize(self, image, size, pixels)

    def written(self, frame):
        counted("written")
        add_frame(self, frame)

    class Waiting(Brightness):
        def predict(self, *args, **kwargs):
            threads["predicted"] = threading.current_thread()
            assert len(self.calls) != 2 or enough.wait(20), counts
            return super().predict(*args, **kwargs)

    monkeypatch.setattr(Resizer, "__call__", read)
    monkeypatch.setattr(OverlayWriter, "add_frame", written)
    said = set()
    predict_film(Waiting(), film, overlay=out / "o.mp4", progress=lambda *_: said.add(threading.current_thread()))
    assert counts == {"read": 40, "written": 40}
    assert said == {threads["predicted"]} == {threading.main_thread()}
    assert len(set(threads.values())) == 3
    assert not [t for t in threading.enumerate() if t.name.startswith("mubic-")]


def test_a_frame_is_resized_before_it_is_handed_on(film):
    """PyAV writes a frame's colours for a moment while it resizes, and another thread may read them."""
    pushed = []

    class Recording(Clipper):
        def push(self, frame):
            pushed.append(frame.index)
            return super().push(frame)

    with Film(film) as opened, closing(Recording(opened, DEMO)) as clipper:
        for item in _read(opened, clipper):
            assert isinstance(item, Clip) or pushed[-1] == item.index
    assert pushed == list(range(40))


def test_clips_have_no_thread(film):
    """Their generator may be left anywhere; the garbage collector would then wait for the thread, in any other."""
    clips = predict_clips(Brightness(), film)
    next(clips)
    assert not [t for t in threading.enumerate() if t.name.startswith("mubic-")]


def test_interrupted_twice(film, out, tmp_path):
    """The second Ctrl-C while the writer is being waited for: its file must not be closed under it."""
    code = f"""
import os, signal, sys, threading, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from films import Brightness
from mubic_deploy.media.overlay import OverlayWriter
from mubic_deploy.predict import predict_film
write, close = OverlayWriter.add_frame, OverlayWriter.close
def slow(self, frame):
    writing.append(1)
    time.sleep(0.5)
    write(self, frame)
    writing.pop()
def closed(self):
    print("closed under the writer" if writing else "closed at rest", flush=True)
    close(self)
writing = []
OverlayWriter.add_frame, OverlayWriter.close = slow, closed
def interrupt():
    while not writing:
        time.sleep(0.01)
    for _ in range(3):
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler)
threading.Thread(target=interrupt, daemon=True).start()
try:
    predict_film(Brightness(), {str(film)!r}, overlay={str(out / "o.mp4")!r})
except KeyboardInterrupt:
    print("interrupted")
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "closed at rest\ninterrupted\n", "")
    assert names(out) == []


@pytest.mark.parametrize(
    ("size", "config", "stride", "batch", "count"),
    [
        ((720, 1280), DEMO, 4, 1, 16),
        ((720, 1280), DEMO, 4, 8, 40),
        ((720, 1280), DEMO, 4, 64, 102),  # of which 20 clips
        ((360, 640), FULL, 1, 64, 59),  # every other a clip, 12 times as large as a frame
        ((4320, 7680), DEMO, 4, 1, 4),
    ],
)
def test_what_waits_is_bounded(size, config, stride, batch, count):
    """A batch's frames and clips, 128 MB of them, or four of the largest."""
    frame_bytes = size[0] * size[1] * 3 // 2  # 4:2:0
    assert _beside(frame_bytes, config, stride, batch) == count
    clip_bytes = 16 * config.height * config.width * 3
    held = count / (stride + 1) * (stride * frame_bytes + clip_bytes)
    assert held <= 128 << 20 or count == 4


def test_the_bytes_of_a_frame(tmp_path):
    options = {"codec_options": {"crf": "0"}}
    with Film(write_film(tmp_path / "film.mp4", frame_times(25, 3), quadrants(48, 80), **options)) as film:
        (first, *_) = film.frames()
        assert film.frame_bytes == sum(plane.buffer_size for plane in first.image.planes) >= 48 * 80 * 3 // 2
