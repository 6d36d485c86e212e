"""ONNX Runtime with I/O binding: the engines that a GPU gets, on the CPU's memory, which binds the same."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest

from mubic_deploy.artifacts import Artifacts
from mubic_deploy.engines import DeviceArray, onnxruntime
from mubic_deploy.engines.onnxruntime import BoundEngine, Places
from mubic_deploy.errors import UserError
from mubic_deploy.parity import random_clip
from mubic_deploy.pipeline import Pipeline

pytest_plugins = ("triton_fixtures",)


@pytest.fixture
def bound(toy_artifacts: Artifacts) -> Pipeline:
    places = Places("cpu")
    engines = {
        name: BoundEngine(ort.InferenceSession(toy_artifacts.file(name)), signature, places, graph_replay=False)
        for name, signature in toy_artifacts.signatures.items()
    }
    return Pipeline(toy_artifacts.config, engines, fixed_steps=toy_artifacts.fixed_steps)


@pytest.mark.parametrize("steps", [1, 3, 4, 0])
def test_the_chain_is_the_chain(bound: Pipeline, toy_pipeline: Pipeline, steps: int) -> None:
    for seed, batch in enumerate((2, 1, 2)):
        clip = random_clip(bound.config, seed, batch)
        expected, n = toy_pipeline.predict(clip["VIDEO"], clip["AUDIO"], seed, steps)
        got, m = bound.predict(clip["VIDEO"], clip["AUDIO"], seed, steps)
        np.testing.assert_allclose(got, expected, atol=1e-5)  # steps 3: the sampler against the loop
        assert n.tolist() == m.tolist()


def test_what_one_engine_writes_the_next_one_reads_where_it_is(bound: Pipeline) -> None:
    clip = random_clip(bound.config, 0)
    features = {**bound.engines["visual_encoder"](clip), **bound.engines["audio_encoder"](clip)}
    v1 = features["V1"]
    assert isinstance(v1, DeviceArray)
    before = np.asarray(v1)
    bound.engines["fusion"](features)
    other = random_clip(bound.config, 1)
    again = bound.engines["visual_encoder"](other)["V1"]
    assert isinstance(again, DeviceArray)
    assert again.value is v1.value  # one place a name and batch size
    assert np.abs(np.asarray(again) - before).max() > 0.01


def test_batches_of_different_size_are_refused(bound: Pipeline) -> None:
    clip = random_clip(bound.config, 0)
    features = {
        **bound.engines["visual_encoder"](clip),
        **bound.engines["audio_encoder"](random_clip(bound.config, 0, 2)),
    }
    with pytest.raises(UserError, match="fusion must have the same batch size"):
        bound.engines["fusion"](features)


def test_what_runs_on_the_cpu_is_found(toy_artifacts: Artifacts) -> None:
    """All of it, here; on a GPU only what is no arithmetic of shapes is one node too many."""
    options = ort.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = ort.InferenceSession(str(toy_artifacts.file("denoiser")), options, providers=["CPUExecutionProvider"])
    found = onnxruntime.on_cpu(session)
    assert {"MatMul", "Sin"} <= set(found)
    assert not {"Reshape", "Cast", "Slice", "Shape"} & set(found)


def test_without_cuda_it_is_said(toy_artifacts: Artifacts) -> None:
    if onnxruntime.CUDA_PROVIDER in ort.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    with pytest.raises(UserError, match="has no CUDA: pip uninstall -y onnxruntime onnxruntime-gpu, then"):
        Pipeline.open(toy_artifacts.path, "onnxruntime-cuda")
