"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mubic_deploy.errors import UserError

TOKEN = 4  # random bytes in a temporary name
ADDED = len(f"..{'0' * 2 * TOKEN}.new")  # bytes that a temporary name is longer than its target's
LOCK = ".lock"  # in a folder that is occupied


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """A file of `path`'s name to write to, in a new folder beside it. At the end of the block what was written is on
    the disk and takes the place of `path`, whatever happens to the machine's power; if the block is left by an
    exception it is removed and `path` stays as it was. What a run that was killed left beside `path` goes too. OSError
    if that cannot be written."""
    with beside(path) as part:
        mode = part.stat().st_mode
        yield part
        if part.stat().st_mode != mode:  # safetensors makes a file of its own, for its owner alone
            part.chmod(mode)
        _sync(part)
        part.replace(path)
        _sync(path.parent)  # the renaming


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """An empty file of `path`'s name in a new folder beside it, which is removed at the end of the block with whatever
    is still in it. What a run that was killed left beside `path` goes too. OSError if that cannot be written."""
    with _new_beside(path) as (fresh, _):
        part = fresh / path.name
        part.touch()
        yield part


def _sync(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """A new folder beside `out`. At the end of the block it takes the place of `out`, which may exist; if the block is
    left by an exception it is removed and `out` stays as it was. What a run that was killed left beside `out` goes too.
    OSError if that cannot be written."""
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    with _new_beside(out) as (fresh, old):
        try:
            yield fresh
            with locked(out.parent, wait=True):  # nobody else takes its place between the two
                if out.exists():
                    out.rename(old)
                fresh.rename(out)
        finally:
            if old.exists() and not out.exists():
                old.rename(out)


@contextmanager
def _new_beside(out: Path) -> Iterator[tuple[Path, Path]]:
    """A new folder beside `out`, and where an old `out` can wait; both are gone at the end of the block."""
    fresh, old = _beside(out, secrets.token_hex(TOKEN))
    with contextlib.ExitStack() as held:
        with locked(out.parent, wait=True):  # nobody sweeps what is made and not yet locked
            _sweep(out)
            fresh.mkdir()
            held.enter_context(locked(fresh))
        try:
            yield fresh, old
        finally:
            _remove(fresh, old)


def _remove(*folders: Path) -> None:
    """Also where Ctrl-C comes a second time."""
    interrupted = None
    for folder in folders:
        try:
            shutil.rmtree(folder, ignore_errors=True)
        except KeyboardInterrupt as error:
            interrupted = error
            shutil.rmtree(folder, ignore_errors=True)
    if interrupted is not None:
        raise interrupted


def _beside(out: Path, token: str) -> tuple[Path, Path]:
    """Where the new folder is made, and where the old one waits for it."""
    return out.with_name(f".{out.name}.{token}.new"), out.with_name(f".{out.name}.{token}.old")


def _sweep(out: Path) -> None:
    """Removes what runs that are no more left; an `out` that one of them had put aside comes back."""
    ours = re.compile(rf"\.{re.escape(out.name)}\.([0-9a-f]{{{2 * TOKEN}}})\.(new|old)")
    for token in sorted({found[1] for path in out.parent.iterdir() if (found := ours.fullmatch(path.name))}):
        fresh, old = _beside(out, token)
        there = fresh if fresh.exists() else old  # of a run that was killed after its new one had taken its place
        with contextlib.suppress(OSError), locked(there) as alone:  # or its run goes on
            if not alone:
                return
            if old.exists() and not out.exists():
                old.rename(out)
            for folder in (old, fresh):
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def occupied(folder: Path) -> Iterator[None]:
    """Keeps `folder`, which is made where there is none, to this process. BlockingIOError if another one has it, other
    OSErrors if it cannot be written. What was made for it and holds nothing at the end goes again.

    The lock is a file in it: for the folder's own waits whoever writes something beside that, and this one may be held
    for hours."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / LOCK
    lock.touch()
    with locked(lock):
        if not lock.exists():  # whoever had it took it away after it was opened here
            raise BlockingIOError(errno.EWOULDBLOCK, os.strerror(errno.EWOULDBLOCK), str(lock))
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                lock.unlink()
                for path in made:
                    path.rmdir()


_held: set[int] = set()  # what this process has open for its locks


def _leave_to_the_parent() -> None:
    """In a child that was forked: a lock ends with the process that took it, not with the last child of that one."""
    for number in _held:
        os.close(number)
    _held.clear()


os.register_at_fork(after_in_child=_leave_to_the_parent)


@contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[bool]:
    """The lock of a file or folder, for this process, until it ends at most: True, or False on a file system without
    locks. BlockingIOError if another one has it and it is not waited for."""
    number = os.open(path, os.O_RDONLY)
    _held.add(number)
    try:
        try:
            fcntl.flock(number, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            yield False
        else:
            yield True
    finally:
        if number in _held:  # not in a child
            _held.discard(number)
            with contextlib.suppress(OSError):
                fcntl.flock(number, fcntl.LOCK_UN)  # a program that is being started meanwhile has the file open too
            os.close(number)


def require_replaceable(out: Path, manifest: str, files: str, what: str) -> None:
    """UserError, which says `what` it is not, unless `out` is new, an empty folder, or one of ours: a manifest and
    nothing but the files that are named under `files` in it."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        named = json.loads((out / manifest).read_text())[files].values()
        ours = {manifest, *(entry["file"] for entry in named)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{out} exists and {what}: choose another --out") from None
    if strange := sorted(entry.name for entry in out.iterdir() if entry.name not in ours):
        raise UserError(f"{out} would be replaced, but holds {strange[0]} too: move that, or choose another --out")
