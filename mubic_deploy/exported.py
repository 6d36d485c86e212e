"""Exported graphs of a checkpoint, made when they are first wanted and kept in the user's cache."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from mubic_deploy import folders
from mubic_deploy.artifacts import Artifacts, sha256
from mubic_deploy.config import CHECKPOINTS, DEMO_CHECKPOINT, DEMO_FILE, RANDOM, weights_seed
from mubic_deploy.console import Progress
from mubic_deploy.errors import UserError
from mubic_deploy.graphs import FLOAT32
from mubic_deploy.sources import load_script, source_dir

TOOLS = ("torch", "torchvision", "torchaudio", "onnx", "onnx-ir", "onnxscript")  # that make graphs, or their constants


def export(
    checkpoint: str,
    out: Path,
    variant: str | None = None,
    seed: int | None = None,
    progress: Progress = lambda *_: None,
    precision: str = FLOAT32,
    fixed_steps: int | None = None,
    optimisations: Collection[str] = (),
    remedy: str = "choose another --out",
) -> Artifacts:
    """Trace the graphs of a checkpoint (see `checkpoint.load`) into `out`, checked against eager PyTorch in FP32.

    precision: float32 or float16; fixed_steps: also the sampler of so many steps; optimisations: some of
    `config.OPTIMISATIONS`; remedy: what to do where `out` cannot be written. UserError as of `checkpoint.load`, and as
    of `export` in export/onnx_graphs.py."""
    from mubic_deploy import checkpoint as checkpoints

    progress("loading weights", 0, 1)
    model, source = checkpoints.load(checkpoint, variant, seed)
    script = load_script(source_dir("export") / "onnx_graphs.py")
    artifacts, _ = script.export(model, source, out, progress, precision, fixed_steps, optimisations, remedy)
    return artifacts


def cached(
    checkpoint: str, variant: str | None = None, seed: int | None = None, progress: Progress = lambda *_: None
) -> Artifacts:
    """The exported graphs of a checkpoint from the cache, exported first where they are not there or not whole. One
    process at a time exports; those that want the same wait for it."""
    out = cache_dir() / _key(checkpoint, variant, seed)
    with contextlib.suppress(UserError):
        return Artifacts.open(out)
    with _locked(out):
        try:
            return Artifacts.open(out)  # another process was faster
        except UserError:
            if out.exists():
                progress("the cached export is damaged, exporting again", 0, 1)
                shutil.rmtree(out, ignore_errors=True)
        return export(checkpoint, out, variant, seed, progress, remedy="make room, or set MUBIC_CACHE")


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Waits until no other process exports to `out`. UserError if the cache cannot be written."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        file = out.with_name(f".{out.name}.lock")
        file.touch()
    except OSError as error:
        raise UserError(
            f"the cache {out.parent} cannot be written ({error.strerror}): set MUBIC_CACHE to a folder that can be"
        ) from None
    with folders.locked(file, wait=True):
        yield


def cache_dir() -> Path:
    """MUBIC_CACHE, else mubic-deploy in the user's cache folder. UserError if there is none."""
    if cache := os.environ.get("MUBIC_CACHE"):
        return Path(cache)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mubic-deploy"
    except RuntimeError:
        raise UserError("there is no home folder to keep exported graphs in: set MUBIC_CACHE to a folder") from None


def _key(checkpoint: str, variant: str | None, seed: int | None) -> str:
    """A name that changes with everything the graphs depend on: weights, model and export sources, tools."""
    path = DEMO_FILE if checkpoint == DEMO_CHECKPOINT else Path(checkpoint)
    if path.is_file():
        weights_seed(checkpoint, seed)
        weights: list[object] = [_hash(path), variant]
    elif checkpoint.startswith(RANDOM):
        weights = [checkpoint, variant or "full", weights_seed(checkpoint, seed)]
    else:
        what = "is a directory" if path.is_dir() else "does not exist"
        raise UserError(f"checkpoint {checkpoint} {what}: use {CHECKPOINTS}")  # before PyTorch is asked for
    try:
        tools = [version(name) for name in TOOLS]
    except PackageNotFoundError as error:
        raise UserError(
            f"the graphs of {checkpoint} are not exported yet, which needs {error.name}: pip install "
            f"'mubic-deploy[torch]', or name a folder of exported graphs"
        ) from None
    package = Path(__file__).parent
    sources = [*sorted((package / "model").glob("*.py")), package / "config.py", package / "graphs.py"]
    sources.append(source_dir("export") / "onnx_graphs.py")
    identity = json.dumps([weights, tools, [_hash(file) for file in sources]])
    name = "".join(c if c.isalnum() else "-" for c in path.stem)
    return f"{name}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"


def _hash(file: Path) -> str:
    try:
        return sha256(file)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): check the file") from None
