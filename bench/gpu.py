#!/usr/bin/env python3
"""All that is to be measured on an NVIDIA GPU, in under 8 minutes, with PyTorch and CUDA alone.

    python bench/gpu.py --out bench/results

TensorRT and ONNX Runtime CUDA are measured where they can be used, and named as left out where not. The result is
OUT/gpu_SIZE_DEVICE.json, which a finished run replaces; until then every section is written to that name with
.unfinished behind it as soon as it is done, so a run that is cut short has left what it had. Weights are random and of
one seed; maps are compared with eager PyTorch in FP32 without TF32."""

from __future__ import annotations

import argparse
import functools
import itertools
import re
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # as a script, so that `bench` is found
    sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from bench import machine, text, timing
from bench.results import FOLDER, LOOKS, Results, Row
from bench.sides import CLIPS, moved_bytes
from bench.stages import ALONE, COMPETITORS, COMPILED, FLOAT16, HALF, REFERENCE, WATERFALL, Graphed, Stage, build
from mubic_deploy import exported
from mubic_deploy.checkpoint import Source
from mubic_deploy.config import CONFIGS, DEFAULT_STEPS, Config, get_config
from mubic_deploy.engines import eager
from mubic_deploy.graphs import signatures
from mubic_deploy.metrics import cc
from mubic_deploy.model.mubic import cost, random_model
from mubic_deploy.model.precision import prepared
from mubic_deploy.parity import random_clip
from mubic_deploy.pipeline import Pipeline, Predictor
from mubic_deploy.sources import load_script, source_dir

RULE = timing.Rule(repeats=100, seconds=2.0, short_s=1.0, warm_up_s=5.0)
BATCHES = (1, 2, 4, 8, 16, 32)
PROFILED = 5  # calls
KERNELS = 15  # of a table
GOALS = "full, one H200: 4 ms, 10 x / 4 x / 1.2 x, 600 clips/s, 0.35 ms a step, CC 0.999 and 0.02"


class Run:
    """One run: its results, and how much time it has."""

    def __init__(
        self,
        config: Config,
        device: str,
        minutes: float,
        rule: timing.Rule,
        out: Path,
        skipped: Collection[str] = (),
    ) -> None:
        self.config, self.device, self.rule, self.skipped = config, device, rule, skipped
        name = torch.cuda.get_device_name() if device == "cuda" else device
        self.path = out / f"gpu_{config.name}_{'_'.join(re.findall('[a-z0-9]+', name.lower()))}.json"
        self.unfinished = self.path.with_name(f"{self.path.name}.unfinished")
        self.ends = time.monotonic() + 60 * minutes
        settings = {"size": config.name, "device": device, "steps": DEFAULT_STEPS, "goals": GOALS}
        self.results = Results("gpu", settings)
        self.clips = [random_clip(config, seed) for seed in range(CLIPS)]
        self.console = Console(stderr=True)

    def section(self, name: str, seconds: float, measure: Callable[[], None]) -> None:
        """Runs it if there are that many seconds left, and writes what there is. What fails is named, and the rest goes
        on."""
        began = time.monotonic()
        if name in self.skipped:
            self.results.left_out[name] = "as was asked for (--skip)"
        elif began + seconds > self.ends:
            self.results.left_out[name] = f"{seconds:.0f} s were not left"
        else:
            try:
                measure()
            except Exception as error:  # CUDA's, the compiler's, ONNX Runtime's: of many kinds
                self.results.left_out[name] = text.reason(error)
        self.console.print(f"{name}: {time.monotonic() - began:.0f} s {self.results.left_out.get(name, '')}")
        self.results.finish()
        self.results.write(self.unfinished)

    def finish(self) -> Results:
        self.unfinished.replace(self.path)
        return self.results

    def side(self, predictor: Predictor, steps: int | None = None) -> timing.Side:
        def predict(i: int) -> None:
            clip = self.clips[i % CLIPS]
            predictor.predict(clip["VIDEO"], clip["AUDIO"], i, steps)

        return predict

    def maps(self, predictor: Predictor) -> list[np.ndarray]:
        return [predictor.predict(c["VIDEO"], c["AUDIO"], i)[0] for i, c in enumerate(self.clips)]

    @functools.cached_property
    def expected(self) -> list[np.ndarray]:
        """The reference's maps, whichever sections are skipped."""
        before = torch.backends.cudnn.allow_tf32
        try:
            return self.maps(build(REFERENCE, self.config, self.device))
        finally:
            torch.backends.cudnn.allow_tf32 = before

    def compare(self, side: str, predictor: Predictor) -> None:
        """A row with how far the maps are from the reference's."""
        pairs = [(a[0], b[0]) for a, b in zip(self.maps(predictor), self.expected, strict=True)]
        values = {
            "cc": float(np.min([cc(a, b) for a, b in pairs])),
            "largest_difference": float(np.max([np.abs(a - b).max() for a, b in pairs])),
        }
        self.results.rows.append(Row("parity", side, {"steps": DEFAULT_STEPS}, values=values))

    def limits(self) -> None:
        self.results.limits = machine.limits(self.device)

    def stages(self, what: str, stages: dict[str, Stage]) -> None:
        """Times stages against each other, and compares their maps."""
        predictors = {name: build(stage, self.config, self.device) for name, stage in stages.items()}
        for name, predictor in predictors.items():
            torch.backends.cudnn.allow_tf32 = stages[name].tf32
            self.compare(name, predictor)
        torch.backends.cudnn.allow_tf32 = False

        def timed(name: str) -> timing.Side:
            call = self.side(predictors[name])

            def predict(i: int) -> None:
                torch.backends.cudnn.allow_tf32 = stages[name].tf32
                call(i)

            return predict

        timings = timing.measure({name: timed(name) for name in predictors}, self.rule)
        self.results.add(what, timings, batch=1, steps=DEFAULT_STEPS)
        if what == "waterfall":
            for before, name in itertools.pairwise(timings):
                row = self.results.row(what, name)
                row.values["gain"] = timings[before].median / timings[name].median

    def aotinductor(self) -> None:
        """Packages compiled here, with and without the rewrites."""
        from mubic_deploy.engines.aotinductor import Packages, load_engines

        script = load_script(source_dir("export") / "aotinductor_packages.py")
        model = random_model(self.config)
        half = {"device": self.device, "precision": FLOAT16} if self.device == "cuda" else {"device": self.device}
        with tempfile.TemporaryDirectory() as folder:
            options = script.Options(**half, max_batch=max(BATCHES), fixed_steps=DEFAULT_STEPS, autotune=True)
            packages: Packages = script.build(model, Source("random", 0), Path(folder) / "packages", options)
            pipeline = Pipeline(self.config, load_engines(packages), packages.max_batch, packages.fixed_steps)
            self.compare("AOTInductor", pipeline)
            timings = timing.measure({"AOTInductor": self.side(pipeline)}, self.rule)
            self.results.add("whole", timings, batch=1, steps=DEFAULT_STEPS)
            self.batches("AOTInductor", pipeline)

    def other(self, name: str, engine: str) -> None:
        """TensorRT or ONNX Runtime CUDA, from an FP16 export made here."""
        if engine == "tensorrt":
            from mubic_deploy.engines import cuda, tensorrt

            tensorrt.import_tensorrt()
            cuda.gpu()
        else:
            from mubic_deploy.engines import onnxruntime

            onnxruntime.require_cuda()
        with tempfile.TemporaryDirectory() as folder:
            graphs = Path(folder) / "graphs"
            exported.export(f"random:{self.config.name}", graphs, precision=FLOAT16, fixed_steps=DEFAULT_STEPS)
            source = graphs
            if engine == "tensorrt":
                source = Path(folder) / "engines"
                script = load_script(source_dir("export") / "tensorrt_engines.py")
                script.build(exported.Artifacts.open(graphs), source)
            pipeline = Pipeline.open(source, engine)
            self.compare(name, pipeline)
            self.results.add("whole", timing.measure({name: self.side(pipeline)}, self.rule), batch=1)

    def steps(self, stage: Stage) -> None:
        """What a step more costs: the loop at 8 steps against 4."""
        pipeline = build(
            replace(stage, sampler=False, one=False, graphs=self.device == "cuda"), self.config, self.device
        )
        timings = timing.measure({str(n): self.side(pipeline, n) for n in (4, 8, 12)}, self.rule)
        for n, t in timings.items():
            self.results.add("steps", {"PyTorch, CUDA graphs": t}, steps=int(n))
        each = (timings["8"].median - timings["4"].median) / 4
        self.results.row("steps", "PyTorch, CUDA graphs", steps=8).values["step_s"] = each

    def batches(self, name: str, predictor: Predictor) -> None:
        """Clips a second over the batch."""
        rule = replace(self.rule, repeats=10, short_s=0.5)
        for batch in BATCHES:
            clip = random_clip(self.config, 0, batch)
            side = functools.partial(predictor.predict, clip["VIDEO"], clip["AUDIO"])
            (timed,) = timing.measure({name: side}, rule).values()
            row = Row("batch", name, {"batch": batch}, timed, {"clips_per_s": batch / timed.median})
            if "gemm_float16" in self.results.limits:
                rate = 2 * cost(self.config).macs_4_steps * batch / timed.median
                row.values["share_of_fp16_peak"] = rate / self.results.limits["gemm_float16"]
            self.results.rows.append(row)

    def graphs(self, stage: Stage) -> None:
        """Each graph by itself, by CUDA events, with the tensors of a real chain."""
        model = prepared(random_model(self.config).to(self.device), stage.precision, stage.optimisations)
        names = signatures(self.config, stage.precision)
        clock = timing.cuda_events if self.device == "cuda" else timing.wall
        engines = eager.load_engines(model, stage.precision)
        pipeline = Pipeline(self.config, engines)
        tensors: dict[str, Any] = dict(self.clips[0])
        tensors |= engines["visual_encoder"](tensors)
        tensors |= engines["audio_encoder"](tensors) if self.config.has_audio else {}
        tensors |= pipeline.condition(self.clips[0])
        tensors |= {"S_T": np.random.default_rng(0).standard_normal((1, 1, *self.config.map_size), np.float32)}
        tensors |= {"STEP": np.full((1, 1), 499, np.int32), "ALPHA_NOW": np.full((1, 1), 0.5, np.float32)}
        tensors["ALPHA_NEXT"] = np.full((1, 1), 0.8, np.float32)
        macs = cost(self.config).macs
        for name, signature in names.items():
            module = Graphed(model.graph(name)) if self.device == "cuda" else model.graph(name)
            inputs = [eager.to_torch(tensors[t.name], torch.device(self.device)) for t in signature.inputs]
            with torch.inference_mode():
                timed = timing.measure({name: functools.partial(_run, module, inputs)}, self.rule, clock)[name]
            weights = sum(t.nbytes for t in (*model.graph(name).parameters(), *model.graph(name).buffers()))
            values = {"macs": float(macs[name]), "bytes": moved_bytes(signature, weights)}
            limit = self.results.limits.get(f"gemm_{stage.precision}")
            if limit:
                values["share_of_peak"] = 2 * macs[name] / timed.median / limit
            self.results.rows.append(Row(name, "PyTorch FP16, optimised", {"batch": 1}, timed, values))

    def kernels(self, name: str, stage: Stage) -> None:
        """Which kernels take the time: the table that says what to do next."""
        from torch.profiler import ProfilerActivity, profile

        predict = self.side(build(replace(stage, one=False, graphs=False), self.config, self.device))
        for i in range(3):
            predict(i)
        on_gpu = self.device == "cuda"
        with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiled:
            for i in range(PROFILED):
                predict(i)
        rows = profiled.key_averages()
        times = {r.key: (r.self_device_time_total if on_gpu else r.self_cpu_time_total, r.count) for r in rows}
        total = sum(t for t, _ in times.values()) or 1
        largest = sorted(times.items(), key=lambda item: -item[1][0])[:KERNELS]
        self.results.notes[f"kernels, {name}"] = [
            {"kernel": key, "ms_a_clip": t / PROFILED / 1000, "share": t / total, "calls": n / PROFILED}
            for key, (t, n) in largest
        ]


def _run(module: nn.Module, inputs: list[torch.Tensor], index: int) -> None:
    module(*inputs)


def summary(results: Results) -> None:
    """What was reached, beside the goals."""
    table = Table(title=f"{results.settings['size']} on {(results.machine['gpu'] or {}).get('name', 'a CPU')}")
    for heading in ("", "side", "median ms", "p99 ms", "more"):
        table.add_column(heading, justify="right" if "ms" in heading else "left")
    for row in results.rows:
        times = (
            [f"{1000 * row.timing.median:.2f}", f"{1000 * row.timing.percentile(99):.2f}"] if row.timing else ["", ""]
        )
        more = {**row.axes, **{key: f"{value:.4g}" for key, value in row.values.items()}}
        table.add_row(row.what, row.side, *times, ", ".join(f"{key} {value}" for key, value in more.items()))
    console = Console(width=150)
    console.print(table)
    console.print(f"goals: {GOALS}")
    for name, why in results.left_out.items():
        console.print(f"left out: {name}: {why}")


def measure(
    config: Config,
    device: str,
    minutes: float = 8.0,
    rule: timing.Rule = RULE,
    out: Path = FOLDER,
    skipped: Collection[str] = (),
) -> Results:
    """Every section, the most telling first, but those skipped."""
    run = Run(config, device, minutes, rule, out, skipped)
    on_gpu = device == "cuda"
    waterfall = WATERFALL if on_gpu else {k: s for k, s in WATERFALL.items() if not (s.graphs or s.one)}
    best = next(reversed(waterfall.values()))
    run.section("limits", 10, run.limits)
    run.section("competitors", 30, lambda: run.stages("whole", COMPETITORS))
    run.section("waterfall", 60, lambda: run.stages("waterfall", waterfall))
    if on_gpu:
        run.section(
            "each alone", 30, lambda: run.stages("alone", {"FP16, CUDA graphs": replace(HALF, graphs=True), **ALONE})
        )
        run.section("steps", 15, lambda: run.steps(best))
    run.section("graphs", 20, lambda: run.graphs(replace(best, one=False, sampler=False)))
    run.section("kernels", 15, lambda: run.kernels("optimised", best))
    run.section("kernels of eager FP16", 15, lambda: run.kernels("eager FP16", HALF))
    run.section("batches", 30, lambda: run.batches("PyTorch FP16, optimised", build(best, config, device)))
    run.section("TensorRT", 60, lambda: run.other("TensorRT", "tensorrt"))
    run.section("ONNX Runtime CUDA", 60, lambda: run.other("ONNX Runtime CUDA", "onnxruntime-cuda"))
    compiled = COMPILED if on_gpu else {name: replace(s, graphs=False) for name, s in COMPILED.items()}
    run.section("torch.compile", 150, lambda: run.stages("whole", compiled))
    run.section("AOTInductor", 120, run.aotinductor)
    return run.finish()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(CONFIGS), default="full")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: only to see that it runs")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--out", type=Path, help=f"default bench/results, or {LOOKS} with --device cpu or --skip")
    parser.add_argument(
        "--skip", action="append", default=[], metavar="SECTION", help="one to leave out, as it is printed"
    )
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("PyTorch finds no NVIDIA GPU here: run this on a machine with one")
    config, chosen = get_config(arguments.size), arguments.skip
    out = arguments.out or (LOOKS if arguments.device == "cpu" or chosen else FOLDER)
    summary(measure(config, arguments.device, arguments.minutes, out=out, skipped=chosen))


if __name__ == "__main__":
    main()
