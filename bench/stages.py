"""The ways to run the model in PyTorch on a GPU, and the model in each of them."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from bench.sides import Monolith, WholeGraph, monolith_signature
from mubic_deploy.config import CHANNELS_LAST, DEFAULT_STEPS, ON_GPU, PAD_HEADS, REWRITES, TOKENS, Config
from mubic_deploy.engines import eager
from mubic_deploy.engines.replay import Replayed
from mubic_deploy.graphs import FLOAT16, FLOAT32
from mubic_deploy.model.mubic import MUBiC, random_model
from mubic_deploy.model.optimise import fold_batch_norm
from mubic_deploy.model.precision import prepared
from mubic_deploy.model.tokens import INDUCTOR
from mubic_deploy.model.visual import FoldedAttention
from mubic_deploy.pipeline import Pipeline, Predictor


@dataclass(frozen=True)
class Stage:
    """A way to run the model in PyTorch.

    folded         positions inside the attention product, else torchvision's attention
    tables         position tables kept between calls, else made in each
    norms          BatchNorm folded in FP32 too; in FP16 it always is
    precision      float32, float16
    tf32           PyTorch's TF32 convolutions, else strictly FP32
    benchmark      cuDNN measures its kernels for each shape and takes the fastest
    optimisations  of `mubic_deploy.model.optimise`
    search         torch.compile with one of SEARCHES
    graphs         CUDA graphs: of each graph
    sampler        the unrolled loop
    one            all of it as one CUDA graph"""

    folded: bool = True
    tables: bool = True
    norms: bool = False
    precision: str = FLOAT32
    tf32: bool = False
    benchmark: bool = False
    optimisations: tuple[str, ...] = ()
    search: str | None = None
    graphs: bool = False
    sampler: bool = False
    one: bool = False

    @property
    def strict(self) -> bool:
        """Whether it wants PyTorch's global switches as REFERENCE has them."""
        return not (self.tf32 or self.benchmark)


REFERENCE = Stage()
HALF = Stage(precision=FLOAT16)
WATERFALL = {  # each is the one before and one thing more
    "eager FP32, torchvision's attention": Stage(folded=False),
    "positions folded into the product": REFERENCE,
    "FP16": HALF,
    "pad_heads": (third := replace(HALF, optimisations=(PAD_HEADS,))),
    "channels_last": (fourth := replace(third, optimisations=(PAD_HEADS, CHANNELS_LAST))),
    "CUDA graphs": (fifth := replace(fourth, graphs=True)),
    "sampler": (sixth := replace(fifth, sampler=True)),
    "one CUDA graph": replace(sixth, one=True, graphs=False),
}
# each technique by itself, against the first of its precision; but `tokens`, which is for a compiler: before one its
# kernels, which are compiled one after the other, take minutes to be there
ALONE = {
    "FP16, CUDA graphs": (plain := replace(HALF, graphs=True)),
    **{name: replace(plain, optimisations=(name,)) for name in REWRITES if name != TOKENS},
    "cudnn.benchmark": replace(plain, benchmark=True),
    "FP32, CUDA graphs": (strict := replace(REFERENCE, graphs=True)),
    "BatchNorm folded, FP32": replace(strict, norms=True),
}
# what the model has in any case, left out
WITHOUT = {
    "FP16, CUDA graphs": plain,
    "without positions folded": replace(plain, folded=False),
    "without position tables kept": replace(plain, tables=False),
}
COMPETITORS = {
    "eager FP32": REFERENCE,
    "eager TF32": Stage(tf32=True),
    "eager FP16, positions folded": HALF,
    "eager FP16, torchvision's attention": replace(HALF, folded=False),
}
# Of torch.compile, as options. All that max-autotune searches is too much for a run of minutes: some 25 Triton kernels
# for each size of matrix product, and every other kernel's blocks one step at a time. LIMITED leaves products and
# convolutions to cuBLAS and cuDNN and chooses the others among a few. DEFAULT searches nothing, as our packages are
# compiled: even LIMITED often takes a product that copies its bias first, because it times launches of microseconds
# from the host. None has Inductor's own CUDA graphs, which free a graph's outputs when the next compiled graph is
# called, which reads them.
DEFAULT, LIMITED, UNLIMITED = "default", "limited", "unlimited"
SEARCHES: dict[str, dict[str, Any]] = {
    DEFAULT: {},
    LIMITED: {"max_autotune": True, "max_autotune_gemm_backends": "ATEN", "max_autotune_conv_backends": "ATEN"},
    UNLIMITED: {"max_autotune": True, "coordinate_descent_tuning": True},
}
COMPILED = {
    "torch.compile max-autotune FP16, limited search": (compiled := replace(HALF, search=LIMITED, graphs=True)),
    "torch.compile FP16, optimised": replace(compiled, search=DEFAULT, optimisations=ON_GPU),
    "torch.compile max-autotune FP16": replace(compiled, search=UNLIMITED),
}


@contextmanager
def switches(stage: Stage) -> Iterator[None]:
    """PyTorch's global switches as a stage has them, inside."""
    cudnn = torch.backends.cudnn
    before = (cudnn.allow_tf32, cudnn.benchmark)
    cudnn.allow_tf32, cudnn.benchmark = stage.tf32, stage.benchmark
    try:
        yield
    finally:
        cudnn.allow_tf32, cudnn.benchmark = before


class Switched(nn.Module):
    """A module that always runs under its stage's switches, and whose constants come to be on `device`: a CUDA graph
    cannot hold a copy from the host, as of the indices that torchvision's attention makes in each call."""

    def __init__(self, module: nn.Module, stage: Stage, device: str | None) -> None:
        super().__init__()
        self.module, self.stage, self.device = module, stage, device

    def forward(self, *inputs: torch.Tensor) -> Sequence[torch.Tensor]:
        with ExitStack() as stack:
            stack.enter_context(switches(self.stage))
            if self.device is not None:
                stack.enter_context(torch.device(self.device))
            return self.module(*inputs)


class Graphed(nn.Module):
    """A module whose kernels are captured for each batch size and replayed as one launch."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.run = module, Replayed(module)

    def forward(self, *inputs: torch.Tensor) -> Sequence[torch.Tensor]:
        return self.run(*inputs)


@functools.lru_cache(maxsize=2)
def weights(config: Config, folded: bool, device: str) -> MUBiC:
    """The model that every stage is a copy of: random weights take seconds to make. Nobody may change it."""
    return random_model(config, folded=folded).to(device)


def model_of(stage: Stage, config: Config, device: str) -> MUBiC:
    """A model of its own for a stage."""
    model = prepared(weights(config, stage.folded, device), stage.precision, stage.optimisations)
    if stage.norms and stage.precision == FLOAT32:
        fold_batch_norm(model)
    if not stage.tables:
        for module in model.modules():
            if isinstance(module, FoldedAttention):
                module.positions = module._positions  # type: ignore[method-assign]
    return model


def build(stage: Stage, config: Config, device: str) -> Predictor:
    """The model of a stage as a predictor on `device`. Its own switches hold in all its calls."""
    model = model_of(stage, config, device)
    if stage.one:
        signature = monolith_signature(config)
        return WholeGraph(config, eager.EagerEngine(Graphed(Monolith(model).eval()), signature))
    steps = DEFAULT_STEPS if stage.sampler else None
    engines = eager.load_engines(model, stage.precision, steps)
    constants = device if stage.graphs and not (stage.folded and stage.tables) else None
    for engine in engines.values():
        module = engine.module  # type: ignore[attr-defined]
        if stage.search is not None:
            settings = SEARCHES[stage.search] | (INDUCTOR if TOKENS in stage.optimisations else {})
            module = torch.compile(module, options=settings, dynamic=False)
        if constants is not None or not stage.strict:
            module = Switched(module, stage, constants)
        engine.module = Graphed(module) if stage.graphs else module  # type: ignore[attr-defined]
    return Pipeline(config, engines, fixed_steps=steps)
