"""A folder of exported graphs: one ONNX file a graph and `manifest.json` (no torch here).

The manifest is written last, so a folder without one is not finished. Opening checks every file's SHA-256."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mubic_deploy.config import PRECISIONS, Config
from mubic_deploy.errors import UserError
from mubic_deploy.graphs import Signature, signatures

MANIFEST = "manifest.json"
FORMAT = 1  # of the manifest; a reader refuses another


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe(signature: Signature) -> dict[str, Any]:
    """A signature as JSON, for people and programs that read the manifest."""

    def tensors(items: tuple) -> list[dict[str, Any]]:
        return [{"name": t.name, "dtype": t.dtype, "shape": ["batch", *t.shape]} for t in items]

    return {"inputs": tensors(signature.inputs), "outputs": tensors(signature.outputs)}


@dataclass(frozen=True)
class Artifacts:
    """Exported graphs that were found whole."""

    path: Path
    config: Config
    manifest: dict[str, Any]

    @property
    def precision(self) -> str:
        """float32 or float16: of the graphs, and of the tensors that flow between them."""
        return self.manifest["precision"]

    def graph(self, name: str) -> Path:
        """The ONNX file of a graph."""
        return self.path / self.manifest["graphs"][name]["file"]

    @classmethod
    def open(cls, path: Path) -> Artifacts:
        """The artefacts in `path`. UserError if it is no such folder, unfinished, of another version, or if a file
        is missing or not the one that was exported."""
        path = Path(path)
        try:
            manifest = json.loads((path / MANIFEST).read_text())
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{path} holds no {MANIFEST}: make it with mubic-deploy export") from None
        except (ValueError, OSError) as error:
            raise UserError(f"{path / MANIFEST} cannot be read ({error}): export again") from None
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise UserError(f"{path / MANIFEST} is not of format {FORMAT}: export again with this version")
        try:
            config = Config.from_json(manifest["config"])
            manifest["source"]["seed"], manifest["parity"]  # read later
            if manifest["precision"] not in PRECISIONS:
                raise UserError(f"{path}: the precision {manifest['precision']!r} is not known: export again")
            for name, signature in signatures(config, manifest["precision"]).items():
                entry = manifest["graphs"][name]
                if entry["signature"] != describe(signature):
                    raise UserError(f"{path}: the signature of {name} is not this version's: export again")
                file = path / entry["file"]
                if not file.is_file():
                    raise UserError(f"{file} is missing: export again")
                if sha256(file) != entry["sha256"]:
                    raise UserError(f"{file} is not the file that was exported (SHA-256 differs): export again")
        except (KeyError, TypeError) as error:
            raise UserError(f"{path / MANIFEST} lacks {error}: export again") from None
        except (ValueError, OSError) as error:
            raise UserError(f"{path} cannot be used ({error}): export again") from None
        return cls(path, config, manifest)
