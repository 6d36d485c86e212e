"""The real model in its `demo` size, exported once a run, and a command line to test."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest

from mubic_deploy import cli
from mubic_deploy.artifacts import Artifacts

pytest_plugins = ("triton_fixtures",)


@pytest.fixture(scope="session")
def demo_artifacts(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    """`random:demo`, seed 0, as `mubic-deploy export` leaves it."""
    out = tmp_path_factory.mktemp("export") / "demo"
    assert cli.main(["export", "random:demo", "--out", str(out)]) == 0
    return Artifacts.open(out)


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
