"""Sound: where it lies, how loud it is, and that it is read only as far as needed."""

from __future__ import annotations

from fractions import Fraction

import av
import numpy as np
import pytest
from films import Brightness, check_flash_and_click, click, flash_and_click, frame_times, write_film

from mubic_deploy.config import AUDIO_SAMPLES, DEMO
from mubic_deploy.live.items import Heard
from mubic_deploy.live.source import FileSource, LiveSource
from mubic_deploy.media.clips import read_clips
from mubic_deploy.media.film import Film
from mubic_deploy.media.sound import Placer, Sound, excerpt_start
from mubic_deploy.predict import predict_film

MIDDLE = AUDIO_SAMPLES // 2
BLACK = np.zeros((36, 64, 3), np.uint8)
SECOND = Fraction(1)


def varying(count: int) -> list[Fraction]:
    """Steps of 1/60 to 1/10 s, in the film's clock."""
    steps = np.random.default_rng(3).integers(1500, 9000, count)
    return [Fraction(int(n), 90_000) for n in np.cumsum(steps) - steps[0]]


@pytest.mark.parametrize("fps", [24, 25, Fraction(30_000, 1001), 30, 60])
def test_the_click_is_at_the_flash(tmp_path, fps):
    times = frame_times(fps, 80)
    check_flash_and_click(flash_and_click(tmp_path / "film.mov", times, 40), within=16)


def test_the_click_is_at_the_flash_at_a_variable_rate(tmp_path):
    check_flash_and_click(flash_and_click(tmp_path / "film.mov", varying(80), 40), within=16)


def test_the_click_is_at_the_flash_in_aac(tmp_path):
    path = flash_and_click(tmp_path / "film.mp4", frame_times(25, 80), 40, codec="aac")
    check_flash_and_click(path, within=160)  # 10 ms: AAC smears, half a frame is 320 samples


def test_the_click_is_at_the_flash_in_matroska(tmp_path):
    """Matroska rounds time stamps to 1 ms: the sound must run on without seams or drift."""
    path = flash_and_click(tmp_path / "film.mkv", frame_times(25, 80), 40)
    check_flash_and_click(path, within=24)


@pytest.mark.parametrize("start", [Fraction(1, 2), Fraction(-1, 2)])
def test_sound_that_starts_late_or_early(tmp_path, start):
    """A shift that a reader ignores would move the click by half a second."""
    times = [t + 1 for t in frame_times(25, 80)]
    path = flash_and_click(tmp_path / "film.mkv", times, 40, sound_start=1 + start)
    check_flash_and_click(path, within=24)


def test_sound_that_starts_a_second_late_is_said(tmp_path):
    sound = np.full((1, 48_000), 0.5, np.float32)
    path = write_film(tmp_path / "late.mov", frame_times(25, 50), BLACK, sound=sound, sound_start=SECOND)
    with Film(path) as film:
        clips = list(read_clips(film, DEMO))
    # frame 8 at 0.32 s: the excerpt's sample 8304 + 0.68 s * 16000 is the first of the sound, beyond its end
    assert np.abs(clips[0].audio).max() == 0
    later = clips[6]
    assert later.frame_index == 32
    onset = np.flatnonzero(np.abs(later.audio) > 0.25)[0]
    assert abs(onset - (MIDDLE - 0.28 * 16_000)) <= 2
    assert film.warnings == ["the sound of late.mov starts at 1.00 s: silence is used before"]


def test_what_exceeds_full_scale_is_cut_off(tmp_path):
    """As floats of a file may; a live stream of it is what the film is."""
    loud = 2 * np.sin(np.arange(48_000 * 2) / 10)[None].astype(np.float32)
    path = write_film(tmp_path / "loud.mkv", frame_times(25, 50), BLACK, sound=loud, codec="pcm_f32le")
    with Film(path) as film:
        (first, *_) = read_clips(film, DEMO)
    assert first.audio.max() == 1
    assert first.audio.min() == -1
    with FileSource(str(path), realtime=False) as source:
        heard = [item.samples for item in source.items() if isinstance(item, Heard)]
    assert max(np.abs(samples).max() for samples in heard) == 1


def test_a_gap_is_silence(tmp_path):
    """One second of tone, one second of nothing in the time stamps, one second of tone."""
    sound = np.full((1, 96_256), 0.5, np.float32)
    path = write_film(tmp_path / "gap.mkv", frame_times(25, 75), BLACK, sound=sound, gap=(48_128, SECOND))
    reader = Sound(str(path), "gap.mkv")
    at = 48_128 / 48_000
    first, second = reader.excerpt(at), reader.excerpt(at + 1)
    np.testing.assert_allclose(first[:8200], 0.5, atol=0.01)
    np.testing.assert_allclose(first[8400:], 0, atol=0.01)
    np.testing.assert_allclose(second[:8200], 0, atol=0.01)
    np.testing.assert_allclose(second[8400:], 0.5, atol=0.01)


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100, 48_000])
@pytest.mark.parametrize("codec", ["pcm_s16le", "pcm_f32le"])
@pytest.mark.parametrize("channels", [1, 2, 6])
def test_amplitude_and_pitch(tmp_path, rate, codec, channels):
    """Equal channels of a 440 Hz sine of 0.9 mix to the same sine: no gain, no clipping, no shift."""
    times = np.arange(2 * rate) / rate
    sound = np.repeat((0.9 * np.sin(2 * np.pi * 440 * times)).astype(np.float32)[None], channels, 0)
    path = write_film(tmp_path / "sine.mkv", frame_times(25, 50), BLACK, sound=sound, rate=rate, codec=codec)
    audio = Sound(str(path), "sine.mkv").excerpt(1.0)
    sample = excerpt_start(1.0) + np.arange(AUDIO_SAMPLES)
    want = 0.9 * np.sin(2 * np.pi * 440 * sample / 16_000)
    # with 5.1 the low-frequency channel is dropped, the others still sum to 1
    np.testing.assert_allclose(audio, want, atol=0.01)


def test_opposite_channels_cancel_and_one_channel_is_half(tmp_path):
    tone = 0.8 * np.sin(np.arange(96_000) * 0.1).astype(np.float32)
    for name, right, peak in (("opposite", -tone, 0.0), ("left", 0 * tone, 0.4)):
        path = write_film(tmp_path / f"{name}.mov", frame_times(25, 50), BLACK, sound=np.stack([tone, right]))
        assert np.abs(Sound(str(path), name).excerpt(1.0)).max() == pytest.approx(peak, abs=0.01)


def test_excerpt_by_hand():
    """Frame 9 at 25 fps (the ninth, 1-based) is centred at (9 - 1) / 25 * 16000 = 5120."""
    assert excerpt_start(8 / 25) == 5120 - 8304
    assert excerpt_start(8 / (30_000 / 1001)) == round(8 * 1001 / 30_000 * 16_000) - 8304 == 4271 - 8304


def test_sound_is_zero_beyond_the_ends(tmp_path):
    sound = np.full((1, 48_000), 0.5, np.float32)
    path = write_film(tmp_path / "film.mov", frame_times(25, 50), BLACK, sound=sound)
    reader = Sound(str(path), "film.mov")
    start = reader.excerpt(0.0)
    assert (start[:MIDDLE] == 0).all()
    np.testing.assert_allclose(start[MIDDLE + 50 :], 0.5, atol=0.02)
    end = reader.excerpt(1.0)
    np.testing.assert_allclose(end[: MIDDLE - 50], 0.5, atol=0.02)
    assert (end[MIDDLE + 1 :] == 0).all()


def test_sound_is_read_ahead_only_as_needed(tmp_path):
    """Ten minutes of sound: what is held at any time stays near one excerpt."""
    sound = np.zeros((1, 8000 * 600), np.float32)
    path = write_film(tmp_path / "long.mkv", frame_times(1, 600), BLACK, sound=sound, rate=8000)
    reader = Sound(str(path), "long.mkv")
    for time_s in range(0, 600, 7):
        reader.excerpt(float(time_s))
        assert reader._blocks.held < AUDIO_SAMPLES + 8192
        assert reader.position <= time_s * 16_000 + AUDIO_SAMPLES + 8192


def test_unnamed_channels_are_averaged(tmp_path):
    """(0.9 + 0.3 + 0) / 3: FFmpeg cannot mix channels that have no names."""
    sound = np.stack([np.full(96_000, v, np.float32) for v in (0.9, 0.3, 0.0)])
    path = write_film(tmp_path / "film.mkv", frame_times(25, 50), BLACK, sound=sound, layout="3 channels")
    assert Sound(str(path), "film.mkv").excerpt(1.0)[MIDDLE] == pytest.approx(0.4, abs=0.01)


def ambisonic(path):
    """Opus of first order: the omnidirectional channel is a sine of 0.5, the directions are -0.4 of that."""
    tone = (0.5 * np.sin(np.arange(96_000) * 0.06)).astype(np.float32)
    sound = np.stack([tone, *[-0.4 * tone] * 3])
    options = {"layout": "ambisonic 1", "codec": "libopus", "codec_options": {"mapping_family": "2"}}
    return write_film(path, frame_times(25, 50), BLACK, sound=sound, **options)


def test_ambisonic_sound_is_its_omnidirectional_channel(tmp_path):
    audio = Sound(str(ambisonic(tmp_path / "film.mkv")), "film.mkv").excerpt(1.0)
    assert np.abs(audio[1000:-1000]).max() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(("target", "codec", "layout"), [("o.mkv", "opus", "ambisonic 1"), ("o.mov", "aac", "mono")])
def test_ambisonic_sound_in_the_overlay(tmp_path, target, codec, layout):
    predict_film(Brightness(), ambisonic(tmp_path / "film.mkv"), overlay=tmp_path / target)
    with av.open(tmp_path / target) as container:
        stream = container.streams.audio[0]
        assert (stream.codec_context.name, stream.layout.name) == (codec, layout)
        heard = np.concatenate([f.to_ndarray()[0] for f in container.decode(audio=0)])
    assert np.abs(heard[24_000:72_000]).max() == pytest.approx(0.5, abs=0.03)


def test_sound_that_cannot_be_mixed_is_silence(tmp_path, monkeypatch):
    """Left to FFmpeg, ambisonic sound is such."""
    path = ambisonic(tmp_path / "film.mkv")
    monkeypatch.setattr("mubic_deploy.media.sound.known_layout", lambda frame: frame)
    with Film(path) as film:
        clips = list(read_clips(film, DEMO))
    assert not np.any([clip.audio for clip in clips])
    assert film.warnings == ["the sound of film.mkv is damaged: silence is used where it cannot be decoded"]
    live = LiveSource(str(path))
    assert not any(isinstance(item, Heard) for item in live.items())
    live.close()
    assert live.warnings == [f"{path}: 101 part(s) could not be decoded"]


def test_samples_that_are_no_numbers_are_silence(tmp_path):
    """A file of floats can hold them; one is not worth a film."""
    sound = click(0.5, 1.0, channels=1)
    sound[0, 30_000:30_010], sound[0, 31_000] = np.nan, np.inf
    picture = np.zeros((36, 64, 3), np.uint8)
    path = write_film(tmp_path / "film.mkv", frame_times(25, 25), picture, sound=sound, codec="pcm_f32le")
    with Film(path) as film:
        clips = list(read_clips(film, DEMO, stride=1))
    assert np.isfinite([clip.audio for clip in clips]).all()
    assert np.any([clip.audio for clip in clips])
    assert film.warnings == ["the sound of film.mkv is damaged: silence is used where it cannot be decoded"]


def test_click_helper_is_where_it_says():
    assert np.flatnonzero(click(0.5, 1.0)[0])[0] == 24_000


def test_a_clock_that_drifts():
    """A sound card that runs 1 % fast: 970 samples every 20 ms that call themselves 48 kHz, with right time stamps.
    After 30 s they would be 312 ms off; what clicks at 30 s stays there to half a frame of 25 fps."""
    placer = Placer()
    for i in range(1550):
        samples = np.zeros((1, 970), np.float32)
        if i == 1500:
            samples[0, :48] = 0.8
        frame = av.AudioFrame.from_ndarray(samples, "fltp", "mono")
        frame.sample_rate, frame.pts, frame.time_base = 48_000, 960 * i, Fraction(1, 48_000)
        for start, placed in placer.push(frame):
            loud = np.flatnonzero(placed > 0.4)
            if len(loud):
                assert (start + loud[0]) / 16_000 == pytest.approx(30, abs=0.02)
                return
    pytest.fail("the click was not heard")
