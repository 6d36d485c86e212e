"""Checkpoints: weights as safetensors, the configuration as JSON in the file's own metadata.

A checkpoint is named by a file, by `random:full` or `random:demo` (seeded random weights), or by `demo`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mubic_deploy.artifacts import sha256
from mubic_deploy.config import CONFIGS, DEMO_CHECKPOINT, Config, get_config
from mubic_deploy.errors import UserError
from mubic_deploy.model.mubic import MUBiC, random_model

DEMO_STANDS_FOR = "random:demo"  # until a trained one ships


@dataclass(frozen=True)
class Source:
    """Where weights come from; enough to make them again."""

    name: str  # as the user named it
    seed: int | None = None  # of random weights
    sha256: str | None = None  # of the file

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "seed": self.seed, "sha256": self.sha256}


def save(model: MUBiC, path: Path) -> None:
    """Write the weights (without buffers that are derived) and the configuration; beside, then renamed."""
    part = path.with_name(path.name + ".part")
    weights = {k: v.contiguous() for k, v in model.state_dict().items()}
    try:
        save_file(weights, part, metadata={"config": json.dumps(model.config.to_json())})
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def load(name: str, variant: str | None = None, seed: int = 0) -> tuple[MUBiC, Source]:
    """The model that `name` stands for, in eval mode. `variant` chooses one for random weights; a file must be of it.

    UserError for an unknown name, a file that is missing or no checkpoint, another variant, weights that do not fit."""
    spec = DEMO_STANDS_FOR if name == DEMO_CHECKPOINT else name
    if spec.startswith("random:"):
        size = spec.removeprefix("random:")
        if size not in CONFIGS:
            raise UserError(f"unknown checkpoint {name!r}: use random:full, random:demo, demo or a .safetensors file")
        return random_model(get_config(size, variant or "full"), seed), Source(name, seed=seed)
    path = Path(name)
    if not path.is_file():
        what = "is a directory" if path.is_dir() else "does not exist"
        raise UserError(f"checkpoint {name} {what}: use random:full, random:demo, demo or a .safetensors file")
    return _load_file(path, variant), Source(name, sha256=sha256(path))


def _load_file(path: Path, variant: str | None) -> MUBiC:
    try:
        with safe_open(path, "pt") as file:
            config = Config.from_json(json.loads((file.metadata() or {})["config"]))
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except KeyError:
        raise UserError(f"{path} is not a MUBiC checkpoint: it holds no configuration") from None
    except (SafetensorError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is not a MUBiC checkpoint ({reason}): name another file") from None
    if variant is not None and variant != config.variant:
        raise UserError(f"{path} holds the variant {config.variant!r}, not {variant!r}: name another checkpoint")
    with torch.device("meta"):
        model = MUBiC(config)
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in weights.items()}
    odd = sorted(set(expected.items()) ^ set(found.items()))
    if odd:
        raise UserError(f"{path} does not fit its configuration (first at {odd[0][0]}): the file is damaged")
    model = random_model(config)
    model.load_state_dict(weights)
    return model
