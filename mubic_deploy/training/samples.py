"""Pictures of what a model predicts: frame, truth and prediction of some clips, a row each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from mubic_deploy.folders import replacing_file
from mubic_deploy.media.heat import blend_rgb
from mubic_deploy.pipeline import Predictor
from mubic_deploy.training.clips import Clips

GAP = 4  # pixels


def draw(predictor: Predictor, clips: Clips, indices: Sequence[int], seed: int = 0) -> np.ndarray:
    """uint8 [height, width, 3]: a row a clip with its middle frame, the true map over it, the predicted one over it."""
    rows = []
    for index in indices:
        item = clips[index]
        video = item["VIDEO"].numpy()
        saliency, _ = predictor.predict(video[None], item["AUDIO"].numpy()[None], seed)
        frame = video[clips.config.middle]
        pictures = [frame, *(blend_rgb(frame, _grown(m, frame)) for m in (item["TARGET"][0].numpy(), saliency[0]))]
        rows.append(np.concatenate([np.pad(p, ((0, GAP), (0, GAP), (0, 0)), constant_values=255) for p in pictures], 1))
    return np.concatenate(rows)


def save(picture: np.ndarray, path: Path) -> None:
    """As a PNG, whole or not at all. OSError if it cannot be written."""
    path.parent.mkdir(exist_ok=True)
    with replacing_file(path) as part:
        Image.fromarray(picture).save(part, format="PNG")


def _grown(saliency: np.ndarray, frame: np.ndarray) -> np.ndarray:
    size = (frame.shape[1], frame.shape[0])
    return np.clip(
        np.asarray(Image.fromarray(saliency.astype(np.float32)).resize(size, Image.Resampling.BILINEAR)), 0, 1
    )
