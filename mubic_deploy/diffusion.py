"""Cosine schedule, DDIM step pairs and noise, in NumPy (thesis 3.2.3.2, 3.2.6)."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import numpy as np

from mubic_deploy.config import DIFFUSION_STEPS, SCHEDULE_GAMMA
from mubic_deploy.errors import UserError

LAST_STEP = DIFFUSION_STEPS - 1  # the loop starts here


def alpha_bar(t: int) -> float:
    """Alpha-bar of step t (eq. 3.16, normalised to 1 at t = 0). t = -1 stands for the clean map: 1."""
    if t < 0:
        return 1.0

    def cosine(u: float) -> float:
        return math.cos((u / DIFFUSION_STEPS + SCHEDULE_GAMMA) / (1 + SCHEDULE_GAMMA) * math.pi / 2) ** 2

    return cosine(t) / cosine(0)


def step_pairs(n: int) -> list[tuple[int, int]]:
    """(t_now, t_next) of an n-step DDIM run: the n + 1 points of linspace(-1, T - 1), reversed, in pairs.

    Points between integers are cut towards zero, as DiffSal's sampler does."""
    times = [int(t) for t in reversed(np.linspace(-1, LAST_STEP, n + 1))]
    return list(itertools.pairwise(times))


class Schedule(NamedTuple):
    """One row a denoiser call, one column a sample: STEP int32, ALPHA_NOW and ALPHA_NEXT float32, each [N, B, 1]."""

    step: np.ndarray
    alpha_now: np.ndarray
    alpha_next: np.ndarray


def schedule(steps: np.ndarray) -> Schedule:
    """The calls for a batch whose samples take `steps` [B] steps each; N is the largest of them.

    A sample with fewer steps waits at the start, with alpha_now = alpha_next: then eq. 3.58 gives S_t back unchanged,
    so nobody has to take the batch apart."""
    total = int(max(steps))
    columns = []
    for n in steps:
        wait = [(LAST_STEP, LAST_STEP)] * (total - int(n))
        columns.append(wait + step_pairs(int(n)))
    pairs = np.array(columns, np.int32).transpose(1, 0, 2)  # [N, B, 2]
    alphas = np.vectorize(alpha_bar, otypes=[np.float32])(pairs)
    return Schedule(pairs[..., :1].copy(), alphas[..., :1].copy(), alphas[..., 1:].copy())


def check_seeds(seeds: np.ndarray) -> None:
    """UserError for a seed that keys no noise."""
    for seed in seeds:
        if seed < 0:
            raise UserError(f"seed {int(seed)} is negative: use 0 or more")


def noise(seeds: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """S_T ~ N(0, 1), float32 [B, 1, h, w]: for each seed [B] (>= 0) the stream of Philox keyed with it."""
    check_seeds(seeds)
    maps = []
    for seed in seeds:
        generator = np.random.Generator(np.random.Philox(key=int(seed)))
        maps.append(generator.standard_normal((1, *size), np.float32))
    return np.stack(maps)
