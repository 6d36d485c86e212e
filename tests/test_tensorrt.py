"""TensorRT without a GPU: every name that the code uses is in the real bindings of TensorRT 10 and 11, and building,
loading and running are done on a double that offers what those bindings offer."""

from __future__ import annotations

import ast
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import fake_gpu
import numpy as np
import pytest
from google.protobuf import text_format
from half_fixtures import TINY
from tensorrt_api import MAJORS, Api, ask
from tritonclient.grpc.model_config_pb2 import ModelConfig

from mubic_deploy.artifacts import MANIFEST, Artifacts, sha256
from mubic_deploy.engines import cpu, cuda, tensorrt
from mubic_deploy.engines.tensorrt import Plans, load_engines
from mubic_deploy.errors import UserError
from mubic_deploy.parity import random_clip
from mubic_deploy.pipeline import Pipeline
from mubic_deploy.sources import load_script, source_dir

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


@pytest.fixture(scope="session", params=MAJORS)
def api(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Api:
    return ask(request.param, tmp_path_factory.mktemp("stubs"))


@pytest.fixture
def driver() -> fake_gpu.Driver:
    return fake_gpu.Driver()


@pytest.fixture
def trt(api: Api, driver: fake_gpu.Driver, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    with fake_gpu.installed(monkeypatch, api, driver) as module:
        yield module


@pytest.fixture(scope="session")
def built(api: Api, half_artifacts: Artifacts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "engines"
    with fake_gpu.installed(pytest.MonkeyPatch, api, fake_gpu.Driver()):
        return tensorrt_engines.build(half_artifacts, out).path


@pytest.fixture
def plans(trt: ModuleType, built: Path, tmp_path: Path) -> Plans:
    shutil.copytree(built, tmp_path / "engines")
    return Plans.open(tmp_path / "engines")


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


def test_a_plan_that_computes_something_else_is_not_kept(
    trt: ModuleType, half_artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = tensorrt.TensorRTEngine.__call__

    def wrong(self, inputs):
        return {k: np.asarray(v) * np.float16(1.5) if k == "CONTEXT2" else v for k, v in original(self, inputs).items()}

    monkeypatch.setattr(tensorrt.TensorRTEngine, "__call__", wrong)
    says = "TensorRT's engines differ from ONNX Runtime on the same graphs: CONTEXT2 of fusion"
    with pytest.raises(UserError, match=says):
        tensorrt_engines.build(half_artifacts, tmp_path / "e")
    assert not list(tmp_path.iterdir())


def test_what_the_builder_refuses_is_said(
    trt: ModuleType, half_artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(says: str, artifacts: Artifacts = half_artifacts, **options: object) -> None:
        with pytest.raises(UserError, match=says) as caught:
            tensorrt_engines.build(artifacts, tmp_path / "e", tensorrt_engines.Options(**options))
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "e").exists()

    refused("cannot build visual_encoder .*out of memory.*smaller --max-batch", max_batch=128)
    refused("best batch 9 is out of range: use 1 to --max-batch 8", best_batch=9)
    refused("level 6 is out of range", level=6)
    refused("no/t cannot be written: name another --timing-cache", timing_cache=tmp_path / "no" / "t")
    (tmp_path / "t").write_bytes(b"of another GPU")
    refused("t is of another GPU or TensorRT: name another --timing-cache", timing_cache=tmp_path / "t")
    refused(
        "V4 is .*, not .*: export it again",
        replace(half_artifacts, config=replace(TINY, visual_channels=(32, 64, 128, 96))),
    )
    monkeypatch.setattr(trt, "__version__", "10.11.0.33")
    refused("TensorRT 10.11.0.33 is too old: install 10.12 or newer")
    monkeypatch.undo()


def test_a_file_that_is_no_graph_is_named(trt: ModuleType, tmp_path: Path, driver: fake_gpu.Driver) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"nothing")
    from mubic_deploy.graphs import signatures

    with pytest.raises(UserError, match=r"does not take .*bad.onnx \(.*\): export it again"):
        tensorrt_engines.build_plan(
            trt, tmp_path / "bad.onnx", signatures(TINY)["fusion"], tensorrt_engines.Options(), b""
        )


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
        ("to device", clip["VIDEO"].nbytes),
        ("to device", clip["AUDIO"].nbytes),
        ("to device", s_t),
        *[("to device", 4)] * 3,
        *[("on device", s_t), *[("to device", 4)] * 3] * 3,
        ("to host", s_t),
    ]
    driver.copies.clear()
    pipeline.predict(clip["VIDEO"], clip["AUDIO"], 0, 0)
    assert [kind for kind, _ in driver.copies].count("to host") == 2  # ADAPTIVE_STEPS, to know how many


def test_more_uploads_than_may_wait_are_right(plans: Plans) -> None:
    """Of one tensor, each replaced before the GPU came to it."""
    engine = load_engines(plans)["audio_encoder"]
    audio = random_clip(TINY, 0, 2)["AUDIO"]
    expected = np.asarray(engine({"AUDIO": audio})["A"])
    for n in range(3 * cuda.WAITING):
        result = engine({"AUDIO": audio * (n == 3 * cuda.WAITING - 1)})
    np.testing.assert_array_equal(result["A"], expected)


def test_a_batch_above_the_profile_is_refused(plans: Plans) -> None:
    engine = load_engines(plans)["audio_encoder"]
    with pytest.raises(UserError, match=r"a batch of 9 is above the engine's 8.*--max-batch 9"):
        engine({"AUDIO": random_clip(TINY, 0, 9)["AUDIO"]})


def test_a_gpu_that_refuses_to_capture_is_said(plans: Plans, driver: fake_gpu.Driver) -> None:
    driver.refuses_capture = True
    with pytest.raises(UserError, match=r"cannot replay this as a CUDA graph \(error 901\): use --no-cuda-graphs"):
        load_engines(plans)["audio_encoder"]({"AUDIO": random_clip(TINY, 0)["AUDIO"]})


# ---- plans that are not for this machine


def test_plans_of_another_machine_are_refused_before_tensorrt_sees_them(
    plans: Plans, trt: ModuleType, driver: fake_gpu.Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object) -> None:
        pytest.fail("TensorRT got the plan")

    monkeypatch.setattr(trt.Runtime, "deserialize_cuda_engine", unreachable)
    driver.name = "NVIDIA H100"
    with pytest.raises(UserError, match=r"built on NVIDIA H200 .*this is NVIDIA H100 \(9.0\): build it here"):
        load_engines(plans)
    driver.name = "NVIDIA H200"
    cuda.gpu.cache_clear()
    monkeypatch.setattr(trt, "__version__", trt.__version__.replace(".", ".9", 1))
    with pytest.raises(UserError, match=r"built with TensorRT .*, this is .*: build it here"):
        load_engines(plans)


@pytest.mark.parametrize(
    ("theirs", "here", "fine"),
    [("10.13.0.1", "10.15.1.29", True), ("10.15.1.29", "10.13.0.1", False), ("10.15.1.29", "11.4.0.106", False)],
)
def test_version_compatible_plans_run_with_later_versions(plans: Plans, theirs: str, here: str, fine: bool) -> None:
    facts = cuda.Facts(**plans.manifest["gpu"])
    compatible = replace(plans, manifest={**plans.manifest, "tensorrt": theirs, "version_compatible": True})
    if fine:
        compatible.require(facts, here)
    else:
        with pytest.raises(UserError, match="built with TensorRT"):
            compatible.require(facts, here)


def test_damaged_folders_are_named(plans: Plans, half_artifacts: Artifacts) -> None:
    def refused(says: str) -> None:
        with pytest.raises(UserError, match=says):
            Plans.open(plans.path)

    with pytest.raises(UserError, match=r"holds no engines.json: build it here with mubic-deploy engines"):
        Plans.open(half_artifacts.path)
    text = (plans.path / "engines.json").read_text()
    plan = plans.file("fusion")
    content = plan.read_bytes()
    plan.write_bytes(content + b"x")
    refused(r"fusion.plan is not the file that the manifest means")
    plan.unlink()
    refused(r"fusion.plan is missing")
    plan.write_bytes(content)
    for bad, says in (("{", "cannot be read"), ('{"format": 9}', "is not of format 2"), ('{"format": 2}', "lacks")):
        (plans.path / "engines.json").write_text(bad)
        refused(says)
    (plans.path / "engines.json").write_text(text)
    assert Plans.open(plans.path).config == TINY
    assert (half_artifacts.path / MANIFEST).is_file()


def test_a_plan_that_tensorrt_does_not_take_is_named(plans: Plans, driver: fake_gpu.Driver) -> None:
    plan = plans.file("fusion")
    plan.write_bytes(b"JUNK" + plan.read_bytes()[4:])
    plans.manifest["plans"]["fusion"]["sha256"] = sha256(plan)
    with pytest.raises(UserError, match=r"fusion.plan cannot be loaded \(the plan file has a bad magic tag\)"):
        load_engines(plans)


# ---- machines that lack something


def test_a_gpu_that_is_missing_old_or_full_is_said(plans: Plans, driver: fake_gpu.Driver) -> None:
    driver.total = 50_000 + sum(map(len, driver.memory.values()))
    plans.manifest["gpu"]["memory"] = driver.total
    with pytest.raises(UserError, match=r"MB are wanted on NVIDIA H200, .* MB are free: .*smaller --max-batch"):
        load_engines(plans)
    cuda.gpu.cache_clear()
    driver.version = 11_080
    with pytest.raises(UserError, match=r"supports CUDA 11.8 at most: install one for CUDA 12 or newer"):
        load_engines(plans)
    driver.present = False
    with pytest.raises(UserError, match=r"no NVIDIA GPU to use \(cuInit failed.*\): use --engine onnxruntime"):
        load_engines(plans)


def test_without_tensorrt_or_a_gpu_the_commands_say_so(
    run, half_artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tensorrt", "pycuda", "pycuda.driver"):  # as on a machine that lacks them
        monkeypatch.setitem(sys.modules, name, None)
    ran = run("engines", half_artifacts.path, "--out", tmp_path / "e")
    assert ran.code == 2
    assert "TensorRT cannot be used" in ran.err
    assert "pip install 'mubic-deploy[tensorrt]'" in ran.err
    assert ran.err.count("\n") == 1
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="pycuda cannot be used"):
        cuda.GPU()


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
    ran = run(*command, "--instances", 2, "--loops", 3, "--queue-delay", 50, "--no-warm-up")
    assert ran.code == 0
    assert "version-compatible" not in ran.out

    def read(name: str) -> ModelConfig:
        return text_format.Parse((tmp_path / "r" / name / "config.pbtxt").read_text(), ModelConfig())

    fusion = read("fusion")
    assert fusion.instance_group[0].count == 2
    assert fusion.dynamic_batching.max_queue_delay_microseconds == 50
    assert fusion.optimization.cuda.graphs
    assert not fusion.model_warmup
    assert read("ddim").instance_group[0].count == 3
    assert (tmp_path / "r" / "fusion" / "1" / "model.plan").read_bytes() == plans.file("fusion").read_bytes()
    ran = run("repository", half_artifacts.path, "--out", tmp_path / "cpu", "--loops", 3)
    assert ran.code == 2
    assert "are for --engine tensorrt" in ran.err
    text = (plans.path / "engines.json").read_text()
    (plans.path / "engines.json").write_text(text.replace('"version_compatible": false', '"version_compatible": true'))
    assert "--backend-config=tensorrt,version-compatible=true" in run(*command, "--no-cuda-graphs").out
    assert not read("fusion").optimization.cuda.graphs


def test_a_batch_that_is_too_large_goes_in_parts(plans: Plans, half_artifacts: Artifacts) -> None:
    clip, seeds = random_clip(TINY, 4, 11), np.arange(11)
    reference = Pipeline(TINY, cpu.load_engines("onnxruntime", half_artifacts))
    expected, _ = reference.predict(clip["VIDEO"], clip["AUDIO"], seeds)
    got, used = Pipeline.open(plans.path, engine="tensorrt").predict(clip["VIDEO"], clip["AUDIO"], seeds)
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert used.shape == (11, 1)


def test_batches_of_different_size_are_refused(plans: Plans) -> None:
    engine = load_engines(plans)["denoiser"]
    inputs = {t.name: np.zeros((2 if t.name == "STEP" else 1, *t.shape), t.dtype) for t in engine.signature.inputs}
    with pytest.raises(UserError, match="denoiser must have the same batch size"):
        engine(inputs)


def test_a_driver_that_is_too_old_for_tensorrt_is_said(
    plans: Plans, trt: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(log):
        log.log(1, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(trt, "Runtime", nothing)
    with pytest.raises(UserError, match=r"TensorRT cannot start \(CUDA initialization failure with error: 35\)"):
        load_engines(plans)
