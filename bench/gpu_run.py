"""What is measured of a predictor on a GPU, and the results that it goes to."""

from __future__ import annotations

import contextlib
import functools
import itertools
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import machine, text, timing
from bench.limited import EndedError
from bench.results import Results, Row
from bench.sides import CLIPS, WholeGraph, moved_bytes
from bench.stages import REFERENCE, Graphed, Stage, build, model_of
from mubic_deploy.config import DEFAULT_STEPS, Config
from mubic_deploy.diffusion import noise
from mubic_deploy.engines import Arrays, HostArrays, eager
from mubic_deploy.engines.replay import Replayed
from mubic_deploy.errors import UserError
from mubic_deploy.graphs import SAMPLER, signatures
from mubic_deploy.metrics import cc
from mubic_deploy.model.mubic import Cost, cost
from mubic_deploy.parity import allocated, random_clip
from mubic_deploy.pipeline import ALLOCATE, Pipeline, Predictor

RULE = timing.Rule(repeats=100, seconds=2.0, short_s=1.0, warm_up_s=5.0)
TAIL_CALLS, TAIL_S = 1000, 5.0  # of an engine's single clip: a p99 has an upper end from 368 calls on
BATCHES = (1, 2, 4, 8, 16, 32)
AHEAD = 4  # largest batches at once: the next one goes up while one is computed
STEPS = (4, 8, 12)
PROFILED = 5  # calls
KERNELS = 30  # of a table
TRACED = 12  # lines of a traceback
WHOLE = "whole"  # the rows that goals look at
PARTS = "parts"
ON_GPU = "batch, on the GPU"  # the same by its own time
UNPINNED = "from plain memory"  # the same of a clip that no GPU copies from by itself


class Run:
    """A run of the benchmark, or the part of one that a process of its own does.

    file    where all that there is is written after each thing that was measured
    rule    of the whole inference; `look` for what is compared only, `tail` for an engine, which is alone
    traces  folder for the profiler's, if they are wanted"""

    def __init__(self, config: Config, device: str, rule: timing.Rule, file: Path, traces: Path | None = None) -> None:
        self.config, self.device, self.rule, self.file, self.traces = config, device, rule, file, traces
        self.look = replace(rule, repeats=rule.repeats // 2, seconds=rule.seconds / 2, short_s=rule.short_s / 2)
        self.tail = rule if rule.quick else replace(rule, repeats=TAIL_CALLS, seconds=TAIL_S)
        self.clock = timing.cuda_events if device == "cuda" else timing.wall
        # a CPU is there to see that it runs
        settings = {"size": config.name, "device": device, "steps": DEFAULT_STEPS, "quick": device == "cpu"}
        settings["memory"] = "pinned" if device == "cuda" else "plain"  # that clips lie in
        self.results = Results("gpu", settings)
        self.clips = [self.clip(seed) for seed in range(CLIPS)]

    def clip(self, seed: int, batch: int = 1) -> HostArrays:
        """VIDEO and AUDIO, which a GPU copies from by itself, as those of `predict`."""
        clip = random_clip(self.config, seed, batch)
        allocate = eager.pinned_array if self.device == "cuda" else ALLOCATE
        return {name: allocated(allocate, array) for name, array in clip.items()}

    def write(self) -> None:
        self.results.finish()
        self.results.write(self.file)

    @contextlib.contextmanager
    def named(self, name: str) -> Iterator[None]:
        """What fails inside is named, and the rest goes on. Where it failed is noted: a GPU may be there only once."""
        try:
            yield
        except Exception as error:  # CUDA's, the compiler's, ONNX Runtime's: of many kinds
            self.results.left_out[name] = text.reason(error)
            if isinstance(error, EndedError):
                self.results.notes[f"log, {name}"] = error.said
            elif not isinstance(error, UserError):
                self.results.notes[f"traceback, {name}"] = traceback.format_exc().splitlines()[-TRACED:]

    def side(
        self, predictor: Predictor, steps: int | None = None, clips: Sequence[HostArrays] | None = None
    ) -> timing.Side:
        """clips: that take turns, by default `self.clips`."""
        turns = clips or self.clips

        def predict(i: int) -> None:
            clip = turns[i % len(turns)]
            predictor.predict(clip["VIDEO"], clip["AUDIO"], i, steps)

        return predict

    def maps(self, predictor: Predictor) -> list[np.ndarray]:
        return [predictor.predict(c["VIDEO"], c["AUDIO"], i)[0] for i, c in enumerate(self.clips)]

    @functools.cached_property
    def expected(self) -> list[np.ndarray]:
        """The reference's maps, whichever sections are skipped."""
        return self.maps(build(REFERENCE, self.config, self.device))

    @functools.cached_property
    def cost(self) -> Cost:
        return cost(self.config)

    def limits(self) -> None:
        self.results.limits = machine.limits(self.device)

    def compare(self, what: str, side: str, predictor: Predictor) -> None:
        """A row with how far the maps are from the reference's."""
        pairs = [(a[0], b[0]) for a, b in zip(self.maps(predictor), self.expected, strict=True)]
        values = {
            "cc": float(np.min([cc(a, b) for a, b in pairs])),
            "largest_difference": float(np.max([np.abs(a - b).max() for a, b in pairs])),
        }
        group = "parity" if what == WHOLE else f"parity, {what}"
        self.results.rows.append(Row(group, side, {"steps": DEFAULT_STEPS}, values=values))

    def predictors(self, what: str, predictors: Mapping[str, Predictor], rule: timing.Rule) -> dict[str, timing.Timing]:
        """Compares the maps of predictors and times them against each other. Those that fail are left out."""
        sides = {}
        for name, predictor in predictors.items():
            with self.named(name):
                self.compare(what, name, predictor)
                sides[name] = self.side(predictor)
        timings = timing.measure(sides, rule)
        self.results.add(what, timings, batch=1, steps=DEFAULT_STEPS)
        return timings

    def stages(self, what: str, stages: Mapping[str, Stage], rule: timing.Rule | None = None) -> None:
        """As `predictors`, of stages; of a waterfall each with its gain over the one before, of "alone" and "without"
        over the first of its precision."""
        built = {}
        for name, stage in stages.items():
            with self.named(name):
                built[name] = build(stage, self.config, self.device)
        timings = self.predictors(what, built, rule or self.rule)
        if what == "waterfall":
            for before, name in itertools.pairwise(stages):
                self._gain(what, name, before, timings)
        if what in ("alone", "without"):
            for name, stage in stages.items():
                first = next(n for n, s in stages.items() if s.precision == stage.precision)
                if first != name:
                    self._gain(what, name, first, timings)
        self.write()

    def _gain(self, what: str, name: str, over: str, timings: Mapping[str, timing.Timing]) -> None:
        if name in timings and over in timings:
            self.results.row(what, name).values |= gain(timings[over], timings[name])

    def compiled_waterfall(self, sides: Mapping[str, str]) -> None:
        """Puts what was measured whole behind the last of the waterfall, as far as it was. sides: by the name there."""
        for name, side in sides.items():
            before = [row.timing for row in self.results.rows if row.what == "waterfall" and row.timing]
            for row in [row for row in self.results.rows if (row.what, row.side) == (WHOLE, side) and row.timing]:
                values = gain(before[-1], row.timing) if before and row.timing else {}
                self.results.rows.append(Row("waterfall", name, row.axes, row.timing, values))

    def engine(self, name: str, pipeline: Pipeline, of_torch: bool = True) -> None:
        """All of an engine. of_torch: whether it takes PyTorch's tensors on the device."""
        self.predictors(WHOLE, {name: pipeline}, self.tail)
        self.write()
        if self.device == "cuda":
            plain = {name: np.array(array) for name, array in self.clips[0].items()}
            side = {name: lambda i: pipeline.predict(plain["VIDEO"], plain["AUDIO"], i)}
            self.results.add(UNPINNED, timing.measure(side, self.look), batch=1, steps=DEFAULT_STEPS)
        self.steps(name, pipeline)
        self.batches(name, pipeline, of_torch)

    def parts(self, name: str, engines: Mapping[str, Any]) -> None:
        """Each part of each package by itself, of one clip and of the largest batch, on the device's own clock, with
        the tensors of a real chain. engines: AOTInductor's."""
        rule = replace(self.look, repeats=20, seconds=0.3, short_s=min(self.look.short_s, 0.1), warm_up_s=0.5)
        for batch in (1, max(BATCHES)):
            with self.named(f"{PARTS} of {name}, batch {batch}"), torch.no_grad():
                given = chain(self.config, self.clip(0, batch))
                tensors = {key: torch.from_numpy(array).to(self.device) for key, array in given.items()}
                for part in (part for engine in engines.values() for part in engine.parts):
                    inputs = [tensors[key] for key in part.signature.input_names]
                    tensors |= zip(part.signature.output_names, part.run(*inputs), strict=True)
                    run = Replayed(part.run) if self.device == "cuda" else part.run
                    side = {part.signature.name: functools.partial(_run, run, inputs)}
                    self.results.add(PARTS, timing.measure(side, rule, self.clock), batch=batch)
            self.write()

    def steps(self, name: str, pipeline: Pipeline) -> None:
        """What a step more costs: the loop at 8 steps against 4, without the sampler."""
        loop = Pipeline(self.config, pipeline.engines, pipeline.max_batch, conditioner=pipeline.conditioner)
        timings = timing.measure({str(n): self.side(loop, n) for n in STEPS}, self.rule)
        for n, t in timings.items():
            self.results.add("steps", {name: t}, steps=int(n))
        each = (timings["8"].median - timings["4"].median) / 4
        self.results.row("steps", name, steps=8).values["step_s"] = each
        self.write()

    def batches(self, name: str, predictor: Predictor, of_torch: bool = True) -> None:
        """Clips a second over the batch, as a user gets them; beside it, and in a row of its own, the GPU's own time,
        with the clips and their noise there already, and which share of the peak that is. Of an engine that takes no
        more at once, AHEAD of its largest batches too."""
        rule = replace(self.rule, repeats=10, seconds=0.7, short_s=min(self.rule.short_s, 0.3), warm_up_s=1.0)
        most = predictor.max_batch if isinstance(predictor, Pipeline) else None
        for batch in (*BATCHES, AHEAD * most) if most else BATCHES:
            with self.named(f"{name}, batch {batch}"):  # where memory is short
                clip = self.clip(0, batch)
                side = functools.partial(predictor.predict, clip["VIDEO"], clip["AUDIO"])
                (timed,) = timing.measure({name: side}, rule).values()
                row = Row("batch", name, {"batch": batch}, timed, {"clips_per_s": batch / timed.median})
                # with the slow calls, which a median does not see
                row.values["clips_per_s_of_all_calls"] = batch * len(timed.samples) / sum(timed.samples)
                at_once = most is None or batch <= most
                call = resident(predictor, clip, self.device) if of_torch and at_once else None
                self.results.rows.append(row)
                if call is not None:
                    (on_gpu,) = timing.measure({name: call}, rule, self.clock).values()
                    row.values["on_gpu_s"] = on_gpu.median
                    if "gemm_float16" in self.results.limits:
                        rate = 2 * self.cost.macs_4_steps * batch / on_gpu.median
                        row.values["share_of_fp16_peak"] = rate / self.results.limits["gemm_float16"]
                    self.results.rows.append(Row(ON_GPU, name, {"batch": batch}, on_gpu))
                self.write()

    def graphs(self, stage: Stage) -> None:
        """Each graph by itself, on the device's own clock, with the tensors of a real chain."""
        model = model_of(stage, self.config, self.device)
        engines = eager.load_engines(model, stage.precision)
        pipeline = Pipeline(self.config, engines)
        tensors: dict[str, Any] = chain(self.config, self.clips[0])
        tensors |= engines["visual_encoder"](tensors)
        tensors |= engines["audio_encoder"](tensors) if self.config.has_audio else {}
        tensors |= pipeline.condition(self.clips[0])
        for name, signature in signatures(self.config, stage.precision).items():
            module = Graphed(model.graph(name)) if self.device == "cuda" else model.graph(name)
            # clones, because of tensors made in inference mode it is not known whether they changed since the last call
            inputs = [eager.to_torch(tensors[t.name], torch.device(self.device)).clone() for t in signature.inputs]
            with torch.inference_mode():
                timed = timing.measure({name: functools.partial(_run, module, inputs)}, self.look, self.clock)[name]
            weights = sum(t.nbytes for t in (*model.graph(name).parameters(), *model.graph(name).buffers()))
            values = {"macs": float(self.cost.macs[name]), "bytes": moved_bytes(signature, weights)}
            limit = self.results.limits.get(f"gemm_{stage.precision}")
            if limit:
                values["share_of_peak"] = 2 * values["macs"] / timed.median / limit
            self.results.rows.append(Row(name, "PyTorch FP16, optimised", {"batch": 1}, timed, values))
        self.write()

    def kernels(self, name: str, predictor: Predictor, batch: int = 1) -> None:
        """Which kernels take the time: the table that says what to do next."""
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        clips = self.clips if batch == 1 else [self.clip(0, batch)]
        predict = self.side(predictor, clips=clips)
        for i in range(3):
            predict(i)
        on_gpu = self.device == "cuda"
        with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiled:
            for i in range(PROFILED):
                predict(i)
        if self.traces is not None:
            profiled.export_chrome_trace(str(self.traces / f"{text.slug(name)}.json.gz"))
        # the calls of CUDA's that launched them may count their time once more
        rows = [r for r in profiled.key_averages() if not on_gpu or r.device_type == DeviceType.CUDA]
        times = {r.key: (r.self_device_time_total if on_gpu else r.self_cpu_time_total, r.count) for r in rows}
        total = sum(t for t, _ in times.values()) or 1
        largest = sorted(times.items(), key=lambda item: -item[1][0])[:KERNELS]
        self.results.notes[f"kernels, {name}"] = [
            {"kernel": key, "ms_a_clip": t / PROFILED / 1000 / batch, "share": t / total, "calls": n / PROFILED}
            for key, (t, n) in largest
        ]
        self.write()


def gain(before: timing.Timing, now: timing.Timing) -> dict[str, float]:
    """How many times faster, with its interval."""
    return timing.with_ends("gain", timing.ratio_in_run(before, now))


def chain(config: Config, clip: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All that a chain of graphs is given of clips: these, their noise, and a step in the middle of the loop."""
    batch = len(clip["VIDEO"])
    step = {"STEP": np.int32(499), "ALPHA_NOW": np.float32(0.5), "ALPHA_NEXT": np.float32(0.8)}
    constants = {name: np.full((batch, 1), value) for name, value in step.items()}
    return {**clip, "S_T": noise(np.arange(batch), config.map_size), **constants}


def resident(predictor: Predictor, clip: Mapping[str, np.ndarray], device: str) -> timing.Side | None:
    """A call of all graphs of a predictor with PyTorch's tensors on the device already, which waits for nothing; None
    where a loop steps from the host."""
    arrays: Arrays = {
        name: eager.from_torch(torch.from_numpy(array).to(device))
        for name, array in chain(predictor.config, clip).items()
    }
    if isinstance(predictor, WholeGraph):
        return lambda _: predictor.engine(arrays)
    if not isinstance(predictor, Pipeline) or predictor.fixed_steps is None:
        return None
    sampler = predictor.engines[SAMPLER]
    return lambda _: sampler({**arrays, **predictor.condition(arrays)})


def _run(module: Callable[..., object], inputs: list[torch.Tensor], index: int) -> None:
    module(*inputs)
