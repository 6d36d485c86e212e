"""The ensemble on a real server against the same graphs in process."""

from __future__ import annotations

import re
import socket
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import films
import numpy as np
import pytest
import toy_graphs
import tritonclient.grpc as triton
from triton_serving import FREE_PORTS, SLOW, clips, good, send, send_right_and_wrong, serving, wait_until
from tritonclient.http import InferenceServerClient, InferInput
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from mubic_deploy import graphs
from mubic_deploy.artifacts import Artifacts
from mubic_deploy.config import ADAPTIVE, get_config
from mubic_deploy.engines import cpu
from mubic_deploy.errors import UserError
from mubic_deploy.pipeline import Pipeline
from mubic_deploy.triton import client as client_module
from mubic_deploy.triton import health
from mubic_deploy.triton.client import TritonPredictor, channel
from mubic_deploy.triton.repository import write_repository
from mubic_deploy.triton.server import TritonServer

pytest_plugins = ("triton_fixtures",)

TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=[False, True], ids=["denoiser in ddim", "denoiser called"])
def server(
    request: pytest.FixtureRequest, toy_artifacts: Artifacts, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TritonServer]:
    if not request.param:
        yield request.getfixturevalue("toy_server")
        return
    with serving(toy_artifacts, tmp_path_factory.mktemp("called"), call_denoiser=True) as server:
        yield server


@pytest.fixture
def predictor(server: TritonServer) -> Iterator[TritonPredictor]:
    with TritonPredictor(f"triton://{server.url}") as predictor:
        yield predictor


def test_config_comes_from_the_server(predictor: TritonPredictor, toy_artifacts: Artifacts) -> None:
    assert predictor.config == toy_artifacts.config


@pytest.mark.parametrize("steps", [1, 4, 12, ADAPTIVE, None])
def test_same_maps_as_in_process(predictor: TritonPredictor, toy_pipeline: Pipeline, steps: int | None) -> None:
    video, audio = clips(toy_pipeline.config, 1)
    for seed in (0, 7, 2**62):
        saliency, used = predictor.predict(video, audio, seed, steps)
        expected, expected_used = toy_pipeline.predict(video, audio, seed, steps)
        np.testing.assert_allclose(saliency, expected, rtol=0, atol=TOLERANCE)
        np.testing.assert_array_equal(used, expected_used)
    assert saliency.shape == (1, *toy_pipeline.config.map_size)
    assert saliency.std() > 0.01  # there is something to compare


def test_the_toy_graphs_tell_clips_apart(toy_pipeline: Pipeline) -> None:
    """Or a server that mixes clips up would pass the tests that compare maps to 1e-5."""
    (video, other), audio = clips(toy_pipeline.config, 2)
    first = toy_pipeline.predict(video[None], audio[:1], 1, 2)[0]
    for inputs in ((other[None], audio[:1], 1), (video[None], audio[1:], 1), (video[None], audio[:1], 2)):
        assert np.abs(toy_pipeline.predict(*inputs, 2)[0] - first).max() > 0.01


def test_batch_of_different_steps_and_seeds(predictor: TritonPredictor, toy_pipeline: Pipeline) -> None:
    count = predictor.max_batch + 3  # more than the server takes at once
    video, audio = clips(toy_pipeline.config, count)
    seeds, steps = np.arange(count) * 5, np.arange(count) % 13
    saliency, used = predictor.predict(video, audio, seeds, steps)
    expected, expected_used = toy_pipeline.predict(video, audio, seeds, steps)
    np.testing.assert_allclose(saliency, expected, rtol=0, atol=TOLERANCE)
    np.testing.assert_array_equal(used, expected_used)


def test_adaptive_steps_are_each_samples_own(predictor: TritonPredictor, toy_pipeline: Pipeline) -> None:
    video, audio = clips(toy_pipeline.config, 6)
    saliency, used = predictor.predict(video, audio, 1, ADAPTIVE)
    assert len(np.unique(used)) > 1
    for i in range(6):
        expected, expected_used = toy_pipeline.predict(video[[i]], audio[[i]], 1, ADAPTIVE)
        assert used[i] == expected_used[0]
        np.testing.assert_allclose(saliency[i], expected[0], rtol=0, atol=TOLERANCE)


def test_the_fixed_ensemble_is_the_loop_of_its_steps(server: TritonServer, toy_pipeline: Pipeline) -> None:
    video, audio = clips(toy_pipeline.config, 11)
    seeds = np.arange(11) * 3
    expected, _ = toy_pipeline.predict(video, audio, seeds, 3)
    with TritonPredictor(f"triton://{server.url}/mubic_fixed") as fixed:
        assert fixed.default_steps == 3
        for steps in (None, 3):
            saliency, used = fixed.predict(video, audio, seeds, steps)
            np.testing.assert_allclose(saliency, expected, rtol=0, atol=TOLERANCE)
            assert (used == 3).all()
        with pytest.raises(UserError, match=r"mubic_fixed on .* takes 3 steps, no others: leave the steps out, or ask"):
            fixed.predict(video, audio, 0, 4)
        with pytest.raises(UserError, match="seed -1 is negative"):
            fixed.predict(video[:1], audio[:1], -1)
        np.testing.assert_allclose(fixed.predict(video[:1], audio[:1])[0], expected[:1], rtol=0, atol=TOLERANCE)
    with pytest.raises(UserError, match="names no model of this package: use mubic or mubic_fixed"):
        TritonPredictor(f"triton://{server.url}/mubik")


def test_concurrent_clients(server: TritonServer, toy_pipeline: Pipeline) -> None:
    video, audio = clips(toy_pipeline.config, 8)
    steps = [1, 4, 12, ADAPTIVE, 2, 4, 12, 3]

    def client(i: int) -> list[np.ndarray]:
        with TritonPredictor(server.url) as predictor:
            return [predictor.predict(video[[i]], audio[[i]], seed, steps[i])[0] for seed in range(6)]

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(client, range(8)))
    for i, maps in enumerate(answers):
        for seed, saliency in enumerate(maps):
            expected, _ = toy_pipeline.predict(video[[i]], audio[[i]], seed, steps[i])
            np.testing.assert_allclose(saliency, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.1.1", "[::1]", "localhost"])
def test_this_machine_is_asked_without_a_proxy(host: str) -> None:
    assert ("grpc.enable_http_proxy", 0) in channel(f"{host}:8001")


@pytest.mark.parametrize("host", ["10.0.0.1", "triton.example", "[fe80::1]"])
def test_others_are_asked_as_the_environment_says(host: str) -> None:
    assert "grpc.enable_http_proxy" not in dict(channel(f"{host}:8001"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"VIDEO": np.zeros((1, 16, 10, 192, 3), np.uint8)}, "VIDEO"),
        ({"VIDEO": np.zeros((1, 16, 112, 192, 3), np.float32)}, "VIDEO"),
        ({"AUDIO": np.zeros((1, 100), np.float32)}, "AUDIO"),
        ({"AUDIO": None}, "AUDIO"),
        ({"AUDIO": np.full((1, 16608), np.nan, np.float32)}, "AUDIO holds NaN or infinite samples"),
        ({"AUDIO": np.full((1, 16608), 1e30, np.float32)}, r"AUDIO reaches 1e\+30, as integers do"),
        ({"STEPS": np.array([[99]], np.int32)}, "steps 99 is out of range: use 1 to 12"),
        ({"STEPS": np.array([[-1]], np.int32)}, "steps -1 is out of range"),
        ({"SEED": np.array([[-5]])}, "seed -5 is negative"),
        ({"SEED": np.array([[1], [2]])}, "batch"),
    ],
)
def test_wrong_request_gets_an_error_and_the_next_its_map(
    server: TritonServer, toy_pipeline: Pipeline, change: dict[str, np.ndarray | None], message: str
) -> None:
    right = good(toy_pipeline.config)
    with pytest.raises(InferenceServerException, match=message) as error:
        send(server.url, {name: array for name, array in (right | change).items() if array is not None})
    assert error.value.status() == "StatusCode.INVALID_ARGUMENT"
    expected, _ = toy_pipeline.predict(right["VIDEO"], right["AUDIO"], 3, 4)
    np.testing.assert_allclose(send(server.url, right), expected, rtol=0, atol=TOLERANCE)


def test_a_wrong_request_over_http(server: TritonServer, toy_pipeline: Pipeline) -> None:
    inputs = []
    for name, array in (good(toy_pipeline.config) | {"SEED": np.array([[-5]])}).items():
        inputs.append(InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype)))
        inputs[-1].set_data_from_numpy(array)
    client = InferenceServerClient(f"127.0.0.1:{server.http_port}")
    with client, pytest.raises(InferenceServerException, match="seed -5 is negative") as error:
        client.infer(graphs.ENSEMBLE, inputs)
    assert error.value.status() == "400"


def test_a_wrong_request_leaves_nothing_in_flight(
    toy_artifacts: Artifacts, toy_pipeline: Pipeline, tmp_path: Path
) -> None:
    right = good(toy_pipeline.config)
    wrong_seed = {name: array for name, array in right.items() if name != "STEPS"} | {"SEED": np.array([[-5]])}
    wrong_sound = right | {"AUDIO": np.full((1, 16608), np.nan, np.float32)}
    mistakes = (
        (wrong_seed, graphs.FIXED_ENSEMBLE, "seed -5 is negative"),
        (wrong_sound, graphs.ENSEMBLE, "AUDIO holds"),
    )
    with serving(toy_artifacts, tmp_path) as server:
        for arrays, model, message in 3 * mistakes:
            with pytest.raises(InferenceServerException, match=message) as error:
                send(server.url, arrays, model)
            assert error.value.status() == "StatusCode.INVALID_ARGUMENT"
        time.sleep(1)  # for what Triton does after its answer
    assert not re.search(r"has \d+ in-flight inferences", (tmp_path / "triton.log").read_text())


def test_wrong_request_among_right_ones(server: TritonServer, toy_pipeline: Pipeline) -> None:
    """They reach ddim together: only the wrong ones fail."""
    right = good(toy_pipeline.config)
    expected, _ = toy_pipeline.predict(right["VIDEO"], right["AUDIO"], 3, 4)
    send_right_and_wrong(server.url, right, expected, 16, TOLERANCE)


@pytest.mark.parametrize("variant", ["visual_only", "no_diffusion"])
def test_variants(variant: str, tmp_path: Path) -> None:
    artifacts = toy_graphs.write(get_config("demo", variant), tmp_path / "toy")
    pipeline = Pipeline(artifacts.config, cpu.load_engines(cpu.ENGINES[0], artifacts))
    video, audio = clips(artifacts.config, 2)
    with serving(artifacts, tmp_path) as server, TritonPredictor(server.url) as predictor:
        saliency, used = predictor.predict(video, audio, 5)
        adaptive, _ = predictor.predict(video, audio, 5, ADAPTIVE)
        health.check(server.http_port, Counter(health.model_processes(server.shm_prefix).values()))
    expected, expected_used = pipeline.predict(video, audio, 5)
    np.testing.assert_allclose(saliency, expected, rtol=0, atol=TOLERANCE)
    np.testing.assert_array_equal(used, expected_used)
    np.testing.assert_allclose(adaptive, pipeline.predict(video, audio, 5, ADAPTIVE)[0], rtol=0, atol=TOLERANCE)


def test_predictor_says_what_is_wrong(server: TritonServer, predictor: TritonPredictor) -> None:
    video, audio = clips(predictor.config, 1)
    with pytest.raises(UserError, match="VIDEO must be uint8"):
        predictor.predict(video.astype(np.float32), audio)
    with pytest.raises(UserError, match="steps 13 is out of range"):
        predictor.predict(video, audio, steps=13)
    with pytest.raises(UserError, match=f"{server.url} answered with an error: .*seed -1 is negative"):
        predictor.predict(video, audio, seed=-1)
    too_many = clips(predictor.config, predictor.max_batch + 1)
    with pytest.raises(UserError, match=f"more than {server.url} takes: use predict, or send {predictor.max_batch}"):
        predictor.predict_async(*too_many)
    for timeout in (0.0, -1.0, float("inf"), float("nan"), None):
        with pytest.raises(UserError, match=r"timeout .* is out of range: use seconds above 0"):
            TritonPredictor(server.url, timeout=timeout)  # type: ignore[arg-type]
    with TritonPredictor(server.url) as hasty:
        hasty.timeout = 0.001
        with pytest.raises(UserError, match=r"within 0\.001 s: allow more \(timeout, --timeout\)"):
            hasty.predict(video, audio)


@pytest.mark.parametrize("model", ["visual_encoder", "ddim"])
def test_a_request_that_waits_too_long_is_refused(toy_artifacts: Artifacts, tmp_path: Path, model: str) -> None:
    repository, log = tmp_path / "repository", tmp_path / "log"
    write_repository(toy_artifacts, repository, queue_timeout_s=0.4)
    with (repository / model / "1" / "model.py").open("a") as source:
        source.write(SLOW)
    with TritonServer(repository, log=log, **FREE_PORTS) as server, TritonPredictor(server.url) as predictor:
        video, audio = clips(predictor.config, 1)
        running = predictor.predict_async(video, audio)
        time.sleep(0.3)  # it is taken before the other comes
        waiting = predictor.predict_async(video, audio)
        overloaded = f"server at {server.url} is overloaded: the request waited there for longer than its --queue-tim"
        with pytest.raises(UserError, match=overloaded):
            waiting.result()
        first, _ = running.result()
        np.testing.assert_array_equal(predictor.predict(video, audio)[0], first)
    assert not re.search(r"has \d+ in-flight inferences", log.read_text())  # nothing of it stays


def test_a_loop_that_refuses_merges_nothing(toy_artifacts: Artifacts, tmp_path: Path) -> None:
    """Whoever came first would get a map only when all have theirs."""
    with serving(toy_artifacts, tmp_path, queue_timeout_s=100) as server, TritonPredictor(server.url) as predictor:
        for count in (1, 3):
            video, audio = clips(predictor.config, count)
            for answer in [predictor.predict_async(video, audio, seed, 12) for seed in range(8)]:
                answer.result()
        with triton.InferenceServerClient(server.url) as client:
            wait_until(lambda: client.get_inference_statistics("ddim").model_stats[0].inference_count == 8 * 1 + 8 * 3)
            assert client.get_inference_statistics("ddim").model_stats[0].execution_count == 16


def test_predict_waits_as_long_as_it_is_told(run, server: TritonServer, tmp_path: Path) -> None:
    predict = ("predict", films.bunny(), "--maps", tmp_path / "m.npz", "--stride", 128)
    remote = ("--engine", f"triton://{server.url}", "--timeout")
    ran = run(*predict, *remote, "0.0001")
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    # when it connects, or when it asks
    assert re.search(
        r"did not answer (as a Triton server )?within 0.0001 s: .*allow more \(timeout, --timeout\)", ran.err
    )
    assert not list(tmp_path.iterdir())
    assert run(*predict, *remote, "120").code == 0
    assert "--timeout is for --engine triton" in run(*predict, "--timeout", "5").err
    assert "use seconds above 0" in run(*predict, *remote, "0").err


def test_what_answers_at_another_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or swallows what is sent: longer requests, which --timeout is for, would not help."""
    monkeypatch.setattr(client_module, "_CONNECT_TIMEOUT", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"127.0.0.1:{mute.getsockname()[1]}"
        with pytest.raises(UserError, match=rf"{address} did not answer as a Triton server within 0\.5 s: check"):
            TritonPredictor(address)


def test_no_server() -> None:
    with pytest.raises(UserError, match=r"no Triton server answers at 127\.0\.0\.1:9: start one"):
        TritonPredictor("triton://127.0.0.1:9")
    with pytest.raises(UserError, match="'localhost' is no address of a Triton server"):
        TritonPredictor("localhost")
