"""Inductor's Triton kernels as they are generated, without a GPU: what they read back, they wait for."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor import graph as inductor_graph

from mubic_deploy.config import ON_GPU, get_config
from mubic_deploy.errors import UserError
from mubic_deploy.graphs import FLOAT16, Signature, Tensor, signatures
from mubic_deploy.model.inductor import BARRIER, barriers
from mubic_deploy.model.mubic import empty_inputs, random_model
from mubic_deploy.model.precision import prepared
from mubic_deploy.model.tokens import INDUCTOR
from mubic_deploy.sources import load_script, source_dir

KERNEL = re.compile(r"@triton\.jit\n(.*?)''', device_str", flags=re.DOTALL)
packages_script = load_script(source_dir("export") / "aotinductor_packages.py")


class GeneratedError(Exception):
    """Ends the compiler once the code is there."""


def kernels(function: Callable, *inputs: torch.Tensor, **settings: Any) -> list[str]:
    """The Triton kernels that Inductor makes of a function: on a CPU it can generate them too, though not run them."""
    found = []

    def generated(graph: inductor_graph.GraphLowering) -> None:
        code, _ = graph.codegen()
        found.append(code if isinstance(code, str) else code.value)
        raise GeneratedError

    options = {"cpu_backend": "triton", "fx_graph_cache": False, "compile_threads": 1, **settings}
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(inductor_graph.GraphLowering, "compile_to_module", generated)
        patch.setattr("torch.utils._triton.triton_hash_with_backend", lambda: "none is here")
        torch._dynamo.reset()
        with pytest.raises(torch._inductor.exc.InductorError, match="GeneratedError"):
            torch.compile(function, options=options, dynamic=False)(*inputs)
    return KERNEL.findall(found[0])


def read_back(kernel: str) -> dict[str, bool]:
    """The pointers that a kernel stores to and loads from afterwards: whether all its warps wait in between."""
    out = {}
    for name in set(re.findall(r"tl\.store\((\w+)", kernel)):
        _, *after = re.split(rf"tl\.store\({name}\b", kernel)
        before_load, load, _ = after[-1].partition(f"tl.load({name} ")
        if load:
            out[name] = BARRIER in before_load.rpartition("for ")[2]
    return out


def centred(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows' mean takes a loop over them, and to subtract it another."""
    y = torch.relu(x)
    return y, y - y.float().mean(-1, keepdim=True)


def test_a_kernel_waits_before_it_reads_back_what_it_stored() -> None:
    x = torch.zeros(64, 8192, dtype=torch.float16)
    (alone,) = kernels(centred, x)
    # if this fails, PyTorch has mended it: `barriers` can go once older versions need not be supported
    assert read_back(alone) == {"out_ptr0": False}
    with barriers():
        (waits,) = kernels(centred, x)
    assert read_back(waits) == {"out_ptr0": True}
    assert waits.count(BARRIER) == 1
    assert waits.replace(f"        {BARRIER}\n", "") == alone
    assert kernels(centred, x) == [alone]  # as it was


def test_a_kernel_that_reads_nothing_back_does_not_wait() -> None:
    with barriers():
        (kernel,) = kernels(lambda x: x - x.float().mean(-1, keepdim=True), torch.zeros(64, 8192, dtype=torch.float16))
    assert kernel.count("for r0_offset") == 2
    assert BARRIER not in kernel


def test_packages_are_compiled_with_barriers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def compiled(program: Any, **_: Any) -> None:
        (kernel,) = kernels(program.module(), torch.zeros(2, 8192, dtype=torch.float16))
        assert read_back(kernel) == {"out_ptr0": True}
        tried.append(program)

    class Centred(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return centred(x)

    tried: list[Any] = []
    signature = Signature("centred", (Tensor("X", FLOAT16, (8192,)),), ())
    monkeypatch.setattr(packages_script, "aoti_compile_and_package", compiled)
    packages_script.compile_graph(Centred(), signature, tmp_path / "p.pt2", packages_script.Options())
    assert len(tried) == 1


def test_an_inductor_that_is_not_known_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.codegen.triton import TritonKernel

    monkeypatch.delattr(TritonKernel, "get_load_buffer")
    with pytest.raises(UserError, match=r"is not known to this version.*use PyTorch 2.11"), barriers():
        pass


@pytest.mark.parametrize("graph", ["visual_encoder", "fusion", "denoiser"])
def test_at_full_size_nothing_is_read_back(graph: str) -> None:
    """A barrier in a loop costs time, and what is read back too: weights lie so that nothing is. Of the visual encoder
    one block of each kind: the others are as those."""
    config = replace(get_config("full"), visual_depths=(1, 2, 2, 2))
    model = prepared(random_model(config), FLOAT16, ON_GPU)
    inputs = empty_inputs(signatures(config, FLOAT16)[graph], 1)
    found = kernels(model.graph(graph), *inputs, **INDUCTOR)
    assert len(found) > 10
    assert [read_back(kernel) for kernel in found if read_back(kernel)] == []
