"""Triton end to end: what the server adds to a request, and what it does under load, over gRPC and HTTP."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from bench import perf_analyzer, timing
from bench.load import Run, Used, in_turn, interleaved, kept_up
from bench.results import Results, Row
from bench.serving import addresses, client, cpu_s, serving
from bench.sides import Context, batches, call, installed_engines, on_cpu
from bench.timing import Rule
from mubic_deploy.config import DEFAULT_STEPS
from mubic_deploy.errors import UserError
from mubic_deploy.pipeline import Pipeline, Predictor

PROTOCOLS = ("grpc", "http")
LATENCY_CALLS, LATENCY_S = 200, 90.0  # for what the server adds, a few per cent on a machine that wanders by more
CONCURRENCY = {"full": (1, 4, 16), "demo": (1, 2, 4, 8, 16)}  # 16 answers of `full` take a minute
QUICK_CONCURRENCY = (1, 4)
BATCHES = (1, 2, 4, 8)
ROUNDS = {"full": 1, "demo": 8}  # each needs a few answers a client, which take `full` a minute
IN_PROCESS, OURS, NVIDIAS = "in process", "our clients", "perf_analyzer"


def measure(context: Context, rule: Rule, results: Results) -> None:
    """The default engine, in this process and in the server that `serve` starts, with the same threads; or alone a
    server that runs already."""
    if context.addresses:
        results.settings["server"] = ", ".join(f"{protocol}://{where}" for protocol, where in context.addresses.items())
        _measure(context, None, context.addresses, rule, results)
        return
    engine = installed_engines(results.left_out)[0]
    results.settings["engine"] = engine
    context.say("starting the server")
    with serving(context.artifacts, context.folder, engine=engine, threads=context.threads) as server:
        _measure(context, engine, addresses(server), rule, results, functools.partial(cpu_s, server))


def _measure(
    context: Context, engine: str | None, server: Mapping[str, str], rule: Rule, results: Results, used: Used = dict
) -> None:
    """engine: in this process, beside the server; used: as `interleaved` takes it."""
    pipeline = on_cpu(engine, context) if engine else None
    _latency(context, pipeline, server, rule, results)
    _throughput(context, pipeline, server, rule, results, used)
    _perf_analyzer(context, server, rule, results)


def _latency(
    context: Context, pipeline: Pipeline | None, server: Mapping[str, str], rule: Rule, results: Results
) -> None:
    """One clip at a time, and whether the map is the same."""
    with contextlib.ExitStack() as stack:
        sides: dict[str, Predictor] = {IN_PROCESS: pipeline} if pipeline else {}
        for protocol, where in server.items():
            sides[protocol] = stack.enter_context(contextlib.closing(client(where, protocol)))
            _check(sides[protocol], context)
        longer = rule if rule.quick else replace(rule, repeats=LATENCY_CALLS, seconds=LATENCY_S)
        timings = timing.measure({name: call(context, p) for name, p in sides.items()}, longer, progress=context.count)
        results.add("whole", timings, batch=1, steps=DEFAULT_STEPS)
        if pipeline is None:
            return
        clip = context.clips[0]
        maps = {name: side.predict(clip["VIDEO"], clip["AUDIO"], 0)[0] for name, side in sides.items()}
        for protocol in server:
            values = results.row("whole", protocol).values
            values["largest_difference"] = float(np.abs(maps[protocol] - maps[IN_PROCESS]).max())
            values["over_in_process"] = timings[protocol].median / timings[IN_PROCESS].median


def _check(side: Predictor, context: Context) -> None:
    """UserError if a server takes other clips."""
    if side.config != context.config:
        served = f"{side.config.name}, {side.config.variant}"
        raise UserError(f"the server serves {served}, the clips are of {context.size}: use another --size or server")


def _throughput(
    context: Context, pipeline: Pipeline | None, server: Mapping[str, str], rule: Rule, results: Results, used: Used
) -> None:
    """Clients side by side, and in this process batches; and the CPU time that a clip takes."""
    rows, runs = dict[str, Row](), dict[str, Run]()
    for batch in BATCHES if pipeline else ():
        assert pipeline is not None
        name = f"batch {batch} {IN_PROCESS}"
        runs[name] = functools.partial(in_turn, batches(context, pipeline, batch), batch)
        rows[name] = Row("batch", IN_PROCESS, {"batch": batch})
    for protocol, where in server.items():
        for concurrency in _concurrency(context, rule):
            name = f"{concurrency} over {protocol}"
            open_client = functools.partial(client, where, protocol)
            runs[name] = functools.partial(kept_up, open_client, functools.partial(call, context), concurrency)
            rows[name] = Row("server", OURS, {"protocol": protocol, "concurrency": concurrency})
    rounds = 1 if rule.quick else ROUNDS[context.size]
    loads = interleaved(runs, rule.seconds, rounds, context.count, used=used)
    for name, load in loads.items():
        rows[name].timing = load.timing
        rows[name].values["clips_per_s"] = load.clips_per_s
        rows[name].values |= {f"cpu_s_{who}": seconds for who, seconds in load.cpu_s.items()}
        if rounds > 1:
            rows[name].values["spread"] = load.spread
    results.rows += rows.values()
    if pipeline is not None:
        best = max((loads[name].rates for name, row in rows.items() if row.what == "batch"), key=np.median)
        for name, row in rows.items():
            if row.what == "server":
                figure = "over_in_process"
                ratios = timing.paired_ratio(loads[name].rates, best)
                names = (figure, f"{figure}_low", f"{figure}_high") if rounds > 1 else (figure,)
                row.values |= dict(zip(names, ratios, strict=False))


def _concurrency(context: Context, rule: Rule) -> tuple[int, ...]:
    return QUICK_CONCURRENCY if rule.quick else CONCURRENCY[context.size]


def _perf_analyzer(context: Context, server: Mapping[str, str], rule: Rule, results: Results) -> None:
    """NVIDIA's own client on the same server, with the same clips."""
    try:
        analyzer = perf_analyzer.find(context.folder)
    except UserError as error:
        results.left_out[NVIDIAS] = str(error)
        return
    data = perf_analyzer.write_inputs(context.folder / "inputs.json", context.clips, DEFAULT_STEPS)
    for protocol, where in server.items():
        for concurrency in _concurrency(context, rule):
            context.say(f"perf_analyzer, {concurrency} over {protocol}")
            ours = results.row("server", OURS, protocol=protocol, concurrency=concurrency).values["clips_per_s"]
            requests = max(timing.AT_LEAST, concurrency, round(ours * rule.seconds / perf_analyzer.WINDOWS))
            try:
                values = perf_analyzer.run(analyzer, where, protocol, concurrency, requests, data)
            except UserError as error:
                results.left_out[f"{NVIDIAS}, {concurrency} over {protocol}"] = str(error)
                continue
            axes: dict[str, int | str] = {"protocol": protocol, "concurrency": concurrency}
            values["over_ours"] = values["clips_per_s"] / ours
            results.rows.append(Row("server", NVIDIAS, axes, values=values))
