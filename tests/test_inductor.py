"""Inductor's Triton kernels as they are generated, without a GPU: what they read back, they wait for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._inductor import graph as inductor_graph

from mubic_deploy.config import ON_GPU, get_config
from mubic_deploy.engines.aotinductor import laid_out
from mubic_deploy.errors import UserError
from mubic_deploy.graphs import FLOAT16, Signature, Tensor, parts
from mubic_deploy.model import tokens
from mubic_deploy.model.inductor import BARRIER, barriers
from mubic_deploy.model.mubic import empty_inputs, random_model, traced_with
from mubic_deploy.model.precision import prepared
from mubic_deploy.model.tokens import INDUCTOR
from mubic_deploy.sources import load_script, source_dir

KERNEL = re.compile(r"@triton\.jit\n(.*?)''', device_str", flags=re.DOTALL)
packages_script = load_script(source_dir("export") / "aotinductor_packages.py")


class GeneratedError(Exception):
    """Ends the compiler once the code is there."""


def kernels(function: Callable, *inputs: torch.Tensor, dynamic_batch: bool = False, **settings: Any) -> list[str]:
    """The Triton kernels that Inductor makes of a function: on a CPU it can generate them too, though not run them.
    dynamic_batch: what is marked so in the inputs stays open."""
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
            torch.compile(function, options=options, dynamic=None if dynamic_batch else False)(*inputs)
    return KERNEL.findall(found[0])


def read_back(kernel: str) -> list[bool]:
    """Of each load of what was stored before: whether all warps wait in between, in the same round of a loop."""
    out, stored, waited = [], set(), False
    for line in kernel.splitlines():
        waited = BARRIER in line or (waited and not line.lstrip().startswith("for "))
        if found := re.search(r"tl\.(load|store|atomic_\w+)\((\w+)", line):
            if found[1] != "load":
                stored.add(found[2])
                waited = False
            elif found[2] in stored:
                out.append(waited)
    return out


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ("load(a)|store(b)", []),
        ("store(b)|for|load(b)", [False]),
        ("store(b)|for|barrier|load(b)", [True]),
        ("store(b)|barrier|for|load(b)", [False]),  # waits once, while the loop may go round
        ("store(b)|for|barrier|load(b)|store(b)", [True]),
        ("store(b)|for|load(b)|store(b)", [False]),
        ("store(b)|for|barrier|load(b)|for|load(b)", [True, False]),
    ],
)
def test_what_is_read_back_is_seen(lines: str, found: list[bool]) -> None:
    words = {"barrier": f"    {BARRIER}", "for": "    for r0_offset in tl.range(0, r0_numel, R0_BLOCK):"}
    kernel = "\n".join(words.get(line, f"    tl.{line}") for line in lines.split("|"))
    assert read_back(kernel) == found


def centred(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows' mean takes a loop over them, and to subtract it another."""
    y = torch.relu(x)
    return y, y - y.float().mean(-1, keepdim=True)


def test_a_kernel_waits_before_it_reads_back_what_it_stored() -> None:
    x = torch.zeros(64, 8192, dtype=torch.float16)
    (alone,) = kernels(centred, x)
    # if this fails, PyTorch has mended it: `barriers` can go once older versions need not be supported
    assert read_back(alone) == [False]
    with barriers():
        (waits,) = kernels(centred, x)
    assert read_back(waits) == [True]
    assert waits.count(BARRIER) == 1
    assert waits.replace(f"        {BARRIER}\n", "") == alone
    assert kernels(centred, x) == [alone]  # as it was


def test_every_loop_that_reads_back_waits() -> None:
    def normalised(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.relu(x)
        offset = y.float() - y.float().mean(-1, keepdim=True)
        return y, offset * torch.rsqrt((offset * offset).mean(-1, keepdim=True))

    with barriers():
        (kernel,) = kernels(normalised, torch.zeros(64, 8192, dtype=torch.float16))
    assert kernel.count("for r0_offset") == 3
    assert read_back(kernel) == [True, True]


def test_a_kernel_that_reads_nothing_back_does_not_wait() -> None:
    with barriers():
        (kernel,) = kernels(lambda x: x - x.float().mean(-1, keepdim=True), torch.zeros(64, 8192, dtype=torch.float16))
    assert kernel.count("for r0_offset") == 2
    assert BARRIER not in kernel


def test_packages_are_compiled_with_barriers(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(program: Any, *_: Any, **__: Any) -> None:
        (kernel,) = kernels(program, torch.zeros(2, 8192, dtype=torch.float16))
        assert read_back(kernel) == [True]
        tried.append(program)

    class Centred(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return centred(x)

    tried: list[Any] = []
    signature = Signature("centred", (Tensor("X", FLOAT16, (8192,)),), ())
    monkeypatch.setattr(packages_script, "aot_compile", compiled)
    monkeypatch.setattr(packages_script, "traced_with", lambda s, most, _: traced_with(s, most))  # without a GPU
    packages_script.compile_part(Centred(), signature, packages_script.Options("cuda"))
    assert len(tried) == 1


def test_an_inductor_that_is_not_known_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.codegen.triton import TritonKernel

    says = r"Inductor of PyTorch .* is not known to this version.*use PyTorch 2.11"
    load, x = TritonKernel.load, torch.zeros(64, 8192, dtype=torch.float16)

    def another(kernel: Any, name: str, index: Any) -> Any:  # which asks nobody where it shall be written
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TritonKernel, "get_load_buffer", lambda self, _: self.loads)
            return load(kernel, name, index)

    with monkeypatch.context() as patch:
        patch.setattr(TritonKernel, "load", another)
        with pytest.raises(UserError, match=says), barriers():
            kernels(centred, x)
        with barriers():
            kernels(torch.relu, x)  # nothing to wait for
    for name in ("TritonKernel.get_load_buffer", "TritonKernel"):
        with monkeypatch.context() as patch:
            patch.delattr(f"torch._inductor.codegen.triton.{name}")
            with pytest.raises(UserError, match=says), barriers():
                pass


class Hopper:
    """A driver of Triton's that says which GPU to compile for: Inductor finds out what a kernel of ours writes."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> str:
        return "cpu"


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whoever traces the model gets the kernels that it has on a GPU."""
    from triton.runtime.driver import driver

    monkeypatch.setattr(tokens, "has_kernels", lambda _: True)
    driver.set_active(Hopper())
    yield
    driver._active = None  # as it was: `reset_active` wants a GPU


@pytest.mark.parametrize("graph", ["visual_encoder", "audio_encoder", "fusion", "denoiser"])
@pytest.mark.usefixtures("hopper")
def test_at_full_size_nothing_is_read_back(graph: str) -> None:
    """A barrier in a loop costs time, and what is read back too: weights lie so that nothing is. Of the visual encoder
    one block of each kind: the others are as those."""
    config = replace(get_config("full"), visual_depths=(1, 2, 2, 2))
    model = prepared(random_model(config), FLOAT16, ON_GPU)
    found = []
    for part, module in zip(parts(config, FLOAT16)[graph], model.parts(graph), strict=True):
        found += kernels(module, *(laid_out(x, True) for x in empty_inputs(part, 1)), **dict[str, Any](INDUCTOR))
    assert len(found) > 10
    own = [kernel for kernel in found if "def _depthwise_norm" in kernel]
    assert len(own) == {"visual_encoder": 7, "fusion": 4}.get(graph, 0)
    assert any("def _product" in kernel for kernel in found) == (graph == "visual_encoder")
    assert any("def _window_product" in kernel for kernel in found) == (graph == "denoiser")
    assert [read_back(kernel) for kernel in found if read_back(kernel)] == []


@pytest.mark.usefixtures("hopper")
def test_an_open_batch_is_the_kernels_too() -> None:
    """Whose programs, and the parts that they sum in, depend on it."""
    config = get_config("full")
    encoder = prepared(random_model(config), FLOAT16, ON_GPU).denoiser.noise_encoder
    widths = [(1, 2 * width) for width in config.noise_channels]
    given = [torch.zeros(size, dtype=torch.float16) for size in widths]
    x = torch.zeros(3, 1, *config.map_size)
    torch._dynamo.mark_dynamic(x, 0)
    found = kernels(lambda x: encoder(x, given), x, dynamic_batch=True, **dict[str, Any](INDUCTOR))
    own = [kernel for kernel in found if "def _window_product" in kernel or "def _parts_added" in kernel]
    assert len(own) == 8 + 3  # of the last three, in parts
    assert len(found) < 16


@pytest.mark.usefixtures("hopper")
def test_what_is_normalised_in_a_product_is_stored_once() -> None:
    """Its kernel takes it in the place of a residual and moments, too, which it has none of here."""
    product = tokens.NormedLinear(torch.nn.LayerNorm(96), torch.nn.Linear(96, 384)).half()
    x = torch.zeros(64, 96, dtype=torch.float16)
    added, own = kernels(lambda x, y: product(x + y), x, x)
    assert "def _product" in own
    assert added.count("tl.store(") == 1
