"""Eager PyTorch: the reference."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import numpy as np
import torch

from mubic_deploy.engines import Array, Arrays, DeviceArray, Engine, Fetch
from mubic_deploy.engines.memory import REMEDY, is_short, short_of_memory
from mubic_deploy.engines.replay import pinned, recorded
from mubic_deploy.errors import UserError
from mubic_deploy.graphs import FLOAT32, Signature, signatures
from mubic_deploy.model.mubic import MUBiC


class EagerEngine:
    """One graph of a model in eval mode, on the device where its weights are."""

    def __init__(self, module: torch.nn.Module, signature: Signature) -> None:
        self.signature = signature
        self.module = module

    def __call__(self, inputs: Arrays) -> Arrays:
        device = next(self.module.parameters()).device
        with enough_memory(self.signature.name):
            tensors = [to_torch(t.check(inputs[t.name]), device) for t in self.signature.inputs]
            with torch.inference_mode():
                outputs = self.module(*tensors)
        return {name: from_torch(x) for name, x in zip(self.signature.output_names, outputs, strict=True)}


def keep_all_bits() -> None:
    """Convolutions in FP32 are that on a GPU too, as products are by default: PyTorch would take TF32, whose 10 bits of
    mantissa are too few for the log-mel's Fourier transform."""
    torch.backends.cudnn.allow_tf32 = False


def gpu() -> torch.device:
    """The first NVIDIA GPU, as `require_gpu` leaves it. UserError if PyTorch finds none, or the driver is too old."""
    require_gpu("use --engine eager, or a machine with one")
    return torch.device("cuda", 0)


def require_gpu(remedy: str) -> None:
    """Has PyTorch's GPUs compute as `keep_all_bits` says. UserError if there is none here. remedy: what to do then."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is said below
        if torch.cuda.is_available():
            keep_all_bits()
            return
    try:
        torch.cuda.init()  # which says why
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split(". ")[0]
        if "too old" in reason:
            raise UserError(f"PyTorch {torch.__version__}: {reason}: install a newer NVIDIA driver") from None
    raise UserError(f"PyTorch finds no NVIDIA GPU here: {remedy}")


@contextlib.contextmanager
def enough_memory(what: str, remedy: str = REMEDY) -> Iterator[None]:
    """A GPU that runs out of memory inside is a UserError. what: that needed it; remedy: what to do."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise short_of_memory(what, error, remedy) from None


def to_torch(array: Array, device: torch.device) -> torch.Tensor:
    """The same tensor on `device`."""
    if isinstance(array, DeviceArray):
        return array.value
    return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)


def pinned_array(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Not initialised, in memory that a GPU copies from by itself, which goes back to PyTorch's when the array is gone;
    in other memory, which only takes longer, where a machine has no more of that."""
    kind = torch.from_numpy(np.empty(0, dtype)).dtype
    try:
        return torch.empty(shape, dtype=kind, pin_memory=True).numpy()
    except RuntimeError as error:
        if not is_short(error):
            raise
        return np.empty(shape, dtype)


def from_torch(x: torch.Tensor) -> Array:
    """The same tensor as engines return it: NumPy's on a CPU, else where it is."""
    if x.device.type == "cpu":
        return x.numpy()
    kind = np.dtype(str(x.dtype).removeprefix("torch."))
    return DeviceArray(x, tuple(x.shape), kind, lambda: x.cpu().numpy(), lambda: begun(x))


def begun(x: torch.Tensor) -> Fetch:
    """Begins to copy a tensor from the GPU, as `DeviceArray.begin`: into pinned memory, or at once where a machine has
    no more of that."""
    try:
        there = pinned(x)
    except RuntimeError as error:
        if not is_short(error):
            raise
        return x.cpu().numpy
    there.copy_(x, non_blocking=True)
    done = recorded()

    def fetch() -> np.ndarray:
        done.synchronize()
        return there.numpy()

    return fetch


def load_engines(model: MUBiC, precision: str = FLOAT32, fixed_steps: int | None = None) -> dict[str, Engine]:
    """An engine for each graph of the model, which is put into eval mode. precision: float16 for what
    `precision.half` made; fixed_steps: with the sampler of so many steps."""
    model.eval()
    graphs = signatures(model.config, precision, sampler=fixed_steps is not None)
    return {name: EagerEngine(model.graph(name, fixed_steps), signature) for name, signature in graphs.items()}
