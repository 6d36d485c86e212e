"""Compiled packages on a real server: `mubic` as one model, against the same packages in process."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from fake_triton import Tensor, TritonError, backend_utils
from google.protobuf import text_format
from half_fixtures import TINY
from triton_serving import FREE_PORTS, clips, good, send, send_right_and_wrong
from tritonclient.grpc.model_config_pb2 import ModelConfig
from tritonclient.utils import InferenceServerException

from mubic_deploy.config import ADAPTIVE, Config
from mubic_deploy.engines.aotinductor import Packages
from mubic_deploy.errors import UserError
from mubic_deploy.pipeline import Pipeline, StepsError
from mubic_deploy.scenes.film import write_film
from mubic_deploy.sources import load_script, source_dir
from mubic_deploy.triton.client import TritonPredictor
from mubic_deploy.triton.repository import write_package_repository
from mubic_deploy.triton.server import TritonServer

pytest_plugins = ("half_fixtures",)
TOLERANCE = 1e-5
# at the end of the model's code:
FAULT = """
aotinductor.computes = lambda: {computes}


class TritonPythonModel(TritonPythonModel):
    def initialize(self, args):
        super().initialize(args)
        self.on_gpu = True

    def _run(self, feeds):
        if any(666 in feed["SEED"] for feed in feeds):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return super()._run(feeds)
"""


@pytest.fixture(scope="module")
def server(packages: Packages, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    folder = tmp_path_factory.mktemp("triton")
    write_package_repository(packages, folder / "repository", threads=1, queue_delay_us=20_000)
    with TritonServer(folder / "repository", log=folder / "triton.log", **FREE_PORTS) as server:
        yield server


@pytest.fixture(scope="module")
def pipeline(packages: Packages) -> Pipeline:
    return Pipeline.open(packages.path, "aotinductor")


def read(repository: Path, name: str = "mubic") -> ModelConfig:
    return text_format.Parse((repository / name / "config.pbtxt").read_text(), ModelConfig())


def test_same_maps_as_in_process(server: TritonServer, pipeline: Pipeline) -> None:
    video, audio = clips(TINY, 6)  # more than the packages take at once
    seeds, steps = np.arange(6) * 5, np.array([1, 4, 2, ADAPTIVE, 2, 3])
    with TritonPredictor(server.url) as predictor:
        assert (predictor.config, predictor.max_batch, predictor.source["name"]) == (TINY, 4, "test")
        saliency, used = predictor.predict(video, audio, seeds, steps)
    expected, expected_used = pipeline.predict(video, audio, seeds, steps)
    np.testing.assert_allclose(saliency, expected, rtol=0, atol=TOLERANCE)
    np.testing.assert_array_equal(used, expected_used)
    assert saliency.std() > 0.01  # there is something to compare


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"VIDEO": np.zeros((1, 16, 10, 96, 3), np.uint8)}, "VIDEO"),
        ({"AUDIO": np.full((1, 16608), np.nan, np.float32)}, "AUDIO holds NaN or infinite samples"),
        ({"AUDIO": np.full((1, 16608), 1e30, np.float32)}, r"AUDIO reaches 1e\+30, as integers do"),
        ({"STEPS": np.array([[99]], np.int32)}, "steps 99 is out of range: use 1 to 12"),
        ({"SEED": np.array([[-5]])}, "seed -5 is negative"),
        ({"SEED": np.array([[1], [2]])}, "batch"),
    ],
)
def test_a_wrong_request_gets_an_error(server: TritonServer, change: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(InferenceServerException, match=message) as error:
        send(server.url, good(TINY) | change)
    assert error.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_requests_are_merged_and_only_the_wrong_ones_fail(server: TritonServer, pipeline: Pipeline) -> None:
    right = good(TINY)
    expected, _ = pipeline.predict(right["VIDEO"], right["AUDIO"], 3, 4)
    with triton.InferenceServerClient(server.url) as client:

        def counts() -> tuple[int, int]:
            (found,) = client.get_inference_statistics("mubic").model_stats
            return found.inference_count, found.execution_count

        before = counts()
        send_right_and_wrong(server.url, right, expected, 8, TOLERANCE)
        clips_more, runs_more = (b - a for a, b in zip(before, counts(), strict=True))
    assert runs_more < clips_more


@pytest.mark.parametrize("lost", [True, False])
def test_a_gpu_that_is_lost_to_the_process_ends_it(packages: Packages, tmp_path: Path, lost: bool) -> None:
    """After a fault CUDA refuses every call of a process; without one the next request is computed."""
    write_package_repository(packages, tmp_path / "repository", threads=1)
    with (tmp_path / "repository" / "mubic" / "1" / "model.py").open("a") as file:
        file.write(FAULT.format(computes=not lost))
    with TritonServer(tmp_path / "repository", log=tmp_path / "triton.log", **FREE_PORTS) as server:
        send(server.url, good(TINY))
        with pytest.raises(InferenceServerException, match=None if lost else "an illegal memory access"):
            send(server.url, good(TINY) | {"SEED": np.array([[666]])})
        log = (tmp_path / "triton.log").read_text()
        assert ("the GPU is lost to this process, which ends" in log) == lost
        if lost:
            assert "an illegal memory access" in log
            with pytest.raises(UserError, match="the process of the model mubic ended by itself"):
                server.check()
        else:
            send(server.url, good(TINY))
            server.check()


def test_the_commands(run, server: TritonServer, packages: Packages, tmp_path: Path) -> None:
    """A film and a live stream of it, through the server."""
    write_film(tmp_path / "scene.mp4", 7, seconds=1)
    film = (tmp_path / "scene.mp4", "--stride", 4, "--json", "--maps")
    here = ("--engine", "aotinductor", "--artifacts", packages.path)
    assert run("predict", *film, tmp_path / "here.npz", *here).code == 0
    assert run("predict", *film, tmp_path / "there.npz", "--engine", f"triton://{server.url}").code == 0
    assert run("stream", *film, tmp_path / "live.npz", "--url", server.url).code == 0
    expected, *others = (np.load(tmp_path / f"{name}.npz") for name in ("here", "there", "live"))
    for found in others:
        np.testing.assert_array_equal(found["frame_index"], expected["frame_index"])
        np.testing.assert_allclose(found["maps"], expected["maps"], rtol=0, atol=TOLERANCE)
    command = ("repository", packages.path, "--engine", "aotinductor", "--out", tmp_path / "models")
    ran = run(*command, "--instances", 2, "--max-streams", 7)
    assert (ran.code, f"--model-repository={tmp_path / 'models'}" in ran.out) == (0, True)
    assert read(tmp_path / "models").instance_group[0].count == 2
    assert 'string_value: "7"' in (tmp_path / "models" / "mubic_stream" / "config.pbtxt").read_text()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("serve",), "name their folder with --artifacts, without --checkpoint and --variant (make it with mubic-d"),
        (("serve", "--checkpoint", "demo"), "name their folder with --artifacts"),
        (("serve", "--artifacts", "FOLDER", "--seed", "1"), "no weights are drawn for"),
        (("serve", "--artifacts", "FOLDER", "--max-batch", "4"), "--max-batch and --call-denoiser are for exported"),
        (("serve", "--artifacts", "FOLDER", "--call-denoiser"), "--max-batch and --call-denoiser are for exported"),
        (("serve", "--artifacts", "FOLDER", "--instances", "ddim=2"), "ddim=2 is for exported graphs on a CPU: say"),
        (("repository", "FOLDER", "--out", "OUT", "--loops", "2"), "--loops, --no-cuda-graphs and --no-warm-up are"),
        (("repository", "FOLDER", "--out", "OUT", "--threads", "9999999999"), "threads 9999999999 is out of range"),
        (
            ("repository", "FOLDER", "--out", "OUT", "--instances", "9999999999"),
            "instances of mubic 9999999999 is out of range",
        ),
        (("repository", "NONE", "--out", "OUT"), "does not exist: compile it here with mubic-deploy compile"),
    ],
)
def test_what_cannot_be_served(run, packages: Packages, tmp_path: Path, command: tuple[str, ...], message: str) -> None:
    places = {"FOLDER": packages.path, "OUT": tmp_path / "models", "NONE": tmp_path / "none"}
    name, *more = command
    ran = run(name, "--engine", "aotinductor", *(places.get(word, word) for word in more))
    assert (ran.code, ran.err.count("\n"), message in ran.err) == (2, 1, True), ran.err
    assert not list(tmp_path.iterdir())


def test_packages_that_were_made_anew_or_are_gone(packages: Packages, tmp_path: Path) -> None:
    copy = Packages.open(shutil.copytree(packages.path, tmp_path / "copy"))
    write_package_repository(copy, tmp_path / "models")
    manifest = tmp_path / "copy" / "packages.json"
    manifest.write_text(manifest.read_text() + "\n")
    server = TritonServer(tmp_path / "models", log=tmp_path / "log", **FREE_PORTS)
    with pytest.raises(
        UserError, match=r"copy/packages\.json is not the file that this model rep.* \(SHA-256 differs\): write"
    ):
        server.start()
    manifest.unlink()
    with pytest.raises(UserError, match=r"packages\.json is missing: compile again, then write the model repository"):
        server.start()


def for_a_gpu(packages: Packages, max_batch: int) -> Packages:
    changes = {"device": {"type": "cuda"}, "profile": {"min": 1, "max": max_batch}}
    return Packages(packages.path, packages.config, {**packages.manifest, **changes})


def test_a_gpu_has_sizes_that_are_captured(packages: Packages, tmp_path: Path) -> None:
    write_package_repository(for_a_gpu(packages, 24), tmp_path / "models", instances=2, queue_timeout_s=2.5)
    model = read(tmp_path / "models")
    assert (model.backend, model.max_batch_size, model.instance_group[0].count) == ("python", 24, 2)
    assert list(model.dynamic_batching.preferred_batch_size) == [24]
    assert model.dynamic_batching.default_queue_policy.default_timeout_microseconds == 2_500_000
    assert json.loads(model.parameters["SIZES"].string_value) == [24, 16, 8, 4, 2, 1]
    assert {p.name for p in (tmp_path / "models").iterdir()} == {"mubic", "mubic_stream"}
    with pytest.raises(UserError, match="threads are for packages of a CPU, these are of a GPU: leave them out"):
        write_package_repository(for_a_gpu(packages, 24), tmp_path / "models", threads=2)


# ---- the model with doubles of the server's module and of the pipeline, as a GPU's would be called


class Recorded:
    """A pipeline whose map is the seed, and which knows what it was asked for. Step 7 is what a model cannot do."""

    def __init__(self, fixed_steps: int | None = None, config: Config = TINY) -> None:
        self.config, self.fixed_steps, self.calls = config, fixed_steps, list[tuple[int, list[int]]]()
        self.allocated: list[np.ndarray] = []

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        self.allocated.append(np.empty(shape, dtype))
        return self.allocated[-1]

    def predict(
        self, video: np.ndarray, audio: np.ndarray, seed: np.ndarray, steps: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        assert len(video) == len(audio) == len(seed) == len(steps)
        self.pinned = any(np.shares_memory(video, array) for array in self.allocated)
        self.calls.append((len(video), sorted(set(steps.tolist()))))
        if 7 in steps:
            raise StepsError("ADAPTIVE_STEPS is out of range")
        maps = np.broadcast_to(seed[:, None, None], (len(seed), *TINY.map_size)).astype(np.float32)
        return maps, steps[:, None].copy()


@pytest.fixture
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, packages: Packages, tmp_path: Path) -> Any:
    """The model of packages for a GPU that take 6 clips at once, when the server has loaded it."""
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", backend_utils())
    monkeypatch.delitem(sys.modules, "mubic_deploy.triton.graph_model", raising=False)
    write_package_repository(for_a_gpu(packages, 6), tmp_path / "models")
    config = read(tmp_path / "models")
    values = {key: {"string_value": value.string_value} for key, value in config.parameters.items()}
    config_of, fixed = getattr(request, "param", (TINY, 4))
    monkeypatch.setattr(Pipeline, "open", lambda *_: Recorded(fixed_steps=fixed, config=config_of))
    model = load_script(source_dir("triton_models") / "mubic" / "1" / "model.py").TritonPythonModel()
    model.initialize({"model_config": json.dumps({"parameters": values}), "model_name": "mubic"})
    yield model
    monkeypatch.delitem(sys.modules, "mubic_deploy.triton.graph_model", raising=False)


def request(count: int, seed: int, steps: int = 4) -> SimpleNamespace:
    video, audio = clips(TINY, count)
    arrays = {"VIDEO": video, "AUDIO": audio, "SEED": np.arange(seed, seed + count)[:, None]}
    arrays["STEPS"] = np.full((count, 1), steps, np.int32)
    return SimpleNamespace(tensors={name: Tensor(name, array) for name, array in arrays.items()})


@pytest.mark.parametrize("model", [(replace(TINY, variant="no_diffusion"), None)], indirect=True)
def test_a_model_without_diffusion_is_not_asked_for_two_steps(model: Any) -> None:
    assert {steps for _, (steps,) in model.engine.pipeline.calls} == {1}


def test_all_that_a_gpu_captures_is_captured_before_the_server_is_ready(model: Any) -> None:
    calls = model.engine.pipeline.calls
    assert [batch for batch, _ in calls] == [size for size in (6, 4, 2, 1) for _ in range(3)]
    for size in (6, 4, 2, 1):
        assert sorted(steps for batch, (steps,) in calls if batch == size) == [1, 2, 4]  # the sampler's 4, and the loop


def test_a_batch_goes_in_parts_that_are_captured(model: Any) -> None:
    model.engine.pipeline.calls.clear()
    answers = model.execute([request(2, seed=10), request(3, seed=20)])
    assert model.engine.pipeline.calls == [(4, [4]), (1, [4])]
    assert model.engine.pipeline.pinned  # from where the GPU copies by itself
    for answer, seeds in zip(answers, ([10, 11], [20, 21, 22]), strict=True):
        saliency, used = answer.out
        assert saliency.values[:, 0, 0].tolist() == seeds
        assert used.values.tolist() == [[4]] * len(seeds)


def test_steps_that_the_model_cannot_do_are_an_error_of_their_request_alone(model: Any) -> None:
    right, wrong, other = model.execute([request(1, seed=1), request(1, seed=2, steps=7), request(2, seed=3)])
    assert (wrong.error, wrong.error.code) == ("ADAPTIVE_STEPS is out of range", TritonError.INTERNAL)
    assert right.out[0].values[:, 0, 0].tolist() == [1]
    assert other.out[0].values[:, 0, 0].tolist() == [3, 4]
