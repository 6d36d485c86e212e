"""The folder of a training run: whose it is, what it may hold, what a resumed run must agree with."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mubic_deploy import strict_json
from mubic_deploy.config import get_config
from mubic_deploy.errors import UserError
from mubic_deploy.folders import occupied, replacing_file
from mubic_deploy.training.clips import Clips
from mubic_deploy.training.layout import Video, digest
from mubic_deploy.training.settings import Settings
from mubic_deploy.training.state import STATE, State, load_state


class Run:
    """The folder of a run."""

    def __init__(self, folder: Path, settings: Settings, videos: Sequence[Video]) -> None:
        self.folder, self.settings = folder, settings
        self.videos, self.data = [f"{v} {v.frames} {v.fps}" for v in videos], digest(videos)
        self._same = {None, self.data}  # of what a state may be
        if not get_config(settings.config, settings.variant).has_audio:  # so that sounds may come and go
            self.data = digest(videos, sounds=False)
            self._same.add(self.data)
        self.clips: str | None = None
        self.model, self.best, self.state = folder / "model.safetensors", folder / "best.safetensors", folder / STATE
        self.begun = folder / "settings.json"

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """The folder is this process's, made if need be. UserError if another one has it, or it cannot be written."""
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(occupied(self.folder))
            except BlockingIOError:
                raise UserError(
                    f"another training writes to {self.folder}: wait for it or choose another --out"
                ) from None
            except OSError as error:
                raise self._unwritable(error) from None
            yield

    def require_new(self) -> None:
        """UserError if there is a run in the folder, or a settings.json of something else."""
        if self.state.exists() or self.model.exists():
            raise UserError(f"{self.folder} holds a run already: go on with --resume, or choose another --out")
        if self.begun.exists():  # by a run that saved nothing, or by something else
            try:
                Settings.from_json(json.loads(self.begun.read_text()))
            except (UserError, TypeError, ValueError, OSError):
                raise UserError(f"{self.begun} is not of a run: choose another --out") from None

    def start(self) -> None:
        """The first file in the folder."""
        try:
            write_json(self.begun, self.settings.to_json())
        except OSError as error:
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(f"{self.folder} cannot be written ({error.strerror}): choose another --out")

    def resume(self) -> State:
        """The last saved state. UserError if there is none, or if it is of other settings or data."""
        state = load_state(self.state)
        different = self.settings.differences(state.settings)
        if different:
            raise UserError(f"{self.folder} was begun with other settings ({different}): resume with the same")
        if state.videos != self.videos:
            raise UserError(f"{self.folder} was begun with other videos: resume with the same data, or start a new run")
        if state.data not in self._same:
            raise UserError(
                f"{self.folder} was begun with other files under the videos' names: resume with the same data, or "
                f"start a new run"
            )
        return state

    def require_clips(self, training: Clips, test: Clips, state: State | None) -> None:
        """Keeps by what each save knows the clips. UserError if `state` is of others: they decide order, steps an epoch
        and learning rate, and two parts may share out the same videos in another way."""
        self.clips = f"{training.digest()} {test.digest()}"
        if state is not None and state.clips not in (None, self.clips):
            raise UserError(
                f"{self.folder} was begun with other clips (density maps came or went, or videos changed parts): "
                f"resume with the same data, or start a new run"
            )


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all. OSError if it cannot be written."""
    with replacing_file(path) as part:
        part.write_text(strict_json.dumps(value, indent=2) + "\n")
