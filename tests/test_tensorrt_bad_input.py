"""What can be wrong about TensorRT engines: one line each that says what and what to do. On the doubles of a GPU."""

from __future__ import annotations

import ctypes
import importlib.abc
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import fake_gpu
import numpy as np
import pytest
from half_fixtures import TINY

from mubic_deploy.artifacts import MANIFEST, Artifacts, sha256
from mubic_deploy.engines import cuda
from mubic_deploy.engines.tensorrt import Plans, load_engines
from mubic_deploy.errors import UserError
from mubic_deploy.graphs import signatures
from mubic_deploy.parity import random_clip
from mubic_deploy.sources import load_script, source_dir

pytest_plugins = ("tensorrt_fixtures",)
tensorrt_engines = load_script(source_dir("export") / "tensorrt_engines.py")


# ---- building


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
    (tmp_path / "t").write_bytes(b"damaged")
    refused("t is damaged: remove it, or name another --timing-cache", timing_cache=tmp_path / "t")
    refused(
        "V4 is .*, not .*: export it again",
        replace(half_artifacts, config=replace(TINY, visual_channels=(32, 64, 128, 96))),
    )
    monkeypatch.setattr(trt, "__version__", "10.11.0.33")
    refused("TensorRT 10.11.0.33 is too old: install 10.12 or newer")
    monkeypatch.undo()


def test_a_file_that_is_no_graph_is_named(trt: ModuleType, tmp_path: Path, driver: fake_gpu.Driver) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"does not take .*bad.onnx \(.*\): export it again"):
        tensorrt_engines.build_plan(
            trt, tmp_path / "bad.onnx", signatures(TINY)["fusion"], tensorrt_engines.Options(), b""
        )


# ---- running


def test_a_batch_above_the_profile_is_refused(plans: Plans) -> None:
    engine = load_engines(plans)["audio_encoder"]
    with pytest.raises(UserError, match=r"a batch of 9 is above the engine's 8.*--max-batch 9"):
        engine({"AUDIO": random_clip(TINY, 0, 9)["AUDIO"]})


def test_a_gpu_that_refuses_to_capture_is_said(plans: Plans, driver: fake_gpu.Driver) -> None:
    driver.refuses_capture = True
    with pytest.raises(UserError, match=r"cannot replay this as a CUDA graph \(error 901\): use --no-cuda-graphs"):
        load_engines(plans)["audio_encoder"]({"AUDIO": random_clip(TINY, 0)["AUDIO"]})


def test_an_engine_that_cannot_be_captured_is_said(
    plans: Plans, trt: ModuleType, driver: fake_gpu.Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT itself refuses, not the driver, and it ran just before."""
    ran = trt.IExecutionContext.execute_async_v3
    monkeypatch.setattr(
        trt.IExecutionContext, "execute_async_v3", lambda *given: driver.recording is None and ran(*given)
    )
    with pytest.raises(UserError, match=r"could not run audio_encoder at a batch of 1 .*: it runs without CUDA graphs"):
        load_engines(plans)["audio_encoder"]({"AUDIO": random_clip(TINY, 0)["AUDIO"]})


def test_what_was_logged_before_is_no_reason(plans: Plans, trt: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """An earlier call's want of memory, which was over."""
    engine = load_engines(plans)["audio_encoder"]
    clip = {"AUDIO": random_clip(TINY, 0)["AUDIO"]}
    engine(clip)
    engine._runtime.logger.errors.append("out of memory")  # type: ignore[attr-defined]
    monkeypatch.setattr(trt.IExecutionContext, "execute_async_v3", lambda *_: False)
    with pytest.raises(UserError, match=r"could not run audio_encoder at a batch of 2 \(no reason given\)"):
        engine({"AUDIO": random_clip(TINY, 0, 2)["AUDIO"]})


def test_batches_of_different_size_are_refused(plans: Plans) -> None:
    engine = load_engines(plans)["denoiser"]
    inputs = {t.name: np.zeros((2 if t.name == "STEP" else 1, *t.shape), t.dtype) for t in engine.signature.inputs}
    with pytest.raises(UserError, match="denoiser must have the same batch size"):
        engine(inputs)


def test_an_output_of_another_shape_is_refused_before_it_is_written(
    plans: Plans, trt: ModuleType, driver: fake_gpu.Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parser may have left its sizes open, and its place in memory is of the signature's."""
    shape = trt.IExecutionContext.get_tensor_shape
    monkeypatch.setattr(trt.IExecutionContext, "get_tensor_shape", lambda self, name: (*shape(self, name)[:-1], 99))
    with pytest.raises(UserError, match=r"A of audio_encoder is \(2, .*, 99\) in the plan, not \(2, .*\): build it"):
        load_engines(plans)["audio_encoder"]({"AUDIO": random_clip(TINY, 0, 2)["AUDIO"]})
    assert "run" not in driver.launched


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

    with pytest.raises(
        UserError, match=r"holds no engines.json, but exported graphs: .* \(build it here with mubic-deploy engines"
    ):
        Plans.open(half_artifacts.path)
    text = (plans.path / "engines.json").read_text()
    plan = plans.file("fusion")
    content = plan.read_bytes()
    plan.write_bytes(content + b"x")
    refused(r"fusion.plan is not the file that the manifest means")
    plan.unlink()
    refused(r"fusion.plan is missing")
    plan.write_bytes(content)
    for bad, says in (
        ("{", "cannot be read"),
        ('{"format": 9}', "is not of format 2"),
        ('{"format": 2}', "lacks"),
        (text.replace('"max": 8', '"max": "x"'), "profile max cannot be 'x': build it here"),
    ):
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


def no_library(name: str) -> None:
    raise OSError(f"{name}: cannot open shared object file")


def test_who_has_plans_and_no_gpu_is_not_told_to_install_tensorrt(plans: Plans) -> None:
    says = r"there is no NVIDIA driver here \(libcuda.so.1: .*\): TensorRT wants one; elsewhere run exported graphs"
    with pytest.MonkeyPatch.context() as patch:  # ended before the doubles are taken away, which it is put on
        patch.setattr(ctypes, "CDLL", no_library)
        patch.setitem(sys.modules, "tensorrt", None)
        patch.setitem(sys.modules, "pycuda.driver", None)
        with pytest.raises(UserError, match=says):
            load_engines(plans)


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
    with pytest.raises(UserError, match=r"no NVIDIA GPU to use \(CUDA error 100\): .*with --engine onnxruntime"):
        load_engines(plans)


@pytest.mark.parametrize(
    ("where", "what"),
    [
        ("context", r"a context \(cuDevicePrimaryCtxRetain failed: out of memory\)"),
        ("plan", r".*visual_encoder.plan \(Requested amount of GPU memory .* could not be allocated.\)"),
        ("execution context", r"audio_encoder \(Error Code 2: OutOfMemory .*\)"),
        ("graph", r"a CUDA graph \(cuGraphInstantiateWithFlags failed with CUDA error 2\)"),
    ],
)
def test_a_gpu_whose_memory_is_short_is_said(plans: Plans, driver: fake_gpu.Driver, where: str, what: str) -> None:
    driver.short = {where}
    says = f"the GPU has not enough memory for {what}: send fewer clips at once, .*nvidia-smi"
    with pytest.raises(UserError, match=says) as caught:
        load_engines(plans)["audio_encoder"]({"AUDIO": random_clip(TINY, 0)["AUDIO"]})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("symbol", "says"),
    [
        ("cuCtxCreate_v4", r"driver is too old for the CUDA that pycuda was .* \(it lacks cuCtxCreate_v4\): .* 12 or"),
        ("_ZN5boost6detail12set_tss_dataE", r"pycuda cannot be used \(.*boost.*\): install it with pip install"),
    ],
)
def test_a_pycuda_that_does_not_load_is_said(monkeypatch: pytest.MonkeyPatch, symbol: str, says: str) -> None:
    """It looks for the driver's functions when it is loaded, those of the CUDA that it was built with."""

    class Finder(importlib.abc.MetaPathFinder):
        def find_spec(self, name: str, *_: object) -> None:
            if name.startswith("pycuda"):
                warnings.warn("the version of your CUDA header does not match", stacklevel=2)
                raise ImportError(f"/opt/pycuda/_driver.cpython-312-x86_64-linux-gnu.so: undefined symbol: {symbol}")

    for name in ("pycuda", "pycuda.driver"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError, match=says):
            cuda.import_driver()


def test_without_tensorrt_or_a_gpu_the_commands_say_so(
    run, half_artifacts: Artifacts, driver: fake_gpu.Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tensorrt", "pycuda", "pycuda.driver"):  # as on a machine that lacks them
        monkeypatch.setitem(sys.modules, name, None)
    cuda.gpu.cache_clear()

    def refused(says: str) -> None:
        ran = run("engines", half_artifacts.path, "--out", tmp_path / "e")
        assert ran.code == 2
        assert says in ran.err
        assert ran.err.count("\n") == 1
        assert not list(tmp_path.iterdir())

    monkeypatch.setattr(ctypes, "CDLL", driver.libcuda)
    refused("None in sys.modules): install it with pip install 'mubic-deploy[tensorrt]', which compiles it")
    driver.present = False
    refused("there is no NVIDIA GPU to use (CUDA error 100): TensorRT wants one; elsewhere run")
    driver.starts = 803
    refused("the NVIDIA driver does not start (cuInit failed with CUDA error 803): see what nvidia-smi says")
    monkeypatch.setattr(ctypes, "CDLL", no_library)
    refused("there is no NVIDIA driver here (libcuda.so.1: cannot open shared object file): TensorRT wants one")


def test_without_tensorrt_it_is_said(plans: Plans) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "tensorrt", None)
        says = r"TensorRT cannot be used \(.*\): install it with pip install 'mubic-deploy\[tensorrt\]'"
        with pytest.raises(UserError, match=says):
            load_engines(plans)


def test_a_driver_that_is_too_old_for_tensorrt_is_said(
    plans: Plans, trt: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(log):
        log.log(1, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(trt, "Runtime", nothing)
    with pytest.raises(UserError, match=r"TensorRT cannot start \(CUDA initialization failure with error: 35\)"):
        load_engines(plans)
