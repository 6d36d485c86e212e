"""Rendered scenes: what is seen, heard and looked at belongs together, and the layout's readers read it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mubic_deploy.config import DEMO, SAMPLE_RATE
from mubic_deploy.errors import UserError
from mubic_deploy.media.clips import read_clips
from mubic_deploy.media.film import Film
from mubic_deploy.metrics import cc
from mubic_deploy.scenes import sound, write
from mubic_deploy.scenes.film import write_film
from mubic_deploy.scenes.picture import Painter
from mubic_deploy.scenes.plan import (
    FPS,
    HEIGHT,
    KINDS,
    OFF_SCREEN,
    SILENCE,
    SILENT_MOTION,
    WIDTH,
    Candidate,
    Plan,
    Rhythm,
    Segment,
    make_plan,
    streams,
)
from mubic_deploy.scenes.sound import NOISE, synthesize, voice
from mubic_deploy.scenes.viewers import FOLLOWERS, VIEWERS, density, fixation_map, gaze
from mubic_deploy.scenes.write import write_scenes
from mubic_deploy.training.check import check
from mubic_deploy.training.clips import Clips
from mubic_deploy.training.layout import Video, read_density, read_fixations, read_frame, read_list, read_sound

PITCH = {"bouncer": 120, "pulser": 700, "talker": 160}
PLACES = ((60, 120), (260, 120))
VIDEOS, SEED = 7, 3


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def random_plans(n: int, seconds: float = 6) -> list[Plan]:
    return [make_plan(rng(seed), seconds) for seed in range(n)]


def candidate(kind: str) -> Candidate:
    """Its events are irregular, so that they fit the sound in one way only."""
    shortest, longest = (0.2, 0.3) if kind == "talker" else (0.45, 0.7)
    draws = rng(KINDS.index(kind))
    length = draws.uniform(shortest, longest, 24)
    gap = draws.uniform(0.1, 0.3, 24) if kind == "talker" else np.zeros(24)
    start = 0.1 + np.cumsum(length + gap) - length - gap
    return Candidate(kind, 20, PITCH[kind], 0.3, 0.8, 0.2, Rhythm(start, length, draws.uniform(0.7, 1, 24)))


def scene(kinds: tuple[str, ...], *segments: tuple[float, int], moving: bool = True) -> Plan:
    """Candidates at PLACES under a still camera; segments are (end in seconds, who is heard)."""
    frames = round(segments[-1][0] * FPS)
    starts = [0.0, *(stop for stop, _ in segments)]
    return Plan(
        frames,
        tuple(candidate(kind) for kind in kinds),
        tuple(Segment(a, b, k, (moving,) * len(kinds)) for a, (b, k) in zip(starts, segments, strict=False)),
        np.repeat(np.array(PLACES[: len(kinds)], float)[:, None], frames, 1),
        np.zeros((frames, 2)),
    )


def loudness(samples: np.ndarray, times: np.ndarray, width: float = 0.02) -> np.ndarray:
    """Root mean square in `width` seconds around each time."""
    power = np.cumsum(np.append(0, samples.astype(float) ** 2))
    first, last = (np.clip(np.rint((times + d) * SAMPLE_RATE), 0, len(samples)) for d in (-width / 2, width / 2))
    return np.sqrt((power[last.astype(int)] - power[first.astype(int)]) / np.maximum(last - first, 1))


def best_lag(agreement: Callable[[float], float]) -> float:
    """The delay in seconds, of -0.15 to 0.15, at which two things agree best."""
    return max(np.arange(-0.15, 0.151, 0.005), key=agreement)


# ---- sound, motion and picture


@pytest.mark.parametrize("kind", ["bouncer", "pulser"])
def test_sounds_begin_as_the_events_do(kind):
    plan = scene((kind,), (6, 0))
    samples = synthesize(plan, rng(0))
    starts = plan.candidates[0].rhythm.start
    starts = starts[(starts > 0.2) & (starts < 5.7)]
    assert len(starts) >= 8

    def rise(lag: float) -> float:
        before, after = (loudness(samples, starts + lag + d) for d in (-0.01, 0.01))
        return float(np.log(after / before).min())  # at every event

    assert abs(best_lag(rise)) <= 0.02
    assert rise(0) > np.log(3)
    # a motion rests there: a ball is on the ground, at most 20 ms from the frame
    levels = plan.levels(0)
    assert levels[np.rint(starts * FPS).astype(int)].max() < (0.25 if kind == "bouncer" else 0.6)
    assert levels.max() > 0.65


@pytest.mark.parametrize("kind", ["pulser", "talker"])
def test_loudness_follows_the_motion(kind):
    plan = scene((kind,), (6, 0))
    samples = synthesize(plan, rng(0))
    levels = plan.levels(0)[5:-5]
    times = plan.times[5:-5]

    def agreement(lag: float) -> float:
        return float(np.corrcoef(loudness(samples, times + lag), levels)[0, 1])

    assert abs(best_lag(agreement)) <= 0.02
    assert agreement(0) > 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_the_picture_shows_the_motion(kind):
    moving, resting = (scene((kind,), (1.6, 0), moving=m) for m in (True, False))
    painters = [Painter(plan, rng(1)) for plan in (moving, resting)]  # the same background and grain
    levels = moving.levels(0)
    changed = []
    for i in range(moving.frames):
        a, b = (np.asarray(painter.frame(i), float) for painter in painters)
        changed.append(np.abs(a - b).sum())
    assert not resting.levels(0).any()
    assert (np.array(changed)[levels == 0] == 0).all()
    assert np.corrcoef(changed, levels)[0, 1] > 0.8


@pytest.mark.parametrize("kind", KINDS)
def test_candidates_are_drawn_where_the_plan_says(kind):
    plan = scene((kind,), (1.6, 0))
    places = plan.places + np.linspace(0, 5, plan.frames)[:, None]
    plan = replace(plan, places=places)
    nobody = replace(plan, candidates=(), places=places[:0])
    painters = [Painter(p, rng(1)) for p in (plan, nobody)]
    in_the_air = plan.levels(0) > 0.15  # a ball on the ground is flat
    for i, (x, y) in enumerate(plan.positions()[0]):
        a, b = (np.asarray(painter.frame(i), int) for painter in painters)
        rows, columns = np.nonzero(np.abs(a - b).sum(-1) > 40)
        assert abs((columns.min() + columns.max() + 1) / 2 - x) < 2
        if kind == "bouncer":  # below it is its shadow
            assert not in_the_air[i] or abs(rows.min() - (y - 0.95 * 20)) < 2
        else:
            assert abs((rows.min() + rows.max() + 1) / 2 - y) < 2


# ---- who is heard


def test_only_who_is_heard_sounds():
    """Both move all the time. Their voices are drawn anew here: what a projection finds of them is tone, not chance."""
    plan = scene(("pulser", "bouncer"), (1.5, 0), (3, 1), (4.5, 0), (6, SILENCE))
    samples = synthesize(plan, rng(0))
    voices = np.stack([voice(c, len(samples), rng(9)) for c in plan.candidates], 1)
    for segment in plan.segments[:3]:
        inside = slice(round((segment.start + 0.02) * SAMPLE_RATE), round((segment.stop - 0.02) * SAMPLE_RATE))
        shares, *_ = np.linalg.lstsq(voices[inside], samples[inside], rcond=None)
        assert shares[segment.heard] > 0.7
        assert abs(shares[1 - segment.heard]) < 0.05
    silence = samples[round(4.52 * SAMPLE_RATE) :]
    assert silence.std() == pytest.approx(NOISE, rel=0.05)
    assert np.abs(silence).max() < 6 * NOISE
    assert np.abs(samples).max() <= 1
    assert len(samples) == 6 * SAMPLE_RATE


def test_off_screen_somebody_else_is_heard():
    plan = scene(("pulser", "bouncer"), (3, OFF_SCREEN))
    samples = synthesize(plan, rng(0))
    assert samples.std() > 5 * NOISE
    voices = np.stack([voice(c, len(samples), rng(9)) for c in plan.candidates], 1)
    shares, *_ = np.linalg.lstsq(voices, samples, rcond=None)
    assert np.abs(shares).max() < 0.05


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        (("pulser", "bouncer"), {"talker"}),
        (("talker", "talker"), {"bouncer", "pulser"}),
        (("bouncer", "pulser", "talker"), set(KINDS)),
    ],
)
def test_off_screen_is_a_kind_that_is_not_seen_if_there_is_one(monkeypatch, seen, expected):
    heard = []

    def spy(c: Candidate, n: int, _: np.random.Generator) -> np.ndarray:
        heard.append(c.kind)
        return np.zeros(n)

    monkeypatch.setattr(sound, "voice", spy)
    plan = replace(scene(("pulser",), (1, OFF_SCREEN)), candidates=tuple(candidate(kind) for kind in seen))
    for seed in range(40):
        synthesize(plan, rng(seed))
    assert set(heard) == expected


# ---- plans


def test_segments_change_who_is_heard():
    seen = set()
    for plan in random_plans(100):
        starts, stops = [s.start for s in plan.segments], [s.stop for s in plan.segments]
        assert starts == [0.0, *stops[:-1]]
        assert starts[-1] < plan.seconds <= stops[-1]
        for segment, following in zip(plan.segments, plan.segments[1:], strict=False):
            assert segment.heard < 0 or segment.heard != following.heard
        for segment in plan.segments:
            assert segment.heard < 0 or segment.moving[segment.heard]
            middle = np.array([(segment.start + min(segment.stop, plan.seconds)) / 2])
            assert plan.heard(middle) == segment.heard
            seen.add(segment.heard)
    assert seen == {OFF_SCREEN, SILENCE, 0, 1, 2, 3}


def test_sight_alone_cannot_tell_who_is_heard():
    """Most who are silent move, and those who move do it as much as who is heard."""
    moving = []
    motion: dict[bool, list[float]] = {True: [], False: []}
    for plan in random_plans(300):
        heard = plan.heard(plan.times)
        for k in range(len(plan.candidates)):
            moving += [s.moving[k] for s in plan.segments if s.heard != k]
            levels, moves = plan.levels(k), plan.moves(k, plan.times)
            for sounds in (True, False):
                motion[sounds] += levels[moves & ((heard == k) == sounds)].tolist()
    assert np.mean(moving) == pytest.approx(SILENT_MOTION, abs=0.04)
    assert np.mean(motion[True]) == pytest.approx(np.mean(motion[False]), rel=0.05)


def test_who_does_not_move_rests_once_its_event_is_over():
    moving = scene(("bouncer",), (2, 0), (4, SILENCE))
    plan = replace(moving, segments=(moving.segments[0], replace(moving.segments[1], moving=(False,))))
    rhythm = plan.candidates[0].rhythm
    last = np.flatnonzero(rhythm.start < 2)[-1]
    over = plan.times > rhythm.start[last] + rhythm.length[last]
    assert not plan.levels(0)[over].any()
    np.testing.assert_array_equal(plan.levels(0)[~over], moving.levels(0)[~over])


def test_larger_ones_are_lower():
    for kind in KINDS:
        pairs = sorted((c.radius, c.pitch) for plan in random_plans(100) for c in plan.candidates if c.kind == kind)
        assert (np.diff([pitch for _, pitch in pairs]) < 0).all()
        assert pairs[0][1] > 2 * pairs[-1][1]


def test_candidates_are_kept_apart_and_in_the_picture():
    counts = set()
    gaps = []
    for plan in random_plans(100):
        radii = np.array([c.radius for c in plan.candidates])
        apart = np.linalg.norm(plan.places[:, None] - plan.places[None], axis=-1).min(-1) - np.add.outer(radii, radii)
        gaps.append(apart[~np.eye(len(radii), dtype=bool)].min())
        inside = np.minimum(plan.places, [WIDTH, HEIGHT] - plan.places).min((1, 2))
        assert (inside > 0.75 * radii).all()
        counts.add(len(radii))
    assert min(gaps) > 0
    assert np.median(gaps) > 24
    assert counts == {2, 3, 4}


# ---- viewers


def test_most_viewers_follow_the_sound_a_quarter_of_a_second_late():
    """Two distant candidates that do not move, so that only the sound tells."""
    plan = scene(("talker", "talker"), (2, 0), (4, 1), moving=False)
    points = np.concatenate([gaze(plan, rng(seed)) for seed in range(40)])
    near = np.linalg.norm(points[None] - plan.positions()[:, None], axis=-1) < 2 * 20
    left, right = near.mean(1)

    def frame(seconds: float) -> int:
        return round((2 + seconds) * FPS)

    # all followers but for lapses, and some of the others
    for share, other, part in ((left, right, slice(10, 51)), (right, left, slice(frame(0.6), None))):
        assert share[part] == pytest.approx(FOLLOWERS / VIEWERS, abs=0.1)
        assert other[part].max() < 0.2
    np.testing.assert_allclose(left[frame(0) : frame(0.2) + 1], left[frame(-0.4) : frame(0)].mean(), atol=0.05)
    crossing = (np.argmax(right > left) - frame(0)) / FPS
    assert 0.2 < crossing <= 0.3 + 1 / FPS
    assert right[frame(0.32)] > 0.55


def test_viewers_stay_in_the_picture():
    plan = scene(("talker", "talker"), (2, 0), (4, 1))
    corners = np.array([[[0, 0]], [[WIDTH - 1, HEIGHT - 1]]]) + np.zeros((2, plan.frames, 2))
    points = gaze(replace(plan, places=corners), rng(0))
    assert points.shape == (VIEWERS, plan.frames, 2)
    assert points.min() == 0
    assert (points.max((0, 1)) == [WIDTH - 1, HEIGHT - 1]).all()
    for i in range(plan.frames):
        fixation_map(points[:, i])


def test_density_is_a_gaussian_of_one_degree_a_viewer():
    points = np.array([[0, 0], [100.3, 50.8], [104, 55], [319, 179], [200, 170.5]])
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    one_degree = WIDTH / 30
    total = sum(np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * one_degree**2)) for x, y in points)
    map_ = density(points)
    assert map_.shape == (HEIGHT, WIDTH)
    assert map_.max() == 1
    np.testing.assert_allclose(map_, total / np.max(total), atol=1e-12)


def test_fixation_map_marks_each_place_once():
    points = np.array([[0, 0], [319, 179], [318.6, 178.7], [10.4, 20.6], [11.4, 20.6]])
    marked = fixation_map(points)
    assert marked.dtype == np.uint8
    assert marked.shape == (HEIGHT, WIDTH)
    assert np.argwhere(marked == 1).tolist() == [[0, 0], [21, 10], [21, 11], [179, 319]]
    assert marked.sum() == 4


def test_hearing_is_worth_something():
    """Who knows the speaker predicts better than who looks at all that moves."""
    hearing, seeing = [], []
    for seed, plan in enumerate(random_plans(30, seconds=4)):
        points, positions = gaze(plan, rng(1000 + seed)), plan.positions()
        seen = plan.times - 0.25
        heard = plan.heard(seen)
        moves = np.stack([plan.moves(k, seen) for k in range(len(positions))])
        for i in range(10, plan.frames, 10):
            if heard[i] >= 0:
                truth = density(points[:, i])
                hearing.append(cc(density(positions[[heard[i]], i]), truth))
                seeing.append(cc(density(positions[moves[:, i], i]), truth))
    assert np.mean(hearing) > np.mean(seeing) + 0.1
    assert np.mean(hearing) > 0.8


# ---- on disk


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For reading only."""
    out = tmp_path_factory.mktemp("scenes") / "set"
    write_scenes(out, VIDEOS, SEED, seconds=1, workers=2)
    return out


@pytest.fixture(scope="module")
def videos(written: Path) -> list[Video]:
    both = [v for part in ("train", "test") for v in read_list(written, "Scenes", part, 1)]
    return sorted(both, key=lambda v: v.name)


def files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_the_layouts_readers_read_it(videos):
    report = check(videos, deep=True)
    assert report.problems == []
    assert (report.videos, report.frames, report.skipped) == (VIDEOS, 25 * VIDEOS, 0)
    clips = Clips(videos, DEMO)
    assert len(clips) == 3 * VIDEOS  # windows at 1, 5 and 9 of 25 frames
    for i in range(len(clips)):
        clip = clips[i]
        assert clip["TARGET"].max() == 1
        assert clip["VIDEO"].float().std() > 5
        assert 0 < clips.ground_truth(i).fixations.sum() <= VIEWERS


def test_each_split_tests_on_other_videos(written, videos):
    names = {v.name for v in videos}
    tests: list[str] = []
    for split in (1, 2, 3):
        train, test = ({v.name for v in read_list(written, "Scenes", part, split)} for part in ("train", "test"))
        assert train | test == names
        assert not train & test
        tests += test
    assert len(tests) == len(set(tests)) == 4  # of 7
    assert len(names) == VIDEOS


def test_frames_maps_and_sound_on_disk_are_of_one_moment(videos):
    video = videos[2]
    for_plan, for_pictures, for_sound, for_viewers = streams(SEED, 2)
    plan = make_plan(for_plan, 1)
    painter, points = Painter(plan, for_pictures), gaze(plan, for_viewers)
    painted = np.stack([np.asarray(painter.frame(i), np.int16) for i in range(25)])
    for i in range(25):
        distance = np.abs(painted - read_frame(video.frame(i + 1))).mean((1, 2, 3))
        assert distance.argmin() == i
        np.testing.assert_array_equal(read_fixations(video.fixations(i + 1)), fixation_map(points[:, i]) > 0)
        np.testing.assert_allclose(read_density(video.map(i + 1)), density(points[:, i]), atol=0.03)
    samples = synthesize(plan, for_sound)
    assert len(samples) == SAMPLE_RATE
    np.testing.assert_allclose(read_sound(video.sound), samples, atol=1e-4)


def test_a_scene_as_a_film_is_the_scene_in_the_folder(videos, tmp_path):
    """The model sees and hears the same in both, but for what the codecs lose."""
    write_film(tmp_path / "scene.mp4", SEED, 2, seconds=1)
    in_folder = Clips([videos[2]], DEMO, stride=4)
    with Film(tmp_path / "scene.mp4") as film:
        in_film = list(read_clips(film, DEMO, stride=4))
    assert len(in_film) == len(in_folder) == 3
    frames = np.stack([in_folder[i]["VIDEO"].numpy() for i in range(3)]).astype(np.int16)
    for i, clip in enumerate(in_film):
        distances = np.abs(frames - clip.video).mean((1, 2, 3, 4))
        assert distances[i] < 3
        assert distances.argmin() == i
        assert clip.time_s == pytest.approx((4 * i + 8) / FPS)
        own = in_folder[i]["AUDIO"].numpy()
        assert np.corrcoef(clip.audio, own)[0, 1] > 0.98
        assert np.corrcoef(clip.audio, np.roll(own, 8))[0, 1] < 0.9  # half a millisecond


def test_a_seed_makes_the_same_bytes_however_many_workers_and_videos(written, tmp_path):
    write_scenes(tmp_path / "again", 2, SEED, seconds=1, workers=1)
    first, again = files(written), {n: b for n, b in files(tmp_path / "again").items() if "scene_" in n}
    assert len(again) == 2 * (3 * 25 + 1)
    for path, content in again.items():
        assert content == first[path], path
    assert not any(b"Created on" in content[:128] for content in again.values())


def test_another_seed_or_number_is_another_scene(written, tmp_path):
    write_scenes(tmp_path / "other", 1, SEED + 1, seconds=1, workers=1)
    first, other = files(written), {n: b for n, b in files(tmp_path / "other").items() if "scene_" in n}
    for path, content in other.items():
        assert content != first[path], path
        assert content != first[path.replace("scene_0000", "scene_0001")], path
        assert first[path] != first[path.replace("scene_0000", "scene_0001")], path


def test_an_earlier_set_is_replaced(tmp_path):
    out = tmp_path / "set"
    out.mkdir()  # empty is as good as new
    seen: list[tuple[int, int]] = []
    write_scenes(out, 2, seconds=1, workers=2, progress=lambda *done: seen.append(done))
    assert seen == [(1, 2), (2, 2)]
    assert [p.name for p in sorted((out / "video_frames" / "Scenes").iterdir())] == ["scene_0000", "scene_0001"]
    before = files(out)
    write_scenes(out, 1, seed=8, seconds=1.2, workers=1)
    after = files(out)
    assert len(after) == 3 * 30 + 1 + 6 + 1
    assert not any("scene_0001" in path for path in after)
    picture = "video_frames/Scenes/scene_0000/img_00001.jpg"
    assert after[picture] != before[picture]
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


# ---- what cannot be done


@pytest.mark.parametrize(
    ("number", "seconds", "message"),
    [
        (0, 2, "videos 0 is"),
        (-3, 2, "videos -3 is"),
        (1.5, 2, "videos 1.5 is no int"),
        (1, 0.5, "0.5 s"),
        (1, 601, "601 s"),
        (1, float("nan"), "nan s"),
    ],
)
def test_settings_out_of_range(tmp_path, number, seconds, message):
    with pytest.raises(UserError, match=message):
        write_scenes(tmp_path / "set", number, seconds=seconds)
    for seed, workers in ((-1, None), (0, 0), (0, -2)):
        with pytest.raises(UserError, match="is out of range"):
            write_scenes(tmp_path / "set", 1, seed, workers=workers)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_something_else_is_left_alone(tmp_path, kind):
    out = tmp_path / "mine"
    if kind == "file":
        out.write_text("a letter")
    else:
        out.mkdir()
        Image.new("L", (2, 2)).save(out / "photo.png")
    before = files(tmp_path)
    with pytest.raises(UserError, match=r"mine exists and is not an earlier set"):
        write_scenes(out, 1, seconds=1)
    assert files(tmp_path) == before


@pytest.mark.parametrize("name", ["video_frames/AVAD", "fold_lists/AVAD_list_train_1_fps.txt", "runs"])
def test_a_data_set_beside_the_scenes_is_not_lost(tmp_path, name):
    """docs/training.md has all data sets in one folder."""
    out = tmp_path / "data"
    write_scenes(out, 1, seconds=1)
    write_scenes(out, 1, seed=1, seconds=1)  # scenes alone are replaced
    (out / name).mkdir(parents=True)
    before = files(tmp_path)
    with pytest.raises(UserError, match=rf"data would be replaced, but holds .*{name} too: move that"):
        write_scenes(out, 1, seconds=1)
    assert files(tmp_path) == before


def test_where_no_folder_can_be(tmp_path):
    (tmp_path / "file").write_text("a letter")
    with pytest.raises(UserError, match=r"set cannot be written .*choose another folder"):
        write_scenes(tmp_path / "file" / "set", 1, seconds=1)
    assert list(files(tmp_path)) == ["file"]


def lives(pid: int) -> bool:
    """Ended, it may be a zombie where nobody asks after it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(done: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_killed_run_leaves_no_process_and_its_folder_goes(tmp_path):
    out = tmp_path / "set"
    command = [sys.executable, "-m", "mubic_deploy.cli", "scenes", str(out), "--videos", "50", "--workers", "2"]
    process = subprocess.Popen(
        [*command, "--seconds", "2"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        wait_until(lambda: len(list(tmp_path.glob(".set.*.new/video_frames/Scenes/*"))) >= 2, 120)
        lists = Path(f"/proc/{process.pid}/task").glob("*/children")
        workers = [int(pid) for path in lists for pid in path.read_text().split()]
        assert len([pid for pid in workers if lives(pid)]) == 2
        process.kill()
        process.wait()
        wait_until(lambda: not any(lives(pid) for pid in workers), 60)
        write_scenes(out, 1, seconds=1, workers=1)
        assert [p.name for p in tmp_path.iterdir()] == ["set"]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def interrupt(done: int, total: int) -> None:
    raise KeyboardInterrupt


def kill_worker(done: int, total: int) -> None:
    multiprocessing.active_children()[0].kill()


def full_disk(done: int, total: int) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("progress", "error", "message"),
    [
        (interrupt, KeyboardInterrupt, None),
        (kill_worker, UserError, "worker process was killed"),
        (full_disk, UserError, r"set cannot be written \(No space left"),
    ],
)
@pytest.mark.parametrize("earlier", [False, True])
def test_a_failure_leaves_all_as_it_was(tmp_path, progress, error, message, earlier):
    out = tmp_path / "set"
    if earlier:
        out.mkdir()
        (out / write.MARK).write_text("{}")
    before = files(tmp_path)
    with pytest.raises(error, match=message):
        write_scenes(out, 3, seconds=1, workers=1, progress=progress)
    assert files(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["set"] * earlier
