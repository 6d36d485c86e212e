"""The field's layout against data whose frame numbers, places and times can be read from the values themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from field_data import SPECS, TONE, TONE_HZ, fixations, truncate, write_sound
from PIL import Image
from scipy.io import savemat, wavfile
from scipy.sparse import csc_matrix

from mubic_deploy.errors import UserError
from mubic_deploy.training.layout import (
    Video,
    datasets,
    listing,
    once,
    read_density,
    read_fixations,
    read_frame,
    read_list,
    read_size,
    read_sound,
    write_map,
)

# ---- lists and files


def test_list(shared):
    videos = read_list(shared[0].root, "Scenes", "test", 1)
    assert [(v.name, v.frames, v.fps) for v in videos] == [(s.name, s.frames, s.fps) for s in SPECS]
    one = videos[0]
    assert one.frame(7).relative_to(one.root) == Path("video_frames/Scenes/one/img_00007.jpg")
    assert one.map(7).relative_to(one.root) == Path("annotations/Scenes/one/maps/eyeMap_00007.jpg")
    assert one.fixations(12345).relative_to(one.root) == Path("annotations/Scenes/one/fixMap_12345.mat")
    assert one.sound.relative_to(one.root) == Path("video_audio/Scenes/one/one.wav")


def test_a_data_set_with_one_fold_for_all_splits(tmp_path):
    """DIEM's lists are DIEM_list_train_fps.txt and DIEM_list_test_fps.txt."""
    (tmp_path / "fold_lists").mkdir()
    lines = b"\xef\xbb\xbfBBC_life_in_cold_blood_1278x710 3401 30\r\n\r\n"  # with a byte order mark
    (tmp_path / "fold_lists" / "DIEM_list_train_fps.txt").write_bytes(lines)
    for split in (1, 2, 3):
        video = Video(tmp_path, "DIEM", "BBC_life_in_cold_blood_1278x710", 3401, 30.0)
        assert read_list(tmp_path, "DIEM", "train", split) == [video]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("Mine", "train", 1), r"Mine_list_train_1_fps\.txt does not exist \(lists are there of Scenes\): get Mine's"),
        (("../Scenes", "train", 1), r"'../Scenes' is no name of a data set"),
        (("Scenes", "val", 1), r"'val'.*train, test"),
        (("Scenes", "train", 4), r"split 4.*1, 2, 3"),
        (("AVAD", "train", 2), r"AVAD_list_train_2_fps\.txt does not exist"),
    ],
)
def test_list_that_is_not_there(shared, arguments, message):
    with pytest.raises(UserError, match=message):
        read_list(shared[0].root, *arguments)


def test_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"nowhere is not a folder.*fold_lists"):
        read_list(tmp_path / "nowhere", "Scenes", "train", 1)


@pytest.mark.parametrize(
    "line",
    [
        "two 24",
        "24 25",
        "two 24 25 x",
        "two x 25",
        "two 24.5 25",
        "two 0 25",
        "two 24 0",
        "two 24 nan",
        "../two 24 25",
        "/two 24 25",
        ".. 24 25",
        "a/two 24 25",
    ],
)
def test_malformed_line(field, line):
    (field[0].root / "fold_lists" / "Scenes_list_train_1_fps.txt").write_text(f"one 24 25\n\n{line}\n")
    with pytest.raises(UserError, match=rf"Scenes_list_train_1_fps\.txt, line 3: '{line}'"):
        read_list(field[0].root, "Scenes", "train", 1)


def test_names_with_spaces(tmp_path):
    (tmp_path / "fold_lists").mkdir()
    (tmp_path / "fold_lists" / "Mine_list_train_1_fps.txt").write_text("  a day  out\t24 25\nb\0 24 25\n")
    with pytest.raises(UserError, match=r"line 2: .* is not `name frames fps`"):
        read_list(tmp_path, "Mine", "train", 1)
    (tmp_path / "fold_lists" / "Mine_list_train_1_fps.txt").write_text("  a day  out\t24 25\n")
    assert read_list(tmp_path, "Mine", "train", 1) == [Video(tmp_path, "Mine", "a day  out", 24, 25.0)]


def test_which_data_sets_have_lists(tmp_path):
    (tmp_path / "fold_lists").mkdir()
    for name in (
        "Zoo_list_test_3_fps.txt",
        "My_own_list_train_fps.txt",
        "DIEM_list_test_fps.txt",
        "AVAD_list_test_1_fps.txt",
    ):
        (tmp_path / "fold_lists" / name).touch()
    for name in ("readme.txt", "_list_train_1_fps.txt", "X_list_val_1_fps.txt", "Y_list_train_1.txt"):
        (tmp_path / "fold_lists" / name).touch()
    assert datasets(tmp_path) == ["AVAD", "DIEM", "My_own", "Zoo"]
    assert datasets(tmp_path / "nowhere") == []


def test_a_folder_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"cannot be read \(File name too long\): check the folder, or the fold list"):
        listing(tmp_path / ("x" * 300))
    (tmp_path / "file").touch()
    assert listing(tmp_path / "file") == listing(tmp_path / "nowhere") == set()


def test_pictures_of_16_bits_keep_their_levels(tmp_path):
    """Whatever their names say. Pillow's own conversion makes 255 of all that is above."""
    grey = np.arange(256, dtype=np.uint8).reshape(8, 32)
    path = tmp_path / "eyeMap_00001.jpg"
    Image.fromarray(grey.astype(np.uint16) * 257).save(path, "PNG")
    with Image.open(path) as image:
        assert image.mode == "I;16"
    np.testing.assert_array_equal(read_density(path), grey.astype(np.float32) / 255)
    np.testing.assert_array_equal(read_frame(path), np.stack([grey] * 3, -1))
    assert read_size(path) == (8, 32)
    for values in (np.linspace(0, 1, 256, dtype=np.float32), np.arange(256, dtype=np.int32)):
        Image.fromarray(values.reshape(8, 32)).save(path, "TIFF")
        for read in (read_density, read_frame, read_size):
            with pytest.raises(UserError, match=r"eyeMap_00001\.jpg has more than 8 bits.*: save it as 8-bit grey"):
                read(path)
    Image.fromarray(grey.astype(np.uint16)).save(path, "PNG")  # as some tools write what has 8 bits
    with pytest.raises(UserError, match=r"eyeMap_00001\.jpg has 16 bits, and all of it is nearly black"):
        read_density(path)


def test_predicted_maps_lie_as_the_true_ones(tmp_path):
    saliency = np.linspace(-0.1, 1.1, 96, dtype=np.float32).reshape(8, 12)
    write_map(tmp_path, Video(Path("data"), "Mine", "a b", 24, 25.0), 7, saliency)
    with Image.open(tmp_path / "Mine" / "a b" / "eyeMap_00007.png") as image:
        assert image.mode == "L"
        np.testing.assert_allclose(np.asarray(image) / 255, saliency.clip(0, 1), atol=0.5 / 255 + 1e-6)


@pytest.mark.parametrize(("content", "message"), [(b" \n\n", "names no video"), (b"\xff\xfe\x00", "cannot be read")])
def test_list_without_videos(field, content, message):
    (field[0].root / "fold_lists" / "Scenes_list_train_1_fps.txt").write_bytes(content)
    with pytest.raises(UserError, match=rf"Scenes_list_train_1_fps\.txt.*{message}"):
        read_list(field[0].root, "Scenes", "train", 1)


def test_each_video_once(tmp_path):
    lines = "b/1 a/1 b/2 a/1 b/1 b/1 c/1"
    videos = [Video(tmp_path, line[0], line[2:], 9 + i, 25.0) for i, line in enumerate(lines.split())]
    kept, (warning,) = once(videos)
    assert kept == [videos[0], videos[1], videos[2], videos[6]]  # the first of each
    assert warning.startswith("2 of 4 videos are named more than once, the first is a/1: each counts once")
    assert once(kept) == (kept, [])
    assert once([videos[0], videos[0]])[0] == [videos[0]]  # the very same too
    assert len(once([videos[0], videos[0]])[1]) == 1


def test_pictures(tmp_path):
    colour = np.zeros((16, 24, 3), np.uint8)
    colour[..., 0], colour[..., 2] = 200, 40
    Image.fromarray(colour).save(tmp_path / "frame.jpg", quality=100, subsampling=0)
    frame = read_frame(tmp_path / "frame.jpg")
    assert frame.dtype == np.uint8
    np.testing.assert_allclose(frame, colour, atol=2)

    Image.fromarray(np.full((9, 7), 51, np.uint8)).save(tmp_path / "map.jpg", quality=100)
    density = read_density(tmp_path / "map.jpg")
    assert density.dtype == np.float32
    np.testing.assert_allclose(density, np.full((9, 7), 0.2), atol=1e-6)  # 51 / 255


def test_fixations(shared, tmp_path):
    found = read_fixations(shared[0].fixations(5))
    assert found.dtype == bool
    np.testing.assert_array_equal(found, fixations(SPECS[0], 5) == 1)
    savemat(tmp_path / "double.mat", {"eyeMap": np.eye(3, 4) * 255.0})  # some releases hold doubles
    np.testing.assert_array_equal(read_fixations(tmp_path / "double.mat"), np.eye(3, 4) == 1)
    savemat(tmp_path / "sparse.mat", {"eyeMap": csc_matrix(np.eye(3, 4))})
    np.testing.assert_array_equal(read_fixations(tmp_path / "sparse.mat"), np.eye(3, 4) == 1)


@pytest.mark.parametrize("read", [read_frame, read_density, read_fixations, read_sound])
def test_unreadable_files(read: Callable[[Path], np.ndarray], tmp_path):
    with pytest.raises(UserError, match=r"none\.xyz does not exist"):
        read(tmp_path / "none.xyz")
    for content in (b"", b"not a picture", bytes(range(256)) * 8):
        (tmp_path / "bad.xyz").write_bytes(content)
        with pytest.raises(UserError, match=r"bad\.xyz"):
            read(tmp_path / "bad.xyz")


@pytest.mark.parametrize(
    ("read", "file"), [(read_frame, "frame"), (read_density, "map"), (read_fixations, "fixations")]
)
def test_truncated_files(field, read, file):
    path = getattr(field[0], file)(3)
    truncate(path)
    with pytest.raises(UserError, match=path.name):
        read(path)


def test_mat_without_fixations(tmp_path):
    savemat(tmp_path / "other.mat", {"fixLocs": np.eye(3)})
    with pytest.raises(UserError, match=r"other\.mat holds no matrix `eyeMap`"):
        read_fixations(tmp_path / "other.mat")


# ---- sound


def test_sound_is_resampled_and_mixed(shared):
    sound = read_sound(shared[0].sound)
    assert sound.dtype == np.float32
    assert abs(len(sound) - 24 / 25 * 16_000) <= 2
    quiet = sound[1000:5000]  # 250 ms, before the click at 480 ms
    spectrum = np.abs(np.fft.rfft(quiet * np.hanning(len(quiet))))
    assert spectrum.argmax() * 16_000 / len(quiet) == pytest.approx(TONE_HZ, abs=2)
    assert np.abs(quiet).max() == pytest.approx(TONE / 2, rel=0.02)  # one channel of two
    loud = np.flatnonzero(sound > 0.5)
    assert loud.mean() == pytest.approx(12 / 25 * 16_000, abs=2)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_sound_that_is_not_finite(tmp_path, value):
    samples = np.full(16_000, 3.0, np.float32)  # too loud is no damage
    wavfile.write(tmp_path / "a.wav", 16_000, samples)
    assert (read_sound(tmp_path / "a.wav") == 1).all()
    samples[8_000] = value
    wavfile.write(tmp_path / "a.wav", 16_000, samples)
    with pytest.raises(UserError, match=r"a\.wav is damaged \(at 0\.50 s it is not finite\): extract"):
        read_sound(tmp_path / "a.wav")


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 48_000])
def test_sound_starts_at_the_files_first_sample(tmp_path, rate):
    times = np.arange(rate) / rate
    write_sound(tmp_path / "a.wav", 0.5 * np.sin(2 * np.pi * 300 * times)[:, None], rate)
    sound = read_sound(tmp_path / "a.wav")
    assert abs(len(sound) - 16_000) <= 2
    want = 0.5 * np.sin(2 * np.pi * 300 * np.arange(16_000) / 16_000)
    np.testing.assert_allclose(sound[500:15_500], want[500:15_500], atol=5e-3)
