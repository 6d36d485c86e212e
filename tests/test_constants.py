"""What compilers and CUDA graphs ask of the model: every tensor is made on the device of the inputs, and what weights
alone decide is a constant."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from half_fixtures import TINY
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mubic_deploy.config import OPTIMISATIONS
from mubic_deploy.graphs import signatures
from mubic_deploy.model.mubic import MUBiC, empty_inputs, traced_with
from mubic_deploy.model.precision import half, prepared
from mubic_deploy.model.visual import FoldedAttention

GRAPHS = tuple(signatures(TINY, sampler=True))
STEPS = 2
WAYS: dict[str, Callable[[MUBiC], MUBiC]] = {
    "as trained": copy.deepcopy,
    "float32": prepared,
    "float16": lambda model: prepared(model, "float16", OPTIMISATIONS),
}
aten = torch.ops.aten
MAKE_TABLES = {aten.arange.default, aten.arange.start_step, aten.eye.default, aten.eye.m, aten.index.Tensor}


class Elsewhere(TorchDispatchMode):
    """Notes the operations whose results are not on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        self.found += [str(func) for x in tree_leaves(out) if isinstance(x, Tensor) and not x.is_meta]
        return out


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", GRAPHS)
def test_every_tensor_is_made_where_the_inputs_are(tiny_model: MUBiC, name: str, way: str) -> None:
    """On a GPU another one would be a copy from the host at every call, which a CUDA graph cannot hold."""
    model = WAYS[way](tiny_model).to("meta")  # its positions, if it keeps any, are those of other weights
    signature = signatures(TINY, "float16" if way == "float16" else "float32", sampler=True)[name]
    with torch.no_grad(), Elsewhere() as elsewhere:
        model.graph(name, STEPS)(*empty_inputs(signature, 2, "meta"))
    assert not elsewhere.found


def test_what_is_made_elsewhere_is_found() -> None:
    with Elsewhere() as elsewhere:
        torch.eye(3).to("meta")
        torch.zeros(2, device="meta")
    assert elsewhere.found == ["aten.eye.default"]


@pytest.mark.parametrize(
    ("way", "computed"), [("as trained", True), ("float32", False), ("float16", False)], ids=list(WAYS)
)
def test_positions_are_constants_of_what_is_compiled(tiny_model: MUBiC, way: str, computed: bool) -> None:
    model = WAYS[way](tiny_model)
    inputs, shapes = traced_with(signatures(TINY)["visual_encoder"], 4)
    with torch.no_grad():
        program = torch.export.export(model.graph("visual_encoder"), inputs, dynamic_shapes=shapes, strict=False)
    called = {node.target for node in program.graph.nodes if node.op == "call_function"}
    assert bool(called & MAKE_TABLES) == computed
    kept = {name.rpartition(".")[2] for name in program.constants}
    assert (set(FoldedAttention.constants) <= kept) != computed


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_fixed_positions_are_the_models_own(tiny_model: MUBiC, precision: str) -> None:
    computing = half(tiny_model) if precision == "float16" else tiny_model
    fixed = prepared(tiny_model, precision)
    assert fixed.state_dict().keys() == computing.state_dict().keys()
    video = torch.randint(0, 256, (2, TINY.frames, TINY.height, TINY.width, 3), dtype=torch.uint8)
    with torch.no_grad():
        for a, b in zip(fixed.visual_encoder(video), computing.visual_encoder(video), strict=True):
            assert torch.equal(a, b)
    assert all(m._kept is None for m in fixed.modules() if isinstance(m, FoldedAttention))
    assert not any(name.endswith(FoldedAttention.constants) for name, _ in tiny_model.named_buffers())


def test_another_size_computes_its_own(tiny_model: MUBiC) -> None:
    fixed = prepared(tiny_model).visual_encoder
    video = torch.randint(0, 256, (1, TINY.frames, TINY.height, TINY.width - 32, 3), dtype=torch.uint8)
    with torch.no_grad():
        for a, b in zip(fixed(video), tiny_model.visual_encoder(video), strict=True):
            assert torch.equal(a, b)
