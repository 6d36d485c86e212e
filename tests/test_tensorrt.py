"""TensorRT without a GPU: every name that the code uses is in the real bindings of TensorRT 10 and 11, and building,
loading and running are done on a double that offers what those bindings offer."""

from __future__ import annotations

import ast
import gc
import json
from pathlib import Path
from types import ModuleType

import fake_gpu
import fake_tensorrt
import numpy as np
import pytest
from google.protobuf import text_format
from half_fixtures import TINY
from tensorrt_api import MAJORS, Api
from tritonclient.grpc.model_config_pb2 import ModelConfig

from mubic_deploy.artifacts import Artifacts, sha256
from mubic_deploy.engines import cpu, cuda, tensorrt
from mubic_deploy.engines.tensorrt import Plans, load_engines
from mubic_deploy.errors import UserError
from mubic_deploy.parity import random_clip
from mubic_deploy.pipeline import Pipeline
from mubic_deploy.sources import load_script, source_dir

pytest_plugins = ("tensorrt_fixtures",)
tensorrt_engines = load_script(source_dir("export") / "tensorrt_engines.py")
SOURCES = (Path(tensorrt.__file__), source_dir("export") / "tensorrt_engines.py")
# TensorRT's objects by the names that the sources give them
OBJECTS = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "config": "IBuilderConfig",
    "profile": "IOptimizationProfile",
    "runtime": "Runtime",
    "_runtime": "Runtime",
    "_engine": "ICudaEngine",
    "context": "IExecutionContext",
}


# ---- the real bindings


def attributes(tree: ast.AST, owner: str) -> set[str]:
    """The attributes that are taken of the variable `owner`, or of self's `owner`, whose name begins with _."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            base = node.value
            if isinstance(base, ast.Attribute):
                mine = base.attr == owner and (owner.startswith("_") or owner[0].isupper())
            else:
                mine = isinstance(base, ast.Name) and base.id == owner
            if mine:
                found.add(node.attr)
    return found


def test_every_name_that_is_used_exists(api: Api) -> None:
    used = set()
    for source in SOURCES:
        tree = ast.parse(source.read_text())
        for name in attributes(tree, "trt") - {"__version__"}:
            assert name in api.classes or name in api.enums, f"TensorRT {api.version} has no {name}"
            used.add(name)
            if name in api.enums:
                for member in attributes(tree, name):
                    assert member in api.enums[name], f"TensorRT {api.version} has no {name}.{member}"
                    used.add(member)
        for nested in (name for name in api.enums if "." in name):
            for member in attributes(tree, nested.split(".")[1]):
                assert member in api.enums[nested], f"TensorRT {api.version} has no {nested}.{member}"
                used.add(member)
        for owner, kind in OBJECTS.items():
            for name in attributes(tree, owner):
                assert name in api.classes[kind], f"TensorRT {api.version}: {kind} has no {name}"
                used.add(name)
    # so that renaming a variable in the sources does not make this test empty
    assert used >= {
        "Builder",
        "STRONGLY_TYPED",
        "execute_async_v3",
        "device_memory_size_v2",
        "set_timing_cache",
        "HALF",
        "ERROR",
    }
    assert not used & {"FP16", "execute_v2", "build_engine", "max_batch_size"}


def test_the_bindings_are_of_both_majors(api: Api) -> None:
    assert api.version.split(".")[0] in {str(major) for major in MAJORS}
    assert ("FP16" in api.enums["BuilderFlag"]) == api.version.startswith("10.")  # why the precision is in the graph


# ---- building


def test_plans_are_built_strongly_typed_and_written_with_their_facts(
    trt: ModuleType, half_artifacts: Artifacts, tmp_path: Path
) -> None:
    options = tensorrt_engines.Options(max_batch=4, best_batch=2, level=5, timing_cache=tmp_path / "timings")
    said: list[str] = []
    plans = tensorrt_engines.build(half_artifacts, tmp_path / "e", options, lambda text, *_: said.append(text))
    assert {p.name for p in plans.path.iterdir()} == {
        "engines.json",
        *(f"{name}.plan" for name in ("visual_encoder", "audio_encoder", "fusion", "denoiser", "sampler")),
    }
    assert said[0] == "building visual_encoder"
    assert said[-1] == "checking against ONNX Runtime"
    settings = trt.built[0]
    assert settings["level"] == 5
    assert settings["flags"] == set()  # no TF32
    assert settings["shapes"]["VIDEO"] == tuple((n, 16, 64, 96, 3) for n in (1, 2, 4))
    assert [s["cache"] for s in trt.built] == [b"+" * n for n in range(5)]
    assert (tmp_path / "timings").read_bytes() == b"+++++"
    m = plans.manifest
    assert m["tensorrt"] == trt.__version__
    assert m["gpu"] == {"name": "NVIDIA H200", "compute_capability": "9.0", "driver": 13000, "memory": 10**9}
    assert m["profile"] == {"min": 1, "best": 2, "max": 4}
    assert m["precision"] == "float16"
    for name, entry in m["plans"].items():
        assert entry["onnx_sha256"] == sha256(half_artifacts.file(name))
        assert entry["sha256"] == sha256(plans.file(name))
    assert m["parity"]["clips"] == 3


def test_version_compatible_plans_are_built_as_such_and_their_host_code_is_allowed(
    trt: ModuleType, half_artifacts: Artifacts, tmp_path: Path
) -> None:
    options = tensorrt_engines.Options(max_batch=2, version_compatible=True)
    plans = tensorrt_engines.build(half_artifacts, tmp_path / "e", options)  # which loads them for its check
    assert {frozenset(settings["flags"]) for settings in trt.built} == {frozenset({"VERSION_COMPATIBLE"})}
    assert plans.manifest["version_compatible"]
    plans.manifest["version_compatible"] = False
    with pytest.raises(UserError, match=r"visual_encoder\.plan cannot be loaded"):
        tensorrt.load_engines(plans)


def test_a_plan_that_computes_something_else_is_not_kept(
    trt: ModuleType, half_artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = tensorrt.TensorRTEngine.__call__

    def wrong(self, inputs):
        return {k: np.asarray(v) * np.float16(1.5) if k == "CONTEXT2" else v for k, v in original(self, inputs).items()}

    monkeypatch.setattr(tensorrt.TensorRTEngine, "__call__", wrong)
    says = "TensorRT's engines differ from ONNX Runtime on the same graphs: CONTEXT2 of fusion .*; build with another"
    with pytest.raises(UserError, match=says):
        tensorrt_engines.build(half_artifacts, tmp_path / "e")
    assert not list(tmp_path.iterdir())


def test_plans_that_are_right_for_one_clip_alone_are_not_kept(
    trt: ModuleType, half_artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with https://github.com/NVIDIA/TensorRT/issues/4853."""
    original = tensorrt.TensorRTEngine.__call__

    def first_alone(self, inputs):
        outputs = {k: np.asarray(v) for k, v in original(self, inputs).items()}
        return {k: v[:1].repeat(len(v), 0) if k == "CONTEXT2" else v for k, v in outputs.items()}

    monkeypatch.setattr(tensorrt.TensorRTEngine, "__call__", first_alone)
    says = (
        "of 8 clips at once TensorRT's engines differ .*, of one they do not: CONTEXT2 of .*; build with --max-batch 1"
    )
    with pytest.raises(UserError, match=says):
        tensorrt_engines.build(half_artifacts, tmp_path / "e")
    assert not list(tmp_path.iterdir())
    assert tensorrt_engines.build(half_artifacts, tmp_path / "e", tensorrt_engines.Options(max_batch=1)).max_batch == 1


# ---- running


def test_the_chain_on_the_gpu_is_the_chain(plans: Plans, half_artifacts: Artifacts) -> None:
    """With graphs and without, batches of several sizes in turn, each more than once."""
    reference = Pipeline(TINY, cpu.load_engines("onnxruntime", half_artifacts))
    with_graphs, without = (Pipeline(TINY, load_engines(plans, cuda_graphs=on)) for on in (True, False))
    for seed, batch in enumerate((2, 1, 2, 3, 2, 1)):
        clip = random_clip(TINY, seed, batch)
        expected, _ = reference.predict(clip["VIDEO"], clip["AUDIO"], seed)
        for pipeline in (with_graphs, without):
            got, _ = pipeline.predict(clip["VIDEO"], clip["AUDIO"], seed)
            np.testing.assert_array_equal(got, expected)


def test_a_batch_size_is_replayed_from_its_second_call_on(plans: Plans, driver: fake_gpu.Driver) -> None:
    engine = load_engines(plans)["audio_encoder"]
    audio = random_clip(TINY, 0, 2)["AUDIO"]
    driver.launched.clear()
    first = np.asarray(engine({"AUDIO": audio})["A"])
    assert driver.launched == ["run"]
    second = np.asarray(engine({"AUDIO": audio[::-1]})["A"])
    assert driver.launched == ["run", "graph", "run"]
    np.testing.assert_array_equal(second, first[::-1])
    np.testing.assert_array_equal(engine({"AUDIO": audio})["A"], first)
    first[:] = 0  # what was read is the reader's
    np.testing.assert_array_equal(engine({"AUDIO": audio[::-1]})["A"], second)


def test_between_the_encoders_and_the_map_nothing_leaves_the_gpu(plans: Plans, driver: fake_gpu.Driver) -> None:
    """A whole inference: the media, the noise and the steps go in, the map comes out, once. Only S_T is moved."""
    pipeline = Pipeline(TINY, load_engines(plans), plans.max_batch)
    clip = random_clip(TINY, 0)
    pipeline.predict(clip["VIDEO"], clip["AUDIO"], 0, 4)
    driver.copies.clear()
    pipeline.predict(clip["VIDEO"], clip["AUDIO"], 0, 4)
    s_t = 4 * TINY.map_size[0] * TINY.map_size[1]
    assert driver.copies == [
        ("to device", clip["AUDIO"].nbytes),  # first: the GPU listens while the host prepares the frames
        ("to device", clip["VIDEO"].nbytes),
        ("to device", s_t),
        *[("to device", 4)] * 3,
        *[("on device", s_t), *[("to device", 4)] * 3] * 3,
        ("to host", s_t),
    ]
    driver.copies.clear()
    pipeline.predict(clip["VIDEO"], clip["AUDIO"], 0, 0)
    assert [kind for kind, _ in driver.copies].count("to host") == 2  # ADAPTIVE_STEPS, to know how many


def test_the_doubles_notice_what_a_gpu_would(api: Api, plans: Plans, driver: fake_gpu.Driver) -> None:
    """Memory that is dropped while it is used, and methods that are called with too much."""
    engine = load_engines(plans)["audio_encoder"]
    audio = random_clip(TINY, 0)["AUDIO"]
    a = engine({"AUDIO": audio})["A"]
    del engine._scratch  # type: ignore[attr-defined]
    with pytest.raises(AssertionError, match="the scratch memory was freed"):
        np.asarray(engine({"AUDIO": audio})["A"])
    del engine, a
    gc.collect()  # the exception's frames hold the engine
    assert not driver.memory
    with pytest.raises(AssertionError, match=r"IExecutionContext.get_tensor_shape takes \[\(1, 1\)\], not 2"):
        fake_tensorrt.require_arguments(api, "IExecutionContext", "get_tensor_shape", lambda self, name, batch: None)


def test_more_uploads_than_may_wait_are_right(plans: Plans) -> None:
    """Of one tensor, each replaced before the GPU came to it."""
    engine = load_engines(plans)["audio_encoder"]
    audio = random_clip(TINY, 0, 2)["AUDIO"]
    expected = np.asarray(engine({"AUDIO": audio})["A"])
    for n in range(3 * cuda.WAITING):
        result = engine({"AUDIO": audio * (n == 3 * cuda.WAITING - 1)})
    np.testing.assert_array_equal(result["A"], expected)


def test_a_batch_that_is_too_large_goes_in_parts(plans: Plans, half_artifacts: Artifacts) -> None:
    clip, seeds = random_clip(TINY, 4, 11), np.arange(11)
    reference = Pipeline(TINY, cpu.load_engines("onnxruntime", half_artifacts))
    expected, _ = reference.predict(clip["VIDEO"], clip["AUDIO"], seeds)
    got, used = Pipeline.open(plans.path, engine="tensorrt").predict(clip["VIDEO"], clip["AUDIO"], seeds)
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert used.shape == (11, 1)


# ---- the commands


def test_the_commands(
    run, trt: ModuleType, half_artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mubic_deploy.scenes.film import write_film

    report = json.loads(run("engines", half_artifacts.path, "--out", tmp_path / "e", "--max-batch", 2, "--json").out)
    assert report["gpu"]["name"] == "NVIDIA H200"
    write_film(tmp_path / "scene.mp4", 7, seconds=1)
    predict = ("predict", tmp_path / "scene.mp4", "--stride", 8, "--maps", tmp_path / "m.npz", "--json")
    ran = run(*predict, "--engine", "tensorrt", "--artifacts", tmp_path / "e")
    assert json.loads(ran.out)["maps"] == 2
    maps = np.load(tmp_path / "m.npz")["maps"]
    in_onnx = run(*predict, "--engine", "onnxruntime", "--artifacts", half_artifacts.path)  # as the double does
    assert json.loads(in_onnx.out)["maps"] == 2
    np.testing.assert_array_equal(np.load(tmp_path / "m.npz")["maps"], maps)
    ran = run(*predict, "--engine", "tensorrt")
    assert ran.code == 2
    assert "name their folder with --artifacts" in ran.err
    ran = run(*predict, "--no-cuda-graphs")
    assert ran.code == 2
    assert "is for --engine tensorrt" in ran.err


def test_the_repository_command_takes_its_options(run, plans: Plans, half_artifacts: Artifacts, tmp_path: Path) -> None:
    command = ("repository", plans.path, "--engine", "tensorrt", "--out", tmp_path / "r")
    options = "--instances 2 --loops 3 --queue-delay 50 --queue-timeout 2 --no-warm-up --max-streams 200"
    ran = run(*command, *options.split())
    assert ran.code == 0
    assert "version-compatible" not in ran.out

    def read(name: str) -> ModelConfig:
        return text_format.Parse((tmp_path / "r" / name / "config.pbtxt").read_text(), ModelConfig())

    fusion = read("fusion")
    assert fusion.instance_group[0].count == 2
    assert fusion.dynamic_batching.max_queue_delay_microseconds == 50
    assert fusion.dynamic_batching.default_queue_policy.default_timeout_microseconds == 2_000_000
    assert fusion.optimization.cuda.graphs
    assert not fusion.model_warmup
    assert read("ddim").instance_group[0].count == 3
    assert read("mubic_stream").parameters["MAX_STREAMS"].string_value == "200"
    assert (tmp_path / "r" / "fusion" / "1" / "model.plan").read_bytes() == plans.file("fusion").read_bytes()
    ran = run("repository", half_artifacts.path, "--out", tmp_path / "cpu", "--loops", 3)
    assert ran.code == 2
    assert "are for --engine tensorrt" in ran.err
    text = (plans.path / "engines.json").read_text()
    (plans.path / "engines.json").write_text(text.replace('"version_compatible": false', '"version_compatible": true'))
    assert "--backend-config=tensorrt,version-compatible=true" in run(*command, "--no-cuda-graphs").out
    assert not read("fusion").optimization.cuda.graphs
