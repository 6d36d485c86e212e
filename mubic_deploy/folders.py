"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mubic_deploy.errors import UserError


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to. At the end of the block what was written is on the disk and takes the place of
    `path`, whatever happens to the machine's power; if the block is left by an exception it is removed and `path` stays
    as it was. OSError if that cannot be written."""
    part = path.with_name(path.name + ".part")
    try:
        yield part
        _sync(part)
        part.replace(path)
        _sync(path.parent)  # the renaming
    finally:
        part.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """A new folder beside `out`. At the end of the block it takes the place of `out`, which may exist; if the block is
    left by an exception it is removed and `out` stays as it was. OSError if that cannot be written."""
    out = out.resolve()
    fresh, old = (out.with_name(f".{out.name}.{os.getpid()}.{kind}") for kind in ("new", "old"))
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        fresh.mkdir()
        yield fresh
        if out.exists():
            out.rename(old)
        fresh.rename(out)
    finally:
        if old.exists() and not out.exists():
            old.rename(out)
        for folder in (fresh, old):
            shutil.rmtree(folder, ignore_errors=True)


def require_replaceable(out: Path, manifest: str, what: str) -> None:
    """UserError, which says `what` it is not, unless `out` is new, an empty folder, or one of ours by its manifest."""
    if out.exists() and not (out / manifest).is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists and {what}: choose another --out")
