"""Do the engines compute what eager PyTorch computes: each tensor of each graph, every step's map, and, with the
shipped checkpoint on rendered scenes, the metrics against the truth."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from bench import log_mel
from bench.results import Results, Row
from bench.sides import Context, installed_engines, load
from bench.suites.engines import predictor_of
from bench.timing import Rule
from mubic_deploy.config import DEFAULT_STEPS, DEMO_CHECKPOINT, MAX_STEPS
from mubic_deploy.metrics import cc
from mubic_deploy.parity import compare
from mubic_deploy.pipeline import Pipeline, Predictor

SIDES = ("onnxruntime", "openvino", "torch.compile", "ONNX, one graph")
METRICS = ("cc", "sim", "nss", "auc_judd")
SCENES, SEED, SECONDS, STRIDE = 12, 2001, 3.0, 16  # of the scenes that are rendered for it, which no training saw


def measure(context: Context, rule: Rule, results: Results) -> None:
    predictors, results.left_out = load(("eager", *SIDES), context)
    reference = predictor_of(predictors, "eager")
    for name in SIDES:
        side = predictors.get(name)
        if side is None:
            continue
        context.say(f"comparing {name}")
        if isinstance(side, Pipeline):
            result = compare(context.config, dict(reference.engines), dict(side.engines))
            for graph, tensors in result.graphs.items():
                for tensor, difference in tensors.items():
                    axes: dict[str, int | str] = {"graph": graph, "tensor": tensor}
                    values = {"largest_difference": difference, "mean_difference": result.means[graph][tensor]}
                    results.rows.append(Row("parity", name, axes, values=values))
        steps = range(1, MAX_STEPS + 1) if isinstance(side, Pipeline) else [DEFAULT_STEPS]
        _each_step(context, reference, name, side, steps, results)
    context.say("comparing the log-mel")
    results.rows += log_mel.rows(context.folder)
    _metrics(context, results)


def _each_step(
    context: Context, reference: Pipeline, name: str, side: Predictor, steps: Iterable[int], results: Results
) -> None:
    """The map of every number of steps that the side takes."""
    clip = context.clips[0]
    for n in steps:
        (a,), (b,) = (p.predict(clip["VIDEO"], clip["AUDIO"], n, n)[0] for p in (reference, side))
        values = {
            "largest_difference": float(np.abs(a - b).max()),
            "mean_difference": float(np.abs(a - b).mean()),
            "cc": cc(a, b),
        }
        results.rows.append(Row("parity of maps", name, {"steps": n}, values=values))


def _metrics(context: Context, results: Results) -> None:
    """The shipped checkpoint on scenes of another seed than any training's, each engine against the truth."""
    from mubic_deploy.scenes.write import write_scenes
    from mubic_deploy.training.clips import Clips
    from mubic_deploy.training.evaluate import evaluate
    from mubic_deploy.training.layout import read_list
    from mubic_deploy.training.settings import PARTS

    with tempfile.TemporaryDirectory(prefix="mubic-bench-") as folder:
        context.say("rendering scenes")
        write_scenes(Path(folder), SCENES, SEED, SECONDS, context.threads)
        videos = [v for part in PARTS for v in read_list(Path(folder), "Scenes", part, 1)]
        means = {}
        for engine in ("eager", *reversed(installed_engines(results.left_out))):
            context.say(f"evaluating {engine}")
            pipeline = Pipeline.open(DEMO_CHECKPOINT, engine)
            result = evaluate(pipeline, Clips(videos, pipeline.config, stride=STRIDE))
            means[engine] = result.means()
            values = {metric: means[engine][metric] for metric in METRICS} | {"clips": float(result.clips)}
            if engine != "eager":
                apart = [abs(means[engine][m] - means["eager"][m]) for m in METRICS]
                values["largest_difference"] = float(np.max(apart))  # NumPy's, because NaN must not pass
            results.rows.append(Row("metrics", engine, values=values))
