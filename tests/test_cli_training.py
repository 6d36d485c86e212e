"""`mubic-deploy scenes`, `train`, `evaluate` and `pack`: the way from nothing to a checkpoint, and every wrong turn."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from field_data import Spec, write_field, write_sound
from PIL import Image

from mubic_deploy import checkpoint
from mubic_deploy.config import DEMO, get_config
from mubic_deploy.errors import UserError
from mubic_deploy.folders import occupied
from mubic_deploy.metrics import cc
from mubic_deploy.model.mubic import random_model
from mubic_deploy.training.adaptive import smallest_steps
from mubic_deploy.training.clips import Clips
from mubic_deploy.training.commands import _maps_into
from mubic_deploy.training.layout import Video, read_density

QUICK = ("--config", "demo", "--epochs", 1, "--batch", 4, "--validate", 2, "--accelerator", "cpu", "--workers", 0)


def test_from_scenes_to_a_film(run, tmp_path: Path) -> None:
    """Rendered, checked, trained, resumed, evaluated, packed."""
    data, out = tmp_path / "scenes", tmp_path / "run"
    ran = run("scenes", data, "--videos", 5, "--seconds", 1, "--seed", 3, "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["videos"] == 5

    ran = run("train", data, "--check", "--deep", "--json")
    assert ran.code == 0
    scenes = {"videos": 5, "frames": 125, "skipped": 0}
    assert json.loads(ran.out) == {"datasets": {"Scenes": scenes}, "problems": [], "warnings": []}

    ran = run("train", data, "--out", out, *QUICK, "--json")
    assert ran.code == 0, ran.err
    assert "VGGish is frozen with random weights" in ran.err
    report = json.loads(ran.out)
    assert report["checkpoint"] == str(out / "model.safetensors")
    assert report["last_epoch"]["epoch"] == 1
    before = (out / "model.safetensors").read_bytes()

    ran = run("train", data, "--out", out, "--resume", "--accelerator", "cpu")  # nothing is left to do
    assert ran.code == 0, ran.err
    assert (out / "model.safetensors").read_bytes() == before

    evaluate = ("evaluate", data, "--checkpoint", out / "model.safetensors", "--part", "all", "--stride", 9)
    ran = run(*evaluate, "--engine", "eager", "--sounds", "--baselines", "--json")
    assert ran.code == 0, ran.err
    rows = {row["what"]: row for row in json.loads(ran.out)["rows"]}
    names = ["sound own", "sound muted", "sound swapped", "sound shifted", "centre bias", "video's mean"]
    assert list(rows) == names
    assert all(row["clips"] == 10 for row in rows.values())
    assert rows["sound own"]["steps"] == 4
    assert rows["video's mean"]["cc"] > rows["centre bias"]["cc"] > 0
    table = run(*evaluate, "--engine", "eager", "--steps", "adaptive", "--sounds", "--baselines").out
    assert "s-AUC" in table
    assert "5 videos, 10 clips" in table
    lines = {name: next(line for line in table.splitlines() if name in line) for name in names}
    for name, line in lines.items():  # whole, at 80 columns
        assert len(re.findall(r"\d\.\d{4}(?!\S)", line)) == 5, (name, line)
    of_video = json.loads(run(*evaluate, "--engine", "eager", "--negatives", "video", "--baselines", "--json").out)
    assert of_video["negatives"] == "video"
    for row in of_video["rows"]:
        assert row["cc"] == pytest.approx(rows[row["what"]]["cc"], abs=1e-9)
        assert row["auc_shuffled"] != rows[row["what"]]["auc_shuffled"]
    where = {row["what"]: row["auc_shuffled"] for row in of_video["rows"]}["video's mean"]
    assert where < rows["video's mean"]["auc_shuffled"] - 0.1  # to know where in a video gains nothing

    ran = run("pack", out / "model.safetensors", tmp_path / "half.safetensors")
    assert ran.code == 0, ran.err
    assert (tmp_path / "half.safetensors").stat().st_size < 0.52 * len(before)


def test_a_model_is_used_with_the_fit_that_it_was_trained_with(run, shared: list[Video], tmp_path: Path) -> None:
    ran = run("train", shared[0].root, "--out", tmp_path / "run", *QUICK, "--fit", "stretch")
    assert ran.code == 0, ran.err
    file = tmp_path / "run" / "model.safetensors"
    assert run("pack", file, tmp_path / "half.safetensors").code == 0
    for trained in (file, tmp_path / "half.safetensors"):
        assert checkpoint.load(str(trained))[0].config == get_config("demo", fit="stretch")
    evaluate = ("evaluate", shared[0].root, "--checkpoint", file, "--engine", "eager", "--json")
    its, same, other = (json.loads(run(*evaluate, *more).out) for more in ((), ("--fit", "stretch"), ("--fit", "crop")))
    assert its["warnings"] == same["warnings"] == []
    assert other["warnings"] == [
        "the model was trained with --fit stretch: with crop it sees frames as it never saw them"
    ]
    ccs = [found["rows"][0]["cc"] for found in (its, same, other)]
    assert ccs[0] == ccs[1] != ccs[2]
    # weights may go on to another
    command = ("train", shared[0].root, "--out", tmp_path / "next", *QUICK, "--checkpoint", file)
    assert run(*command).code == 0
    assert checkpoint.load(str(tmp_path / "next" / "model.safetensors"))[0].config == DEMO


def test_engines_agree_over_a_set(run, shared: list[Video]) -> None:
    command = ("evaluate", shared[0].root, "--stride", 4, "--json")
    runs = [json.loads(run(*command, "--engine", engine).out)["rows"][0] for engine in ("eager", "onnxruntime")]
    for metric in ("cc", "nss", "sim", "auc_judd", "auc_shuffled"):
        assert runs[0][metric] == pytest.approx(runs[1][metric], abs=5e-4)


def test_training_starts_from_a_checkpoint(run, shared: list[Video], tmp_path: Path) -> None:
    """With a learning rate of next to nothing the weights stay those of the file."""
    given = random_model(DEMO, seed=9)
    checkpoint.save(given, tmp_path / "given.safetensors")
    command = ("train", shared[0].root, "--out", tmp_path / "run", *QUICK, "--learning-rate", 1e-12)
    ran = run(*command, "--checkpoint", tmp_path / "given.safetensors")
    assert ran.code == 0, ran.err
    assert "all weights from" in ran.err
    assert "frozen" not in ran.err
    model, _ = checkpoint.load(str(tmp_path / "run" / "model.safetensors"))
    for (name, a), b in zip(given.named_parameters(), model.parameters(), strict=True):
        if not name.startswith("fusion.adaptive"):
            assert torch.allclose(a, b, atol=1e-6), name


def test_pack_is_half_precision_and_loads(run, tmp_path: Path) -> None:
    model = random_model(get_config("demo", "concat"), seed=4)
    checkpoint.save(model, tmp_path / "a.safetensors")
    assert run("pack", tmp_path / "a.safetensors", tmp_path / "b.safetensors").code == 0
    loaded, _ = checkpoint.load(str(tmp_path / "b.safetensors"), "concat")
    for (name, a), (_, b) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert b.dtype == torch.float32
        assert torch.equal(a if name.startswith("fusion.adaptive.") else a.half().float(), b)
    with torch.no_grad():
        model.get_parameter("fusion.blocks.0.skip.weight")[0, 0] = 1e6
    checkpoint.save(model, tmp_path / "c.safetensors")
    ran = run("pack", tmp_path / "c.safetensors", tmp_path / "d.safetensors")
    assert ran.code == 2
    assert "fusion.blocks.0.skip.weight does not fit into FP16" in ran.err
    assert not (tmp_path / "d.safetensors").exists()


def test_pack_fits_the_steps_to_the_packed_weights(run, shared: list[Video], tmp_path: Path) -> None:
    model = random_model(DEMO, seed=4)
    checkpoint.save(model, tmp_path / "a.safetensors")
    out = tmp_path / "b.safetensors"
    ran = run("pack", tmp_path / "a.safetensors", out, "--fit-steps", shared[0].root, "--clips", 2, "--stride", 8)
    assert ran.code == 0, ran.err
    packed, _ = checkpoint.load(str(out))
    clips = Clips(shared, DEMO, stride=8)
    entropies, needed = smallest_steps(packed, clips, clips.spread(2))
    with torch.no_grad():
        said = packed.fusion.adaptive.mlp(torch.from_numpy(entropies)[:, None])[:, 0].round().tolist()
    assert said == needed.tolist() != [4, 4]  # which the head says before it is fitted
    for name, value in model.named_parameters():
        if not name.startswith("fusion.adaptive."):
            assert torch.equal(value.half().float(), packed.get_parameter(name))
    fold = ("--fit-steps", shared[0].root, "--dataset", "Scenes", "--split", 2)
    ran = run("pack", tmp_path / "a.safetensors", tmp_path / "d.safetensors", *fold)
    assert (ran.code, "Scenes_list_test_2_fps.txt does not exist" in ran.err) == (2, True)
    checkpoint.save(random_model(get_config("demo", "no_diffusion")), tmp_path / "c.safetensors")
    ran = run("pack", tmp_path / "c.safetensors", tmp_path / "d.safetensors", "--fit-steps", shared[0].root)
    assert (ran.code, "takes one step: leave out --fit-steps" in ran.err) == (2, True)


def test_pack_fits_as_its_help_says(run, shared: list[Video], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(random_model(DEMO, seed=4), tmp_path / "a.safetensors")
    seen: list[tuple[Clips, list[int]]] = []

    def spy(model: object, clips: Clips, chosen: list[int], **_: object) -> None:
        seen.append((clips, chosen))

    monkeypatch.setattr("mubic_deploy.training.adaptive.fit_steps", spy)
    options = ("--fit-steps", shared[0].root)
    assert run("pack", tmp_path / "a.safetensors", tmp_path / "b.safetensors", *options).code == 0
    ((clips, chosen),) = seen
    assert chosen == clips.spread(64)
    assert [clips.ground_truth(i).frame for i in range(len(clips))] == [9, 13, 17, 9, 13, 17, 6]  # stride 4
    assert clips[0]["VIDEO"][0, 0, 0].tolist() == [115] * 3  # a letterbox's bar


def test_videos_in_both_parts_are_said(run, field: list[Video]) -> None:
    root = field[0].root
    lists = [root / "fold_lists" / f"Scenes_list_{part}_1_fps.txt" for part in ("train", "test")]
    lists[0].write_text("one 24 25\ntwo 24 12.5\n")
    for test, said in (("short 6 25\ntwo 24 12.5\n", True), ("short 6 25\n", False)):
        lists[1].write_text(test)
        ran = run("train", root, "--check")
        assert ran.code == 0, ran.out
        assert (
            "1 of 2 videos of the test part are in the training part too, the first is Scenes/two" in ran.err
        ) == said


def test_videos_named_twice_count_once(run, shared: list[Video], field: list[Video]) -> None:
    root = field[0].root
    lists = [root / "fold_lists" / f"Scenes_list_{part}_1_fps.txt" for part in ("train", "test")]
    lists[0].write_text("two 24 12.5\nshort 6 25\ntwo 24 12.5\n")
    lists[1].write_text("one 24 25\n")
    twice = "1 of 2 videos are named more than once, the first is Scenes/two: each counts once"
    ran = run("train", root, "--check", "--json")
    assert json.loads(ran.out)["datasets"]["Scenes"]["videos"] == 3
    assert twice in ran.err
    for command in (("train", root, "--check"), ("train", root, "--check", "--dataset", "Scenes")):
        assert run(*command).out.splitlines()[-1] == "1 warning"
    ran = run("train", root, "--check", "--dataset", "Scenes", "--dataset", "Scenes", "--json")
    assert json.loads(ran.out)["datasets"]["Scenes"]["videos"] == 3
    assert "2 of 2 videos are named more than once" in ran.err
    evaluate = ("evaluate", shared[0].root, "--engine", "eager", "--steps", 1, "--part", "all", "--stride", 8, "--json")
    ran = run(*evaluate)  # the same list for both parts
    report = json.loads(ran.out)
    assert (report["videos"], report["rows"][0]["clips"]) == (3, 5)
    assert report["warnings"][0].startswith("3 of 3 videos are named more than once")


OURS = "Our data of eleven days in May"


def test_own_data_of_any_name(run, tmp_path: Path) -> None:
    """Beside one of the field's sets: figures of each and of every video, and the maps that were scored."""
    root, out = tmp_path / "data", tmp_path / "maps"
    for name in (OURS, "AVAD"):
        write_field(root, (Spec("one"), Spec("a b")), name)
    ran = run("train", root, "--check", "--json")
    assert ran.code == 0, ran.err
    assert [*json.loads(ran.out)["datasets"]] == ["AVAD", OURS]
    ran = run("train", root, "--check", "--dataset", OURS, "--json")
    assert [*json.loads(ran.out)["datasets"]] == [OURS]
    command = ("evaluate", root, "--engine", "eager", "--steps", 1, "--stride", 8, "--save-maps", out)
    ran = run(*command, "--json")
    assert ran.code == 0, ran.err
    (row,) = json.loads(ran.out)["rows"]
    assert {name: part["clips"] for name, part in row["datasets"].items()} == {"AVAD": 4, OURS: 4}
    assert [*row["videos"]] == ["AVAD/one", "AVAD/a b", f"{OURS}/one", f"{OURS}/a b"]
    for metric in ("cc", "sim", "nss"):
        of = [row["datasets"][name][metric] for name in ("AVAD", OURS)]
        assert of[0] == pytest.approx(of[1])  # the same videos
        assert row[metric] == pytest.approx(np.mean([video[metric] for video in row["videos"].values()]))
    video = Video(root, OURS, "a b", 24, 25.0)
    saved = sorted(out.rglob("*.png"))
    assert len(saved) == 8
    scores = []
    for path in (p for p in saved if p.parent == out / OURS / "a b"):
        saliency = np.asarray(Image.open(path)) / 255
        scores.append(cc(saliency, read_density(video.map(int(path.stem.removeprefix("eyeMap_"))))))
    assert np.mean(scores) == pytest.approx(row["videos"][f"{OURS}/a b"]["cc"], abs=0.01)  # of 8 bits
    ran = run(*command)
    assert (ran.code, f"{out} exists and is no empty folder: choose another --save-maps" in ran.err) == (2, True)
    table = run(*command[:-2]).out
    lines = [line for line in table.splitlines() if re.search("AVAD|Our data", line)]
    assert [line.split()[1] for line in lines] == ["AVAD", "Our"]
    for line in lines:  # whole, at 80 columns
        assert len(re.findall(r"\d\.\d{4}(?!\S)", line)) == 5, line
    (tmp_path / "file").touch()
    ran = run(*command[:-1], tmp_path / "file" / "maps")
    assert (ran.code, "cannot be written" in ran.err, ran.err.count("\n")) == (2, True, 1)


def test_own_data_without_the_list_that_is_asked_for(run, tmp_path: Path) -> None:
    """It is left out unless it is named, or is all that there is."""
    write_field(tmp_path, (Spec("one"), Spec("two")), "AVAD")
    write_field(tmp_path, (Spec("one"),), "Pilot")
    (tmp_path / "fold_lists" / "Pilot_list_test_1_fps.txt").unlink()
    ran = run("train", tmp_path, "--check", "--json")
    assert ran.code == 0
    assert {name: part["videos"] for name, part in json.loads(ran.out)["datasets"].items()} == {"AVAD": 4, "Pilot": 1}
    assert "Pilot has no fold list for test of split 1: left out" in ran.err
    ran = run("train", tmp_path, "--check", "--dataset", "Pilot")
    assert ran.code == 2
    assert "Pilot_list_test_1_fps.txt does not exist (lists are there of AVAD, Pilot)" in ran.err
    for path in (tmp_path / "fold_lists").glob("AVAD*"):
        path.unlink()
    shutil.rmtree(tmp_path / "video_frames" / "AVAD")
    ran = run("train", tmp_path, "--check")
    assert ran.code == 2
    assert "Pilot_list_test_1_fps.txt does not exist (lists are there of Pilot)" in ran.err


def test_what_fails_beside_the_maps_is_not_theirs(tmp_path: Path) -> None:
    with pytest.raises(ConnectionResetError), _maps_into(tmp_path / "maps"):
        raise ConnectionResetError
    truth = SimpleNamespace(video=Video(tmp_path, "Mine", "one", 24, 25.0), frame=1)
    with _maps_into(tmp_path / "maps") as keep:
        (next(tmp_path.glob(".maps*")) / "Mine").touch()
        with pytest.raises(UserError, match=r"cannot be written \(Not a directory\): choose another --save-maps"):
            keep(truth, np.zeros((4, 4)))
    assert [path.name for path in tmp_path.iterdir()] == ["maps"]


def test_lists_without_frames_are_left_out(run, field: list[Video]) -> None:
    """The fold lists come together, each set's data by itself."""
    root = field[0].root
    for name in ("DIEM_list_train_fps", "DIEM_list_test_fps", "AVAD_list_train_1_fps"):
        (root / "fold_lists" / f"{name}.txt").write_text("V1 250 25\n")
    (root / "video_frames" / "DIEM").mkdir()
    ran = run("train", root, "--check")
    assert ran.code == 0, ran.out
    assert ran.err.count("warning: ") == 2  # in both parts, too
    assert f"{root / 'video_frames'} holds nothing of AVAD, DIEM, only fold lists are there: left out" in ran.err
    assert ran.out.startswith("Scenes: 6 videos")
    one = f"{root / 'video_frames'} holds nothing of DIEM, only fold lists are there: get the frames, or name what is"
    for command in (("train", root, "--check"), ("evaluate", root)):
        ran = run(*command, "--dataset", "DIEM", "--dataset", "Scenes")
        assert (ran.code, ran.err) == (2, f"mubic-deploy: {one} there with --dataset\n")
    assert run("train", root, "--check", "--dataset", "Scenes").err.count("warning: ") == 1
    shutil.rmtree(root / "video_frames")
    ran = run("train", root, "--check")
    assert ran.code == 2
    assert "holds nothing of AVAD, DIEM, Scenes, only fold lists are there: get the" in ran.err


def test_check_prints_every_problem(run, field: list[Video]) -> None:
    root, video = field[0].root, field[0]
    video.sound.unlink()
    Image.fromarray(np.zeros((20, 64), np.uint8)).save(video.map(24))
    ran = run("train", root, "--check")
    assert ran.code == 2
    assert f"{video.sound} does not exist" in ran.out
    assert "64x20" in ran.out
    assert "problems" in ran.out


def test_sound_that_ends_early_is_said_wherever_it_is_heard(run, field: list[Video], tmp_path: Path) -> None:
    root, video = field[0].root, field[0]
    write_sound(video.sound, np.zeros((round(0.6 * 16_000), 1)), 16_000)  # of 0.96 s
    for part, line in (("train", "two 24 12.5\n"), ("test", "one 24 25\n")):
        (root / "fold_lists" / f"Scenes_list_{part}_1_fps.txt").write_text(line)
    said = f"Scenes/one: {video.sound} lasts 0.60 s"
    evaluate = ("evaluate", root, "--engine", "eager", "--checkpoint", "random:demo", "--steps", 1, "--stride", 8)
    for command in (("train", root, "--check"), ("train", root, "--out", tmp_path / "run", *QUICK), evaluate):
        ran = run(*command, "--json")
        assert ran.code == 0, ran.err
        assert any(w.startswith(said) for w in json.loads(ran.out)["warnings"])
        assert (said in ran.err) == (command[0] == "train")
    assert said in run(*evaluate).err
    ran = run("train", root, "--check")
    assert ran.out.splitlines()[-1] == "1 warning"


def test_who_hears_nothing_needs_no_sound(run, field: list[Video], tmp_path: Path) -> None:
    root, out = field[0].root, tmp_path / "run"
    shutil.rmtree(root / "video_audio")
    deaf = ("--variant", "visual_only")
    assert run("train", root, "--check", *deaf).code == 0
    ran = run("train", root, "--out", out, *QUICK, *deaf)
    assert ran.code == 0, ran.err
    assert run("train", root, "--out", out, "--check", "--resume").code == 0
    # a file of the variant says so itself
    evaluate = ("evaluate", root, "--engine", "eager", "--checkpoint", out / "model.safetensors", "--stride", 8)
    ran = run(*evaluate, "--json")
    assert ran.code == 0, ran.err
    assert [row["what"] for row in json.loads(ran.out)["rows"]] == ["sound own"]
    ran = run(*evaluate, "--sounds")
    assert (ran.code, ran.err) == (2, "mubic-deploy: the variant visual_only hears nothing: leave out --sounds\n")
    assert run("train", root, "--check").code == 2
    field[0].frame(3).unlink()  # pictures are checked all the same
    for command in (("train", root, "--check", *deaf), evaluate):
        ran = run(*command)
        assert (ran.code, "img_00003.jpg does not exist" in ran.out + ran.err) == (2, True)


def test_a_run_that_is_there_is_said_before_the_data_are_looked_at(run, field: list[Video], tmp_path: Path) -> None:
    field[0].sound.unlink()  # what the check of the data would say
    out = tmp_path / "run"
    out.mkdir()
    command = ("train", field[0].root, "--out", out, *QUICK)
    said = f"mubic-deploy: another training writes to {out}: wait for it or choose another --out\n"
    with occupied(out):
        ran = run(*command)
        assert (ran.code, ran.err) == (2, said)
    (out / "model.safetensors").touch()
    said = f"mubic-deploy: {out} holds a run already: go on with --resume, or choose another --out\n"
    ran = run(*command)
    assert (ran.code, ran.err) == (2, said)
    assert [p.name for p in out.iterdir()] == ["model.safetensors"]


def wrong(*arguments: object, says: str):
    return pytest.param(arguments, says, id=f"{' '.join(map(str, arguments))[:50]} {says[:20]}")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        wrong("train", "{nowhere}", "--check", says="is not a folder"),
        wrong("train", "{empty}", "--check", says="AVAD_list_train_1_fps.txt: get the data sets' fold lists"),
        wrong("train", "{data}", "--dataset", "MIT300", "--check", says="not exist (lists are there of Scenes)"),
        wrong("train", "{data}", "--dataset", "AVAD", "--check", says="AVAD_list_train_1_fps.txt does not exist"),
        wrong("train", "{data}", "--split", 2, "--check", says="_list_train_2_fps.txt"),
        wrong("train", "{part}", "--check", says="AVAD_list_test_1_fps.txt does not exist"),
        wrong("evaluate", "{unmatched}", "--baselines", says="no frame has both a density map and fixations"),
        wrong("evaluate", "{unlabelled}", "--json", says="no clip has a map at its middle"),
        wrong("evaluate", "{single}", "--sounds", says="--sounds swaps the sounds of videos"),
        wrong("train", "{data}", says="give --out RUN, or --check"),
        wrong("train", "{data}", "--check", "--resume", says="name it with --out, or leave out --resume"),
        wrong("train", "{broken}", "--out", "{out}", says="does not exist: extract the video's sound track"),
        wrong("train", "{data}", "--out", "{out}", "--epochs", 0, says="--epochs: 0 is too small"),
        wrong("train", "{data}", "--out", "{out}", "--timestep-power", 0, says="timestep power 0.0 is out of range"),
        wrong("train", "{data}", "--out", "{out}", "--recipe", "mine", says="--recipe"),
        wrong("train", "{broken}", "--out", "{out}", "--accelerator", "mps", says="--accelerator mps --devices 1 is"),
        wrong("train", "{data}", "--out", "{out}", "--resume", says="holds no run to resume"),
        wrong("train", "{data}", "--out", "{out}", "--resume", "--vggish", "{nowhere}", says="leave out --vggish"),
        wrong("train", "{data}", "--out", "{file}/run", *QUICK, "--no-freeze-vggish", says="cannot be written"),
        wrong("train", "{data}", "--out", "{out}", *QUICK, "--checkpoint", "random:full", says="of full/full, not"),
        wrong("train", "{data}", "--out", "{out}", *QUICK, "--visual", "{file}", says="file"),
        wrong(
            "train", "{data}", "--out", "{out}", *QUICK, "--variant", "visual_only", "--vggish", "{file}",
            says="has no VGGish: leave out --vggish",
        ),
        wrong("evaluate", "{data}", "--checkpoint", "{nowhere}", says="does not exist"),
        wrong("evaluate", "{broken}", says="does not exist: extract the video's sound track"),
        wrong("evaluate", "{data}", "--part", "validation", says="--part"),
        wrong("scenes", "{out}", says="--videos"),
        wrong("scenes", "{out}", "--videos", 1, "--seconds", 0.2, says="ask for 1 to 600 s"),
        wrong("scenes", "{data}", "--videos", 1, says="is not an earlier set of scenes"),
        wrong("pack", "{file}", "{out}.safetensors", says="is not a MUBiC checkpoint"),
        *(
            wrong("pack", "demo", "{out}.safetensors", *option, says=f"{option[0]} is for --fit-steps DATA: leave")
            for option in (("--stride", 9), ("--clips", 64), ("--fit", "crop"), ("--split", 1), ("--dataset", "AVAD"))
        ),
        wrong("pack", "demo", "{out}", says="must end in .safetensors"),
        wrong("pack", "random:demo", "{out}.safetensors", "--fit-steps", "{empty}", says="holds no list like AVAD"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_line_and_leaves_nothing(
    run, shared: list[Video], field: list[Video], tmp_path: Path, arguments: tuple, says: str
) -> None:
    field[0].sound.unlink()
    (tmp_path / "empty").mkdir()
    (unlabelled,) = write_field(tmp_path / "unlabelled", [Spec("short", frames=6)])
    Image.fromarray(np.zeros((36, 64), np.uint8)).save(unlabelled.map(6))
    (unmatched,) = write_field(tmp_path / "unmatched", [Spec("one")])
    for i in range(1, 25):
        (unmatched.map(i) if i % 2 else unmatched.fixations(i)).unlink()
    write_field(tmp_path / "part", [Spec("one")])
    write_field(tmp_path / "part", [Spec("two")], "AVAD")
    (tmp_path / "part" / "fold_lists" / "AVAD_list_test_1_fps.txt").unlink()
    (tmp_path / "file").write_text("text")
    places = {
        "data": shared[0].root,
        "broken": field[0].root,
        "empty": tmp_path / "empty",
        "file": tmp_path / "file",
        "unlabelled": unlabelled.root,
        "unmatched": unmatched.root,
        "single": unlabelled.root,
        "part": tmp_path / "part",
        "nowhere": tmp_path / "nowhere",
        "out": tmp_path / "out",
    }
    ran = run(*(str(a).format(**places) for a in arguments))
    assert ran.code == 2
    assert says in ran.err
    assert len(ran.err.strip().splitlines()) == 1, ran.err
    assert not (tmp_path / "out").exists()
