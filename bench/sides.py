"""Who is measured: our engines, and what a user would take instead.

Each makes a pipeline that predicts the same maps from the same weights with the same number of threads. What cannot be
had here is left out with the reason, never replaced."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import nn

from bench import text
from bench.timing import Side
from mubic_deploy import checkpoint, exported, graphs
from mubic_deploy.artifacts import Artifacts
from mubic_deploy.config import DEFAULT_STEPS, DEMO_CHECKPOINT, Config, get_config
from mubic_deploy.engines import Arrays, Engine, cpu, eager
from mubic_deploy.errors import UserError
from mubic_deploy.graphs import Signature, saliency_map, signatures
from mubic_deploy.model.mubic import MUBiC
from mubic_deploy.parity import random_clip
from mubic_deploy.pipeline import Pipeline, Predictor, request, sample
from mubic_deploy.sources import load_script, source_dir

CLIPS, BATCHES = 8, 3  # random inputs that take turns

Say = Callable[[str], None]


@dataclass
class Context:
    """What all sides of a run share. size: full or demo; threads: of every side; folder: for graphs that are thrown
    away; say: told what takes long; count: told the side that is timed, and how many calls of how many are done;
    addresses: HOST:PORT of a server that runs already, by protocol."""

    size: str
    threads: int
    folder: Path
    say: Say = lambda text: None
    count: Callable[[str, int, int], None] = lambda *_: None
    addresses: Mapping[str, str] = field(default_factory=dict)

    @property
    def config(self) -> Config:
        return get_config(self.size)

    @property
    def checkpoint(self) -> str:
        """The one that ships, or random weights of the other size: time does not depend on them."""
        return DEMO_CHECKPOINT if self.size == "demo" else f"random:{self.size}"

    @functools.cached_property
    def artifacts(self) -> Artifacts:
        """The exported graphs, cached."""
        return exported.cached(self.checkpoint, progress=lambda text, *_: self.say(text))

    @functools.cached_property
    def clips(self) -> list[dict[str, np.ndarray]]:
        return [random_clip(self.config, seed) for seed in range(CLIPS)]

    @functools.cached_property
    def sampler(self) -> Path:
        """The loop of the default steps as one graph, of the same weights."""
        self.say("exporting the sampler")
        path = self.folder / "sampler.onnx"
        signature = signatures(self.config, sampler=True)[graphs.SAMPLER]
        onnx_graphs().trace(self.model().graph(graphs.SAMPLER, DEFAULT_STEPS), signature, path)
        return path

    def model(self, folded: bool = True) -> MUBiC:
        """A new one of these weights. folded=False: with torchvision's attention."""
        model, _ = checkpoint.load(self.checkpoint)
        if not folded:
            weights = model.state_dict()
            model = MUBiC(self.config, folded=False)
            model.load_state_dict(weights)
        return model.eval()


def onnx_graphs() -> ModuleType:
    return load_script(source_dir("export") / "onnx_graphs.py")


def call(context: Context, predictor: Predictor, steps: int | None = None) -> Side:
    """One clip after the other through a predictor."""
    return asking(context.clips, predictor, steps)


def asking(clips: Sequence[Mapping[str, np.ndarray]], predictor: Predictor, steps: int | None = None) -> Side:
    """As `call`, for clips of one's own."""

    def predict(i: int) -> None:
        clip = clips[i % len(clips)]
        predictor.predict(clip["VIDEO"], clip["AUDIO"], i, steps)

    return predict


def batches(context: Context, predictor: Predictor, batch: int) -> Side:
    """One batch of random clips after the other."""
    clips = [random_clip(context.config, seed, batch) for seed in range(BATCHES)]

    def predict(i: int) -> None:
        clip = clips[i % BATCHES]
        predictor.predict(clip["VIDEO"], clip["AUDIO"], i)

    return predict


def moved_bytes(signature: Signature, weights: int) -> float:
    """What must pass through memory for one clip: weights, inputs and outputs, once. weights: their bytes."""
    tensors = (*signature.inputs, *signature.outputs)
    return float(weights + sum(t.nbytes for t in tensors))


class Reencoding:
    """A pipeline that runs encoders and fusion at every step, as DiffSal's released sampler does."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline, self.config, self.default_steps = pipeline, pipeline.config, pipeline.default_steps

    def predict(
        self, video: np.ndarray, audio: np.ndarray, seed: np.ndarray | int = 0, steps: np.ndarray | int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `Pipeline.predict`."""
        arrays = request(self.config, video, audio, seed, self.default_steps if steps is None else steps)
        first = self.pipeline.condition(arrays)
        waiting = [first]

        def denoiser(inputs: Arrays) -> Arrays:
            cond = waiting.pop() if waiting else self.pipeline.condition(arrays)
            return self.pipeline.engines["denoiser"]({**inputs, **{t.name: cond[t.name] for t in of_cond}})

        of_cond = graphs.conditioning(self.config)
        out = sample(self.config, denoiser, first, arrays["SEED"], arrays["STEPS"])  # type: ignore[arg-type]
        return out["SALIENCY"], out["STEPS_USED"]


class Monolith(nn.Module):
    """The whole inference as one module: media and noise in, the map out."""

    def __init__(self, model: MUBiC, steps: int = DEFAULT_STEPS) -> None:
        super().__init__()
        self.model, self.sampler = model, model.graph(graphs.SAMPLER, steps)

    def forward(self, VIDEO: torch.Tensor, AUDIO: torch.Tensor, S_T: torch.Tensor) -> tuple[torch.Tensor]:
        features = [*self.model.visual_encoder(VIDEO), *self.model.audio_encoder(AUDIO)]
        *cond, _entropy, _steps = self.model.fusion(*features)
        return self.sampler(*cond, S_T)


class WholeGraph:
    """A monolith's session as a predictor of a fixed number of steps."""

    def __init__(self, config: Config, engine: Engine) -> None:
        self.config, self.default_steps, self.engine = config, config.default_steps, engine

    def predict(
        self, video: np.ndarray, audio: np.ndarray, seed: np.ndarray | int = 0, steps: np.ndarray | int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `Pipeline.predict`, for the default steps."""
        from mubic_deploy.diffusion import noise

        seeds = np.broadcast_to(np.asarray(seed, np.int64), len(video))
        out = self.engine({"VIDEO": video, "AUDIO": audio, "S_T": noise(seeds, self.config.map_size)})
        return np.asarray(out["SALIENCY"]), np.full((len(video), 1), self.default_steps, np.int32)


def monolith_signature(config: Config) -> Signature:
    return Signature("monolith", (*graphs.media(config), graphs.initial_noise(config)), (saliency_map(config),))


def eager_torchvision(context: Context) -> Pipeline:
    model = context.model(folded=False)
    return Pipeline(model.config, eager.load_engines(model))


def eager_folded(context: Context) -> Pipeline:
    model = context.model()
    return Pipeline(model.config, eager.load_engines(model))


def compiled(context: Context) -> Pipeline:
    """torch.compile, each graph by itself, shapes fixed; compiled when it returns. UserError where it cannot be."""
    engines = eager.load_engines(context.model())
    for engine in engines.values():
        engine.module = torch.compile(engine.module, dynamic=False)  # type: ignore[attr-defined]
    pipeline = Pipeline(context.config, engines)
    try:
        call(context, pipeline)(0)
    except Exception as error:  # the compiler's, of many kinds
        raise UserError(f"torch.compile cannot be used here ({text.reason(error)}): is g++ installed?") from None
    return pipeline


def on_cpu(engine: str, context: Context) -> Pipeline:
    return Pipeline(context.config, cpu.load_engines(engine, context.artifacts, context.threads))


def each_step(side: Callable[[Context], Pipeline], context: Context) -> Predictor:
    return Reencoding(side(context))


def fixed_steps(engine: str, context: Context) -> Pipeline:
    """With the sampler in the loop's place."""
    signature = signatures(context.config, sampler=True)[graphs.SAMPLER]
    sampler = cpu.load_engine(engine, context.sampler, signature, context.threads)
    engines = {**on_cpu(engine, context).engines, graphs.SAMPLER: sampler}
    return Pipeline(context.config, engines, fixed_steps=DEFAULT_STEPS)


def onnx_plain(context: Context) -> Pipeline:
    """What torch.onnx.export makes of torchvision's attention, without our rewrites."""
    model = context.model(folded=False)
    engines: dict[str, Engine] = {}
    for name, signature in signatures(model.config).items():
        context.say(f"plain export of {name}")
        path = context.folder / f"plain_{name}.onnx"
        if name == "visual_encoder":
            _export_plain(model.graph(name), signature, path)
        else:  # nothing there is rewritten
            path = context.artifacts.file(name)
        engines[name] = cpu.load_engine("onnxruntime", path, signature, context.threads)
    return Pipeline(model.config, engines)


def _export_plain(module: nn.Module, signature: Signature, path: Path) -> None:
    import warnings

    from mubic_deploy.model.mubic import empty_inputs

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            empty_inputs(signature, 1),
            path,
            dynamo=True,
            verbose=False,
            input_names=signature.input_names,
            output_names=signature.output_names,
        )


def monolith(context: Context) -> Predictor:
    """One ONNX graph of the whole inference, the loop unrolled."""
    context.say("exporting one graph of everything")
    signature, path = monolith_signature(context.config), context.folder / "monolith.onnx"
    onnx_graphs().trace(Monolith(context.model()).eval(), signature, path)
    return WholeGraph(context.config, cpu.load_engine("onnxruntime", path, signature, context.threads))


SIDES: dict[str, Callable[[Context], Predictor]] = {
    "eager, each step": functools.partial(each_step, eager_torchvision),
    "eager folded, each step": functools.partial(each_step, eager_folded),
    "eager, torchvision": eager_torchvision,
    "eager": eager_folded,
    "torch.compile": compiled,
    "ONNX, plain export": onnx_plain,
    "ONNX, one graph": monolith,
    "onnxruntime, each step": functools.partial(each_step, functools.partial(on_cpu, "onnxruntime")),
    "onnxruntime": functools.partial(on_cpu, "onnxruntime"),
    "openvino": functools.partial(on_cpu, "openvino"),
    "openvino, fixed steps": functools.partial(fixed_steps, "openvino"),
}


def installed_engines(left_out: dict[str, str]) -> list[str]:
    """The engines for a CPU that are installed, the default first; the others are noted with the reason. UserError if
    there is none."""
    found = [engine for engine in cpu.ENGINES if find_spec(engine)]
    left_out |= {engine: "not installed" for engine in cpu.ENGINES if engine not in found}
    if not found:
        raise UserError(f"no engine for a CPU is installed: pip install {cpu.ENGINES[0]}")
    return found


def load(names: Iterable[str], context: Context) -> tuple[dict[str, Predictor], dict[str, str]]:
    """The named sides, and the ones that cannot be had here with the reason. UserError for an unknown name."""
    names = list(names)
    if unknown := [name for name in names if name not in SIDES]:
        raise UserError(f"unknown side {unknown[0]!r}: use {', '.join(SIDES)}")
    loaded, left_out = {}, {}
    for name in names:
        context.say(f"loading {name}")
        try:
            loaded[name] = SIDES[name](context)
        except UserError as error:
            left_out[name] = str(error)
    return loaded, left_out
