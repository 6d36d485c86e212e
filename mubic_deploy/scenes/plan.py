"""What happens in a scene: who is where, who moves how, who is heard when. Pictures, sound and viewers follow it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

HEIGHT, WIDTH, FPS = 180, 320, 25  # pixels, frames per second
KINDS = ("bouncer", "pulser", "talker")
SILENCE, OFF_SCREEN = -1, -2  # who is heard, beside the candidates' numbers

SAME_KIND = 0.25  # how often a candidate may repeat a kind that is there already
SILENT_MOTION = 0.8  # how often a candidate that is not heard moves all the same
NOBODY = 0.08  # how often a segment is silent
ELSEWHERE = 0.08  # how often the sound has no visible source
SEGMENT_S = (1.2, 3.0)  # length of a segment, after which somebody else is heard


@dataclass(frozen=True)
class Rhythm:
    """What a candidate does when it moves: event k starts at `start[k]`, lasts `length[k]` seconds and is `strength[k]`
    (0 to 1) strong. Events touch in a bouncer (impacts), overlap nowhere, and pause in a talker."""

    start: np.ndarray
    length: np.ndarray
    strength: np.ndarray


@dataclass(frozen=True)
class Candidate:
    """One thing to look at. `radius` in pixels; `pitch` in Hz falls with size; `look` 0 to 1 varies its drawing."""

    kind: str
    radius: float
    pitch: float
    hue: float
    light: float
    look: float
    rhythm: Rhythm


@dataclass(frozen=True)
class Segment:
    """From `start` to `stop` seconds `heard` is heard: a candidate's number, SILENCE or OFF_SCREEN; `moving` says which
    candidates move."""

    start: float
    stop: float
    heard: int
    moving: tuple[bool, ...]


@dataclass(frozen=True)
class Plan:
    """A scene of `frames` frames. `places` float64 [K, frames, 2]: x, y of each candidate's rest point in pixels;
    `camera` float64 [frames, 2]: how far the camera has moved."""

    frames: int
    candidates: tuple[Candidate, ...]
    segments: tuple[Segment, ...]
    places: np.ndarray
    camera: np.ndarray

    @property
    def seconds(self) -> float:
        return self.frames / FPS

    @property
    def times(self) -> np.ndarray:
        """Seconds of each frame."""
        return np.arange(self.frames) / FPS

    def heard(self, times: np.ndarray) -> np.ndarray:
        """Who is heard at each time (clipped to the scene): int64, a candidate's number, SILENCE or OFF_SCREEN."""
        return np.array([s.heard for s in self.segments])[self._segment_at(times)]

    def moves(self, candidate: int, times: np.ndarray) -> np.ndarray:
        """bool: does the candidate move at each time (clipped to the scene)?"""
        return np.array([s.moving[candidate] for s in self.segments])[self._segment_at(times)]

    def _segment_at(self, times: np.ndarray) -> np.ndarray:
        return last_before(np.array([s.start for s in self.segments]), times)

    def levels(self, candidate: int) -> np.ndarray:
        """How far each frame's motion is out, float64 [frames] in [0, 1]: a bouncer's height, a pulser's swelling, a
        talker's open mouth. 0 where it rests. An event that has begun runs to its end."""
        c = self.candidates[candidate]
        begun = c.rhythm.start[event_at(c.rhythm, self.times)]
        return level_at(c.kind, c.rhythm, self.times) * self.moves(candidate, begun)

    def positions(self) -> np.ndarray:
        """float64 [K, frames, 2]: where each candidate's middle is seen; bouncers are in the air."""
        out = self.places.copy()
        for k, c in enumerate(self.candidates):
            if c.kind == "bouncer":
                out[k, :, 1] -= hop_height(c) * self.levels(k)
        return out


def hop_height(c: Candidate) -> float:
    """How high a bouncer jumps, in pixels."""
    return 1.3 * c.radius + 10


def last_before(starts: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Index of the last of the sorted `starts` at or before each time, int64; 0 before the first."""
    return np.clip(np.searchsorted(starts, times, "right") - 1, 0, None)


def event_at(rhythm: Rhythm, times: np.ndarray) -> np.ndarray:
    """Index of the event that began last at each time."""
    return last_before(rhythm.start, times)


def level_at(kind: str, rhythm: Rhythm, times: np.ndarray) -> np.ndarray:
    """The motion of `kind` at each time, in [0, 1]."""
    index = event_at(rhythm, times)
    since = times - rhythm.start[index]
    u = since / rhythm.length[index]
    inside = (u >= 0) & (u < 1)
    u = np.clip(u, 0, 1)
    if kind == "bouncer":  # a parabola from impact to impact
        shape = 4 * u * (1 - u)
    elif kind == "pulser":  # up in 40 ms, then a decay
        shape = np.minimum(since / 0.04, 1) * np.exp(-np.maximum(since - 0.04, 0) / 0.16)
    else:
        shape = np.sin(np.pi * u) ** 2
    return np.where(inside, shape, 0) * rhythm.strength[index]


def streams(seed: int, index: int) -> list[np.random.Generator]:
    """Independent generators for plan, pictures, sound and viewers of one scene."""
    children = np.random.SeedSequence([seed, index]).spawn(4)
    return [np.random.Generator(np.random.Philox(child)) for child in children]


def make_plan(rng: np.random.Generator, seconds: float) -> Plan:
    """A random scene of `seconds` seconds (rounded to frames)."""
    frames = round(seconds * FPS)
    count = int(rng.choice([2, 3, 4], p=[0.4, 0.4, 0.2]))
    candidates = _candidates(rng, count, seconds)
    camera = _wander(rng, frames, amplitude=rng.uniform(0, 30), periods=(4, 10))
    rest = _rest_points(rng, [c.radius for c in candidates])
    drift = [_wander(rng, frames, amplitude=rng.uniform(3, 14), periods=(3, 8)) for _ in candidates]
    places = np.stack([r + d - 0.2 * camera for r, d in zip(rest, drift, strict=True)])
    margin = np.array([[c.radius, c.radius] for c in candidates])[:, None]
    places = np.clip(places, 0.8 * margin, np.array([WIDTH, HEIGHT]) - 0.8 * margin)
    return Plan(frames, candidates, _segments(rng, count, seconds), places, camera)


def _candidates(rng: np.random.Generator, count: int, seconds: float) -> tuple[Candidate, ...]:
    kinds: list[str] = []
    for _ in range(count):
        fresh = [k for k in KINDS if k not in kinds]
        repeat = not fresh or (kinds and rng.random() < SAME_KIND)
        kinds.append(str(rng.choice(kinds if repeat else fresh)))
    out = []
    for kind in kinds:
        size = rng.uniform(0, 1)
        low, high = {"bouncer": (70, 260), "pulser": (350, 1400), "talker": (95, 320)}[kind]
        out.append(
            Candidate(
                kind=kind,
                radius=13 + 17 * size,
                pitch=float(high * (low / high) ** size),
                hue=rng.uniform(),
                light=rng.uniform(0.35, 0.95),
                look=rng.uniform(),
                rhythm=_rhythm(rng, kind, seconds),
            )
        )
    return tuple(out)


def _rhythm(rng: np.random.Generator, kind: str, seconds: float) -> Rhythm:
    """Events from before the scene to its end."""
    rate = {"bouncer": rng.uniform(1.2, 2.6), "pulser": rng.uniform(1.3, 3.2), "talker": rng.uniform(3.2, 5.0)}[kind]
    n = int(np.ceil((seconds + 2) * rate * 1.6))
    length = rng.uniform(0.8, 1.25, n) / rate
    strength = rng.uniform(0.7, 1.0, n)
    gap = np.zeros(n)
    if kind == "talker":  # words of a few syllables
        gap = np.where(rng.random(n) < 0.25, rng.uniform(0.1, 0.35, n), 0)
        strength = rng.uniform(0.45, 1.0, n)
    start = np.cumsum(length + gap) - length - gap - rng.uniform(0, 1)
    return Rhythm(start, length, strength)


def _segments(rng: np.random.Generator, count: int, seconds: float) -> tuple[Segment, ...]:
    out: list[Segment] = []
    start, last = 0.0, OFF_SCREEN
    while start < seconds:
        stop = start + rng.uniform(*SEGMENT_S)
        draw = rng.random()
        if draw < NOBODY:
            heard = SILENCE
        elif draw < NOBODY + ELSEWHERE:
            heard = OFF_SCREEN
        else:
            heard = int(rng.choice([k for k in range(count) if k != last]))
        moving = tuple(bool(k == heard or rng.random() < SILENT_MOTION) for k in range(count))
        out.append(Segment(start, stop, heard, moving))
        start, last = stop, heard
    return tuple(out)


def _wander(rng: np.random.Generator, frames: int, amplitude: float, periods: tuple[float, float]) -> np.ndarray:
    """A smooth path, float64 [frames, 2], of sines of random period (seconds) and phase."""
    t = np.arange(frames)[:, None, None] / FPS
    period = rng.uniform(*periods, (1, 2, 2))
    phase = rng.uniform(0, 2 * np.pi, (1, 2, 2))
    return amplitude * np.sin(2 * np.pi * t / period + phase).mean(2)


def _rest_points(rng: np.random.Generator, radii: list[float]) -> np.ndarray:
    """Places that keep the candidates apart, float64 [K, 2]; the best of many draws where they are crowded."""
    low = np.array([[1.2 * r, 1.9 * r + 10] for r in radii])
    high = np.array([[WIDTH - 1.2 * r, HEIGHT - 1.2 * r] for r in radii])
    draws = rng.uniform(low, high, (60, len(radii), 2))
    apart = np.linalg.norm(draws[:, :, None] - draws[:, None], axis=-1)
    apart = apart - np.add.outer(radii, radii)
    apart[:, np.arange(len(radii)), np.arange(len(radii))] = np.inf
    nearest = apart.min((1, 2))
    fits = np.flatnonzero(nearest > 24)
    return draws[fits[0] if len(fits) else nearest.argmax()]
