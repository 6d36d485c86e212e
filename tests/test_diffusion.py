"""Schedule, DDIM pairs, noise and the update, against hand-worked numbers."""

import numpy as np
import pytest
import torch

from mubic_deploy.diffusion import alpha_bar, noise, schedule, step_pairs
from mubic_deploy.errors import UserError
from mubic_deploy.model.denoiser import Denoiser


def test_pairs_of_four_steps_are_the_points_of_linspace():
    assert step_pairs(4) == [(999, 749), (749, 499), (499, 249), (249, -1)]


def test_pairs_between_integers_are_cut_towards_zero():
    # linspace(-1, 999, 4) = -1, 332.33, 665.67, 999
    assert step_pairs(3) == [(999, 665), (665, 332), (332, -1)]


def test_one_step_goes_from_noise_to_the_clean_map():
    assert step_pairs(1) == [(999, -1)]


@pytest.mark.parametrize(
    ("t", "expected"),
    [
        (-1, 1.0),
        (0, 1.0),  # normalised: cos^2(0.008 / 1.008 pi / 2) divides itself
        # cos^2(0.508 / 1.008 * 90 degrees) / cos^2(0.008 / 1.008 * 90 degrees) = 0.493767 / 0.999845
        (500, 0.493844),
        (249, 0.848133),
        (999, 2.42877e-06),
    ],
)
def test_alpha_bar(t, expected):
    assert alpha_bar(t) == pytest.approx(expected, rel=1e-5)


def test_schedule_of_mixed_steps_waits_at_the_start():
    s = schedule(np.array([4, 1]))
    assert s.step[:, :, 0].tolist() == [[999, 999], [749, 999], [499, 999], [249, 999]]
    assert (s.alpha_now[:3, 1] == s.alpha_next[:3, 1]).all()
    assert s.alpha_next[3].tolist() == [[1.0], [1.0]]
    assert s.step.dtype == np.int32
    assert s.alpha_now.dtype == s.alpha_next.dtype == np.float32


def test_waiting_leaves_the_noise_as_it_is():
    s_t = torch.from_numpy(noise(np.array([3]), (8, 8)))
    alpha = torch.full((1, 1), alpha_bar(999))
    unchanged = Denoiser.update(torch.rand(1, 1, 8, 8), s_t, alpha, alpha)
    assert torch.allclose(unchanged, s_t, atol=1e-5)


def test_update_is_equation_3_58():
    # S_0 = 0.75 is 0.5 in [-1, 1]; alphas 0.36 and 0.64: noise = (1 - 0.6 * 0.5) / 0.8 = 0.875,
    # S_next = 0.8 * 0.5 + 0.6 * 0.875 = 0.925
    tensors = [torch.full(shape, x) for shape, x in (((1, 1, 1, 1), 0.75), ((1, 1, 1, 1), 1.0))]
    alphas = [torch.full((1, 1), x) for x in (0.36, 0.64)]
    assert Denoiser.update(*tensors, *alphas).item() == pytest.approx(0.925, rel=1e-6)


def test_noise_is_philox_keyed_with_each_seed():
    maps = noise(np.array([7, 8]), (5, 6))
    expected = np.random.Generator(np.random.Philox(key=7)).standard_normal((1, 5, 6), np.float32)
    assert maps.dtype == np.float32
    assert maps.shape == (2, 1, 5, 6)
    assert (maps[0] == expected).all()
    assert not (maps[1] == expected).any()
    with pytest.raises(UserError, match="seed -1"):
        noise(np.array([-1]), (5, 6))
