"""The chain of the four graphs with the DDIM loop around the denoiser, in process (thesis, Algorithm 2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

import numpy as np

from mubic_deploy import graphs
from mubic_deploy.artifacts import Artifacts, Folder
from mubic_deploy.config import DEMO_CHECKPOINT, RANDOM, Config, weights_seed
from mubic_deploy.diffusion import noise, schedule
from mubic_deploy.engines import Array, Arrays, Engine, HostArrays, cpu, fetching
from mubic_deploy.errors import UserError, shown

EAGER = ("eager", "eager-cuda")
AOTINDUCTOR, TENSORRT = "aotinductor", "tensorrt"
Item = TypeVar("Item")
Allocate = Callable[[tuple[int, ...], np.dtype], np.ndarray]
ALLOCATE: Allocate = np.empty
LOUDEST = 8  # times full scale: a mix may exceed it a little, samples of 16 bits that were not scaled by far
ENGINES = (*cpu.ENGINES, "onnxruntime-cuda", *EAGER, AOTINDUCTOR, TENSORRT)


class StepsError(UserError):
    """What the model chose is no number of steps: its weights are at fault, or sound that nobody looked at."""


class Predictor(Protocol):
    """Anything that turns clips into maps: the pipeline here, or a Triton server far away."""

    config: Config
    default_steps: int  # what steps = None stands for

    def predict(
        self, video: np.ndarray, audio: np.ndarray, seed: np.ndarray | int = 0, steps: np.ndarray | int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """See `Pipeline.predict`."""
        ...


def request(
    config: Config, video: np.ndarray, audio: np.ndarray, seed: np.ndarray | int, steps: np.ndarray | int
) -> HostArrays:
    """The arrays of one call, checked: VIDEO, AUDIO (if the variant hears), SEED and STEPS, all [B, ...]."""
    batch = len(graphs.video(config).check(video))
    if batch == 0:
        raise UserError("there is no clip in the batch: give at least one")
    given = {"SEED": seed, "STEPS": steps}
    ranges = {"SEED": "0 to 2^63 - 1", "STEPS": f"1 to {config.max_steps}, or 0 for adaptive"}
    arrays: HostArrays = {"VIDEO": video, "AUDIO": audio}
    for tensor in graphs.settings():
        try:
            values = np.broadcast_to(np.asarray(given[tensor.name], tensor.dtype), batch)
            if (values != np.asarray(given[tensor.name])).any():  # 4.5 steps, say
                raise ValueError
        except (ValueError, OverflowError, TypeError):
            raise UserError(
                f"{tensor.name} cannot be {shown(given[tensor.name])}: give one whole number for all clips, or "
                f"{batch}, one a clip: {ranges[tensor.name]}"
            ) from None
        arrays[tensor.name] = values[:, None].copy()
    for n in np.unique(arrays["STEPS"]):
        config.check_steps(int(n))
    arrays = {t.name: t.check(arrays[t.name]) for t in graphs.pipeline(config).inputs}
    if len({len(array) for array in arrays.values()}) > 1:
        raise UserError(f"VIDEO has {batch} clips and AUDIO {len(audio)}: give as many of both")
    if "AUDIO" in arrays:
        check_sound(arrays["AUDIO"])
    return arrays


def check_sound(audio: np.ndarray, name: str = "AUDIO") -> None:
    """UserError for sound that is not finite or was not scaled: a map of it would look like any other."""
    if not np.isfinite(audio).all():
        raise UserError(f"{name} holds NaN or infinite samples: give -1 to 1, and 0 where there is no sound")
    if (peak := np.abs(audio).max(initial=0)) > LOUDEST:
        raise UserError(f"{name} reaches {peak:.4g}, as integers do: scale it to -1 to 1")


def sample(config: Config, denoiser: Engine, cond: Arrays, seed: np.ndarray, steps: np.ndarray) -> HostArrays:
    """The DDIM loop. cond: COND and ADAPTIVE_STEPS [B, 1]; seed int64 [B, 1]; steps int32 [B, 1], 0 for adaptive
    -> SALIENCY float32 [B, h, w] and STEPS_USED int32 [B, 1]. UserError as of `chosen_steps`."""
    s_0, used = loop(config, denoiser, cond, seed, steps)
    return {"SALIENCY": np.asarray(s_0)[:, 0], "STEPS_USED": used}


def loop(
    config: Config, denoiser: Engine, cond: Arrays, seed: np.ndarray, steps: np.ndarray
) -> tuple[Array, np.ndarray]:
    """As `sample`, but the map is S_0 [B, 1, h, w] where the denoiser left it."""
    inputs = {t.name: cond[t.name] for t in graphs.conditioning(config)}
    inputs["S_T"] = noise(seed[:, 0], config.map_size)
    used = steps
    if not (steps > 0).all():  # or a GPU would be waited for
        used = chosen_steps(config, steps, np.asarray(cond["ADAPTIVE_STEPS"]))
    for step, alpha_now, alpha_next in zip(*schedule(used[:, 0]), strict=True):
        outputs = denoiser({**inputs, "STEP": step, "ALPHA_NOW": alpha_now, "ALPHA_NEXT": alpha_next})
        inputs["S_T"] = outputs["S_NEXT"]
    return outputs["S_0"], used


def chosen_steps(config: Config, steps: np.ndarray, adaptive: np.ndarray) -> np.ndarray:
    """steps int32 [B, 1], 0 for adaptive, and ADAPTIVE_STEPS [B, 1] -> those of each clip, int32 [B, 1]. StepsError if
    ADAPTIVE_STEPS is taken and out of range, as it is made of features that are not finite."""
    used = np.where(steps > 0, steps, adaptive).astype(np.int32)
    if not ((used >= 1) & (used <= config.max_steps)).all():
        raise StepsError(f"ADAPTIVE_STEPS is out of range: it must be 1 to {config.max_steps}, or give STEPS")
    return used


def stacked(predictor: Predictor, arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Clips' frames or sounds as one batch, where `predictor` takes it from fastest."""
    allocate = predictor.allocate if isinstance(predictor, Pipeline) else ALLOCATE
    return np.stack(arrays, out=allocate((len(arrays), *arrays[0].shape), arrays[0].dtype))


def one_ahead(items: Iterable[Item]) -> Iterator[Item]:
    """The same, each when the next one was made."""
    iterator = iter(items)
    for held in iterator:
        for item in iterator:
            yield held
            held = item
        yield held


class Pipeline:
    """Clips in, saliency maps out.

    engines      one for each graph of `config`
    max_batch    clips that they take at once, if there is a limit
    fixed_steps  of the sampler, if there is one among them: it takes the loop's place where a batch asks for so many
    source       of the weights, as `checkpoint.Source.to_json` says it
    conditioner  encoders and fusion as one, if there is such an engine: it takes their place
    allocate     makes arrays from which the engines take clips fastest: of a shape and a dtype, not initialised. They
                 are read where they are: to be kept, and left as they are, until a result has been fetched"""

    def __init__(
        self,
        config: Config,
        engines: Mapping[str, Engine],
        max_batch: int | None = None,
        fixed_steps: int | None = None,
        source: Mapping[str, Any] = MappingProxyType({}),
        conditioner: Engine | None = None,
        allocate: Allocate = ALLOCATE,
    ) -> None:
        self.config = config
        self.default_steps = config.default_steps
        self.engines = engines
        self.max_batch = max_batch
        self.fixed_steps = fixed_steps
        self.source = source
        self.conditioner = conditioner
        self.allocate = allocate

    @classmethod
    def open(
        cls,
        source: str | Path = DEMO_CHECKPOINT,
        engine: str = cpu.ENGINES[0],
        variant: str | None = None,
        seed: int | None = None,
        cuda_graphs: bool = True,
    ) -> Pipeline:
        """The pipeline of one of ENGINES. source, by engine:

        openvino, onnxruntime, onnxruntime-cuda  a folder of exported graphs, or a checkpoint (see `checkpoint.load`),
                                                 which is exported first if it was not before; of a folder that is
                                                 called demo give the Path, or ./demo
        eager, eager-cuda                        a checkpoint; PyTorch in FP32, on the CPU or the first NVIDIA GPU
        aotinductor                              a folder of compiled packages
        tensorrt                                 a folder of plans

        variant: of random weights, or that the source must be of. seed: of the random weights of a checkpoint
        (default 0). cuda_graphs: whether a GPU replays a batch size's kernels as one launch a graph, or a part of it.
        UserError for a source or an engine that is none, of another variant, or that this machine cannot run; for a
        seed where there is nothing to draw. ModuleNotFoundError where a package of the engine's extra is missing."""
        folder: Folder
        engines: Mapping[str, Engine]
        conditioner, allocate = None, ALLOCATE
        # a string is a checkpoint's name first, as wherever one is named; a Path is a folder where there is one
        named = isinstance(source, str) and (source == DEMO_CHECKPOINT or source.startswith(RANDOM))
        is_folder = Path(source).is_dir() and not named
        if is_folder or engine in (AOTINDUCTOR, TENSORRT):
            weights_seed(source, seed)
        if engine in EAGER:
            from mubic_deploy import checkpoint
            from mubic_deploy.engines import eager

            device: Any = "cpu"
            if engine == "eager-cuda":
                device, allocate = eager.gpu(), eager.pinned_array
            model, weights = checkpoint.load(str(source), variant, seed)
            with eager.enough_memory("the model"):
                model.to(device)
            return cls(model.config, eager.load_engines(model), source=weights.to_json(), allocate=allocate)
        if engine == TENSORRT:
            from mubic_deploy.engines import tensorrt

            folder = plans = tensorrt.Plans.open(Path(source), variant)
            engines, max_batch = tensorrt.load_engines(plans, cuda_graphs), plans.max_batch
        elif engine == AOTINDUCTOR:
            from mubic_deploy.engines import aotinductor, eager

            folder = packages = aotinductor.Packages.open(Path(source), variant)
            engines = compiled = aotinductor.load_engines(packages, cuda_graphs)
            conditioner, max_batch = aotinductor.load_conditioner(packages, compiled), packages.max_batch
            if packages.device.type == "cuda":
                allocate = eager.pinned_array
        elif engine in ENGINES:
            from mubic_deploy import exported

            if is_folder:
                folder = artifacts = Artifacts.open(Path(source), variant)
            else:
                folder = artifacts = exported.cached(str(source), variant, seed)
            max_batch = None
            if engine in cpu.ENGINES:
                engines = cpu.load_engines(engine, artifacts)
            else:
                from mubic_deploy.engines import onnxruntime

                engines = onnxruntime.load_cuda_engines(artifacts, cuda_graphs)
        else:
            raise UserError(f"unknown engine {engine!r}: use {', '.join(ENGINES)}")
        return cls(folder.config, engines, max_batch, folder.fixed_steps, folder.source, conditioner, allocate)

    def predict(
        self, video: np.ndarray, audio: np.ndarray, seed: np.ndarray | int = 0, steps: np.ndarray | int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """video uint8 [B, 16, H, W, 3], RGB; audio float32 [B, 16608], 16 kHz in [-1, 1] (ignored by visual_only);
        seed [B] or one for all; steps 1 to `config.max_steps` (12, or 1 of no_diffusion), or 0 for adaptive, [B] or one
        for all, None for the default
        -> saliency float32 [B, h, w] in [0, 1] for the middle frame, and the steps used, int32 [B, 1].

        The same clip and seed give the same map in every engine. A batch that is larger than the engines take goes in
        parts; AOTInductor's on a GPU gets the next while it computes one. Threads may share a pipeline on a CPU; on a
        GPU one thread calls it at a time. UserError for a wrong shape, dtype, seed or step, or sound that is not
        finite or was not scaled (above 8 times full scale).

        On a GPU clips go up fastest from what `allocate` made."""
        arrays = request(self.config, video, audio, seed, self.default_steps if steps is None else steps)
        size = self.max_batch or len(video)
        if len(video) <= size:
            saliency, used = self._sampled(arrays)
            return np.asarray(saliency).reshape(-1, *self.config.map_size), used
        places = [slice(first, first + size) for first in range(0, len(video), size)]
        results = (self._sampled({name: array[place] for name, array in arrays.items()}) for place in places)
        maps = np.empty((len(video), *self.config.map_size), np.float32)
        steps_used = np.empty((len(video), 1), np.int32)
        for place, (fetch, used) in zip(places, one_ahead((fetching(s), used) for s, used in results), strict=True):
            maps[place] = fetch().reshape(-1, *self.config.map_size)
            steps_used[place] = used
        return maps, steps_used

    def condition(self, arrays: Arrays) -> Arrays:
        """Encoders and fusion: VIDEO and AUDIO -> COND, ENTROPY and ADAPTIVE_STEPS. Runs once a clip. A GPU may be at
        work still when it returns: see `allocate` and `DeviceArray`."""
        if self.conditioner is not None:
            return self.conditioner(arrays)
        features: Arrays = {}
        if self.config.has_audio:  # first: a GPU listens while the host prepares the frames
            features = self.engines["audio_encoder"](arrays)
        return self.engines["fusion"]({**features, **self.engines["visual_encoder"](arrays)})

    def _sampled(self, arrays: HostArrays) -> tuple[Array, np.ndarray]:
        """A batch's maps, as the engines leave them: float32 [B, h, w] or [B, 1, h, w]; and the steps used."""
        cond, seed, steps = self.condition(arrays), arrays["SEED"], arrays["STEPS"]
        if self.fixed_steps is None or (steps != self.fixed_steps).any():
            return loop(self.config, self.engines["denoiser"], cond, seed, steps)
        outputs = self.engines[graphs.SAMPLER]({**cond, "S_T": noise(seed[:, 0], self.config.map_size)})
        return outputs["SALIENCY"], steps
