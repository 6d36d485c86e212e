"""What a denoising step costs: 1 to 12 and adaptive steps, and whether the loop adds anything to its calls."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from bench import timing
from bench.results import Results, Row
from bench.sides import CLIPS, Context, call, load
from bench.suites.engines import chain, predictor_of
from bench.timing import Rule, Timing
from mubic_deploy.config import ADAPTIVE, MAX_STEPS
from mubic_deploy.graphs import signatures
from mubic_deploy.pipeline import Pipeline, sample

SIDES = ("onnxruntime", "openvino")
LOOP_CALLS, LOOP_S = 60, 40.0  # for the difference of two loops, which is half of either


def measure(context: Context, rule: Rule, results: Results) -> None:
    predictors, results.left_out = load(SIDES, context)
    numbers = [*range(1, MAX_STEPS + 1), ADAPTIVE]
    for name in predictors:
        pipeline = predictor_of(predictors, name)
        sides = {str(n): call(context, pipeline, n) for n in numbers}
        for n, timed in timing.measure(sides, rule, progress=context.count).items():
            axes: dict[str, int | str] = {"steps": "adaptive" if n == str(ADAPTIVE) else int(n)}
            results.rows.append(Row("steps", name, axes, timed))
        results.rows += _loop(context, name, pipeline, rule)


def _loop(context: Context, name: str, pipeline: Pipeline, rule: Rule) -> list[Row]:
    """The loop of 8 and of 4 steps, after encoders and fusion, and one call of the denoiser by itself, in turn."""
    tensors = [chain(context, pipeline.engines, i) for i in range(CLIPS)]
    denoiser, inputs = pipeline.engines["denoiser"], signatures(context.config)["denoiser"].inputs

    def loop(n: int) -> timing.Side:
        def run(i: int) -> None:
            sample(context.config, denoiser, tensors[i % CLIPS], np.array([[i]], np.int64), np.array([[n]], np.int32))

        return run

    def alone(i: int) -> None:
        denoiser({t.name: tensors[i % CLIPS][t.name] for t in inputs})

    longer = rule if rule.quick else replace(rule, repeats=LOOP_CALLS, seconds=LOOP_S)
    sides = {"8": loop(8), "4": loop(4), "1": alone}
    timings = timing.measure(sides, longer, progress=context.count, in_step=True)
    rows = [Row("loop", name, {"steps": n}, timings[str(n)]) for n in (4, 8)]
    rows.append(Row("denoiser alone", name, {}, timings["1"]))
    rows.append(Row("8 steps over 4", name, values=over_calls(timings["8"], timings["4"], timings["1"])))
    return rows


def over_calls(eight: Timing, four: Timing, one: Timing) -> dict[str, float]:
    """Loops of 8 minus 4 steps over four calls of the denoiser by itself: the median over the k-th calls of all three,
    which were made together, with its bootstrap interval. ValueError unless each was called as often."""
    loops, calls = np.subtract(eight.samples, four.samples).tolist(), (4 * np.array(one.samples)).tolist()
    values = {"loop_s": float(np.median(loops)), "calls_s": float(np.median(calls))}
    return values | timing.with_ends("loop_over_lone_calls", timing.paired_ratio(loops, calls))
