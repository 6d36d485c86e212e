"""NVIDIA's perf_analyzer against the real server; and where it cannot run."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
import threading
from pathlib import Path

import pytest
from tritonclient.grpc import InferenceServerClient

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


LEAVES = """#!{python}
import subprocess, sys
from pathlib import Path
from tritonclient.grpc import InferenceServerClient
done = subprocess.run([{path!r}, *sys.argv[1:]])
client = InferenceServerClient(sys.argv[sys.argv.index("-u") + 1])
for name in ("VIDEO_0_1", "STEPS_USED", "SALIENCY_of_others"):
    file = Path(f"/dev/shm/{prefix}{{name}}")
    file.write_bytes(bytes(4096))
    client.register_system_shared_memory(name, f"/{{file.name}}", 4096)
    file.unlink()
sys.exit(done.returncode)
"""  # as it does now and then, where Triton lets go of a region later than it answers


def test_nothing_stays_in_the_server(toy_server: TritonServer, toy_pipeline, tmp_path: Path) -> None:
    """Two at a time, each of which would take the other's regions."""
    analyzer = perf_analyzer.find(tmp_path)
    script = tmp_path / "perf_analyzer"
    prefix = f"mubic_tests_{os.getpid()}_"
    script.write_text(LEAVES.format(python=sys.executable, path=str(analyzer.path), prefix=prefix))
    script.chmod(0o755)
    inputs = perf_analyzer.write_inputs(tmp_path / "inputs.json", [random_clip(toy_pipeline.config, 0)] * 2, 2)
    found: list[dict[str, float]] = []

    def run() -> None:
        leaving = dataclasses.replace(analyzer, path=script)
        found.append(perf_analyzer.run(leaving, toy_server.url, "shm", 1, 10, inputs))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    with InferenceServerClient(toy_server.url) as client:
        assert set(client.get_system_shared_memory_status().regions) == {"SALIENCY_of_others"}
        client.unregister_system_shared_memory("SALIENCY_of_others")


def test_a_server_that_is_gone(toy_pipeline, tmp_path: Path) -> None:
    analyzer = perf_analyzer.find(tmp_path)
    inputs = perf_analyzer.write_inputs(tmp_path / "inputs.json", [random_clip(toy_pipeline.config, 0)], 2)
    for protocol in ("grpc", "shm"):
        with pytest.raises(UserError, match="perf_analyzer failed"):
            perf_analyzer.run(analyzer, "127.0.0.1:9", protocol, 1, 10, inputs)


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
