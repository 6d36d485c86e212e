"""TensorRT without a GPU: the bindings' interface, the doubles, and plans built on them, once a version of TensorRT."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import fake_gpu
import fake_tensorrt
import pytest
from tensorrt_api import MAJORS, Api, ask

from mubic_deploy.artifacts import Artifacts
from mubic_deploy.engines.tensorrt import Plans
from mubic_deploy.sources import load_script, source_dir


@pytest.fixture(scope="session", params=MAJORS)
def api(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Api:
    return ask(request.param, tmp_path_factory.mktemp("stubs"))


@pytest.fixture
def driver() -> fake_gpu.Driver:
    return fake_gpu.Driver()


@pytest.fixture
def trt(api: Api, driver: fake_gpu.Driver, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    with fake_tensorrt.installed(monkeypatch, api, driver) as module:
        yield module


@pytest.fixture(scope="session")
def built(api: Api, half_artifacts: Artifacts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "engines"
    with fake_tensorrt.installed(pytest.MonkeyPatch, api, fake_gpu.Driver()):
        return load_script(source_dir("export") / "tensorrt_engines.py").build(half_artifacts, out).path


@pytest.fixture
def plans(trt: ModuleType, built: Path, tmp_path: Path) -> Plans:
    shutil.copytree(built, tmp_path / "engines")
    return Plans.open(tmp_path / "engines")
