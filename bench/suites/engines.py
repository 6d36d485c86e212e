"""The whole inference and each graph, in every engine and in what a user would take instead."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from bench import timing
from bench.results import Results, Row
from bench.sides import CLIPS, Context, call, load, moved_bytes
from bench.timing import Rule
from mubic_deploy.config import DEFAULT_STEPS
from mubic_deploy.engines import Array, Engine
from mubic_deploy.graphs import Signature
from mubic_deploy.model.mubic import cost
from mubic_deploy.pipeline import Pipeline, Predictor

WHOLE = (
    "eager, each step",
    "eager, torchvision",
    "eager",
    "torch.compile",
    "ONNX, plain export",
    "ONNX, one graph",
    "onnxruntime",
    "openvino",
)
WHOLE_S = 30.0  # seconds of calls of a side
GRAPHS = ("eager, torchvision", "eager", "torch.compile", "onnxruntime", "openvino")  # of these each graph alone too


def measure(context: Context, rule: Rule, results: Results) -> None:
    predictors, results.left_out = load(WHOLE, context)
    longer = rule if rule.quick else replace(rule, seconds=WHOLE_S)
    sides = {name: call(context, predictor) for name, predictor in predictors.items()}
    timings = timing.measure(sides, longer, progress=context.count, in_step=True)
    results.add("whole", timings, batch=1, steps=DEFAULT_STEPS)
    costs = cost(context.config)
    for row in results.rows:
        # encoders and fusion again at every step, or once
        again = row.side == "eager, each step"
        row.values["macs"] = float(DEFAULT_STEPS * sum(costs.macs.values()) if again else costs.macs_4_steps)
    engines = {name: p.engines for name, p in predictors.items() if name in GRAPHS and isinstance(p, Pipeline)}
    tensors = [chain(context, next(iter(engines.values())), i) for i in range(CLIPS)]
    for graph, signature in context.artifacts.signatures.items():
        of_graph = {
            name: functools.partial(_run, e[graph], signature, tensors) for name, e in engines.items() if graph in e
        }
        weights = context.artifacts.file(graph).stat().st_size  # a graph's file is little else
        work = {"macs": float(costs.macs[graph]), "bytes": moved_bytes(signature, weights)}
        for name, timed in timing.measure(of_graph, rule, progress=context.count, in_step=True).items():
            results.rows.append(Row(graph, name, {"batch": 1}, timed, dict(work)))


def _run(engine: Engine, signature: Signature, tensors: Sequence[Mapping[str, Array]], index: int) -> None:
    given = tensors[index % len(tensors)]
    engine({t.name: given[t.name] for t in signature.inputs})


def chain(context: Context, engines: Mapping[str, Engine], index: int) -> dict[str, Array]:
    """Every tensor that a graph takes, as it comes when a clip goes through."""
    clip, config = context.clips[index], context.config
    tensors: dict[str, Array] = dict(clip)
    tensors |= engines["visual_encoder"](tensors)
    if config.has_audio:
        tensors |= engines["audio_encoder"](tensors)
    tensors |= engines["fusion"](tensors)
    rng = np.random.default_rng(index)
    tensors["S_T"] = rng.standard_normal((1, 1, *config.map_size), np.float32)
    tensors["STEP"] = np.full((1, 1), 499, np.int32)
    tensors["ALPHA_NOW"], tensors["ALPHA_NEXT"] = (np.full((1, 1), a, np.float32) for a in (0.5, 0.8))
    return tensors


def predictor_of(predictors: Mapping[str, Predictor], name: str) -> Pipeline:
    """A side that is a chain of graphs."""
    side = predictors[name]
    assert isinstance(side, Pipeline)
    return side
