"""A Triton server and clips for tests."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from mubic_deploy import graphs
from mubic_deploy.artifacts import Artifacts
from mubic_deploy.config import AUDIO_SAMPLES, Config
from mubic_deploy.triton.repository import write_repository
from mubic_deploy.triton.server import TritonServer

SLOW = """
import time
class TritonPythonModel(TritonPythonModel):
    def execute(self, requests):
        time.sleep(1)
        return super().execute(requests)
"""  # at the end of a model's code: each of its batches takes a second more
FREE_PORTS: dict[str, Any] = {"http_port": 0, "grpc_port": 0, "metrics_port": 0}


@contextlib.contextmanager
def serving(artifacts: Artifacts, folder: Path, **options: Any) -> Iterator[TritonServer]:
    """A server for the artefacts with its repository and log in `folder`; options: those of `write_repository`."""
    write_repository(artifacts, folder / "repository", **options)
    with TritonServer(folder / "repository", log=folder / "triton.log", **FREE_PORTS) as server:
        yield server


def clips(config: Config, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """VIDEO and AUDIO of random clips."""
    rng = np.random.default_rng(seed)
    video = rng.integers(0, 256, (count, config.frames, config.height, config.width, 3), np.uint8)
    return video, rng.uniform(-1, 1, (count, AUDIO_SAMPLES)).astype(np.float32)


def good(config: Config) -> dict[str, np.ndarray]:
    """A request that nothing is wrong with."""
    video, audio = clips(config, 1)
    return {"VIDEO": video, "AUDIO": audio, "SEED": np.array([[3]]), "STEPS": np.array([[4]], np.int32)}


def send(url: str, arrays: dict[str, np.ndarray], model: str = graphs.ENSEMBLE) -> np.ndarray:
    """A request as any client could send it, without `TritonPredictor`'s checks."""
    inputs = []
    for name, array in arrays.items():
        inputs.append(triton.InferInput(name, array.shape, np_to_triton_dtype(array.dtype)))
        inputs[-1].set_data_from_numpy(array)
    with triton.InferenceServerClient(url) as client:
        return client.infer(model, inputs).as_numpy("SALIENCY")


def send_right_and_wrong(
    url: str, right: dict[str, np.ndarray], expected: np.ndarray, count: int, tolerance: float
) -> None:
    """So many requests at once, every third of which asks for too many steps: those fail, the others get `expected`."""
    wrong = right | {"STEPS": np.array([[50]], np.int32)}
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(send, url, wrong if i % 3 == 0 else right) for i in range(count)]
    for i, answer in enumerate(answers):
        if i % 3 == 0:
            with pytest.raises(InferenceServerException, match="steps 50 is out of range"):
                answer.result()
        else:
            np.testing.assert_allclose(answer.result(), expected, rtol=0, atol=tolerance)


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    """AssertionError if it does not come true: Triton counts a request, and lets go of its memory, after its answer."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.05)


def processes(word: str) -> list[int]:
    """The processes with this word on their command line: the server, its models, their watchdog."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and word.encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:  # it ended meanwhile
            continue
    return found
