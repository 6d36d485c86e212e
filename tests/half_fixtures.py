"""A tiny model; its graphs in half precision, with a sampler of two steps, and its packages for this CPU, each made
once a test run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from bench.machine import torch_threads
from mubic_deploy import checkpoint, folders
from mubic_deploy.artifacts import Artifacts
from mubic_deploy.config import DEMO
from mubic_deploy.engines.aotinductor import Packages
from mubic_deploy.graphs import signatures
from mubic_deploy.model.mubic import MUBiC, random_model
from mubic_deploy.sources import load_script, source_dir

TINY = replace(DEMO, name="tiny", height=64, width=96, audio_patch=(32, 48), visual_depths=(1, 1, 1, 1))


@pytest.fixture(scope="session")
def tiny_model() -> MUBiC:
    """Random weights, and statistics for BatchNorm that are not those of a fresh one."""
    model = random_model(TINY, 3)
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in ((module.running_mean, -0.2, 0.2), (module.running_var, 0.5, 2.0)):
                assert tensor is not None
                tensor.uniform_(low, high, generator=generator)
    return model


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[Path]:
    """What one process of the run makes, the others wait for."""
    lock = folder.with_name(f"{folder.name}.lock")
    lock.touch()
    with folders.locked(lock, wait=True):
        yield folder


@pytest.fixture(scope="session")
def half_artifacts(tiny_model: MUBiC, of_the_run: Path) -> Artifacts:
    with alone(of_the_run / "half") as out:
        if out.exists():
            return Artifacts.open(out)
        script = load_script(source_dir("export") / "onnx_graphs.py")
        return script.export(tiny_model, checkpoint.Source("test", 3), out, precision="float16", fixed_steps=2)[0]


@pytest.fixture(scope="session")
def packages(tiny_model: MUBiC, of_the_run: Path) -> Packages:
    with alone(of_the_run / "packages") as out:
        if out.exists():
            return Packages.open(out)
        said: list[str] = []
        script = load_script(source_dir("export") / "aotinductor_packages.py")
        options = script.Options(max_batch=4, optimisations=("split_depthwise", "pad_heads"), jobs=2)
        with torch_threads(2):  # with one the compiler takes other layouts, and none of them goes wrong
            source, progress = checkpoint.Source("test", 3), lambda text, *_: said.append(text)
            packages = script.build(tiny_model, source, out, options, progress)
        assert said[0] == "compiling 2 of 4 parts at once"
        assert sorted(said[1:5]) == [f"compiled {name}" for name in sorted(signatures(TINY))]
        assert said[-1] == "checking against eager PyTorch"
        return packages
