"""Checkpoints: weights as safetensors, the configuration as JSON in the file's own metadata.

A checkpoint is named by a file, by `demo`, the trained one that ships with the package, or by `random:full` or
`random:demo` (seeded random weights)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mubic_deploy.artifacts import sha256
from mubic_deploy.config import (
    CHECKPOINTS,
    CONFIGS,
    DEMO_CHECKPOINT,
    DEMO_FILE,
    RANDOM,
    Config,
    get_config,
    weights_seed,
)
from mubic_deploy.errors import UserError
from mubic_deploy.folders import replacing_file
from mubic_deploy.model.mubic import MUBiC, random_model

# the head's first layer scales the entropies of real clips, which differ in their fourth figure: FP16 has three
KEPT = "fusion.adaptive."


@dataclass(frozen=True)
class Source:
    """Where weights come from; enough to make them again."""

    name: str  # as the user named it
    seed: int | None = None  # of random weights
    sha256: str | None = None  # of the file

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "seed": self.seed, "sha256": self.sha256}


def save(model: MUBiC, path: Path, half: bool = False) -> None:
    """Write the weights (without buffers that are derived) and the configuration. half: in FP16, but for the head of
    the adaptive steps.

    OSError if it cannot be written, which leaves `path` as it was; UserError if a weight does not fit into FP16."""
    weights = _halved(model) if half else dict(model.state_dict())
    write_tensors(path, weights, {"config": json.dumps(model.config.to_json())})


def round_to_half(model: MUBiC) -> None:
    """Makes the weights what they will be when they were packed in FP16 and read again. In place. UserError if one does
    not fit into FP16."""
    model.load_state_dict(_halved(model))


def _halved(model: MUBiC) -> dict[str, torch.Tensor]:
    weights = dict(model.state_dict())
    for name, value in weights.items():
        if value.is_floating_point() and not name.startswith(KEPT):
            weights[name] = value.half()
            if not weights[name].isfinite().all():
                raise UserError(f"{name} does not fit into FP16 (largest {value.abs().max():.3g}): keep FP32")
    return weights


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file, whole or not at all. OSError if it cannot be written."""
    try:
        with replacing_file(path) as part:
            save_file({k: v.contiguous() for k, v in tensors.items()}, part, metadata)
    except SafetensorError as error:  # its own kind for a full disk
        raise OSError(str(error)) from error


def load(name: str, variant: str | None = None, seed: int | None = None) -> tuple[MUBiC, Source]:
    """The model that `name` stands for, in eval mode. `variant` chooses one for random weights; a file must be of it.
    `seed` is of random weights only (default 0).

    FP16 weights become FP32. UserError for an unknown name, a file that is missing or no checkpoint, another variant,
    weights that do not fit, a seed for weights that are not random."""
    if name == DEMO_CHECKPOINT:
        if variant not in (None, "full"):
            raise UserError(f"the demo checkpoint is the full model, not {variant!r}: name random:demo instead")
        weights_seed(name, seed)
        return _load_file(DEMO_FILE, None), Source(name, sha256=sha256(DEMO_FILE))
    if name.startswith(RANDOM):
        size = name.removeprefix(RANDOM)
        if size not in CONFIGS:
            raise UserError(f"unknown checkpoint {name!r}: use {CHECKPOINTS}")
        seed = weights_seed(name, seed)
        return random_model(get_config(size, variant or "full"), seed), Source(name, seed=seed)
    path = Path(name)
    if not path.is_file():
        what = "is a directory" if path.is_dir() else "does not exist"
        raise UserError(f"checkpoint {name} {what}: use {CHECKPOINTS}")
    weights_seed(name, seed)
    return _load_file(path, variant), Source(name, sha256=sha256(path))


def _load_file(path: Path, variant: str | None) -> MUBiC:
    try:
        with safe_open(path, "pt") as file:
            config = Config.from_json(json.loads((file.metadata() or {})["config"]))
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except KeyError:
        raise UserError(f"{path} is not a MUBiC checkpoint: it holds no configuration") from None
    except (SafetensorError, ValueError, TypeError, AttributeError, OSError) as error:  # of the configuration too
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is not a MUBiC checkpoint ({reason}): name another file") from None
    if variant is not None and variant != config.variant:
        raise UserError(f"{path} holds the variant {config.variant!r}, not {variant!r}: name another checkpoint")
    try:
        with torch.device("meta"):
            model = MUBiC(config)
    except Exception as error:  # whatever the sizes, each possible by itself, do together
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: its configuration makes no model ({reason}): name another file") from error
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in weights.items()}
    odd = sorted(set(expected.items()) ^ set(found.items()))
    if odd:
        raise UserError(f"{path} does not fit its configuration (first at {odd[0][0]}): the file is damaged")
    model = random_model(config)
    model.load_state_dict(weights)
    return model
