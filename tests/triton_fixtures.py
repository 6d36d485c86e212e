"""Triton servers over toy graphs, each started once a test run, in a module with

    pytest_plugins = ("triton_fixtures",)

For other artefacts see `triton_serving.serving`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import toy_graphs
from triton_serving import serving

from mubic_deploy.artifacts import Artifacts
from mubic_deploy.config import get_config
from mubic_deploy.engines import cpu
from mubic_deploy.pipeline import Pipeline
from mubic_deploy.triton.server import TritonServer


@pytest.fixture(scope="session")
def toy_artifacts(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    return toy_graphs.write(get_config("demo"), tmp_path_factory.mktemp("toy"), fixed_steps=3)


@pytest.fixture(scope="session")
def toy_pipeline(toy_artifacts: Artifacts) -> Pipeline:
    """The same graphs in process: what the server's answers are held against."""
    return Pipeline(toy_artifacts.config, cpu.load_engines(cpu.ENGINES[0], toy_artifacts))


@pytest.fixture(scope="session")
def toy_server(toy_artifacts: Artifacts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    with serving(toy_artifacts, tmp_path_factory.mktemp("triton")) as server:
        yield server
