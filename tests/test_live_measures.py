"""A map's numbers, worked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from mubic_deploy.live.measures import measure


def test_a_point() -> None:
    saliency = np.zeros((64, 128), np.float32)
    saliency[16, 96] = 0.75
    found = measure(saliency)
    assert found.peak == (96.5 / 128, 16.5 / 64, 0.75)
    assert found.centroid == pytest.approx((96.5 / 128, 16.5 / 64))
    assert found.entropy == 0
    assert found.box == (96 / 128, 16 / 64, 4 / 128, 2 / 64)  # one cell of 32 x 32


def test_two_areas() -> None:
    """One of 3/4 of the mass in 4 x 8 pixels, and one of 1/4: half the mass is two thirds of the first one."""
    saliency = np.zeros((32, 32), np.float32)
    saliency[4:8, 2:8] = 0.5  # 24 pixels: 12
    saliency[20:28, 20:24] = 0.125  # 32 pixels: 4
    found = measure(saliency)
    assert found.peak == (2.5 / 32, 4.5 / 32, 0.5)
    assert found.centroid == pytest.approx(((0.75 * 5 + 0.25 * 22) / 32, (0.75 * 6 + 0.25 * 24) / 32))
    # 24 pixels of 1/32 each, 32 of 1/128 each, over log 1024
    expected = (24 / 32 * np.log(32) + 32 / 128 * np.log(128)) / np.log(1024)
    assert found.entropy == pytest.approx(expected)
    x, y, width, height = found.box
    assert width * height * 1024 == 16  # 4 x 4 of the first area
    assert 2 <= 32 * x <= 8 - 32 * width
    assert (y, height) == (4 / 32, 4 / 32)


def test_everywhere_the_same() -> None:
    for value in (0.0, 0.25):
        found = measure(np.full((56, 96), value, np.float32))
        assert found.centroid == pytest.approx((0.5, 0.5))
        assert found.entropy == pytest.approx(1)
        assert found.box[2] * found.box[3] == pytest.approx(0.5, abs=0.04)
    assert measure(np.ones((1, 1), np.float32)).box == (0, 0, 1, 1)
