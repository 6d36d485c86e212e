"""Clips against data whose frame numbers, places and times can be read from the values themselves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from field_data import LEVEL, SPECS, Spec, corner, fixations, write_field
from PIL import Image
from torch.utils.data import DataLoader

from mubic_deploy.config import AUDIO_SAMPLES, DEMO, get_config
from mubic_deploy.errors import UserError
from mubic_deploy.media.fit import BAR, Fit, make_fit
from mubic_deploy.training import clips as clips_module
from mubic_deploy.training.clips import Clips
from mubic_deploy.training.layout import read_density, read_sound


def shown(clip: dict[str, torch.Tensor]) -> list[float]:
    """The frame numbers that a letterboxed clip shows, by the background near its lower left corner."""
    return (clip["VIDEO"][:, -8:-4, 2:6].float().mean((1, 2, 3)) / LEVEL).tolist()


def centre(image: np.ndarray) -> np.ndarray:
    """(y, x) of the centre of mass in pixels, pixel centres at half integers."""
    rows, columns = [np.arange(n) + 0.5 for n in image.shape]
    return np.array([rows @ image.sum(1), columns @ image.sum(0)]) / image.sum()


def test_windows_and_labels(shared):
    clips = Clips(shared, DEMO)  # stride 4
    # 24 frames: windows at 1, 5, 9; 6 frames: one window, the last frame repeated
    assert len(clips) == 7
    labels = [(clips.ground_truth(i).video.name, clips.ground_truth(i).frame) for i in range(7)]
    assert labels == [("one", 9), ("one", 13), ("one", 17), ("two", 9), ("two", 13), ("two", 17), ("short", 6)]
    np.testing.assert_allclose(shown(clips[1]), range(5, 21), atol=0.3)
    np.testing.assert_allclose(shown(clips[6]), [1, 2, 3, 4, 5] + [6] * 11, atol=0.3)
    assert sum(clips.skipped.values()) == 0
    clip = clips[1]
    for name, dtype, shape in (
        ("VIDEO", torch.uint8, (16, 112, 192, 3)),
        ("AUDIO", torch.float32, (16608,)),
        ("TARGET", torch.float32, (1, 56, 96)),
    ):
        assert clip[name].dtype == dtype
        assert clip[name].shape == shape
    with pytest.raises(IndexError):
        clips[7]


def test_neighbours_read_a_frame_once(shared, monkeypatch):
    read: list[Path] = []
    read_small = clips_module._read_small

    def counted(path: Path, fit: Fit) -> np.ndarray:
        read.append(path)
        return read_small(path, fit)

    monkeypatch.setattr(clips_module, "_read_small", counted)
    clips = Clips(shared, DEMO, stride=4)
    order = [0, 1, 3, 4, 0]  # of the first video two, of the second two, one of the first
    assert [str(clips.video(i)) for i in order] == [f"Scenes/{v}" for v in ("one", "one", "two", "two", "one")]
    counts = []
    for index in order:
        read.clear()
        inputs = clips.inputs(index)
        counts.append(len(read))
        whole = Clips(shared, DEMO, stride=4)[index]
        assert inputs.keys() == whole.keys() - {"TARGET"}
        assert all(inputs[name].equal(whole[name]) for name in inputs)
    assert counts == [16, 4, 16, 4, 16]


@pytest.mark.parametrize(("video", "stride", "index"), [(0, 4, 1), (0, 1, 4), (1, 4, 0), (2, 4, 0)])
def test_the_click_is_in_the_middle_of_its_clip(shared, video, stride, index):
    """The click is at the label frame's time, so it lands on the excerpt's middle sample."""
    audio = Clips([shared[video]], DEMO, stride=stride)[index]["AUDIO"].numpy()
    loud = np.flatnonzero(audio > 0.5)
    assert abs(loud.mean() - AUDIO_SAMPLES // 2) <= 3
    assert len(loud) <= 24


def test_sound_is_zero_beyond_the_ends(shared):
    clips = Clips(shared[:1], DEMO)
    sound = read_sound(shared[0].sound)
    first = clips[0]["AUDIO"].numpy()  # frame 9 is at 0.32 s = sample 5120; 5120 - 8304 = -3184
    assert (first[:3184] == 0).all()
    np.testing.assert_allclose(first[3184:], sound[: AUDIO_SAMPLES - 3184], atol=2e-5)
    last = clips[2]["AUDIO"].numpy()  # frame 17: 10240 - 8304 = 1936
    np.testing.assert_allclose(last[: len(sound) - 1936], sound[1936:], atol=2e-5)
    assert (last[len(sound) - 1936 :] == 0).all()


def test_without_sound_no_sound_is_read(field):
    field[0].sound.unlink()
    assert not Clips(field[:1], get_config("demo", "visual_only"))[0]["AUDIO"].any()
    with pytest.raises(UserError, match=r"one\.wav does not exist"):
        Clips(field[:1], DEMO)


@pytest.mark.parametrize("fit", ["letterbox", "stretch", "crop"])
@pytest.mark.parametrize("size", [(36, 64), (37, 48), (64, 36), (180, 320)])
def test_the_target_lies_on_the_square(tmp_path, size, fit):
    """Both centres of mass, in input pixels. (37, 48) ends its bars in the middle of a map pixel."""
    videos = write_field(tmp_path, [Spec("v", size=size)])
    clip = Clips(videos, DEMO, fit=fit)[1]
    frame = clip["VIDEO"][8].numpy().astype(float).mean(-1)
    square = np.clip(frame - 180, 0, None)  # the background is 104, the bars are 115
    np.testing.assert_allclose(2 * centre(clip["TARGET"][0].numpy()), centre(square), atol=0.35)
    assert clip["TARGET"].max() == 1
    assert clip["TARGET"].min() == 0


def test_bars(shared):
    clip = Clips(shared, DEMO)[0]  # 36 x 64 -> 108 x 192 in 112 x 192: bars of 2 rows, one of the map's
    assert (clip["VIDEO"][:, [0, 1, 110, 111]] == BAR).all()
    assert (clip["TARGET"][0, [0, -1]] == 0).all()


def test_large_frames_keep_their_detail(tmp_path):
    """Decoding a JPEG at a lower size must not lose what the input could show."""
    video = write_field(tmp_path, [Spec("v", frames=16)])[0]
    stripes = np.zeros((432, 768, 3), np.uint8)
    stripes[:, np.arange(768) // 8 % 2 == 1] = 255  # two input pixels each
    for i in range(1, 17):
        Image.fromarray(stripes).save(video.frame(i), quality=95)
    row = Clips([video], DEMO)[0]["VIDEO"][0, 50, :, 0].float()
    np.testing.assert_allclose(row[0::4], 0, atol=6)
    np.testing.assert_allclose(row[3::4], 255, atol=6)


def test_ground_truth_is_whole(shared):
    clips = Clips(shared[:1], DEMO)
    truth = clips.ground_truth(1)
    np.testing.assert_array_equal(truth.density, read_density(shared[0].map(13)))
    np.testing.assert_array_equal(truth.fixations, fixations(SPECS[0], 13) == 1)
    y, x = corner(SPECS[0], 13)
    back = truth.fit.back(clips[1]["TARGET"][0].numpy(), truth.density.shape)
    np.testing.assert_allclose(centre(back), (y + 4, x + 4), atol=0.1)
    assert np.corrcoef(back.ravel(), truth.density.ravel())[0, 1] > 0.99


def test_map_back_at_any_shape_is_torch_bilinear():
    saliency = np.random.default_rng(0).random((56, 96), np.float32)
    fit = make_fit("stretch", (720, 1280), (112, 192))
    for shape in ((720, 1280), (288, 352), (31, 17)):
        back = fit.back(saliency, shape)
        want = torch.nn.functional.interpolate(torch.from_numpy(saliency)[None, None], shape, mode="bilinear")
        np.testing.assert_allclose(back, want[0, 0].numpy(), atol=2e-5)
    np.testing.assert_array_equal(fit.back(saliency, fit.map_shape), fit.back(saliency))


# ---- labels that are left out


def test_empty_and_missing_maps_are_left_out_and_counted(field):
    one, two, short = field
    blank = Image.fromarray(np.zeros((36, 64), np.uint8))
    blank.save(one.map(13))
    one.map(17).unlink()
    two.fixations(9).unlink()
    blank.save(two.map(10))  # no clip's label
    blank.save(short.map(6))
    clips = Clips(field, DEMO)
    assert [(clips.ground_truth(i).video.name, clips.ground_truth(i).frame) for i in range(len(clips))] == [
        ("one", 9),
        ("two", 13),
        ("two", 17),
    ]
    assert clips.skipped == {one: 2, two: 1, short: 1}


def test_a_single_faint_fixation_is_a_label(field):
    faint = np.zeros((36, 64), np.uint8)
    faint[20, 33] = 60  # less than one level of grey in the average of 8 x 8
    Image.fromarray(faint).save(field[0].map(9), quality=100)
    clips = Clips(field[:1], DEMO)
    assert len(clips) == 3
    assert clips[0]["TARGET"].max() == 1


def test_a_label_that_the_crop_cuts_off_is_left_out(tmp_path):
    videos = write_field(tmp_path, [Spec("v", frames=16, size=(64, 36))])  # the crop shows rows 21..43
    top = np.zeros((64, 36), np.uint8)
    top[2:8, 10:20] = 255
    Image.fromarray(top).save(videos[0].map(9), quality=100)
    assert len(Clips(videos, DEMO)) == 1
    assert len(Clips(videos, DEMO, fit="crop")) == 0


def test_nothing_to_train_on(field):
    assert len(Clips([], DEMO)) == 0


@pytest.mark.parametrize(
    ("options", "message"), [({"stride": 0}, "stride 0"), ({"seed": -1}, "seed -1"), ({"fit": "zoom"}, "'zoom'")]
)
def test_wrong_options(shared, options, message):
    with pytest.raises(UserError, match=message):
        Clips(shared, DEMO, **options)


def test_a_frame_of_another_size(field):
    Image.fromarray(np.zeros((40, 64, 3), np.uint8)).save(field[0].frame(20))
    clips = Clips(field[:1], DEMO)
    clips[0]  # frames 1..16
    with pytest.raises(UserError, match=r"img_00020\.jpg is 64x40.*64x36"):
        clips[1]


def test_a_map_of_another_shape(field):
    """Of another size it is scaled, of another shape it would be squeezed."""
    Image.fromarray(np.full((18, 32), 9, np.uint8)).save(field[0].map(9))
    Image.fromarray(np.full((36, 48), 9, np.uint8)).save(field[0].map(13))
    clips = Clips(field[:1], DEMO)
    clips[0]
    for read in (clips.__getitem__, clips.ground_truth):
        with pytest.raises(UserError, match=r"eyeMap_00013\.jpg is 48x36, another shape than the frames' 64x36"):
            read(1)


# ---- mirroring


def test_mirroring(shared):
    plain = Clips(shared, DEMO, stride=1)
    mirrored = Clips(shared, DEMO, stride=1, flip=True, seed=3)
    seen = []
    for i in range(len(plain)):
        a, b = plain[i], mirrored[i]
        torch.testing.assert_close(a["AUDIO"], b["AUDIO"], rtol=0, atol=0)
        seen.append(bool((a["VIDEO"] != b["VIDEO"]).any()))
        axes = {"VIDEO": 2, "TARGET": 2} if seen[-1] else {"VIDEO": (), "TARGET": ()}
        for name, axis in axes.items():
            np.testing.assert_array_equal(np.flip(a[name].numpy(), axis), b[name].numpy())
    assert 4 <= sum(seen) <= len(plain) - 4  # 19 clips
    truth = mirrored.ground_truth(seen.index(True))
    np.testing.assert_array_equal(truth.density, read_density(truth.video.map(truth.frame)))


def test_mirroring_depends_on_seed_epoch_and_index_only(shared):
    def flips(seed: int, epoch: int) -> list[bool]:
        np.random.seed(epoch)  # must not matter, nor torch's
        torch.manual_seed(epoch)
        clips = Clips(shared, DEMO, stride=1, flip=True, seed=seed)
        clips.set_epoch(epoch)
        return [bool(clips[i]["TARGET"][0, 28].argmax() > 48) for i in range(19)]

    assert flips(1, 5) == flips(1, 5)
    assert len({tuple(flips(seed, epoch)) for seed in (1, 2) for epoch in (0, 1, 2)}) == 6


@pytest.mark.parametrize("epoch", [0, 7])
def test_workers_make_the_same_batches(shared, epoch):
    clips = Clips(shared, DEMO, stride=2, flip=True, seed=11)
    alone, helped = DataLoader(clips, batch_size=4), DataLoader(clips, batch_size=4, num_workers=2)
    list(helped)  # an epoch before, with workers of its own
    clips.set_epoch(epoch)
    for a, b in zip(alone, helped, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=0)


# ---- other starts and other sounds


def test_jitter_starts_later_but_within_the_video(shared):
    clips = Clips(shared[:1], DEMO, stride=8, jitter=True, seed=3)  # 24 frames: windows at 1 and 9
    starts = set()
    for epoch in range(20):
        clips.set_epoch(epoch)
        first, last = shown(clips[0]), shown(clips[1])
        assert np.allclose(np.diff(first), 1, atol=0.3)
        starts.add(round(first[0]))
        assert round(last[0]) == 9  # later ones would not fit
    assert len(starts) >= 6
    assert starts <= set(range(1, 9))


def test_jitter_moves_sound_and_target_along(shared):
    plain = Clips(shared[:1], DEMO, stride=1)
    moved = Clips(shared[:1], DEMO, stride=8, jitter=True, seed=3)
    for epoch in range(4):
        moved.set_epoch(epoch)
        clip = moved[0]
        same = plain[round(shown(clip)[0]) - 1]
        for name in ("VIDEO", "AUDIO", "TARGET"):
            assert torch.equal(clip[name], same[name]), name


def test_jitter_avoids_labels_that_are_empty(field):
    video = field[0]
    for label in range(10, 25):  # all labels after the first window's
        Image.new("L", (64, 36)).save(video.map(label))
    clips = Clips([video], DEMO, stride=8, jitter=True)
    for epoch in range(10):
        clips.set_epoch(epoch)
        assert round(shown(clips[0])[0]) == 1


def test_sound_muted_swapped_and_shifted(shared):
    own, muted, swapped, late = (
        Clips(shared[:2], DEMO, stride=1, sound=s) for s in ("own", "muted", "swapped", "shifted")
    )
    assert own[0]["AUDIO"].abs().max() > 0.1
    assert not muted[0]["AUDIO"].any()
    other = read_sound(shared[1].sound)
    # at 25 frames per second the label of clip 0, frame 9, is at 0.32 s, sample 5120; the excerpt begins 8304 before
    np.testing.assert_allclose(swapped[0]["AUDIO"][8304 - 5120 :][:2000], other[:2000], atol=1e-4)
    mine = read_sound(shared[0].sound)
    # a second late nothing is heard yet: the excerpt ends at sample 5120 - 16000 + 8304, before the first
    assert not late[0]["AUDIO"].any()
    # clip 8, frame 17, 0.64 s: it ends at sample 10240 - 16000 + 8304 = 2544
    np.testing.assert_allclose(late[8]["AUDIO"][-2544:], mine[:2544], atol=1e-4)
    for clips in (muted, swapped, late):
        assert torch.equal(own[3]["VIDEO"], clips[3]["VIDEO"])
        assert torch.equal(own[3]["TARGET"], clips[3]["TARGET"])
