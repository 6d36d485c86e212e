#!/usr/bin/env python3
"""What hearing is worth in the rendered scenes: CC with the viewers' density of maps made from the plan itself.

    python bench/scenes.py --save

`hearing` knows who is heard, `sight` puts equal weight on whatever moves, `late` hears what was to be heard a second
earlier, `centre` knows nothing. Each is a mixture of Gaussians with the viewers' own shares."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from mubic_deploy.arguments import Parser, natural, number, positive
from mubic_deploy.cli import guarded
from mubic_deploy.metrics import cc
from mubic_deploy.scenes.plan import FPS, HEIGHT, WIDTH, Plan, make_plan, streams
from mubic_deploy.scenes.viewers import (
    CENTRE_SPREAD,
    DELAY_S,
    FOLLOWERS,
    MOVERS,
    SCATTER,
    SIGMA,
    VIEWERS,
    conspicuity,
    density,
    gaze,
)
from mubic_deploy.scenes.write import require_length

RESULTS = Path(__file__).parent / "results" / "model"
LAG = 2  # frames, of the pursuit
FOLLOW, MOVE, CENTRE = FOLLOWERS / VIEWERS, MOVERS / VIEWERS, 1 - (FOLLOWERS + MOVERS) / VIEWERS


def gaussian(place: np.ndarray, spread: np.ndarray | float) -> np.ndarray:
    """[180, 320], summing to about 1."""
    sx, sy = np.broadcast_to(spread, 2)
    across = np.exp(-((np.arange(WIDTH) - place[0]) ** 2) / (2 * sx**2)) / sx
    down = np.exp(-((np.arange(HEIGHT) - place[1]) ** 2) / (2 * sy**2)) / sy
    return np.outer(down, across)


def maps(plan: Plan, frame: int) -> dict[str, np.ndarray]:
    time_s = plan.times[frame] - np.mean(DELAY_S)
    heard, late = (int(plan.heard(np.array([t]))[0]) for t in (time_s, time_s - 1))
    positions = plan.positions()[:, max(frame - LAG, 0)]
    blobs = [
        gaussian(p, float(np.hypot(SIGMA, SCATTER * c.radius))) for p, c in zip(positions, plan.candidates, strict=True)
    ]
    seen = np.tensordot(conspicuity(plan, plan.positions())[:, frame], blobs, 1)
    moving = np.array([plan.moves(k, np.array([time_s]))[0] for k in range(len(blobs))], float)
    moving = moving / moving.sum() if moving.any() else np.full(len(blobs), 1 / len(blobs))
    spread = np.hypot(SIGMA, np.multiply(CENTRE_SPREAD, (WIDTH, HEIGHT)))
    centre = gaussian(np.array([WIDTH / 2, HEIGHT / 2]), spread)

    def mixed(followed: np.ndarray) -> np.ndarray:
        return FOLLOW * followed + MOVE * seen + CENTRE * centre

    return {
        "hearing": mixed(blobs[heard] if heard >= 0 else seen),
        "late": mixed(blobs[late] if late >= 0 else seen),
        "sight": mixed(np.tensordot(moving, blobs, 1)),
        "centre": centre,
    }


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=positive, default=60)
    parser.add_argument("--seed", type=natural, default=1001)
    parser.add_argument("--seconds", type=number, default=5.0)
    parser.add_argument("--save", action="store_true", help="also write bench/results/model/scenes.json")
    arguments = parser.parse_args()
    require_length(arguments.seconds)
    scores: dict[str, list[float]] = {}
    for index in range(arguments.scenes):
        for_plan, _, _, for_viewers = streams(arguments.seed, index)
        plan = make_plan(for_plan, arguments.seconds)
        points = gaze(plan, for_viewers)
        for frame in range(FPS, plan.frames, FPS // 3):
            truth = density(points[:, frame])
            for name, saliency in maps(plan, frame).items():
                scores.setdefault(name, []).append(cc(saliency, truth))
    settings = {"scenes": arguments.scenes, "seed": arguments.seed, "frames": len(scores["centre"])}
    text = json.dumps({"name": "scenes", **settings, "cc": {k: float(np.mean(v)) for k, v in scores.items()}}, indent=2)
    print(text)
    if arguments.save:
        (RESULTS / "scenes.json").write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
