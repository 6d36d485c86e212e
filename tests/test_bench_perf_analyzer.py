"""NVIDIA's perf_analyzer against the real server; and where it cannot run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from bench import perf_analyzer
from bench.serving import PROTOCOLS, addresses
from mubic_deploy.errors import UserError
from mubic_deploy.parity import random_clip
from mubic_deploy.triton.server import TritonServer

pytest_plugins = ("triton_fixtures",)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_measures_the_ensemble(toy_server: TritonServer, toy_pipeline, tmp_path: Path, protocol: str) -> None:
    analyzer = perf_analyzer.find(tmp_path)
    clips = [random_clip(toy_pipeline.config, seed) for seed in range(2)]
    inputs = perf_analyzer.write_inputs(tmp_path / "inputs.json", clips, 2)
    values = perf_analyzer.run(analyzer, addresses(toy_server)[protocol], protocol, 2, 10, inputs)
    assert values["clips_per_s"] > 1
    assert 0 < values["median_s"] <= values["p90_s"] <= values["p95_s"] <= values["p99_s"] < 10
    # two requests on the way all the time: Little's law
    assert values["clips_per_s"] * values["median_s"] == pytest.approx(2, rel=0.6)
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix != ".json") == ["libraries"]


def test_a_server_that_is_gone(toy_pipeline, tmp_path: Path) -> None:
    analyzer = perf_analyzer.find(tmp_path)
    inputs = perf_analyzer.write_inputs(tmp_path / "inputs.json", [random_clip(toy_pipeline.config, 0)], 2)
    with pytest.raises(UserError, match="perf_analyzer failed"):
        perf_analyzer.run(analyzer, "127.0.0.1:9", "grpc", 1, 10, inputs)


def test_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="perf_analyzer is not installed"):
        perf_analyzer.find(tmp_path)


def test_a_library_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perf_analyzer, "_libraries", lambda folder: [])
    monkeypatch.setenv("LD_LIBRARY_PATH", "")
    with pytest.raises(UserError, match=r"does not run here without lib(b64|cudart)\.so\S+: (pip )?install"):
        perf_analyzer.find(tmp_path)
