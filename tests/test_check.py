"""The check before training, against a data set that is broken in one place."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from field_data import truncate, write_sound
from PIL import Image
from scipy.io import savemat

from mubic_deploy.errors import UserError
from mubic_deploy.training.check import check
from mubic_deploy.training.layout import Video


def test_check_of_a_whole_data_set(shared):
    calls: list[tuple[int, int]] = []
    for deep in (False, True):
        report = check(shared, lambda done, total: calls.append((done, total)), deep=deep)
        assert report.problems == []
        assert (report.videos, report.frames, report.skipped) == (3, 54, 0)
        assert report.datasets["Scenes"].frames == 54
        report.require()
    assert calls == [(1, 3), (2, 3), (3, 3)] * 2


def other_size(video: Video) -> None:
    Image.fromarray(np.full((18, 32), 9, np.uint8)).save(video.map(24))


def other_size_between(video: Video) -> None:
    Image.fromarray(np.full((18, 32), 9, np.uint8)).save(video.map(7))


def empty(video: Video) -> None:
    for i in range(1, video.frames + 1):
        Image.fromarray(np.zeros((36, 64), np.uint8)).save(video.map(i))


def other_fixations(video: Video) -> None:
    savemat(video.fixations(1), {"eyeMap": np.zeros((18, 32), np.uint8)})


def other_shape(video: Video) -> None:
    for i in range(1, video.frames + 1):
        Image.fromarray(np.full((36, 48), 9, np.uint8)).save(video.map(i))
        savemat(video.fixations(i), {"eyeMap": np.zeros((36, 48), np.uint8)})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda v: shutil.rmtree(v.frame(1).parent), r"video_frames/Scenes/one does not exist or is empty"),
        (lambda v: v.frame(7).unlink(), r"img_00007\.jpg does not exist \(1 of 24 are missing\)"),
        (lambda v: v.sound.unlink(), r"one\.wav does not exist"),
        (lambda v: v.sound.write_bytes(b"RIFF"), r"one\.wav is not a sound file"),
        (lambda v: shutil.rmtree(v.map(1).parent), r"one/maps does not exist or is empty"),
        (lambda v: [v.map(i).unlink() for i in range(5, 18)], r"eyeMap_00005\.jpg.*13 of 24"),
        (lambda v: [v.fixations(i).unlink() for i in range(5, 18)], r"fixMap_00005\.mat.*13 of 24"),
        (lambda v: truncate(v.frame(13)), r"img_00013\.jpg is damaged"),
        (lambda v: truncate(v.frame(5)), r"img_00005\.jpg is damaged"),
        (lambda v: truncate(v.map(6)), r"eyeMap_00006\.jpg is damaged"),
        (lambda v: truncate(v.map(24)), r"eyeMap_00024\.jpg is damaged"),
        (lambda v: truncate(v.fixations(1)), r"fixMap_00001\.mat is not a MATLAB file"),
        (
            lambda v: v.frame(1).rename(v.frame(0)),
            r"img_00000\.jpg is there, but numbers begin with 1",
        ),
        (lambda v: v.map(24).rename(v.map(0)), r"eyeMap_00000\.jpg is there, but numbers begin with 1"),
        (lambda v: v.fixations(24).rename(v.fixations(0)), r"fixMap_00000\.mat is there, but numbers begin with 1"),
        (
            lambda v: Image.fromarray(np.zeros((36, 64), np.int32)).save(v.map(6), "TIFF"),
            r"06\.jpg has more than 8 bits",
        ),
        (other_size, r"eyeMap_00024\.jpg is 32x18, but earlier maps are 64x36"),
        (other_size_between, r"eyeMap_00007\.jpg is 32x18, but earlier maps are 64x36"),
        (empty, r"all maps in .*one/maps are empty"),
        (other_fixations, r"fixMap_00001\.mat is 32x18, but its density map 64x36"),
        (other_shape, r"eyeMap_00001\.jpg is 48x36, another shape than the frames' 64x36"),
    ],
)
def test_check_finds(field, damage, message):
    damage(field[0])
    problems = check(field).problems
    assert problems
    assert all(p.startswith("Scenes/one: ") and "\n" not in p for p in problems)
    with pytest.raises(UserError, match=rf"Scenes/one: .*{message}.*: \w+"):
        check(field).require()


@pytest.mark.parametrize(
    ("frames", "fps", "sound_s", "kind", "says"),
    [
        (24, 25, 0.96, "", ""),
        (24, 25, 0.72, "", ""),  # 0.24 s are missing
        (24, 25, 0.70, "warning", r"one\.wav lasts 0\.70 s, its 24 frames at 25 fps 0\.96 s, the rest would be"),
        (24, 25, 0.49, "warning", r"lasts 0\.49 s"),
        (24, 25, 0.48, "problem", r"lasts 0\.48 s"),
        (6, 25, 0.05, "", ""),  # most is missing, but 0.19 s
        (24, 5, 0.96, "problem", r"its 24 frames at 5 fps 4\.80 s.*correct fps in the fold list"),
        (24, 24, 0.96, "", ""),
        (24, 25, 1.43, "", ""),
        (24, 25, 1.45, "problem", r"lasts 1\.45 s, its 24 frames at 25 fps 0\.96 s.*or cut the sound"),
        (24, 50, 0.96, "problem", r"24 frames at 50 fps 0\.48 s.*correct fps in the fold list"),
        (6, 25, 0.48, "", ""),  # twice as much, but 0.24 s
        (24, 8, 3.95, "", ""),  # 0.95 s after the last frame
        (24, 8, 4.05, "warning", r"lasts 4\.05 s, its 24 frames at 8 fps 3\.00 s, so it may be heard too late"),
    ],
)
def test_sound_lasts_as_long_as_the_frames(field, frames, fps, sound_s, kind, says):
    video = replace(field[0], frames=frames, fps=fps)
    write_sound(video.sound, np.zeros((round(sound_s * 16_000), 1)), 16_000)
    report = check([video])
    assert (len(report.problems), len(report.warnings)) == (kind == "problem", kind == "warning")
    for line in report.problems + report.warnings:
        assert re.search(rf"^Scenes/one: .*{says}", line), line


@pytest.mark.parametrize(
    ("sound_s", "found"), [(0.96, (0, 0)), (1.4, (0, 0)), (1.45, (1, 0)), (0.2, (1, 0)), (0.4, (0, 0))]
)
def test_a_list_that_names_the_first_frames_only(field, sound_s, found):
    """12 of 24: 0.48 of 0.96 s."""
    video = replace(field[0], frames=12)
    write_sound(video.sound, np.zeros((round(sound_s * 16_000), 1)), 16_000)
    report = check([video])
    assert (len(report.problems), len(report.warnings)) == found


def test_warnings_in_brief(field):
    assert check(field).brief() == []
    for number, more in ((0, ""), (1, r" \(and 1 more warning\)")):
        samples = round(0.6 * field[number].frames / field[number].fps * 16_000)
        write_sound(field[number].sound, np.zeros((samples, 1)), 16_000)
        (line,) = check(field).brief()
        assert re.search(rf"^Scenes/one: .*one\.wav lasts 0\.58 s.*fold list{more}$", line), line


def test_some_missing_maps_are_only_counted(field):
    for i in range(1, 13):  # half of them
        field[0].map(i).unlink()
    field[1].fixations(20).unlink()
    report = check(field)
    assert report.problems == []
    assert report.skipped == report.datasets["Scenes"].skipped == 13


def test_bytes_behind_a_picture_do_no_harm(field):
    for path in (field[0].frame(5), field[0].map(6)):
        path.write_bytes(path.read_bytes() + bytes(100))
    Image.fromarray(np.full((36, 64, 3), 9, np.uint8)).save(field[0].frame(7), "PNG")  # whatever its name says
    assert check(field).problems == []


def test_deep_check_decodes_everything(field):
    truncate(field[1].frame(5))
    truncate(field[1].map(6))
    truncate(field[1].fixations(8))
    assert len(check(field).problems) == 2  # of fixations only a few are read
    report = check(field, deep=True)
    assert [next(n for n in ("img", "eyeMap", "fixMap") if f"{n}_0000" in p) for p in report.problems] == [
        "img",
        "eyeMap",
        "fixMap",
    ]
    with pytest.raises(UserError, match=r"img_00005\.jpg.*\(and 2 more problems\)$"):
        report.require()
