"""What tells whether the models of a running server answer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from triton_serving import FREE_PORTS, serving

from mubic_deploy import graphs
from mubic_deploy.artifacts import Artifacts
from mubic_deploy.triton import health
from mubic_deploy.triton.repository import write_repository
from mubic_deploy.triton.server import TritonServer

pytest_plugins = ("triton_fixtures",)

# at the end of a model's code:
STALE = """
class TritonPythonModel(TritonPythonModel):
    def execute(self, requests):
        answers = super().execute(requests)
        before, self.before = getattr(self, "before", answers), answers
        return before
"""
NOT_FINITE = """
class TritonPythonModel(TritonPythonModel):
    def run_here(self, request, denoiser):
        saliency, used = super().run_here(request, denoiser)
        return [pb_utils.Tensor("SALIENCY", np.full_like(saliency.as_numpy(), np.nan)), used]
"""


def check(server: TritonServer) -> None:
    health.check(server.http_port, Counter(health.model_processes(server.shm_prefix).values()))


def kill_one(server: TritonServer, model: str) -> None:
    process = next(n for n, name in health.model_processes(server.shm_prefix).items() if name == model)
    os.kill(process, signal.SIGKILL)
    while health.model_of(process):
        time.sleep(0.01)


def test_a_sound_server(toy_server: TritonServer) -> None:
    assert health.ENSEMBLES == (graphs.ENSEMBLE, graphs.FIXED_ENSEMBLE)
    of_the_server = health.model_processes(toy_server.shm_prefix)
    graph_models = {"visual_encoder", "audio_encoder", "fusion", "denoiser", "sampler"}
    assert Counter(of_the_server.values()) == Counter({*graph_models, "ddim", "noise", "mubic_stream"})
    assert of_the_server.items() <= health.model_processes().items()
    check(toy_server)
    command = [sys.executable, "-m", "mubic_deploy.triton.health", str(toy_server.http_port)]
    environment = {"PYTHONPATH": str(Path(__file__).parents[1])}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def test_one_of_several_processes_is_gone(toy_artifacts: Artifacts, tmp_path: Path) -> None:
    """Which not every request meets."""
    with serving(toy_artifacts, tmp_path, instances={"ddim": 2}) as server:
        check(server)
        kill_one(server, "ddim")
        with pytest.raises(ValueError, match="ddim has 1 of its 2 processes"):
            check(server)


def test_a_model_that_does_not_answer(
    toy_artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though all the processes are there."""
    monkeypatch.setattr(health, "TIMEOUT", 1.0)
    with serving(toy_artifacts, tmp_path) as server:
        (fusion,) = (n for n, name in health.model_processes(server.shm_prefix).items() if name == "fusion")
        os.kill(fusion, signal.SIGSTOP)
        with pytest.raises((TimeoutError, ValueError)):  # Triton notices after a second, if the test is slow
            check(server)
        os.kill(fusion, signal.SIGCONT)


@pytest.mark.parametrize("stale", ["fusion", "sampler"])
def test_results_of_an_earlier_request(toy_artifacts: Artifacts, tmp_path: Path, stale: str) -> None:
    """As with https://github.com/triton-inference-server/server/issues/8550; `sampler` is in mubic_fixed alone."""
    repository = tmp_path / "repository"
    write_repository(toy_artifacts, repository)
    with (repository / stale / "1" / "model.py").open("a") as file:
        file.write(STALE)
    ensemble = "mubic" if stale == "fusion" else "mubic_fixed"
    text = f"two maps of one clip of {ensemble} differ by .*--no-cuda-graphs"
    with (
        TritonServer(repository, log=tmp_path / "triton.log", **FREE_PORTS) as server,
        pytest.raises(ValueError, match=text),
    ):
        check(server)


def test_maps_that_are_not_finite(toy_artifacts: Artifacts, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    write_repository(toy_artifacts, repository)
    with (repository / "ddim" / "1" / "model.py").open("a") as file:
        file.write(NOT_FINITE)
    with (
        TritonServer(repository, log=tmp_path / "triton.log", **FREE_PORTS) as server,
        pytest.raises(ValueError, match="a map of mubic is not finite"),
    ):
        check(server)


def test_a_busy_server_is_asked_once(toy_server: TritonServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others wait while it computes."""
    asked: list[tuple[str, int]] = []
    infer = health.infer

    def counted(port: int, config: dict[str, Any], turn: int) -> Any:
        asked.append((config["name"], turn))
        return infer(port, config, turn)

    monkeypatch.setattr(health, "infer", counted)
    check(toy_server)
    assert asked == [(name, turn) for name in ("mubic", "mubic_fixed") for turn in (0, 0, 1, 1, 0)]
    asked.clear()
    monkeypatch.setattr(health, "BUSY", 0.0)
    check(toy_server)
    assert asked == [("mubic", 0)]


def test_no_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert health.main("9") == 1
    assert capsys.readouterr().out == "ConnectionRefusedError: [Errno 111] Connection refused\n"
