"""Clips a second over the batch."""

from __future__ import annotations

from bench import timing
from bench.results import Results, Row
from bench.sides import Context, batches, load
from bench.timing import Rule
from mubic_deploy.model.mubic import cost

SIDES = ("onnxruntime", "openvino")
BATCHES = {"full": (1, 2, 4, 8), "demo": (1, 2, 4, 8, 16, 32)}  # 32 clips of full want more memory than most have


def measure(context: Context, rule: Rule, results: Results) -> None:
    predictors, results.left_out = load(SIDES, context)
    for batch in BATCHES[context.size]:
        sides = {name: batches(context, p, batch) for name, p in predictors.items()}
        for name, timed in timing.measure(sides, rule, progress=context.count).items():
            values = {"clips_per_s": batch / timed.median, "macs": float(batch * cost(context.config).macs_4_steps)}
            results.rows.append(Row("batch", name, {"batch": batch}, timed, values))
