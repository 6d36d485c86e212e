#!/usr/bin/env python3
"""Compile the graphs of a checkpoint with AOTInductor, on the machine that will run them.

    python export/aotinductor_packages.py CHECKPOINT --out DIR    (or: mubic-deploy compile CHECKPOINT --out DIR)

For a machine with PyTorch and without TensorRT. Nothing is left behind unless every package agrees with eager PyTorch.
"""

from __future__ import annotations

import contextlib
import copy
import faulthandler
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Collection, Generator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch._inductor import aot_compile
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.package import package_aoti

from mubic_deploy import checkpoint
from mubic_deploy.artifacts import PACKAGES_MANIFEST, describe, sha256
from mubic_deploy.checkpoint import Source
from mubic_deploy.config import (
    MAX_BATCH,
    ON_GPU,
    PAD_HEADS,
    REWRITES,
    TOKENS,
    Config,
    check_optimisations,
    check_precision,
)
from mubic_deploy.console import Progress
from mubic_deploy.engines import aotinductor, eager
from mubic_deploy.engines.aotinductor import FORMAT, Packages
from mubic_deploy.engines.cpu import cores
from mubic_deploy.engines.memory import first_line, is_short, short_of_memory
from mubic_deploy.errors import UserError, whole
from mubic_deploy.folders import replacing, require_replaceable
from mubic_deploy.graphs import FLOAT16, FLOAT32, SAMPLER, Signature, signatures
from mubic_deploy.model.inductor import barriers
from mubic_deploy.model.mubic import MUBiC, traced_with
from mubic_deploy.model.precision import prepared, recorded, require_small
from mubic_deploy.model.tokens import INDUCTOR
from mubic_deploy.parity import CLIPS, compare, random_clip
from mubic_deploy.pipeline import Pipeline

LEAST_CAPABILITY = 8.0  # of a GPU, for PyTorch's flash kernel
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose3d)
ONE_PART = "--part"
PROCESS = (sys.executable, __file__, ONE_PART)  # compiles one
WEIGHTS, OPTIONS = "weights.safetensors", "options.json"  # what it is to compile, and how
FEWER = "compile with fewer --jobs, which want less memory, or where there is more"
RAISED = re.compile(r"[\w.]+(Error|Exception)\b")  # the line of a traceback that says what
LONGEST = "visual_encoder_3"  # has as many kernels as most other parts together


@dataclass(frozen=True)
class Options:
    """device       cpu or cuda
    precision    float32, or float16 under the policy of `mubic_deploy.model.precision`, on cuda; None for float16 on
                 cuda, float32 on cpu
    max_batch    batches go from 1 to this
    fixed_steps  also the sampler of so many steps
    optimisations  some of `config.REWRITES`; None for `config.ON_GPU` on cuda, none on cpu
    autotune     measure every kernel that is to choose from: minutes instead of seconds a graph
    jobs         parts of the packages that are compiled at once, each in a process of its own; None for one a core on
                 cuda, whose parts are many and keep but one core busy, for 1 on cpu, whose compiler takes several, and
                 with autotune, whose times the others would spoil"""

    device: str = "cpu"
    precision: str | None = None
    max_batch: int = MAX_BATCH
    fixed_steps: int | None = None
    optimisations: Collection[str] | None = None
    autotune: bool = False
    jobs: int | None = None

    def __post_init__(self) -> None:
        if self.device not in ("cpu", "cuda"):
            raise UserError(f"unknown device {self.device!r}: choose cpu or cuda, the first NVIDIA GPU")
        if self.precision is not None:
            check_precision(self.precision)
        check_optimisations(self.optimisations or (), REWRITES)
        if self.jobs is not None:
            object.__setattr__(self, "jobs", whole("jobs", self.jobs, 1))
        if self.autotune and (self.jobs or 1) > 1:
            raise UserError("kernels are measured, so nothing else may run beside: leave out --jobs, or --autotune")
        if self.device == "cpu" and self.chosen_precision != FLOAT32:
            raise UserError("on a CPU packages compute in FP32: leave out --precision, or name --device cuda")
        # of 1 no axis would be dynamic
        object.__setattr__(self, "max_batch", whole("max batch", self.max_batch, 2))

    @property
    def chosen_precision(self) -> str:
        return self.precision or (FLOAT16 if self.device == "cuda" else FLOAT32)

    @property
    def rewrites(self) -> list[str]:
        """The optimisations, in the order in which they are applied."""
        chosen = self.optimisations
        if chosen is None:
            chosen = ON_GPU if self.device == "cuda" else ()
        return [name for name in REWRITES if name in chosen]

    @property
    def remedy(self) -> str:
        """What to leave out where the compiler made something else of the model."""
        if self.autotune:
            return "compile without --autotune, which takes other kernels"
        if TOKENS in self.rewrites:
            return f"compile with --optimise {PAD_HEADS} alone, which leaves the compiler less to do"
        if self.chosen_precision != FLOAT32:
            return f"compile with --precision {FLOAT32}, to see whether it is the precision"
        return "compile with another version of PyTorch, or take ONNX Runtime (mubic-deploy export)"

    @property
    def inductor(self) -> dict[str, Any]:
        """Settings of the compiler."""
        tuned: dict[str, Any] = {"max_autotune": True} if self.autotune else {}
        # what launches the kernels runs once, when they are captured, and takes a minute to optimise
        host = {"aot_inductor.compile_wrapper_opt_level": "O0"} if self.device == "cuda" else {}
        return tuned | host | (INDUCTOR if TOKENS in self.rewrites else {})


def build(
    model: MUBiC, source: Source, out: Path, options: Options = Options(), progress: Progress = lambda *_: None
) -> Packages:
    """Packages of all graphs of `model` into `out`, which may hold earlier ones (they are replaced).

    UserError without the device or a C++ compiler, for one as of `require_shared_runtime`, for a GPU too old for FP16,
    for activations too large for it,
    if `out` is something else or cannot be written, or if a package does not compute what eager PyTorch does."""
    device = torch.device(options.device)
    facts = aotinductor.facts(device)
    require_shared_runtime()
    if options.chosen_precision == FLOAT16 and float(facts["compute_capability"]) < LEAST_CAPABILITY:
        raise UserError(
            f"{facts['name']} has compute capability {facts['compute_capability']}, and attention in FP16 wants "
            f"{LEAST_CAPABILITY}: use --precision {FLOAT32}"
        )
    if options.fixed_steps is not None:
        model.config.check_fixed_steps(options.fixed_steps)
    out = Path(out)
    try:
        require_replaceable(out, PACKAGES_MANIFEST, Packages.LAYOUT.files, "holds no earlier packages")
        with eager.enough_memory("compiling the graphs"), replacing(out) as folder:
            _build_into(folder, model, source, options, facts, progress)
    except OSError as error:
        where = error.filename or out
        raise UserError(
            f"{where} cannot be written ({error.strerror or error}): make room, or choose another --out"
        ) from None
    return Packages.open(out)


def _build_into(
    folder: Path, model: MUBiC, source: Source, options: Options, facts: dict[str, Any], progress: Progress
) -> None:
    device, steps = torch.device(options.device), options.fixed_steps
    model = copy.deepcopy(model).eval().to(device)
    if options.chosen_precision != FLOAT32:  # else it would be said after minutes
        require_small(activations_of(model))
    graphs = signatures(model.config, options.chosen_precision, sampler=steps is not None)
    contents = contents_of(model.config, options)
    total = len(part_names(model.config, options)) + CLIPS
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "source": source.to_json(),
        "config": model.config.to_json(),
        "precision": options.chosen_precision,
        "fixed_steps": steps,
        "optimisations": options.rewrites,
        "torch": torch.__version__,
        "device": facts,
        "profile": {"min": 1, "max": options.max_batch},
        "autotune": options.autotune,
        "packages": {},
    }
    files = compile_parts(model, options, folder, lambda what, done: progress(what, done, total))
    for name, signature in graphs.items():
        path = folder / f"{name}.pt2"
        held: dict[str, Any] = {part.name: files[part.name] for part in contents[name]}
        package_aoti(str(path), held)
        manifest["packages"][name] = {"file": path.name, "sha256": sha256(path), "signature": describe(signature)}
    (folder / PACKAGES_MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")

    def checked(clips: int) -> None:
        progress("checking against eager PyTorch", total - CLIPS + clips, total)

    packages, reference = Packages.open(folder), eager.load_engines(model, fixed_steps=steps)
    candidate = aotinductor.load_engines(packages)
    said = ("the compiled packages differ from eager PyTorch", options.remedy)
    more: dict[str, Any] = {
        "precision": options.chosen_precision,
        "conditioner": aotinductor.load_conditioner(packages, candidate),  # as the pipeline runs them
    }
    if device.type == "cuda":
        more["allocate"] = eager.pinned_array
    parity = compare(model.config, reference, candidate, progress=checked, **more)
    parity.require(*said)
    # and whether the samples of the largest batch stay apart
    compare(model.config, reference, candidate, 1, batch=options.max_batch, **more).require(*said)
    manifest["parity"] = parity.to_json()
    (folder / PACKAGES_MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def activations_of(model: MUBiC) -> dict[str, float]:
    """What random clips make of `model`, see `recorded`."""
    clips = random_clip(model.config, 0, CLIPS)
    with recorded(model) as activations:
        Pipeline(model.config, eager.load_engines(model)).predict(clips["VIDEO"], clips["AUDIO"], 0)
    return activations


def require_shared_runtime() -> None:
    """UserError if the C++ compiler links its standard library statically: every package would bring a second one,
    which crashes as soon as it is loaded beside PyTorch's (in std::regex, whose locales the two of them mix up)."""
    with tempfile.TemporaryDirectory(prefix="mubic-compiler-") as folder:
        source, library = Path(folder, "probe.cpp"), Path(folder, "probe.so")
        source.write_text("int* probe() { return new int; }\n")  # which is the library's
        try:
            command = get_cpp_compiler()
            subprocess.run([command, "-shared", "-fPIC", source, "-o", library], capture_output=True, check=True)
        except (OSError, RuntimeError, subprocess.CalledProcessError):
            return  # there is none, or it fails: which is said when it compiles
        needed = library.read_bytes()
    if b"libstdc++.so" not in needed and b"libc++." not in needed:
        raise UserError(
            f"{command} links libstdc++ statically, and packages that it makes crash: name another C++ compiler in "
            f"CXX, such as the system's g++"
        )


def contiguous_convolutions(model: MUBiC) -> MUBiC:
    """`model`, in place, with every convolution's input made contiguous.

    A package expects its convolutions' results to lie as they did when it was compiled, with two samples. With one, the
    strides of a transposed view fit two layouts, the kernel picks the other one, and the package reads nonsense."""

    def lay_out(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(x.contiguous() for x in arguments)

    for module in model.modules():
        if isinstance(module, CONVOLUTIONS):
            module.register_forward_pre_hook(lay_out)
    return model


def contents_of(config: Config, options: Options) -> dict[str, tuple[Signature, ...]]:
    """What the package of each graph holds, see `aotinductor.contents`."""
    return aotinductor.contents(options.device, config, options.chosen_precision, options.fixed_steps is not None)


def part_names(config: Config, options: Options) -> list[str]:
    return [part.name for parts in contents_of(config, options).values() for part in parts]


def parts_of(model: MUBiC, options: Options) -> dict[str, tuple[Signature, nn.Module]]:
    """What is compiled, by name: all that the packages hold. `model` is left as it is."""
    model = contiguous_convolutions(prepared(model, options.chosen_precision, options.rewrites))
    found: dict[str, tuple[Signature, nn.Module]] = {}
    for graph, parts in contents_of(model.config, options).items():
        steps = options.fixed_steps
        modules = model.parts(graph, steps) if len(parts) > 1 else [model.graph(graph, steps)]
        found |= {part.name: (part, module) for part, module in zip(parts, modules, strict=True)}
    return found


def compile_parts(
    model: MUBiC, options: Options, folder: Path, progress: Callable[[str, int], None]
) -> dict[str, list[str]]:
    """The files of each part. folder: for what it needs meanwhile. UserError: see `compile_part`."""
    names = part_names(model.config, options)
    beside = cores() if options.device == "cuda" and not options.autotune else 1
    jobs = min(options.jobs or beside, len(names))
    files = {}
    if jobs == 1:
        for done, (name, (signature, module)) in enumerate(parts_of(model, options).items()):
            progress(f"compiling {name}", done)
            files[name] = compile_part(module, signature, options)
        return files
    progress(f"compiling {jobs} of {len(names)} parts at once", 0)
    with (
        tempfile.TemporaryDirectory(dir=folder) as shared,
        contextlib.closing(side_by_side(model, options, Path(shared), jobs)) as results,
    ):
        for done, result in enumerate(results, 1):
            if result.reason:
                raise UserError(result.reason)
            files[result.name] = result.files
            progress(f"compiled {result.name}", done)
    return files


@dataclass(frozen=True)
class Compiled:
    """A part: its files, or the reason why it has none. log: what its process said."""

    name: str
    files: list[str]
    reason: str
    log: Path


def side_by_side(model: MUBiC, options: Options, folder: Path, jobs: int) -> Generator[Compiled]:
    """Compiles all parts, `jobs` of them at once, those that take the longest first, each in a process of its own. As
    they end, whether well or not. Whoever closes it ends those that run."""
    checkpoint.save(model, folder / WEIGHTS)
    (folder / OPTIONS).write_text(json.dumps(asdict(replace(options, optimisations=options.rewrites))))
    waiting = sorted(part_names(model.config, options), key=lambda name: name not in (LONGEST, SAMPLER))
    share = max(1, 2 * len(os.sched_getaffinity(0)) // jobs)  # they are rarely all at what takes threads
    at_work: dict[str, subprocess.Popen[bytes]] = {}
    try:
        while waiting or at_work:
            while waiting and len(at_work) < jobs:
                at_work[waiting[0]] = _started(folder, waiting[0], share * (1 + (waiting[0] == LONGEST)), options)
                del waiting[0]
            for name in [name for name, process in at_work.items() if process.poll() is not None]:
                yield _compiled(folder, name, at_work.pop(name).returncode, options)
            time.sleep(0.05)
    finally:
        for process in at_work.values():
            process.kill()
        for process in at_work.values():
            process.wait()


def _started(folder: Path, name: str, threads: int, options: Options) -> subprocess.Popen[bytes]:
    """The process that compiles a part. A kernel for a CPU is made for as many threads as PyTorch has."""
    own = threads if options.device == "cuda" else torch.get_num_threads()
    path = [str(Path(checkpoint.__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "TORCHINDUCTOR_COMPILE_THREADS": str(threads),
        "OMP_NUM_THREADS": str(own),
        "PYTHONPATH": os.pathsep.join(path),
    }
    with (folder / f"{name}.log").open("wb") as log:
        command = [*PROCESS, str(folder), name]
        try:
            return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        except OSError as error:
            raise UserError(f"no process can be started for {name} ({error.strerror}): {FEWER}") from None


def _compiled(folder: Path, name: str, code: int, options: Options) -> Compiled:
    """What a process left that has ended."""
    result, log = folder / f"{name}.json", folder / f"{name}.log"
    if code == 0 and result.exists():
        found = json.loads(result.read_text())
        return Compiled(name, found["files"], found["reason"], log)
    if code < 0:
        ended = signal.Signals(-code).name
        remedy = FEWER if -code == signal.SIGKILL else options.remedy  # by the system, where memory is short
    else:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raised = [line for line in lines if RAISED.match(line)] or lines  # what follows it is advice
        ended = f"{code}: {' '.join(raised[-1:])[:300]}"
        remedy = FEWER if is_short(ended) else options.remedy
    return Compiled(name, [], f"{name} cannot be compiled (its process ended with {ended}): {remedy}", log)


def compile_one(folder: Path, name: str) -> None:
    """What such a process does."""
    faulthandler.enable()  # a crash leaves its stack in the log: Python's, and before it that of PyTorch's own code
    torch._C._set_print_stack_traces_on_fatal_signal(True)
    values = json.loads((folder / OPTIONS).read_text())
    options = Options(**values)
    found: dict[str, Any] = {"files": [], "reason": ""}
    try:
        aotinductor.facts(torch.device(options.device))  # has a GPU compute as the others do
        with eager.enough_memory(f"compiling {name}", FEWER):
            model = checkpoint.load(str(folder / WEIGHTS))[0].to(options.device)
            signature, module = parts_of(model, options)[name]
            # of headers that one process precompiles, another may find but a part
            with torch._inductor.config.patch({"aot_inductor.precompile_headers": False}):
                found["files"] = compile_part(module, signature, options)
    except UserError as error:
        found["reason"] = str(error)
    (folder / f"{name}.json").write_text(json.dumps(found))


def compile_part(module: nn.Module, signature: Signature, options: Options) -> list[str]:
    """The files of one part of a package, only the batch dynamic. UserError if the compiler fails, or as of
    `barriers`."""
    inputs, shapes = traced_with(signature, options.max_batch, options.device)
    inputs = tuple(aotinductor.laid_out(x, TOKENS in options.rewrites) for x in inputs)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # on a machine without CUDA it says so
    try:
        waits = barriers() if options.device == "cuda" else contextlib.nullcontext()
        with warnings.catch_warnings(), torch.no_grad(), waits:
            warnings.simplefilter("ignore")
            program = torch.export.export(module, inputs, dynamic_shapes=shapes, strict=False)
            settings = options.inductor | {"aot_inductor.package": True}
            files = aot_compile(program.module(check_guards=False), *program.example_inputs, options=settings)
            return cast("list[str]", files)
    except torch._inductor.exc.InductorError as error:
        if is_short(error):
            raise short_of_memory(f"compiling {signature.name}", error, FEWER) from None
        reason = first_line(error)
        raise UserError(
            f"{signature.name} cannot be compiled ({reason}): see that a C++ compiler (g++) is installed, or "
            f"{options.remedy}"
        ) from None


if __name__ == "__main__" and sys.argv[1:2] == [ONE_PART]:
    compile_one(Path(sys.argv[2]), sys.argv[3])
elif __name__ == "__main__":
    from mubic_deploy.cli import main

    sys.exit(main(["compile", *sys.argv[1:]]))
