"""Saliency metrics against pysaliency, against the definitions written out as loops, and against hand-worked maps."""

import itertools
import math

import numpy as np
import pytest
from pysaliency import metrics as pysaliency
from pysaliency.roc import general_roc

from mubic_deploy.errors import UserError
from mubic_deploy.metrics import auc_judd, auc_shuffled, cc, mean_per_video, nss, sim

pytestmark = pytest.mark.filterwarnings("error")  # NaN is told by the value, not by a division's warning
SIZE = (18, 32)
METRICS = [cc, sim, nss, auc_judd, lambda p, f: auc_shuffled(p, f, f), lambda p, f: auc_shuffled(p, f, f, levels=None)]
NAMES = ["cc", "sim", "nss", "auc_judd", "auc_shuffled", "auc_shuffled_exact"]


def _maps() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    uniform = rng.random(SIZE)
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    spike = np.zeros(SIZE)
    spike[4, 9] = 1.0
    return {
        "uniform": uniform,
        "float32": uniform.astype(np.float32),
        "uint8": (255 * uniform).astype(np.uint8),
        "quantised": np.round(4 * uniform) / 4,
        "two_values": (uniform > 0.5).astype(float),
        "peak": np.exp(-((y - 6) ** 2 + (x - 20) ** 2) / 8),
        "spike": spike,
        "negative": rng.normal(-3, 2, SIZE),
        "tiny": 1e-200 * uniform,  # its squares are 0 in float64
        "offset": 1e6 + uniform,
    }


MAPS = _maps()


def _fixations(count: int, seed: int = 0) -> np.ndarray:
    fixated = np.zeros(SIZE, bool)
    fixated.ravel()[np.random.default_rng(seed).choice(fixated.size, count, replace=False)] = True
    return fixated


def _scaled(values: np.ndarray) -> np.ndarray:
    values = values.astype(float)
    return (values - values.min()) / (values.max() - values.min())


def _large(values: np.ndarray) -> np.ndarray:
    """`tiny` as large as the others, whose deviation pysaliency would find to be 0."""
    return values * 1e200 if values.max() < 1e-100 else values


def _area(curve: list[tuple[float, float]]) -> float:
    """Of a curve of (false, true) positive rates, by trapezoids."""
    return sum((right - left) * (low + high) / 2 for (left, low), (right, high) in itertools.pairwise(curve))


def _judd_without_ties(values: np.ndarray, fixated: np.ndarray) -> float:
    """The reference's curve, one loop over the fixated values as thresholds; values [n], all different."""
    curve = [(0.0, 0.0)]
    for threshold in sorted(values[fixated], reverse=True):
        curve.append(((values[~fixated] >= threshold).mean(), (values[fixated] >= threshold).mean()))
    return _area([*curve, (1.0, 1.0)])


def _judd_over_all_orders(values: np.ndarray, fixated: np.ndarray) -> float:
    """Mean of the reference's areas over all orders that a jitter can give equal values. values, fixated [n]."""
    groups = [fixated[values == value] for value in np.unique(values)]
    # which places within its group the fixated pixels take: all choices are as likely
    choices = [list(itertools.combinations(range(len(group)), int(group.sum()))) for group in groups]
    areas = []
    for choice in itertools.product(*choices):
        labels = [place in places for group, places in zip(groups, choice, strict=True) for place in range(len(group))]
        areas.append(_judd_without_ties(np.arange(len(labels)), np.array(labels)))
    return float(np.mean(areas))


def _shuffled_over_all_draws(values: np.ndarray, fixated: np.ndarray, others: np.ndarray) -> float:
    """Mean of the reference's areas over all draws of as many negatives as fixations; thresholds every 0.1."""
    values = _scaled(values)
    positives, pool = values[fixated], values[others > 0]
    areas = []
    for draw in itertools.combinations(pool, min(len(positives), len(pool))):
        curve = [(0.0, 0.0)]
        for threshold in [k / 10 for k in range(10, -1, -1)]:
            curve.append((float(np.mean(np.array(draw) >= threshold)), float(np.mean(positives >= threshold))))
        areas.append(_area([*curve, (1.0, 1.0)]))
    return float(np.mean(areas))


# against pysaliency


@pytest.mark.parametrize("target", ["uniform", "peak", "quantised", "spike", "negative"])
@pytest.mark.parametrize("name", MAPS)
def test_cc_is_that_of_pysaliency_and_numpy(name, target):
    prediction = MAPS[name]
    expected = np.corrcoef(_scaled(prediction).ravel(), MAPS[target].ravel())[0, 1]
    assert cc(prediction, MAPS[target]) == pytest.approx(expected, abs=1e-9)
    expected = pysaliency.CC(_large(prediction), MAPS[target])
    assert cc(prediction, MAPS[target]) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("target", ["uniform", "peak", "quantised", "spike", "negative"])
@pytest.mark.parametrize("name", MAPS)
def test_sim_is_that_of_pysaliency_once_both_maps_start_at_0(name, target):
    expected = pysaliency.SIM(_scaled(MAPS[name]), _scaled(MAPS[target]))
    assert sim(MAPS[name], MAPS[target]) == pytest.approx(expected, abs=1e-9)


def test_sim_is_that_of_pysaliency_on_negative_maps_as_they_are():
    # there pysaliency subtracts the minimum too
    first, second = MAPS["negative"], MAPS["uniform"] - 0.5
    assert sim(first, second) == pytest.approx(pysaliency.SIM(first, second), abs=1e-9)


@pytest.mark.parametrize("count", [1, 20, 576])
@pytest.mark.parametrize("name", MAPS)
def test_nss_is_that_of_pysaliency(name, count):
    fixated = _fixations(count)
    y, x = np.nonzero(fixated)
    expected = pysaliency.NSS(_large(MAPS[name]), x, y).mean()
    assert nss(MAPS[name], fixated) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("count", [1, 2, 20, 575])
@pytest.mark.parametrize("name", ["uniform", "float32", "negative", "offset", "tiny"])
def test_auc_judd_is_the_curve_of_pysaliency_with_fixated_thresholds(name, count):
    fixated, values = _fixations(count), MAPS[name].astype(float)
    assert np.unique(values).size == values.size  # pysaliency leaves ties as they are, the reference jitters
    expected = general_roc(values[fixated], values[~fixated], judd=1)[0]
    assert auc_judd(MAPS[name], fixated) == pytest.approx(expected, abs=1e-9)
    assert _judd_without_ties(values.ravel(), fixated.ravel()) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("count", [1, 20, 576])
@pytest.mark.parametrize("name", [*MAPS, "constant"])
def test_auc_shuffled_at_every_value_is_the_curve_of_pysaliency(name, count):
    prediction = np.full(SIZE, 0.3) if name == "constant" else MAPS[name]
    fixated, others = _fixations(count), _fixations(90, seed=1)
    values = prediction.astype(float)
    expected = general_roc(values[fixated], values[others])[0]
    assert auc_shuffled(prediction, fixated, others, levels=None) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("levels", [10, 4])
@pytest.mark.parametrize("count", [1, 20, 576])
@pytest.mark.parametrize("name", MAPS)
def test_auc_shuffled_in_levels_is_the_curve_of_pysaliency_on_the_levels(name, count, levels):
    fixated, others = _fixations(count), _fixations(90, seed=1)
    thresholds = np.arange(levels + 1) / levels
    level = (_scaled(MAPS[name])[..., None] >= thresholds).sum(-1).astype(float)
    expected = general_roc(level[fixated], level[others])[0]
    assert auc_shuffled(MAPS[name], fixated, others, levels=levels) == pytest.approx(expected, abs=1e-9)


# against the definitions


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("values", [1, 2, 3, 4])
def test_auc_judd_averages_over_every_order_of_ties(values, seed):
    rng = np.random.default_rng(seed)
    prediction = rng.integers(0, values, (3, 4))
    fixated = np.zeros(12, bool)
    fixated[rng.choice(12, rng.integers(1, 6), replace=False)] = True
    expected = _judd_over_all_orders(prediction.ravel(), fixated)
    assert auc_judd(prediction, fixated.reshape(3, 4)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", ["quantised", "two_values", "spike", "uint8"])
def test_auc_judd_is_the_mean_of_jittered_maps(name):
    fixated = _fixations(20).ravel()
    rng = np.random.default_rng(3)
    prediction = _scaled(MAPS[name]).ravel()
    areas = [_judd_without_ties(prediction + rng.random(prediction.size) * 1e-7, fixated) for _ in range(500)]
    assert abs(auc_judd(MAPS[name], _fixations(20)) - np.mean(areas)) <= 5 * np.std(areas) / math.sqrt(len(areas))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("values", [2, 5, 256])
def test_auc_shuffled_averages_over_every_draw_of_negatives(values, seed):
    rng = np.random.default_rng(seed)
    prediction = rng.integers(0, values, (4, 5)).astype(np.uint8)
    prediction[0, :2] = 0, values - 1  # not constant
    fixated = np.zeros((4, 5), bool)
    fixated.ravel()[rng.choice(20, 1 + seed, replace=False)] = True
    others = rng.integers(0, 3, (4, 5)) * (rng.random((4, 5)) < 0.6)
    assert others.any()
    expected = _shuffled_over_all_draws(prediction, fixated, others)
    assert auc_shuffled(prediction, fixated, others) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("metric", METRICS[2:], ids=NAMES[2:])
def test_fixations_count_once_in_any_type(metric):
    fixated = _fixations(20)
    expected = metric(MAPS["uniform"], fixated)
    for same in (fixated.astype(np.uint8) * 255, fixated * 3, fixated.astype(np.float32)):
        assert metric(MAPS["uniform"], same) == expected


# by hand


def test_cc_by_hand():
    # deviations (-1.5, -0.5, 0.5, 1.5) and (-1.5, -0.5, 1.5, 0.5): 4 / 5
    assert cc(np.array([[1, 2], [3, 4]]), np.array([[1, 2], [4, 3]])) == pytest.approx(0.8)


def test_sim_by_hand():
    # (0, 0, 1/4, 3/4) and (0, 1/4, 3/4, 0); without the subtraction (1, 1, 2, 4)/8 would have 3/8 in common
    target = np.array([[0, 1], [3, 0]])
    assert sim(np.array([[0, 0], [1, 3]]), target) == pytest.approx(0.25)
    assert sim(np.array([[1, 1], [2, 4]]), target) == pytest.approx(0.25)
    assert sim(target * 7 - 2, target) == pytest.approx(1.0)
    assert sim(np.array([[1, 0], [0, 0]]), target) == 0.0


def test_nss_by_hand():
    # mean 2.5, population variance 1.25 (ddof 1 would give 1.162)
    prediction = np.array([[1, 2], [3, 4]], np.uint8)
    assert nss(prediction, np.array([[0, 0], [0, 1]])) == pytest.approx(1.5 / math.sqrt(1.25))
    assert nss(prediction, np.array([[1, 0], [1, 0]])) == pytest.approx(-0.5 / math.sqrt(1.25))
    assert nss(prediction, np.ones((2, 2))) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("prediction", "fixated", "expected"),
    [
        # (0, 0), (1/3, 1), (1, 1): the line from (0, 0) is slanted, so not Mann-Whitney's 2/3
        ([[1, 2], [3, 4]], [[0, 0], [1, 0]], 5 / 6),
        ([[1, 2], [3, 4]], [[0, 0], [0, 1]], 1.0),
        ([[1, 2], [3, 4]], [[1, 0], [0, 0]], 0.5),
        # (0, 0), (0, 1/2), (1, 1), (1, 1)
        ([[1, 2], [3, 4]], [[1, 0], [0, 1]], 3 / 4),
        # the jittered pixel has 0, 1, 2 or 3 of 3 above it: 1 - (0 + 1 + 2 + 3) / 3 / 4 / 2
        ([[5, 5], [5, 5]], [[0, 1], [0, 0]], 3 / 4),
        # orders NPP, PNP, PPN of the three 1s: 5/8, 7/8, 1
        ([[1, 1], [1, 0]], [[1, 1], [0, 0]], 5 / 6),
    ],
)
def test_auc_judd_by_hand(prediction, fixated, expected):
    assert auc_judd(np.array(prediction), np.array(fixated)) == pytest.approx(expected)


def test_auc_shuffled_by_hand():
    prediction = np.array([[0, 1, 2], [3, 4, 5], [6, 7, 10]])
    fixated = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0]])  # 3 and 7
    others = np.array([[0, 9, 0], [0, 0, 1], [0, 1, 0]])  # 1, 5 and 7, the first nine times
    # 7: above 1 and 5, equal to 7; 3: above 1. By count it would be 19.5/22, without the 7 in both 3/4.
    for levels in (10, None):
        assert auc_shuffled(prediction, fixated, others, levels) == pytest.approx(3.5 / 6)


def test_auc_shuffled_has_ten_levels_unless_told_otherwise():
    prediction = np.array([[0.0, 0.01], [0.09, 1.0]])
    fixated, others = np.array([[0, 0], [1, 0]]), np.array([[0, 1], [0, 0]])
    assert auc_shuffled(prediction, fixated, others) == 0.5
    assert auc_shuffled(prediction, fixated, others, levels=None) == 1.0


def test_a_value_at_a_threshold_is_above_it():
    # 153 / 255 is 0.6, 152 / 255 is below
    prediction = np.array([[0, 152], [153, 255]], np.uint8)
    assert auc_shuffled(prediction, np.array([[0, 0], [1, 0]]), np.array([[0, 1], [0, 0]])) == 1.0


# undefined


@pytest.mark.parametrize("value", [0.0, 0.1, -2.0, 1e-200])
def test_a_constant_map_has_no_cc_nss_nor_sim_unless_zero_and_an_auc(value):
    constant, fixated, others = np.full((360, 640), value), np.zeros((360, 640), bool), np.ones((360, 640))
    fixated[10:12, 20:22] = True
    varied = np.arange(360 * 640.0).reshape(360, 640)
    for metric in (cc, sim) if value else (cc,):  # 0.1's mean over 230 400 pixels is not 0.1
        assert math.isnan(metric(constant, varied))
        assert math.isnan(metric(varied, constant))
        assert math.isnan(metric(constant, constant))
    assert math.isnan(nss(constant, fixated))
    assert auc_judd(constant, fixated) == pytest.approx(0.5 + 0.5 / 5)
    for levels in (10, None):
        assert auc_shuffled(constant, fixated, others, levels) == 0.5


def test_a_map_of_zeros_shares_nothing():
    # the reference's similarity.m scales a map only if any of it is not zero
    zeros, varied, constant = np.zeros(SIZE), MAPS["uniform"], np.full(SIZE, 0.3)
    for pair in ((zeros, varied), (varied, zeros), (zeros, zeros)):
        assert sim(*pair) == 0.0
    assert math.isnan(sim(zeros, constant))
    assert math.isnan(sim(constant, zeros))


@pytest.mark.parametrize("metric", METRICS, ids=NAMES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_value_that_is_not_finite_gives_nan(metric, bad):
    # neither fixated nor among the others: a metric that looks at those pixels only would give a number
    prediction, fixated = MAPS["uniform"].copy(), _fixations(20)
    prediction[tuple(np.argwhere(~fixated)[0])] = bad
    assert math.isnan(metric(prediction, fixated))
    prediction[:] = bad
    assert math.isnan(metric(prediction, fixated))


@pytest.mark.parametrize("metric", [cc, sim])
def test_a_target_that_is_not_finite_gives_nan(metric):
    target = MAPS["peak"].copy()
    target[3, 3] = math.nan
    assert math.isnan(metric(MAPS["uniform"], target))


@pytest.mark.parametrize("metric", METRICS[2:], ids=NAMES[2:])
def test_no_fixation_gives_nan(metric):
    assert math.isnan(metric(MAPS["uniform"], np.zeros(SIZE, bool)))


def test_levels_that_are_none():
    fixations = np.eye(4, dtype=bool)
    for levels in (0, -3, 2.5):
        with pytest.raises(UserError, match=f"levels {levels} is "):
            auc_shuffled(np.eye(4), fixations, ~fixations, levels=levels)  # type: ignore[arg-type]


def test_no_negative_gives_nan():
    assert math.isnan(auc_judd(MAPS["uniform"], np.ones(SIZE, bool)))
    for levels in (10, None):
        assert math.isnan(auc_shuffled(MAPS["uniform"], _fixations(20), np.zeros(SIZE), levels))


# wrong


@pytest.mark.parametrize("metric", METRICS, ids=NAMES)
@pytest.mark.parametrize("size", [(36, 64), (32, 18)])
def test_sizes_that_differ_are_named_with_the_remedy(metric, size):
    with pytest.raises(UserError, match=rf"\[18, 32\] .*\[{size[0]}, {size[1]}\].*resize the prediction") as refused:
        metric(MAPS["uniform"], np.ones(size))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("shape", [(576,), (1, 18, 32), (0, 32)])
def test_what_is_no_map_is_refused(shape):
    for metric in METRICS:
        with pytest.raises(UserError, match="not maps"):
            metric(np.ones(shape), np.ones(shape))


def test_others_of_another_size_are_refused():
    with pytest.raises(UserError, match=r"others \[18, 31\]"):
        auc_shuffled(MAPS["uniform"], _fixations(20), np.ones((18, 31)))


# averages


def test_videos_weigh_the_same_and_nan_is_left_out_and_counted():
    # a: 0.3 over two frames, b: 1 over one; over the three frames it would be 0.533
    values = {"a": [0.2, 0.4, math.nan], "b": [1.0], "c": [math.nan, math.nan], "d": []}
    mean, frames, videos = mean_per_video(values)
    assert mean == pytest.approx(0.65)
    assert (frames, videos) == (3, 2)


@pytest.mark.parametrize(("values", "frames", "videos"), [({}, 0, 0), ({"a": [math.nan]}, 1, 1)])
def test_the_mean_of_no_video_is_nan(values, frames, videos):
    mean, *left_out = mean_per_video(values)
    assert math.isnan(mean)
    assert left_out == [frames, videos]
