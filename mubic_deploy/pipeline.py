"""The chain of the four graphs with the DDIM loop around the denoiser, in process (thesis, Algorithm 2)."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np

from mubic_deploy import graphs
from mubic_deploy.config import DEMO_CHECKPOINT, Config
from mubic_deploy.diffusion import noise, schedule
from mubic_deploy.engines import Arrays, Engine
from mubic_deploy.errors import UserError


class Predictor(Protocol):
    """Anything that turns clips into maps: the pipeline here, or a Triton server far away."""

    config: Config

    def predict(
        self, video: np.ndarray, audio: np.ndarray, seed: np.ndarray | int = 0, steps: np.ndarray | int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """See `Pipeline.predict`."""
        ...


def request(
    config: Config, video: np.ndarray, audio: np.ndarray, seed: np.ndarray | int, steps: np.ndarray | int | None
) -> Arrays:
    """The arrays of one call, checked: VIDEO, AUDIO (if the variant hears), SEED and STEPS, all [B, ...]."""
    batch = len(video)
    if batch == 0:
        raise UserError("there is no clip in the batch: give at least one")
    given = {"SEED": seed, "STEPS": config.default_steps if steps is None else steps}
    arrays = {"VIDEO": video, "AUDIO": audio}
    for tensor in graphs.settings():
        try:
            values = np.broadcast_to(np.asarray(given[tensor.name], tensor.dtype), batch)
        except (ValueError, OverflowError, TypeError):
            raise UserError(f"{tensor.name} must be one {tensor.dtype} for all or {batch}, one a clip") from None
        arrays[tensor.name] = values[:, None]
    for n in np.unique(arrays["STEPS"]):
        config.check_steps(int(n))
    arrays = {t.name: t.check(arrays[t.name]) for t in graphs.pipeline(config).inputs}
    if len({len(array) for array in arrays.values()}) > 1:
        raise UserError(f"VIDEO has {batch} clips and AUDIO {len(audio)}: give as many of both")
    return arrays


def sample(config: Config, denoiser: Engine, cond: Arrays, seed: np.ndarray, steps: np.ndarray) -> Arrays:
    """The DDIM loop. cond: COND and ADAPTIVE_STEPS [B, 1]; seed int64 [B, 1]; steps int32 [B, 1], 0 for adaptive
    -> SALIENCY float32 [B, h, w] and STEPS_USED int32 [B, 1]."""
    used = np.where(steps > 0, steps, cond["ADAPTIVE_STEPS"]).astype(np.int32)
    inputs = {t.name: cond[t.name] for t in graphs.conditioning(config)}
    inputs["S_T"] = noise(seed[:, 0], config.map_size)
    for step, alpha_now, alpha_next in zip(*schedule(used[:, 0]), strict=True):
        outputs = denoiser({**inputs, "STEP": step, "ALPHA_NOW": alpha_now, "ALPHA_NEXT": alpha_next})
        inputs["S_T"] = outputs["S_NEXT"]
    return {"SALIENCY": outputs["S_0"][:, 0], "STEPS_USED": used}


class Pipeline:
    """Clips in, saliency maps out. `engines` holds one engine for each graph of `config`; max_batch: clips that they
    take at once, if there is a limit."""

    def __init__(self, config: Config, engines: dict[str, Engine], max_batch: int | None = None) -> None:
        self.config = config
        self.engines = engines
        self.max_batch = max_batch

    @classmethod
    def open(
        cls,
        source: str | Path = DEMO_CHECKPOINT,
        engine: str = "onnxruntime",
        variant: str | None = None,
        seed: int = 0,
    ) -> Pipeline:
        """The pipeline of a folder of exported graphs or of a checkpoint (see `checkpoint.load`), which is exported
        first if it was not before. engine: onnxruntime; eager, which takes a checkpoint; tensorrt, which takes a folder
        of engines. variant and seed: of random weights. UserError for a source or an engine that is none."""
        if engine == "eager":
            from mubic_deploy import checkpoint
            from mubic_deploy.engines import eager

            model, _ = checkpoint.load(str(source), variant, seed)
            return cls(model.config, eager.load_engines(model))
        if engine == "tensorrt":
            from mubic_deploy.engines import tensorrt

            plans = tensorrt.Plans.open(Path(source))
            return cls(plans.config, tensorrt.load_engines(plans), plans.max_batch)
        if engine != "onnxruntime":
            raise UserError(f"unknown engine {engine!r}: use onnxruntime, eager or tensorrt")
        from mubic_deploy import exported
        from mubic_deploy.artifacts import Artifacts
        from mubic_deploy.engines import onnxruntime

        folder = Path(source).is_dir()
        artifacts = Artifacts.open(Path(source)) if folder else exported.cached(str(source), variant, seed)
        return cls(artifacts.config, onnxruntime.load_engines(artifacts))

    def predict(
        self, video: np.ndarray, audio: np.ndarray, seed: np.ndarray | int = 0, steps: np.ndarray | int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """video uint8 [B, 16, H, W, 3], RGB; audio float32 [B, 16608], 16 kHz in [-1, 1] (ignored by visual_only);
        seed [B] or one for all; steps 1 to 12, or 0 for adaptive, [B] or one for all, None for the default
        -> saliency float32 [B, h, w] in [0, 1] for the middle frame, and the steps used, int32 [B, 1].

        The same clip and seed give the same map in every engine. A batch that is larger than the engines take goes in
        parts. UserError for a wrong shape, dtype, seed or step."""
        arrays = request(self.config, video, audio, seed, steps)
        size = self.max_batch or len(video)
        results = []
        for first in range(0, len(video), size):
            part = {name: array[first : first + size] for name, array in arrays.items()}
            cond = self.condition(part)
            results.append(sample(self.config, self.engines["denoiser"], cond, part["SEED"], part["STEPS"]))
        if len(results) == 1:
            return results[0]["SALIENCY"], results[0]["STEPS_USED"]
        return tuple(np.concatenate([part[name] for part in results]) for name in ("SALIENCY", "STEPS_USED"))

    def condition(self, arrays: Arrays) -> Arrays:
        """Encoders and fusion: VIDEO and AUDIO -> COND, ENTROPY and ADAPTIVE_STEPS. Runs once a clip."""
        features = self.engines["visual_encoder"](arrays)
        if self.config.has_audio:
            features |= self.engines["audio_encoder"](arrays)
        return self.engines["fusion"](features)
