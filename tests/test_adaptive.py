"""The head that says how many steps a clip needs, against targets it is given and every number of steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mubic_deploy import checkpoint
from mubic_deploy.config import DEMO, Config, get_config
from mubic_deploy.engines import eager
from mubic_deploy.errors import UserError
from mubic_deploy.model.mubic import MUBiC, random_model
from mubic_deploy.pipeline import Pipeline, request
from mubic_deploy.training import adaptive
from mubic_deploy.training.adaptive import fit_head, fit_steps, smallest_steps
from mubic_deploy.training.clips import Clips
from mubic_deploy.training.layout import Video


@pytest.fixture
def clips(shared: list[Video]) -> Clips:
    """7 of them: 3, 3 and 1."""
    return Clips(shared, DEMO)


@pytest.fixture(scope="module")
def model() -> MUBiC:
    return random_model(get_config("demo"))


@pytest.fixture
def fresh() -> MUBiC:
    """To fit."""
    return random_model(get_config("demo"))


def features(entropy: float, places: int = 4096) -> torch.Tensor:
    """[1, 8, 16, 32, 2] of about this entropy: equal energy in some of the places."""
    f = torch.zeros(places, 2)
    f[: round(places**entropy)] = 3
    return f.view(1, 8, 16, 32, 2)


def steps_at(model: MUBiC, entropies: np.ndarray) -> list[int]:
    """The steps that the graph's own module asks for."""
    found = [model.fusion.adaptive(features(e)) for e in entropies.tolist()]
    np.testing.assert_allclose([float(e) for e, _ in found], entropies, atol=2e-3)
    return [int(n) for _, n in found]


NARROW = np.concatenate([np.linspace(0.93, 0.945, 12), np.linspace(0.955, 0.965, 8), np.linspace(0.975, 0.99, 12)])
WIDE = np.linspace(0.3, 1, 30)


@pytest.mark.parametrize(
    ("entropies", "rule"),
    [
        (NARROW, lambda e: np.where(e < 0.95, 2, 9)),
        (NARROW, lambda e: np.where(e < 0.95, 2, np.where(e < 0.97, 9, 5))),
        (NARROW, lambda e: np.where(e < 0.95, 12, 1)),
        (NARROW, lambda e: np.full(len(e), 7)),
        (WIDE, lambda e: np.where(e < 0.6, 3, 8)),
    ],
    ids=["up", "up and down", "down", "constant", "wide"],
)
def test_the_fitted_head_says_what_is_needed(fresh, entropies, rule):
    before = {k: v.clone() for k, v in fresh.state_dict().items() if "adaptive" not in k}
    fit_head(fresh, entropies, rule(entropies))
    assert steps_at(fresh, entropies) == rule(entropies).tolist()
    after = fresh.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert not any(p.requires_grad for p in fresh.fusion.adaptive.parameters())


def test_the_fit_is_least_squares(fresh):
    """Where one entropy needs now 2, now 6 steps it says their mean."""
    entropies = np.repeat([0.94, 0.98], 40)
    fit_head(fresh, entropies, np.concatenate([np.full(10, 2), np.full(30, 6), np.full(20, 9), np.full(20, 11)]))
    with torch.no_grad():
        said = fresh.fusion.adaptive.mlp(torch.tensor([[0.94], [0.98]]))[:, 0]
    np.testing.assert_allclose(said, [5, 10], atol=0.05)


@pytest.mark.parametrize("number", [1, 3])
def test_one_entropy_tells_nothing_about_others(fresh, number):
    fit_head(fresh, np.full(number, 0.95, np.float32), np.full(number, 6))
    assert steps_at(fresh, np.linspace(0.4, 1, 7)) == [6] * 7


@pytest.mark.parametrize("width", [0.06, 2e-3], ids=["narrow", "as of the shipped model"])
def test_the_fitted_head_survives_fp16(fresh, tmp_path, width):
    """As `pack` stores it."""
    entropies = np.linspace(0.9975 - width, 0.9975, 40, dtype=np.float32)
    rule = np.where(np.arange(40) < 20, 2, 9)
    fit_head(fresh, entropies, rule)
    before = steps_at(fresh, entropies)
    assert np.mean(before == rule) >= 0.9  # a step within 5 % of the width is bent
    checkpoint.save(fresh, tmp_path / "half.safetensors", half=True)
    packed, _ = checkpoint.load(str(tmp_path / "half.safetensors"))
    assert steps_at(packed, entropies) == before
    assert (tmp_path / "half.safetensors").stat().st_size < 0.51 * sum(p.nbytes for p in fresh.state_dict().values())


def test_the_fit_repeats_and_leaves_the_random_state_alone(fresh):
    fitted = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        fit_head(fresh, NARROW, np.rint(10 - 200 * np.abs(NARROW - 0.96)))
        assert torch.equal(torch.get_rng_state(), state)
        fitted.append([p.clone() for p in fresh.fusion.adaptive.parameters()])
    for a, b in zip(*fitted, strict=True):
        assert torch.equal(a, b)


def test_nothing_to_fit_on(fresh):
    with pytest.raises(UserError, match="no clip to fit"):
        fit_head(fresh, np.zeros(0), np.zeros(0))


def test_smallest_steps_against_every_number_of_steps(model, clips):
    pipeline = Pipeline(model.config, eager.load_engines(model))
    indices = [0, 6]
    agreement, entropies = [], []
    for i in indices:
        video, audio = (clips[i][name].numpy()[None] for name in ("VIDEO", "AUDIO"))
        maps = [pipeline.predict(video, audio, 0, n)[0].ravel() for n in range(1, 13)]
        agreement.append([np.corrcoef(m, maps[-1])[0, 1] for m in maps])
        entropies.append(np.asarray(pipeline.condition(request(model.config, video, audio, 0, 1))["ENTROPY"]).item())
    # a tolerance at which the two clips differ: between the first's 3 and 4 steps
    tolerance = 1 - (agreement[0][2] + agreement[0][3]) / 2
    expected = [next(n for n in range(1, 13) if min(a[n - 1 :]) >= 1 - tolerance) for a in agreement]
    assert expected[0] == 4
    assert expected[1] != 4
    seen: list[tuple[int, int]] = []
    found, needed = smallest_steps(model, clips, indices, tolerance, lambda *done: seen.append(done))
    assert needed.tolist() == expected
    assert needed.dtype == np.int64
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, entropies, rtol=1e-6)
    assert seen == [(1, 2), (2, 2)]


@pytest.mark.parametrize(
    ("far", "needed"),  # the numbers of steps whose map is too far from that of 12
    [([], 1), ([1, 2, 3], 4), ([2, 7], 8), ([11], 12), (list(range(1, 12)), 12), (list(range(1, 13)), 12)],
)
def test_every_larger_number_of_steps_must_be_near_too(model, clips, monkeypatch, far, needed):
    def sample(config: Config, denoiser: Any, cond: Any, seed: np.ndarray, steps: np.ndarray) -> dict[str, np.ndarray]:
        assert seed.tolist() == [[0]]  # as in a film
        return {"SALIENCY": steps}

    monkeypatch.setattr(adaptive, "sample", sample)
    monkeypatch.setattr(adaptive, "cc", lambda a, b: 0.9899 if int(a[0]) in far else 0.9901)
    assert smallest_steps(model, clips, [0])[1].tolist() == [needed]


def test_fit_steps_measures_and_fits(fresh, clips, monkeypatch):
    measured = (NARROW.astype(np.float32), np.where(NARROW < 0.95, 3, 8))
    asked = []

    def measure(model, clips, indices, tolerance, progress):
        asked.append((indices, tolerance))
        progress(len(indices), len(indices))
        return measured

    monkeypatch.setattr(adaptive, "smallest_steps", measure)
    said = []
    fitted = fit_steps(fresh, clips, [0, 6], 0.02, lambda done, total: said.append((done, total)))
    np.testing.assert_array_equal(fitted, measured[1])
    assert (asked, said) == ([([0, 6], 0.02)], [(2, 2)])
    assert steps_at(fresh, NARROW) == measured[1].tolist()
