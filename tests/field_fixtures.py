"""The tiny data set of `field_data`, to read and to break."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from field_data import write_field

from mubic_deploy.training.layout import Video, read_list


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> list[Video]:
    """For reading only."""
    return write_field(tmp_path_factory.mktemp("field"))


@pytest.fixture
def field(shared: list[Video], tmp_path: Path) -> list[Video]:
    """A copy to break."""
    root = tmp_path / "field"
    shutil.copytree(shared[0].root, root)
    return read_list(root, "Scenes", "train", 1)
