"""The real model in its `demo` size, exported once a run, and the command line to test it with."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from mubic_deploy import cli, exported
from mubic_deploy.artifacts import Artifacts
from mubic_deploy.config import DEMO_CHECKPOINT

pytest_plugins = ("triton_fixtures", "field_fixtures", "half_fixtures", "fake_torch_cuda")


@pytest.fixture(scope="session")
def of_the_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the processes of this run share, where it has several."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session", autouse=True)
def cache(of_the_run: Path) -> Iterator[None]:
    """Exports go to a folder of this run, not to the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MUBIC_CACHE", str(of_the_run / "cache"))
        yield


@pytest.fixture(scope="session")
def demo_artifacts() -> Artifacts:
    """What the command line uses where no checkpoint is named: the trained one that ships."""
    return exported.cached(DEMO_CHECKPOINT)


class Ran(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """`mubic-deploy` with these arguments, in this process."""

    def run(*arguments: object) -> Ran:
        capfd.readouterr()
        code = cli.main([str(a) for a in arguments])
        return Ran(code, *capfd.readouterr())

    return run
