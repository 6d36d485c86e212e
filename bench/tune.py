"""`bench tune`: the server's settings that give the most clips a second on this machine under a latency target.

NVIDIA's Model Analyzer cannot profile an ensemble that contains BLS, hence this one. Every setting is a server of its
own under a load that is kept up; `descent` chooses what is tried."""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import shlex
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tritonclient.utils import InferenceServerException

from bench import text, timing
from bench.descent import RATE, Rank, Verdict, descend, judged, rank
from bench.load import Load, Run, interleaved, kept_up
from bench.results import FOLDER, LOOKS, Results, Row
from bench.run import limits
from bench.serving import PROTOCOLS, addresses, client, serving
from bench.sides import CLIPS, Context, asking, installed_engines
from mubic_deploy.arguments import number, positive
from mubic_deploy.artifacts import Artifacts
from mubic_deploy.config import CONFIGS, MAX_BATCH
from mubic_deploy.console import bar, say, warn
from mubic_deploy.engines import cpu
from mubic_deploy.errors import UserError
from mubic_deploy.graphs import SAMPLER
from mubic_deploy.parity import random_clip
from mubic_deploy.triton.repository import require_repository, write_repository
from mubic_deploy.triton.server import TritonServer, own_command

OUT = Path("out") / "tuned"
SECONDS, QUICK_SECONDS = 10.0, 2.0  # of a trial
PARTS = 2  # of a trial, so that it has a spread
ROUNDS, QUICK_ROUNDS = 8, 5  # of the winner against the default, each half a trial long
DELAYS_US = (0, 500, 2000, 10000)
DEFAULT = "default"
LOOP, DENOISER = "ddim", "denoiser"

Count = Callable[[str, int, int | None], None]  # told what is measured, and how much of how much is done


@dataclass(frozen=True)
class Setting:
    """What `write_repository` is told. instances: of the models that are not in one process, by name. Settings that
    make the same server are equal: see `changed`."""

    engine: str
    threads: int = 0  # one a core
    instances: tuple[tuple[str, int], ...] = ()
    max_batch: int = MAX_BATCH
    queue_delay_us: int = 0
    call_denoiser: bool = False

    def changed(self, **to: Any) -> Setting:
        """With other values. `denoiser` has one instance where nobody calls it, and nobody waits for company that is
        not taken."""
        new = replace(self, **to)
        counts = {name: n for name, n in new.instances if n > 1 and (new.call_denoiser or name != DENOISER)}
        delay = new.queue_delay_us if new.max_batch > 1 else 0
        return replace(new, instances=tuple(sorted(counts.items())), queue_delay_us=delay)

    def with_instances(self, counts: dict[str, int]) -> Setting:
        return self.changed(instances=tuple((dict(self.instances) | counts).items()))

    def options(self) -> dict[str, Any]:
        """For `write_repository`."""
        return asdict(self) | {"instances": dict(self.instances)}

    def flags(self) -> list[str]:
        """For `mubic-deploy serve` and `repository`; none for their defaults."""
        flags = [] if self.engine == cpu.ENGINES[0] else ["--engine", self.engine]
        flags += ["--threads", str(self.threads)] if self.threads else []
        for name, count in self.instances:
            flags += ["--instances", f"{name}={count}"]
        flags += ["--max-batch", str(self.max_batch)] if self.max_batch != MAX_BATCH else []
        flags += ["--queue-delay", str(self.queue_delay_us)] if self.queue_delay_us else []
        return flags + (["--call-denoiser"] if self.call_denoiser else [])

    def text(self, default: Setting) -> str:
        """How it differs from the default."""
        parts = [self.engine] if self.engine != default.engine else []
        parts += [f"threads {self.threads}"] if self.threads else []
        parts += [f"{count} x {name}" for name, count in self.instances]
        parts += [f"max batch {self.max_batch}"] if self.max_batch != default.max_batch else []
        parts += [f"delay {self.queue_delay_us} us"] if self.queue_delay_us else []
        parts += ["calls"] if self.call_denoiser else []
        return ", ".join(parts) or DEFAULT

    def axes(self, models: Sequence[str]) -> dict[str, int | str]:
        """All of it, as a row has it."""
        counts = dict(self.instances)
        return {
            "engine": self.engine,
            "threads": self.threads,
            **{f"instances of {name}": counts.get(name, 1) for name in models},
            "max_batch": self.max_batch,
            "queue_delay_us": self.queue_delay_us,
            "call_denoiser": "yes" if self.call_denoiser else "no",
        }


@dataclass(frozen=True)
class Space:
    """What may be tried. models: that have instances; cores: of the machine; concurrency: clients at once."""

    engines: Sequence[str]
    models: Sequence[str]
    cores: int
    concurrency: int
    target_s: float

    def groups(self) -> list[Callable[[Setting], Iterable[Setting]]]:
        """The alternatives in each respect, for `descend`."""
        batches = sorted({MAX_BATCH, *doublings(max(MAX_BATCH, self.concurrency))})
        delays = [us for us in DELAYS_US if us / 1e6 < self.target_s]
        return [
            lambda s: (s.changed(engine=engine) for engine in self.engines),
            self._threads,
            lambda s: (s.changed(call_denoiser=calls) for calls in (False, True)),
            *[functools.partial(self._instances, model) for model in self.models],
            lambda s: (s.changed(max_batch=batch) for batch in batches),
            lambda s: (s.changed(queue_delay_us=us) for us in delays),
        ]

    def _threads(self, setting: Setting) -> Iterable[Setting]:
        """Alone, and with as many instances of every model as then have cores: fewer threads alone leave cores idle,
        more instances alone fight for them, so one change at a time would find neither."""
        for threads in doublings(self.cores):
            fewer = setting.changed(threads=0 if threads == self.cores else threads)
            yield fewer
            side_by_side = min(self.cores // threads, self.concurrency)
            yield fewer.with_instances(dict.fromkeys(self.models, side_by_side))

    def _instances(self, model: str, setting: Setting) -> Iterable[Setting]:
        return (setting.with_instances({model: n}) for n in doublings(min(self.cores, self.concurrency)))


def doublings(most: int) -> list[int]:
    """1, 2, 4 ... and `most`."""
    return sorted({most, *(2**n for n in range(most.bit_length()) if 2**n < most)})


@dataclass
class Bench:
    """Servers of one folder of graphs, and the load on them."""

    artifacts: Artifacts
    folder: Path
    protocol: str
    concurrency: int
    seconds: float

    def __post_init__(self) -> None:
        self.clips = [random_clip(self.artifacts.config, seed) for seed in range(CLIPS)]

    def trial(self, setting: Setting) -> Load:
        """UserError if the server does not start, or does not answer."""
        with self.server(setting, "trial") as server:
            return self.loads({DEFAULT: server}, self.seconds, PARTS)[DEFAULT]

    def against(self, default: Setting, found: Setting, rounds: int, count: Count) -> dict[str, Load]:
        """Loads of the two, in turn: both servers run, and one of them is asked at a time."""
        with self.server(default, "default") as a, self.server(found, "found") as b:
            servers = {DEFAULT: a, found.text(default): b}
            return self.loads(servers, rounds * self.seconds / PARTS, rounds, count)

    @contextlib.contextmanager
    def server(self, setting: Setting, name: str) -> Iterator[TritonServer]:
        with serving(self.artifacts, self.folder / name, **setting.options()) as server:
            yield server

    def loads(
        self, servers: dict[str, TritonServer], seconds: float, rounds: int, count: Count = lambda *_: None
    ) -> dict[str, Load]:
        runs: dict[str, Run] = {}
        for name, server in servers.items():
            where = addresses(server)[self.protocol]
            opened = functools.partial(client, where, self.protocol)
            runs[name] = functools.partial(kept_up, opened, functools.partial(asking, self.clips), self.concurrency)
        try:
            return interleaved(runs, seconds, rounds, count)
        except InferenceServerException as error:
            raise UserError(f"the server answered with an error: {error.message()}") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--size", choices=list(CONFIGS), default="full", help="default full")
    which.add_argument("--artifacts", metavar="DIR", type=Path, help="your own exported graphs")
    parser.add_argument(
        "--target-ms", metavar="P99", type=number, help="p99 of the latency to stay under (default: none)"
    )
    parser.add_argument("--concurrency", metavar="N", type=positive, default=4, help="clients at once (default 4)")
    parser.add_argument("--protocol", choices=PROTOCOLS, default=PROTOCOLS[0], help=f"default {PROTOCOLS[0]}")
    parser.add_argument("--seconds", metavar="S", type=number, help=f"of each trial (default {SECONDS:g})")
    quick = f"a look: trials of {QUICK_SECONDS:g} s, every setting changed once"
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--out", type=Path, default=OUT, help=f"the best model repository (default {OUT})")
    where = f"default bench/results, or {LOOKS} with --quick or --artifacts"
    parser.add_argument("--results", type=Path, help=f"folder of the results ({where})")


def run(arguments: argparse.Namespace) -> int:
    """Tunes, prints, writes the results and the model repository of the best setting. UserError if it cannot."""
    seconds = arguments.seconds or (QUICK_SECONDS if arguments.quick else SECONDS)
    target_s = math.inf if arguments.target_ms is None else arguments.target_ms / 1000
    given = Artifacts.open(arguments.artifacts) if arguments.artifacts else None
    results = arguments.results or (LOOKS if arguments.quick or given else FOLDER)
    _check(arguments, results)
    with tempfile.TemporaryDirectory(prefix="mubic-tune-") as folder, bar("tune") as progress:
        counted: Count = lambda what, done, total: progress(f"tune: {what}", done, total)  # noqa: E731
        context = Context(arguments.size, 0, Path(folder), lambda what: progress(f"tune: {what}", 0, None), counted)
        artifacts = given or context.artifacts
        bench = Bench(artifacts, Path(folder), arguments.protocol, arguments.concurrency, seconds)
        settings = {name: getattr(arguments, name) for name in ("concurrency", "protocol", "target_ms", "quick")}
        size, cores = artifacts.config.name, cpu.cores()
        if given:
            settings["artifacts"] = str(arguments.artifacts)
        found = Results("tune", {"size": size, "threads": cores, "seconds": seconds, **settings})
        with limits(found, 0, context.say):
            best = tune(bench, target_s, arguments.quick, found, counted)
    source = ["--artifacts", str(arguments.artifacts)] if arguments.artifacts else []
    source = source or (["--checkpoint", context.checkpoint] if size == "full" else [])
    command = shlex.join(["mubic-deploy", "serve", *source, *best.flags()])
    found.notes["command"] = command
    path = results / f"tune_{size}.json"
    found.write(path)
    write_repository(artifacts, arguments.out, **best.options())
    _show(found)
    say(f"{path}")
    say(f"{arguments.out}: serve it with {shlex.join(own_command(arguments.out))}, or with")
    say(f"  {command}")
    return 0


def _check(arguments: argparse.Namespace, results: Path) -> None:
    """What would fail at the end fails at once."""
    for flag, value in (("--target-ms", arguments.target_ms), ("--seconds", arguments.seconds)):
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{flag} {value:g} is out of range: use more than 0")
    require_repository(arguments.out)
    for folder in (arguments.out.resolve().parent, results):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder} cannot be written ({error.strerror or error}): choose another") from None


def tune(bench: Bench, target_s: float, quick: bool, found: Results, count: Count) -> Setting:
    """The setting to keep; adds to `found` a row for each that was tried, and two where one was better."""
    installed = installed_engines(found.left_out)
    models = [*(name for name in bench.artifacts.signatures if name != SAMPLER), LOOP]
    default = Setting(installed[0])
    space = Space(installed, models, cpu.cores(), bench.concurrency, target_s)
    tried = 0

    def measure(setting: Setting) -> Rank | None:
        nonlocal tried
        name = setting.text(default)
        count(name, tried, None)
        tried += 1
        try:
            load = bench.trial(setting)
        except UserError as error:
            if setting == default:
                raise
            found.left_out[name] = str(error)
            return None
        found.rows.append(_row("tune", name, setting.axes(models), load, target_s))
        return rank(load.clips_per_s, load.timing.percentile(99), target_s)

    best, _ = descend(default, space.groups(), measure, rounds=1 if quick else None)
    if best == default:
        found.notes["verdict"] = "no other setting was better: the default stays"
        return default
    try:
        loads = bench.against(default, best, QUICK_ROUNDS if quick else ROUNDS, count)
    except UserError as error:
        found.notes["verdict"] = f"{best.text(default)} and the default do not run side by side: the default stays"
        found.left_out["tuned"] = str(error)
        return default
    verdict = judged(loads[DEFAULT], loads[best.text(default)], target_s)
    axes: dict[str, int | str] = {"protocol": bench.protocol, "concurrency": bench.concurrency}
    found.rows += [_row("tuned", name, axes, load, target_s) for name, load in loads.items()]
    found.rows[-1].values |= timing.with_ends("gain", (verdict.gain, verdict.low, verdict.high))
    found.notes["verdict"] = _said(best.text(default), verdict)
    return best if verdict.real else default


def _row(what: str, side: str, axes: dict[str, int | str], load: Load, target_s: float) -> Row:
    values = {"clips_per_s": load.clips_per_s, "spread": load.spread}
    if math.isfinite(target_s):
        values["meets_target"] = float(load.timing.percentile(99) <= target_s)
    return Row(what, side, axes, load.timing, values)


def _said(name: str, verdict: Verdict) -> str:
    """In one sentence."""
    of = "the default's clips a second" if verdict.figure == RATE else "better p99 than the default's"
    interval = f"{verdict.gain:.3f} x {of} (95 %: {text.ends(verdict.low, verdict.high)})"
    if verdict.real:
        return f"{name}: {interval}, it is kept"
    why = "but it misses the target" if verdict.misses else "which is no real difference"
    return f"{name}: {interval}, {why}: the default stays"


def _show(found: Results) -> None:
    """What was tried, the best first, the two that were measured side by side, and the verdict."""
    settings = found.settings
    target = "" if settings["target_ms"] is None else f", p99 under {settings['target_ms']:g} ms"
    clients = f"{settings['concurrency']} clients over {settings['protocol']}"
    table = Table(title=f"tune, {settings['size']}, {clients}{target}")
    headings = ("setting", "clips/s", "spread", "median", "p99", *(["target"] if target else []))
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "setting" else "right")
    tuned = [row for row in found.rows if row.what == "tuned"]
    trials = [row for row in found.rows if row.what == "tune"]
    order = lambda row: (row.values.get("meets_target", 1), row.values["clips_per_s"])  # noqa: E731
    for rows in (sorted(trials, key=order, reverse=True), tuned):
        for row in rows:
            assert row.timing is not None
            times = [text.seconds(s) for s in (row.timing.median, row.timing.percentile(99))]
            met = [] if not target else ["met" if row.values["meets_target"] else "missed"]
            rate, spread = text.digits(row.values["clips_per_s"]), f"{100 * row.values['spread']:.1f} %"
            table.add_row(row.side, rate, spread, *times, *met)
        table.add_section()
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # a file has room
    console.print(table)
    warn([f"{name} was left out: {why}" for name, why in found.left_out.items()])
    if trials and not any(row.values.get("meets_target", 1) for row in tuned or trials):
        warn([f"no setting met the target{target}: the lowest p99 counted"])
    say(str(found.notes["verdict"]))
