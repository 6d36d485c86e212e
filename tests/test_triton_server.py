"""The server's life: start, end, and what can go wrong with either."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import numpy as np
import onnx
import pytest
import toy_graphs
from triton_serving import FREE_PORTS, clips, processes, serving, wait_until

from mubic_deploy.artifacts import Artifacts
from mubic_deploy.config import get_config
from mubic_deploy.errors import UserError
from mubic_deploy.triton import server as server_module
from mubic_deploy.triton.client import TritonPredictor
from mubic_deploy.triton.health import model_processes
from mubic_deploy.triton.repository import write_repository
from mubic_deploy.triton.server import TritonServer

pytest_plugins = ("triton_fixtures",)

# what `mubic-deploy serve` does, with a line that says where
SERVE = """
import sys
from pathlib import Path
from mubic_deploy.errors import UserError
from mubic_deploy.triton.server import serve
try:
    serve(Path(sys.argv[1]), http_port=0, grpc_port=0, metrics_port=0,
          on_ready=lambda s: print(s.url, s.shm_prefix, s.log, flush=True))
except UserError as error:
    sys.exit(str(error))
"""


@pytest.fixture(scope="module")
def repository(toy_artifacts: Artifacts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("life") / "repository"
    write_repository(toy_artifacts, path)
    return path


def regions(prefix: str) -> list[Path]:
    return list(Path("/dev/shm").glob(f"{prefix}*"))


def wait_for_end(prefix: str, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while processes(prefix) or regions(prefix):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def start_serve(repository: Path, temporary: Path) -> tuple[subprocess.Popen, str, str, Path]:
    """The process, its gRPC address, its prefix in shared memory and its log."""
    command = [sys.executable, "-c", SERVE, str(repository)]
    environment = os.environ | {"TMPDIR": str(temporary), "PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    url, prefix, log = process.stdout.readline().split()
    return process, url, prefix, Path(log)


def counted(server: TritonServer) -> int:
    """How many requests to the ensemble the server's metrics say have succeeded."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics") as answer:
        count = re.search(
            r'^nv_inference_request_success\{model="mubic",version="1"\} (\d+)$', answer.read().decode(), re.M
        )
    assert count is not None, "no count of the ensemble's requests among the metrics"
    return int(count[1])


def test_start_and_stop(repository: Path) -> None:
    server = TritonServer(repository, **FREE_PORTS)
    with server:
        assert processes(server.shm_prefix)
        assert regions(server.shm_prefix)
        ports = {server.http_port, server.grpc_port, server.metrics_port}
        assert len(ports) == 3
        with TritonPredictor(server.url) as predictor:
            predictor.predict(*clips(predictor.config, 1))
        wait_until(lambda: counted(server) == 1)
        log = server.log
        assert log is not None
        assert "Started GRPCInferenceService" in log.read_text()
    assert not processes(server.shm_prefix)
    assert not regions(server.shm_prefix)
    assert not log.exists()
    server.stop()  # harmless


def test_a_host_may_be_a_name(repository: Path) -> None:
    """Of HTTP, which tells whether it is ready, as of gRPC."""
    with TritonServer(repository, host="localhost", **FREE_PORTS) as server:
        assert server.url == f"127.0.0.1:{server.grpc_port}"
        with TritonPredictor(f"localhost:{server.grpc_port}") as predictor:
            assert predictor.config.name == "demo"


@pytest.mark.parametrize("host", ["::1", "no such host", "", "x" * 300])
def test_a_host_that_triton_cannot_listen_on(repository: Path, host: str) -> None:
    with pytest.raises(UserError, match=r"has no IPv4 address, which Triton needs: use 127\.0\.0\.1"):
        TritonServer(repository, host=host)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_ends_with_a_signal(repository: Path, tmp_path: Path, number: signal.Signals) -> None:
    process, url, prefix, _ = start_serve(repository, tmp_path)
    with TritonPredictor(url) as predictor:
        predictor.predict(*clips(predictor.config, 1))
        process.send_signal(number)
        output, errors = process.communicate(timeout=30)
        assert (process.returncode, output, errors) == (0, "", "")
        with pytest.raises(UserError, match=f"no Triton server answers at {url}"):
            predictor.predict(*clips(predictor.config, 1))
    assert not processes(prefix)
    assert not regions(prefix)
    assert list(tmp_path.iterdir()) == []


def test_nothing_stays_when_the_parent_is_killed(repository: Path, tmp_path: Path) -> None:
    process, _, prefix, log = start_serve(repository, tmp_path)
    process.kill()
    process.communicate()
    assert wait_for_end(prefix, 15)
    assert list(tmp_path.iterdir()) == [log]


def test_the_command_leaves_no_repository_when_it_is_killed(toy_artifacts: Artifacts, tmp_path: Path) -> None:
    ports = [word for name in ("http", "grpc", "metrics") for word in (f"--{name}-port", "0")]
    command = [sys.executable, "-m", "mubic_deploy.cli", "serve", "--artifacts", str(toy_artifacts.path), *ports]
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen([*command, "--log", os.devnull], env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert "serving demo" in process.stdout.readline()
    assert {path.name[:13] for path in tmp_path.iterdir()} == {"mubic-reposit", "mubic-triton-"}
    process.kill()
    process.communicate()
    end = time.monotonic() + 20
    while list(tmp_path.iterdir()) and time.monotonic() < end:
        time.sleep(0.05)
    assert list(tmp_path.iterdir()) == []


def test_nothing_runs_on_when_the_watchdog_is_killed(repository: Path, tmp_path: Path) -> None:
    process, _, prefix, _ = start_serve(repository, tmp_path)
    watchdog = next(pid for pid in processes(prefix) if b"watchdog.py" in Path(f"/proc/{pid}/cmdline").read_bytes())
    os.kill(watchdog, signal.SIGKILL)
    _, errors = process.communicate(timeout=15)
    assert process.returncode == 1
    assert "the Triton server ended by itself" in errors
    assert wait_for_end(prefix, 15)


def test_serve_fails_when_the_server_dies(repository: Path, tmp_path: Path) -> None:
    process, _, prefix, log = start_serve(repository, tmp_path)
    server = next(pid for pid in processes(prefix) if Path(f"/proc/{pid}/exe").resolve().name == "tritonserver")
    os.kill(server, signal.SIGKILL)
    _, errors = process.communicate(timeout=15)
    assert process.returncode == 1
    assert errors.startswith(
        "the Triton server ended by itself (status 137, SIGKILL: memory may have run out, see dmesg)"
    )
    assert "CUDA" not in errors
    assert str(log) in errors
    assert wait_for_end(prefix, 5)
    assert list(tmp_path.iterdir()) == [log]


@pytest.mark.parametrize("model", ["fusion", "mubic_stream"])
def test_serve_ends_when_a_model_dies(repository: Path, tmp_path: Path, model: str) -> None:
    """Triton would go on, call itself ready and fail every request to that model."""
    process, _, prefix, log = start_serve(repository, tmp_path)
    (number,) = (number for number, name in model_processes(prefix).items() if name == model)
    os.kill(number, signal.SIGKILL)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 1
    assert errors == (
        f"the process of the model {model} ended by itself, and Triton starts no other: start the server again; memory "
        f"may have run out, see dmesg (log: {log})\n"
    )
    assert wait_for_end(prefix, 5)
    assert list(tmp_path.iterdir()) == [log]


def test_signal_while_starting(repository: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", SERVE, str(repository)]
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("*.log")):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=30)
    assert (process.returncode, output, errors) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("use", ["http_port", "grpc_port", "metrics_port"])
def test_port_in_use(repository: Path, use: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"port {port} of 127\.0\.0\.1 cannot be used \(Address already in use\)"):
            TritonServer(repository, **(FREE_PORTS | {use: port})).start()


def test_a_host_of_another_machine(repository: Path) -> None:
    """The ports are not to blame."""
    with pytest.raises(
        UserError, match=r"^192\.0\.2\.1 is no address of this machine: use 127\.0\.0\.1, 0\.0\.0\.0 or"
    ):
        TritonServer(repository, host="192.0.2.1", **FREE_PORTS).start()


@pytest.mark.parametrize("what", ["mkdtemp", "copytree"])
def test_a_full_folder_for_temporary_files(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Before anything was started."""
    full = "[Errno 28] No space left on device"

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device") if what == "mkdtemp" else shutil.Error([("a", "b", full)])

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(tempfile if what == "mkdtemp" else server_module, what, fail)
    with pytest.raises(UserError, match=r"cannot be started \(\[Errno 28\] No space .*\): make room .* set TMPDIR"):
        TritonServer(repository, **FREE_PORTS).start()
    assert not list(tmp_path.iterdir())


def test_a_log_that_cannot_be_written(repository: Path, tmp_path: Path) -> None:
    """Of which room for temporary files is no cure."""
    log = tmp_path / "gone" / "server.log"
    with pytest.raises(UserError, match=rf"^{log} cannot be written \(No such .*\): choose another --log$"):
        TritonServer(repository, log=log, **FREE_PORTS).start()
    assert not list(tmp_path.iterdir())


def test_a_log_belongs_to_one_server(repository: Path, tmp_path: Path) -> None:
    """For as long as that runs; what an earlier one wrote goes."""
    log = tmp_path / "log"
    log.write_text('E1127 15:04:05.000000 1 x.cc:1] "an old error"\n')
    with TritonServer(repository, log=log, **FREE_PORTS):
        said = log.read_text()
        assert "Started GRPCInferenceService" in said
        assert "an old error" not in said
        with pytest.raises(UserError, match=rf"^{log} is the log of another server, which runs: choose another --log$"):
            TritonServer(repository, log=log, **FREE_PORTS).start()
        assert log.read_text().startswith(said)
    with TritonServer(repository, log=Path(os.devnull), **FREE_PORTS), server_module._fresh(Path(os.devnull)):
        server_module._fresh(log).close()


def test_missing_repository(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"there is no model repository {tmp_path}/none"):
        TritonServer(tmp_path / "none").start()


def test_a_python_without_its_library(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_config_var", lambda name: None)
    monkeypatch.setattr("mubic_deploy.triton.server.find_library", lambda name: None)
    with pytest.raises(
        UserError, match=r"needs libpython3\.\d+\.so\.1\.0, which this Python lacks: install the package"
    ):
        TritonServer(repository, **FREE_PORTS).start()


def failed_start(repository: Path, tmp_path: Path) -> str:
    server = TritonServer(repository, **FREE_PORTS, log=tmp_path / "log")
    with pytest.raises(UserError) as error:
        server.start()
    assert not processes(server.shm_prefix)
    assert not regions(server.shm_prefix)
    assert "\n" not in str(error.value)
    assert f"(log: {tmp_path}/log)" in str(error.value)
    return str(error.value)


def test_broken_model_file(repository: Path, tmp_path: Path) -> None:
    broken = tmp_path / "repository"
    shutil.copytree(repository, broken)
    (broken / "fusion" / "1" / "model.py").write_text("import no_such_module\n")
    message = "the model fusion cannot be loaded: ModuleNotFoundError: No module named 'no_such_module'"
    assert message in failed_start(broken, tmp_path)


def test_changed_artifact(tmp_path: Path) -> None:
    artifacts = toy_graphs.write(get_config("demo"), tmp_path / "toy")
    write_repository(artifacts, tmp_path / "repository")
    graph = onnx.load(artifacts.file("audio_encoder"))
    graph.doc_string = "another"
    onnx.save(graph, artifacts.file("audio_encoder"))
    message = f"the model audio_encoder cannot be loaded: {artifacts.file('audio_encoder')} is not the file that"
    assert message in failed_start(tmp_path / "repository", tmp_path)


def test_log_stays_where_it_was_asked_for(toy_artifacts: Artifacts, tmp_path: Path) -> None:
    with serving(toy_artifacts, tmp_path, instances={"ddim": 2}) as server, TritonPredictor(server.url) as predictor:
        video, audio = clips(predictor.config, 2)
        first, _ = predictor.predict(video, audio, 1)
        np.testing.assert_array_equal(predictor.predict(video, audio, 1)[0], first)
    assert "ddim_0_1" in (tmp_path / "triton.log").read_text()
