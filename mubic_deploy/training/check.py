"""Looks for what would stop a training hours later, or spoil it unsaid: see `check`. No PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mubic_deploy.config import SAMPLE_RATE
from mubic_deploy.errors import UserError
from mubic_deploy.media.sound import NOTABLE_S
from mubic_deploy.training.layout import (
    Video,
    listing,
    read_density,
    read_fixations,
    read_frame,
    read_size,
    read_sound,
    require_shape,
    sized,
)

TRAILING_S = 1.0  # sound after the last frame that is not worth a warning

Progress = Callable[[int, int], None]  # (videos done, of how many)


@dataclass
class Figures:
    videos: int = 0
    frames: int = 0
    skipped: int = 0  # frames without a density or a fixation map


@dataclass(frozen=True)
class CheckReport:
    """What `check` found. problems: one line each, with the data set, the video, the file and the remedy; warnings: the
    same, of what may be meant."""

    datasets: dict[str, Figures] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def videos(self) -> int:
        return sum(f.videos for f in self.datasets.values())

    @property
    def frames(self) -> int:
        return sum(f.frames for f in self.datasets.values())

    @property
    def skipped(self) -> int:
        return sum(f.skipped for f in self.datasets.values())

    def require(self) -> None:
        """UserError with the first problem and the number of the others, if there is any."""
        if self.problems:
            raise UserError(_first(self.problems, "problem"))

    def brief(self) -> list[str]:
        """One line with the first warning and the number of the others, if there is any."""
        return [_first(self.warnings, "warning")] if self.warnings else []


def _first(lines: list[str], what: str) -> str:
    more = len(lines) - 1
    return lines[0] + (f" (and {more} more {what}{'s' * (more > 1)})" if more else "")


def check(
    videos: Sequence[Video],
    progress: Progress = lambda done, total: None,
    deep: bool = False,
    *,
    pictures: bool = True,
    sounds: bool = True,
) -> CheckReport:
    """Looks for what would stop a training hours later: files that are missing or damaged, sizes that do not fit.

    All files must be there, but for up to half of a video's maps; not all maps of a video may be empty. Every picture's
    header and end are read, about 0.1 ms each; every sound and the first, middle and last picture and fixations are
    decoded, with `deep` all of them. A sound must last as long as its frames do, but for what `_check_sound` allows.

    pictures, sounds: whether to look at them. A model without an audio encoder reads no sound."""
    report = CheckReport()
    for done, video in enumerate(videos, 1):
        problems, skipped = _check_pictures(video, deep) if pictures else ([], 0)
        of_sound, warnings = _check_sound(video) if sounds else ([], [])
        report.problems.extend(f"{video}: {problem}" for problem in problems + of_sound)
        report.warnings.extend(f"{video}: {warning}" for warning in warnings)
        figures = report.datasets.setdefault(video.dataset, Figures())
        figures.videos += 1
        figures.frames += video.frames
        figures.skipped += skipped
        progress(done, len(videos))
    return report


def _check_pictures(video: Video, deep: bool) -> tuple[list[str], int]:
    """(problems, frames without a density or a fixation map)."""
    problems: list[str] = []
    frames = _present(video, video.frame, 0.0, "extract the frames again, or correct the fold list", problems)
    maps = _present(video, video.map, 0.5, "get the data set's annotations again", problems)
    fixations = _present(video, video.fixations, 0.5, "get the data set's annotations again", problems)
    both = sorted(set(maps) & set(fixations))
    if maps and fixations and not both:
        problems.append("no frame has both a density map and fixations: get the data set's annotations again")
    maps, fixations = both or maps, both or fixations
    frame_sizes = _sizes(read_frame, video.frame, frames, _sample(frames, deep), problems)
    map_sizes = _sizes(read_density, video.map, maps, _sample(maps, deep), problems)
    read = _sample(fixations, deep)
    fixation_sizes = _sizes(read_fixations, video.fixations, sorted(read), read, problems)
    problems += _one_size(video.frame, frame_sizes, "frames")
    problems += _one_size(video.map, map_sizes, "maps")
    for i in map_sizes.keys() & fixation_sizes.keys():
        if map_sizes[i] != fixation_sizes[i]:
            problems.append(
                f"{video.fixations(i)} is {sized(fixation_sizes[i])}, but its density map {sized(map_sizes[i])}: "
                f"get the data set's annotations again"
            )
            break
    if frame_sizes and map_sizes:
        problems += _one_shape(video, frame_sizes, map_sizes)
    if map_sizes:
        problems += _all_empty(video, map_sizes)
    return problems, video.frames - len(both)


def _check_sound(video: Video) -> tuple[list[str], list[str]]:
    """(problems, warnings). Excerpts are cut where `fps` says, and beyond the sound's end is silence: so a sound that
    does not last as long as the frames is one, or a wrong `fps`.

    A problem if half of it or more is missing, or half as much again or more is too much, and that is over 0.25 s.
    Else a warning if over 0.25 s are missing, or over 1 s too much: releases keep some sound after the last frame.
    Frames beyond those that the list names, as where somebody tries the first few, have their sound too."""
    try:
        sound_s = len(read_sound(video.sound)) / SAMPLE_RATE
        last = _last_frame(video)
    except UserError as error:
        return [str(error)], []
    shown_s = video.frames / video.fps
    lasts = f"{video.sound} lasts {sound_s:.2f} s, its {video.frames} frames at {video.fps:g} fps {shown_s:.2f} s"
    if sound_s < shown_s - NOTABLE_S:
        short = f"{lasts}, the rest would be silence: extract the sound again, or correct fps in the fold list"
        return ([short], []) if sound_s <= shown_s / 2 else ([], [short])
    long = f"{lasts}, so it may be heard too late or too early: correct fps in the fold list, or cut the sound"
    if last > video.frames:
        shown_s = last / video.fps
        long = (
            f"{video.sound} lasts {sound_s:.2f} s, the {last} frames that are there at {video.fps:g} fps "
            f"{shown_s:.2f} s, so it may be heard too late or too early: correct fps in the fold list, or cut the sound"
        )
    if sound_s > shown_s + NOTABLE_S and sound_s >= 1.5 * shown_s:
        return [long], []
    return [], [long] if sound_s > shown_s + TRAILING_S else []


def _last_frame(video: Video) -> int:
    """Up to which number frames are there, those that the list names taken for granted."""
    names, last = listing(video.frame(1).parent), video.frames
    while video.frame(last + 1).name in names:
        last += 1
    return last


def _present(
    video: Video, file: Callable[[int], Path], tolerated: float, remedy: str, problems: list[str]
) -> list[int]:
    """The frames whose `file` exists. It is a problem if more than the tolerated part of them does not, or if somebody
    began to count at 0."""
    try:
        names = listing(file(1).parent)
    except UserError as error:
        problems.append(str(error))
        return []
    if file(0).name in names:
        problems.append(f"{file(0)} is there, but numbers begin with 1: number them anew, or remove it")
    if not names:
        problems.append(f"{file(1).parent} does not exist or is empty: {remedy}")
        return []
    present = [i for i in range(1, video.frames + 1) if file(i).name in names]
    missing = video.frames - len(present)
    if missing > tolerated * video.frames:
        found = set(present)
        first = next(i for i in range(1, video.frames + 1) if i not in found)
        problems.append(f"{file(first)} does not exist ({missing} of {video.frames} are missing): {remedy}")
    return present


def _sizes(
    read: Callable[[Path], np.ndarray],
    file: Callable[[int], Path],
    numbers: Iterable[int],
    decoded: Collection[int],
    problems: list[str],
) -> dict[int, tuple[int, int]]:
    """(height, width) by frame of what is not damaged: as `read` where it is to be decoded, else by the header."""
    sizes: dict[int, tuple[int, int]] = {}
    for i in numbers:
        try:
            height, width = read(file(i)).shape[:2] if i in decoded else read_size(file(i))
        except UserError as error:
            problems.append(str(error))
        else:
            sizes[i] = height, width
    return sizes


def _one_size(file: Callable[[int], Path], sizes: dict[int, tuple[int, int]], kind: str) -> list[str]:
    first = next(iter(sizes.values()), None)
    for i, size in sizes.items():
        if first is not None and size != first:
            return [f"{file(i)} is {sized(size)}, but earlier {kind} are {sized(first)}: make them all of one size"]
    return []


def _one_shape(video: Video, frames: dict[int, tuple[int, int]], maps: dict[int, tuple[int, int]]) -> list[str]:
    i, size = next(iter(maps.items()))
    frame = next(iter(frames.values()))
    try:
        require_shape(video.map(i), size, frame)
    except UserError as error:
        return [str(error)]
    return []


def _all_empty(video: Video, maps: Iterable[int]) -> list[str]:
    """A problem if no map shows anything. As a rule the first one does, and no other is read."""
    try:
        if any(read_density(video.map(i)).any() for i in maps):
            return []
    except UserError as error:
        return [str(error)]
    return [f"all maps in {video.map(1).parent} are empty: get the data set's annotations again"]


def _sample(numbers: list[int], deep: bool) -> set[int]:
    return set(numbers) if deep else {*numbers[:1], *numbers[len(numbers) // 2 :][:1], *numbers[-1:]}
