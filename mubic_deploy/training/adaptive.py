"""The head that says how many steps a clip needs (thesis 3.2.6), fitted after training."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from mubic_deploy.config import MAX_STEPS
from mubic_deploy.engines import eager
from mubic_deploy.errors import UserError
from mubic_deploy.metrics import cc
from mubic_deploy.model.mubic import MUBiC
from mubic_deploy.pipeline import Pipeline, request, sample
from mubic_deploy.training.clips import Clips

TOLERANCE = 0.01  # a map is near enough where its CC with the map of 12 steps is 1 - this


def smallest_steps(
    model: MUBiC,
    clips: Clips,
    indices: Sequence[int],
    tolerance: float = TOLERANCE,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Of each clip the entropy of f_av_1, float32 [n], and the smallest N whose map, and every one of more steps, has a
    CC of at least 1 - tolerance with the map of 12 steps, int64 [n]."""
    pipeline = Pipeline(model.config, eager.load_engines(model))
    entropies, needed = [], []
    for done, index in enumerate(indices, 1):
        item = clips[index]
        arrays = request(model.config, item["VIDEO"].numpy()[None], item["AUDIO"].numpy()[None], 0, MAX_STEPS)
        cond = pipeline.condition(arrays)
        maps = [
            sample(model.config, pipeline.engines["denoiser"], cond, arrays["SEED"], np.full((1, 1), n, np.int32))
            for n in range(1, MAX_STEPS + 1)
        ]
        last = maps[-1]["SALIENCY"][0]
        near = [cc(m["SALIENCY"][0], last) >= 1 - tolerance for m in maps]
        entropies.append(float(np.asarray(cond["ENTROPY"])[0, 0]))
        needed.append(MAX_STEPS - next((i for i, ok in enumerate(reversed(near)) if not ok), MAX_STEPS) + 1)
        progress(done, len(indices))
    return np.array(entropies, np.float32), np.minimum(np.array(needed), MAX_STEPS)


def fit_head(model: MUBiC, entropies: np.ndarray, needed: np.ndarray, iterations: int = 2000) -> None:
    """Fits the MLP so that its output, rounded, is the steps needed at an entropy (least squares)."""
    x = torch.from_numpy(np.asarray(entropies, np.float32))[:, None]
    y = torch.from_numpy(np.asarray(needed, np.float32))[:, None]
    if len(x) == 0:
        raise UserError("there is no clip to fit the adaptive steps on: give a data folder with maps")
    head = model.fusion.adaptive.mlp
    first, last = head[0], head[2]
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    middle, spread = x.mean(), x.std(correction=0).clamp(min=1e-4)  # less is rounding
    scaled = (x - middle) / spread
    with torch.no_grad():  # a unit bends at each quantile of the entropies; no slope where they tell nothing apart
        bends = torch.quantile(scaled, torch.linspace(0, 1, first.out_features))
        sides = 1 - 2 * (torch.arange(first.out_features) % 2.0)
        first.weight.copy_(sides[:, None])
        first.bias.copy_(-sides * bends)
        nn.init.zeros_(last.weight)
        nn.init.constant_(last.bias, float(y.mean()))
    with torch.enable_grad():
        head.requires_grad_(True)
        adam = torch.optim.Adam(head.parameters(), lr=1e-2)
        for _ in range(iterations):
            adam.zero_grad()
            _loss(head(scaled), y).backward()
            adam.step()
        head.requires_grad_(False)
    with torch.no_grad():  # the scaling into the first layer: the graph sees the entropy itself
        first.weight.div_(spread)
        first.bias.sub_(first.weight[:, 0] * middle)


def _loss(predicted: Tensor, needed: Tensor) -> Tensor:
    return (predicted - needed).square().mean()


def fit_steps(
    model: MUBiC,
    clips: Clips,
    indices: Sequence[int],
    tolerance: float = TOLERANCE,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
    """Measures what the clips need and fits the head to it -> the steps needed, int64 [n]. Leaves the model on the
    CPU."""
    entropies, needed = smallest_steps(model, clips, indices, tolerance, progress)
    fit_head(model.cpu(), entropies, needed)
    return needed
