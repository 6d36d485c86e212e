"""What each optimisation gives on this machine, each on top of the ones before. On a GPU: bench/gpu.py."""

from __future__ import annotations

from itertools import pairwise

from bench import timing
from bench.results import Results
from bench.sides import Context, call, load
from bench.timing import Rule
from mubic_deploy.config import DEFAULT_STEPS

BARS = {  # in order; the sides that they are
    "eager, each step": "torchvision's attention, encoders at each step",
    "eager folded, each step": "positions folded into the product",
    "onnxruntime, each step": "ONNX Runtime",
    "onnxruntime": "encoders once, conditioning hoisted",
    "openvino": "OpenVINO",
    "openvino, fixed steps": "the loop unrolled",
}


def measure(context: Context, rule: Rule, results: Results) -> None:
    predictors, results.left_out = load(BARS, context)
    timings = timing.measure({name: call(context, p) for name, p in predictors.items()}, rule, progress=context.count)
    results.add("waterfall", {BARS[name]: t for name, t in timings.items()}, steps=DEFAULT_STEPS)
    for before, row in pairwise([row for row in results.rows if row.what == "waterfall"]):
        assert before.timing is not None
        assert row.timing is not None
        row.values |= timing.with_ends("gain", timing.ratio_in_run(before.timing, row.timing))
