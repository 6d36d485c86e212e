"""A tiny model and its graphs in half precision, with a sampler of two steps, exported once a test run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from mubic_deploy import checkpoint, folders
from mubic_deploy.artifacts import Artifacts
from mubic_deploy.config import DEMO
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


@pytest.fixture(scope="session")
def half_artifacts(tiny_model: MUBiC, of_the_run: Path) -> Artifacts:
    out, lock = of_the_run / "half", of_the_run / "half.lock"
    lock.touch()
    with folders.locked(lock, wait=True):
        if out.exists():
            return Artifacts.open(out)
        script = load_script(source_dir("export") / "onnx_graphs.py")
        return script.export(tiny_model, checkpoint.Source("test", 3), out, precision="float16", fixed_steps=2)[0]
