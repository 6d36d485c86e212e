"""Saliency metrics, in NumPy: of one predicted map, and their mean over videos.

They follow the MIT benchmark's reference code (Bylinskii et al., "What do different evaluation metrics tell us about
saliency models?", TPAMI 2019), which audio-visual saliency is reported with. Nothing is drawn at random: where the
reference jitters the map or samples negatives, the value here is the one its draws average to.

prediction, target: real [h, w], any scale. fixations, others: bool or 0/1 or counts [h, w]; a pixel above 0 is fixated,
however often. All of one size, else UserError. NaN where a metric is undefined, as each function says, and for every
prediction that is not finite.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from mubic_deploy.errors import UserError, whole


def cc(prediction: np.ndarray, target: np.ndarray) -> float:
    """Pearson's correlation of two maps [h, w] (eq. 3.59), in [-1, 1]; NaN if one of them is constant."""
    prediction, target = _pair(prediction, target, "target")
    a, b = _scaled(prediction).ravel(), _scaled(target).ravel()
    a, b = a - a.mean(), b - b.mean()
    # no dot products of NumPy's BLAS, whose threads spin for 100 ms afterwards
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


def sim(prediction: np.ndarray, target: np.ndarray) -> float:
    """Similarity: what two maps [h, w], each of sum 1, have in common (eq. 3.61), in [0, 1]. A map of zeros
    shares nothing: 0, unless the other is constant. NaN if one is constant at another value.

    Before that each map is scaled to [0, 1], as in the reference: else a model that gives every pixel something would
    gain by it. (pysaliency subtracts the minimum only where it is negative.)"""
    prediction, target = _pair(prediction, target, "target")
    return float(np.minimum(_share(prediction), _share(target)).sum())


def nss(prediction: np.ndarray, fixations: np.ndarray) -> float:
    """Normalised scanpath saliency: mean of the standardised map [h, w] over the fixated pixels (eq. 3.60), unbounded,
    0 by chance; NaN without fixation or if the prediction is constant.

    The deviation is the population's (ddof 0), that of pysaliency; MATLAB's std, by one pixel less, gives the factor
    sqrt(1 - 1 / hw): 2e-6 less at 360 x 640."""
    prediction, fixations = _pair(prediction, fixations, "fixations")
    fixated = fixations > 0
    if not fixated.any():
        return math.nan
    a = _scaled(prediction)
    return float((a[fixated].mean() - a.mean()) / a.std())


def auc_judd(prediction: np.ndarray, fixations: np.ndarray) -> float:
    """AUC-Judd: area under the ROC curve of fixated pixels against all others, in [0, 1]; NaN if no pixel or every
    pixel is fixated.

    The reference jitters equal values apart, takes a threshold at each fixated value only and joins the points with
    straight lines. So its area is not Mann-Whitney's P(fixated > other) + P(equal) / 2, which pysaliency reports, but
    that plus P(other > lowest fixated) / 2N for N fixated pixels: 0.25 more for a constant map and one fixation, about
    0.01 more for 20. The published figures have it, so it is here too, averaged over the jitter."""
    prediction, fixations = _pair(prediction, fixations, "fixations")
    fixated = fixations > 0
    positives, negatives = prediction[fixated], prediction[~fixated]
    if not (positives.size and negatives.size and np.isfinite(prediction).all()):
        return math.nan
    lowest = positives.min()
    # of k equal fixated values, jittered, a negative of the same value lies above the lowest with k / (k + 1)
    k = np.count_nonzero(positives == lowest)
    above = np.count_nonzero(negatives > lowest) + np.count_nonzero(negatives == lowest) * k / (k + 1)
    return _mann_whitney(positives, negatives) + above / negatives.size / (2 * positives.size)


def auc_shuffled(prediction: np.ndarray, fixations: np.ndarray, others: np.ndarray, levels: int | None = 10) -> float:
    """Shuffled AUC: area under the ROC curve of this frame's fixated pixels against those of `others`, in [0, 1], 0.5
    by chance; NaN if one of the two has no fixation.

    others: fixations of other frames or videos, counts or 0/1 [h, w]. As in the reference the negatives are the union
    of their places, each once (pysaliency weighs by count), and a place may be both positive and negative: clear this
    frame's own in `others` where they are in it (STAViS does). The reference draws as many negatives as there are
    fixations, 100 times; the area is linear in them, so all of them at once give the mean of its draws.

    levels: thresholds at 0, 1/levels .. 1 of the map scaled to [0, 1]. The reference's 10 are coarse: on a map with a
    narrow peak most values fall into the lowest level, and the area towards 0.5. None sets one at every value
    (Mann-Whitney, pysaliency). A constant prediction scores 0.5 either way (NaN in the reference)."""
    if levels is not None:
        whole("levels", levels, 1)
    prediction, fixations = _pair(prediction, fixations, "fixations")
    _, others = _pair(prediction, others, "others")
    positives, negatives = prediction[fixations > 0], prediction[others > 0]
    low, high = float(prediction.min()), float(prediction.max())
    if not (positives.size and negatives.size and math.isfinite(high - low)):
        return math.nan
    if levels is not None and high > low:
        thresholds = np.arange(levels + 1) / levels
        positives, negatives = (
            np.searchsorted(thresholds, (values.astype(np.float64) - low) / (high - low), side="right")
            for values in (positives, negatives)
        )
    return _mann_whitney(positives, negatives)


def mean_per_video(values: Mapping[str, Sequence[float]]) -> tuple[float, int, int]:
    """Mean over videos of each video's mean over its frames, without NaN.

    values: video -> a metric of each of its frames -> (mean, frames left out for NaN, videos left out because no frame
    is left). The mean is NaN if no video is left."""
    means: list[float] = []
    frames = 0
    for video in values.values():
        every = np.asarray(video, np.float64)
        valid = every[~np.isnan(every)]
        frames += every.size - valid.size
        if valid.size:
            means.append(float(valid.mean()))
    return (float(np.mean(means)) if means else math.nan), frames, len(values) - len(means)


def _pair(prediction: np.ndarray, other: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Both as arrays; UserError unless they are maps [h, w] of one size."""
    a, b = np.asarray(prediction), np.asarray(other)
    if a.ndim != 2 or a.shape != b.shape or not a.size:
        raise UserError(
            f"the prediction is {list(a.shape)} and the {name} {list(b.shape)}, not maps [h, w] of one size: "
            f"resize the prediction to the {name}"
        )
    return a, b


def _scaled(values: np.ndarray) -> np.ndarray:
    """float64, scaled to [0, 1]; NaN everywhere if constant or not finite."""
    low, high = float(values.min()), float(values.max())
    if not (math.isfinite(high - low) and high > low):
        return np.full(values.shape, math.nan)
    return (values.astype(np.float64) - low) / (high - low)


def _share(values: np.ndarray) -> np.ndarray:
    """float64, scaled to [0, 1], then to the sum 1; a map of zeros as it is; NaN everywhere if otherwise constant."""
    if not values.any():
        return np.zeros(values.shape)
    scaled = _scaled(values)
    return np.asarray(scaled / scaled.sum())


def _mann_whitney(positives: np.ndarray, negatives: np.ndarray) -> float:
    """P(positive > negative) + P(equal) / 2 over all pairs: the area under the ROC curve with every value a threshold.

    Both [n], of one dtype: ranks need no float64, and float32 sorts four times as fast."""
    negatives = np.sort(negatives)
    below = np.searchsorted(negatives, positives, side="left")
    not_above = np.searchsorted(negatives, positives, side="right")
    return float((below + not_above).mean() / (2 * negatives.size))
