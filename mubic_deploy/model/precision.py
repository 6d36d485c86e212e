"""FP16 where it pays, FP32 where it matters: the one policy from which every half-precision graph is made.

FP16: matrix products and convolutions with their weights, what flows between them, and the features and the
conditioning that flow between graphs. FP32: LayerNorm and softmax, the log-mel, the step's embedding, the entropy and
the adaptive steps, and from the decoder's last convolution on the map and the DDIM update. BatchNorm is folded into the
convolution before it. The precision is in the graph itself, as casts: a strongly typed TensorRT network takes it as it
is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mubic_deploy.errors import UserError
from mubic_deploy.graphs import FLOAT32
from mubic_deploy.model.mubic import MUBiC
from mubic_deploy.model.optimise import fold_batch_norm, optimised

PRODUCTS = (nn.Linear, nn.Conv2d, nn.Conv3d, nn.ConvTranspose3d)
NORMS = (nn.LayerNorm,)
KEPT = ("denoiser.step_embedding", "fusion.adaptive")  # in FP32 with all that is in them
LARGEST = 16_384.0  # of an activation: a quarter of what FP16 holds


def prepared(model: MUBiC, precision: str = FLOAT32, optimisations: Collection[str] = ()) -> MUBiC:
    """A copy of `model` as it is traced or compiled: with some of `optimise.REWRITES`, float32 or float16, the visual
    encoder's positions as constants of the configured size. But for `tokens`, its weights' names stay the model's.

    UserError for an unknown optimisation, or a weight that is too large for FP16."""
    out = optimised(model, optimisations)
    if precision != FLOAT32:
        out = half(out)
    out.visual_encoder.fix_positions()
    return out


def half(model: MUBiC) -> MUBiC:
    """A copy of `model` in eval mode under the policy above. Its signatures are those of precision float16.

    UserError if a weight is too large for FP16."""
    out = copy.deepcopy(model).eval()
    fold_batch_norm(out)
    for name, module in out.named_modules():
        if name.startswith(KEPT):
            continue
        if isinstance(module, NORMS):
            module.register_forward_pre_hook(lambda _, args: (args[0].float(),))
            module.register_forward_hook(lambda _, args, y: y.half())
            continue
        for key, value in module.named_parameters(recurse=False):
            if not value.abs().max() <= LARGEST:  # NaN too
                raise UserError(
                    f"{name}.{key} reaches {value.abs().max():.3g}, too large for FP16: use --precision {FLOAT32}"
                )
            value.data = value.data.half()
        if isinstance(module, PRODUCTS):
            module.register_forward_pre_hook(lambda _, args: tuple(x.half() for x in args))
    out.denoiser.decoder.head.register_forward_hook(lambda _, args, y: y.float())
    return out


def require_small(activations: Mapping[str, float]) -> None:
    """UserError that names the module with the largest activation if that is near what FP16 holds, or is NaN."""
    for name, value in activations.items():
        if not value <= LARGEST:
            raise UserError(f"activations of {name} reach {value:.3g}, too large for FP16: use --precision {FLOAT32}")


@contextmanager
def recorded(model: MUBiC) -> Iterator[dict[str, float]]:
    """The largest absolute value that entered or left each module of an FP32 model while the block ran, by the module's
    name: so sums between modules count too, and products that no module computes; and for what attention keeps inside,
    its products of queries and keys, the largest that they can be."""
    largest: dict[str, float] = {}

    class Scores(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if func is F.scaled_dot_product_attention:
                q, k = (x.detach().norm(dim=-1).max() for x in args[:2])
                scale = kwargs.get("scale")
                note("attention scores", float(q * k) * (args[0].shape[-1] ** -0.5 if scale is None else scale))
            return func(*args, **kwargs)

    def note(name: str, value: float) -> None:
        largest[name] = float(np.maximum(value, largest.get(name, 0.0)))  # NumPy's, because a NaN must stay

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...], object], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], out: object) -> None:
            outputs = out if isinstance(out, Iterable) and not isinstance(out, Tensor) else (out,)
            for tensor in (*args, *outputs):
                if isinstance(tensor, Tensor) and tensor.is_floating_point():
                    note(name, float(tensor.detach().abs().max()))

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad(), Scores():
            yield largest
    finally:
        for handle in handles:
            handle.remove()
