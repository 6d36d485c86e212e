#!/usr/bin/env python3
"""Which tiles our Triton kernels want on this GPU: each launch that clips make, in its own tiles and in all that differ
from them in one number.

    python bench/tiles.py --out bench/results

It needs PyTorch and the GPU. A launch is timed by itself inside a CUDA graph, its tensors in the GPU's cache as far as
they fit, FP16, random weights, four steps. Tiles that do not fit the GPU, or compute something else, are named. What it
finds goes into the tables of `mubic_deploy.model.products`, `windows` and `kernels` by hand, and then through
`bench/gpu.py`: a kernel that is faster by itself need not be so beside others."""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

if __name__ == "__main__":  # as a script, so that `bench` is found
    sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch._library.triton import set_wrap_triton_enabled
from triton.runtime._async_compile import AsyncCompileMode

from bench import machine, text, timing
from bench.gpu_run import chain
from bench.results import FOLDER, Results, Row
from bench.stages import REFERENCE, switches, weights
from mubic_deploy.arguments import Parser, minutes, positive
from mubic_deploy.cli import guarded
from mubic_deploy.config import CONFIGS, DEFAULT_STEPS, ON_GPU, Config, get_config
from mubic_deploy.engines.replay import captured
from mubic_deploy.errors import UserError
from mubic_deploy.graphs import FLOAT16, signatures
from mubic_deploy.model import kernels, products, tokens, windows
from mubic_deploy.model.mubic import MUBiC
from mubic_deploy.model.precision import prepared
from mubic_deploy.parity import random_clip

Tile = Any  # of one of the three modules
BATCHES = (1, 32)
REPEATS = 20  # of a launch in a graph, which share what its start and end take
RULE = timing.Rule(repeats=20, seconds=0.2, short_s=0.0, warm_up_s=0.2)  # of REPEATS launches
NEAR = 0.01  # of the largest value: FP16's rounding, and sums in another order
LEAST = dict.fromkeys("mnk", 16)  # that the GPU multiplies; of all else 1
MOST = {"warps": 16, "stages": 7, "times": 8}


# ---- what is launched


@dataclass(frozen=True)
class Kind:
    """A function that launches kernels in tiles, by its module and name. Of its arguments:

    tile    in which it launches
    launch  it once more, in these tiles
    words   what tells one of its launches from another, for people
    inner   multiply-adds of an element of the result"""

    module: ModuleType
    name: str
    tile: Callable[..., Tile]
    launch: Callable[..., Any]
    words: Callable[..., list[str]]
    inner: Callable[..., int]


def of_products() -> Kind:
    launched = products.launched

    def launch(tile: Tile, _kernel: Any, _tile: Tile, *given: Any, **more: Any) -> Tensor:
        kernel = products.wrap_triton(products._product)
        return launched(kernel, tile, *given, **more)[0]  # its moments differ from tile to tile

    def words(_kernel: Any, _tile: Tile, _x: Tensor, weight: Tensor, *given: Any, moments: bool) -> list[str]:
        bias, residual, sums, before, _, gelu = given
        there = {"no bias": bias is None, "norm": sums is not None, "its moments given": before is not None}
        there |= {"GELU": gelu, "residual": residual is not None, "moments": moments}
        n, k = weight.shape
        return [f"product {k} to {n}", *(word for word, is_so in there.items() if is_so)]

    return Kind(products, "launched", lambda *a, **_: a[1], launch, words, lambda *a, **_: a[3].shape[1])


def of_windows() -> Kind:
    launched = windows.launched

    def launch(tile: Tile, _kernels: Any, _tile: Tile, *given: Any) -> Tensor:
        both = (windows.wrap_triton(windows._window_product), windows.wrap_triton(windows._parts_added))
        return launched(both, tile, *given)

    def words(_kernels: Any, _tile: Tile, x: Tensor, weight: Tensor, *given: Any) -> list[str]:
        _, modulation, residual, kernel, stride, *_ = given
        n, k = weight.shape
        out = [f"windows {k} to {n}", by(x.shape[1:-1]), f"kernel {by(kernel)}", f"stride {by(stride)}"]
        return out + ["modulated"] * (modulation is not None) + ["residual"] * (residual is not None)

    return Kind(windows, "launched", lambda *a: a[1], launch, words, lambda *a: a[3].shape[1])


def of_depthwise() -> Kind:
    launched = kernels.launched

    def launch(tile: Tile, *given: Any) -> Tensor:
        return launched(*given, tile=tile)

    def words(_x: Tensor, weight: Tensor, bias: Any, residual: Any, scale: Tensor, *given: Any) -> list[str]:
        *_, grid, stride, _ = given
        d = scale.shape[1]
        out = [f"depth-wise {weight.shape[1] // d} x {d}", by(grid), f"stride {stride}"]
        return out + ["bias"] * (bias is not None) + ["residual"] * (residual is not None)

    return Kind(kernels, "launched", lambda *a: kernels.chosen(a[4].shape[1]), launch, words, lambda *_: 27)


def of_pairs() -> Kind:
    launched = kernels.launched_both

    def launch(tile: Tile, *given: Any) -> tuple[Tensor, Tensor]:
        return launched(*given, tiles=[tile, tile])

    def words(_x: Tensor, maps: list[Tensor], scales: list[Tensor], *given: Any) -> list[str]:
        *_, grid, strides, _ = given
        d = scales[0].shape[1]
        groups = " and ".join(str(weight.shape[1] // d) for weight in maps)
        return [f"depth-wise {groups} x {d}", by(grid), f"strides {' and '.join(map(str, strides))}"]

    return Kind(kernels, "launched_both", lambda *_: kernels.PAIRED, launch, words, lambda *_: 27)


def by(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))


KINDS = (of_pairs(), of_depthwise(), of_windows(), of_products())  # those first that take a compiler the longest


@dataclass
class Launch:
    """What was launched, and how often."""

    kind: Kind
    given: tuple[Any, ...]
    more: dict[str, Any]
    times: int = 0

    @property
    def name(self) -> str:
        return ", ".join(self.kind.words(*self.given, **self.more))

    @property
    def tile(self) -> Tile:
        return self.kind.tile(*self.given, **self.more)

    def __call__(self, tile: Tile) -> tuple[Tensor, ...]:
        """Once more, in these tiles, as an operator launches it: not by way of what PyTorch traces kernels with."""
        with set_wrap_triton_enabled(False):
            made = self.kind.launch(tile, *self.given, **self.more)
        return made if isinstance(made, tuple) else (made,)

    def values(self) -> dict[str, float]:
        """Multiply-adds, bytes that are read and written once, and how many times that is launched."""
        made = self(self.tile)
        tensors = {x.data_ptr(): x for x in (*flat((*self.given, *self.more.values())), *made)}
        macs = sum(x.numel() for x in made) * self.kind.inner(*self.given, **self.more)
        sizes = {"macs": macs, "bytes": sum(x.nbytes for x in tensors.values()), "times": self.times}
        return {name: float(size) for name, size in sizes.items()}


def flat(given: Sequence[Any]) -> list[Tensor]:
    """The tensors among arguments, of which some are lists of them."""
    inner = [y for x in given for y in (x if isinstance(x, list | tuple) else [x])]
    return [x for x in inner if isinstance(x, Tensor)]


def described(given: Any) -> Any:
    """What tells arguments from those of another launch."""
    if isinstance(given, Tensor):
        return (*given.shape, str(given.dtype))
    if isinstance(given, list | tuple):
        return tuple(map(described, given))
    return given if isinstance(given, int | float | str) else None  # of a kernel


@contextlib.contextmanager
def noted() -> Iterator[dict[Any, Launch]]:
    """What is launched inside, those of the same sizes as one."""
    found: dict[Any, Launch] = {}

    def noting(kind: Kind, own: Callable[..., Any]) -> Callable[..., Any]:
        def launched(*given: Any, **more: Any) -> Any:
            key = (kind, described(given), described(tuple(more.items())))
            found.setdefault(key, Launch(kind, given, more)).times += 1
            return own(*given, **more)

        return launched

    with contextlib.ExitStack() as patches:
        for kind in KINDS:
            own = getattr(kind.module, kind.name)
            patches.enter_context(patch.object(kind.module, kind.name, noting(kind, own)))
        yield found


def launches(model: MUBiC, batch: int, device: str) -> list[Launch]:
    """What clips launch on their way."""
    given = chain(model.config, random_clip(model.config, 0, batch))
    tensors = {name: torch.from_numpy(array).to(device) for name, array in given.items()}
    with torch.no_grad(), noted() as found:
        for name, signature in signatures(model.config, FLOAT16, sampler=True).items():
            if name != "denoiser":  # the sampler is four of it
                made = model.graph(name, DEFAULT_STEPS)(*(tensors[key] for key in signature.input_names))
                tensors |= zip(signature.output_names, [made] if isinstance(made, Tensor) else made, strict=True)
    return list(found.values())


# ---- in which tiles


def neighbours(tile: Tile) -> list[Tile]:
    """The tile, and those that differ from it in one number: half or twice of it, of stages one less or more."""
    out = [tile]
    for field, size in tile._asdict().items():
        others = (size - 1, size + 1) if field == "stages" else (size // 2, size * 2)
        out += [tile._replace(**{field: n}) for n in others if LEAST.get(field, 1) <= n <= MOST.get(field, 512)]
    return out


class Compiled:
    """A kernel that is compiled in place of being launched."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *given, **more: self.kernel.warmup(*given, grid=grid, **more)


@contextlib.contextmanager
def without_values(kernel: Callable[[Any], Any]) -> Iterator[None]:
    """Tensors without values go the way of those on a GPU, with this in the place of each kernel."""
    with contextlib.ExitStack() as patches:
        patches.enter_context(patch.object(tokens, "has_kernels", lambda _: True))
        for module in (products, windows, kernels):
            patches.enter_context(patch.object(module, "wrap_triton", kernel))
        yield


def compile_all(model: MUBiC, batch: int) -> None:
    """What clips launch, in all its tiles, on all cores: one after the other they would take minutes. What cannot be
    compiled says so when it is launched."""
    cores = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(cores) as pool, AsyncCompileMode(pool, ignore_errors=True), without_values(Compiled):
        found = launches(copy.deepcopy(model).to("meta"), batch, "meta")
        for launch in sorted(found, key=lambda launch: KINDS.index(launch.kind)):
            for tile in neighbours(launch.tile):
                launch(tile)


def distance(x: Tensor, y: Tensor) -> float:
    """The largest difference, in parts of y's largest value."""
    return float((x.float() - y.float()).abs().max() / y.float().abs().max())


def side(launch: Launch, tile: Tile, device: str) -> timing.Side:
    """REPEATS of a launch."""

    def repeated() -> tuple[Tensor, ...]:
        for _ in range(REPEATS - 1):
            launch(tile)  # into the same memory as the one before
        return launch(tile)

    if device != "cuda":
        return lambda _: repeated()
    graph, _ = captured(repeated, [], torch.cuda.Stream())
    return lambda _: graph.replay()


def sides(launch: Launch, device: str, unable: Callable[[Tile, str], None]) -> dict[Tile, timing.Side]:
    """What times each tile. unable: is told of the others, and why they cannot be timed. A GPU that runs nothing any
    more raises what was the last error."""
    able: dict[Tile, timing.Side] = {}

    def failed(tile: Tile, error: Exception) -> None:
        unable(tile, text.reason(error))
        if device == "cuda":
            torch.cuda.synchronize()

    try:
        right = launch(launch.tile)
    except Exception as error:  # then it is not known what is right
        failed(launch.tile, error)
        return able
    for tile in neighbours(launch.tile):
        try:
            far = [distance(x, y) for x, y in zip(launch(tile), right, strict=True)]
            if all(d <= NEAR for d in far):  # which NaN is not
                able[tile] = side(launch, tile, device)
            else:
                unable(tile, f"differs by {', '.join(f'{d:.2g}' for d in far)} of the largest value")
        except Exception as error:  # too much shared memory, what cannot be compiled, an access beside a tensor
            failed(tile, error)
    return able


# ---- the measurement


def measure(
    found: Sequence[Launch], batch: int, results: Results, device: str, until: float, say: Callable[[str], None]
) -> None:
    """A row for each tile of each launch, those that make the most multiply-adds first. What there is no time for is
    named, and so are tiles that cannot be timed."""
    clock = timing.cuda_events if device == "cuda" else timing.wall
    sized = [(launch, launch.values()) for launch in found]
    for launch, values in sorted(sized, key=lambda pair: -pair[1]["times"] * pair[1]["macs"]):
        if time.monotonic() > until:
            results.left_out[f"{launch.name}, batch {batch}"] = "there was no time"
            continue

        def unable(tile: Tile, why: str, name: str = launch.name) -> None:
            results.left_out[f"{name}, batch {batch}, {written(tile)}"] = why

        named = {written(tile): call for tile, call in sides(launch, device, unable).items()}
        axes: dict[str, int | str] = {"batch": batch, "own": written(launch.tile)}
        for tile, timed in (timing.measure(named, RULE, clock) if named else {}).items():
            each = replace(timed, samples=tuple(s / REPEATS for s in timed.samples))
            results.rows.append(Row(launch.name, tile, axes, each, values))
        say(f"{launch.name}, batch {batch}: {len(named)} of {len(neighbours(launch.tile))} tiles")


def written(tile: Tile) -> str:
    return ", ".join(f"{field} {size}" for field, size in tile._asdict().items())


def summary(results: Results) -> Table:
    """Of each launch its own tile and the fastest one."""
    table = Table(title="Microseconds of a launch; what its best tile saves in all of its launches, and surely")
    for heading in ("batch", "launch", "times", "at least", "own", "best", "tile", "saves", "surely"):
        table.add_column(heading, justify="left" if heading in ("launch", "tile") else "right")
    groups: dict[tuple[Any, str], dict[str, Row]] = defaultdict(dict)
    for row in results.rows:
        groups[row.axes["batch"], row.what][row.side] = row
    for (batch, what), rows in groups.items():
        timings = {name: row.timing for name, row in rows.items() if row.timing is not None}
        row = next(iter(rows.values()))
        own, best = str(row.axes["own"]), min(timings, key=lambda name: timings[name].median)
        if own not in timings:
            continue
        ratio, low, _ = timing.ratio_in_run(timings[own], timings[best])
        least = max((results.least_s(row) or {}).values(), default=0.0)
        in_all = row.values["times"] * timings[own].median
        seconds = (least, timings[own].median, timings[best].median)
        saved = (in_all * (1 - 1 / max(r, 1.0)) for r in (ratio, low))
        shown, saves = ([f"{1e6 * s:.1f}" for s in each] for each in (seconds, saved))
        tile = "" if best == own else best
        table.add_row(str(batch), what, f"{row.values['times']:.0f}", *shown, tile, *saves)
    return table


def run(config: Config, batches: Sequence[int], minutes: float, out: Path, device: str = "cuda") -> Results:
    """All of it on the device, each batch size for as long, once all is compiled. What there is is written after each
    launch: a machine that is lent may be taken back at any time."""
    name = torch.cuda.get_device_name() if device == "cuda" else device
    path, console = out / f"tiles_{config.name}_{text.slug(name)}.json", Console(stderr=True)
    results = Results("tiles", {"size": config.name, "steps": DEFAULT_STEPS, "precision": FLOAT16, "quick": False})

    def say(what: str) -> None:
        console.print(what, markup=False, soft_wrap=True)

    def done(what: str) -> None:
        say(what)
        results.finish()
        results.write(path)

    with switches(REFERENCE):
        results.limits = machine.limits(device)
        model = prepared(weights(config, True, device), FLOAT16, ON_GPU)
        say("compiling")
        for batch in batches:
            compile_all(model, batch)
        ends = time.monotonic() + 60 * minutes
        for left, batch in zip(range(len(batches), 0, -1), batches, strict=True):
            until = time.monotonic() + (ends - time.monotonic()) / left
            found = launches(model, batch, device)
            say(f"batch {batch}: {len(found)} launches")
            measure(found, batch, results, device, until, done)
        done("done")  # with what there was no time for
    return results


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(CONFIGS), default="full")
    parser.add_argument("--batch", type=positive, nargs="+", default=list(BATCHES), help="clips at once (default 1 32)")
    parser.add_argument("--minutes", type=minutes, default=4.0, help="once all is compiled (default 4)")
    parser.add_argument("--out", type=Path, default=FOLDER, help="default bench/results")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise UserError("PyTorch finds no NVIDIA GPU here: run this on a machine with one")
    found = run(get_config(arguments.size), arguments.batch, arguments.minutes, arguments.out)
    Console(width=200).print(summary(found))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
