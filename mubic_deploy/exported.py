"""Exported graphs of a checkpoint, made when they are first wanted and kept in the user's cache."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from mubic_deploy.artifacts import MANIFEST, Artifacts
from mubic_deploy.errors import UserError
from mubic_deploy.sources import load_script, source_dir

Progress = Callable[[str, int, int], None]  # what is done next, steps done, steps in all


def export(
    checkpoint: str, out: Path, variant: str | None = None, seed: int = 0, progress: Progress = lambda *_: None
) -> Artifacts:
    """Trace the graphs of a checkpoint (see `checkpoint.load`) into `out`, checked against eager PyTorch."""
    try:
        from mubic_deploy import checkpoint as checkpoints
    except ModuleNotFoundError as error:
        raise UserError(f"export needs {error.name}: install mubic-deploy[torch]") from None
    progress("loading weights", 0, 1)
    model, source = checkpoints.load(checkpoint, variant, seed)
    artifacts, _ = load_script(source_dir("export") / "onnx_graphs.py").export(model, source, out, progress)
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
    return export(checkpoint, out, variant, seed, progress)


def cache_dir() -> Path:
    """MUBIC_CACHE, else mubic-deploy in the user's cache folder."""
    if "MUBIC_CACHE" in os.environ:
        return Path(os.environ["MUBIC_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mubic-deploy"


def _key(checkpoint: str, variant: str | None, seed: int) -> str:
    """A name that changes with everything the graphs depend on: weights, model and export sources, tools."""
    digest = hashlib.sha256()
    path = Path(checkpoint)
    identity = [checkpoint, variant, seed, *(version(name) for name in ("torch", "onnxscript"))]
    digest.update(json.dumps(identity).encode())
    package = Path(__file__).parent
    sources = [*sorted((package / "model").glob("*.py")), package / "config.py", package / "graphs.py"]
    for file in [*sources, source_dir("export") / "onnx_graphs.py", *([path] if path.is_file() else [])]:
        digest.update(file.read_bytes())
    name = "".join(c if c.isalnum() else "-" for c in path.stem)
    return f"{name}-{digest.hexdigest()[:16]}"
