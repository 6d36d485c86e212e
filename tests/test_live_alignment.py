"""Sound and pictures of a live stream's windows: a flash and a click at one time, from film to model."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from films import click, flash_and_click, write_film
from live_feed import maps_of

from bench.alignment import RATES, offsets, windows, write_clip
from mubic_deploy import StreamClient
from mubic_deploy.pipeline import Pipeline
from mubic_deploy.triton.server import TritonServer

pytest_plugins = ("triton_fixtures",)

CASES = {
    **{name: (times, Fraction(0)) for name, times in RATES.items()},
    "a clock that starts at 7 s": ([7 + time for time in RATES["25 fps"]], Fraction(7)),
    "sound that starts late": (RATES["30 fps"], Fraction(1, 2)),
}


@pytest.mark.parametrize("name", list(CASES))
def test_the_click_lies_where_the_flash_is(name: str, tmp_path: Path) -> None:
    """Matroska with PCM, whose time stamps are whole milliseconds."""
    times, sound_start = CASES[name]
    flash = len(times) // 2
    path = flash_and_click(tmp_path / "clip.mkv", times, flash, sound_start=sound_start)
    found = offsets(windows(path), times, flash)
    assert len(found) == 16  # every window that shows the flash, and each of these is short enough to hold the click
    assert max(abs(offset.frames) for offset in found) < 0.5
    assert max(abs(offset.seconds) for offset in found) < 0.001


@pytest.mark.parametrize("name", ["29.97 fps", "variable rate"])
def test_an_encoded_film(name: str, tmp_path: Path) -> None:
    """MP4: H.264 with B frames, AAC with its priming, edit lists."""
    times = RATES[name]
    write_clip(tmp_path / "clip.mp4", times, 40)
    found = offsets(windows(tmp_path / "clip.mp4"), times, 40)
    assert len(found) >= 14
    assert max(abs(offset.seconds) for offset in found) < 0.001


@pytest.mark.parametrize("late", [Fraction(-1, 2), Fraction(3, 4)])
def test_what_is_off_is_seen(late: Fraction, tmp_path: Path) -> None:
    """A film whose click is off by so many frames."""
    times = RATES["30 fps"]
    at = float(times[45] + late / 30)
    dark, white = (np.full((36, 64, 3), value, np.uint8) for value in (20, 235))
    path = write_film(tmp_path / "clip.mkv", times, lambda i: white if i == 45 else dark, sound=click(at, 4))
    found = offsets(windows(path), times, 45)
    assert len(found) == 16
    for offset in found:
        assert offset.frames == pytest.approx(late, abs=0.03)
        assert offset.seconds == pytest.approx(late / 30, abs=0.001)


def test_the_whole_server(toy_server: TritonServer, toy_pipeline: Pipeline, tmp_path: Path) -> None:
    """Its maps are those of the windows that are measured above; those of sound that is off by half a frame are not.

    The toy graphs hardly hear: noise, which they hear best, moves their maps by 7e-5."""
    times = RATES["29.97 fps"]
    noise = np.random.default_rng(0).uniform(-0.9, 0.9, (1, 4 * 48_000)).astype(np.float32)
    path = write_film(tmp_path / "clip.mkv", times, np.full((36, 64, 3), 20, np.uint8), sound=noise)
    inputs = list(windows(path, stride=5))
    with StreamClient(toy_server.url, stride=5, steps=1) as client:
        found = maps_of(client, path)
        assert client.fit is not None
    assert [m.frame_index for m in found] == [w.frame_index for w in inputs]
    assert len(found) == 15
    apart = []
    for given, window in zip(found, inputs, strict=True):
        excerpts = [np.roll(window.audio, shift) for shift in (0, -267, 267)]
        maps, _ = toy_pipeline.predict(np.stack([window.video] * 3), np.stack(excerpts), 0, 1)
        apart.append([np.abs(client.fit.back(m) - given.saliency).max() for m in maps])
    here, early, late = np.transpose(apart)
    assert here.max() < 2e-6
    assert min(np.median(early), np.median(late)) > 1e-5
