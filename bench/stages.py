"""The ways to run the model in PyTorch on a GPU, and the model in each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from bench.sides import Monolith, WholeGraph, monolith_signature
from mubic_deploy.config import DEFAULT_STEPS, Config
from mubic_deploy.engines import eager
from mubic_deploy.engines.replay import Replayed
from mubic_deploy.graphs import FLOAT32
from mubic_deploy.model.mubic import random_model
from mubic_deploy.model.optimise import REWRITES
from mubic_deploy.model.precision import prepared
from mubic_deploy.pipeline import Pipeline, Predictor

FLOAT16 = "float16"


@dataclass(frozen=True)
class Stage:
    """A way to run the model in PyTorch.

    folded         positions inside the attention product, else torchvision's attention
    tf32           PyTorch's TF32 convolutions, else strictly FP32
    optimisations  of `mubic_deploy.model.optimise`
    mode           of torch.compile
    graphs         CUDA graphs: of each graph
    sampler        the unrolled loop
    one            all of it as one CUDA graph"""

    folded: bool = True
    precision: str = FLOAT32
    tf32: bool = False
    optimisations: tuple[str, ...] = ()
    mode: str | None = None
    graphs: bool = False
    sampler: bool = False
    one: bool = False


REFERENCE = Stage()
HALF = Stage(precision=FLOAT16)
WATERFALL = {  # each is the one before and one thing more
    "eager FP32, torchvision's attention": Stage(folded=False),
    "positions folded into the product": REFERENCE,
    "FP16": HALF,
    "pad_heads": (third := replace(HALF, optimisations=("pad_heads",))),
    "split_depthwise": (fourth := replace(third, optimisations=("pad_heads", "split_depthwise"))),
    "channels_last": (fifth := replace(fourth, optimisations=(*fourth.optimisations, "channels_last"))),
    "CUDA graphs": (sixth := replace(fifth, graphs=True)),
    "sampler": (seventh := replace(sixth, sampler=True)),
    "one CUDA graph": replace(seventh, one=True, graphs=False),
}
ALONE = {
    "FP16, CUDA graphs": (plain := replace(HALF, graphs=True)),
    **{name: replace(plain, optimisations=(name,)) for name in REWRITES},
}
COMPETITORS = {
    "eager FP32": REFERENCE,
    "eager TF32": Stage(tf32=True),
    "eager FP16": HALF,
}
# its own CUDA graphs (max-autotune) free a graph's outputs when the next compiled graph is called, which reads them
COMPILED = {
    "torch.compile FP16": (compiled := replace(HALF, mode="max-autotune-no-cudagraphs", graphs=True)),
    "torch.compile FP16, optimised": replace(compiled, optimisations=("pad_heads", "split_depthwise")),
}


class Graphed(nn.Module):
    """A module whose kernels are captured for each batch size and replayed as one launch."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.run = module, Replayed(module)

    def forward(self, *inputs: torch.Tensor) -> Sequence[torch.Tensor]:
        return self.run(*inputs)


def build(stage: Stage, config: Config, device: str) -> Predictor:
    """The model of a stage as a predictor on `device`."""
    torch.backends.cudnn.allow_tf32 = stage.tf32
    model = prepared(random_model(config, folded=stage.folded).to(device), stage.precision, stage.optimisations)
    if stage.one:
        signature = monolith_signature(config)
        return WholeGraph(config, eager.EagerEngine(Graphed(Monolith(model).eval()), signature))
    steps = DEFAULT_STEPS if stage.sampler else None
    engines = eager.load_engines(model, stage.precision, steps)
    for engine in engines.values():
        module = engine.module  # type: ignore[attr-defined]
        if stage.mode is not None:
            module = torch.compile(module, mode=stage.mode, dynamic=False)
        engine.module = Graphed(module) if stage.graphs else module  # type: ignore[attr-defined]
    return Pipeline(config, engines, fixed_steps=steps)
