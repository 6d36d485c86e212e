"""Variants that are compared were trained and evaluated alike, or the comparison is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bench import ablation
from mubic_deploy.errors import UserError
from mubic_deploy.training.machine import Machine
from mubic_deploy.training.settings import RECIPES

WANTED = replace(RECIPES["demo"], variant="concat", epochs=3)
CPU = Machine("cpu", 1, 0)


def finished(runs: Path, **other: object) -> Path:
    """A run's folder as `train` leaves it, of WANTED but for `other`."""
    folder = runs / "concat"
    folder.mkdir(parents=True)
    (folder / "settings.json").write_text(json.dumps({**WANTED.to_json(), **other}))
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder / "model.safetensors"


def test_a_finished_run_is_taken_if_it_was_trained_alike(tmp_path: Path) -> None:
    path = finished(tmp_path / "same")
    assert ablation.trained(WANTED, tmp_path, tmp_path / "same", CPU, None) == path
    finished(tmp_path / "other", epochs=6)
    with pytest.raises(UserError, match=r"concat was trained with other settings \(epochs 6 instead of 3\)"):
        ablation.trained(WANTED, tmp_path, tmp_path / "other", CPU, None)


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


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("ablation.py", "none", "none"), "none is not a folder"),
        (("ablation.py", "none", "none", "--full", "demo", "--epochs", "2"), "leave out --epochs"),
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
