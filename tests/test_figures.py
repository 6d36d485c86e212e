"""Figures of the shipped checkpoint that stand in prose are those of its results file, and that is of the file that
ships."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mubic_deploy.artifacts import sha256
from mubic_deploy.config import DEMO_FILE

ROOT = Path(__file__).parent.parent
MEASURED = json.loads((ROOT / "bench" / "results" / "model" / "checkpoint.json").read_text())
ROWS = {
    "own sound": "sound own",
    "muted": "sound muted",
    "another video's sound": "sound swapped",
    "heard 1 s late": "sound shifted",
}


def test_the_results_are_of_the_checkpoint_that_ships() -> None:
    assert MEASURED["checkpoint"]["sha256"] == sha256(DEMO_FILE)


@pytest.mark.parametrize("file", ["mubic_deploy/weights/MODEL_CARD.md", "docs/results.md"])
def test_tables_are_the_results(file: str) -> None:
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (ROOT / file).read_text().splitlines()]
    found = {cells[0]: cells[1:] for cells in lines if cells and cells[0] in ROWS}
    assert found.keys() == ROWS.keys()
    for name, cells in found.items():
        row = MEASURED["rows"][ROWS[name]]
        digits = {"cc": 3, "nss": 2, "sim": 3, "auc_judd": 3, "auc_shuffled": 3, "steps": 2}
        assert cells == [f"{row[key]:.{n}f}" for key, n in digits.items()], name


def test_the_readme_has_its_two_figures() -> None:
    summary = MEASURED["summary"]
    said = f"CC {summary['cc']:.2f}, and {summary['cc_lost_muted']:.2f} less when the sound is muted"
    assert said in (ROOT / "README.md").read_text()
