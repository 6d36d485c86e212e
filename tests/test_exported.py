"""The cache of exported graphs."""

from __future__ import annotations

import errno
import threading
import time
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from mubic_deploy import exported
from mubic_deploy.artifacts import Artifacts
from mubic_deploy.errors import UserError
from mubic_deploy.pipeline import Pipeline
from mubic_deploy.sources import load_script, source_dir

pytest_plugins = ("triton_fixtures",)


@pytest.fixture
def made(toy_artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Exports, which copy toy graphs here and take a while."""
    found: list[Path] = []

    def export(checkpoint: str, out: Path, *_: object, remedy: str) -> Artifacts:
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


def test_a_file_system_without_locks(made: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    assert exported.cached("random:demo").path == made[0]


def test_a_full_disk_names_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not --out, which the commands that export to the cache do not have."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setenv("MUBIC_CACHE", str(tmp_path / "cache"))
    script = load_script(source_dir("export") / "onnx_graphs.py")
    monkeypatch.setattr(script, "trace", full)
    monkeypatch.setattr(exported, "load_script", lambda _: script)
    with pytest.raises(UserError, match=r"cannot be written \(No space left.*\): make room, or set MUBIC_CACHE$"):
        exported.cached("random:demo")
    assert [p for p in (tmp_path / "cache").iterdir() if not p.name.endswith(".lock")] == []


def test_what_the_graphs_depend_on_is_in_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"first")
    names = [exported._key(str(file), None, None)]
    file.write_bytes(b"other")  # trained on
    names.append(exported._key(str(file), None, None))
    names += [exported._key("random:demo", *rest) for rest in ((None, 0), (None, 1), ("concat", 0))]
    names.append(exported._key("random:full", None, 0))
    sources = tmp_path / "export"
    sources.mkdir()
    (sources / "onnx_graphs.py").write_text("another tracer")
    monkeypatch.setattr(exported, "source_dir", lambda _: sources)
    names.append(exported._key("random:demo", None, 0))
    monkeypatch.setattr(exported, "version", lambda _: "0.0")
    names.append(exported._key("random:demo", None, 0))
    assert len(set(names)) == len(names)
    assert exported._key("random:demo", None, 0) == exported._key("random:demo", "full", 0) == names[-1]


def test_a_checkpoint_that_is_not_there(made: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exported, "version", lambda name: pytest.fail(f"{name} was asked for"))
    with pytest.raises(UserError, match=r"checkpoint gone/ does not exist: use random:full, random:demo, demo or a"):
        exported.cached("gone/")
    assert not (tmp_path / "cache").exists()


def test_a_checkpoint_that_is_a_folder(made: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"checkpoint .* is a directory: use random:full"):
        exported.cached(str(tmp_path))


def test_without_pytorch_a_folder_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(exported, "version", version)
    with pytest.raises(
        UserError, match=r"not exported yet, which needs torch: pip install 'mubic-deploy\[torch\]', or"
    ):
        Pipeline.open("random:demo")


def test_an_empty_variable_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MUBIC_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert exported.cache_dir() == tmp_path / "mubic-deploy"
