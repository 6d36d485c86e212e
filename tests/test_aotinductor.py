"""AOTInductor: packages compiled here, for this CPU, against eager PyTorch; and all that can be wrong about them."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from half_fixtures import TINY

from mubic_deploy import checkpoint
from mubic_deploy.engines import aotinductor, eager
from mubic_deploy.engines.aotinductor import Packages, load_engines
from mubic_deploy.errors import UserError
from mubic_deploy.graphs import signatures
from mubic_deploy.model.mubic import MUBiC
from mubic_deploy.model.visual import FoldedAttention
from mubic_deploy.parity import compare, random_clip
from mubic_deploy.pipeline import Pipeline
from mubic_deploy.scenes.film import write_film
from mubic_deploy.sources import load_script, source_dir

pytest_plugins = ("half_fixtures",)
packages_script = load_script(source_dir("export") / "aotinductor_packages.py")


def altered(packages: Packages, **changes: object) -> Packages:
    return Packages(packages.path, packages.config, {**packages.manifest, **changes})


@pytest.mark.parametrize("batch", [1, 3])
def test_packages_compute_what_eager_pytorch_does(packages: Packages, tiny_model: MUBiC, batch: int) -> None:
    parity = compare(TINY, eager.load_engines(tiny_model), load_engines(packages), clips=2, batch=batch)
    assert max(d for tensors in parity.graphs.values() for d in tensors.values()) < 1e-4
    assert parity.map_cc > 0.9999
    clip = random_clip(TINY, 5, batch=6)  # above what they take at once
    expected, n = Pipeline(TINY, eager.load_engines(tiny_model)).predict(clip["VIDEO"], clip["AUDIO"], 2, 0)
    got, m = Pipeline.open(packages.path, "aotinductor").predict(clip["VIDEO"], clip["AUDIO"], 2, 0)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)
    assert n.tolist() == m.tolist()


def test_the_folder_says_what_it_is_for(packages: Packages) -> None:
    manifest = json.loads((packages.path / "packages.json").read_text())
    assert manifest["torch"] == torch.__version__
    assert manifest["device"]["type"] == "cpu"
    assert len(manifest["device"]["instructions"]) > 10
    assert not {"hypervisor", "constant_tsc", "cpuid", "nopl"} & set(manifest["device"]["instructions"])
    assert manifest["profile"] == {"min": 1, "max": 4}
    assert packages.optimisations == ("pad_heads", "split_depthwise")
    assert manifest["parity"]["ok"]


def test_positions_are_constants_of_the_package(packages: Packages) -> None:
    """Nothing of the tables that they come from is left to compute them with, at a call or when it is loaded."""
    with zipfile.ZipFile(packages.file("visual_encoder")) as package:
        (wrapper,) = (package.read(name).decode() for name in package.namelist() if name.endswith("wrapper.cpp"))
    blocks = range(sum(TINY.visual_depths))
    assert all(f'"blocks.{i}.attn.{name}"' in wrapper for i in blocks for name in FoldedAttention.constants)
    assert "rel_pos" not in wrapper
    assert "_FOLDED_CONST_" not in wrapper


def test_packages_of_another_machine_are_refused(packages: Packages, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aotinductor, "loaded", lambda *_: pytest.fail("it was loaded"))
    device = packages.manifest["device"]
    with pytest.raises(UserError, match=r"compiled with PyTorch 1.0, this is .*: compile it here"):
        load_engines(altered(packages, torch="1.0"))
    other = {**device, "instructions": [*device["instructions"], "amx_fp99"]}
    with pytest.raises(UserError, match="needs a CPU with amx_fp99, this one has none: compile it here"):
        load_engines(altered(packages, device=other))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu = {"type": "cuda", "name": "NVIDIA H100", "compute_capability": "9.0"}
    with pytest.raises(UserError, match="PyTorch finds no NVIDIA GPU here"):
        load_engines(altered(packages, device=gpu))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA L4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    with pytest.raises(UserError, match=r"compiled for NVIDIA H100 .*, this is NVIDIA L4 \(8.9\): compile it here"):
        load_engines(altered(packages, device=gpu))


def test_a_gpu_too_old_for_half_precision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model: MUBiC) -> None:
    facts = {"type": "cuda", "name": "Tesla T4", "compute_capability": "7.5"}
    monkeypatch.setattr(aotinductor, "facts", lambda _: facts)
    says = r"Tesla T4 has compute capability 7.5, and attention in FP16 wants 8.0: use --precision float32"
    with pytest.raises(UserError, match=says):
        packages_script.build(
            tiny_model, checkpoint.Source("test", 0), tmp_path / "out", packages_script.Options("cuda")
        )
    assert list(tmp_path.iterdir()) == []


def test_activations_too_large_for_half_precision(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model: MUBiC
) -> None:
    """Said before anything is compiled."""
    monkeypatch.setattr(aotinductor, "facts", lambda _: {"name": "NVIDIA H100", "compute_capability": "9.0"})
    monkeypatch.setattr(MUBiC, "to", lambda model, device: model)
    monkeypatch.setattr(packages_script, "compile_part", lambda *_: pytest.fail("it is compiled"))
    model = copy.deepcopy(tiny_model)
    weight = model.get_parameter("fusion.contexts.3.weight")
    weight.data.mul_(1e4 / float(weight.detach().abs().max()))
    says = r"activations of fusion.* reach .*, too large for FP16: use --precision float32"
    with pytest.raises(UserError, match=says):
        packages_script.build(model, checkpoint.Source("test", 0), tmp_path / "out", packages_script.Options("cuda"))
    assert list(tmp_path.iterdir()) == []
    assert "fusion.contexts.3" in packages_script.activations_of(tiny_model)


@pytest.mark.parametrize(
    ("cpuinfo", "found"),
    [
        (
            "processor\t: 0\nvendor_id\t: GenuineIntel\nflags\t\t: fpu tsc sse sse4_2 hypervisor avx2 avx512_vnni pni\n"
            "vmx flags\t: vnmi ept\nbugs\t\t: spectre_v1\nprocessor\t: 1\nflags\t\t: other\n",
            ["avx2", "avx512_vnni", "pni", "sse", "sse4_2"],
        ),
        ("processor\t: 0\nFeatures\t: fp asimd sve\nCPU part\t: 0xd40\n", ["asimd", "fp", "sve"]),
        ("processor\t: 0\nisa\t: rv64imafdc\n", []),
    ],
)
def test_what_counts_as_an_instruction_set(cpuinfo: str, found: list[str]) -> None:
    assert aotinductor.instructions(cpuinfo) == found


def test_batches_that_do_not_fit_are_refused(packages: Packages) -> None:
    engine = load_engines(packages)["audio_encoder"]
    with pytest.raises(UserError, match=r"a batch of 5 is above the package's 4: .*--max-batch 5"):
        engine({"AUDIO": random_clip(TINY, 0, 5)["AUDIO"]})
    fusion = load_engines(packages)["fusion"]
    arrays = {t.name: np.zeros((1 + (t.name == "A"), *t.shape), t.dtype) for t in fusion.signature.inputs}
    with pytest.raises(UserError, match="fusion must have the same batch size"):
        fusion(arrays)


def test_wrong_options_and_a_package_that_differs(
    tiny_model: MUBiC, packages: Packages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, source = packages_script.build, checkpoint.Source("test", 3)
    with pytest.raises(UserError, match="on a CPU packages compute in FP32: leave out --precision"):
        packages_script.Options(precision="float16")
    with pytest.raises(UserError, match="max batch 1 is out of range"):
        packages_script.Options(max_batch=1)
    for options, message in (
        ({"optimisations": ("pad_head",)}, "unknown optimisation 'pad_head': choose from pad_heads, "),
        ({"device": "cuda:0"}, "unknown device 'cuda:0': choose cpu or cuda"),
        ({"device": "cuda", "precision": "fp16"}, "unknown precision 'fp16': choose float32 or float16"),
    ):
        with pytest.raises(UserError, match=message):
            packages_script.Options(**options)
    with pytest.raises(UserError, match="jobs 0 is out of range"):
        packages_script.Options(jobs=0)
    with pytest.raises(UserError, match="kernels are measured, so nothing else may run beside: leave out --jobs"):
        packages_script.Options(jobs=2, autotune=True)
    with pytest.raises(UserError, match="fixed steps 13 is out of range"):
        build(tiny_model, source, tmp_path / "p", packages_script.Options(fixed_steps=13))
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "one.txt").write_text("dear")
    with pytest.raises(UserError, match="letters exists and holds no earlier packages"):
        build(tiny_model, source, tmp_path / "letters")

    def another(path, files):  # the packages of other weights
        Path(path).write_bytes(packages.file(Path(path).stem).read_bytes())

    monkeypatch.setattr(packages_script, "compile_part", lambda *_: [])
    monkeypatch.setattr(packages_script, "package_aoti", another)
    changed = MUBiC(TINY)
    with pytest.raises(UserError, match=r"differ from eager PyTorch: .* of .*; compile with another version"):
        build(changed, source, tmp_path / "p", packages_script.Options(max_batch=4, jobs=1))
    assert {p.name for p in tmp_path.iterdir()} == {"letters"}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"device": "cuda"}, "compile with --optimise pad_heads alone"),
        ({"device": "cuda", "autotune": True}, "compile without --autotune"),
        ({"device": "cuda", "optimisations": ["pad_heads"]}, "compile with --precision float32"),
        ({"device": "cuda", "optimisations": [], "precision": "float32"}, "compile with another version of PyTorch"),
    ],
)
def test_what_to_leave_out_of_packages_that_differ(options: dict[str, Any], says: str) -> None:
    assert packages_script.Options(**options).remedy.startswith(says)


@pytest.mark.parametrize(
    ("cause", "says"),
    [
        (
            RuntimeError("g++ is not here"),
            r"visual_encoder cannot be compiled \(.*g\+\+ is not here.*\): see that a C\+\+",
        ),
        (torch.OutOfMemoryError("CUDA out of memory."), "the GPU has not enough memory for compiling visual_encoder"),
    ],
)
def test_a_compiler_that_fails_is_said(
    tiny_model: MUBiC, monkeypatch: pytest.MonkeyPatch, cause: Exception, says: str
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise torch._inductor.exc.InductorError(cause, None)

    monkeypatch.setattr(packages_script, "aot_compile", fails)
    given = (tiny_model.graph("visual_encoder"), signatures(TINY)["visual_encoder"], packages_script.Options())
    with pytest.raises(UserError, match=says):
        packages_script.compile_part(*given)


def processes_with(text: str) -> list[str]:
    said = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return [line for line in said.splitlines() if text in line]


def test_a_part_that_cannot_be_compiled_ends_the_others(
    tiny_model: MUBiC, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the real processes, of which none finds a compiler."""
    monkeypatch.setenv("CXX", "/no/compiler")
    says = r"cannot be compiled \(InvalidCxxCompiler.*\): see that a C\+\+ compiler \(g\+\+\) is installed"
    with pytest.raises(UserError, match=says):
        packages_script.build(
            tiny_model, checkpoint.Source("random", 0), tmp_path / "p", packages_script.Options(max_batch=4, jobs=2)
        )
    assert list(tmp_path.iterdir()) == []
    assert processes_with(str(tmp_path)) == []


@pytest.mark.parametrize(
    ("does", "says"),
    [
        ("os.kill(os.getpid(), 9)", r"ended with SIGKILL\): compile with fewer --jobs, which want less memory"),
        ("os.kill(os.getpid(), 11)", r"ended with SIGSEGV\): compile with another version of PyTorch"),
        (
            "sys.exit('torch.AcceleratorError: CUDA error: busy\\nCompile with TORCH_USE_CUDA_DSA')",
            r"ended with 1: torch.AcceleratorError: CUDA error: busy\): compile with another version of PyTorch",
        ),
        (
            "raise MemoryError('out of memory')",
            r"ended with 1: MemoryError: out of memory\): compile with fewer --jobs",
        ),
        ("sys.exit('no such thing')", r"ended with 1: no such thing\): compile with another version of PyTorch"),
    ],
)
def test_a_process_that_ends_without_its_part(
    tiny_model: MUBiC, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, does: str, says: str
) -> None:
    """The others hang, and do not go on."""
    code = f"import os, sys, time\nif sys.argv[2] != 'fusion': time.sleep(600)\n{does}"
    monkeypatch.setattr(packages_script, "PROCESS", (sys.executable, "-c", code))
    with pytest.raises(UserError, match=rf"fusion cannot be compiled \(its process {says}"):
        packages_script.build(
            tiny_model, checkpoint.Source("random", 0), tmp_path / "p", packages_script.Options(max_batch=4, jobs=4)
        )
    assert list(tmp_path.iterdir()) == []
    assert processes_with(str(tmp_path)) == []


def test_a_process_that_cannot_be_started(tiny_model: MUBiC, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages_script, "PROCESS", (str(tmp_path / "no python"),))
    with pytest.raises(
        UserError, match=r"no process can be started for .* \(No such file or directory\): compile with"
    ):
        packages_script.build(
            tiny_model, checkpoint.Source("random", 0), tmp_path / "p", packages_script.Options(max_batch=4, jobs=2)
        )
    assert list(tmp_path.iterdir()) == []


def test_a_compiler_that_would_link_a_second_runtime_is_refused(
    tiny_model: MUBiC, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text('#!/bin/sh\nexec g++ "$@" -static-libstdc++\n')
    compiler.chmod(0o755)
    monkeypatch.setattr(packages_script, "get_cpp_compiler", lambda: str(compiler))
    says = r"g\+\+ links libstdc\+\+ statically, .* name another C\+\+ compiler in CXX"
    with pytest.raises(UserError, match=says):
        packages_script.build(
            tiny_model, checkpoint.Source("random", 0), tmp_path / "p", packages_script.Options(max_batch=4)
        )
    assert not (tmp_path / "p").exists()
    for command in ("g++", str(tmp_path / "none")):
        monkeypatch.setattr(packages_script, "get_cpp_compiler", lambda command=command: command)
        packages_script.require_shared_runtime()


def test_the_commands(run, packages: Packages, tiny_model: MUBiC, tmp_path: Path) -> None:
    ran = run("compile", "random:demo", "--out", tmp_path / "p", "--precision", "float16")
    assert ran.code == 2
    assert "on a CPU packages compute in FP32" in ran.err
    write_film(tmp_path / "scene.mp4", 7, seconds=1)
    predict = ("predict", tmp_path / "scene.mp4", "--engine", "aotinductor", "--stride", 8, "--json")
    ran = run(*predict, "--maps", tmp_path / "m.npz")
    assert ran.code == 2
    assert "name their folder with --artifacts" in ran.err
    assert "mubic-deploy compile" in ran.err
    assert json.loads(run(*predict, "--maps", tmp_path / "m.npz", "--artifacts", packages.path).out)["maps"] == 2
    checkpoint.save(tiny_model, tmp_path / "tiny.safetensors")
    eager = ("--engine", "eager", "--checkpoint", tmp_path / "tiny.safetensors", "--maps", tmp_path / "e.npz")
    assert json.loads(run(*predict, *eager).out)["maps"] == 2
    got, expected = (np.load(tmp_path / name)["maps"] for name in ("m.npz", "e.npz"))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-3)
