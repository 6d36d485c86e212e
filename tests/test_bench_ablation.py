"""Variants that are compared were trained and evaluated alike, or the comparison is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from field_data import write_sound
from safetensors.torch import save_file

from bench import ablation
from mubic_deploy.config import DEMO, get_config
from mubic_deploy.errors import UserError
from mubic_deploy.model.mubic import random_model
from mubic_deploy.training.layout import Video
from mubic_deploy.training.machine import Machine
from mubic_deploy.training.run import Run
from mubic_deploy.training.settings import RECIPES
from mubic_deploy.training.state import State, save_state

WANTED = replace(RECIPES["demo"], variant="concat", epochs=3)
CPU = Machine("cpu", 1, 0)


def run_of(data: Path, runs: Path, vggish: Path | None = None) -> ablation.Variant:
    return ablation.Variant(WANTED, data, runs, vggish)


def finished(data: Path, runs: Path, vggish: Path | None = None) -> Path:
    """A run's folder as `train` leaves it, of WANTED."""
    run, model = run_of(data, runs, vggish), random_model(get_config("demo", "concat"))
    videos = Run(run.out, WANTED, [*run.training, *run.test])
    run.out.mkdir(parents=True)
    state = State(WANTED, videos.videos, 3, 0, 0.0, {}, [], data=videos.data)
    save_state(run.out / "state.safetensors", state, model, torch.optim.Adam(model.parameters()))
    if run.heard:
        run.mark.write_text(run.heard)
    run.finished.write_bytes(b"weights")
    return run.finished


@pytest.fixture(scope="module")
def hearing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An audio encoder in the form that `mubic-deploy listen` leaves it."""
    path = tmp_path_factory.mktemp("hearing") / "hearing.safetensors"
    encoder = random_model(DEMO).audio_encoder
    save_file({f"audio_encoder.{name}": value.contiguous() for name, value in encoder.state_dict().items()}, path)
    return path


def test_a_finished_run_is_taken_if_it_was_trained_alike(field: list[Video], tmp_path: Path, hearing: Path) -> None:
    data = field[0].root
    path = finished(data, tmp_path / "deaf")
    run_of(data, tmp_path / "deaf").require_alike()
    assert run_of(data, tmp_path / "deaf").train(CPU) == path  # at once
    finished(data, tmp_path / "hears", hearing)
    run_of(data, tmp_path / "hears", hearing).require_alike()

    longer = ablation.Variant(replace(WANTED, epochs=6), data, tmp_path / "deaf", None)
    with pytest.raises(UserError, match=r"concat was begun with other settings \(epochs 3 instead of 6\)"):
        longer.require_alike()
    for runs, vggish in (("deaf", hearing), ("hears", None)):
        with pytest.raises(UserError, match="concat began with another --vggish"):
            run_of(data, tmp_path / runs, vggish).require_alike()
    write_sound(field[-1].sound, np.zeros((2, 4000)), 16_000)  # another data set with the same names
    with pytest.raises(UserError, match="concat was begun with other files under the videos' names"):
        run_of(data, tmp_path / "deaf").require_alike()


def test_what_would_be_refused_is_refused_before_any_training(
    field: list[Video], tmp_path: Path, hearing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trains(*_: object, **__: object) -> None:
        raise AssertionError("a variant was trained")

    data = field[0].root
    monkeypatch.setattr(ablation, "train", trains)
    monkeypatch.setattr(ablation, "SAVED", tmp_path / "ablation.json")
    (tmp_path / "ablation.json").write_text('{"stride": 32, "variants": {}}')
    finished(data, tmp_path / "runs")  # of three epochs, the last to be looked at
    shutil.copytree(data, tmp_path / "other")
    (tmp_path / "other/video_audio/Scenes/two/two.wav").unlink()

    def refused(*arguments: object, held_out: Path = data) -> str:
        command = ["ablation.py", data, held_out, "--accelerator", "cpu", "--runs", tmp_path / "none", *arguments]
        monkeypatch.setattr("sys.argv", [*map(str, command)])
        with pytest.raises(UserError) as error:
            ablation.main()
        return str(error.value)

    two = ("--variants", "visual_only", "concat")
    assert "has variants with other stride" in refused("--save")
    assert "none.safetensors does not exist" in refused("--vggish", tmp_path / "none.safetensors", *two)
    assert "typo.safetensors" in refused("--full", "typo.safetensors", "--variants", "visual_only", "full")
    assert "other settings (epochs 3 instead of 6)" in refused(*two, "--runs", tmp_path / "runs")
    assert "two.wav does not exist" in refused(*two, "--vggish", hearing, held_out=tmp_path / "other")
    monkeypatch.setattr("sys.argv", ["ablation.py", *map(str, (data, data)), "--accelerator", "cpu", *two])
    monkeypatch.chdir(tmp_path)  # where the runs would be
    with pytest.raises(AssertionError, match="a variant was trained"):
        ablation.main()


def test_what_may_be_wrong_with_the_data_is_said(
    field: list[Video], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def trains(*_: object) -> None:
        raise StopIteration

    monkeypatch.setattr(ablation.Variant, "train", trains)
    write_sound(field[0].sound, np.zeros((round(0.6 * 16_000), 1)), 16_000)  # of 0.96 s
    command = ["ablation.py", str(field[0].root), str(field[0].root), "--runs", str(tmp_path), "--accelerator", "cpu"]
    monkeypatch.setattr("sys.argv", [*command, "--variants", "concat"])
    with pytest.raises(StopIteration):
        ablation.main()
    assert f"warning: {field[0]}: {field[0].sound} lasts 0.60 s" in capsys.readouterr().err


def test_scenes_are_known_by_their_mark_or_their_lists(tmp_path: Path) -> None:
    lists = tmp_path / "fold_lists"
    lists.mkdir()
    for name in ("b", "a"):
        (lists / name).write_text("one 24 25\n")
    before = ablation.made(tmp_path)
    assert list(before) == ["a", "b"]
    (lists / "a").write_text("one 25 25\n")
    assert ablation.made(tmp_path) != before
    (tmp_path / "scenes.json").write_text('{"videos": 4, "seed": 1}')
    assert ablation.made(tmp_path) == {"videos": 4, "seed": 1}


def test_variants_on_other_data_are_not_saved_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablation, "SAVED", tmp_path / "ablation.json")  # an absolute path stays one
    monkeypatch.setattr(ablation, "CURVES", tmp_path / "ablation.png")
    history = [{"epoch": 1, "loss": 1.0, "learning_rate": 1e-4, "cc": 0.5, "sim": 0.5, "nss": 1.0}]
    facts = {"stride": 8, "data": {"train": {"seed": 1}, "held_out": {"seed": 2}}}
    ablation.save(facts, {"full": {"history": history}})
    assert list(ablation.save(facts, {"concat": {"history": history}})) == ["full", "concat"]
    before = ablation.SAVED.read_text()
    other = {**facts, "data": {"train": {"seed": 3}, "held_out": {"seed": 2}}}
    with pytest.raises(UserError, match="variants with other data"):
        ablation.save(other, {"visual_only": {"history": history}})
    older = {k: v for k, v in json.loads(before).items() if k != "data"}
    ablation.SAVED.write_text(json.dumps(older))  # of a version that did not say
    with pytest.raises(UserError, match="variants with other data"):
        ablation.save(facts, {"visual_only": {"history": history}})


def test_a_second_training_stands_beside_the_first(
    field: list[Video], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablation, "SAVED", tmp_path / "ablation.json")
    monkeypatch.setattr(ablation, "CURVES", tmp_path / "ablation.png")
    trained = []

    def trains(run: ablation.Variant, _: Machine) -> Path:
        trained.append((run.out.name, run.settings.seed, run.settings.variant))
        run.out.mkdir(parents=True)
        (run.out / "history.json").write_text(json.dumps(history))
        return run.out / "model.safetensors"

    history = [{"epoch": 1, "loss": 1.0, "learning_rate": 1e-4, "cc": 0.5, "sim": 0.5, "nss": 1.0}]
    monkeypatch.setattr(ablation.Variant, "train", trains)
    means = dict.fromkeys(("cc", "nss", "sim", "auc_judd"), 0.5)
    monkeypatch.setattr(ablation, "scores", lambda name, *_: {**means, "of": Path(name).parent.name})
    drawn = []
    monkeypatch.setattr(ablation.curves, "draw", lambda histories, _: drawn.append(list(histories)))
    data, runs = str(field[0].root), str(tmp_path / "runs")
    for more in ((), ("--seed", "12"), ("--seed", "2"), ("--seed", "1", "--variants", "no_beca")):
        command = ["ablation.py", data, data, "--runs", runs, "--accelerator", "cpu", "--variants", "no_skip", "concat"]
        monkeypatch.setattr("sys.argv", [*command, "--save", *more])
        assert ablation.main() == 0
    rows = json.loads((tmp_path / "ablation.json").read_text())["variants"]
    seeds = ["no_skip", "no_skip-seed-2", "no_skip-seed-12", "concat", "concat-seed-2", "concat-seed-12"]
    assert list(rows) == ["no_beca", *seeds]
    assert [row["of"] for row in rows.values()] == list(rows)  # none in another's folder
    assert trained[2:4] == [("no_skip-seed-12", 12, "no_skip"), ("concat-seed-12", 12, "concat")]
    assert trained[-1] == ("no_beca", 1, "no_beca")  # the recipe's own seed, named
    assert drawn[-1] == ["no_beca", "no_skip", "concat"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("ablation.py", "none", "none"), "none is not a folder"),
        (("ablation.py", "none", "none", "--full", "demo", "--epochs", "2"), "leave out --epochs"),
        (("ablation.py", "none", "none", "--full", "demo", "--seed", "2"), "leave out --seed"),
        (("checkpoint.py", "none"), "none is not a folder"),
        (("scenes.py", "--scenes", "0"), "0 is too small"),
        (("scenes.py", "--seconds", "0.1"), "scenes of 0.1 s cannot be made"),
    ],
)
def test_wrong_input_of_the_scripts_is_one_line(arguments: tuple[str, ...], says: str, tmp_path: Path) -> None:
    script = Path(ablation.__file__).parent / arguments[0]
    command = [sys.executable, str(script), *arguments[1:]]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr.count("\n")) == (2, "", 1), ran.stderr
    assert says in ran.stderr
