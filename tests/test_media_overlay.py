"""The overlay film, the maps file and the contact sheet."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from films import Brightness, bunny, check_flash_and_click, corners, flash_and_click, frame_times, quadrants, write_film

from mubic_deploy.errors import UserError
from mubic_deploy.media import heat
from mubic_deploy.media.film import Film, Frame
from mubic_deploy.media.maps import FilmMap, MapsWriter
from mubic_deploy.media.overlay import HeatBlend, Matcher, OverlayWriter
from mubic_deploy.media.sheet import ContactSheet
from mubic_deploy.media.track import SoundTrack
from mubic_deploy.predict import predict_film

GREY = np.full((48, 80, 3), 128, np.uint8)


def times(path) -> list[Fraction]:
    with av.open(path) as container:
        return [frame.pts * frame.time_base for frame in container.decode(video=0)]


def sound(path) -> list[tuple[Fraction, bytes]]:
    with av.open(path) as container:
        return [(p.pts * p.time_base, bytes(p)) for p in container.demux(audio=0) if p.dts is not None]


def irregular(count: int) -> list[Fraction]:
    steps = np.random.default_rng(5).integers(1, 9000, count)
    return [Fraction(int(n), 90_000) for n in np.cumsum(steps)]


@pytest.mark.parametrize("when", [frame_times(25, 40), frame_times(Fraction(30_000, 1001), 40), irregular(40)])
@pytest.mark.parametrize("suffix", [".mp4", ".mov"])
def test_time_stamps_are_kept_exactly(tmp_path, when, suffix):
    path = write_film(tmp_path / "film.mp4", when, GREY)
    predict_film(Brightness(), path, overlay=tmp_path / f"out{suffix}")
    assert times(tmp_path / f"out{suffix}") == times(path)
    assert len(times(path)) == 40


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_the_last_frame_is_held_as_long_as_in_the_film(tmp_path, suffix):
    path = write_film(tmp_path / "film.mp4", frame_times(25, 20), quadrants(48, 80))
    held = tmp_path / "held.mp4"
    with av.open(path) as source, av.open(held, "w") as output:
        stream = output.add_stream_from_template(source.streams.video[0])
        packets = [p for p in source.demux(video=0) if p.dts is not None]
        packets[-1].duration = round(5 / packets[-1].time_base)
        for packet in packets:
            packet.stream = stream
            output.mux(packet)
    lasts = []
    predict_film(Brightness(), held, overlay=tmp_path / f"overlay{suffix}")
    for film in (held, tmp_path / f"overlay{suffix}"):
        with av.open(film) as container:
            assert container.duration is not None
            lasts.append(container.duration / av.time_base)
    assert lasts[0] == pytest.approx(5.76, abs=0.01)
    assert lasts[1] == pytest.approx(lasts[0], abs=0.01)


def test_time_stamps_and_sound_of_the_real_clip(tmp_path):
    result = predict_film(Brightness(), bunny(), overlay=tmp_path / "out.mp4")
    assert (result.frames, result.maps, result.warnings) == (132, 30, [])
    assert times(tmp_path / "out.mp4") == times(bunny())
    assert sound(tmp_path / "out.mp4") == sound(bunny())


def test_matroska_is_within_its_rounding(tmp_path):
    path = write_film(tmp_path / "film.mp4", irregular(40), GREY)
    predict_film(Brightness(), path, overlay=tmp_path / "out.mkv")
    np.testing.assert_allclose(
        [float(t) for t in times(tmp_path / "out.mkv")], [float(t) for t in times(path)], atol=0.00051
    )


@pytest.mark.parametrize(
    ("source", "codec", "target", "copied"),
    [
        ("film.mov", "pcm_s16le", "out.mkv", True),
        ("film.ts", "aac", "out.mp4", True),  # ADTS becomes raw AAC
        ("film.mkv", "aac", "out.mov", True),
        ("film.mkv", "pcm_s16le", "out.mp4", True),  # unnamed channels, which MP4 wants named
        ("film.mkv", "wavpack", "out.mp4", False),
        ("film.mkv", "flac", "out.mp4", True),
        ("film.mkv", "flac", "out.mov", False),
        ("film.mkv", "libopus", "out.mov", False),
    ],
)
def test_sound_is_copied_or_encoded(tmp_path, source, codec, target, copied):
    tone = np.repeat((0.5 * np.sin(np.arange(96_000) * 0.06)).astype(np.float32)[None], 2, 0)
    path = write_film(tmp_path / source, frame_times(25, 50), GREY, sound=tone, codec=codec)
    predict_film(Brightness(), path, overlay=tmp_path / target)
    with av.open(tmp_path / target) as container:
        stream = container.streams.audio[0]
        assert stream.codec_context.name == (codec if copied else "aac")
        heard = np.concatenate([f.to_ndarray().reshape(-1) for f in container.decode(audio=0)])
    assert len(heard) / 2 / 48_000 == pytest.approx(2, abs=0.1)
    if copied and source != "film.ts":
        assert [data for _, data in sound(tmp_path / target)] == [data for _, data in sound(path)]


def test_unnamed_channels_are_encoded_as_mono(tmp_path):
    tone = np.repeat((0.5 * np.sin(np.arange(96_000) * 0.06)).astype(np.float32)[None], 7, 0)
    path = write_film(tmp_path / "film.mkv", frame_times(25, 50), GREY, sound=tone, layout="7 channels")
    predict_film(Brightness(), path, overlay=tmp_path / "out.mp4")
    with av.open(tmp_path / "out.mp4") as container:
        heard = np.concatenate([f.to_ndarray() for f in container.decode(audio=0)], axis=1)
    assert heard.shape[0] == 1
    assert np.abs(heard[0, 24_000:72_000]).max() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("size", [(48, 80), (49, 80), (48, 81), (49, 81), (33, 1001)])
def test_size_is_the_display_size(tmp_path, size):
    path = write_film(tmp_path / "film.mp4", frame_times(25, 20), np.full((*size, 3), 128, np.uint8))
    predict_film(Brightness(), path, overlay=tmp_path / "out.mp4")
    with av.open(tmp_path / "out.mp4") as container:
        frame = next(container.decode(video=0))
        assert (frame.height, frame.width) == size


def test_rotated_and_anamorphic_films_come_out_upright_and_square(tmp_path):
    path = write_film(tmp_path / "film.mp4", frame_times(25, 20), quadrants(48, 80) // 2, rotation=90, sar=Fraction(2))
    predict_film(Brightness(), path, overlay=tmp_path / "out.mp4", maps=tmp_path / "maps.npz")
    with av.open(tmp_path / "out.mp4") as container:
        frame = next(container.decode(video=0))
        assert (frame.height, frame.width, frame.rotation) == (160, 48, 0)
        assert container.streams.video[0].sample_aspect_ratio in (None, 1)
        image = frame.to_ndarray(format="rgb24")
    assert corners(np.minimum(image.astype(int) * 2, 255)) == ["green", "yellow", "red", "blue"]
    assert np.load(tmp_path / "maps.npz")["maps"].shape == (2, 160, 48)


@pytest.mark.parametrize(
    ("stored", "sar", "rotation", "size", "pixels"),
    [
        ((480, 720), Fraction(32, 27), 0, (480, 854), "yuv420p"),  # NTSC, 853.3 wide
        ((480, 720), Fraction(32, 27), 90, (854, 480), "yuv420p"),
        ((48, 81), Fraction(1), 0, (48, 81), "yuv444p"),
        ((49, 80), Fraction(4, 3), 0, (49, 108), "yuv444p"),  # its height is its own
    ],
)
def test_pixels_that_are_not_square_make_no_odd_overlay(tmp_path, stored, sar, rotation, size, pixels):
    picture = np.full((*stored, 3), 128, np.uint8)
    path = write_film(tmp_path / "film.mkv", frame_times(25, 17), picture, sar=sar, rotation=rotation)
    predict_film(Brightness(), path, overlay=tmp_path / "out.mp4")
    with av.open(tmp_path / "out.mp4") as container:
        frame = next(container.decode(video=0))
    assert (frame.height, frame.width, frame.format.name) == (*size, pixels)


def test_blend_against_floats():
    """Integer blending in YUV is the float blend of the same colours within two levels, and exact where it is clear."""
    rng = np.random.default_rng(0)
    image = av.VideoFrame.from_ndarray(rng.integers(0, 256, (54, 96), np.uint8), "gray8")
    image = image.reformat(format="yuv444p", src_color_range=1, dst_color_range=1)
    saliency = np.zeros((54, 96), np.float32)
    saliency[:, 40:] = np.linspace(0, 1, 56, dtype=np.float32)
    below = image.to_ndarray().astype(float).copy()
    out = HeatBlend("yuv444p")(image, saliency).to_ndarray()
    rgb, alpha = heat.table()
    r, g, b = rgb[heat.levels(saliency)].transpose(2, 0, 1) / 255
    y = 0.299 * r + 0.587 * g + 0.114 * b
    yuv = np.stack([16 + 219 * y, 128 + 224 * (b - y) / 1.772, 128 + 224 * (r - y) / 1.402])
    cover = alpha[heat.levels(saliency)]
    np.testing.assert_allclose(out, below * (1 - cover) + yuv * cover, atol=2)
    np.testing.assert_array_equal(out[:, :, :40], below[:, :, :40])


@pytest.mark.parametrize("pixels", ["yuv420p", "yuv444p"])
def test_blend_never_wraps_around(pixels):
    """Superwhite under every alpha, and grown maps with their rounding: no bright pixel turns dark."""
    image = av.VideoFrame(1280, 720, pixels)
    for plane in image.planes:
        plane.update(bytes([255]) * plane.buffer_size)
    saliency = np.random.default_rng(0).random((216, 384)).astype(np.float32) ** 4
    saliency[:100] = np.linspace(0.08, 0.3, 384)
    for plane in HeatBlend(pixels)(image, saliency).planes:
        values = np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)[: plane.height, : plane.width]
        assert values.min() > 70  # 255 * 0.35 is 89


def test_rgb_films_get_yuv_tags(tmp_path):
    """A matrix tag of RGB on a YUV film makes players show false colours."""
    with av.open(tmp_path / "film.mov", "w") as output:
        stream = output.add_stream("png", rate=25)
        stream.width, stream.height, stream.pix_fmt = 80, 48, "rgb24"
        for i in range(20):
            image = av.VideoFrame.from_ndarray(quadrants(48, 80) // 2, "rgb24")
            image.pts, image.time_base = i, Fraction(1, 25)
            output.mux(stream.encode(image))
        output.mux(stream.encode(None))
    predict_film(Brightness(), tmp_path / "film.mov", overlay=tmp_path / "out.mp4")
    with av.open(tmp_path / "out.mp4") as container:
        frame = next(container.decode(video=0))
    assert (frame.format.name, frame.colorspace, frame.color_range) == ("yuv420p", 1, 1)
    np.testing.assert_allclose(frame.to_ndarray(format="rgb24")[12, 20].astype(int), (110, 10, 10), atol=5)


def test_low_saliency_is_transparent():
    _, alpha = heat.table()
    assert (alpha[:26] == 0).all()  # up to 0.1
    assert (np.diff(alpha) >= 0).all()
    assert alpha[-1] == pytest.approx(0.65)


class Recorder(OverlayWriter):
    def _write(self, frame, saliency):
        self.written = [*getattr(self, "written", []), (frame.index, float(saliency.mean()))]
        super()._write(frame, saliency)


def test_maps_are_interpolated_in_time_and_held_at_the_ends(tmp_path):
    """Frames at 0, 1, 3, 4, 5 (x 0.1 s); maps 0.2 at frame 1 and 0.8 at frame 3."""
    when = [Fraction(n, 10) for n in (0, 1, 3, 4, 5)]
    path = write_film(tmp_path / "film.mp4", when, GREY)
    with Film(path) as film:
        writer = Recorder(tmp_path / "out.mp4", film)
        for frame in film.frames():
            writer.add_frame(frame)
        for index, value in ((1, 0.2), (3, 0.8)):
            writer.add_map(FilmMap(index, float(when[index]), np.full(film.map_shape, value, np.float32), 4))
        writer.finish()
    assert [i for i, _ in writer.written] == [0, 1, 2, 3, 4]
    # frame 2 lies 0.2 of 0.3 s after frame 1
    np.testing.assert_allclose([v for _, v in writer.written], [0.2, 0.2, 0.6, 0.8, 0.8], atol=1e-5)


def test_the_heat_follows_the_map_in_space(tmp_path):
    """A map that is high in the lower right reddens the frame there and leaves the rest as it is."""
    path = write_film(tmp_path / "film.mp4", frame_times(25, 20), np.full((96, 160, 3), 90, np.uint8))
    saliency = np.zeros((96, 160), np.float32)
    saliency[60:, 100:] = 1
    with Film(path) as film:
        writer = OverlayWriter(tmp_path / "out.mp4", film)
        for frame in film.frames():
            writer.add_frame(frame)
        writer.add_map(FilmMap(8, 0.32, saliency, 4))
        writer.finish()
    with av.open(tmp_path / "out.mp4") as container:
        image = next(container.decode(video=0)).to_ndarray(format="rgb24").astype(int)
    np.testing.assert_allclose(image[:50].reshape(-1, 3).mean(0), 90, atol=4)
    np.testing.assert_allclose(image[:, :90].reshape(-1, 3).mean(0), 90, atol=4)
    red, green, blue = image[70:90, 110:150].reshape(-1, 3).mean(0)
    assert red > 120
    assert green < 70
    assert blue < 60


def test_frames_wait_only_for_the_next_map(tmp_path, monkeypatch):
    waiting: list[int] = []
    original = OverlayWriter.add_frame

    def add_frame(self: OverlayWriter, frame: Frame) -> None:
        original(self, frame)
        waiting.append(self._matcher.waiting)

    monkeypatch.setattr(OverlayWriter, "add_frame", add_frame)
    path = write_film(tmp_path / "film.mp4", frame_times(25, 300), GREY)
    predict_film(Brightness(), path, overlay=tmp_path / "out.mp4", stride=4)
    assert max(waiting) <= 16
    assert len(waiting) == 300


def test_frames_of_a_live_stream_do_not_wait_for_a_first_map(tmp_path):
    """A camera goes on while the server is away; a film waits for its own maps."""
    live, film, shown = Matcher(live=True), Matcher(), []
    for i in range(100):
        image = av.VideoFrame(16, 16, "yuv420p")
        shown += [(frame.index, saliency.max()) for frame, saliency in live.add_frame(Frame(i, i / 25, image))]
        assert not list(film.add_frame(Frame(i, i / 25, image)))
    assert (live.waiting, film.waiting) == (64, 100)
    assert shown == [(i, 0) for i in range(36)]
    bright = FilmMap(50, 2.0, np.ones((4, 4), np.float32), 4)
    found = [(frame.index, saliency.max()) for frame, saliency in live.add_map(bright)]
    assert found == [(i, 1) for i in range(36, 51)]


def test_few_large_frames_wait():
    """A second of 4K, in 300 MB, and two and a half of 1080p."""
    for size, most in (((3840, 2160), 24), ((1920, 1080), 64), ((64, 48), 64)):
        live = Matcher(live=True)
        image = av.VideoFrame(*size, "yuv420p")
        for i in range(70):
            list(live.add_frame(Frame(i, i / 25, image)))
        assert live.waiting == most


def test_a_large_stride_holds_the_map_and_then_moves_to_the_next(tmp_path, monkeypatch):
    """Maps at frames 8 and 108, 64 frames wait: frame 30 stands still, frame 100 is on its way."""
    monkeypatch.setattr(OverlayWriter, "_write", lambda self, frame, saliency: shown.append(saliency[0, 0]))
    shown: list[float] = []
    path = write_film(tmp_path / "film.mp4", frame_times(25, 120), GREY)
    dark, bright = np.zeros((48, 80), np.float32), np.ones((48, 80), np.float32)
    with Film(path) as film:
        writer = OverlayWriter(tmp_path / "out.mp4", film)
        for frame in film.frames():
            writer.add_frame(frame)
            assert writer._matcher.waiting <= 64
            if frame.index in (15, 115):
                writer.add_map(
                    FilmMap(frame.index - 7, (frame.index - 7) / 25, dark if frame.index == 15 else bright, 4)
                )
        writer.finish()
        writer.close()
    assert len(shown) == 120
    assert shown[:52] == [0] * 52
    # 115 is there, so 52 .. 115 waited; from the last one written, 51, to the map's own frame, 108
    np.testing.assert_allclose(shown[52:109], np.arange(1, 58) / 57, atol=1e-5)
    assert shown[109:] == [1] * 11


def test_maps_file(tmp_path):
    writer = MapsWriter(tmp_path / "maps.npz", (6, 10))
    maps = np.random.default_rng(0).random((5, 6, 10), np.float32)
    for i, saliency in enumerate(maps):
        writer.add_map(FilmMap(8 + 4 * i, 0.32 + 0.16 * i, saliency, 4))
    writer.finish()
    writer.close()
    with np.load(tmp_path / "maps.npz") as archive:
        assert sorted(archive) == ["frame_index", "maps", "time_s"]
        np.testing.assert_array_equal(archive["maps"], maps)
        assert archive["maps"].dtype == np.float32
        np.testing.assert_array_equal(archive["frame_index"], [8, 12, 16, 20, 24])
        assert archive["frame_index"].dtype == np.int64
        np.testing.assert_allclose(archive["time_s"], 0.32 + 0.16 * np.arange(5))
        assert archive["time_s"].dtype == np.float64
    assert [p.name for p in tmp_path.iterdir()] == ["maps.npz"]


@pytest.mark.parametrize(("count", "kept"), [(1, [0]), (8, list(range(8))), (100, None)])
def test_contact_sheet_spreads_over_the_film(tmp_path, monkeypatch, count, kept):
    drawn = []
    monkeypatch.setattr("mubic_deploy.media.sheet.draw_sheet", lambda path, name, pairs: drawn.extend(pairs))
    sheet = ContactSheet(tmp_path / "sheet.png", "film", 16)
    for i in range(count):
        sheet.add_frame(Frame(i, i / 25, av.VideoFrame(80, 48, "yuv420p")))
        sheet.add_map(FilmMap(i, i / 25, np.zeros((48, 80), np.float32), 4))
        assert len(sheet._kept) < 16
        assert len(sheet._waiting) <= 1
    sheet.finish()
    chosen = [round(time_s * 25) for time_s, _, _ in drawn]
    if kept is None:
        assert len(chosen) == 8
        assert chosen[0] == 0
        assert chosen[-1] >= 88
        assert max(np.diff(chosen)) <= 2 * min(np.diff(chosen))
    else:
        assert chosen == kept


def test_contact_sheet_picture(tmp_path):
    path = write_film(tmp_path / "film.mp4", frame_times(25, 60), quadrants(90, 160))
    predict_film(Brightness(), path, maps=tmp_path / "m.npz", contact_sheet=tmp_path / "sheet.png")
    with av.open(tmp_path / "sheet.png") as container:
        image = next(container.decode(video=0)).to_ndarray(format="rgb24")
    assert image.shape[1] > 1200
    assert 0.4 < image.shape[0] / image.shape[1] < 0.9
    red = (np.abs(image.astype(int) - (220, 20, 20)).sum(-1) < 30).mean()
    assert red > 0.08  # half of the pictures are plain frames, a quarter of each is red


def test_contact_sheet_of_a_name_with_dollars(tmp_path):
    """matplotlib would read the name as a formula, and this one as a broken one."""
    path = write_film(tmp_path / "a$b_$c.mkv", frame_times(25, 20), GREY)
    predict_film(Brightness(), path, maps=tmp_path / "m.npz", contact_sheet=tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("source", "codec", "target", "within"),
    [
        ("film.mov", "pcm_s16le", "out.mov", 16),
        ("film.mkv", "wavpack", "out.mp4", 160),  # encoded again as AAC
        ("film.ts", "aac", "out.mp4", 160),  # a clock that does not start at 0
        ("film.mp4", "aac", "out.mkv", 160),
    ],
)
@pytest.mark.parametrize("late", [Fraction(0), Fraction(1, 2)])
def test_picture_and_sound_stay_together(tmp_path, source, codec, target, within, late):
    path = flash_and_click(tmp_path / source, frame_times(25, 80), 41, codec=codec, sound_start=late)
    predict_film(Brightness(), path, overlay=tmp_path / target)
    check_flash_and_click(tmp_path / target, within)


def test_a_truncated_film_leaves_nothing(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (100, 48, 80, 3), np.uint8)
    tone = np.repeat((0.5 * np.sin(np.arange(192_000) * 0.06)).astype(np.float32)[None], 2, 0)
    path = write_film(tmp_path / "film.mkv", frame_times(25, 100), lambda i: noise[i], sound=tone, codec="aac")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * 0.6)])
    with pytest.raises(UserError, match=r"film\.mkv is cut off"):
        predict_film(Brightness(), path, overlay=tmp_path / "out.mp4", maps=tmp_path / "maps.npz")
    assert [p.name for p in tmp_path.iterdir()] == ["film.mkv"]


def test_a_track_goes_from_stereo_to_mono(tmp_path: Path) -> None:
    """As broadcasts do; M4V takes no MP2, so it is encoded."""
    source, second = tmp_path / "film.ts", 48_000
    with av.open(source, "w") as output:
        track = output.add_stream("mp2", second)
        track.layout = "stereo"
        mono = av.AudioCodecContext.create("mp2", "w")
        mono.sample_rate, mono.layout, mono.format, mono.time_base = second, "mono", "s16", Fraction(1, second)
        encoders: list[Any] = [track, mono]
        for number, encoder in enumerate(encoders):
            layout, channels = (("stereo", 2), ("mono", 1))[number]
            tone = 0.3 * np.sin(2 * np.pi * 440 / second * np.arange(second, dtype=np.float32))
            samples = np.rint(32_767 * np.repeat(tone, channels))[None].astype(np.int16)
            frame = av.AudioFrame.from_ndarray(samples, "s16", layout)
            frame.sample_rate, frame.time_base, frame.pts = second, Fraction(1, second), number * second
            for packet in (*encoder.encode(frame), *encoder.encode(None)):
                packet.stream = track
                output.mux(packet)
    with av.open(tmp_path / "overlay.m4v", "w") as output:
        sound = SoundTrack(str(source), output)
        assert not sound.copied
        sound.mux_until(None)
        sound.close()
    with av.open(tmp_path / "overlay.m4v") as overlay:
        heard = np.concatenate([f.to_ndarray()[0] for f in overlay.decode(audio=0)])
    assert len(heard) / second == pytest.approx(2, abs=0.1)
    for part in (heard[second // 4 : second * 3 // 4], heard[second * 5 // 4 : second * 7 // 4]):
        assert part.std() > 0.1  # both are there
