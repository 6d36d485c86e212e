"""Where a training run is computed: Lightning Fabric's devices, and processes that read clips."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision
from lightning_fabric.utilities.exceptions import MisconfigurationException

from mubic_deploy.engines.eager import keep_all_bits
from mubic_deploy.errors import UserError, whole

REMEDY = "use a smaller --batch or fewer --noises, or a GPU that is freer (see nvidia-smi)"  # for its memory


@dataclass(frozen=True)
class Machine:
    """Where a run is computed: Lightning Fabric's accelerator and devices, and worker processes that read clips."""

    accelerator: str = "auto"
    devices: int = 1
    workers: int = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "devices", whole("devices", self.devices, 1))
        object.__setattr__(self, "workers", whole("workers", self.workers, 0))


DEFAULT_MACHINE = Machine()


class WholeInputs(MixedPrecision):
    """Mixed precision that leaves what is handed to the model in 32 bits: autocast says which operation wants less, and
    the sound's log-mel, the noise and alpha-bar want all."""

    def convert_input(self, data: Any) -> Any:
        return data


def make_fabric(machine: Machine, precision: str) -> Fabric:
    """Lightning Fabric, not launched yet; what is in FP32 is so on a GPU too (`eager.keep_all_bits`). UserError if the
    machine has no such accelerator, fewer devices, or is a CPU, which has no 16-mixed."""
    keep_all_bits()
    options: dict[str, Any] = {"accelerator": machine.accelerator, "devices": machine.devices}
    try:
        fabric = Fabric(**options)
        if precision == "32-true":
            return fabric
        kind = fabric.device.type
        if precision == "16-mixed" and kind == "cpu":
            raise UserError("a CPU does not train in 16-mixed: use --precision bf16-mixed, or 32-true")
        return Fabric(**options, plugins=WholeInputs(precision, kind))  # type: ignore[arg-type]
    except (RuntimeError, ValueError, MisconfigurationException) as error:
        asked = f"--accelerator {machine.accelerator} --devices {machine.devices}"
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"{asked} is more than this machine has ({reason}): ask for less, or cpu") from None


@contextlib.contextmanager
def ending_together(fabric: Fabric) -> Iterator[None]:
    """Ends the processes that Fabric started if this one fails: they would wait for it. The other way round Fabric sees
    to it."""
    try:
        yield
    except BaseException:
        started = getattr(fabric.strategy.launcher, "procs", [])
        others = started.copy()
        started.clear()  # Fabric watches them, and kills this process too when they end
        for process in others:
            process.kill()
        raise


@contextlib.contextmanager
def reading_clips() -> Iterator[None]:
    """UserError if a worker process is ended inside, as by the system where memory is short. PyTorch says it wherever
    the main thread is then."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        reason = str(error).splitlines()[0].rstrip(". ")
        raise UserError(
            f"a process that reads clips was ended ({reason}): use fewer --workers, or give it more memory (in "
            "a container more --shm-size)"
        ) from None
