"""Geometry against hand-worked numbers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mubic_deploy.errors import UserError
from mubic_deploy.media.fit import BAR, make_fit

FULL = (224, 384)


@pytest.mark.parametrize(
    ("name", "display", "scaled", "corner"),
    [
        ("letterbox", (720, 1280), (216, 384), (4, 0)),  # 384/1280 = 0.3
        ("letterbox", (1280, 720), (224, 126), (0, 129)),  # 224/1280 = 0.175
        ("letterbox", (480, 640), (224, 299), (0, 42)),  # 640 * 224/480 = 298.7
        ("crop", (720, 1280), (224, 398), (0, -7)),  # 1280 * 224/720 = 398.2
        ("crop", (1280, 720), (683, 384), (-230, 0)),  # 1280 * 384/720 = 682.7, (224 - 683) // 2
        ("stretch", (123, 77), FULL, (0, 0)),
    ],
)
def test_sizes(name, display, scaled, corner):
    fit = make_fit(name, display, FULL)
    assert fit.scaled == scaled
    assert fit.corner == corner


def test_letterbox_bars_are_grey_and_only_outside():
    fit = make_fit("letterbox", (720, 1280), FULL)
    out = fit.place(np.full((216, 384, 3), 200, np.uint8))
    assert (out[:4] == BAR).all()
    assert (out[220:] == BAR).all()
    assert (out[4:220] == 200).all()


def test_crop_keeps_the_centre():
    fit = make_fit("crop", (720, 1280), FULL)
    frame = np.repeat(np.arange(398, dtype=np.int64)[None, :, None] % 256, 224, 0).astype(np.uint8).repeat(3, 2)
    out = fit.place(frame)
    assert out.shape == (224, 384, 3)
    assert out[0, 0, 0] == 7
    assert out[0, 383, 0] == (7 + 383) % 256


def test_letterbox_map_back_cuts_the_bars_off():
    fit = make_fit("letterbox", (720, 1280), FULL)
    saliency = np.full((112, 192), 9, np.float32)  # 9 where the bars are
    saliency[2:110] = 0.25
    back = fit.back(saliency)
    assert back.shape == (216, 384)
    np.testing.assert_allclose(back, 0.25, atol=1e-6)


def test_crop_map_back_is_zero_where_nothing_was_seen():
    fit = make_fit("crop", (720, 1280), FULL)
    back = fit.back(np.ones((112, 192), np.float32))
    # 7 of 398 columns are cut on each side: map columns with centres below 7 * 384 / 398 = 6.75
    assert (back[:, :6] == 0).all()
    assert (back[:, -6:] == 0).all()
    np.testing.assert_allclose(back[:, 8:-8], 1, atol=1e-6)


def test_stretch_map_back_is_torch_bilinear():
    """F.interpolate(align_corners=False) is the same convention, written by others."""
    saliency = np.random.default_rng(0).random((112, 192), np.float32)
    for display in ((224, 384), (300, 200), (720, 1280)):
        fit = make_fit("stretch", display, FULL)
        want = torch.nn.functional.interpolate(torch.from_numpy(saliency)[None, None], fit.map_shape, mode="bilinear")
        np.testing.assert_allclose(fit.back(saliency), want[0, 0].numpy(), atol=2e-5)


def test_map_back_by_hand():
    """Two map pixels over four film pixels: centres fall at 0.25, 0.75, 1.25, 1.75 of the map."""
    fit = make_fit("stretch", (2, 4), (2, 4))
    back = fit.back(np.array([[0.0, 1.0]], np.float32))
    np.testing.assert_allclose(back, [[0, 0.25, 0.75, 1]] * 2, atol=1e-6)


@pytest.mark.parametrize("name", ["letterbox", "crop", "stretch"])
@pytest.mark.parametrize("display", [(720, 1280), (1280, 720), (99, 101), (50, 2000), (3, 5)])
def test_a_spot_comes_back_where_it_was(name, display):
    """A linear ramp over the frame, resized into the input and back as a map, is the ramp over the map."""
    fit = make_fit(name, display, FULL)
    h, w = fit.map_shape
    rows, columns = [(np.arange(n) + 0.5) / n for n in fit.scaled]
    ramp = np.zeros((*fit.scaled, 3), np.uint8)
    ramp[..., 0] = np.rint(rows * 250)[:, None]
    ramp[..., 1] = np.rint(columns * 250)
    placed = fit.place(ramp).astype(np.float32) / 250
    small = placed.reshape(112, 2, 192, 2, 3).mean((1, 3))
    ys, xs = [(np.arange(n) + 0.5) / n for n in (h, w)]
    inside = fit.back(np.ones((112, 192), np.float32)) > 0.999
    # away from the edges, where the last map pixel may straddle a bar
    pixel = [2.5 / n for n in fit.scaled]
    inside &= ((ys > pixel[0]) & (ys < 1 - pixel[0]))[:, None] & ((xs > pixel[1]) & (xs < 1 - pixel[1]))
    assert name == "crop" or inside.any() or min(fit.scaled) < 6
    np.testing.assert_allclose(fit.back(small[..., 0])[inside], np.broadcast_to(ys[:, None], (h, w))[inside], atol=0.02)
    np.testing.assert_allclose(fit.back(small[..., 1])[inside], np.broadcast_to(xs, (h, w))[inside], atol=0.02)


def test_unknown_fit():
    with pytest.raises(UserError, match=r"'zoom'.*letterbox, stretch, crop"):
        make_fit("zoom", (10, 10), FULL)


SPINNING = """
import time
import numpy as np
from mubic_deploy.live.measures import measure
from mubic_deploy.media.fit import make_fit
from mubic_deploy.metrics import cc
fit = make_fit("letterbox", (720, 1280), (112, 192))
saliency = np.random.default_rng(0).random((56, 96), np.float32)
rested = 0.0
for _ in range(20):
    saliencies = fit.back(saliency, (720, 1280)), fit.back(saliency, (720, 1280))
    measure(fit.back(saliency)), cc(*saliencies)
    began = time.process_time()
    time.sleep(0.1)
    rested += time.process_time() - began
print(rested)
"""


def test_nothing_spins_when_a_map_is_made() -> None:
    """As the threads of NumPy's BLAS do after a product, on cores that a model, or a server, could have."""
    threads = {"OPENBLAS_NUM_THREADS": "2", "OMP_NUM_THREADS": "2"}
    environment = os.environ | threads | {"PYTHONPATH": str(Path(__file__).parents[1])}
    ran = subprocess.run([sys.executable, "-c", SPINNING], env=environment, capture_output=True, text=True, check=True)
    assert float(ran.stdout) < 0.1  # of 2 s at rest
