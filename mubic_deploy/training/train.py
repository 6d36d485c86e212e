"""Algorithm 1: the training loop. Stops at any moment, resumes to the same weights.

A run is a folder:

    settings.json        what decides its weights
    state.safetensors    weights, optimiser and place of the last save: what a run resumes from
    best.safetensors     the checkpoint of the epoch with the best validation CC
    model.safetensors    the finished model: the last epoch's weights, adaptive steps fitted
    history.json         loss, learning rate and validation metrics of each epoch; curves.png shows them
    samples/             predictions for the same validation clips after each epoch
    tensorboard/         the same and the loss of each step

Every random number is drawn from (seed, epoch, step), so there is no generator to save."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader
from torchvision.ops import StochasticDepth

from mubic_deploy import checkpoint
from mubic_deploy.config import get_config
from mubic_deploy.console import Progress
from mubic_deploy.engines import eager
from mubic_deploy.errors import UserError
from mubic_deploy.model.mubic import MUBiC, random_model
from mubic_deploy.pipeline import Pipeline
from mubic_deploy.training import curves, samples
from mubic_deploy.training.adaptive import fit_steps
from mubic_deploy.training.clips import Clips
from mubic_deploy.training.evaluate import evaluate
from mubic_deploy.training.layout import Video, in_both
from mubic_deploy.training.machine import DEFAULT_MACHINE, REMEDY, Machine, ending_together, make_fabric, reading_clips
from mubic_deploy.training.objective import Draw, Objective, draw
from mubic_deploy.training.run import Run, write_json
from mubic_deploy.training.settings import Settings
from mubic_deploy.training.state import State, save_state

SAVE_S = 300  # at most this many seconds of work are lost when a run is killed
PLATEAU_FACTOR, PLATEAU_PATIENCE = 0.1, 1  # epochs
LONG_WARMUP = 0.25  # of a run, and more, is worth a warning
PLATEAU_END = 0.01  # of the learning rate: 1e-4 to 1e-6, Table 4.1

T = TypeVar("T")


def train(
    settings: Settings,
    training: Sequence[Video],
    validation: Sequence[Video],
    out: Path,
    *,
    resume: bool = False,
    prepare: Callable[[MUBiC], None] = lambda model: None,
    machine: Machine = DEFAULT_MACHINE,
    progress: Progress = lambda *_: None,
    note: Callable[[str], None] = lambda text: None,
) -> Path | None:
    """Trains a model and returns the finished checkpoint, `out`/model.safetensors; None in a process that Fabric
    started for a further device.

    prepare: changes the fresh random model before the first step (pretrained weights); not called on resuming. note: is
    told how many clips are left out, of videos in both parts, and of a long warm-up. UserError if `out` holds another
    run, or none to resume, or another process trains into it, if data or settings are not the run's, if there is no
    clip, if the machine has no such devices, or if the run cannot be written."""
    if settings.batch % machine.devices:
        raise UserError(f"batch {settings.batch} cannot be shared by {machine.devices} devices: use a multiple")
    run = Run(Path(out), settings, [*training, *validation])
    fabric = make_fabric(machine, settings.precision)
    with run.alone() if fabric.is_global_zero else contextlib.nullcontext(), ending_together(fabric):
        state = run.resume() if resume else None
        if state is None:
            run.require_new()
        elif state.devices not in (None, machine.devices):  # each draws its own random numbers
            began = f"{out} was not begun with {machine.devices} devices"
            raise UserError(f"{began}: resume with --devices {state.devices}")
        fabric.launch()
        config = get_config(settings.config, settings.variant, settings.fit)
        drawn: dict[str, Any] = {"flip": settings.flip, "jitter": settings.jitter, "seed": settings.seed}
        train_clips = Clips(training, config, stride=settings.stride, **drawn)
        held_clips = Clips(validation, config, stride=settings.stride)
        for part, clips in (("training", train_clips), ("test", held_clips)):
            if not len(clips):
                raise UserError(f"there is no clip with a map in the {part} part: check the data folder with --check")
            if skipped := sum(clips.skipped.values()):
                clips_in_all = skipped + len(clips)
                note(
                    f"{skipped} of {clips_in_all} clips of the {part} part are left out: their map is missing or empty"
                )
        run.require_clips(train_clips, held_clips, state)
        if fabric.is_global_zero:  # before an epoch is spent
            for index in held_clips.spread(settings.validate):
                held_clips.ground_truth(index)
        model = random_model(config, settings.seed)
        if state is None:
            prepare(model)
            if fabric.is_global_zero:
                run.start()
        for warning in in_both(training, validation):
            note(warning)
        trainer = Trainer(fabric, settings, run, model, train_clips, held_clips, machine.workers, progress, state)
        if settings.warmup > LONG_WARMUP * (in_all := settings.epochs * trainer.steps):
            note(
                f"the learning rate still rises for the first {settings.warmup} of the run's {in_all} steps: give a "
                f"smaller --warmup, or more --epochs"
            )
        with (
            contextlib.closing(trainer),
            torch.random.fork_rng([fabric.device.index] if fabric.device.type == "cuda" else []),
            reading_clips(),
        ):
            trainer.fit()
            return trainer.finish() if fabric.is_global_zero else None


def shares(order: Sequence[int], size: int, devices: int, device: int) -> list[list[int]]:
    """One device's share of each batch of `size` clips. All have equally many, also of the last one and where there are
    fewer clips than devices: the first clips fill it up."""
    found = []
    for first in range(0, len(order), size):
        batch = order[first : first + size]
        found.append([*batch, *itertools.islice(itertools.cycle(order), -len(batch) % devices)][device::devices])
    return found


class Trainer:
    """One run in progress."""

    def __init__(
        self,
        fabric: Fabric,
        settings: Settings,
        run: Run,
        model: MUBiC,
        train_clips: Clips,
        held_clips: Clips,
        workers: int,
        progress: Progress,
        state: State | None = None,
    ) -> None:
        """state: that the run goes on from."""
        self.state = state
        self.fabric, self.settings, self.run, self.model = fabric, settings, run, model
        self.train_clips, self.held_clips = train_clips, held_clips
        self.workers, self.progress = workers, progress
        self.steps = math.ceil(len(train_clips) / settings.batch)  # an epoch
        self.history: list[dict[str, Any]] = []
        self.lead = fabric.is_global_zero
        _prepare_modules(model, settings)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.adam = torch.optim.Adam(trained.values(), lr=settings.learning_rate)
        self.objective, self.optimizer = fabric.setup(Objective(model), self.adam)
        # on a rate of its own: the factor of Adam's, which is set anew at each step
        unit = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        self.plateau = ReduceLROnPlateau(unit, factor=PLATEAU_FACTOR, patience=PLATEAU_PATIENCE, min_lr=PLATEAU_END)
        self.writer: Any = None
        if self.lead:
            from torch.utils.tensorboard import SummaryWriter

            folder = run.folder / "tensorboard"
            # what was said after the save that the run goes on from is said again
            done = state.epoch * self.steps + state.step if state is not None else 0
            self.writer = _write(lambda: SummaryWriter(str(folder), purge_step=done + 1), folder)

    def close(self) -> None:
        if self.writer is not None:
            _write(self.writer.close, self.run.folder)

    def fit(self) -> None:
        """All epochs that are left. The lead saves, by its own clock; the others wait for it where they next meet."""
        state = self.state
        begin, first, total = (state.epoch, state.step, state.total) if state is not None else (0, 0, 0.0)
        if state is not None:
            self._restore(state)
        saved = time.monotonic()
        for epoch in range(begin, self.settings.epochs):
            for step, batch in self._batches(epoch, first):
                loss = self._step(epoch, step, batch)
                total += loss
                self._report(epoch, step, loss, total)
                if self.lead and time.monotonic() - saved > SAVE_S and step + 1 < self.steps:
                    self._save(epoch, step + 1, total)
                    saved = time.monotonic()
            if self.lead:
                self._end_epoch(epoch, total / self.steps)
            if self.settings.schedule == "plateau":
                self.plateau.step(total / self.steps)
            first, total = 0, 0.0
            if self.lead:
                self._save(epoch + 1, 0, 0.0)
                saved = time.monotonic()

    def finish(self) -> Path:
        """Fits the adaptive steps on validation clips and writes the finished model."""
        model = self.model.eval()
        if model.config.max_steps > 1:
            chosen = self.held_clips.spread(self.settings.validate)
            fit_steps(
                model,
                self.held_clips,
                chosen,
                progress=lambda done, n: self.progress("fitting adaptive steps", done, n),
            )
        _write(lambda: checkpoint.save(model, self.run.model), self.run.model)
        return self.run.model

    def _batches(self, epoch: int, first: int) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
        """(step, batch on the device) from step `first` of an epoch on: this device's share of each."""
        self.train_clips.set_epoch(epoch)
        order = torch.randperm(len(self.train_clips), generator=generator(self.settings.seed, epoch)).tolist()
        batches = shares(order, self.settings.batch, self.fabric.world_size, self.fabric.global_rank)
        read = iter(DataLoader(self.train_clips, batch_sampler=batches[first:], num_workers=self.workers))
        try:
            for step, batch in enumerate(read, first):
                yield step, self.fabric.to_device(batch)
        except UserError as error:  # a worker process's comes as the last line of its traceback
            line = str(error).rstrip().splitlines()[-1]
            raise UserError(line.removeprefix(f"{UserError.__module__}.{UserError.__qualname__}: ")) from None
        finally:
            if self.workers:
                with contextlib.suppress(RuntimeError):  # of a killed one, which was said; or __del__ says it once more
                    read._shutdown_workers()  # type: ignore[attr-defined]

    def _step(self, epoch: int, step: int, batch: dict[str, torch.Tensor]) -> float:
        settings = self.settings
        scale = self.plateau.optimizer.param_groups[0]["lr"]
        rate = settings.learning_rate * settings.factor(epoch, step, self.steps) * scale
        for group in self.adam.param_groups:
            group["lr"] = rate
        keys = (settings.seed, epoch, step, self.fabric.global_rank)
        torch.manual_seed(int(np.random.SeedSequence(keys).generate_state(1)[0]))  # stochastic depth
        options = (settings.noises, settings.timestep_power, settings.rollout)
        if self.model.config.max_steps == 1:  # without diffusion every noise gives the same map
            options = (1, settings.timestep_power, 0.0)
        drawn = draw(self.model.config, len(batch["TARGET"]), generator(*keys), *options)
        drawn = Draw(*(self.fabric.to_device(x) for x in drawn))
        self.objective.train()
        with eager.enough_memory(f"a training step of {len(batch['TARGET'])} clips", REMEDY):
            loss = self.objective(batch, drawn)
            self.optimizer.zero_grad()
            self.fabric.backward(loss)
            self.optimizer.step()
        value = float(cast(torch.Tensor, self.fabric.all_reduce(loss.detach(), reduce_op="mean")))
        if not math.isfinite(value):
            raise UserError(
                f"the loss is {value} at step {step} of epoch {epoch + 1}: start anew with a smaller learning rate"
            )
        return value

    def _report(self, epoch: int, step: int, loss: float, total: float) -> None:
        done, rate = epoch * self.steps + step + 1, self.adam.param_groups[0]["lr"]
        if self.lead:
            self._plot({"loss/step": loss, "learning rate": rate}, done)
        text = f"epoch {epoch + 1}/{self.settings.epochs}, loss {loss:.1f}, learning rate {rate:.1e}"
        self.progress(text, done, self.settings.epochs * self.steps)

    def _end_epoch(self, epoch: int, loss: float) -> None:
        """Validation, history, curves, samples and the best checkpoint."""
        self.progress(f"epoch {epoch + 1}: validating", (epoch + 1) * self.steps, self.settings.epochs * self.steps)
        chosen = self.held_clips.spread(self.settings.validate)
        predictor = Pipeline(self.model.config, eager.load_engines(self.model))
        result = evaluate(predictor, self.held_clips, chosen, shuffled=False)
        means = result.means()
        entry = {"epoch": epoch + 1, "loss": loss, "learning_rate": self.adam.param_groups[0]["lr"], **means}
        self.history.append(entry)
        self._plot({"loss/epoch": loss, **{f"validation/{k}": v for k, v in means.items()}}, epoch + 1)
        picture = samples.draw(predictor, self.held_clips, chosen[:: max(1, len(chosen) // 6)][:6])

        def write() -> None:
            self.writer.add_image("samples", picture, epoch + 1, dataformats="HWC")
            self.writer.flush()
            samples.save(picture, self.run.folder / "samples" / f"epoch_{epoch + 1:03d}.png")
            write_json(self.run.folder / "history.json", self.history)
            curves.draw(self.history, self.run.folder / "curves.png")
            if max(self.history, key=_merit) is entry:
                checkpoint.save(self.model, self.run.best)

        _write(write, self.run.folder)

    def _plot(self, values: dict[str, float], at: int) -> None:
        def write() -> None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, at)

        _write(write, self.run.folder)

    def _save(self, epoch: int, step: int, total: float) -> None:
        """The state, so that the run goes on at `step` of `epoch`."""
        rule = {"best": float(self.plateau.best), "bad": self.plateau.num_bad_epochs}
        rule["factor"] = self.plateau.optimizer.param_groups[0]["lr"]
        scaler = self.fabric.strategy.precision.state_dict()
        place = (self.settings, self.run.videos, epoch, step, total)
        state = State(*place, rule, self.history, scaler, self.fabric.world_size, self.run.data, self.run.clips)
        _write(lambda: save_state(self.run.state, state, self.model, self.adam), self.run.state)

    def _restore(self, state: State) -> None:
        state.into(self.model, self.adam)
        self.history = state.history
        if state.scaler:
            self.fabric.strategy.precision.load_state_dict(state.scaler)
        self.plateau.best, self.plateau.num_bad_epochs = state.plateau["best"], int(state.plateau["bad"])
        self.plateau.optimizer.param_groups[0]["lr"] = state.plateau["factor"]


def generator(*keys: int) -> torch.Generator:
    """A generator for these keys alone."""
    made = torch.Generator()
    made.manual_seed(int(np.random.SeedSequence([*keys, 1]).generate_state(1, np.uint64)[0] >> np.uint64(1)))
    return made


def _prepare_modules(model: MUBiC, settings: Settings) -> None:
    """What is trained how: adaptive steps are fitted afterwards, VGGish may stay as it is."""
    model.fusion.adaptive.requires_grad_(False)
    if model.config.has_audio and settings.freeze_vggish:
        model.audio_encoder.vggish.requires_grad_(False)
    blocks = [m for m in model.visual_encoder.modules() if isinstance(m, StochasticDepth)]
    for index, block in enumerate(blocks):
        block.p = settings.stochastic_depth * index / max(1, len(blocks) - 1)
    for module in model.modules():
        # depth-wise 3-D convolutions have a quick backward pass on a CPU only with the channels last
        if isinstance(module, nn.Conv3d) and module.groups > 1 and module.stride == (1, 1, 1):
            module.weight.data = module.weight.data.to(memory_format=torch.channels_last_3d)


def _merit(entry: dict[str, Any]) -> tuple[float, int]:
    """What the best epoch has most of: validation CC, none where it is undefined; of equal ones the earlier."""
    return (-math.inf if math.isnan(entry["cc"]) else entry["cc"], -entry["epoch"])


def _write(write: Callable[[], T], path: Path) -> T:
    try:
        return write()
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"{path} cannot be written ({reason}): make room, then go on with --resume; the last save is whole"
        ) from error
