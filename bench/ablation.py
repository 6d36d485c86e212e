#!/usr/bin/env python3
"""Table 4.3 again, on rendered scenes: every variant trained alike, evaluated on scenes of another seed; and the full
model with 1, 2, 4, 8 and 12 steps.

    mubic-deploy scenes data/train --videos 480 --seed 1 --seconds 5
    mubic-deploy scenes data/held_out --videos 60 --seed 1001 --seconds 5
    mkdir -p runs && mubic-deploy listen runs/hearing.safetensors
    python bench/ablation.py data/train data/held_out --vggish runs/hearing.safetensors --stride 32 --full demo --save

A run that is there is not trained again, and one that was stopped goes on; --variants takes some of them at a time, and
--save keeps those that were saved before. --seed trains and saves them once more, beside, from other random numbers:
variants that lie no further apart than two trainings of one have no order. `--full demo` takes the shipped checkpoint
for the full model, which `make checkpoint` trained by the same commands. The thesis's figures stand beside ours; they
are of another size of model on other data (AVAD), so only the order of the variants compares."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mubic_deploy import checkpoint
from mubic_deploy.arguments import Parser, positive
from mubic_deploy.artifacts import sha256
from mubic_deploy.cli import guarded
from mubic_deploy.config import VARIANTS, get_config
from mubic_deploy.console import bar, warn
from mubic_deploy.engines import eager
from mubic_deploy.errors import UserError
from mubic_deploy.folders import replacing_file
from mubic_deploy.model.mubic import MUBiC
from mubic_deploy.pipeline import Pipeline
from mubic_deploy.scenes.write import MARK
from mubic_deploy.thesis import TABLE_4_2, TABLE_4_3
from mubic_deploy.training import curves
from mubic_deploy.training.check import check
from mubic_deploy.training.clips import Clips
from mubic_deploy.training.evaluate import evaluate
from mubic_deploy.training.layout import Video, read_list
from mubic_deploy.training.machine import Machine, make_fabric
from mubic_deploy.training.pretrained import load_vggish
from mubic_deploy.training.run import Run
from mubic_deploy.training.settings import PARTS, RECIPES, Settings
from mubic_deploy.training.train import train

SAVED, CURVES = Path("bench/results/model/ablation.json"), Path("docs/ablation.png")  # in the checkout
STEPS = (1, 2, 4, 8, 12)


class Variant:
    """One variant's run: its folder, and what it is trained with."""

    def __init__(self, settings: Settings, data: Path, runs: Path, vggish: Path | None) -> None:
        self.settings, self.out = settings, runs / label(settings.variant, settings.seed)
        self.training, self.test = (read_list(data, "Scenes", part, 1) for part in PARTS)
        self.vggish = vggish if settings.variant != "visual_only" else None
        self.mark = self.out / "vggish.sha256"
        self.finished = self.out / "model.safetensors"
        self.begun = (self.out / "state.safetensors").is_file()

    def require_alike(self) -> None:
        """UserError if the run was begun with other settings, other data or another VGGish, or if it cannot begin."""
        run = Run(self.out, self.settings, [*self.training, *self.test])
        if not self.begun:
            run.require_new()
            if self.vggish is not None:
                load_vggish(MUBiC(get_config(self.settings.config, self.settings.variant)), self.vggish)
            return
        run.resume()
        if (self.mark.read_text() if self.mark.exists() else "") != self.heard:
            raise UserError(f"{self.out} began with another --vggish: name the same, or other --runs")

    @property
    def heard(self) -> str:
        """Digest of the file that the variant's VGGish starts from; empty for none."""
        try:
            return sha256(self.vggish) if self.vggish is not None else ""
        except OSError as error:
            raise UserError(f"{self.vggish} cannot be read ({error.strerror}): check --vggish") from None

    def train(self, machine: Machine) -> Path:
        """The finished checkpoint, trained now unless it was before."""
        if not self.finished.is_file():
            with bar(self.out.name) as progress:
                options: dict[str, Any] = {"resume": self.begun, "machine": machine, "progress": progress}
                train(self.settings, self.training, self.test, self.out, prepare=self._prepare, **options)
        return self.finished

    def _prepare(self, model: MUBiC) -> None:
        if self.vggish is None:
            self.mark.unlink(missing_ok=True)  # of a run that was ended before it saved anything
            return
        load_vggish(model, self.vggish)
        self.mark.parent.mkdir(parents=True, exist_ok=True)
        self.mark.write_text(self.heard)


def label(variant: str, seed: int) -> str:
    """What a variant's row and folder are called; the recipe's own seed goes without saying."""
    return variant if seed == RECIPES["demo"].seed else f"{variant}-seed-{seed}"


def variant_of(row: str) -> str:
    return row.partition("-seed-")[0]


def made(data: Path) -> dict[str, Any]:
    """How the scenes of a folder were made, by their own mark, or else the digest of each fold list."""
    if (data / MARK).is_file():
        return dict(json.loads((data / MARK).read_text()))
    return {path.name: sha256(path) for path in sorted((data / "fold_lists").iterdir())}


def scores(name: str, videos: list[Video], stride: int, steps: int | None = None) -> dict[str, Any]:
    """Of a checkpoint: its means and how many clips they are of."""
    model, _ = checkpoint.load(name)
    clips = Clips(videos, model.config, stride=stride)
    result = evaluate(Pipeline(model.config, eager.load_engines(model)), clips, steps=steps)
    return {**result.means(), "clips": result.clips}


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="scenes to train on")
    parser.add_argument("held_out", type=Path, help="scenes of another seed")
    parser.add_argument("--runs", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--vggish", type=Path, help="what `mubic-deploy listen` made, for the variants that hear")
    parser.add_argument("--full", metavar="CHECKPOINT", help="the full model as it was trained before: demo, or a file")
    parser.add_argument("--epochs", type=positive, help="fewer or more than the recipe's, the same for all")
    parser.add_argument("--seed", type=positive, help="another than the recipe's, for what two trainings differ by")
    parser.add_argument("--stride", type=positive, default=8)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument(
        "--save", action="store_true", help="to bench/results/model/ablation.json and docs/ablation.png"
    )
    arguments = parser.parse_args()
    if arguments.full is not None and "full" not in arguments.variants:
        parser.error("--full names the full model, which is not among --variants: add it")
    if arguments.full is not None and arguments.epochs is not None:
        parser.error("--full takes a model of the recipe's epochs, and the others get as many: leave out --epochs")
    if arguments.full is not None and arguments.seed is not None:
        parser.error("--full takes a model of the recipe's seed: leave out --seed, or train the full model by it")
    held_out = [v for part in PARTS for v in read_list(arguments.held_out, "Scenes", part, 1)]
    settings = RECIPES["demo"]
    if arguments.epochs is not None:
        settings = replace(settings, epochs=arguments.epochs)
    seed = settings.seed if arguments.seed is None else arguments.seed
    facts = {
        "stride": arguments.stride,
        "videos": len(held_out),
        "data": {"train": made(arguments.data), "held_out": made(arguments.held_out)},
        "settings": {k: v for k, v in settings.to_json().items() if k != "variant"},
        "vggish": arguments.vggish is not None,  # which, by the row: `listen` makes other bits on another processor
    }
    trained = replace(settings, seed=seed)
    runs = {
        variant: Variant(replace(trained, variant=variant), arguments.data, arguments.runs, arguments.vggish)
        for variant in arguments.variants
        if variant != "full" or arguments.full is None
    }
    # whatever would be refused is, before hours are spent
    machine = Machine(arguments.accelerator, 1, 1)
    make_fabric(machine, settings.precision)
    if arguments.save:
        saved_before(facts)
    if arguments.full is not None:
        checkpoint.load(arguments.full, "full")
    for run in runs.values():
        run.require_alike()
    with bar("checking") as progress:
        data = {str(v.root / str(v)): v for run in runs.values() for v in (*run.training, *run.test)}
        report = check([*data.values(), *held_out], lambda done, n: progress("checking the data", done, n))
    report.require()
    warn(report.brief())

    rows: dict[str, dict[str, Any]] = {}
    for variant in arguments.variants:
        more: dict[str, Any]
        if variant not in runs:
            name, more = arguments.full, {"checkpoint": checkpoint.load(arguments.full, variant)[1].to_json()}
        else:
            path = runs[variant].train(machine)
            name, more = str(path), {"seed": seed, "history": json.loads((path.parent / "history.json").read_text())}
            if heard := runs[variant].heard:
                more["vggish_sha256"] = heard
        row = label(variant, seed)
        rows[row] = {**scores(name, held_out, arguments.stride), **more}
        if row == "full":
            rows[row]["steps"] = {str(n): scores(name, held_out, arguments.stride, n) for n in STEPS}
    if arguments.save:
        rows = save(facts, rows)
    show(rows)
    return 0


def saved_before(facts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The variants that were saved, none if there are none. UserError if they were trained or evaluated otherwise."""
    path = Path(__file__).parent.parent / SAVED
    if not path.is_file():
        return {}
    saved = json.loads(path.read_text())
    if strange := [name for name, value in facts.items() if saved.get(name) != value]:
        raise UserError(f"{SAVED} has variants with other {strange[0]}: remove it, or train and evaluate alike")
    return dict(saved["variants"])


def save(facts: dict[str, Any], rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Beside the variants that were saved before; returns all of them, in the order of the thesis, and draws the
    curves of those with the recipe's seed. UserError if they were trained or evaluated otherwise."""
    root = Path(__file__).parent.parent
    rows = saved_before(facts) | rows
    rows = {row: rows[row] for row in sorted(rows, key=lambda row: (VARIANTS.index(variant_of(row)), len(row), row))}
    with replacing_file(root / SAVED) as part:
        part.write_text(json.dumps({**facts, "variants": rows}, indent=1) + "\n")
    histories = {variant: rows[variant]["history"] for variant in VARIANTS if "history" in rows.get(variant, {})}
    if histories:
        curves.draw(histories, root / CURVES)
    return rows


def show(rows: dict[str, dict[str, Any]]) -> None:
    table = Table(title="scenes, demo size | thesis: AVAD, full size (Table 4.3)")
    for heading in ("", "CC", "NSS", "SIM", "AUC-J", "thesis CC", "NSS", "SIM"):
        table.add_column(heading, justify="right" if heading else "left")

    def ours(row: dict[str, Any]) -> list[str]:
        return [f"{row[k]:.3f}" for k in ("cc", "nss", "sim", "auc_judd")]

    for name, row in rows.items():
        theirs = TABLE_4_3[variant_of(name)]
        table.add_row(name, *ours(row), f"{theirs.cc:.3f}", f"{theirs.nss:.2f}", f"{theirs.sim:.3f}")
    for n, row in rows.get("full", {}).get("steps", {}).items():
        table.add_row(f"full, {n} steps", *ours(row), "", "", "")
    for epochs, theirs in TABLE_4_2.items():
        name = f"thesis's Table 4.2, {epochs} epochs, mean of the splits"
        table.add_row(name, *[""] * 4, f"{theirs.cc:.3f}", f"{theirs.nss:.2f}", f"{theirs.sim:.3f}")
    Console().print(table)


if __name__ == "__main__":
    sys.exit(guarded(main))
