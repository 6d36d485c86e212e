"""Scenes on disk, in the field's data layout (training/layout.py)."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import wave
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

from mubic_deploy.config import SAMPLE_RATE, check_seed
from mubic_deploy.engines import cpu
from mubic_deploy.errors import UserError, whole
from mubic_deploy.folders import replacing
from mubic_deploy.scenes import plan as plans
from mubic_deploy.scenes.picture import Painter
from mubic_deploy.scenes.plan import FPS, streams
from mubic_deploy.scenes.sound import synthesize
from mubic_deploy.scenes.viewers import density, fixation_map, gaze
from mubic_deploy.training.layout import FIXATIONS, Video, fold_list
from mubic_deploy.training.settings import PARTS, SPLITS

DATASET = "Scenes"
MARK = "scenes.json"  # says how the folder was made
OF_VIDEOS, LISTS = ("video_frames", "video_audio", "annotations"), "fold_lists"
SHORTEST_S, LONGEST_S = 1.0, 600.0
MAT_TEXT = 116  # bytes of free text that a MATLAB file begins with
ENOUGH = 4  # videos, so that each split has some to train on and some to test on
TEST_SHARE = 5  # in each of the three splits every fifth video is a test video, another fifth each


def write_scenes(
    out: Path,
    videos: int,
    seed: int = 0,
    seconds: float = 6.0,
    workers: int | None = None,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> None:
    """`videos` scenes of `seconds` seconds into the folder `out`, with fold lists for three splits. The same seed gives
    the same scenes, whatever the number of worker processes (None: one a core); scene i of a seed is the same in every
    set.

    `out` may be new, empty or an earlier set of scenes and no more, which is replaced. UserError if it is something
    else, cannot be written, or a setting is out of range. Nothing is left behind unless all is written."""
    videos, seed = whole("videos", videos, 1), check_seed(seed)
    workers = cpu.cores() if workers is None else whole("workers", workers, 1)
    require_length(seconds)
    out = Path(out)
    try:
        _require_scenes(out)
        with replacing(out) as folder:
            jobs = [(folder, index, seed, seconds) for index in range(videos)]
            with ProcessPoolExecutor(workers, initializer=_end_with_parent) as pool:
                for done, _ in enumerate(pool.map(_write_one, jobs), 1):
                    progress(done, videos)
            _write_lists(folder, videos, round(seconds * FPS))
            settings = {"videos": videos, "seed": seed, "seconds": seconds}
            (folder / MARK).write_text(json.dumps(settings, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror or error}): choose another folder") from None
    except BrokenProcessPool:
        raise UserError("a worker process was killed, perhaps for want of memory: ask for fewer workers") from None


def require_length(seconds: float) -> None:
    """UserError unless a scene can be so long."""
    if not SHORTEST_S <= seconds <= LONGEST_S:
        raise UserError(f"scenes of {seconds:g} s cannot be made: ask for {SHORTEST_S:g} to {LONGEST_S:g} s")


def _require_scenes(out: Path) -> None:
    """UserError unless `out` is new, empty or a set of scenes alone: a data set that was put beside the scenes since
    would go with them."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / MARK).is_file():
        raise UserError(f"{out} exists and is not an earlier set of scenes: choose another folder")
    strange = [entry for entry in out.iterdir() if entry.name not in (MARK, LISTS, *OF_VIDEOS)]
    strange += [entry for part in OF_VIDEOS for entry in (out / part).glob("*") if entry.name != DATASET]
    strange += [entry for entry in (out / LISTS).glob("*") if not entry.name.startswith(f"{DATASET}_")]
    if strange:
        raise UserError(f"{out} would be replaced, but holds {min(strange)} too: move that, or choose another folder")


def name(index: int) -> str:
    """The name of scene `index` (from 0)."""
    return f"scene_{index:04d}"


def _end_with_parent() -> None:
    """In a worker process: if its parent is killed, nobody else would tell it that no more work comes."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _write_one(job: tuple[Path, int, int, float]) -> None:
    root, index, seed, seconds = job
    for_plan, for_pictures, for_sound, for_viewers = streams(seed, index)
    plan = plans.make_plan(for_plan, seconds)
    video = Video(root, DATASET, name(index), plan.frames, FPS)
    for path in (video.frame(1), video.sound, video.map(1), video.fixations(1)):
        path.parent.mkdir(parents=True, exist_ok=True)
    painter = Painter(plan, for_pictures)
    points = gaze(plan, for_viewers)
    for i in range(plan.frames):
        painter.frame(i).save(video.frame(i + 1), quality=90)
        grey = np.rint(255 * density(points[:, i])).astype(np.uint8)
        Image.fromarray(grey).save(video.map(i + 1), quality=95)
        _write_mat(video.fixations(i + 1), fixation_map(points[:, i]))
    _write_wav(video.sound, synthesize(plan, for_sound))


def _write_mat(path: Path, fixations: np.ndarray) -> None:
    with path.open("wb") as file:
        savemat(file, {FIXATIONS: fixations}, do_compression=True)
        file.seek(0)
        file.write(b"MATLAB 5.0 MAT-file".ljust(MAT_TEXT))  # SciPy writes the time here: no two files would be equal


def _write_wav(path: Path, samples: np.ndarray) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(np.rint(32767 * samples).astype("<i2").tobytes())


def _write_lists(root: Path, videos: int, frames: int) -> None:
    (root / LISTS).mkdir()
    for split in SPLITS:
        for part in PARTS:
            chosen = [i for i in range(videos) if (i % TEST_SHARE == split) == (part == "test")]
            lines = [f"{name(i)} {frames} {FPS}\n" for i in chosen]
            fold_list(root, DATASET, part, split).write_text("".join(lines))
