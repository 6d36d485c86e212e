"""What a run resumes from: weights, Adam's moments and the place in the run, in one safetensors file."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mubic_deploy.checkpoint import write_tensors
from mubic_deploy.errors import UserError
from mubic_deploy.model.mubic import MUBiC
from mubic_deploy.training.settings import Settings

STATE = "state.safetensors"  # in the folder of a run


@dataclass
class State:
    """The run goes on at `step` of `epoch` (both from 0); `total` is the loss summed over the epoch's steps so far;
    `videos` a line each, name, frames and rate; `plateau` what ReduceLROnPlateau remembers, `scaler` what the scaler of
    16-mixed's gradients does; `devices` how many there were, `data` the digest of the videos' files, `clips` those of
    the two parts' clips: each None in earlier versions' states."""

    settings: Settings
    videos: list[str]
    epoch: int
    step: int
    total: float
    plateau: dict[str, float]
    history: list[dict[str, Any]]
    scaler: dict[str, Any] = field(default_factory=dict)
    devices: int | None = None
    data: str | None = None
    clips: str | None = None
    tensors: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)

    def into(self, model: MUBiC, adam: torch.optim.Adam) -> None:
        """Puts weights and moments back, copied, and lets go of what was read: it would take as much memory again until
        the run's end. There are no moments before a first step that was not skipped. UserError if the weights are of
        another model."""
        names = {f"model.{name}" for name in model.state_dict()}
        if odd := sorted(names ^ {name for name in self.tensors if name.startswith("model.")}):
            raise UserError(f"the state of the run does not fit this version ({odd[0]}): start a new run")
        with torch.no_grad():
            for name, value in model.state_dict().items():
                value.copy_(self.tensors[f"model.{name}"])
        for name, p in trained(model):
            if f"adam.step.{name}" not in self.tensors:
                continue
            read = {k: self.tensors[f"adam.{k}.{name}"] for k in ("step", "exp_avg", "exp_avg_sq")}
            # as Adam has it: the step on the host. A tensor that is kept as it was read keeps the whole file in memory
            places = {k: "cpu" if k == "step" else p.device for k in read}
            adam.state[p] = {k: value.to(places[k], copy=True) for k, value in read.items()}
        self.tensors.clear()


def trained(model: MUBiC) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def save_state(path: Path, state: State, model: MUBiC, adam: torch.optim.Adam) -> None:
    """The last good one stays until the new one is whole. OSError if it cannot be written."""
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    for name, p in trained(model):
        tensors |= {f"adam.{k}.{name}": v for k, v in adam.state[p].items()}
    facts = {
        "settings": state.settings.to_json(),
        "videos": state.videos,
        "epoch": state.epoch,
        "step": state.step,
        "total": state.total,
        "plateau": state.plateau,
        "history": state.history,
        "scaler": state.scaler,
        "devices": state.devices,
        "data": state.data,
        "clips": state.clips,
    }
    write_tensors(path, tensors, {"state": json.dumps(facts)})


def load_state(path: Path, tensors: bool = True) -> State:
    """tensors: with them, 1 GB of `full`. UserError if there is none, or if it cannot be read."""
    if not path.is_file():
        raise UserError(f"{path.parent} holds no run to resume: leave out --resume")
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {})["state"])
            keys = file.keys() if tensors else ()
            found = {key: file.get_tensor(key) for key in keys}
        settings = Settings.from_json(facts.pop("settings"))
        return State(settings=settings, **facts, tensors=found)
    except (SafetensorError, ValueError, KeyError, TypeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is no state of a run ({reason}): start a new run in another --out") from None
