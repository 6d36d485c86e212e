"""Clips a second over the batch."""

from __future__ import annotations

import functools
from dataclasses import replace

from bench import timing
from bench.results import Results, Row
from bench.sides import Context, load
from bench.timing import Rule
from mubic_deploy.model.mubic import cost
from mubic_deploy.parity import random_clip

SIDES = ("onnxruntime", "openvino")
BATCHES = {"full": (1, 2, 4, 8), "demo": (1, 2, 4, 8, 16, 32)}  # 32 clips of full want more memory than most have


def measure(context: Context, rule: Rule, results: Results) -> None:
    predictors, results.left_out = load(SIDES, context)
    rule = replace(rule, repeats=max(timing.AT_LEAST, rule.repeats // 3))
    for batch in BATCHES[context.size]:
        clip = random_clip(context.config, batch, batch)
        sides = {name: functools.partial(p.predict, clip["VIDEO"], clip["AUDIO"]) for name, p in predictors.items()}
        for name, timed in timing.measure(sides, rule, progress=context.count).items():
            rate = batch / timed.median
            work = 2 * cost(context.config).macs_4_steps * rate / results.limits["gemm_float32"]
            values = {"clips_per_s": rate, "share_of_limit": work}
            results.rows.append(Row("batch", name, {"batch": batch}, timed, values))
