#!/usr/bin/env python3
"""What the shipped checkpoint has learned: every figure of its model card, on scenes that no training saw.

    mubic-deploy scenes data/held_out --videos 60 --seed 1001 --seconds 5
    python bench/checkpoint.py data/held_out --save

With its own sound, without it, with another video's and a second late; against maps that need no model; with 1 to 12
and adaptive steps; in ONNX Runtime and in eager PyTorch."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mubic_deploy import checkpoint
from mubic_deploy.arguments import Parser, positive
from mubic_deploy.cli import guarded
from mubic_deploy.config import ADAPTIVE, DEFAULT_STEPS, DEMO_CHECKPOINT, MAX_STEPS
from mubic_deploy.console import bar
from mubic_deploy.engines import eager
from mubic_deploy.errors import UserError
from mubic_deploy.pipeline import Pipeline, Predictor
from mubic_deploy.scenes.write import MARK
from mubic_deploy.training.clips import SHIFT_S, SOUNDS, Clips
from mubic_deploy.training.evaluate import METRICS, Evaluation, centre_bias, evaluate, evaluate_maps, video_means
from mubic_deploy.training.layout import read_list
from mubic_deploy.training.settings import PARTS

RESULTS = Path(__file__).parent / "results" / "model"
STEPS = (1, 2, 8, MAX_STEPS, ADAPTIVE)  # beside the default


def row(result: Evaluation) -> dict[str, Any]:
    return {**result.means(), "clips": result.clips, "steps": result.mean_steps, "excluded": result.excluded()}


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("held_out", type=Path)
    parser.add_argument("--checkpoint", default=DEMO_CHECKPOINT)
    parser.add_argument("--stride", type=positive, default=32)
    parser.add_argument("--save", action="store_true", help="also write bench/results/model/checkpoint.json")
    arguments = parser.parse_args()
    videos = [v for part in PARTS for v in read_list(arguments.held_out, "Scenes", part, 1)]
    if arguments.save and not (arguments.held_out / MARK).is_file():
        raise UserError(f"{arguments.held_out} lacks {MARK}, which says how the scenes were made: render them again")
    model, source = checkpoint.load(arguments.checkpoint)
    exported = Pipeline.open(arguments.checkpoint, "onnxruntime")
    reference = Pipeline(model.config, eager.load_engines(model))
    rows: dict[str, dict[str, Any]] = {}

    with bar("evaluating") as progress:

        def score(name: str, predictor: Predictor, clips: Clips, steps: int | None = None) -> None:
            said = lambda done, total: progress(f"evaluating, {name}", done, total)  # noqa: E731
            rows[name] = row(evaluate(predictor, clips, steps=steps, progress=said))

        for sound in SOUNDS:
            clips = Clips(videos, model.config, stride=arguments.stride, sound=sound)
            score(f"sound {sound}", exported, clips)
        clips = Clips(videos, model.config, stride=arguments.stride)
        score("eager PyTorch", reference, clips)
        for steps in STEPS:
            score("adaptive steps" if steps == ADAPTIVE else f"{steps} steps", exported, clips, steps)
        for name, maps in (("mean of all true maps", centre_bias(clips)), ("video's own mean map", video_means(clips))):
            progress(f"evaluating, {name}", 0, 1)
            rows[name] = row(evaluate_maps(maps, clips))

    own, fixed = rows["sound own"], rows[f"{MAX_STEPS} steps"]
    summary = {
        "cc": own["cc"],
        **{f"cc_lost_{sound}": own["cc"] - rows[f"sound {sound}"]["cc"] for sound in SOUNDS if sound != "own"},
        "nss": own["nss"],
        "nss_centre": rows["mean of all true maps"]["nss"],
        "nss_video": rows["video's own mean map"]["nss"],
        "cc_adaptive_minus_12": rows["adaptive steps"]["cc"] - fixed["cc"],
        "adaptive_steps": rows["adaptive steps"]["steps"],
        "engine_difference": max(abs(own[k] - rows["eager PyTorch"][k]) for k in ("cc", "sim", "nss")),
    }
    table = Table(title=f"{len(videos)} videos, {own['clips']} clips; {DEFAULT_STEPS} steps where nothing else is said")
    for heading in ("", *METRICS, "steps"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, values in rows.items():
        table.add_row(name, *(f"{values[k]:.4f}" for k in METRICS), f"{values['steps']:.2f}" if values["steps"] else "")
    console = Console()
    console.print(table)
    for key, value in summary.items():
        console.print(f"{key} {value:.4f}")
    if arguments.save:
        made = json.loads((arguments.held_out / MARK).read_text())
        facts = {"name": "checkpoint", "scenes": made, "stride": arguments.stride, "shift_s": SHIFT_S}
        weights = {"checkpoint": source.to_json()}
        text = json.dumps({**facts, **weights, "summary": summary, "rows": rows}, indent=2)
        (RESULTS / "checkpoint.json").write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
