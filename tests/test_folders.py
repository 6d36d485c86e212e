"""Folders that appear whole or not at all, whoever else writes beside them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mubic_deploy.folders import replacing, replacing_file
from mubic_deploy.media import outputs

WAITS = """
import sys, time
from pathlib import Path
from mubic_deploy.folders import replacing
with replacing(Path(sys.argv[1])) as folder:
    (folder / "half").touch()
    print("begun", flush=True)
    sys.stdin.read()
"""


def write(out: Path, text: str) -> None:
    with replacing(out) as folder:
        (folder / "file").write_text(text)


def begun(out: Path) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    return process


def test_replaces_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, "first")
    write(out, "second")
    with pytest.raises(OSError, match="Is a directory"), replacing(out) as folder:
        (folder / ".." / "out").write_text("third")
    assert (out / "file").read_text() == "second"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_two_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    """In one process, and so under one process id, as in two containers that share a volume."""
    out, both = tmp_path / "out", threading.Barrier(2)
    written = []

    def work(text: str) -> None:
        with replacing(out) as folder:
            both.wait(10)
            (folder / "file").write_text(text)
        written.append(text)

    threads = [threading.Thread(target=work, args=(text,)) for text in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (out / "file").read_text() in ("one", "two")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert sorted(written) == ["one", "two"]


def test_what_a_killed_run_left_goes(tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed, alive = begun(out), begun(out)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert len(list(tmp_path.iterdir())) == 2
    write(out, "mine")
    assert len(list(tmp_path.glob(".out.*.new"))) == 1  # of the run that goes on
    alive.communicate("")
    assert alive.returncode == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (out / "half").exists()


def test_what_was_put_aside_comes_back(tmp_path: Path) -> None:
    """A run that was killed between its two renamings."""
    out = tmp_path / "out"
    write(out, "first")
    out.rename(tmp_path / ".out.0badcafe.old")
    (tmp_path / ".out.0badcafe.new").mkdir()
    with pytest.raises(OSError, match="Is a directory"), replacing(out) as folder:
        folder.write_text("second")
    assert (out / "file").read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_a_run_left_that_was_killed_after_its_renaming_goes(tmp_path: Path) -> None:
    """The new one is in its place, the old one was not yet removed; a folder of the user's has nearly such a name."""
    out, mine = tmp_path / "out", tmp_path / ".out.backup.old"
    write(out, "first")
    (tmp_path / ".out.0badcafe.old").mkdir()
    mine.mkdir()
    write(out, "second")
    assert sorted(p.name for p in tmp_path.iterdir()) == [mine.name, "out"]
    assert (out / "file").read_text() == "second"


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("first")
    with pytest.raises(ZeroDivisionError), replacing_file(path) as part:
        part.write_text(f"{1 / part.write_text('')}")
    assert path.read_text() == "first"
    with replacing_file(path) as part:
        part.write_text("second")
        assert path.read_text() == "first"
    assert path.read_text() == "second"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_file_is_for_whoever_may_read_the_users_files(tmp_path: Path) -> None:
    """Whatever the library that wrote it thinks."""
    (tmp_path / "plain").touch()
    with replacing_file(tmp_path / "file") as part:
        part.unlink()
        os.close(os.open(part, os.O_CREAT, 0o600))
    with outputs.replacing({"weights": tmp_path / "out"}) as staged:
        staged["weights"].unlink()
        os.close(os.open(staged["weights"], os.O_CREAT, 0o600))
    modes = {p.stat().st_mode for p in tmp_path.iterdir()}
    assert len(modes) == 1
