"""The GPU's kernels as the model launches them, compiled for an H100 or H200 without one: each fits its shared memory
and keeps to its registers."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mubic_deploy.config import ON_GPU, get_config
from mubic_deploy.graphs import FLOAT16, signatures
from mubic_deploy.model import kernels, products, tokens, windows
from mubic_deploy.model.mubic import empty_inputs, random_model
from mubic_deploy.model.precision import prepared

HOPPER = GPUTarget("cuda", 90, 32)
SHARED = 227 * 1024  # bytes that a program can have
TYPES = {torch.float16: "*fp16", torch.float32: "*fp32"}


class Variant(NamedTuple):
    """What a kernel is compiled for: its parameters' types, constants, and settings of the compiler."""

    kernel: Any
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    settings: tuple[tuple[str, int], ...]


def variant(kernel: Any, given: dict[str, Any]) -> Variant:
    """Of one launch."""
    settings = {name: given.pop(name) for name in ("num_warps", "num_stages") if name in given}
    constants = {p.name: given[p.name] for p in kernel.params if p.is_constexpr}
    types = {name: TYPES[x.dtype] if isinstance(x, torch.Tensor) else "i32" for name, x in given.items()}
    types = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    return Variant(kernel, *(tuple(x.items()) for x in (types, constants, settings)))


def launched(size: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> set[Variant]:
    """All that the graphs of a size launch, which are run on tensors without values."""
    found = set()

    class Launches:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            names = self.kernel.arg_names
            return lambda *args, **more: found.add(variant(self.kernel, dict(zip(names, args, strict=False)) | more))

    monkeypatch.setattr(tokens, "has_kernels", lambda _: True)
    for module in (kernels, products, windows):
        monkeypatch.setattr(module, "wrap_triton", Launches)
    config = get_config(size)
    model = prepared(random_model(config), FLOAT16, ON_GPU).to("meta")
    with torch.no_grad():
        for name, signature in signatures(config, FLOAT16).items():
            model.graph(name)(*(x.to("meta") for x in empty_inputs(signature, batch)))
    return found


class Used(NamedTuple):
    """shared   bytes of shared memory that a program takes
    spilled  and of memory that each thread has for what no register holds
    hides    whether a maximum in it makes a number of NaN"""

    shared: int
    spilled: int
    hides: bool


def used(size: Variant, folder: Path) -> Used:
    parameters = enumerate(size.types)
    aligned = {(i,): [["tt.divisibility", 16]] for i, (_, kind) in parameters if kind.startswith("*")}
    source = ASTSource(size.kernel, dict(size.types), dict(size.constants), aligned)
    compiled = triton.compile(source, HOPPER, dict(size.settings))
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", binary]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    spilled = sum(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", report))
    return Used(
        compiled.metadata.shared, spilled, re.search(r"\bmax\.(?!NaN)[.\w]*f\d", compiled.asm["ptx"]) is not None
    )


@pytest.mark.parametrize("size", ["full", "demo"])
def test_every_kernel_fits_and_hides_no_nan(size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One clip's steps and several clips' have kernels of their own. Two depth-wise convolutions in one launch take a
    compiler ten seconds each, and no shared memory: they are left out."""
    variants = launched(size, 1, monkeypatch) | launched(size, 32, monkeypatch)
    found = {v: used(v, tmp_path) for v in variants if v.kernel is not kernels._depthwise_norms}
    own = {kernels._depthwise_norm, products._product, windows._window_product}
    assert {v.kernel for v in found} >= own
    assert [v for v, use in found.items() if use.shared > SHARED or use.spilled] == []
    # that of a ReLU; elsewhere NaN also goes another way
    assert [v for v, use in found.items() if use.hides and v.kernel.fn.__module__ == windows.__name__] == []
