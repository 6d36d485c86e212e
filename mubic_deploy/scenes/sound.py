"""The sound track of a scene: the rhythm of whoever is heard, as thumps, tones or a voice, over a little noise."""

from __future__ import annotations

import numpy as np

from mubic_deploy.config import SAMPLE_RATE
from mubic_deploy.scenes.plan import KINDS, OFF_SCREEN, Candidate, Plan, Rhythm

FADE_S = 0.02  # segments fade in and out
NOISE = 0.004  # amplitude of the room's noise
PEAK = 0.5


def synthesize(plan: Plan, rng: np.random.Generator) -> np.ndarray:
    """float32 [n], 16 kHz mono in [-1, 1], as long as the pictures."""
    n = round(plan.seconds * SAMPLE_RATE)
    out = NOISE * rng.standard_normal(n)
    voices: dict[int, np.ndarray] = {}
    for segment in plan.segments:
        k = segment.heard
        if k < 0 and k != OFF_SCREEN:
            continue
        if k not in voices:
            source = plan.candidates[k] if k >= 0 else _stranger(rng, plan)
            voices[k] = voice(source, n, rng)
        t = np.arange(n) / SAMPLE_RATE
        edge = np.minimum(t - segment.start, segment.stop - t) / FADE_S
        out += voices[k] * np.clip(edge + 0.5, 0, 1)
    return np.clip(out, -1, 1).astype(np.float32)


def _stranger(rng: np.random.Generator, plan: Plan) -> Candidate:
    """Somebody out of sight, of a kind that is not to be seen, if there is one."""
    absent = [kind for kind in KINDS if kind not in {c.kind for c in plan.candidates}] or list(KINDS)
    kind = str(rng.choice(absent))
    rate = rng.uniform(1.5, 4)
    n = int(np.ceil((plan.seconds + 2) * rate))
    rhythm = Rhythm(np.arange(n) / rate, np.full(n, 0.8 / rate), rng.uniform(0.6, 1, n))
    return Candidate(kind, 20, float(rng.uniform(90, 900)), 0, 0, 0, rhythm)


def voice(c: Candidate, n: int, rng: np.random.Generator) -> np.ndarray:
    """float64 [n]: how candidate `c` sounds if it is heard all the time."""
    make = {"bouncer": _thumps, "pulser": _tones, "talker": _syllables}[c.kind]
    return PEAK * make(c, n, rng)


def _add(out: np.ndarray, start_s: float, sound: np.ndarray) -> None:
    at = round(start_s * SAMPLE_RATE)
    begin, end = max(at, 0), min(at + len(sound), len(out))
    if begin < end:
        out[begin:end] += sound[begin - at : end - at]


def _thumps(c: Candidate, n: int, rng: np.random.Generator) -> np.ndarray:
    """An impact where each hop begins: a falling tone and a burst of noise."""
    out = np.zeros(n)
    t = np.arange(round(0.25 * SAMPLE_RATE)) / SAMPLE_RATE
    for start, strength in zip(c.rhythm.start, c.rhythm.strength, strict=True):
        tone = np.sin(2 * np.pi * c.pitch * (t - 0.6 * t**2)) * np.exp(-t / 0.06)
        burst = rng.standard_normal(len(t)) * np.exp(-t / 0.012)
        _add(out, start, strength * (0.8 * tone + 0.5 * burst))
    return np.clip(out, -1, 1)


def _tones(c: Candidate, n: int, rng: np.random.Generator) -> np.ndarray:
    """A note where each pulse begins, with the pulse's own decay."""
    out = np.zeros(n)
    t = np.arange(round(0.7 * SAMPLE_RATE)) / SAMPLE_RATE
    envelope = np.minimum(t / 0.02, 1) * np.exp(-t / 0.16)
    note = sum(np.sin(2 * np.pi * c.pitch * m * t + p) / m for m, p in ((1, 0), (2, 1), (3, rng.uniform(0, 6))))
    for start, strength in zip(c.rhythm.start, c.rhythm.strength, strict=True):
        _add(out, start, 0.55 * strength * envelope * note)
    return np.clip(out, -1, 1)


def _syllables(c: Candidate, n: int, rng: np.random.Generator) -> np.ndarray:
    """A vowel for each opening of the mouth: harmonics of a gliding pitch under two formants."""
    out = np.zeros(n)
    for start, length, strength in zip(c.rhythm.start, c.rhythm.length, c.rhythm.strength, strict=True):
        t = np.arange(round(length * SAMPLE_RATE)) / SAMPLE_RATE
        glide = 1 + rng.uniform(-0.15, 0.15) * t / length
        phase = 2 * np.pi * np.cumsum(c.pitch * rng.uniform(0.9, 1.1) * glide) / SAMPLE_RATE
        formants = ((rng.uniform(300, 850), 90), (rng.uniform(900, 2300), 150), (2800, 250))
        harmonics = np.arange(1, int(3800 / c.pitch) + 1)
        f = harmonics * c.pitch
        gain = sum(1 / (1 + ((f - centre) / width) ** 2) for centre, width in formants) / harmonics**0.5
        sound = gain / np.sqrt((gain**2).sum()) @ np.sin(harmonics[:, None] * phase)
        _add(out, start, strength * np.sin(np.pi * t / length) ** 2 * sound)
    return np.clip(0.8 * out, -1, 1)
