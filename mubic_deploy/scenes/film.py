"""One scene as a film: what a folder of scenes holds as pictures and a WAV file, to be watched and predicted."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np

from mubic_deploy.config import SAMPLE_RATE
from mubic_deploy.scenes.picture import Painter
from mubic_deploy.scenes.plan import FPS, HEIGHT, WIDTH, make_plan, streams
from mubic_deploy.scenes.sound import synthesize


def write_film(path: Path, seed: int, index: int = 0, seconds: float = 6.0) -> None:
    """The pictures and the sound of scene `index` of `seed` as H.264 and AAC, the same scene as in the folder that
    `write_scenes` makes with this seed and length. OSError if it cannot be written."""
    for_plan, for_pictures, for_sound, _ = streams(seed, index)
    plan = make_plan(for_plan, seconds)
    painter = Painter(plan, for_pictures)
    with av.open(path, "w") as output:
        pictures = output.add_stream("libx264", rate=FPS, options={"crf": "14", "preset": "veryfast"})
        pictures.width, pictures.height, pictures.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        sound = output.add_stream("aac", rate=SAMPLE_RATE, layout="mono", bit_rate=64_000)
        samples = av.AudioFrame.from_ndarray(synthesize(plan, for_sound)[None], format="fltp", layout="mono")
        samples.sample_rate, samples.pts = SAMPLE_RATE, 0
        output.mux(sound.encode(samples))
        output.mux(sound.encode(None))
        for i in range(plan.frames):
            output.mux(pictures.encode(av.VideoFrame.from_ndarray(np.asarray(painter.frame(i)), format="rgb24")))
        output.mux(pictures.encode(None))
