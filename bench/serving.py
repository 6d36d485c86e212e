"""A Triton server to be measured, on this machine, and clients of it."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from mubic_deploy import graphs
from mubic_deploy.artifacts import Artifacts
from mubic_deploy.errors import UserError
from mubic_deploy.pipeline import Predictor, request
from mubic_deploy.triton import parameters
from mubic_deploy.triton.client import TritonPredictor
from mubic_deploy.triton.repository import write_repository
from mubic_deploy.triton.server import TritonServer

GRPC, HTTP, SHM = "grpc", "http", "shm"  # the last: gRPC with clips and maps in shared memory
PROTOCOLS = (GRPC, HTTP, SHM)
TIMEOUT = 300.0  # s: at 16 clients of `full` a request waits for minutes


class Client(Predictor, Protocol):
    """Close it when it is done."""

    def close(self) -> None: ...


class HttpPredictor:
    """As `TritonPredictor`, over HTTP with binary tensors; for one thread, and for no more clips than the server takes
    at once. UserError if the server does not answer, serves something else or refuses."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._client = InferenceServerClient(address, connection_timeout=TIMEOUT, network_timeout=TIMEOUT)
        try:
            with self._explaining():
                served = self._client.get_model_config(graphs.ENSEMBLE)["parameters"]
            if parameters.CONFIG not in served:
                raise UserError(f"the model {graphs.ENSEMBLE} on {address} is not this package's")
        except UserError:
            self.close()
            raise
        self.config = parameters.config_from_string(served[parameters.CONFIG]["string_value"])
        self.default_steps = self.config.default_steps

    def close(self) -> None:
        self._client.close()

    def predict(
        self, video: np.ndarray, audio: np.ndarray, seed: np.ndarray | int = 0, steps: np.ndarray | int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """See `Pipeline.predict`."""
        arrays = request(self.config, video, audio, seed, self.default_steps if steps is None else steps)
        inputs = []
        for name, array in arrays.items():
            inputs.append(InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype)))
            inputs[-1].set_data_from_numpy(array)
        outputs = [InferRequestedOutput(name) for name in graphs.pipeline(self.config).output_names]
        with self._explaining():
            answer = self._client.infer(graphs.ENSEMBLE, inputs, outputs=outputs)
        return answer.as_numpy("SALIENCY"), answer.as_numpy("STEPS_USED")

    @contextlib.contextmanager
    def _explaining(self) -> Iterator[None]:
        try:
            yield
        except (InferenceServerException, OSError, HTTPException, ValueError) as error:  # no Triton may be there
            said = " ".join(str(error).split())
            raise UserError(f"the Triton server at {self._address} does not answer over HTTP ({said})") from None


@contextlib.contextmanager
def serving(artifacts: Artifacts, folder: Path, **options: Any) -> Iterator[TritonServer]:
    """A server of the graphs on free ports, its repository in `folder`. options: those of `write_repository`."""
    repository = folder / "repository"
    write_repository(artifacts, repository, **options)
    with TritonServer(repository, http_port=0, grpc_port=0, metrics_port=0) as server:
        yield server


def addresses(server: TritonServer) -> dict[str, str]:
    """HOST:PORT by protocol."""
    return {GRPC: server.url, HTTP: f"{server.host}:{server.http_port}", SHM: server.url}


def processes(server: TritonServer) -> list[int]:
    """The server's and its models'."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdecimal() and server.shm_prefix.encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


def cpu_s(server: TritonServer) -> dict[str, float]:
    """Seconds of CPU time until now, in all threads: of this process, of the server's, and of its models'."""
    used = {"bench": time.process_time(), "tritonserver": 0.0, "models": 0.0}
    for process in processes(server):
        with contextlib.suppress(OSError):
            name, _, rest = Path(f"/proc/{process}/stat").read_text().rpartition(")")
            ticks = map(int, rest.split()[11:13])  # utime and stime, fields 14 and 15 of the line: proc(5)
            used["models" if "(triton_python" in name else "tritonserver"] += sum(ticks) / os.sysconf("SC_CLK_TCK")
    return used


def client(address: str, protocol: str) -> Client:
    """A new client of the server at HOST:PORT, with a connection of its own. protocol: of PROTOCOLS."""
    return HttpPredictor(address) if protocol == HTTP else TritonPredictor(address, TIMEOUT, protocol == SHM)
