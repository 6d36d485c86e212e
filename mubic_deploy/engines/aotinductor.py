"""AOTInductor: graphs that PyTorch compiled ahead of time, for a GPU or a CPU. Needs PyTorch, not the model's code.

A package is machine code: it belongs to the PyTorch version and the kind of GPU, or the CPU's instructions, that it was
compiled for. The folder's `packages.json` says which, and is read before a package is loaded."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._C._aoti import AOTIModelPackageLoader

from mubic_deploy.artifacts import PACKAGES_MANIFEST, SEED, Folder, Layout, Needs
from mubic_deploy.config import TOKENS, Config
from mubic_deploy.engines import Arrays, Engine
from mubic_deploy.engines.eager import from_torch, require_gpu, to_torch
from mubic_deploy.engines.lanes import Lanes, Part, Step, in_turn
from mubic_deploy.engines.memory import REMEDY, first_line, is_short, short_of_memory
from mubic_deploy.engines.replay import Replayed, Run
from mubic_deploy.errors import UserError
from mubic_deploy.graphs import SAMPLER, Signature, conditioner, parts, signatures

FORMAT = 4
AGAIN = "compile it here with mubic-deploy compile"
# how those flags of x86 begin that are instruction sets; the others are the kernel's and a hypervisor's
INSTRUCTIONS = re.compile("sse|pni|ssse|avx|fma|f16c|bmi|abm|popcnt|movbe|amx|gfni|vaes|vpcl")
NEEDS: Needs = {
    **SEED,
    ("profile", "max"): int,
    ("torch",): str,
    ("device", "type"): str,
    ("optimisations",): list,
}


class Packages(Folder):
    """Compiled packages."""

    LAYOUT = Layout(PACKAGES_MANIFEST, FORMAT, "packages", NEEDS, AGAIN)

    @property
    def max_batch(self) -> int:
        return self.manifest["profile"]["max"]

    @property
    def device(self) -> torch.device:
        return torch.device(self.manifest["device"]["type"])

    @property
    def channels_last(self) -> bool:
        """Whether features lie so: see `laid_out`."""
        return TOKENS in self.manifest["optimisations"]

    @property
    def parts(self) -> dict[str, tuple[Signature, ...]]:
        """What each package holds."""
        return contents(self.device.type, self.config, self.precision, SAMPLER in self.signatures)

    def require(self) -> None:
        """UserError if the packages were compiled for another PyTorch or another machine than these."""
        theirs = self.manifest["torch"]
        if theirs != torch.__version__:
            raise UserError(f"{self.path} was compiled with PyTorch {theirs}, this is {torch.__version__}: {AGAIN}")
        built, here = self.manifest["device"], facts(self.device)
        if self.device.type == "cpu":
            missing = sorted(set(built["instructions"]) - set(here["instructions"]))
            if missing:
                raise UserError(f"{self.path} needs a CPU with {', '.join(missing[:5])}, this one has none: {AGAIN}")
        elif built != here:
            raise UserError(
                f"{self.path} was compiled for {built['name']} (compute capability {built['compute_capability']}), "
                f"this is {here['name']} ({here['compute_capability']}): {AGAIN}"
            )


def contents(device: str, config: Config, precision: str, sampler: bool) -> dict[str, tuple[Signature, ...]]:
    """What each package holds: for a GPU `graphs.parts`; for a CPU, where nothing runs beside them, the whole graph."""
    if device == "cuda":
        return parts(config, precision, sampler)
    return {name: (signature,) for name, signature in signatures(config, precision, sampler).items()}


def facts(device: torch.device) -> dict[str, Any]:
    """What a package depends on. UserError for cuda where there is none, or the driver is too old for PyTorch."""
    if device.type == "cpu":
        return {"type": "cpu", "instructions": instructions(Path("/proc/cpuinfo").read_text())}
    require_gpu("use packages that were compiled for a CPU (compile --device cpu), or a machine with one")
    major, minor = torch.cuda.get_device_capability()
    return {"type": "cuda", "name": torch.cuda.get_device_name(), "compute_capability": f"{major}.{minor}"}


def instructions(cpuinfo: str) -> list[str]:
    """The instruction sets of a CPU that a compiler may use, by Linux's names: on x86 INSTRUCTIONS, on Arm all."""
    for line in cpuinfo.splitlines():
        kind, _, words = line.partition(":")
        if kind.strip() == "flags":
            return sorted({word for word in words.split() if INSTRUCTIONS.match(word)})
        if kind.strip() == "Features":
            return sorted(set(words.split()))
    return []


class AOTInductorEngine:
    """A package, or several as one.

    parts  that it was loaded from, if it is one
    run    what computes it; where its kernels are captured for each batch size and replayed, from the host as well"""

    def __init__(
        self, run: Run, signature: Signature, device: torch.device, max_batch: int, parts: Sequence[Part] = ()
    ) -> None:
        self.run, self.signature, self.device, self.max_batch, self.parts = run, signature, device, max_batch, parts

    def __call__(self, inputs: Arrays) -> Arrays:
        batch, arrays = self.signature.batch(inputs)
        if batch > self.max_batch:
            raise UserError(
                f"a batch of {batch} is above the package's {self.max_batch}: send fewer at once, or compile with "
                f"--max-batch {batch}"
            )
        # a graph has a way of its own from the host
        device = torch.device("cpu") if isinstance(self.run, Replayed | Lanes) else self.device
        with torch.inference_mode(), on_gpu(self.signature.name, self.device):
            outputs = self.run(*(to_torch(array, device) for array in arrays.values()))
        return {name: from_torch(x) for name, x in zip(self.signature.output_names, outputs, strict=True)}


def laid_out(x: Tensor, channels_last: bool) -> Tensor:
    """x as a package reads it, which is as it lay when it was compiled. channels_last: so features and contexts
    [B, C, t, h, w], of a model made of tokens."""
    if channels_last and x.dim() == 5 and x.is_floating_point():  # else VIDEO, or no grid
        return x.contiguous(memory_format=torch.channels_last_3d)
    return x.contiguous()


def loaded(path: Path, signature: Signature, device: torch.device, channels_last: bool = False) -> Part:
    """A part of a package, which has it by its signature's name. channels_last: see `laid_out`.

    By PyTorch's own loader, because `aoti_load_package` first finds out about the machine what `Packages.require` knows
    already: with a C++ compiler, which a machine that serves need not have, and for seconds."""
    with on_gpu(str(path), device):
        # single-threaded: the runner's bookkeeping for several threads cannot be captured
        package = AOTIModelPackageLoader(str(path), signature.name, device.type == "cuda", 1, -1)

    def run(*inputs: Tensor) -> Sequence[Tensor]:
        return package.boxed_run([laid_out(x, channels_last) for x in inputs])

    return Part(signature, run)


@contextlib.contextmanager
def on_gpu(what: str, device: torch.device) -> Iterator[None]:
    """A GPU that runs out of memory inside is a UserError. what: that needed it. One that is lost to this process
    (`computes`) is not.

    A package writes the cause of a failure to the error stream and raises no more than that there was one."""
    try:
        yield
    except RuntimeError as error:
        if is_short(error):
            raise short_of_memory(what, error) from None
        if device.type != "cuda" or "API call failed" not in str(error):
            raise
        if not computes():
            raise
        free, total = (n / 1e9 for n in torch.cuda.mem_get_info())
        raise UserError(
            f"{what} failed on the GPU ({first_line(error)}), where {free:.1f} of {total:.1f} GB are free: if that is "
            f"little, {REMEDY}"
        ) from error


def computes() -> bool:
    """Whether the GPU takes calls of this process: after a fault, such as an illegal address, CUDA refuses all of
    them until the process ends."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def load_engines(packages: Packages, cuda_graphs: bool = True) -> dict[str, AOTInductorEngine]:
    """An engine for each package. UserError if they are not for this machine."""
    packages.require()
    device, engines = packages.device, {}
    for name, whole in packages.signatures.items():
        held = [loaded(packages.file(name), part, device, packages.channels_last) for part in packages.parts[name]]
        run = in_turn(held, whole)
        if device.type == "cuda" and cuda_graphs:
            run = Replayed(run, device)
        engines[name] = AOTInductorEngine(run, whole, device, packages.max_batch, held)
    return engines


def load_conditioner(packages: Packages, engines: Mapping[str, AOTInductorEngine]) -> Engine | None:
    """Encoders and fusion of `load_engines` as one engine, over the same packages, each of which takes what the ones
    before made where it lies. None where they have no CUDA graphs."""
    device, whole = packages.device, conditioner(packages.config, packages.precision)
    if not isinstance(engines["fusion"].run, Replayed):
        return None
    seen, fused = engines["visual_encoder"].parts, engines["fusion"].parts
    heard = engines["audio_encoder"].parts if packages.config.has_audio else ()
    return AOTInductorEngine(Lanes(steps(seen, heard, fused), whole, device), whole, device, packages.max_batch)


def steps(seen: Sequence[Part], heard: Sequence[Part], fused: Sequence[Part]) -> list[Step]:
    """The visual encoder scale by scale, with the audio encoder and each scale's fusion beside it as soon as they can
    start. Nothing runs beside the last scale's fusion."""
    out = [Step(seen[0]), *(Step(part, beside=True) for part in heard)]
    for scale, fusion in zip(seen[1:], fused, strict=False):
        out += [Step(scale), Step(fusion, beside=True)]
    return [*out, Step(fused[-1])]
