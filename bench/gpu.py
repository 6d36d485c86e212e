#!/usr/bin/env python3
"""All that is to be measured on an NVIDIA GPU, in under 8 minutes, with PyTorch and CUDA alone.

    python bench/gpu.py --out bench/results

TensorRT and ONNX Runtime CUDA are measured where they can be used, and named as left out where not; with them it wants
--minutes 15. What compiles runs in a process of its own with a limit: what is cut there is named, and what it had
measured is kept. The result is OUT/gpu_SIZE_DEVICE.json, which a finished run replaces; until then everything is
written to that name with .unfinished behind it as soon as it was measured, so a run that is cut short has left what it
had. Weights are random and of one seed; maps are compared with eager PyTorch in FP32 without TF32."""

from __future__ import annotations

import argparse
import contextlib
import gc
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # as a script, so that `bench` is found
    sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from rich.console import Console
from rich.table import Table

from bench import gpu_child, limited, results, text, timing
from bench.goals import outcomes
from bench.gpu_run import RULE, WHOLE, Run
from bench.results import FOLDER, LOOKS, Results
from bench.stages import ALONE, COMPETITORS, COMPILED, HALF, REFERENCE, WATERFALL, WITHOUT, Stage, build, switches
from mubic_deploy.arguments import Parser, minutes
from mubic_deploy.cli import guarded
from mubic_deploy.config import CONFIGS, TOKENS, Config, get_config
from mubic_deploy.errors import UserError

OPTIMISED = "PyTorch FP16, optimised"
# the waterfall goes on with what was compiled, as it was measured whole
COMPILED_WATERFALL = {
    "torch.compile in place of the rewrites": next(iter(COMPILED)),
    f"{TOKENS}, AOTInductor": gpu_child.AOTINDUCTOR,
}
SLACK = 5.0  # seconds, for what it takes to end a process, so that the sections after it find what they want
LEAST = 0.5  # of the seconds that a section in a process of its own is planned with: less is not worth a start


@dataclass(frozen=True)
class Section:
    """seconds: that it takes on an H200 or, in a process of its own (measure None), that it is sure to get of those
    that are left. missing: why it cannot be measured here; empty if it can."""

    name: str
    seconds: float
    measure: Callable[[], None] | None = None
    missing: str = ""


class Script:
    """A whole run: its sections, and how much time they have."""

    def __init__(self, run: Run, path: Path, minutes: float, skipped: Collection[str] = ()) -> None:
        self.run, self.path, self.skipped = run, path, skipped
        self.ends = time.monotonic() + 60 * minutes
        self.console = Console(stderr=True)

    def measure(self, plan: Sequence[Section]) -> None:
        """UserError, before anything is measured, if what shall be skipped is no section."""
        names = [s.name for s in plan]
        if unknown := [name for name in self.skipped if name not in names]:
            raise UserError(f"--skip {unknown[0]!r} is no section of this run: choose among {', '.join(names)}")
        planned = {s.name for s in plan if not (s.missing or s.name in self.skipped)}
        with tempfile.TemporaryDirectory(prefix="mubic-gpu-") as name:
            folder = Path(name)
            aotinductor = gpu_child.AOTINDUCTOR in planned
            with gpu_child.compiling(self.run, folder) if aotinductor else contextlib.nullcontext():
                for i, section in enumerate(plan):
                    self.section(section, folder, sum(s.seconds for s in plan[i + 1 :] if s.name in planned))
        self.run.compiled_waterfall(COMPILED_WATERFALL)
        self.run.write()
        self.run.file.replace(self.path)

    def section(self, section: Section, folder: Path, later: float = 0.0) -> None:
        """Runs it if there is time, and writes what there is. What fails is named, and the rest goes on. later: the
        seconds that the sections after it want."""
        began, left_out = time.monotonic(), self.run.results.left_out
        left = self.ends - began
        if section.name in self.skipped:
            left_out[section.name] = "as was asked for (--skip)"
        elif section.missing:
            left_out[section.name] = section.missing
        elif left < (wanted := section.seconds * (LEAST if section.measure is None else 1)):
            left_out[section.name] = f"{wanted:.0f} s were not left"
        else:
            with self.run.named(section.name):
                if section.measure is not None:
                    section.measure()
                else:
                    self.apart(section.name, folder, min(left, max(section.seconds, left - later - SLACK)))
        gc.collect()
        with contextlib.suppress(RuntimeError):  # which an error of CUDA's in this process leaves for all that follows
            torch.cuda.empty_cache()  # for other processes; without a GPU it does nothing
        said = f"{section.name}: {time.monotonic() - began:.0f} s {left_out.get(section.name, '')}"
        self.console.print(said, markup=False, soft_wrap=True)
        self.run.write()

    def apart(self, name: str, folder: Path, limit_s: float) -> None:
        """A section in a process of its own; CutError after limit_s. What it had measured by then is kept."""
        gpu_child.write_settings(self.run, folder)
        try:
            limited.run([*gpu_child.PROCESS, name, str(folder), str(limit_s)], limit_s)
        finally:
            file = gpu_child.results_file(folder, name)
            if file.exists():
                theirs, mine = results.read(file), self.run.results
                numbers = defaultdict[int, int](lambda: next(timing.numbers))  # it counted from 1 on as well
                for row in theirs.rows:
                    if row.timing is not None and row.timing.measurement is not None:
                        row.timing = replace(row.timing, measurement=numbers[row.timing.measurement])
                mine.rows += theirs.rows
                mine.left_out |= theirs.left_out
                mine.notes |= theirs.notes


def sections(run: Run, whole_search: bool = False) -> list[Section]:
    """They are 472 s together, without those for which more must be installed or asked for.

    First what the GPU alone decides, while AOTInductor's packages are compiled beside it. What waits for the host, as
    eager PyTorch does, comes when they are done. After it the kernels: a process that was profiled launches slower from
    then on (pytorch#144455). Last what compiles once more, which takes all the time that is left."""
    on_gpu = run.device == "cuda"
    waterfall = WATERFALL if on_gpu else {k: s for k, s in WATERFALL.items() if not (s.graphs or s.one)}
    alone, without = ({name: replace(s, graphs=on_gpu) for name, s in stages.items()} for stages in (ALONE, WITHOUT))
    best = next(reversed(waterfall.values()))
    looped = replace(best, one=False, sampler=False, graphs=on_gpu)
    unreplayed = replace(best, one=False, graphs=False)

    def made(stage: Stage) -> Any:  # a predictor, of the kind that the stage says
        return build(stage, run.config, run.device)

    limited_search, optimised, whole = COMPILED
    return [
        Section("limits", 5, run.limits),
        Section("graphs", 6, lambda: run.graphs(looped)),
        Section("each alone", 14, lambda: run.stages("alone", alone, run.look)),
        Section("without", 7, lambda: run.stages("without", without, run.look)),
        Section("batches", 25, lambda: run.batches(OPTIMISED, made(best))),
        Section(gpu_child.AOTINDUCTOR, 180, missing=gpu_child.missing(gpu_child.AOTINDUCTOR)),
        Section(WHOLE, 25, lambda: run.stages(WHOLE, {**COMPETITORS, OPTIMISED: best})),
        Section("waterfall", 22, lambda: run.stages("waterfall", waterfall, run.look)),
        Section("steps", 5, lambda: run.steps(OPTIMISED, made(looped))),
        Section("kernels", 7, lambda: run.kernels("optimised", made(unreplayed))),
        Section("kernels of eager FP16", 6, lambda: run.kernels("eager FP16", made(HALF))),
        Section(whole, 480) if whole_search else Section(limited_search, 110),
        Section(optimised, 60),
        Section(gpu_child.TENSORRT, 240, missing=gpu_child.missing(gpu_child.TENSORRT)),
        Section(gpu_child.ONNXRUNTIME, 120, missing=gpu_child.missing(gpu_child.ONNXRUNTIME)),
    ]


def measure(
    config: Config,
    device: str,
    minutes: float = 8.0,
    rule: timing.Rule = RULE,
    out: Path = FOLDER,
    skipped: Collection[str] = (),
    whole_search: bool = False,
    traces: Path | None = None,
) -> tuple[str, Results]:
    """Every section but those skipped; the name of the file, and what is in it. traces: folder for the profiler's.
    UserError as `Script.measure`'s, and for a folder that cannot be made."""
    name = torch.cuda.get_device_name() if device == "cuda" else device
    path = out / f"gpu_{config.name}_{text.slug(name)}.json"
    if traces is not None:
        try:
            traces.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{traces} cannot be made ({error.strerror}): choose another --traces") from None
    with switches(REFERENCE):
        run = Run(config, device, rule, path.with_name(f"{path.name}.unfinished"), traces)
        Script(run, path, minutes, skipped).measure(sections(run, whole_search))
    return path.name, run.results


def summary(name: str, found: Results) -> None:
    """What was measured, then which goals that reaches. name: of the file."""
    console = Console(width=150)
    table = Table(title=f"{found.settings['size']} on {(found.machine['gpu'] or {}).get('name', 'a CPU')}")
    for heading in ("", "side", "median ms", "p99 ms", "more"):
        table.add_column(heading, justify="right" if "ms" in heading else "left")
    for row in found.rows:
        times = ["", ""]
        if row.timing:
            p99 = f"{1000 * row.timing.percentile(99):.2f}" if 99 in timing.told(len(row.timing.samples)) else "-"
            times = [f"{1000 * row.timing.median:.2f}", p99]
        more = {**row.axes, **{key: f"{value:.4g}" for key, value in row.values.items()}}
        table.add_row(row.what, row.side, *times, ", ".join(f"{key} {value}" for key, value in more.items()))
    console.print(table)
    reached = Table(title="Goals")
    for heading in ("", "goal", "measured", "reached", "of"):
        reached.add_column(heading)
    for outcome in outcomes({name: found}):
        figure, goal = outcome.figure, outcome.goal
        measured = f"{figure.measured:.4g} {goal.unit}" if figure else ""
        reached.add_row(goal.name, goal.bounds, measured, outcome.reached, figure.of if figure else "")
    console.print(reached)
    for side, why in found.left_out.items():
        console.print(f"left out: {side}: {why}", markup=False, soft_wrap=True)


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(CONFIGS), default="full")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: only to see that it runs")
    parser.add_argument("--minutes", type=minutes, default=8.0)
    parser.add_argument("--out", type=Path, help=f"default bench/results, or {LOOKS} with --device cpu or --skip")
    parser.add_argument(
        "--skip", action="append", default=[], metavar="SECTION", help="one to leave out, as it is printed"
    )
    parser.add_argument(
        "--whole-search", action="store_true", help="all that torch.compile's max-autotune searches: 7 minutes more"
    )
    parser.add_argument(
        "--traces", type=Path, metavar="DIR", help="leave the profiler's traces there too, for Perfetto or Chrome"
    )
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("PyTorch finds no NVIDIA GPU here: run this on a machine with one")
    config, chosen = get_config(arguments.size), arguments.skip
    out = arguments.out or (LOOKS if arguments.device == "cpu" or chosen else FOLDER)
    whole, traces = arguments.whole_search, arguments.traces
    found = measure(
        config, arguments.device, arguments.minutes, out=out, skipped=chosen, whole_search=whole, traces=traces
    )
    summary(*found)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))  # which ends what was started, too
