"""What tells whether the models of a running server answer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from triton_serving import serving

from mubic_deploy import graphs
from mubic_deploy.artifacts import Artifacts
from mubic_deploy.triton import health
from mubic_deploy.triton.server import TritonServer

pytest_plugins = ("triton_fixtures",)


def check(server: TritonServer) -> None:
    health.check(server.http_port, Counter(health.model_processes(server.shm_prefix).values()))


def kill_one(server: TritonServer, model: str) -> None:
    process = next(n for n, name in health.model_processes(server.shm_prefix).items() if name == model)
    os.kill(process, signal.SIGKILL)
    while health.model_of(process):
        time.sleep(0.01)


def test_a_sound_server(toy_server: TritonServer) -> None:
    assert health.ENSEMBLE == graphs.ENSEMBLE
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


def test_no_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert health.main("9") == 1
    assert capsys.readouterr().out == "ConnectionRefusedError: [Errno 111] Connection refused\n"
