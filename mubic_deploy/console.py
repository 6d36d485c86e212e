"""What the commands say: results on stdout, messages and progress on stderr."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from mubic_deploy import strict_json


class Screen(Console):
    """Rich's console; BrokenPipeError where nobody reads it any more, where Rich would end the program."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)) from None


screen = Screen()
messages = Console(stderr=True)

Progress = Callable[[str, int, int], None]  # what goes on, how much of it is done, of how much


@contextlib.contextmanager
def bar(title: str) -> Iterator[Callable[[str, int, int | None], None]]:
    """A progress bar on stderr; call what it gives with a text, the steps done and, if known, the steps in all."""
    text = TextColumn("{task.description}")
    columns = (text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    # without a terminal there is nobody to watch, and an error shall stay one line
    with Bar(*columns, console=messages, transient=True, disable=not messages.is_terminal) as progress:
        task = progress.add_task(title, total=None)
        yield lambda text, done, total: progress.update(task, description=text, completed=done, total=total)


def say(text: str) -> None:
    """One line on stdout, as it is and at once, for whoever reads along through a pipe."""
    screen.print(text, markup=False, highlight=False, soft_wrap=True)
    screen.file.flush()


def forget_stdout() -> None:
    """After a BrokenPipeError: what is left for standard output goes nowhere, or Python fails of it at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def warn(texts: list[str]) -> None:
    for text in texts:
        messages.print(f"warning: {text}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    print(strict_json.dumps(value, indent=2))
