"""Errors of writing, said of the output."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av

from mubic_deploy.errors import UserError
from mubic_deploy.media.source import reason


@contextmanager
def naming(kind: str, target: Path) -> Iterator[None]:
    """Errors of writing name the output."""
    try:
        yield
    except (OSError, av.FFmpegError) as error:
        by_number = {errno.ENOSPC: "make room", errno.EDQUOT: "make room", errno.EPIPE: "whatever read it has ended"}
        other = "check the disk" if isinstance(error, OSError) else "write it as .mkv, or convert the film first"
        remedy = by_number.get(getattr(error, "errno", None) or 0, other)
        raise UserError(f"{kind} {target} cannot be written ({reason(error)}): {remedy}") from error
