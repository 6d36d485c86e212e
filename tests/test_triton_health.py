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
from mubic_deploy.errors import UserError
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
FIRST_ALONE = """
class TritonPythonModel(TritonPythonModel):
    def _run(self, feeds):
        if len(feeds) == 1 and len(feeds[0]["A"]) == {batch}:
            feeds = [{{name: array[:1].repeat({batch}, 0) for name, array in feeds[0].items()}}]
        return super()._run(feeds)
"""
FAULT = """
class TritonPythonModel(TritonPythonModel):
    def _run(self, feeds):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
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
        with pytest.raises(health.GoneError, match="ddim has 1 of its 2 processes"):
            check(server)


def test_a_server_with_a_model_that_is_gone_is_ended(
    toy_artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """For whoever starts it again, as Docker does."""
    with serving(toy_artifacts, tmp_path) as server:
        all_models = health.model_processes
        monkeypatch.setattr(health, "model_processes", lambda *_: all_models(server.shm_prefix))  # others run here
        stub = next(iter(health.model_processes()))
        number = Path(f"/proc/{stub}/stat").read_text().rpartition(")")[2].split()[1]  # its parent: proc(5)
        command = str(server.http_port), number
        assert health.main(*command) == 0
        kill_one(server, "ddim")
        assert health.main(command[0]) == 1
        assert Path("/proc", number).exists()
        assert health.main(*command) == 1
        assert capsys.readouterr().out.splitlines() == [
            *["GoneError: ddim has 0 of its 1 processes"] * 2,
            f"ending the server, process {number}",
        ]
        end = time.monotonic() + 60
        while Path("/proc", number).exists():
            assert time.monotonic() < end
            time.sleep(0.1)
        with pytest.raises(UserError, match="the Triton server ended by itself"):
            server.check()


@pytest.mark.parametrize("then", [ConnectionRefusedError("it has ended"), ValueError("another one"), None])
def test_a_server_that_ends_by_itself_is_left_alone(then: Exception | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its models' processes go first."""
    found: list[Exception | None] = [health.GoneError("gone"), then]

    def check(port: int, processes: Counter[str]) -> None:
        if (error := found.pop(0)) is not None:
            raise error

    monkeypatch.setattr(health, "check", check)
    monkeypatch.setattr(health, "AGAIN", 0.0)
    monkeypatch.setattr(health, "model_processes", lambda: {1: "ddim"})
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("it was ended"))
    assert health.main("8000", "1") == 1
    assert found == []


def test_processes_that_cannot_be_seen_are_not_gone(toy_server: TritonServer) -> None:
    """The maps tell then."""
    health.check(toy_server.http_port, Counter())


@pytest.mark.parametrize("again", [True, False])
def test_a_server_whose_gpu_is_lost_is_ended(monkeypatch: pytest.MonkeyPatch, again: bool) -> None:
    """Nothing that runs in its process computes any more; not where it answers the second time."""
    found: list[Exception | None] = [health.FaultError("500"), health.FaultError("500") if again else None]
    ended: list[tuple[int, int]] = []

    def check(*_: object) -> None:
        if (error := found.pop(0)) is not None:
            raise error

    monkeypatch.setattr(health, "check", check)
    monkeypatch.setattr(health, "AGAIN", 0.0)
    monkeypatch.setattr(os, "kill", lambda *which: ended.append(which))
    assert health.main("8000", "77") == 1
    assert ended == ([(77, signal.SIGTERM)] if again else [])


@pytest.mark.parametrize(
    ("said", "lost"),
    [
        ("failed to use CUDA copy for A: an illegal memory access was encountered", True),
        ("CUDA_ERROR_ILLEGAL_ADDRESS", True),
        ("cudaErrorLaunchFailure: unspecified launch failure", True),
        ("uncorrectable ECC error encountered", True),
        ("cudaErrorMemoryAllocation: out of memory", False),
        ("CUDA error: out of memory", False),
        ("Request timeout expired", False),
        ("AUDIO reaches 1e+30, as integers do: scale it to -1 to 1", False),
    ],
)
def test_what_a_gpu_is_lost_by(said: str, lost: bool) -> None:
    assert bool(health.FAULT.search(f"/v2/models/mubic/infer: 500 {said}")) == lost


def test_a_fault_of_the_gpu_is_told_from_other_failures(toy_artifacts: Artifacts, tmp_path: Path) -> None:
    write_repository(toy_artifacts, tmp_path / "models")
    with (tmp_path / "models" / "fusion" / "1" / "model.py").open("a") as source:
        source.write(FAULT)
    with (
        TritonServer(tmp_path / "models", log=tmp_path / "log", **FREE_PORTS) as server,
        pytest.raises(health.FaultError, match=r"mubic/infer: 500 .*an illegal memory access"),
    ):
        check(server)


def test_a_process_that_triton_only_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no arguments."""
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: f"/opt/{health.STUB}\0")
    assert health.model_of(1) == ""


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


@pytest.mark.parametrize("batch", [2, 8])
def test_a_batch_of_which_only_the_first_is_right(toy_artifacts: Artifacts, tmp_path: Path, batch: int) -> None:
    """As with https://github.com/NVIDIA/TensorRT/issues/4853."""
    repository = tmp_path / "repository"
    write_repository(toy_artifacts, repository)
    with (repository / "fusion" / "1" / "model.py").open("a") as file:
        file.write(FIRST_ALONE.format(batch=batch))
    text = f"two maps of one clip of mubic, one in a batch of {batch} differ by .*--no-cuda-graphs"
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
    asked: list[tuple[str, tuple[int, ...]]] = []
    infer = health.infer

    def counted(port: int, config: dict[str, Any], clips: tuple[int, ...]) -> Any:
        asked.append((config["name"], clips))
        return infer(port, config, clips)

    monkeypatch.setattr(health, "infer", counted)
    check(toy_server)
    clips = [(0,), (0,), (1,), (1,), (0,), (0, 1), (0, 1, 0, 1, 0, 1, 0, 1)]
    assert asked == [(name, each) for name in ("mubic", "mubic_fixed") for each in clips]
    asked.clear()
    monkeypatch.setattr(health, "BUSY", 0.0)
    check(toy_server)
    assert asked == [("mubic", (0,))]


def test_no_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert health.main("9") == 1
    assert capsys.readouterr().out == "ConnectionRefusedError: [Errno 111] Connection refused\n"
