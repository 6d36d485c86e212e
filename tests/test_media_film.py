"""Frames and clips: orientation, geometry, time stamps, short and damaged films, bad input."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from films import COLOURS, Brightness, bunny, click, corners, frame_times, quadrants, write_film

from mubic_deploy.config import DEMO, FULL
from mubic_deploy.errors import UserError
from mubic_deploy.live.source import FileSource
from mubic_deploy.media.clips import read_clips
from mubic_deploy.media.film import Film, Resizer, lacks_its_index
from mubic_deploy.media.fit import BAR
from mubic_deploy.media.sound import Sound
from mubic_deploy.media.source import sound_of
from mubic_deploy.media.track import SoundTrack
from mubic_deploy.predict import predict_film

TIMES = frame_times(25, 20)
UPRIGHT = [["red", "green"], ["blue", "yellow"]]


def first_frame(path: Path) -> np.ndarray:
    with Film(path) as film:
        frame = next(film.frames())
        return Resizer()(frame.image, film.display, "rgb24").to_ndarray()


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_rotated_films_are_upright(tmp_path, rotation, suffix):
    """np.rot90 turns counter-clockwise, as the metadata says here."""
    path = write_film(tmp_path / f"film{suffix}", TIMES, quadrants(48, 80), rotation=rotation)
    with av.open(path) as container:  # stored as it was drawn
        assert corners(next(container.decode(video=0)).to_ndarray(format="rgb24")) == [*UPRIGHT[0], *UPRIGHT[1]]
    image = first_frame(path)
    assert image.shape == ((48, 80, 3) if rotation == 180 else (80, 48, 3))
    assert corners(image) == np.rot90(UPRIGHT, rotation // 90).ravel().tolist()


@pytest.mark.parametrize("rotation", [0, 90])
def test_mirrored_films_are_upright(tmp_path, rotation):
    path = write_film(tmp_path / "film.mp4", TIMES, quadrants(48, 80), rotation=rotation, hflip=True)
    assert corners(first_frame(path)) == np.fliplr(np.rot90(UPRIGHT, rotation // 90)).ravel().tolist()


def bars_in(path: Path, pixels: str, codec: str, spread: int, rotation: int) -> Path:
    """A film of the quadrants in BT.709, video range (1) or full range (2), with tags that say so."""
    with av.open(path, "w") as output:
        stream: Any = output.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 80, 48, pixels
        stream.codec_context.colorspace, stream.codec_context.color_range = 1, spread
        stream.set_display_rotation(rotation)
        for _ in range(3):
            image = av.VideoFrame.from_ndarray(quadrants(48, 80), "rgb24")
            output.mux(stream.encode(image.reformat(format=pixels, dst_colorspace=1, dst_color_range=spread)))
        output.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("rotation", [90, 180])
@pytest.mark.parametrize(
    ("pixels", "codec", "spread"),
    [
        ("yuv422p10le", "prores_ks", 1),
        ("yuv422p", "libx264", 2),
        ("yuv420p", "libx264", 1),
        ("yuv420p10le", "libx264", 2),
    ],
)
def test_rotated_films_keep_their_colours(tmp_path: Path, pixels: str, codec: str, spread: int, rotation: int) -> None:
    path = bars_in(tmp_path / "film.mov", pixels, codec, spread, rotation)
    with Film(path) as film:
        frames = [frame.image for frame in film.frames()]
    image = Resizer()(frames[0], (frames[0].height, frames[0].width), "rgb24").to_ndarray().astype(int)
    h, w = image.shape[:2]
    centres = [image[y, x] for y in (h // 4, 3 * h // 4) for x in (w // 4, 3 * w // 4)]
    expected = [COLOURS[name] for name in np.rot90(UPRIGHT, rotation // 90).ravel().tolist()]
    np.testing.assert_allclose(centres, expected, atol=6)  # numbers and tags belong together
    assert [(i.colorspace, i.time) for i in frames] == [(1, 0), (1, 0.04), (1, 0.08)]


def test_a_phone_held_upright(tmp_path):
    """QuickTime's own bytes: {0, 1, 0 / -1, 0, 0} turns clockwise, whatever the library that wrote the film thinks."""
    path = write_film(tmp_path / "film.mp4", TIMES, quadrants(48, 80))
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40  # the matrix of a version 0 track header
    assert data[at : at + 4] == b"\0\1\0\0"
    data[at : at + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 48 << 16, 0, 1 << 30)
    path.write_bytes(data)
    assert corners(first_frame(path)) == np.rot90(UPRIGHT, -1).ravel().tolist() == ["blue", "red", "yellow", "green"]


def test_clips_of_a_rotated_film(tmp_path):
    path = write_film(tmp_path / "film.mp4", TIMES, quadrants(64, 112), rotation=90)
    with Film(path) as film:
        clip = next(read_clips(film, DEMO))
    # 112 high, 64 wide, and bars of 64 on both sides
    picture = clip.video[8]
    assert (picture[:, :62] == BAR).all()
    assert (picture[:, 130:] == BAR).all()
    assert corners(picture[:, 64:128]) == np.rot90(UPRIGHT).ravel().tolist()


@pytest.mark.parametrize(
    ("sar", "rotation", "display"),
    [(Fraction(2), 0, (48, 160)), (Fraction(4, 3), 0, (48, 107)), (Fraction(1, 2), 0, (48, 40)), (2, 90, (160, 48))],
)
def test_non_square_pixels(tmp_path, sar, rotation, display):
    path = write_film(tmp_path / "film.mp4", TIMES, quadrants(48, 80), sar=Fraction(sar), rotation=rotation)
    with Film(path) as film:
        assert film.display == display


def test_frames_keep_their_own_times(tmp_path):
    ticks = [0, 3003, 6006, 7000, 12_345, 20_000, 20_001, 50_000]
    path = write_film(tmp_path / "film.mp4", [Fraction(t, 90_000) for t in ticks], quadrants(48, 80))
    with Film(path) as film:
        frames = list(film.frames())
    assert [(f.image.pts or 0) * film.time_base for f in frames] == [Fraction(t, 90_000) for t in ticks]
    assert [f.time_s for f in frames] == [t / 90_000 for t in ticks]
    assert [f.index for f in frames] == list(range(8))


@pytest.mark.parametrize(("stride", "first_frames"), [(1, 25), (4, 7), (15, 2), (16, 2), (20, 2), (30, 1)])
def test_windows(tmp_path, stride, first_frames):
    """Window k shows frames k * stride .. k * stride + 15: brightness counts the frames."""
    path = write_film(
        tmp_path / "film.mp4", frame_times(25, 40), lambda i: np.full((112, 192, 3), 16 + 5 * i, np.uint8)
    )
    with Film(path) as film:
        clips = list(read_clips(film, DEMO, stride=stride))
    assert len(clips) == first_frames
    for k, clip in enumerate(clips):
        assert clip.frame_index == k * stride + 8
        assert clip.time_s == pytest.approx((k * stride + 8) / 25)
        level = clip.video[:, 56, 96, 1].astype(int)
        np.testing.assert_allclose(level, 16 + 5 * (k * stride + np.arange(16)), atol=2)


def test_colours_of_the_model_input(tmp_path):
    path = write_film(tmp_path / "film.mp4", TIMES, quadrants(112, 192))
    with Film(path) as film:
        picture = next(read_clips(film, DEMO)).video[8]
    for (y, x), name in zip([(28, 48), (28, 144), (84, 48), (84, 144)], COLOURS, strict=True):
        np.testing.assert_allclose(picture[y, x].astype(int), COLOURS[name], atol=5)


@pytest.mark.parametrize(("count", "middle"), [(1, 0), (5, 4), (8, 7), (9, 8), (15, 8)])
def test_short_films_repeat_the_last_frame(tmp_path, count, middle):
    path = write_film(tmp_path / "short.mp4", frame_times(25, count), lambda i: np.full((48, 80, 3), 40 + 10 * i, "u1"))
    with Film(path) as film:
        (clip,) = read_clips(film, DEMO, fit="stretch")
    assert film.warnings == [
        "short.mp4 has no sound: it is predicted as silent",
        f"short.mp4 has only {count} frame(s): the last one is repeated to make 16",
    ]
    assert clip.frame_index == middle
    assert clip.time_s == pytest.approx(middle / 25)
    level = clip.video[:, 50, 50, 1].astype(int)
    np.testing.assert_allclose(level, 40 + 10 * np.minimum(np.arange(16), count - 1), atol=2)
    assert not clip.audio.any()


def test_sound_that_ends_early_is_said(tmp_path):
    sound = np.full((1, 48_000), 0.5, np.float32)
    path = write_film(tmp_path / "early.mov", frame_times(25, 60), quadrants(48, 80), sound=sound)
    with Film(path) as film:
        clips = list(read_clips(film, DEMO))
    assert np.abs(clips[0].audio).max() > 0.4
    assert np.abs(clips[-1].audio).max() == 0
    assert film.warnings == ["the sound of early.mov ends at 1.00 s of 2.36 s: silence is used after"]


def test_a_whole_film_has_no_warnings(tmp_path):
    for suffix in (".mp4", ".mkv", ".ts"):
        sound = np.zeros((1, 48_000 * 2), np.float32)
        path = write_film(tmp_path / f"film{suffix}", frame_times(25, 50), quadrants(48, 80), sound=sound, codec="aac")
        with Film(path) as film:
            assert len(list(read_clips(film, DEMO))) == 9
            assert film.warnings == []


def test_a_badly_interleaved_film(tmp_path):
    """All sound after all pictures: read the same as well interleaved."""
    sound = np.sin(np.arange(48_000 * 4) * 0.05).astype(np.float32)[None]
    audio = []
    for interleave in (True, False):
        path = write_film(
            tmp_path / f"{interleave}.mkv", frame_times(25, 100), quadrants(48, 80), sound=sound, interleave=interleave
        )
        with av.open(path) as container:
            order = [p.stream_index for p in container.demux() if p.dts is not None]
        assert (order.index(1) > 90) is not interleave
        with Film(path) as film:
            audio.append(np.stack([clip.audio for clip in read_clips(film, DEMO)]))
    np.testing.assert_array_equal(*audio)


@pytest.mark.parametrize("suffix", [".mkv", ".ts", ".mp4"])
def test_truncated_films_are_refused_at_their_end(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 255, (100, 48, 80, 3), np.uint8)
    path = write_film(tmp_path / f"whole{suffix}", frame_times(25, 100), lambda i: noise[i])
    if suffix == ".mp4":  # its index is at the end: a cut film has it in front
        path = with_index_in_front(path, tmp_path / "front.mp4")
    cut = tmp_path / f"cut{suffix}"
    data = path.read_bytes()
    cut.write_bytes(data[: int(len(data) * 0.6)])
    clips: list = []
    with Film(cut) as film:
        if suffix == ".ts":  # a transport stream does not say how long it is
            clips += read_clips(film, DEMO)
        else:
            with pytest.raises(
                UserError, match=r"^cut\.m.* is cut off: its last frame is at 2\.\d\d s, 1\.\d\d s before"
            ):
                clips.extend(read_clips(film, DEMO))
    assert 8 <= len(clips) <= 14  # of 22: those before the end were there to use


def with_index_in_front(path: Path, target: Path) -> Path:
    with av.open(path) as source, av.open(target, "w", container_options={"movflags": "faststart"}) as output:
        stream = output.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                output.mux(packet)
    return target


def test_damage_inside_a_film_is_said(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (60, 48, 80, 3), np.uint8)
    path = write_film(tmp_path / "film.mp4", frame_times(25, 60), lambda i: noise[i])
    with av.open(path) as container:
        packet = [p for p in container.demux(video=0) if p.dts is not None][20]
        position, size = packet.pos, packet.size
    data = bytearray(path.read_bytes())
    data[position : position + size] = bytes(size)
    path.write_bytes(data)
    with Film(path) as film:
        frames = list(film.frames())
    assert len(frames) >= 58
    assert film.warnings == [
        "film.mp4 is damaged: 1 part(s) of its pictures could not be decoded; the last frame read is at 2.36 s"
    ]


@pytest.mark.parametrize("heard", [True, False])
def test_films_that_were_joined_byte_by_byte_are_refused(tmp_path, heard):
    """The second one's clock begins anew: to go on by ticks would give all its clips one excerpt of sound. `stream`
    says the same, and so does the sound alone, whose clock goes back elsewhere in the file."""
    sound = np.zeros((1, 48_000 * 2), np.float32) if heard else None
    part = write_film(tmp_path / "a.ts", frame_times(25, 50), quadrants(48, 80), sound=sound, codec="aac")
    path = tmp_path / "joined.ts"
    path.write_bytes(part.read_bytes() * 2)
    said = r"joined\.ts: its time stamps go back from \d\.\d\d s to -?0\.\d\d s, .*ffmpeg -i \S*joined\.ts -c copy"
    with pytest.raises(UserError, match=said), Film(path) as film:
        list(read_clips(film, DEMO))
    with pytest.raises(UserError, match=said), Film(path) as film:
        list(film.frames())
    with pytest.raises(UserError, match=said), FileSource(str(path)) as source:
        list(source.items())
    if heard:
        with pytest.raises(UserError, match=said):
            Sound(str(path), "joined.ts").excerpt(10.0)


@pytest.mark.parametrize("heard", [True, False])
def test_a_joined_film_whose_clock_is_taken_for_a_full_one_is_refused(tmp_path, heard):
    """The second part begins a minute and more before the first: FFmpeg adds the 26.5 hours of a transport stream's
    clock. One recording whose clock was full goes on."""
    full, sound = Fraction(2**33, 90_000), np.zeros((1, 48_000 * 2), np.float32) if heard else None
    for start in (200, 30, full - 1):
        times = [start + t for t in frame_times(25, 50)]
        options = {"sound": sound, "sound_start": Fraction(start), "codec": "aac"}
        write_film(tmp_path / f"{float(start):.0f}.ts", times, quadrants(48, 80), **options)
    path = tmp_path / "joined.ts"
    path.write_bytes((tmp_path / "200.ts").read_bytes() + (tmp_path / "30.ts").read_bytes())
    said = r"joined\.ts: its time stamps leap from 20\d\.\d\d s to 9547\d\.\d\d s, .*ffmpeg -i \S*joined\.ts -c copy"
    with pytest.raises(UserError, match=said), Film(path) as film:
        list(film.frames())
    if heard:
        with pytest.raises(UserError, match=said):
            Sound(str(path), "joined.ts").excerpt(1e5)
    with Film(tmp_path / "95443.ts") as film:
        assert len(list(read_clips(film, DEMO))) == 9


@pytest.mark.parametrize("count", [1, 30])
def test_sound_that_is_longer_than_the_pictures(tmp_path, count):
    """Of few pictures FFmpeg takes the length of all for theirs: a cover with music, slides with a talk."""
    sound = np.zeros((1, 48_000 * 40), np.float32)
    path = tmp_path / "film.mkv"
    write_film(path, [i * Fraction(1) for i in range(count)], quadrants(48, 80), sound=sound, codec="aac")
    with Film(path) as film:
        assert len(list(film.frames())) == count
    assert film.warnings == []


def test_a_name_with_a_colon_is_no_protocol(tmp_path, monkeypatch):
    """As cameras name what they record."""
    write_film(tmp_path / "2024-01-01T10:00:00.mkv", frame_times(25, 20), quadrants(48, 80), sound=click(0.1, 1))
    monkeypatch.chdir(tmp_path)
    for name in ("2024-01-01T10:00:00.mkv", "file:2024-01-01T10:00:00.mkv"):
        with Film(name) as film:
            assert len(list(read_clips(film, DEMO))) == 2
            assert film.name == "2024-01-01T10:00:00.mkv"
    predict_film(Brightness(), "2024-01-01T10:00:00.mkv", overlay="10:30.mp4", maps="10:30.npz")
    with Film("10:30.mp4") as film:
        assert len(list(film.frames())) == 20
        assert film.has_sound


def two_programmes(folder: Path, television: Path) -> Path:
    """A transport stream with silent radio as its first programme, and `television`."""
    radio = folder / "radio.ts"
    options = {"mpegts_start_pid": "512", "mpegts_pmt_start_pid": "4352", "mpegts_service_id": "2"}
    with av.open(radio, "w", options=options) as output:
        track = output.add_stream("mp2", rate=48_000)
        for start in range(0, 2 * 48_000, 1152):
            block = av.AudioFrame.from_ndarray(np.zeros((1, 2304), np.int16), "s16", "stereo")
            block.sample_rate, block.pts, block.time_base = 48_000, start, Fraction(1, 48_000)
            output.mux(track.encode(block))
        output.mux(track.encode(None))

    def packets(path: Path) -> list[tuple[int, bytes]]:
        data = path.read_bytes()
        parts = (data[i : i + 188] for i in range(0, len(data), 188))
        return [((part[1] & 31) << 8 | part[2], part) for part in parts]

    def table(part: bytes) -> int:
        """Where the programme's map is, of a programme association table of one programme (ISO/IEC 13818-1, 2.4.4)."""
        return (part[5 + 10] & 31) << 8 | part[5 + 11]

    def crc(data: bytes) -> bytes:
        value = 0xFFFFFFFF
        for byte in data:
            value ^= byte << 24
            for _ in range(8):
                value = (value << 1 ^ (0x04C11DB7 if value >> 31 else 0)) & 0xFFFFFFFF
        return value.to_bytes(4, "big")

    first, second = packets(radio), packets(television)
    maps = [next(table(part) for pid, part in each if pid == 0) for each in (first, second)]
    programmes = b"".join(bytes([0, 2 - i, 0xE0 | pid >> 8, pid & 255]) for i, pid in enumerate(maps))
    section = bytes([0, 0xB0, len(programmes) + 9, 0, 1, 0xC1, 0, 0]) + programmes
    both = bytes([0x47, 0x40, 0, 0x10, 0]) + section + crc(section)
    path = folder / "both.ts"
    known = {0, 17}  # the table, and descriptions
    rest = [
        part
        for i in range(max(map(len, (first, second))))
        for each in (first, second)
        for pid, part in each[i : i + 1]
        if pid not in known
    ]
    path.write_bytes(both.ljust(188, b"\xff") + b"".join(rest))
    return path


def test_sound_is_of_the_films_programme(tmp_path):
    """Also in an overlay, and in a stream."""
    sound = click(0.5, 2)
    television = write_film(tmp_path / "tv.ts", frame_times(25, 50), quadrants(48, 80), sound=sound, codec="aac")
    path = two_programmes(tmp_path, television)
    with av.open(path) as container:
        assert [stream.type for stream in container.streams].count("audio") == 2
        assert sound_of(container) not in (None, container.streams.audio[0])
    peaks = []
    for film in (television, path):
        with Film(film) as opened:
            peaks.append(max(np.abs(clip.audio).max() for clip in read_clips(opened, DEMO)))
    assert peaks[1] == peaks[0] > 0.1


def test_memory_does_not_grow(tmp_path, monkeypatch):
    """What a reader holds after 600 frames is what it held after 100: windows of small frames and a second of sound."""
    from mubic_deploy.media.clips import Clipper

    sound = np.zeros((1, 24 * 8000), np.float32)
    path = write_film(tmp_path / "film.mkv", frame_times(25, 600), quadrants(48, 80), sound=sound, rate=8000)
    held: list[float] = []
    with Film(path) as film:
        clipper = Clipper(film, DEMO)
        for frame in film.frames():
            clipper.push(frame)
            assert clipper._sound is not None
            held.append(len(clipper._window) + clipper._sound._blocks.held / 16_000)
        clipper.close()
    assert max(held) <= 16 + 2
    assert len(held) == 600


def test_the_real_clip():
    with Film(bunny()) as film:
        assert film.display == (720, 1280)
        assert film.rate == 25
        assert film.expected == 132
        clips = list(read_clips(film, FULL))
        assert film.warnings == []
    assert [c.frame_index for c in clips] == list(range(8, 128, 4))
    assert clips[0].video.shape == (16, 224, 384, 3)
    assert (clips[0].video[:, :4] == BAR).all()
    # the sound against FFmpeg's own mix of the whole track
    resampler = av.AudioResampler("flt", "mono", 16_000, options={"rematrix_maxval": "1.0"})
    with av.open(bunny()) as container:
        parts = [r.to_ndarray()[0] for f in container.decode(audio=0) for r in resampler.resample(f)]
    whole = np.concatenate(parts)
    start = round(2.0 * 16_000) - 8304
    clip = next(c for c in clips if c.time_s == 2.08)
    np.testing.assert_allclose(clip.audio, whole[start + 1280 : start + 1280 + 16_608], atol=1e-6)


@pytest.mark.parametrize("longer", [0, 1])
def test_a_wmv_whose_sound_outlasts_its_pictures_is_whole(tmp_path: Path, longer: int) -> None:
    """ASF says of each stream how long the longest of them is."""
    sound = np.zeros((1, 48_000 * (1 + longer)), np.float32)
    path = write_film(
        tmp_path / "film.wmv",
        frame_times(25, 26),
        quadrants(48, 64),
        sound=sound,
        codec="wmav2",
        codec_options={"b": "128k"},
    )
    with Film(path) as film:
        assert len(list(film.frames())) == 26
        assert not film.warnings


def test_an_address_that_opens_once_is_said(tmp_path: Path) -> None:
    """As those do that expire: the sound is read through a connection of its own."""
    sound = np.zeros((1, 48_000), np.float32)
    path = write_film(tmp_path / "film.ts", frame_times(25, 26), quadrants(48, 64), sound=sound, codec="mp2")
    content = path.read_bytes()
    open_to_all = [True]

    class Once(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if not open_to_all[0]:
                self.send_error(403)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Once) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/film.ts"
        with Film(address) as film:
            open_to_all[0] = False
            said = rf"{address} could be opened once, but not again for its sound \(.*403 Forbidden.*\): save it"
            with pytest.raises(UserError, match=said):
                film.sound()
            with av.open(tmp_path / "o.mp4", "w") as output, pytest.raises(UserError, match=said):
                SoundTrack(address, output)
        server.shutdown()


def box(kind: bytes, content: bytes = b"", size: int | None = None) -> bytes:
    """One of ISO/IEC 14496-12's."""
    return (8 + len(content) if size is None else size).to_bytes(4, "big") + kind + content


@pytest.mark.parametrize(
    ("content", "lacks"),
    [
        (box(b"ftyp", b"isom0000") + box(b"mdat", bytes(99), 4000), True),  # cut off inside
        (box(b"ftyp", b"isom0000") + box(b"mdat", bytes(99), 0), True),  # to the end, whatever that is
        (box(b"ftyp", b"isom0000") + box(b"mdat", (4000).to_bytes(8, "big") + bytes(99), 1), True),
        (box(b"ftyp", b"isom0000") + box(b"mdat", (20).to_bytes(8, "big") + bytes(4), 1) + box(b"moov"), False),
        (box(b"mdat", bytes(99)) + box(b"free"), True),  # QuickTime
        (box(b"ftyp", b"isom0000") + box(b"mdat", bytes([255] * 8), 1), True),
        (box(b"ftyp", b"isom0000") + box(b"moov", bytes(9)) + box(b"mdat", bytes(99), 4000), False),
        (bytes(200), False),
        (b"this is no film, and longer than a box", False),
        (b"", False),
    ],
)
def test_an_mp4_without_its_index_is_known(tmp_path: Path, content: bytes, lacks: bool) -> None:
    (tmp_path / "film.mp4").write_bytes(content)
    assert lacks_its_index(tmp_path / "film.mp4") is lacks


@pytest.mark.parametrize("source", ["pipe", "link", "/dev/null", "pipe:0"])
def test_what_comes_once_is_refused(tmp_path, source):
    """A film is opened for its pictures, its sound and the overlay's sound: each would take a part of a pipe."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    path = str(tmp_path / source) if source in ("pipe", "link") else source
    with pytest.raises(UserError) as caught:
        Film(path)
    refusal = "is a pipe or a device, which can be read only once: save it to a file, or use mubic-deploy stream"
    assert str(caught.value) == f"{path} {refusal}"


@contextmanager
def falling_silent(*parts: bytes) -> Iterator[str]:
    """An address that sends the first of `parts` to whoever comes first, and so on, and stays silent then."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            for part in parts:
                connections.append(server.accept()[0])
                connections[-1].sendall(part)

        connections: list[socket.socket] = []
        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/film.mkv"
        for connection in connections:
            connection.close()


@pytest.mark.parametrize("silent", ["at once", "in the middle", "sound", "sound in the middle"])
def test_an_address_that_falls_silent(tmp_path, monkeypatch, silent):
    monkeypatch.setattr("mubic_deploy.media.source.PATIENCE_S", 0.5)
    noise = np.random.default_rng(0).integers(0, 255, (100, 48, 80, 3), np.uint8)
    sound = np.zeros((1, 48_000 * 4), np.float32)
    data = write_film(tmp_path / "film.mkv", frame_times(25, 100), lambda i: noise[i], sound=sound).read_bytes()
    whole = f"HTTP/1.1 200 OK\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data
    half = whole[: len(whole) // 2]
    parts = {"at once": [b""], "in the middle": [half, whole], "sound": [whole, b""]}
    with falling_silent(*parts.get(silent, [whole, half])) as address:
        with pytest.raises(UserError) as caught, Film(address) as film:
            list(read_clips(film, DEMO))
        assert str(caught.value) == f"{address} sent too little for 0.5 s: check it, or save it to a file first"


def nothing(path: Path) -> None:
    with av.open(path, "w") as output:
        stream = output.add_stream("libx264", rate=25)
        stream.width, stream.height = 64, 48
        output.start_encoding()


def sound_only(path: Path) -> None:
    with av.open(path, "w") as output:
        stream = output.add_stream("aac", rate=48_000)
        frame = av.AudioFrame.from_ndarray(np.zeros((2, 4096), np.float32), "fltp", "stereo")
        frame.sample_rate = 48_000
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("missing.mp4", lambda path: None, "missing.mp4 does not exist: check the path"),
        ("folder.mp4", lambda path: path.mkdir(), "folder.mp4 is a folder"),
        ("empty.mp4", lambda path: path.touch(), "empty.mp4 is empty"),
        ("text.mp4", lambda path: path.write_text("hello\n" * 500), "text.mp4 is not a film"),
        ("text.txt", lambda path: path.write_text("hello\n" * 500), "text.txt holds no video"),
        ("sound.m4a", sound_only, r"sound.m4a holds no video \(sound only\)"),
        ("nothing.mp4", nothing, "nothing.mp4"),
        ("nothing.mkv", nothing, "nothing.mkv"),
    ],
)
def test_bad_input(tmp_path, name, make, message):
    make(tmp_path / name)
    with pytest.raises(UserError, match=message) as caught:
        Film(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert ":" in str(caught.value)  # what is wrong: what to do
