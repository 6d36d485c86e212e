"""Eager PyTorch: the reference. The only engine that imports torch."""

from __future__ import annotations

import torch

from mubic_deploy.engines import Arrays, Engine
from mubic_deploy.graphs import FLOAT32, Signature, signatures
from mubic_deploy.model.mubic import MUBiC


class EagerEngine:
    """One graph of a model in eval mode, on the device where its weights are."""

    def __init__(self, module: torch.nn.Module, signature: Signature) -> None:
        self.signature = signature
        self.module = module

    def __call__(self, inputs: Arrays) -> Arrays:
        device = next(self.module.parameters()).device
        tensors = [torch.from_numpy(t.check(inputs[t.name])).to(device) for t in self.signature.inputs]
        with torch.inference_mode():
            outputs = self.module(*tensors)
        return {name: x.cpu().numpy() for name, x in zip(self.signature.output_names, outputs, strict=True)}


def load_engines(model: MUBiC, precision: str = FLOAT32) -> dict[str, Engine]:
    """An engine for each graph of the model, which is put into eval mode. precision: float16 for what
    `precision.half` made."""
    model.eval()
    return {name: EagerEngine(model.graph(name), s) for name, s in signatures(model.config, precision).items()}
