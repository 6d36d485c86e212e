"""The whole model: its four graphs, how it is made, and what it costs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mubic_deploy.config import DEFAULT_STEPS, Config
from mubic_deploy.graphs import SAMPLER, Signature, signatures
from mubic_deploy.model.audio import AudioEncoder
from mubic_deploy.model.denoiser import Denoiser, Sampler
from mubic_deploy.model.fusion import Fusion
from mubic_deploy.model.visual import VisualEncoder


class MUBiC(nn.Module):
    """One module a graph, named as the graphs; each takes and returns tensors in its signature's order.

    `folded=False` builds the visual encoder with torchvision's attention, to compare."""

    def __init__(self, config: Config, folded: bool = True) -> None:
        super().__init__()
        self.config = config
        self.visual_encoder = VisualEncoder(config, folded)
        if config.has_audio:
            self.audio_encoder = AudioEncoder(config)
        self.fusion = Fusion(config)
        self.denoiser = Denoiser(config)

    def graph(self, name: str, fixed_steps: int | None = None) -> nn.Module:
        """The module of a graph. fixed_steps: the sampler's."""
        if name == SAMPLER:
            assert fixed_steps is not None
            return Sampler(self.denoiser, self.config.check_fixed_steps(fixed_steps)).train(self.training)
        return self.get_submodule(name)

    def parts(self, name: str, fixed_steps: int | None = None) -> list[nn.Module]:
        """The modules of a graph's `graphs.parts`."""
        module = self.graph(name, fixed_steps)
        return list(module.parts()) if isinstance(module, VisualEncoder | Fusion) else [module]


def random_model(config: Config, seed: int = 0, folded: bool = True) -> MUBiC:
    """A model with seeded random weights, in eval mode; the same weights with either attention. The global random
    state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MUBiC(config).eval()
        if not folded:
            weights = model.state_dict()
            model = MUBiC(config, folded=False).eval()
            model.load_state_dict(weights)
    return model


class Cost(NamedTuple):
    parameters: int
    parameters_without_vggish: int
    macs_4_steps: int  # of one clip: encoders and fusion once, 4 denoiser calls (1 without diffusion)
    macs: dict[str, int]  # of each graph


def empty_inputs(signature: Signature, batch: int, device: str = "cpu") -> tuple[Tensor, ...]:
    """Zeros for each input of a graph."""
    return tuple(torch.zeros((batch, *t.shape), dtype=getattr(torch, t.dtype), device=device) for t in signature.inputs)


def traced_with(signature: Signature, max_batch: int, device: str = "cpu") -> tuple[tuple[Tensor, ...], Any]:
    """Inputs to trace a graph with, and torch.export's dynamic shapes: only the batch is dynamic, 1 to max_batch."""
    inputs = empty_inputs(signature, 2, device)  # two samples: one would be taken for a constant
    batch = torch.export.Dim("batch", min=1, max=max_batch)
    shapes = tuple({0: batch} for _ in inputs)
    # denoiser and sampler take *inputs, which is one argument to torch.export
    return inputs, (shapes,) if signature.name in ("denoiser", SAMPLER) else shapes


def cost(config: Config) -> Cost:
    """Parameters and multiply-accumulates (torch.utils.flop_counter / 2) of a configuration, without computing."""
    with torch.device("meta"):
        model = MUBiC(config).eval()
    model.to("meta")  # the mel filters were made elsewhere
    macs = {}
    with torch.no_grad():
        for name, signature in signatures(config).items():
            counter = FlopCounterMode(display=False)
            with counter:
                model.graph(name)(*empty_inputs(signature, 1, "meta"))
            macs[name] = counter.get_total_flops() // 2
    total = sum(p.numel() for p in model.parameters())
    vggish = sum(p.numel() for p in model.audio_encoder.vggish.parameters()) if config.has_audio else 0
    steps = min(DEFAULT_STEPS, config.max_steps)
    return Cost(total, total - vggish, sum(macs.values()) + (steps - 1) * macs["denoiser"], macs)
