"""The field's evaluation: each metric a frame, the mean of a video, the mean over the videos."""

from __future__ import annotations

import functools
import itertools
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

from mubic_deploy import metrics
from mubic_deploy.beside import ahead, in_order
from mubic_deploy.engines import cpu
from mubic_deploy.errors import UserError, whole
from mubic_deploy.pipeline import Predictor, stacked
from mubic_deploy.training.clips import Clips, GroundTruth
from mubic_deploy.training.layout import Video, dataset_of, labelled, read_density, read_fixations
from mubic_deploy.training.settings import NEGATIVES, OTHERS

METRICS = ("cc", "nss", "sim", "auc_judd", "auc_shuffled")
DRAWN = 10  # frames of other videos whose fixations are negatives


@dataclass
class Evaluation:
    """values: metric -> video -> one number a clip, NaN where the metric is undefined; steps_used: one a clip, if there
    are steps."""

    values: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    steps_used: list[int] = field(default_factory=list)
    seconds: float = 0.0  # in the predictor, while other threads read clips and score maps

    @property
    def clips(self) -> int:
        return sum(len(scores) for scores in self.values.get("cc", {}).values())

    @property
    def mean_steps(self) -> float:
        return float(np.mean(self.steps_used)) if self.steps_used else 0.0

    def add(self, video: str, scores: dict[str, float]) -> None:
        for name, value in scores.items():
            self.values.setdefault(name, {}).setdefault(video, []).append(value)

    def means(self) -> dict[str, float]:
        """Each metric's mean over the videos of the videos' means."""
        return {name: metrics.mean_per_video(videos)[0] for name, videos in self.values.items()}

    def excluded(self) -> dict[str, int]:
        """How many clips each metric leaves out, because it is undefined for them."""
        return {name: metrics.mean_per_video(videos)[1] for name, videos in self.values.items()}

    def of(self, videos: Collection[str]) -> Evaluation:
        """The same of some of the videos, without steps and seconds."""
        return Evaluation({name: {v: of[v] for v in of if v in videos} for name, of in self.values.items()})

    def by_video(self) -> dict[str, Evaluation]:
        return {video: self.of({video}) for video in self.values.get("cc", {})}

    def by_dataset(self) -> dict[str, Evaluation]:
        """By the part of the videos' names that says so, in the order of the clips."""
        videos = self.values.get("cc", {})
        names = dict.fromkeys(dataset_of(video) for video in videos)
        return {name: self.of({video for video in videos if dataset_of(video) == name}) for name in names}


def evaluate(
    predictor: Predictor,
    clips: Clips,
    indices: Sequence[int] | None = None,
    *,
    steps: int | None = None,
    seed: int = 0,
    batch: int = 8,
    shuffled: bool = True,
    negatives: str = OTHERS,
    keep: Callable[[GroundTruth, np.ndarray], None] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Predicts the clips (all, or those of `indices`) and scores each map at its ground truth's own size. All clips
    start from the noise of `seed`, as the frames of a film do. shuffled: with the shuffled AUC, the slowest; negatives:
    its own, see `make_negatives`. keep: is given each map, float32 [H, W] in [0, 1], as it is scored, by several
    threads. UserError if there is no clip, for a batch below 1, and as of `Predictor.predict` and `Clips`.

    While a batch is predicted, in the caller's thread, others read the next clips and score the maps before."""
    chosen = list(range(len(clips)) if indices is None else indices)
    if not chosen:
        raise UserError("there is no clip to evaluate: give videos with maps, or indices")
    whole("batch", batch, 1, unit=" clips")
    result, of = Evaluation(), make_negatives(clips, negatives)

    def predicted(items: Iterator[dict[str, torch.Tensor]]) -> Iterator[tuple[int, np.ndarray]]:
        for first in range(0, len(chosen), batch):
            part = chosen[first : first + batch]
            clip = list(itertools.islice(items, len(part)))
            video, audio = (stacked(predictor, [item[name].numpy() for item in clip]) for name in ("VIDEO", "AUDIO"))
            began = time.perf_counter()
            maps, used = predictor.predict(video, audio, seed, steps)
            result.seconds += time.perf_counter() - began
            result.steps_used += [int(n) for n in used[:, 0]]
            yield from zip(part, maps, strict=True)

    def scored(item: tuple[int, np.ndarray]) -> tuple[str, dict[str, float]]:
        index, saliency = item
        truth = clips.ground_truth(index)
        prediction = truth.fit.back(saliency, truth.density.shape)
        if keep is not None:
            keep(truth, prediction)
        return str(truth.video), score(prediction, truth, of(index, truth) if shuffled else None)

    with (
        closing(ahead(map(clips.inputs, chosen), batch)) as items,
        closing(in_order(scored, predicted(items), batch + cpu.cores(), cpu.cores())) as scores,
    ):
        for done, (video, values) in enumerate(scores, 1):
            result.add(video, values)
            progress(done, len(chosen))
    return result


def evaluate_maps(
    maps: Callable[[GroundTruth], np.ndarray],
    clips: Clips,
    indices: Sequence[int] | None = None,
    *,
    negatives: str = OTHERS,
) -> Evaluation:
    """Scores maps [H, W] that need no model: what any prediction must beat. Several threads ask `maps` for them.
    negatives: see `make_negatives`."""
    chosen = range(len(clips)) if indices is None else indices
    result, of = Evaluation(), make_negatives(clips, negatives)

    def scored(index: int) -> tuple[str, dict[str, float]]:
        truth = clips.ground_truth(index)
        return str(truth.video), score(maps(truth), truth, of(index, truth))

    with closing(in_order(scored, chosen, 2 * cpu.cores(), cpu.cores())) as scores:
        for video, values in scores:
            result.add(video, values)
    return result


def centre_bias(clips: Clips) -> Callable[[GroundTruth], np.ndarray]:
    """One map for all frames: the mean of all the clips' true maps. The strongest map that looks at nothing."""
    mean = _mean(clips.ground_truth(i).density for i in range(len(clips)))
    return lambda truth: _scaled(mean, truth.density.shape)


def video_means(clips: Clips) -> Callable[[GroundTruth], np.ndarray]:
    """One map for all frames of a video: the mean of the true maps of all its frames, whatever the clips' stride. Right
    about where, never about when."""
    videos = {clips.video(i) for i in range(len(clips))}
    means = {video: _mean(read_density(video.map(i)) for i in labelled(video)) for video in videos}
    return lambda truth: _scaled(means[truth.video], truth.density.shape)


def _mean(densities: Iterable[np.ndarray]) -> np.ndarray:
    """Mean of the maps that are not empty at the size of the first, each of sum 1 there."""
    total, count = np.zeros(()), 0
    for density in densities:
        if not density.any():
            continue
        scaled = _scaled(density, total.shape) if count else density
        total = total + scaled / scaled.sum()
        count += 1
    return total / count


def _scaled(saliency: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The map at another size, bilinear."""
    if saliency.shape == shape:
        return saliency
    image = Image.fromarray(saliency.astype(np.float32))
    return np.asarray(image.resize((shape[1], shape[0]), Image.Resampling.BILINEAR))


def score(prediction: np.ndarray, truth: GroundTruth, others: np.ndarray | None = None) -> dict[str, float]:
    """The metrics of one map [H, W]; those that need other frames' fixations, bool [H, W], where they are given."""
    scores = {
        "cc": metrics.cc(prediction, truth.density),
        "nss": metrics.nss(prediction, truth.fixations),
        "sim": metrics.sim(prediction, truth.density),
        "auc_judd": metrics.auc_judd(prediction, truth.fixations),
    }
    if others is not None:
        scores["auc_shuffled"] = metrics.auc_shuffled(prediction, truth.fixations, others)
    return scores


Negatives = Callable[[int, GroundTruth], np.ndarray]


def make_negatives(clips: Clips, kind: str) -> Negatives:
    """What gives the shuffled AUC's negatives, bool [H, W], for a clip's index and ground truth.

    others  fixations of DRAWN frames of other videos: a map of where people look in general gains nothing by it
    video   those of all frames of the same video but the frame's own, as in STAViS's evaluation (createShuffmap1.m)
            and so in the tables that follow it: a map of where people look in this video gains nothing either, and
            figures are much lower

    UserError for another kind."""
    if kind not in NEGATIVES:
        raise UserError(f"unknown negatives {kind!r}: choose one of {', '.join(NEGATIVES)}")
    if kind == OTHERS:
        return _Others(clips)
    return _own_video()


def _own_video() -> Negatives:
    looked_at = functools.lru_cache(maxsize=8)(_looked_at)  # a video's clips come one after the other
    alone = threading.Lock()  # or threads that come together read the same files

    def of(_: int, truth: GroundTruth) -> np.ndarray:
        with alone:
            places = looked_at(truth.video, truth.fixations.shape)
        return places & ~truth.fixations

    return of


def _looked_at(video: Video, shape: tuple[int, ...]) -> np.ndarray:
    """bool [H, W]: where anybody looks in any frame of the video whose fixations are there."""
    out = np.zeros(shape, bool)
    for path in (video.fixations(i) for i in range(1, video.frames + 1)):
        if not path.is_file():
            continue
        fixations = read_fixations(path)
        if fixations.shape != shape:
            raise UserError(f"{path} is not of the size of the video's others: get the data set's annotations again")
        out |= fixations
    return out


class _Others:
    """Fixations of DRAWN frames of other videos, drawn by the clip's index alone, so the same for every model. Each
    frame's are kept when they were read."""

    def __init__(self, clips: Clips) -> None:
        self._clips = clips
        self._known: dict[int, tuple[tuple[int, ...], np.ndarray]] = {}  # by clip: the map's size, its [row, column]s

    def __call__(self, index: int, truth: GroundTruth) -> np.ndarray:
        shape = truth.fixations.shape
        out = np.zeros(shape, bool)
        mine, found = self._clips.video(index), 0
        for other in np.random.Generator(np.random.Philox(key=index)).permutation(len(self._clips)):
            if found == DRAWN:
                break
            if self._clips.video(int(other)) == mine:
                continue
            found += 1
            size, places = self._places(int(other))
            rows, columns = places.T
            out[rows * shape[0] // size[0], columns * shape[1] // size[1]] = True
        return out

    def _places(self, index: int) -> tuple[tuple[int, ...], np.ndarray]:
        if index not in self._known:
            fixations = self._clips.ground_truth(index).fixations
            self._known[index] = fixations.shape, np.argwhere(fixations)
        return self._known[index]
