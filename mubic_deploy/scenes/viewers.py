"""A simulated group of viewers: most follow what they hear, some what moves and stands out, some stay in the centre."""

from __future__ import annotations

import numpy as np

from mubic_deploy.scenes.plan import FPS, HEIGHT, WIDTH, Plan

VIEWERS = 24
FOLLOWERS, MOVERS = 17, 4  # of them; the rest stay near the centre
DELAY_S = (0.2, 0.3)  # from a change in the sound to the gaze's arrival
FIXATION_S = (0.25, 0.8)  # until a viewer looks anew
LAPSE = 0.1  # how often a fixation follows another of the three habits
SCATTER = 0.35  # of a candidate's radius: where on it a viewer looks
CENTRE_SPREAD = (0.12, 0.14)  # of width and height
TREMOR = 1.5  # pixels, from frame to frame
SIGMA = WIDTH / 30  # pixels: one degree where the screen is 30 degrees wide


def gaze(plan: Plan, rng: np.random.Generator) -> np.ndarray:
    """Where each viewer looks in each frame, float64 [viewers, frames, 2]: x, y in pixels, inside the picture."""
    positions = plan.positions()
    weights = conspicuity(plan, positions)
    out = np.empty((VIEWERS, plan.frames, 2))
    for viewer in range(VIEWERS):
        habit = 0 if viewer < FOLLOWERS else 1 if viewer < FOLLOWERS + MOVERS else 2
        out[viewer] = _one(plan, rng, habit, positions, weights)
    out += rng.normal(0, TREMOR, out.shape)
    return np.clip(out, 0, [WIDTH - 1, HEIGHT - 1])


def _one(plan: Plan, rng: np.random.Generator, habit: int, positions: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """One viewer's path. The target is chosen anew when a fixation ends, and where a follower hears a change."""
    delay = rng.uniform(*DELAY_S)
    late = round(delay * FPS)
    heard = plan.heard(plan.times - delay)
    out = np.empty((plan.frames, 2))
    until, target, mode = -1, -1, habit
    spot = offset = np.zeros(2)
    for i in range(plan.frames):
        changed = i > 0 and heard[i] != heard[i - 1] and mode == 0
        if i >= until or changed:
            until = i + round(rng.uniform(*FIXATION_S) * FPS)
            mode = habit if rng.random() > LAPSE else int(rng.integers(3))
            if mode == 0 and heard[i] >= 0:
                target = int(heard[i])
            elif mode == 2:
                target = -1
            else:  # what moves and stands out, as it was seen
                target = int(rng.choice(len(weights), p=weights[:, max(i - late, 0)]))
            spot = rng.normal([WIDTH / 2, HEIGHT / 2], [CENTRE_SPREAD[0] * WIDTH, CENTRE_SPREAD[1] * HEIGHT])
            if target >= 0:
                offset = rng.normal(0, SCATTER * plan.candidates[target].radius, 2)
        out[i] = spot if target < 0 else positions[target, max(i - 2, 0)] + offset  # pursuit lags 80 ms
    return out


def conspicuity(plan: Plan, positions: np.ndarray) -> np.ndarray:
    """How much each candidate draws the eye by sight alone, float64 [K, frames], summing to 1 over the candidates."""
    rows = []
    for k, c in enumerate(plan.candidates):
        speed = np.linalg.norm(np.gradient(positions[k], axis=0), axis=-1) * FPS / WIDTH
        change = np.abs(np.gradient(plan.levels(k))) * FPS * 0.1
        contrast = 0.3 + 0.7 * abs(c.light - 0.5)
        rows.append((0.15 + speed + change) * contrast * c.radius)
    w = np.stack(rows)
    kernel = np.ones(8) / 8  # a third of a second
    w = np.stack([np.convolve(np.pad(row, (7, 0), mode="edge"), kernel, "valid") for row in w])
    return w / w.sum(0)


def density(points: np.ndarray) -> np.ndarray:
    """float64 [H, W] with peak 1: the viewers' points [viewers, 2] of a frame under a Gaussian of one degree."""
    x, y = points.T
    across = np.exp(-((np.arange(WIDTH) - x[:, None]) ** 2) / (2 * SIGMA**2))
    down = np.exp(-((np.arange(HEIGHT) - y[:, None]) ** 2) / (2 * SIGMA**2))
    total = down.T @ across
    return total / total.max()


def fixation_map(points: np.ndarray) -> np.ndarray:
    """uint8 [H, W], 1 where a viewer looks."""
    out = np.zeros((HEIGHT, WIDTH), np.uint8)
    x, y = np.rint(points).astype(int).T
    out[y, x] = 1
    return out
