"""What a denoising step costs: 1 to 12 and adaptive steps, and whether the loop adds anything to its calls."""

from __future__ import annotations

import time
from statistics import median

from bench import timing
from bench.results import Results, Row
from bench.sides import CLIPS, Context, call, load
from bench.suites.engines import predictor_of
from bench.timing import Rule
from mubic_deploy.config import ADAPTIVE, MAX_STEPS
from mubic_deploy.engines import Arrays
from mubic_deploy.pipeline import Pipeline, request, sample

SIDES = ("onnxruntime", "openvino")


def measure(context: Context, rule: Rule, results: Results) -> None:
    predictors, results.left_out = load(SIDES, context)
    numbers = [*range(1, MAX_STEPS + 1), ADAPTIVE]
    for name in predictors:
        pipeline = predictor_of(predictors, name)
        sides = {str(n): call(context, pipeline, n) for n in numbers}
        for n, timed in timing.measure(sides, rule, progress=context.count).items():
            axes: dict[str, int | str] = {"steps": "adaptive" if n == str(ADAPTIVE) else int(n)}
            results.rows.append(Row("steps", name, axes, timed))
        results.rows.append(Row("8 steps over 4", name, values=_calls(context, pipeline, rule)))


def _calls(context: Context, pipeline: Pipeline, rule: Rule) -> dict[str, float]:
    """8 steps minus 4 steps against the four denoiser calls between them, all timed inside the same runs: of the loop
    alone, and of the whole inference, whose encoders wander by more than a call takes: its figure says little on a
    machine that is not still."""
    parts: dict[str, list[float]] = {f"{part} {n}": [] for part in ("loop", "calls", "whole") for n in (4, 8)}
    denoiser, calls = pipeline.engines["denoiser"], list[float]()

    def timed(inputs: Arrays) -> Arrays:
        began = time.perf_counter()
        outputs = denoiser(inputs)
        calls.append(time.perf_counter() - began)
        return outputs

    def run(n: int) -> timing.Side:
        def predict(i: int) -> None:  # what Pipeline.predict does, in two parts
            calls.clear()
            clip = context.clips[i % CLIPS]
            began = time.perf_counter()
            arrays = request(pipeline.config, clip["VIDEO"], clip["AUDIO"], i, n)
            cond = pipeline.condition(arrays)
            middle = time.perf_counter()
            sample(pipeline.config, timed, cond, arrays["SEED"], arrays["STEPS"])  # type: ignore[arg-type]
            end = time.perf_counter()
            for part, seconds in (("loop", end - middle), ("calls", sum(calls)), ("whole", end - began)):
                parts[f"{part} {n}"].append(seconds)

        return predict

    timing.measure({"4": run(4), "8": run(8)}, rule, progress=context.count)
    more = {part: median(parts[f"{part} 8"]) - median(parts[f"{part} 4"]) for part in ("loop", "calls", "whole")}
    return {
        "loop_s": more["loop"],
        "calls_s": more["calls"],
        "whole_s": more["whole"],
        "loop_over_calls": more["loop"] / more["calls"],
        "whole_over_calls": more["whole"] / more["calls"],
    }
