"""A folder of exported graphs: one ONNX file a graph and `manifest.json` (no torch here).

The manifest is written last, so a folder without one is not finished. Opening checks every file's SHA-256."""

from __future__ import annotations

import functools
import hashlib
import json
import operator
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Self

from mubic_deploy.config import PRECISIONS, REWRITES, Config
from mubic_deploy.errors import UserError
from mubic_deploy.graphs import Signature, signatures

# manifests, each of a kind of folder
MANIFEST, PACKAGES_MANIFEST, PLANS_MANIFEST = "manifest.json", "packages.json", "engines.json"
KINDS = {MANIFEST: "exported graphs", PACKAGES_MANIFEST: "AOTInductor's packages", PLANS_MANIFEST: "TensorRT engines"}
FORMAT = 3  # of the manifest; a reader refuses another
Needs = dict[tuple[str, ...], type | UnionType]  # entries of a manifest, each a path of keys, and their types
SEED: Needs = {("source", "seed"): int | None}  # of random weights
NEEDS: Needs = {**SEED, ("parity",): dict}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe(signature: Signature) -> dict[str, Any]:
    """A signature as JSON, for people and programs that read the manifest."""

    def tensors(items: tuple) -> list[dict[str, Any]]:
        return [{"name": t.name, "dtype": t.dtype, "shape": ["batch", *t.shape]} for t in items]

    return {"inputs": tensors(signature.inputs), "outputs": tensors(signature.outputs)}


@dataclass(frozen=True)
class Layout:
    """A folder of one file a graph under a manifest.

    manifest  the manifest's name
    format    of the manifest; a reader refuses another
    files     its entry for the files, by graph: file, sha256, signature
    needs     other entries that are read later
    again     what to do where something is wrong"""

    manifest: str
    format: int
    files: str
    needs: Needs
    again: str

    def read(self, path: Path) -> tuple[Config, dict[str, Any]]:
        """The configuration and the manifest. UserError if the folder is none of these, unfinished, of another version,
        or if a file is missing or not the one that the manifest means."""
        file = path / self.manifest
        try:
            manifest = json.loads(file.read_text())
        except (FileNotFoundError, NotADirectoryError):
            missing = "is a file, not a folder" if path.is_file() else f"holds no {self.manifest}"
            if other := next((what for name, what in KINDS.items() if (path / name).is_file()), None):
                raise UserError(
                    f"{path} {missing}, but {other}: name the engine that runs these, or another folder ({self.again})"
                ) from None
            what = missing if path.exists() else "does not exist"
            raise UserError(f"{path} {what}: {self.again}") from None
        except (ValueError, OSError) as error:
            raise UserError(f"{file} cannot be read ({error}): {self.again}") from None
        if not isinstance(manifest, dict) or manifest.get("format") != self.format:
            raise UserError(f"{file} is not of format {self.format}: {self.again}")
        try:
            config = Config.from_json(manifest["config"])
            for keys, kind in self.needs.items():
                value = functools.reduce(operator.getitem, keys, manifest)
                if not isinstance(value, kind):
                    raise UserError(f"{file}: {' '.join(keys)} cannot be {value!r}: {self.again}")
            if manifest["precision"] not in PRECISIONS:
                raise UserError(f"{path}: the precision {manifest['precision']!r} is not known: {self.again}")
            steps = manifest["fixed_steps"]
            if steps is not None:
                config.check_fixed_steps(steps)
            if unknown := set(manifest["optimisations"]) - set(REWRITES):
                raise UserError(f"{path}: the optimisation {min(unknown)!r} is not known: {self.again}")
            for name, signature in signatures(config, manifest["precision"], sampler=steps is not None).items():
                self._check(path, name, manifest[self.files][name], signature)
        except (KeyError, TypeError) as error:
            raise UserError(f"{file} lacks {error}: {self.again}") from None
        except (ValueError, OSError) as error:
            raise UserError(f"{path} cannot be used ({error}): {self.again}") from None
        return config, manifest

    def _check(self, path: Path, name: str, entry: dict[str, Any], signature: Signature) -> None:
        if entry["signature"] != describe(signature):
            raise UserError(f"{path}: the signature of {name} is not this version's: {self.again}")
        file = path / entry["file"]
        if not file.is_file():
            raise UserError(f"{file} is missing: {self.again}")
        if sha256(file) != entry["sha256"]:
            raise UserError(f"{file} is not the file that the manifest means (SHA-256 differs): {self.again}")


@dataclass(frozen=True)
class Folder:
    """Files that were found whole, one for each graph."""

    path: Path
    config: Config
    manifest: dict[str, Any]

    LAYOUT: ClassVar[Layout]

    @classmethod
    def open(cls, path: Path, variant: str | None = None) -> Self:
        """What is in `path`. UserError as for `Layout.read`, or if `variant` is another one."""
        config, manifest = cls.LAYOUT.read(Path(path))
        if variant not in (None, config.variant):
            raise UserError(
                f"{path} holds the variant {config.variant!r}, not {variant!r}: ask for none, or export that one"
            )
        return cls(Path(path), config, manifest)

    def file(self, graph: str) -> Path:
        """The file of a graph."""
        return self.path / self.manifest[self.LAYOUT.files][graph]["file"]

    @property
    def precision(self) -> str:
        """float32 or float16: of the graphs, and of the tensors that flow between them."""
        return self.manifest["precision"]

    @property
    def fixed_steps(self) -> int | None:
        """Of the sampler, if there is one."""
        return self.manifest["fixed_steps"]

    @property
    def optimisations(self) -> tuple[str, ...]:
        """The rewrites of `mubic_deploy.model.optimise` that the graphs were made with."""
        return tuple(self.manifest["optimisations"])

    @property
    def source(self) -> dict[str, Any]:
        """Of the weights, as `checkpoint.Source.to_json` says it."""
        return self.manifest["source"]

    @property
    def signatures(self) -> dict[str, Signature]:
        """Of the graphs that are here."""
        return signatures(self.config, self.precision, sampler=self.fixed_steps is not None)


class Artifacts(Folder):
    """Exported graphs."""

    LAYOUT = Layout(MANIFEST, FORMAT, "graphs", NEEDS, "make it with mubic-deploy export")
