"""The cache of exported graphs."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from mubic_deploy import exported
from mubic_deploy.artifacts import Artifacts
from mubic_deploy.errors import UserError

pytest_plugins = ("triton_fixtures",)


@pytest.fixture
def made(toy_artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Exports, which copy toy graphs here and take a while."""
    found: list[Path] = []

    def export(checkpoint: str, out: Path, *_: object) -> Artifacts:
        found.append(out)
        time.sleep(0.3)
        out.mkdir()
        for file in toy_artifacts.path.iterdir():
            (out / file.name).write_bytes(file.read_bytes())
        return Artifacts.open(out)

    monkeypatch.setenv("MUBIC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(exported, "export", export)
    return found


def test_two_first_uses_export_once(made: list[Path]) -> None:
    found = []
    threads = [threading.Thread(target=lambda: found.append(exported.cached("random:demo").path)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == made * 3


@pytest.mark.parametrize("damage", ["no manifest", "a graph is cut"])
def test_a_damaged_cache_is_repaired(made: list[Path], damage: str) -> None:
    (out := exported.cached("random:demo").path)
    if damage == "no manifest":
        (out / "manifest.json").unlink()
    else:
        (out / "fusion.onnx").write_bytes(b"")
    assert exported.cached("random:demo").path == out
    assert made == [out, out]


def test_a_cache_that_cannot_be_written(made: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MUBIC_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match=r"file/cache cannot be written .*: set MUBIC_CACHE to a folder that can be"):
        exported.cached("random:demo")
    monkeypatch.delenv("MUBIC_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", classmethod(lambda cls: (_ for _ in ()).throw(RuntimeError("no home"))))
    with pytest.raises(UserError, match="there is no home folder"):
        exported.cached("random:demo")
    assert made == []
