"""Toy ONNX graphs with exactly the signatures of the real ones: nothing learned, cheap, every input matters.

`write(config, path)` makes a folder that `Artifacts.open` accepts, so that whatever stands around the graphs (engines,
pipeline, Triton) can be tested without PyTorch and without an export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from mubic_deploy.artifacts import FORMAT, MANIFEST, Artifacts, describe, sha256
from mubic_deploy.config import Config
from mubic_deploy.diffusion import alpha_bar, step_pairs
from mubic_deploy.graphs import SAMPLER, Signature, Tensor, signatures

OPSET = 17


class _Builder:
    """An ONNX graph that is written one node after the other."""

    def __init__(self, signature: Signature) -> None:
        self.signature = signature
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def constant(self, value: np.ndarray) -> str:
        name = f"c{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(value, name))
        return name

    def op(self, kind: str, *inputs: str | float, output: str = "", **attributes: Any) -> str:
        """The output's name of a new node. Numbers among the inputs become float32 constants."""
        names = [i if isinstance(i, str) else self.constant(np.array(i, np.float32)) for i in inputs]
        output = output or f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, names, [output], **attributes))
        return output

    def level(self, tensor: Tensor) -> str:
        """[B, 1]: one number for each sample, which every element of the tensor moves, each by its own weight."""
        size = int(np.prod(tensor.shape))
        flat = self.op("Reshape", tensor.name, self.constant(np.array([-1, size], np.int64)))
        flat = self.op("Cast", flat, to=TensorProto.FLOAT)
        # drawn: waves, as `pattern` makes them, would cancel out under weights that are one too
        weights = np.random.default_rng(size).choice([-1, 1], (size, 1)).astype(np.float32) * np.float32(size**-0.5)
        if tensor.dtype == "uint8":
            weights /= 255
        return self.op("MatMul", flat, self.constant(weights))

    def pattern(self, level: str, tensor: Tensor, phase: float, output: str = "") -> str:
        """[B, *shape]: sin(level + ramp over the elements)."""
        size = int(np.prod(tensor.shape))
        ramp = self.constant(np.linspace(phase, phase + 9, size, dtype=np.float32))
        wave = self.op("Sin", self.op("Add", level, ramp))
        shape = self.constant(np.array([-1, *tensor.shape], np.int64))
        return self.op("Reshape", wave, shape, output=output)

    def column(self, name: str) -> str:
        """A [B, 1] input as [B, 1, 1, 1] float32."""
        shape = self.constant(np.array([-1, 1, 1, 1], np.int64))
        return self.op("Cast", self.op("Reshape", name, shape), to=TensorProto.FLOAT)

    def save(self, path: Path) -> None:
        types = {n: helper.np_dtype_to_tensor_dtype(np.dtype(n)) for n in ("uint8", "int32", "float32")}

        def values(tensors: tuple[Tensor, ...]) -> list[onnx.ValueInfoProto]:
            return [helper.make_tensor_value_info(t.name, types[t.dtype], ["batch", *t.shape]) for t in tensors]

        s = self.signature
        graph = helper.make_graph(self.nodes, s.name, values(s.inputs), values(s.outputs), self.weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
        onnx.checker.check_model(model)
        onnx.save(model, path)


def _features(b: _Builder) -> str:
    """An encoder or the fusion: every output is a pattern of all the inputs. -> the level [B, 1]."""
    level = b.level(b.signature.inputs[0])
    for tensor in b.signature.inputs[1:]:
        level = b.op("Add", level, b.level(tensor))
    for phase, tensor in enumerate(b.signature.outputs):
        if tensor.name not in ("ENTROPY", "ADAPTIVE_STEPS"):
            b.pattern(level, tensor, phase, tensor.name)
    return level


def _fusion(b: _Builder, max_steps: int) -> None:
    spread = b.op("Sin", b.op("Mul", _features(b), 40.0))  # so that most clips differ in their steps
    entropy = b.op("Add", b.op("Mul", spread, 0.5), 0.5, output="ENTROPY")
    steps = b.op("Round", b.op("Mul", entropy, float(max_steps)))
    b.op("Cast", b.op("Clip", steps, 1.0, float(max_steps)), output="ADAPTIVE_STEPS", to=TensorProto.INT32)


def _denoiser(b: _Builder) -> None:
    """S_0 from all the inputs; S_NEXT by DDIM with eta = 0 (eq. 3.58), maps scaled to [-1, 1]."""
    *cond, s_t, step, now, after = b.signature.inputs
    number = b.op("Cast", step.name, to=TensorProto.FLOAT)
    s_0 = _guess(b, cond, s_t, s_t.name, number, "S_0")
    _update(b, s_0, s_t.name, b.column(now.name), b.column(after.name), "S_NEXT")


def _guess(b: _Builder, cond: list[Tensor], like: Tensor, s_t: str, step: str, output: str = "") -> str:
    level = b.level(cond[0])
    for tensor in cond[1:]:
        level = b.op("Add", level, b.level(tensor))
    level = b.op("Add", level, b.op("Mul", step, 0.001))
    return b.op("Sigmoid", b.op("Add", b.pattern(level, like, 0.5), b.op("Mul", s_t, 0.3)), output=output)


def _update(b: _Builder, s_0: str, s_t: str, now: str, after: str, output: str = "") -> str:
    clean = b.op("Sub", b.op("Mul", s_0, 2.0), 1.0)
    rest, rest_next = b.op("Sub", 1.0, now), b.op("Sub", 1.0, after)
    noise = b.op("Sub", s_t, b.op("Mul", clean, b.op("Sqrt", now)))
    noise = b.op("Mul", b.op("Div", noise, b.op("Sqrt", rest)), b.op("Sqrt", rest_next))
    return b.op("Add", b.op("Mul", clean, b.op("Sqrt", after)), noise, output=output)


def _sampler(b: _Builder, steps: int) -> None:
    """The denoiser above, `steps` times, as the loop calls it."""
    *cond, s_t = b.signature.inputs
    noisy, s_0 = s_t.name, ""
    for now, after in step_pairs(steps):
        s_0 = _guess(b, cond, s_t, noisy, b.constant(np.array([[now]], np.float32)))
        alphas = [b.constant(np.full((1, 1, 1, 1), alpha_bar(t), np.float32)) for t in (now, after)]
        noisy = _update(b, s_0, noisy, *alphas)
    (saliency,) = b.signature.outputs
    b.op("Reshape", s_0, b.constant(np.array([-1, *saliency.shape], np.int64)), output=saliency.name)


def write(config: Config, path: Path, fixed_steps: int | None = None) -> Artifacts:
    """Toy artefacts of a configuration in the folder `path`, which is made. fixed_steps: with a sampler."""
    path.mkdir(parents=True, exist_ok=True)
    entries = {}
    for name, signature in signatures(config, sampler=fixed_steps is not None).items():
        builder = _Builder(signature)
        if name == "fusion":
            _fusion(builder, config.max_steps)
        elif name == "denoiser":
            _denoiser(builder)
        elif fixed_steps is not None and name == SAMPLER:
            _sampler(builder, fixed_steps)
        else:
            _features(builder)
        file = path / f"{name}.onnx"
        builder.save(file)
        entries[name] = {"file": file.name, "sha256": sha256(file), "signature": describe(signature)}
    source = {"name": "toy", "seed": None, "sha256": None}
    facts = {"format": FORMAT, "source": source, "config": config.to_json(), "precision": "float32"}
    facts |= {"fixed_steps": fixed_steps, "optimisations": []}
    manifest = {**facts, "graphs": entries, "parity": {}}
    (path / MANIFEST).write_text(json.dumps(manifest))
    return Artifacts.open(path)
