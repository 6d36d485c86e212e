"""Exported graphs of a checkpoint, made when they are first wanted and kept in the user's cache."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection
from importlib.metadata import version
from pathlib import Path

from mubic_deploy.artifacts import MANIFEST, Artifacts, sha256
from mubic_deploy.config import DEMO_CHECKPOINT, DEMO_FILE
from mubic_deploy.errors import UserError
from mubic_deploy.graphs import FLOAT32
from mubic_deploy.sources import load_script, source_dir

Progress = Callable[[str, int, int], None]  # what is done next, steps done, steps in all


def export(
    checkpoint: str,
    out: Path,
    variant: str | None = None,
    seed: int = 0,
    progress: Progress = lambda *_: None,
    precision: str = FLOAT32,
    fixed_steps: int | None = None,
    optimisations: Collection[str] = (),
) -> Artifacts:
    """Trace the graphs of a checkpoint (see `checkpoint.load`) into `out`, checked against eager PyTorch in FP32.

    precision: float32 or float16; fixed_steps: also the sampler of so many steps; optimisations: some of
    `config.OPTIMISATIONS`."""
    from mubic_deploy import checkpoint as checkpoints

    progress("loading weights", 0, 1)
    model, source = checkpoints.load(checkpoint, variant, seed)
    script = load_script(source_dir("export") / "onnx_graphs.py")
    artifacts, _ = script.export(model, source, out, progress, precision, fixed_steps, optimisations)
    return artifacts


def cached(
    checkpoint: str, variant: str | None = None, seed: int = 0, progress: Progress = lambda *_: None
) -> Artifacts:
    """The exported graphs of a checkpoint from the cache, exported first where they are not there or not whole."""
    out = cache_dir() / _key(checkpoint, variant, seed)
    if (out / MANIFEST).is_file():
        try:
            return Artifacts.open(out)
        except UserError:
            progress("the cached export is damaged, exporting again", 0, 1)
    try:
        return export(checkpoint, out, variant, seed, progress)
    except UserError:
        if not (out / MANIFEST).is_file():
            raise
        return Artifacts.open(out)  # another process was faster


def cache_dir() -> Path:
    """MUBIC_CACHE, else mubic-deploy in the user's cache folder."""
    if "MUBIC_CACHE" in os.environ:
        return Path(os.environ["MUBIC_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mubic-deploy"


def _key(checkpoint: str, variant: str | None, seed: int) -> str:
    """A name that changes with everything the graphs depend on: weights, model and export sources, tools."""
    path = DEMO_FILE if checkpoint == DEMO_CHECKPOINT else Path(checkpoint)
    if path.is_file():
        weights: list[object] = [_hash(path), variant]
    else:
        weights = [checkpoint, variant or "full", seed]
    tools = [version(name) for name in ("torch", "torchvision", "onnxscript")]
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
