"""Triton end to end: what the server adds to a request, and what it does under load, over gRPC, HTTP, and gRPC with
shared memory."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from bench import perf_analyzer, timing
from bench.load import Answers, Load, Run, Used, in_turn, interleaved, kept_up
from bench.results import Results, Row
from bench.serving import addresses, client, cpu_s, serving
from bench.sides import Context, batches, call, installed_engines, on_cpu
from bench.timing import Rule
from mubic_deploy.config import DEFAULT_STEPS
from mubic_deploy.errors import UserError
from mubic_deploy.pipeline import Pipeline, Predictor

LATENCY_CALLS, LATENCY_S = 200, 90.0  # for what the server adds, a few per cent on a machine that wanders by more
CONCURRENCY = {"full": (1, 4, 16), "demo": (1, 2, 4, 8, 16)}  # 16 answers of `full` take a minute
QUICK_CONCURRENCY = (1, 4)
BATCHES = (1, 2, 4, 8)
# and seconds of each load in each; each needs a few answers a client, which take `full` a minute, and perf_analyzer
# takes 3 s to start
ROUNDS = {"full": (1, 20.0), "demo": (6, 4.0)}
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
        calls = {name: call(context, p) for name, p in sides.items()}
        timings = timing.measure(calls, longer, progress=context.count, in_step=True)
        results.add("whole", timings, batch=1, steps=DEFAULT_STEPS)
        if pipeline is None:
            return
        clip = context.clips[0]
        maps = {name: side.predict(clip["VIDEO"], clip["AUDIO"], 0)[0] for name, side in sides.items()}
        for protocol in server:
            values = results.row("whole", protocol).values
            values["largest_difference"] = float(np.abs(maps[protocol] - maps[IN_PROCESS]).max())
            values |= timing.with_ends("over_in_process", timing.ratio_in_run(timings[protocol], timings[IN_PROCESS]))


def _check(side: Predictor, context: Context) -> None:
    """UserError if a server takes other clips."""
    if side.config != context.config:
        served = f"{side.config.name}, {side.config.variant}"
        raise UserError(f"the server serves {served}, the clips are of {context.size}: use another --size or server")


def _throughput(
    context: Context, pipeline: Pipeline | None, server: Mapping[str, str], rule: Rule, results: Results, used: Used
) -> None:
    """Clients side by side, ours and NVIDIA's, and in this process batches; and the CPU time that a clip takes."""
    rows, runs = dict[str, Row](), dict[str, Run]()
    for batch in BATCHES if pipeline else ():
        assert pipeline is not None
        name = f"batch {batch} {IN_PROCESS}"
        runs[name] = functools.partial(in_turn, batches(context, pipeline, batch), batch)
        rows[name] = Row("batch", IN_PROCESS, {"batch": batch})
    analyze = _analyze(context, results)
    pairs: dict[str, str] = {}  # ours by theirs
    for protocol, where in server.items():
        for concurrency in QUICK_CONCURRENCY if rule.quick else CONCURRENCY[context.size]:
            axes: dict[str, int | str] = {"protocol": protocol, "concurrency": concurrency}
            name = f"{concurrency} over {protocol}"
            open_client = functools.partial(client, where, protocol)
            runs[name] = functools.partial(kept_up, open_client, functools.partial(call, context), concurrency)
            rows[name] = Row("server", OURS, axes)
            if analyze is not None:
                alone = results.row("whole", protocol).timing
                assert alone is not None
                asked = functools.partial(analyze, where, protocol, concurrency)
                theirs = f"{NVIDIAS}, {name}"
                runs[theirs] = Analyzed(asked, concurrency, 1 / alone.median)
                rows[theirs], pairs[theirs] = Row("server", NVIDIAS, axes), name
    rounds, seconds = (1, rule.seconds) if rule.quick else ROUNDS[context.size]
    loads = interleaved(runs, rounds * seconds, rounds, context.count, used=used)
    for theirs in pairs:
        run = runs[theirs]
        assert isinstance(run, Analyzed)
        if run.failed:
            results.left_out[theirs] = run.failed
            del rows[theirs], loads[theirs]
        else:
            rows[theirs].values |= over_rounds(run.said) | _over("over_ours", loads[theirs], loads[pairs[theirs]])
    for name, row in rows.items():
        if row.side != NVIDIAS:
            row.timing = loads[name].timing
            row.values |= over_rounds([_said(answers) for answers in loads[name].answers])
            row.values |= {f"cpu_s_{who}": s for who, s in loads[name].cpu_s.items()}
        if rounds > 1:
            row.values["spread"] = loads[name].spread
    if pipeline is not None:
        best = max((loads[name] for name, row in rows.items() if row.what == "batch"), key=lambda b: np.median(b.rates))
        for name, row in rows.items():
            if row.side == OURS:
                row.values |= _over("over_in_process", loads[name], best)
    results.rows += rows.values()


def over_rounds(said: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The median of each figure over the rounds that all tell it."""
    return {name: float(np.median([of[name] for of in said])) for name in said[0] if all(name in of for of in said)}


def _said(answers: Answers) -> dict[str, float]:
    """A round of ours in the words of `perf_analyzer.run`."""
    of = timing.Timing(answers.latencies)
    tails = {f"p{q}_s": of.percentile(q) for q in timing.told(len(answers.latencies))}
    return {"clips_per_s": answers.clips / answers.seconds, "median_s": of.median, **tails}


def _over(figure: str, load: Load, other: Load) -> dict[str, float]:
    """Its rate over the other's, by the rounds that both had; with its interval if there were enough for one."""
    over = timing.paired_ratio(load.rates, other.rates)
    return timing.with_ends(figure, over) if len(load.answers) >= timing.FEW else {figure: over[0]}


@dataclass
class Analyzed:
    """A load by perf_analyzer, as `interleaved` takes it. ask: with so many requests a window; rate: clips a second to
    be expected; said: what it found, by round; failed: why it was asked no more"""

    ask: Callable[[int], dict[str, float]]
    concurrency: int
    rate: float
    said: list[dict[str, float]] = field(default_factory=list)
    failed: str = ""

    def __call__(self, seconds: float) -> Answers:
        """NaN clips once it failed."""
        # its first window begins with nobody waiting: with fewer answers than twice the clients that would show
        least = max(timing.AT_LEAST, 2 * self.concurrency)
        try:
            if not self.failed:
                requests = max(least, round(self.rate * seconds / perf_analyzer.WINDOWS))
                known = {f"p{q}_s" for q in timing.told(requests * perf_analyzer.WINDOWS)}
                found = self.ask(requests)
                self.said.append({n: s for n, s in found.items() if n in {"clips_per_s", "median_s", *known}})
                self.rate = found["clips_per_s"]
        except UserError as error:
            self.failed = str(error)
        return Answers(math.nan if self.failed else self.rate, 1.0, (), 0)


def _analyze(context: Context, results: Results) -> Callable[[str, str, int, int], dict[str, float]] | None:
    """NVIDIA's own client with the same clips: address, protocol, concurrency and requests as `perf_analyzer.run` takes
    them. None, and noted, where it does not run."""
    try:
        analyzer = perf_analyzer.find(context.folder)
    except UserError as error:
        results.left_out[NVIDIAS] = str(error)
        return None
    data = perf_analyzer.write_inputs(context.folder / "inputs.json", context.clips, DEFAULT_STEPS)
    return functools.partial(perf_analyzer.run, analyzer, inputs=data)
