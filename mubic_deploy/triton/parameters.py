"""What `repository` writes into the `parameters` of a config.pbtxt, and the models and clients read there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mubic_deploy.artifacts import sha256
from mubic_deploy.config import Config
from mubic_deploy.errors import UserError

CONFIG = "CONFIG"  # the Config as JSON: every model has it, the whole chain too, so that a client knows what is served
SOURCE = "SOURCE"  # of the weights, as the manifest says it; the models of the whole chain have it
FIXED_STEPS = "FIXED_STEPS"  # of the sampler; the ensemble that uses it has it
MAX_STREAMS = "MAX_STREAMS"  # that the model of live streams holds; it has it
_ENGINE, _ONNX, _SHA256, _PRECISION, _THREADS = "ENGINE", "ONNX", "SHA256", "PRECISION", "THREADS"
_PACKAGES, _SIZES = "PACKAGES", "SIZES"


@dataclass(frozen=True)
class GraphSettings:
    """A graph to run on a CPU. engine: one of `cpu.ENGINES`; threads: 0 means one a core."""

    engine: str
    file: Path
    sha256: str
    precision: str
    threads: int

    def to_strings(self) -> dict[str, str]:
        return {
            _ENGINE: self.engine,
            _ONNX: str(self.file),
            _SHA256: self.sha256,
            _PRECISION: self.precision,
            _THREADS: str(self.threads),
        }

    @classmethod
    def from_strings(cls, values: Mapping[str, str]) -> GraphSettings | None:
        """Inverse of `to_strings`; None if the values name no graph."""
        if _ONNX not in values:
            return None
        given = (values[_ENGINE], Path(values[_ONNX]), values[_SHA256], values[_PRECISION], int(values[_THREADS]))
        return cls(*given)

    def check_file(self) -> Path:
        """The graph's file. UserError if it is missing or not the one for which the repository was written."""
        return _checked(self.file, self.sha256, "export")


@dataclass(frozen=True)
class PackageSettings:
    """Packages to run as one chain.

    manifest  in their folder; sha256: its own, it knows theirs
    threads   on a CPU; 0 means one a core
    sizes     the batches that go to a GPU at once, the largest first: each has CUDA graphs before the server is ready,
              and others go in parts of these. Empty on a CPU, which takes batches as they come"""

    manifest: Path
    sha256: str
    threads: int
    sizes: tuple[int, ...]

    def to_strings(self) -> dict[str, str]:
        return {
            _PACKAGES: str(self.manifest),
            _SHA256: self.sha256,
            _THREADS: str(self.threads),
            _SIZES: json.dumps(self.sizes),
        }

    @classmethod
    def from_strings(cls, values: Mapping[str, str]) -> PackageSettings:
        """Inverse of `to_strings`."""
        sizes = tuple(json.loads(values[_SIZES]))
        return cls(Path(values[_PACKAGES]), values[_SHA256], int(values[_THREADS]), sizes)

    def check_folder(self) -> Path:
        """The packages' folder. UserError if they are gone or not those for which the repository was written."""
        return _checked(self.manifest, self.sha256, "compile").parent


def _checked(file: Path, digest: str, made_by: str) -> Path:
    if not file.is_file():
        raise UserError(f"{file} is missing: {made_by} again, then write the model repository again")
    if sha256(file) != digest:
        raise UserError(
            f"{file} is not the file that this model repository was written for (SHA-256 differs): "
            f"write the model repository again"
        )
    return file


def config_to_string(config: Config) -> str:
    return json.dumps(config.to_json())


def config_from_string(text: str) -> Config:
    """Inverse of `config_to_string`. UserError if another version wrote it."""
    try:
        return Config.from_json(json.loads(text))
    except ValueError as error:
        raise UserError(f"the server's models are of another version ({error}): write its repository again") from None


def from_model_config(model_config: str) -> dict[str, str]:
    """The parameters in the JSON that Triton gives to `initialize`."""
    entries = json.loads(model_config)["parameters"]
    return {key: value["string_value"] for key, value in entries.items()}


def idle_s(model_config: str) -> float:
    """Seconds without a request after which Triton ends a sequence, in the JSON that it gives to `initialize`."""
    return int(json.loads(model_config)["sequence_batching"]["max_sequence_idle_microseconds"]) / 1e6
