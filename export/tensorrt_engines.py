#!/usr/bin/env python3
"""Build a TensorRT plan of each exported graph, on the GPU that will run it.

    python export/tensorrt_engines.py GRAPHS --out DIR        (the same as: mubic-deploy engines GRAPHS --out DIR)

The networks are strongly typed: every tensor has the precision that the graph says, so export with --precision float16.
Nothing is left behind unless every plan was built and agrees with ONNX Runtime on the same graphs."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mubic_deploy.artifacts import PLANS_MANIFEST, Artifacts, describe, sha256
from mubic_deploy.config import MAX_BATCH
from mubic_deploy.console import Progress
from mubic_deploy.engines import cpu, cuda
from mubic_deploy.engines.cuda import GPU
from mubic_deploy.engines.tensorrt import FORMAT, Plans, created, import_tensorrt, load_engines, logger
from mubic_deploy.errors import UserError, whole
from mubic_deploy.folders import replacing, replacing_file, require_replaceable
from mubic_deploy.graphs import Signature
from mubic_deploy.parity import CLIPS, compare

OLDEST = (10, 12)


@dataclass(frozen=True)
class Options:
    """max_batch           the profile goes from 1 to this
    best_batch          what TensorRT chooses its kernels for
    level               builder optimisation level, 0 (quick to build) to 5 (quick to run)
    version_compatible  the plans also run with later versions of the same major version, a little slower
    timing_cache        measured kernels, kept from build to build; per GPU and TensorRT version"""

    max_batch: int = MAX_BATCH
    best_batch: int = 1
    level: int = 4
    version_compatible: bool = False
    timing_cache: Path | None = None

    def __post_init__(self) -> None:
        most = whole("max batch", self.max_batch, 1)
        best = whole("best batch", self.best_batch, 1, most, use=f"1 to --max-batch {most}")
        for name, value in (("max_batch", most), ("best_batch", best), ("level", whole("level", self.level, 0, 5))):
            object.__setattr__(self, name, value)


def build(
    artifacts: Artifacts,
    out: Path,
    options: Options = Options(),
    progress: Progress = lambda *_: None,
    cuda_graphs: bool = True,
) -> Plans:
    """Plans of all graphs into `out`, which may hold earlier ones (they are replaced). cuda_graphs: in the check.

    UserError without a GPU or TensorRT, if `out` is something else or cannot be written, if TensorRT refuses a graph or
    runs out of memory, or if a plan does not compute what the graph computes."""
    gpu = cuda.gpu()  # first: who has none shall not be told to install TensorRT
    trt = import_tensorrt()
    if tuple(int(n) for n in trt.__version__.split(".")[:2]) < OLDEST:
        raise UserError(f"TensorRT {trt.__version__} is too old: install {OLDEST[0]}.{OLDEST[1]} or newer")
    _require_writable(options.timing_cache)
    out = Path(out)
    try:
        require_replaceable(out, PLANS_MANIFEST, Plans.LAYOUT.files, "holds no earlier engines")
        with replacing(out) as folder:
            _build_into(folder, trt, gpu, artifacts, options, progress, cuda_graphs)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror or error}): choose another --out") from None
    return Plans.open(out)


def _build_into(
    folder: Path,
    trt: Any,
    gpu: GPU,
    artifacts: Artifacts,
    options: Options,
    progress: Progress,
    cuda_graphs: bool,
) -> None:
    graphs = artifacts.signatures
    total = len(graphs) + CLIPS
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "source": artifacts.manifest["source"],
        "config": artifacts.config.to_json(),
        "precision": artifacts.precision,
        "fixed_steps": artifacts.fixed_steps,
        "optimisations": artifacts.optimisations,
        "tensorrt": trt.__version__,
        "gpu": asdict(gpu.facts),
        "profile": {"min": 1, "best": options.best_batch, "max": options.max_batch},
        "level": options.level,
        "version_compatible": options.version_compatible,
        "plans": {},
    }
    cache = _read_cache(options.timing_cache)
    for done, (name, signature) in enumerate(graphs.items()):
        progress(f"building {name}", done, total)
        path = folder / f"{name}.plan"
        with gpu.active():
            plan, cache = build_plan(trt, artifacts.file(name), signature, options, cache)
        path.write_bytes(plan)
        _write_cache(options.timing_cache, cache)
        onnx = artifacts.manifest["graphs"][name]["sha256"]
        manifest["plans"][name] = {
            "file": path.name,
            "sha256": sha256(path),
            "onnx_sha256": onnx,
            "signature": describe(signature),
        }
    (folder / PLANS_MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")

    def checked(clips: int) -> None:
        progress("checking against ONNX Runtime", len(graphs) + clips, total)

    candidate, reference = load_engines(Plans.open(folder), cuda_graphs), cpu.load_engines("onnxruntime", artifacts)
    said = (
        "TensorRT's engines differ from ONNX Runtime on the same graphs",
        "build with another --level, which takes other kernels, or from graphs exported without --precision",
    )
    parity = compare(artifacts.config, reference, candidate, progress=checked, precision=artifacts.precision)
    parity.require(*said)
    # and whether the samples of the largest batch stay apart
    most = options.max_batch
    together = compare(artifacts.config, reference, candidate, 1, precision=artifacts.precision, batch=most)
    together.require(
        f"of {most} clips at once TensorRT's engines differ from ONNX Runtime on the same graphs, of one they do not",
        "build with --max-batch 1, or with another TensorRT",
    )
    manifest["parity"] = parity.to_json()
    (folder / PLANS_MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def build_plan(trt: Any, onnx: Path, signature: Signature, options: Options, cache: bytes) -> tuple[bytes, bytes]:
    """One plan, and the timing cache with what was measured for it."""
    log = logger(trt)
    builder = created(trt.Builder, log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(onnx)):
        reasons = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise UserError(f"TensorRT {trt.__version__} does not take {onnx} ({'; '.join(reasons[:2])}): export it again")
    _require_signature(trt, network, signature, onnx)

    config = builder.create_builder_config()
    config.builder_optimization_level = options.level
    config.clear_flag(trt.BuilderFlag.TF32)  # what the graph keeps in FP32, the log-mel above all, needs all its bits
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    timings = config.create_timing_cache(cache)
    if timings is None:
        raise UserError(
            f"{options.timing_cache or 'the timing cache'} is damaged: remove it, or name another --timing-cache"
        )
    if not config.set_timing_cache(timings, False):
        raise UserError(f"{options.timing_cache} is of another GPU or TensorRT: name another --timing-cache")
    profile = builder.create_optimization_profile()
    for tensor in signature.inputs:
        shapes = ((batch, *tensor.shape) for batch in (1, options.best_batch, options.max_batch))
        profile.set_shape(tensor.name, *shapes)
    if config.add_optimization_profile(profile) < 0:
        raise UserError(
            f"TensorRT does not take a batch of 1 to {options.max_batch} for {signature.name}: export it again"
        )

    plan = builder.build_serialized_network(network, config)
    if plan is None:
        reason = "; ".join(log.errors[-2:]) or "no reason given"
        raise UserError(
            f"TensorRT cannot build {signature.name} ({reason}): if memory is short, end what uses the GPU or choose a "
            f"smaller --max-batch"
        )
    return bytes(plan), bytes(config.get_timing_cache().serialize())


def _require_signature(trt: Any, network: Any, signature: Signature, onnx: Path) -> None:
    """UserError unless the network's inputs and outputs are the signature's: the file was not exported for this. A -1
    among an output's sizes is one that TensorRT finds out only with an input's shape (the engine looks again)."""
    kinds = {
        "uint8": trt.DataType.UINT8,
        "int32": trt.DataType.INT32,
        "float16": trt.DataType.HALF,
        "float32": trt.DataType.FLOAT,
    }
    wanted = {t.name: (kinds[t.dtype], t.shape) for t in (*signature.inputs, *signature.outputs)}
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    mine = {t.name: (t.dtype, tuple(t.shape)[1:]) for t in (*inputs, *outputs)}
    for t in outputs:
        kind, shape = mine[t.name]
        if t.name in wanted and len(shape) == len(wanted[t.name][1]):
            known = zip(shape, wanted[t.name][1], strict=True)
            mine[t.name] = (kind, tuple(want if n == -1 else n for n, want in known))
    if mine != wanted:
        odd = next(name for name in sorted(mine.keys() | wanted.keys()) if mine.get(name) != wanted.get(name))
        raise UserError(f"{onnx}: {odd} is {mine.get(odd)}, not {wanted.get(odd)}: export it again")


def _read_cache(path: Path | None) -> bytes:
    if path is None or not path.exists():
        return b""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): name another --timing-cache") from None


def _write_cache(path: Path | None, cache: bytes) -> None:
    if path is None:
        return
    try:
        with replacing_file(path) as part:
            part.write_bytes(cache)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): name another --timing-cache") from None


def _require_writable(path: Path | None) -> None:
    """UserError before anything is built, if the timing cache could not be written after it."""
    if path is not None and (path.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK)):
        raise UserError(f"{path} cannot be written: name another --timing-cache")


if __name__ == "__main__":
    from mubic_deploy.cli import main

    sys.exit(main(["engines", *sys.argv[1:]]))
