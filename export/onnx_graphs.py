#!/usr/bin/env python3
"""Trace the graphs of a checkpoint to ONNX, check each against eager PyTorch, write the manifest.

    python export/onnx_graphs.py CHECKPOINT --out DIR        (the same as: mubic-deploy export CHECKPOINT --out DIR)

Nothing is left behind unless every graph passes: all is written beside DIR and renamed at the end."""

from __future__ import annotations

import json
import logging
import platform
import sys
import warnings
from collections.abc import Collection
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import optimizer

from mubic_deploy.artifacts import FORMAT, MANIFEST, Artifacts, describe, sha256
from mubic_deploy.checkpoint import Source
from mubic_deploy.config import OPTIMISATIONS, check_optimisations, check_precision
from mubic_deploy.console import Progress
from mubic_deploy.engines import cpu, eager
from mubic_deploy.errors import UserError
from mubic_deploy.folders import replacing, require_replaceable
from mubic_deploy.graphs import FLOAT32, Signature, signatures
from mubic_deploy.model.mubic import MUBiC, traced_with
from mubic_deploy.model.precision import prepared, recorded, require_small
from mubic_deploy.parity import CLIPS, Parity, compare
from mubic_deploy.sources import versions

OPSET = 20
MAX_BATCH = 64  # the batch axis is dynamic from 1 to this
FOLD_LIMIT = 1 << 26  # elements of a constant
LISTED = 10  # modules with the largest activations, in the manifest
PACKAGES = ("mubic-deploy", "torch", "torchvision", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy")


def trace(module: torch.nn.Module, signature: Signature, path: Path) -> None:
    """One graph as ONNX, weights inside, tensors named as in the signature, only the batch dynamic."""
    inputs, shapes = traced_with(signature, MAX_BATCH)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            inputs,
            dynamo=True,
            opset_version=OPSET,
            input_names=signature.input_names,
            output_names=signature.output_names,
            dynamic_shapes=shapes,
            verbose=False,
            optimize=False,  # once is enough, below
        )
    assert program is not None
    # without the limits that keep large tables from being folded: they are weights
    optimizer.optimize(program.model, input_size_limit=FOLD_LIMIT, output_size_limit=FOLD_LIMIT)
    ask_the_converted(program.model)
    program.save(path, external_data=False)


def ask_the_converted(model: ir.Model) -> None:
    """TensorRT takes a uint8 input only to convert it: whatever asks such an input for its shape, asks its Cast."""
    for value in model.graph.inputs:
        if value.dtype == ir.DataType.UINT8:
            (cast,) = (node for node in value.consumers() if node.op_type == "Cast")
            for node in [n for n in value.consumers() if n.op_type == "Shape"]:
                node.replace_input_with(0, cast.outputs[0])
    model.graph.sort()


def export(
    model: MUBiC,
    source: Source,
    out: Path,
    progress: Progress = lambda *_: None,
    precision: str = FLOAT32,
    fixed_steps: int | None = None,
    optimisations: Collection[str] = (),
    remedy: str = "choose another --out",
) -> tuple[Artifacts, Parity]:
    """All graphs of `model` and the manifest into `out`, which may hold an earlier export (it is replaced).

    precision: float32, or float16 under the policy of `mubic_deploy.model.precision`. fixed_steps: also the sampler,
    the loop of so many steps as one graph. optimisations: some of `config.OPTIMISATIONS`.
    remedy: what to do where `out` cannot be written.
    UserError if one of these is not known, `out` is something else or cannot be written, a graph differs from eager
    PyTorch in FP32, or an activation is too large for FP16."""
    out = Path(out)
    check_precision(precision)
    check_optimisations(optimisations)
    if fixed_steps is not None:
        model.config.check_fixed_steps(fixed_steps)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        require_replaceable(out, MANIFEST, Artifacts.LAYOUT.files, "is not an earlier export")
        with replacing(out) as folder:
            parity = _export_into(folder, model, source, progress, precision, fixed_steps, optimisations)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror or error}): {remedy}") from None
    return Artifacts.open(out), parity


def _export_into(
    folder: Path,
    model: MUBiC,
    source: Source,
    progress: Progress,
    precision: str,
    fixed_steps: int | None,
    optimisations: Collection[str],
) -> Parity:
    model.eval()
    graphs = signatures(model.config, precision, sampler=fixed_steps is not None)
    exported = prepared(model, precision, optimisations)
    total = len(graphs) + CLIPS
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "source": source.to_json(),
        "config": model.config.to_json(),
        "opset": OPSET,
        "precision": precision,
        "fixed_steps": fixed_steps,
        "optimisations": [name for name in OPTIMISATIONS if name in optimisations],
        "versions": {"python": platform.python_version()} | versions(PACKAGES),
        "graphs": {},
    }
    for done, (name, signature) in enumerate(graphs.items()):
        progress(f"tracing {name}", done, total)
        path = folder / f"{name}.onnx"
        trace(exported.graph(name, fixed_steps), signature, path)
        manifest["graphs"][name] = {"file": path.name, "sha256": sha256(path), "signature": describe(signature)}

    candidate = {n: cpu.load_engine("onnxruntime", folder / f"{n}.onnx", s) for n, s in graphs.items()}

    def checked(clips: int) -> None:
        progress("checking against eager PyTorch", len(graphs) + clips, total)

    with recorded(model) as activations:
        parity = compare(
            model.config,
            eager.load_engines(model, fixed_steps=fixed_steps),
            dict(candidate),
            progress=checked,
            precision=precision,
        )
    if precision != FLOAT32:
        require_small(activations)
    parity.require()
    manifest["parity"] = parity.to_json()
    manifest["largest_activations"] = dict(sorted(activations.items(), key=lambda item: -item[1])[:LISTED])
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    return parity


if __name__ == "__main__":
    from mubic_deploy.cli import main

    sys.exit(main(["export", *sys.argv[1:]]))
