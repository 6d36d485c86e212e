"""Evaluation against maps, scores and means that are known beforehand; the adaptive steps' fit; pictures of a run."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from field_data import Spec, corner, write_field
from matplotlib.axes import Axes
from PIL import Image
from scipy.io import savemat

from mubic_deploy import metrics
from mubic_deploy.config import DEMO, Config
from mubic_deploy.engines import cpu
from mubic_deploy.errors import UserError
from mubic_deploy.training import curves, samples
from mubic_deploy.training import evaluate as evaluation
from mubic_deploy.training.clips import Clips
from mubic_deploy.training.evaluate import DRAWN, Evaluation, centre_bias, evaluate, evaluate_maps, video_means
from mubic_deploy.training.layout import Video, read_density


class Known:
    """A predictor that knows each clip by its bytes, and says what `answer` makes of its index and target [h, w]."""

    def __init__(self, clips: Clips, answer: Callable[[int, np.ndarray], np.ndarray] = lambda _, target: target):
        self.config: Config = clips.config
        self.default_steps = 4
        self.maps: dict[bytes, np.ndarray] = {}
        self.calls: list[tuple[int, Any, Any]] = []  # batch, seed, steps
        for i in range(len(clips)):
            item = clips[i]
            key = item["VIDEO"].numpy().tobytes() + item["AUDIO"].numpy().tobytes()
            self.maps[key] = answer(i, item["TARGET"][0].numpy())

    def predict(
        self, video: np.ndarray, audio: np.ndarray, seed: np.ndarray | int = 0, steps: np.ndarray | int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        self.calls.append((len(video), seed, steps))
        maps = np.stack([self.maps[v.tobytes() + a.tobytes()] for v, a in zip(video, audio, strict=True)])
        return maps, np.full((len(video), 1), 4 if steps is None else steps, np.int32)


def random_maps(index: int, target: np.ndarray) -> np.ndarray:
    return np.random.default_rng(index).random(target.shape, np.float32)


@pytest.fixture
def clips(shared: list[Video]) -> Clips:
    """7 of them: 3, 3 and 1."""
    return Clips(shared, DEMO)


def of(name: str) -> str:
    return f"Scenes/{name}"


def write_map(path: Path, size: tuple[int, int], *blocks: tuple[int, int, int, int]) -> None:
    """A density map of squares: row, column, side, grey. On the grid of 8 pixels JPEG keeps them as they are."""
    grey = np.zeros(size, np.uint8)
    for row, column, side, level in blocks:
        grey[row : row + side, column : column + side] = level
    Image.fromarray(grey).save(path, quality=100)


# ---- scores and their means


def test_perfect_predictions(clips):
    result = evaluate(Known(clips), clips)
    assert {video: len(scores) for video, scores in result.values["cc"].items()} == {
        of("one"): 3,
        of("two"): 3,
        of("short"): 1,
    }
    assert result.clips == 7
    means = result.means()
    assert means["cc"] > 0.99
    assert means["sim"] > 0.9
    assert means["auc_judd"] > 0.95
    assert means["nss"] > 3
    assert set(result.excluded().values()) == {0}


def test_videos_count_alike_whatever_their_number_of_clips(clips):
    result = evaluate(Known(clips, lambda i, target: -target if i == 6 else target), clips)  # the clip of `short`
    # (1 + 1 - 1) / 3, not (6 - 1) / 7
    assert result.means()["cc"] == pytest.approx(1 / 3, abs=0.01)


def test_means_by_hand():
    result = Evaluation()
    for video, cc, sim in (("a", 1.0, 0.5), ("a", 0.5, math.nan), ("b", 0.1, math.nan), ("c", math.nan, 0.1)):
        result.add(video, {"cc": cc, "sim": sim})
    assert result.means() == pytest.approx({"cc": (0.75 + 0.1) / 2, "sim": 0.3})
    assert result.excluded() == {"cc": 1, "sim": 2}
    assert result.clips == 4
    assert result.mean_steps == 0


def test_parts_by_hand():
    result = Evaluation()
    for video, cc in (("AVAD/a", 1.0), ("AVAD/a", 0.5), ("AVAD/b", 0.1), ("DIEM/a", math.nan), ("DIEM/c", 0.3)):
        result.add(video, {"cc": cc, "sim": 2 * cc})
    datasets = {name: (part.means()["cc"], part.clips) for name, part in result.by_dataset().items()}
    assert datasets == {"AVAD": (pytest.approx((0.75 + 0.1) / 2), 3), "DIEM": (pytest.approx(0.3), 2)}
    videos = {name: part.means() for name, part in result.by_video().items()}
    assert list(videos) == ["AVAD/a", "AVAD/b", "DIEM/a", "DIEM/c"]
    assert videos["AVAD/a"] == pytest.approx({"cc": 0.75, "sim": 1.5})
    assert math.isnan(videos["DIEM/a"]["cc"])


def test_maps_are_kept_as_they_are_scored(clips):
    kept: dict[tuple[str, int], np.ndarray] = {}
    result = evaluate(Known(clips, random_maps), clips, keep=lambda t, x: kept.update({(str(t.video), t.frame): x}))
    assert len(kept) == len(clips) == 7
    for i in range(7):
        truth = clips.ground_truth(i)
        saliency = kept[str(truth.video), truth.frame]
        assert saliency.shape == truth.density.shape
        assert metrics.cc(saliency, truth.density) in result.values["cc"][str(truth.video)]


def test_constant_maps_are_left_out_and_counted(clips):
    constant = evaluate(Known(clips, lambda i, t: np.full_like(t, 0.5) if i == 4 else t), clips)
    assert constant.excluded() == {"cc": 1, "nss": 1, "sim": 1, "auc_judd": 0, "auc_shuffled": 0}
    assert math.isnan(constant.values["cc"][of("two")][1])
    assert constant.means()["cc"] > 0.99


def test_frames_without_fixation_are_left_out_and_counted(field):
    savemat(field[0].fixations(13), {"eyeMap": np.zeros((36, 64), np.uint8)})
    clips = Clips(field, DEMO)
    result = evaluate(Known(clips), clips)
    assert result.excluded() == {"cc": 0, "nss": 1, "sim": 0, "auc_judd": 1, "auc_shuffled": 1}
    assert math.isnan(result.values["nss"][of("one")][1])  # frame 13
    assert result.means()["nss"] > 3


# ---- how the predictor is asked


@pytest.mark.parametrize("batch", [1, 2, 3, 7, 50])
def test_any_batch_gives_the_same(clips, batch):
    predictor = Known(clips, random_maps)
    seen: list[tuple[int, int]] = []
    result = evaluate(predictor, clips, batch=batch, progress=lambda *done: seen.append(done))
    sizes = [n for n, *_ in predictor.calls]
    assert max(sizes) == min(batch, 7)
    assert seen == [(done, 7) for done in range(1, 8)]
    assert result.values == evaluate(Known(clips, random_maps), clips).values
    assert sum(sizes) == 7


def test_any_number_of_threads_gives_the_same_and_asks_the_predictor_in_the_callers_own(clips, monkeypatch):
    class Own(Known):
        def predict(self, *args, **kwargs):
            assert threading.current_thread() is threading.main_thread()
            return super().predict(*args, **kwargs)

    results = []
    for cores in (1, 5):
        monkeypatch.setattr(cpu, "cores", lambda cores=cores: cores)
        results.append(evaluate(Own(clips, random_maps), clips, batch=2).values)
        results.append(evaluate_maps(lambda truth: random_maps(truth.frame, truth.density), clips).values)
    assert results[:2] == results[2:]
    assert not [t for t in threading.enumerate() if t.name.startswith("mubic-")]


@pytest.mark.parametrize("where", ["predictor", "clip", "fixations"])
def test_an_error_ends_it_and_leaves_no_thread(field, where):
    class Failing(Known):
        def predict(self, *args, **kwargs):
            if where == "predictor" and len(self.calls) == 2:
                raise UserError("the predictor is gone")
            return super().predict(*args, **kwargs)

    clips = Clips(field, DEMO)
    predictor = Failing(clips)
    if where == "clip":
        field[0].frame(20).unlink()
    if where == "fixations":
        field[0].fixations(13).unlink()
    text = {"predictor": "is gone", "clip": r"00020\.jpg", "fixations": r"fixMap_00013\.mat"}[where]
    with pytest.raises(UserError, match=text):
        evaluate(predictor, clips, batch=2)
    assert not [t for t in threading.enumerate() if t.name.startswith("mubic-")]


def test_nothing_to_evaluate_is_said(clips):
    for options, message in (
        ({"batch": 0}, "batch 0 is out of range: use 1 or more clips"),
        ({"batch": -1}, "batch -1 is out of range"),
        ({"indices": []}, "there is no clip to evaluate"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate(Known(clips), clips, **options)


def test_seed_and_steps_are_handed_on(clips):
    predictor = Known(clips)
    assert evaluate(predictor, clips, steps=3, seed=11, batch=4).steps_used == [3] * 7
    assert predictor.calls == [(4, 11, 3), (3, 11, 3)]
    result = evaluate(predictor, clips, [0, 6])
    assert predictor.calls[2:] == [(2, 0, None)]  # the model's own number
    assert result.mean_steps == 4
    assert set(result.values["cc"]) == {of("one"), of("short")}


def test_shuffled_is_left_out_where_it_is_not_wanted(clips):
    assert set(evaluate(Known(clips), clips, [0], shuffled=False).values) == {"cc", "nss", "sim", "auc_judd"}


# ---- at the ground truth's own size


@pytest.mark.parametrize("size", [(36, 64), (72, 128), (180, 320)])
def test_scores_are_at_the_ground_truths_size(tmp_path, size):
    clips = Clips(write_field(tmp_path, [Spec("v", frames=16, size=size)]), DEMO, fit="stretch")
    result = evaluate(Known(clips, random_maps), clips)
    truth = clips.ground_truth(0)
    assert truth.density.shape == size
    small = torch.from_numpy(random_maps(0, np.zeros((56, 96))))
    large = torch.nn.functional.interpolate(small[None, None], size, mode="bilinear")[0, 0].numpy()
    expected = np.corrcoef(large.ravel(), truth.density.ravel())[0, 1]
    assert result.values["cc"][of("v")] == [pytest.approx(expected, abs=1e-5)]
    y, x = corner(Spec("v", frames=16, size=size), 9)
    fixated = np.mean([large[y + 3, x + 3], large[y + 4, x + 5]])
    assert result.values["nss"][of("v")] == [pytest.approx((fixated - large.mean()) / large.std(), abs=1e-3)]


@pytest.mark.parametrize(("size", "bar"), [((64, 36), np.s_[:, :31]), ((36, 64), np.s_[:1])])
def test_what_is_in_the_bars_does_not_count(tmp_path, size, bar):
    clips = Clips(write_field(tmp_path, [Spec("v", size=size), Spec("w", size=size)]), DEMO)

    def peak_in_bar(_: int, target: np.ndarray) -> np.ndarray:
        out = target.copy()
        assert not out[bar].any()
        out[bar] = 50
        return out

    clean, barred = (evaluate(known, clips).values for known in (Known(clips), Known(clips, peak_in_bar)))
    assert clean == barred
    assert min(clean["cc"][of("v")]) > 0.98


# ---- shuffled AUC


def test_negatives_are_of_other_videos_and_the_same_for_every_model(tmp_path, monkeypatch):
    """Each fixation map says where it is from: its video by the row, its frame by the column."""
    specs = [Spec("a"), Spec("b", size=(72, 128)), Spec("c", frames=20)]
    videos = write_field(tmp_path, specs)
    for number, (spec, video) in enumerate(zip(specs, videos, strict=True)):
        factor = spec.size[0] // 36
        for i in range(1, spec.frames + 1):
            marked = np.zeros(spec.size, np.uint8)
            marked[(10 + number) * factor, i * factor] = 1
            savemat(video.fixations(i), {"eyeMap": marked})
    clips = Clips(videos, DEMO, stride=1)  # 9, 9 and 5 of them, labels from frame 9 on
    drawn: list[np.ndarray] = []

    def spy(prediction: np.ndarray, fixations: np.ndarray, others: np.ndarray) -> float:
        drawn.append(others)
        return 0.5

    monkeypatch.setattr(metrics, "auc_shuffled", spy)
    monkeypatch.setattr(cpu, "cores", lambda: 1)  # for the order of the calls
    evaluate(Known(clips), clips)
    first = drawn.copy()
    assert len(first) == 23
    chosen = set()
    for i, others in enumerate(first):
        mine = clips.ground_truth(i)
        factor = mine.fixations.shape[0] // 36
        assert others.shape == mine.fixations.shape
        places = np.argwhere(others) / factor
        rows = {int(row) - 10 for row, _ in places}
        assert len(places) == DRAWN  # no two of them coincide
        assert rows == {0, 1, 2} - {videos.index(mine.video)}
        assert all(9 <= column <= 17 and column == int(column) for _, column in places)
        chosen.add(others.tobytes())
    assert len(chosen) == 23  # drawn anew for each clip
    drawn.clear()
    evaluate(Known(clips, random_maps), clips, batch=5, steps=2, seed=9)
    evaluate_maps(lambda truth: truth.density, clips)
    for again in (drawn[:23], drawn[23:]):
        for a, b in zip(first, again, strict=True):
            np.testing.assert_array_equal(a, b)


def test_negatives_of_the_own_video_are_all_its_fixations_but_the_frames_own(tmp_path, monkeypatch):
    specs = [Spec("a"), Spec("b", frames=20)]
    videos = write_field(tmp_path, specs)
    for number, (spec, video) in enumerate(zip(specs, videos, strict=True)):
        for i in range(1, spec.frames + 1):
            marked = np.zeros(spec.size, np.uint8)
            marked[10 + number, i] = marked[30, 5] = 1  # one place of each frame alone, and one of all
            savemat(video.fixations(i), {"eyeMap": marked})
    videos[0].fixations(3).unlink()
    clips = Clips(videos, DEMO, stride=4)
    drawn: list[np.ndarray] = []

    def spy(prediction: np.ndarray, fixations: np.ndarray, others: np.ndarray) -> float:
        drawn.append(others)
        return 0.5

    monkeypatch.setattr(metrics, "auc_shuffled", spy)
    monkeypatch.setattr(cpu, "cores", lambda: 1)  # for the order of the calls
    evaluate(Known(clips), clips, negatives="video")
    evaluate_maps(lambda truth: truth.density, clips, negatives="video")
    assert len(drawn) == 2 * len(clips) > 8
    for index, others in enumerate(drawn):
        truth = clips.ground_truth(index % len(clips))
        number = videos.index(truth.video)
        frames = set(range(1, specs[number].frames + 1)) - {truth.frame} - ({3} if number == 0 else set())
        assert {tuple(place) for place in np.argwhere(others)} == {(10 + number, i) for i in frames}


@pytest.mark.parametrize("cores", [1, 5])
def test_the_fixations_of_the_own_video_are_read_once(field, monkeypatch, cores):
    """However many threads score its clips."""
    monkeypatch.setattr(cpu, "cores", lambda: cores)
    read: list[Path] = []
    read_fixations = evaluation.read_fixations

    def counted(path: Path) -> np.ndarray:
        read.append(path)
        return read_fixations(path)

    monkeypatch.setattr(evaluation, "read_fixations", counted)
    clips = Clips(field, DEMO, stride=1)
    evaluate(Known(clips), clips, negatives="video")
    assert len(read) == len(set(read)) == sum(video.frames for video in field)


def test_fixation_maps_of_different_sizes_in_one_video_and_unknown_negatives_are_refused(tmp_path):
    (video,) = write_field(tmp_path, [Spec("a", frames=16)])
    clips = Clips([video], DEMO)
    savemat(video.fixations(2), {"eyeMap": np.zeros((9, 16), np.uint8)})
    with pytest.raises(UserError, match=r"fixMap_00002.*is not of the size of the video's others"):
        evaluate_maps(lambda truth: truth.density, clips, negatives="video")
    with pytest.raises(UserError, match=r"unknown negatives 'mine': choose one of others, video"):
        evaluate_maps(lambda truth: truth.density, clips, negatives="mine")


def test_shuffled_auc_by_hand(tmp_path):
    """One fixation against another's: the map says which is higher."""
    videos = write_field(tmp_path, [Spec("a", frames=16), Spec("b", frames=16)])
    for video, column in zip(videos, (10, 50), strict=True):
        marked = np.zeros((36, 64), np.uint8)
        marked[20, column] = 1
        savemat(video.fixations(9), {"eyeMap": marked})
    clips = Clips(videos, DEMO)
    rising = np.broadcast_to(np.linspace(0, 1, 64, dtype=np.float32), (36, 64))
    result = evaluate_maps(lambda truth: rising, clips)
    assert result.values["auc_shuffled"] == {of("a"): [0], of("b"): [1]}


def test_one_video_has_no_negatives(shared):
    clips = Clips(shared[:1], DEMO)
    assert evaluate(Known(clips), clips).excluded()["auc_shuffled"] == 3


# ---- maps that need no model


def test_maps_of_the_truth_score_best(clips):
    result = evaluate_maps(lambda truth: truth.density, clips)
    assert result.means()["cc"] == pytest.approx(1)
    assert result.means()["sim"] == pytest.approx(1)
    assert result.clips == 7
    assert evaluate_maps(lambda truth: truth.density, clips, [6]).clips == 1


def test_centre_bias_weighs_every_map_alike(tmp_path):
    """A bright one, a faint one and one of four times as many pixels."""
    specs = [Spec("a", frames=16), Spec("b", frames=16), Spec("c", frames=16, size=(72, 128))]
    videos = write_field(tmp_path, specs)
    write_map(videos[0].map(9), (36, 64), (8, 8, 8, 200))
    write_map(videos[1].map(9), (36, 64), (8, 24, 8, 50))
    write_map(videos[2].map(9), (72, 128), (16, 96, 16, 200))  # at 8, 48 in the others
    clips = Clips(videos, DEMO)
    mean = centre_bias(clips)
    small, large = mean(clips.ground_truth(0)), mean(clips.ground_truth(2))
    assert small.shape == (36, 64)
    assert large.shape == (72, 128)
    for column in (8, 24, 48):
        np.testing.assert_allclose(small[10:14, column + 2 : column + 6], 1 / 3 / 64, rtol=0.05)
    assert small[20:].max() < 1e-5
    assert large[20:28, 20:28].mean() == pytest.approx(large[20:28, 100:108].mean(), rel=0.05)


def test_video_means_are_of_all_frames_of_each_video_alone(field):
    one, two, short = field
    for frame in range(1, 25):
        if frame not in (3, 4, 13, 24):
            one.map(frame).unlink()
    for frame, column, grey in ((3, 8, 200), (13, 24, 100), (24, 24, 50)):  # the label of one clip, and of none
        write_map(one.map(frame), (36, 64), (8, column, 8, grey))
    write_map(one.map(4), (36, 64))  # empty
    clips = Clips(field, DEMO)
    assert [clips.video(i) for i in range(len(clips))] == [one, two, two, two, short]
    mean = video_means(clips)
    map_ = mean(clips.ground_truth(0))
    np.testing.assert_allclose(map_[8:16, 8:16], 1 / 3 / 64, rtol=0.02)
    np.testing.assert_allclose(map_[8:16, 24:32], 2 / 3 / 64, rtol=0.02)
    assert map_[:, 48:].max() < 1e-5
    truths = [read_density(two.map(i)) for i in range(1, 25)]
    np.testing.assert_allclose(mean(clips.ground_truth(2)), np.mean([t / t.sum() for t in truths], 0), atol=1e-7)


def test_the_true_map_is_better_than_both_means(clips):
    centre, own, truth = (
        evaluate_maps(maps, clips).means()["cc"]
        for maps in (centre_bias(clips), video_means(clips), lambda truth: truth.density)
    )
    assert 0.3 < centre < 0.6
    assert 0.3 < own < 0.6
    assert truth == pytest.approx(1)


# ---- pictures


def test_samples_show_frame_truth_and_prediction(clips, tmp_path):
    """Perfect for the first clip; nothing for the second."""
    predictor = Known(clips, lambda i, target: target * (i == 0))
    picture = samples.draw(predictor, clips, [0, 5], seed=3)
    assert picture.dtype == np.uint8
    gap = samples.GAP
    assert picture.shape == (2 * (112 + gap), 3 * (192 + gap), 3)
    assert predictor.calls == [(1, 3, None)] * 2
    rows = picture.reshape(2, 112 + gap, 3, 192 + gap, 3)
    assert (rows[:, 112:] == 255).all()
    assert (rows[:, :, :, 192:] == 255).all()
    tiles = rows[:, :112, :, :192].swapaxes(1, 2)  # [row, column, 112, 192, 3]
    for row, index in enumerate((0, 5)):
        frame, truth = clips[index]["VIDEO"][8].numpy(), clips[index]["TARGET"][0].numpy()
        np.testing.assert_array_equal(tiles[row, 0], frame)
        covered = np.abs(tiles[row, 1].astype(int) - frame).sum(-1) > 0
        large = truth.repeat(2, 0).repeat(2, 1)
        assert covered[large > 0.4].all()
        assert not covered[large < 0.02].any()
    np.testing.assert_array_equal(tiles[0, 2], tiles[0, 1])
    np.testing.assert_array_equal(tiles[1, 2], tiles[1, 0])
    samples.save(picture, tmp_path / "samples" / "epoch_001.png")
    with Image.open(tmp_path / "samples" / "epoch_001.png") as image:
        np.testing.assert_array_equal(np.asarray(image), picture)


def history(epochs: int, first: float) -> list[dict[str, Any]]:
    names = ("loss", "learning_rate", "cc", "sim", "nss")
    return [{"epoch": e, **{name: first + k + e / 10 for k, name in enumerate(names)}} for e in range(1, epochs + 1)]


@pytest.mark.parametrize("runs", [history(3, 1), {"own": history(3, 1), "muted": history(2, 4)}, history(1, 1)])
def test_curves_show_every_run(tmp_path, monkeypatch, runs):
    drawn: list[tuple[Axes, list[int], list[float], str]] = []
    plot = Axes.plot

    def spy(self: Axes, x: list[int], y: list[float], **options: Any) -> Any:
        drawn.append((self, x, y, options["label"]))
        return plot(self, x, y, **options)

    monkeypatch.setattr(Axes, "plot", spy)
    path = tmp_path / "curves.png"
    curves.draw(runs, path)
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width > 3 * image.height
        assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 10
    named = runs if isinstance(runs, dict) else {"": runs}
    expected = [
        ([e["epoch"] for e in entries], [e[key] for e in entries], name)
        for key in ("loss", "learning_rate", "cc", "sim", "nss")
        for name, entries in named.items()
    ]
    assert [(x, y, label) for _, x, y, label in drawn] == expected
    panels = list(dict.fromkeys(axes for axes, *_ in drawn))
    assert [a.get_title() for a in panels] == ["training loss", "learning rate", "CC", "SIM", "NSS"]
    assert [a.get_yscale() for a in panels] == ["linear", "log", "linear", "linear", "linear"]
    assert (panels[0].get_legend() is not None) == (len(named) > 1)
