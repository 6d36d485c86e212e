"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from mubic_deploy.errors import UserError
from mubic_deploy.folders import ADDED, beside


def check_targets(targets: Mapping[str, Path], suffixes: Mapping[str, tuple[str, ...]], source: Path | None) -> None:
    """UserError if a target cannot be written, has a suffix other than its kind's, or is the source or another one.

    targets and suffixes: by kind ("overlay", ...)."""
    seen: dict[Path, str] = {}
    for kind, path in targets.items():
        known = suffixes[kind]
        if path.suffix.lower() not in known:
            raise UserError(f"{kind} {path}: the name must end in {' or '.join(known)}")
        if not os.access(path.parent, os.X_OK) and path.parent.exists():
            raise UserError(f"{kind} {path}: the folder {path.parent} may not be entered: choose another one")
        if not path.parent.is_dir():
            raise UserError(f"{kind} {path}: the folder {path.parent} does not exist: create it first")
        if len(path.name.encode()) > os.pathconf(path.parent, "PC_NAME_MAX") - ADDED:
            raise UserError(f"{kind} {path}: the name is too long: choose a shorter one")
        if path.is_dir():
            raise UserError(f"{kind} {path} is a folder: give a file name in it")
        if not os.access(path.parent, os.W_OK):
            raise UserError(f"{kind} {path}: the folder {path.parent} may not be written: choose another one")
        if source is not None and path.exists() and path.samefile(source):
            raise UserError(f"{kind} {path} is the film itself: choose another name")
        real = path.resolve()
        if real in seen:
            raise UserError(f"{kind} and {seen[real]} are the same file {path}: choose two names")
        seen[real] = kind


@contextmanager
def replacing(targets: Mapping[str, Path]) -> Iterator[dict[str, Path]]:
    """Temporary files for the targets, by the same keys and with the same suffix, each in a folder of its own beside
    its target. At the end of the block those that are still in the dictionary are renamed to the targets; if it is left
    by an exception all are removed, and the targets stay as they were. What a run that was killed left beside a target
    goes too.

    UserError if a folder cannot be written."""
    real = {kind: path.resolve() for kind, path in targets.items()}  # a link stays a link
    staged: dict[str, Path] = {}
    with ExitStack() as held:
        for kind, path in real.items():
            try:
                staged[kind] = held.enter_context(beside(path))
            except OSError as error:
                raise UserError(f"{kind} {path} cannot be written ({error.strerror}): choose another folder") from error
        modes = {kind: temporary.stat().st_mode for kind, temporary in staged.items()}
        wanted = dict(staged)
        yield wanted
        for kind in wanted:
            if staged[kind].stat().st_mode != modes[kind]:  # of a library that put a file of its own in its place
                staged[kind].chmod(modes[kind])
            staged[kind].replace(real[kind])
