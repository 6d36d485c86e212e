"""Triton end to end: what the server adds to a request, and what it does under load, over gRPC and HTTP."""

from __future__ import annotations

import contextlib
import functools

import numpy as np

from bench import perf_analyzer, timing
from bench.load import Run, in_turn, interleaved, kept_up
from bench.results import Results, Row
from bench.serving import address, client, serving
from bench.sides import Context, call, on_cpu
from bench.timing import Rule
from mubic_deploy.config import DEFAULT_STEPS
from mubic_deploy.engines import cpu
from mubic_deploy.errors import UserError
from mubic_deploy.parity import random_clip
from mubic_deploy.pipeline import Predictor
from mubic_deploy.triton.server import TritonServer

PROTOCOLS = ("grpc", "http")
CONCURRENCY = (1, 2, 4, 8, 16)
BATCHES = (1, 2, 4, 8)
ROUNDS = 4
OURS, NVIDIAS = "our clients", "perf_analyzer"


def measure(context: Context, rule: Rule, results: Results) -> None:
    """The default engine, in this process and in the server that `serve` starts, with the same threads."""
    engine = cpu.ENGINES[0]
    results.settings["engine"] = engine
    context.say("starting the server")
    with serving(context.artifacts, context.folder, engine=engine, threads=context.threads) as server:
        _latency(context, engine, server, rule, results)
        _throughput(context, engine, server, rule, results)
        _perf_analyzer(context, server, rule, results)


def _latency(context: Context, engine: str, server: TritonServer, rule: Rule, results: Results) -> None:
    """One clip at a time, and whether the map is the same."""
    pipeline = on_cpu(engine, context)
    clip = context.clips[0]
    (expected,), _ = pipeline.predict(clip["VIDEO"], clip["AUDIO"], 0)
    with contextlib.ExitStack() as stack:
        sides: dict[str, Predictor] = {"in process": pipeline}
        for name in PROTOCOLS:
            sides[name] = stack.enter_context(contextlib.closing(client(server, name, context.config)))
        timings = timing.measure({name: call(context, p) for name, p in sides.items()}, rule, progress=context.count)
        results.add("whole", timings, batch=1, steps=DEFAULT_STEPS)
        for name in PROTOCOLS:
            (got,), _ = sides[name].predict(clip["VIDEO"], clip["AUDIO"], 0)
            values = results.row("whole", name).values
            values["largest_difference"] = float(np.abs(got - expected).max())
            values["over_in_process"] = timings[name].median / timings["in process"].median


def _throughput(context: Context, engine: str, server: TritonServer, rule: Rule, results: Results) -> None:
    """Clients side by side, and in this process batches."""
    pipeline, rows, runs = on_cpu(engine, context), dict[str, Row](), dict[str, Run]()
    for batch in BATCHES:
        clips = random_clip(context.config, batch, batch)
        name = f"batch {batch} in process"
        side = functools.partial(pipeline.predict, clips["VIDEO"], clips["AUDIO"])
        runs[name] = functools.partial(in_turn, side, batch)
        rows[name] = Row("batch", f"{engine}, in process", {"batch": batch})
    for protocol in PROTOCOLS:
        for concurrency in CONCURRENCY:
            name = f"{concurrency} over {protocol}"
            open_client = functools.partial(client, server, protocol, context.config)
            runs[name] = functools.partial(kept_up, open_client, functools.partial(call, context), concurrency)
            rows[name] = Row("server", OURS, {"protocol": protocol, "concurrency": concurrency})
    rounds = ROUNDS if rule.seconds >= timing.Rule().seconds else 1
    for name, load in interleaved(runs, rule.seconds, rounds, context.count).items():
        rows[name].timing = load.timing
        rows[name].values |= {"clips_per_s": load.clips_per_s, "spread": load.spread}
    results.rows += rows.values()
    best = max(row.values["clips_per_s"] for row in rows.values() if row.what == "batch")
    for row in rows.values():
        if row.what == "server":
            row.values["over_in_process"] = row.values["clips_per_s"] / best


def _perf_analyzer(context: Context, server: TritonServer, rule: Rule, results: Results) -> None:
    """NVIDIA's own client on the same server, with the same clips."""
    try:
        analyzer = perf_analyzer.find(context.folder)
    except UserError as error:
        results.left_out[NVIDIAS] = str(error)
        return
    data = perf_analyzer.write_inputs(context.folder / "inputs.json", context.clips, DEFAULT_STEPS)
    for protocol in PROTOCOLS:
        for concurrency in CONCURRENCY:
            context.say(f"perf_analyzer, {concurrency} over {protocol}")
            ours = results.row("server", OURS, protocol=protocol, concurrency=concurrency).values["clips_per_s"]
            requests = max(timing.AT_LEAST, 2 * concurrency, round(ours * rule.seconds / perf_analyzer.WINDOWS))
            where = address(server, protocol)
            values = perf_analyzer.run(analyzer, where, protocol, concurrency, requests, data)
            axes: dict[str, int | str] = {"protocol": protocol, "concurrency": concurrency}
            values["over_ours"] = values["clips_per_s"] / ours
            results.rows.append(Row("server", NVIDIAS, axes, values=values))
