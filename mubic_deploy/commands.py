"""What the command line does. Each function takes the parsed arguments and returns the exit code."""

from __future__ import annotations

import contextlib
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

from mubic_deploy import exported
from mubic_deploy.artifacts import Artifacts
from mubic_deploy.config import ADAPTIVE, CONFIGS, DEMO_CHECKPOINT, RANDOM, VARIANTS, Config, get_config, weights_seed
from mubic_deploy.console import bar, print_json, say, screen, warn
from mubic_deploy.errors import UserError
from mubic_deploy.graphs import FLOAT32
from mubic_deploy.pipeline import AOTINDUCTOR, EAGER, ENGINES, TENSORRT, Pipeline, Predictor
from mubic_deploy.thesis import TABLE_4_3

UNTRAINED = "the weights are random (seed {seed}): the maps show that the machinery runs, not where people look"

CAPTURING = (TENSORRT, AOTINDUCTOR, "onnxruntime-cuda")  # engines that can replay CUDA graphs
BUILT = {
    TENSORRT: ("plans that were built for this GPU", "mubic-deploy engines"),
    AOTINDUCTOR: ("packages that were compiled for this machine", "mubic-deploy compile"),
}


def info(arguments: Namespace) -> int:
    """Parameters and MACs of every configuration asked for."""
    from mubic_deploy.model.mubic import cost

    names = [arguments.config] if arguments.config else list(CONFIGS)
    variants = [arguments.variant] if arguments.variant else list(VARIANTS)
    rows: list[dict[str, Any]] = []
    with bar("counting") as progress:
        pairs = [(name, variant) for name in names for variant in variants]
        for done, (name, variant) in enumerate(pairs):
            progress(f"counting {name} {variant}", done, len(pairs))
            c = cost(get_config(name, variant))
            rows.append(
                {
                    "config": name,
                    "variant": variant,
                    "parameters": c.parameters,
                    "parameters_without_vggish": c.parameters_without_vggish,
                    "macs_4_steps": c.macs_4_steps,
                }
            )
    if arguments.json:
        print_json(rows)
        return 0
    table = Table(title="Parameters (millions) and MACs of 4 steps (billions); thesis: Table 4.3, without VGGish")
    for heading in ("config", "variant", "M params", "no VGGish", "thesis", "GMACs", "thesis"):
        table.add_column(heading, justify="left" if heading in ("config", "variant") else "right", no_wrap=True)
    for row in rows:
        reported = TABLE_4_3[row["variant"]] if row["config"] == "full" else None
        millions = [f"{row[key] / 1e6:.2f}" for key in ("parameters", "parameters_without_vggish")]
        said = [f"{x:.2f}" if x else "-" for x in (reported.parameters, reported.macs)] if reported else ["", ""]
        table.add_row(row["config"], row["variant"], *millions, said[0], f"{row['macs_4_steps'] / 1e9:.1f}", said[1])
    screen.print(table)
    return 0


def export(arguments: Namespace) -> int:
    """Graphs of a checkpoint into a folder."""
    began = time.monotonic()
    with bar("exporting") as progress:
        artifacts = exported.export(
            arguments.checkpoint,
            arguments.out,
            arguments.variant,
            arguments.seed,
            progress,
            arguments.precision,
            arguments.fixed_steps,
            arguments.optimise or (),
        )
    parity = artifacts.manifest["parity"]
    if arguments.json:
        print_json({"out": str(artifacts.path), "seconds": time.monotonic() - began, "parity": parity})
        return 0
    _parity_table(parity)
    say(f"exported to {artifacts.path} in {time.monotonic() - began:.0f} s")
    return 0


def parity(arguments: Namespace) -> int:
    """Exported graphs against the eager model they came from."""
    from mubic_deploy import checkpoint
    from mubic_deploy import parity as check
    from mubic_deploy.engines import cpu, eager

    artifacts = Artifacts.open(arguments.artifacts)
    source = artifacts.manifest["source"]
    named = arguments.checkpoint or source["name"]
    is_file = source["seed"] is None and named != DEMO_CHECKPOINT
    if arguments.checkpoint is None and is_file and not Path(named).is_file():  # moved, or named from another folder
        raise UserError(f"{named}, which {artifacts.path} was exported from, is not there: name it with --checkpoint")
    seed = source["seed"] if named.startswith(RANDOM) else None
    model, found = checkpoint.load(named, artifacts.config.variant, seed)
    if model.config != artifacts.config or found.sha256 != source.get("sha256"):
        raise UserError(
            f"{arguments.artifacts} was not exported from {named} as it is now: name its weights with --checkpoint"
        )
    with bar("comparing") as progress:

        def compared(clips: int) -> None:
            progress("comparing clips", clips, arguments.clips)

        engines = cpu.load_engines(arguments.engine, artifacts)
        reference = eager.load_engines(model, fixed_steps=artifacts.fixed_steps)
        precision = artifacts.precision
        result = check.compare(artifacts.config, reference, engines, arguments.clips, compared, precision)
    if arguments.json:
        print_json(result.to_json())
    else:
        _parity_table(result.to_json(), f"{arguments.engine} against eager PyTorch")
    if not result.ok:
        result.require()
    return 0


def engines(arguments: Namespace) -> int:
    """TensorRT plans of a folder of graphs, on the GPU here."""
    from mubic_deploy.sources import load_script, source_dir

    began = time.monotonic()
    artifacts = Artifacts.open(arguments.artifacts)
    script = load_script(source_dir("export") / "tensorrt_engines.py")
    options = script.Options(
        arguments.max_batch, arguments.best_batch, arguments.level, arguments.version_compatible, arguments.timing_cache
    )
    if artifacts.precision == FLOAT32:
        warn(["these graphs are FP32, and so will be the engines: export them with --precision float16 for speed"])
    with bar("building") as progress:
        plans = script.build(artifacts, arguments.out, options, progress, not arguments.no_cuda_graphs)
    seconds, parity = time.monotonic() - began, plans.manifest["parity"]
    if arguments.json:
        print_json({"out": str(plans.path), "seconds": seconds, "parity": parity, "gpu": plans.manifest["gpu"]})
        return 0
    _parity_table(parity, "TensorRT against ONNX Runtime")
    say(f"built for {plans.manifest['gpu']['name']} in {plans.path} in {seconds:.0f} s")
    say(f"  try it: mubic-deploy predict FILM.mp4 -o OVERLAY.mp4 --engine tensorrt --artifacts {plans.path}")
    return 0


def compile(arguments: Namespace) -> int:
    """Packages of a checkpoint, for the machine here."""
    from mubic_deploy import checkpoint
    from mubic_deploy.sources import load_script, source_dir

    began = time.monotonic()
    script = load_script(source_dir("export") / "aotinductor_packages.py")
    options = script.Options(
        arguments.device,
        arguments.precision,
        arguments.max_batch,
        arguments.fixed_steps,
        arguments.optimise,
        arguments.autotune,
        arguments.jobs,
    )
    with bar("compiling") as progress:
        progress("loading weights", 0, None)
        model, source = checkpoint.load(arguments.checkpoint, arguments.variant, arguments.seed)
        packages = script.build(model, source, arguments.out, options, progress)
    seconds, parity = time.monotonic() - began, packages.manifest["parity"]
    if arguments.json:
        print_json({"out": str(packages.path), "seconds": seconds, "parity": parity})
        return 0
    _parity_table(parity, "AOTInductor against eager PyTorch")
    say(f"compiled for this {arguments.device} in {packages.path} in {seconds:.0f} s")
    say(f"  try it: mubic-deploy predict FILM.mp4 -o OVERLAY.mp4 --engine aotinductor --artifacts {packages.path}")
    return 0


def _parity_table(parity: dict[str, Any], what: str = "ONNX Runtime against eager PyTorch") -> None:
    named = "FP32" if parity["precision"] == FLOAT32 else "FP16, graphs in parts of the largest value"
    table = Table(title=f"{what}, {named}, {parity['clips']} random clips")
    table.add_column("graph")
    table.add_column("tensor")
    table.add_column("largest difference", justify="right")
    for graph, tensors in parity["graphs"].items():
        for tensor, difference in tensors.items():
            table.add_row(graph, tensor, f"{difference:.1e}")
    table.add_row("final map", "SALIENCY", f"{parity['map_difference']:.1e}")
    table.add_row("final map", "lowest CC", f"{parity['map_cc']:.9f}")
    screen.print(table)


def untrained(seed: int | None) -> list[str]:
    """The warning for random weights; `seed` is theirs, None for weights from a file."""
    return [] if seed is None else [UNTRAINED.format(seed=seed)]


def unfamiliar(config: Config, seed: int | None, fit: str | None) -> list[str]:
    """The warning for weights that meet what they were not trained on: `untrained`'s, or that of a fit which is not
    theirs; None is theirs."""
    if seed is None and fit not in (None, config.fit):
        return [f"the model was trained with --fit {config.fit}: with {fit} it sees frames as it never saw them"]
    return untrained(seed)


def artifacts_of(arguments: Namespace, seed: int | None = None) -> Artifacts:
    """The folder that was named, or the cached export of the checkpoint; seed: of random weights."""
    if arguments.artifacts is not None:
        weights_seed(arguments.artifacts, seed)
        return Artifacts.open(arguments.artifacts, arguments.variant)
    with bar("exporting") as progress:
        return exported.cached(arguments.checkpoint or DEMO_CHECKPOINT, arguments.variant, seed, progress)


def built(arguments: Namespace) -> Path:
    """The folder of what --engine, one of BUILT, runs. UserError unless it was named, and nothing else."""
    what, command = BUILT[arguments.engine]
    if arguments.artifacts is None or arguments.checkpoint or arguments.variant:
        raise UserError(
            f"{arguments.engine} runs {what}: name their folder with --artifacts, without --checkpoint and --variant "
            f"(make it with {command})"
        )
    return arguments.artifacts


@contextlib.contextmanager
def predictor(arguments: Namespace) -> Iterator[tuple[Predictor, list[str]]]:
    """What predicts, by --engine, and what there is to say about it."""
    engine = arguments.engine
    if engine not in ENGINES and not engine.startswith("triton://"):
        raise UserError(f"unknown engine {engine!r}: use {', '.join(ENGINES)} or triton://HOST:PORT")
    if arguments.no_cuda_graphs and engine not in CAPTURING:
        raise UserError(f"--no-cuda-graphs is for --engine {', '.join(CAPTURING)}: leave it out")
    remotely = engine.startswith("triton://")
    if arguments.timeout is not None and not remotely:
        raise UserError("--timeout is for --engine triton://HOST:PORT: leave it out")
    if remotely:
        if arguments.checkpoint or arguments.artifacts or arguments.variant:
            raise UserError("a Triton server has its own graphs: leave out --checkpoint, --artifacts and --variant")
        from mubic_deploy.triton.client import TIMEOUT_S, TritonPredictor

        with TritonPredictor(engine, arguments.timeout or TIMEOUT_S) as remote:
            yield remote, unfamiliar(remote.config, remote.source["seed"], arguments.fit)
        return
    given = arguments.artifacts
    if engine in EAGER and given is not None:
        raise UserError(f"{engine} runs a checkpoint: give --checkpoint instead of --artifacts")
    if engine in BUILT:
        given = built(arguments)
    elif engine not in EAGER:
        given = artifacts_of(arguments).path  # with a progress bar, if it must be exported
    source = given or arguments.checkpoint or DEMO_CHECKPOINT
    pipeline = Pipeline.open(source, engine, arguments.variant, cuda_graphs=not arguments.no_cuda_graphs)
    yield pipeline, unfamiliar(pipeline.config, pipeline.source["seed"], arguments.fit)


def predict(arguments: Namespace) -> int:
    """A film to an overlay, maps, a contact sheet."""
    from mubic_deploy.predict import check, predict_film

    outputs = {"overlay": arguments.overlay, "maps": arguments.maps, "contact_sheet": arguments.contact_sheet}
    check(arguments.video, **outputs)  # before an export, which takes a minute
    with predictor(arguments) as (model, warnings), bar("predicting") as progress:
        result = predict_film(
            model,
            arguments.video,
            **outputs,
            steps=arguments.steps,
            seed=arguments.seed,
            stride=arguments.stride,
            fit=arguments.fit,
            batch=arguments.batch,
            progress=lambda done, total: progress("predicting frames", done, total),
        )
        asked = model.default_steps if arguments.steps is None else arguments.steps
    warnings = warnings + result.warnings
    if arguments.json:
        print_json(
            {
                "maps": result.maps,
                "frames": result.frames,
                "steps": "adaptive" if asked == ADAPTIVE else asked,
                "steps_used": result.steps_used,
                "seconds": result.seconds,
                "warnings": warnings,
            }
        )
        return 0
    warn(warnings)
    steps = ", ".join(f"{count} with {n} steps" for n, count in result.steps_used.items())
    say(f"{result.maps} maps ({steps}) of {result.frames} frames in {result.seconds:.1f} s")
    for path in outputs.values():
        if path is not None:
            say(f"  {path}")
    return 0
