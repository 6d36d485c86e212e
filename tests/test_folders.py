"""Folders that appear whole or not at all, whoever else writes beside them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mubic_deploy.errors import UserError
from mubic_deploy.folders import occupied, replacing, replacing_file
from mubic_deploy.media import outputs

PROGRAM = """
import os, sys, time
from pathlib import Path
from mubic_deploy import folders
with folders.{}(Path(sys.argv[1])) as got:
    {}
    print("begun", flush=True)
    sys.stdin.read()
"""
WAITS = PROGRAM.format("replacing", "(got / 'half').touch()")
WRITES = PROGRAM.format("replacing_file", "got.write_text('half')")
PREDICTS = """
import sys
from pathlib import Path
from mubic_deploy.media import outputs
path = Path(sys.argv[1])
with outputs.replacing({"maps": path, "sheet": path.with_suffix(".png")}) as staged:
    staged["maps"].write_text("half")
    print("begun", flush=True)
    sys.stdin.read()
"""
OCCUPIES = PROGRAM.format("occupied", "pass")
RUNS = "r, w = os.pipe(); child = os.fork() or (os.write(w, b'.'), time.sleep(60)); os.read(r, 1); print(child)"
FORKS = PROGRAM.format("occupied", RUNS)  # its child is at work, not only begun


def write(out: Path, text: str) -> None:
    with replacing(out) as folder:
        (folder / "file").write_text(text)


def begun(out: Path, program: str = WAITS) -> subprocess.Popen:
    process = started(out, program)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    return process


def started(out: Path, program: str) -> subprocess.Popen:
    command = [sys.executable, "-c", program, str(out)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def kill(process: subprocess.Popen) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def test_replaces_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, "first")
    write(out, "second")
    with pytest.raises(OSError, match="Is a directory"), replacing(out) as folder:
        (folder / ".." / "out").write_text("third")
    assert (out / "file").read_text() == "second"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_nothing_stays_where_it_is_interrupted_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second time while it is removed."""
    remove, calls = shutil.rmtree, []

    def interrupted(folder: Path, ignore_errors: bool) -> None:
        calls.append(folder)
        if len(calls) == 1:
            raise KeyboardInterrupt
        remove(folder, ignore_errors=ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "out"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    calls.clear()
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "out") as folder:
        (folder / "whole").write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


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
    kill(killed)
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


def test_two_that_write_one_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    """Whoever is ready first has its own in its place, and not what the other one has half written."""
    path = tmp_path / "file"
    with replacing_file(path) as one:
        one.write_text("one")
        with replacing_file(path) as other:
            other.write_text("other")
            one.write_text("half of o")
        assert path.read_text() == "other"
        one.write_text("one")
    assert path.read_text() == "one"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_what_a_killed_run_left_of_a_file_goes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    killed, alive = begun(path, WRITES), begun(path, WRITES)
    kill(killed)
    assert len(list(tmp_path.iterdir())) == 2
    with replacing_file(path) as part:
        part.write_text("mine")
    assert len(list(tmp_path.iterdir())) == 2  # the file, and what the run that goes on writes
    assert path.read_text() == "mine"
    alive.communicate("")
    assert alive.returncode == 0
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "half"


def test_what_a_killed_run_left_of_its_outputs_goes(tmp_path: Path) -> None:
    """And nothing of a run that goes on, of another target, or of the user's own."""
    path, others = tmp_path / "maps.npz", {".0badcafe.npz", ".other.npz.0badcafe.new", ".maps.npz.mine.new"}
    for name in others:
        (tmp_path / name).mkdir()
    killed, alive = begun(path, PREDICTS), begun(path, PREDICTS)
    kill(killed)
    assert len(list(tmp_path.glob(".maps.npz.*.new"))) == 3
    with outputs.replacing({"maps": path}) as staged:
        assert staged["maps"].suffix == ".npz"
        staged["maps"].write_text("mine")
    assert path.read_text() == "mine"
    assert len(list(tmp_path.glob(".maps.npz.*.new"))) == 2
    alive.communicate("")
    assert alive.returncode == 0
    with outputs.replacing({"sheet": tmp_path / "maps.png"}):  # the killed run's other one
        pass
    assert {p.name for p in tmp_path.iterdir()} == others | {"maps.npz", "maps.png"}
    assert path.read_text() == "half"


def test_a_name_is_as_long_as_its_temporary_one_may_be(tmp_path: Path) -> None:
    longest = os.pathconf(tmp_path, "PC_NAME_MAX") - 14
    fits, too_long = ({"maps": tmp_path / ("n" * (count - 4) + ".npz")} for count in (longest, longest + 1))
    with pytest.raises(UserError, match="the name is too long"):
        outputs.check_targets(too_long, {"maps": (".npz",)}, None)
    outputs.check_targets(fits, {"maps": (".npz",)}, None)
    with outputs.replacing(fits):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [fits["maps"].name]


def test_a_folder_is_one_processs(tmp_path: Path) -> None:
    out = tmp_path / "runs" / "one"
    first = begun(out, OCCUPIES)
    with pytest.raises(BlockingIOError), occupied(out):
        pass
    first.communicate("")
    assert not list(tmp_path.iterdir())  # it was made for nothing
    out.mkdir(parents=True)
    with occupied(out):
        (out / "file").touch()
    assert [p.name for p in out.iterdir()] == ["file"]
    kill(begun(out, OCCUPIES))
    with occupied(out):
        pass
    assert [p.name for p in out.iterdir()] == ["file"]


def test_a_lock_ends_with_the_process_that_took_it(tmp_path: Path) -> None:
    """Though a child that it forked lives on."""
    process = started(tmp_path, FORKS)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    try:
        assert process.stdout.readline() == "begun\n"
        with pytest.raises(BlockingIOError), occupied(tmp_path):
            pass
        kill(process)
        with occupied(tmp_path):
            os.kill(child, 0)
    finally:
        os.kill(child, signal.SIGKILL)


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
