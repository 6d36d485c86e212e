"""The sections of bench/gpu.py that compile, each in a process of its own, which has a limit and takes its GPU memory
with it: `python -m bench.gpu_child SECTION FOLDER SECONDS`.

FOLDER is shared by all of them: `settings.json` says what to measure, SECTION's results are left there as soon as there
are some. SECONDS: how long it may take."""

from __future__ import annotations

import contextlib
import copy
import faulthandler
import functools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from bench import limited, timing
from bench.gpu_run import BATCHES, WHOLE, Run
from bench.limited import ROOT, tail
from bench.results import Results
from bench.stages import COMPILED, REFERENCE, switches, weights
from bench.text import slug
from mubic_deploy import exported
from mubic_deploy.artifacts import Artifacts
from mubic_deploy.checkpoint import Source
from mubic_deploy.config import DEFAULT_STEPS, OPTIMISATIONS, TOKENS, Config
from mubic_deploy.engines import Engine
from mubic_deploy.engines import aotinductor as aotinductor_engine
from mubic_deploy.engines.replay import Replayed
from mubic_deploy.errors import UserError
from mubic_deploy.graphs import FLOAT16, FLOAT32, SAMPLER, Signature
from mubic_deploy.model.inductor import barriers
from mubic_deploy.parity import Parity, compare
from mubic_deploy.pipeline import Pipeline
from mubic_deploy.sources import load_script, source_dir

AOTINDUCTOR, TENSORRT, ONNXRUNTIME = "AOTInductor", "TensorRT", "ONNX Runtime CUDA"
TENSORRT_BATCHES = "TensorRT for batches"  # with kernels chosen for the largest
PROCESS = (sys.executable, "-m", "bench.gpu_child")
COMPILED_PARTS = "parts"  # no section: the compiler of all that the packages hold
COMPILER = "compiler.pid"  # in the folder of the sections: the process that compiles them
SETTINGS = "settings.json"
NICE = 10
Engines = dict[str, Engine]
PATIENCE = 0.6  # of the time, for the sampler's package: without it the loop is measured


def results_file(folder: Path, section: str) -> Path:
    return folder / f"{slug(section)}.json"


def paying(found: Results) -> list[str]:
    """The optimisations of an exported graph that a deployment would take: those that by themselves made the model
    faster in this run. All of them where that was not measured."""
    gains = {row.side: row.values.get("gain", math.inf) for row in found.rows if row.what == "alone"}
    return [name for name in OPTIMISATIONS if gains.get(name, math.inf) > 1]


def write_settings(run: Run, folder: Path) -> None:
    """What every section needs to know of the run that it is a part of."""
    run.results.settings["optimisations"] = paying(run.results)
    settings = {
        "optimisations": run.results.settings["optimisations"],
        "config": run.config.to_json(),
        "device": run.device,
        "rule": asdict(run.rule),
        "limits": run.results.limits,
        "traces": None if run.traces is None else str(run.traces.absolute()),
    }
    write_whole(folder / SETTINGS, json.dumps(settings))


def write_whole(path: Path, text: str) -> None:
    """So that whoever reads it meanwhile finds all of it."""
    beside = path.with_name(f"{path.name}.new")
    beside.write_text(text)
    beside.replace(path)


def read_settings(folder: Path, section: str) -> Run:
    settings = json.loads((folder / SETTINGS).read_text())
    config, rule = Config.from_json(settings["config"]), timing.Rule(**settings["rule"])
    traces = None if settings["traces"] is None else Path(settings["traces"])
    run = Run(config, settings["device"], rule, results_file(folder, section), traces)
    run.results.limits = settings["limits"]
    run.results.settings["optimisations"] = settings["optimisations"]
    return run


# ---- AOTInductor


def packages_script() -> ModuleType:
    return load_script(source_dir("export") / "aotinductor_packages.py")


def package_options(script: ModuleType, run: Run, fixed_steps: int | None) -> Any:
    """Those of a deployment, which searches no kernels for products: that takes minutes a graph. jobs: what is to be
    compiled then is there already."""
    return script.Options(run.device, max_batch=max(BATCHES), fixed_steps=fixed_steps, jobs=1)


def part_names(run: Run) -> list[str]:
    held = aotinductor_engine.contents(run.device, run.config, FLOAT32, sampler=True)
    return [part.name for each in held.values() for part in each]


def compile_parts(run: Run, folder: Path) -> None:
    """All parts at once. As each ends, the list of its files is left in `folder`, or why it has none and the last lines
    that its process wrote."""
    script, names = packages_script(), part_names(run)
    options = package_options(script, run, DEFAULT_STEPS)
    waited_for = set(names)

    def ended(name: str, files: list[str], said: list[str]) -> None:
        waited_for.discard(name)
        write_whole(folder / f"{name}.ended", json.dumps({"files": files, "said": said}))

    try:
        for part in script.side_by_side(weights(run.config, True, "cpu"), options, folder, len(names)):
            ended(part.name, part.files, [*tail(part.log), part.reason] if part.reason else [])
    except Exception as error:  # whoever waits for the others shall not wait until the time is over
        for name in list(waited_for):
            ended(name, [], [f"{type(error).__name__}: {error}"])
        raise


@contextlib.contextmanager
def compiling(run: Run, folder: Path) -> Iterator[None]:
    """The packages are compiled meanwhile, by processes that give way to others."""
    write_settings(run, folder)
    process = subprocess.Popen([*PROCESS, COMPILED_PARTS, str(folder), "0"], cwd=ROOT, process_group=0)
    write_whole(folder / COMPILER, str(process.pid))
    try:
        yield
    finally:
        limited.kill(process)


def compiled_parts(run: Run, folder: Path, limit_s: float) -> dict[str, list[str]]:
    """Waits for them. The last lines of those that failed, and of the sampler if it took longer than limit_s, by the
    part's name."""
    until = time.monotonic() + limit_s
    waited_for = set(part_names(run))
    while waited_for and not (waited_for == {SAMPLER} and time.monotonic() > until):
        over = _is_over(folder)  # before the files are looked for, which it may just have written
        waited_for -= {name for name in waited_for if (folder / f"{name}.ended").exists()}
        if over:
            break
        time.sleep(0.1)
    failed = {name: tail(folder / f"{name}.log") or ["it said nothing"] for name in waited_for}
    ended = (name for name in part_names(run) if name not in waited_for)
    return failed | {name: said for name in ended if (said := _ended(folder, name)["said"])}


def _is_over(folder: Path) -> bool:
    """Whether the process that compiles has ended, as one that was killed for its memory."""
    try:
        process = (folder / COMPILER).read_text()
    except OSError:  # it was not started as a process of its own
        return False
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state in "ZX"


def _ended(folder: Path, name: str) -> dict[str, list[str]]:
    return json.loads((folder / f"{name}.ended").read_text())


def compiler() -> str:
    """The C++ compiler of the packages, and its version."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    command = get_cpp_compiler()
    said = subprocess.run([command, "--version"], capture_output=True, text=True, check=False).stdout
    return f"{command}: {' '.join(said.splitlines()[:1])}"


def aotinductor(run: Run, folder: Path, limit_s: float) -> None:
    """The packages that `mubic-deploy compile --device cuda` makes, of parts that were compiled meanwhile."""
    run.results.notes[f"compiler, {AOTINDUCTOR}"] = compiler()
    run.write()
    failed = compiled_parts(run, folder, PATIENCE * limit_s)
    run.results.notes |= {f"log, {AOTINDUCTOR}, {name}": lines for name, lines in failed.items()}
    if set(failed) - {SAMPLER}:
        raise UserError(f"{', '.join(failed)} could not be compiled")
    if failed:
        run.results.left_out[f"{AOTINDUCTOR}, {SAMPLER}"] = "was not compiled in time, so the loop is measured"
    script = packages_script()

    def take(_module: nn.Module, signature: Signature, _options: Any) -> list[str]:
        return _ended(folder, signature.name)["files"]

    vars(script)["compile_part"] = take
    vars(script)["compare"] = functools.partial(noted_comparison, run)
    options = package_options(script, run, None if failed else DEFAULT_STEPS)
    packages = script.build(weights(run.config, True, run.device), Source("random", 0), folder / "packages", options)
    pipeline = Pipeline.open(packages.path, "aotinductor")
    run.engine(AOTINDUCTOR, pipeline)
    run.kernels(AOTINDUCTOR, pipeline)
    run.kernels(f"{AOTINDUCTOR}, batch {max(BATCHES)}", pipeline, max(BATCHES))
    run.parts(AOTINDUCTOR, pipeline.engines)


def noted_comparison(
    run: Run, config: Config, reference: Engines, packages: Engines, *more: Any, **options: Any
) -> Parity:
    """`parity.compare` of eager PyTorch and the packages, every tensor's differences kept; where they are too large,
    those without CUDA graphs beside them, because a GPU may be there only once."""
    key = f"parity, {AOTINDUCTOR}, batch {options.get('batch', 1)}"
    result = compare(config, reference, packages, *more, **options)
    run.results.notes[key] = {**result.to_json(), "means": result.means}
    run.write()
    if not result.ok:
        singly = {name: unreplayed(engine) for name, engine in packages.items()}
        plain = compare(config, reference, singly, *more, **options | {"conditioner": None})
        run.results.notes[f"{key}, without CUDA graphs"] = {**plain.to_json(), "means": plain.means}
        run.write()
    return result


def unreplayed(engine: Any) -> Any:
    """An engine of packages that launches its kernels one by one."""
    out = copy.copy(engine)
    if isinstance(run := getattr(engine, "run", None), Replayed):
        out.run = run.run
    return out


# ---- engines of exported graphs


def exported_graphs(run: Run, folder: Path) -> Artifacts:
    """In FP16, with the optimisations that pay; made by the first section that wants them."""
    graphs = folder / "graphs"
    if graphs.exists():
        return Artifacts.open(graphs)
    checkpoint = f"random:{run.config.name}"
    options = {"fixed_steps": DEFAULT_STEPS, "optimisations": run.results.settings["optimisations"]}
    return exported.export(checkpoint, graphs, precision=FLOAT16, **options)


def tensorrt(run: Run, folder: Path, limit_s: float) -> None:
    """Engines with kernels chosen for one clip; then, if there is time for as much again, those for the largest batch,
    of which only the batches are measured."""
    script, began = load_script(source_dir("export") / "tensorrt_engines.py"), time.monotonic()
    artifacts, most = exported_graphs(run, folder), max(BATCHES)

    def built(best: int) -> Pipeline:
        options = script.Options(max_batch=most, best_batch=best, timing_cache=folder / "timings")
        return Pipeline.open(script.build(artifacts, folder / f"engines_{best}", options).path, "tensorrt")

    run.engine(TENSORRT, built(1), of_torch=False)
    if time.monotonic() - began < limit_s / 2:
        with run.named(TENSORRT_BATCHES):
            run.batches(TENSORRT_BATCHES, built(most), of_torch=False)
    else:
        run.results.left_out[TENSORRT_BATCHES] = "there was no time to build it too"


def onnxruntime(run: Run, folder: Path, _limit_s: float) -> None:
    pipeline = Pipeline.open(exported_graphs(run, folder).path, "onnxruntime-cuda")
    run.engine(ONNXRUNTIME, pipeline, of_torch=False)


def missing(section: str) -> str:
    """Why an engine cannot be had here, before anything is exported or compiled for it; empty if it can."""
    try:
        if section == AOTINDUCTOR:
            packages_script().require_shared_runtime()
        if section == TENSORRT:
            from mubic_deploy.engines.cuda import import_driver, require_gpu
            from mubic_deploy.engines.tensorrt import import_tensorrt

            require_gpu()
            import_tensorrt()
            import_driver()
        if section == ONNXRUNTIME:
            from mubic_deploy.engines.onnxruntime import require_cuda

            require_cuda()
    except UserError as error:
        return str(error)
    except ImportError as error:
        what = "ONNX Runtime" if section == ONNXRUNTIME else "a package"
        return f"{what} is not installed ({error})"
    return ""


def compiled(name: str, run: Run, _folder: Path, _limit_s: float) -> None:
    stage = replace(COMPILED[name], graphs=run.device == "cuda")
    # what is ours gets what our packages get; what we are compared with stays as PyTorch makes it
    if TOKENS in stage.optimisations:
        # without caches, which may hold kernels that were generated without barriers
        with torch._inductor.config.patch(force_disable_caches=True), barriers():
            run.stages(WHOLE, {name: stage})
    else:
        run.stages(WHOLE, {name: stage})


SECTIONS: dict[str, Callable[[Run, Path, float], None]] = {
    AOTINDUCTOR: aotinductor,
    TENSORRT: tensorrt,
    ONNXRUNTIME: onnxruntime,
    **{name: functools.partial(compiled, name) for name in COMPILED},
}


def say_where_it_crashes() -> None:
    """A crash writes its stack, in C++ and in Python, so that it is in what is kept of a section that failed."""
    faulthandler.enable()  # before PyTorch's, which goes first and hands on
    torch._C._set_print_stack_traces_on_fatal_signal(True)


def main(arguments: Sequence[str]) -> None:
    say_where_it_crashes()
    section, folder = arguments[0], Path(arguments[1])
    run = read_settings(folder, section)
    with switches(REFERENCE):
        if section == COMPILED_PARTS:
            os.nice(NICE)
            compile_parts(run, folder)
            return
        with run.named(section):
            SECTIONS[section](run, folder, float(arguments[2]))
        run.write()


if __name__ == "__main__":
    main(sys.argv[1:])
