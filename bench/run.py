"""`bench run SUITE`: measures, prints, writes one results file a suite."""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from rich.console import Console
from rich.table import Table

from bench import machine, text, timing
from bench.results import FOLDER, LOOKS, Results
from bench.serving import GRPC, HTTP, client
from bench.sides import Context, Say
from mubic_deploy.arguments import MOST_PORT
from mubic_deploy.config import CONFIGS
from mubic_deploy.console import bar, say, warn
from mubic_deploy.engines import cpu
from mubic_deploy.errors import UserError


def add_arguments(parser: argparse.ArgumentParser, suites: list[str]) -> None:
    parser.add_argument("suite", choices=[*suites, "all"], help="what to measure")
    parser.add_argument("--size", choices=list(CONFIGS), default="full", help="default full")
    parser.add_argument("--quick", action="store_true", help="a look: few calls, wide intervals")
    cores = cpu.cores()
    parser.add_argument("--threads", type=int, default=cores, help=f"of every side (default: one a core, {cores})")
    where = f"default bench/results, or {LOOKS} with --quick, other --threads or --url"
    parser.add_argument("--out", type=Path, help=f"folder of the results ({where})")
    running = "server: of a Triton server that runs already, which then is measured alone"
    parser.add_argument("--url", metavar="HOST:PORT", type=address, help=f"{running}; gRPC's port")
    parser.add_argument("--http-url", metavar="HOST:PORT", type=address, help="its port of HTTP, to measure that too")


def address(text: str) -> str:
    host, _, port = text.rpartition(":")
    if not host or "/" in host or not port.isdecimal() or not 0 < int(port) <= MOST_PORT:
        raise argparse.ArgumentTypeError(f"{text} is no address of a server: use HOST:PORT, as 127.0.0.1:8000")
    return text


def run(arguments: argparse.Namespace) -> int:
    from bench.suites import SUITES

    if not 1 <= arguments.threads <= len(os.sched_getaffinity(0)):
        raise UserError(f"{arguments.threads} threads are out of range: use 1 to {len(os.sched_getaffinity(0))}")
    running = {GRPC: arguments.url, HTTP: arguments.http_url}
    addresses = {protocol: where for protocol, where in running.items() if where}
    if addresses and (arguments.suite != "server" or not arguments.url):
        raise UserError("--url is for the suite server, and --http-url goes with it")
    for protocol, where in addresses.items():  # or it would be found out when the machine was measured
        client(where, protocol).close()
    look = arguments.quick or addresses or arguments.threads != cpu.cores()
    out = arguments.out or (LOOKS if look else FOLDER)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out} cannot be made ({error.strerror}): choose another --out") from None
    failed = []
    for suite in SUITES if arguments.suite == "all" else [arguments.suite]:
        try:
            results = measure(suite, arguments.size, arguments.threads, arguments.quick, addresses)
            path = out / f"{suite}_{arguments.size}.json"
            results.write(path)
        except Exception as error:
            if arguments.suite != "all":
                raise
            failed.append(suite)
            if not isinstance(error, UserError):  # the other suites are worth hours, too
                traceback.print_exc()
            warn([f"{suite} was left out: {error}"])
            continue
        show(results)
        say(f"{path}")
    if failed:
        raise UserError(f"left out: {', '.join(failed)}: mend what is said above, then run each alone")
    return 0


def measure(
    suite: str, size: str, threads: int, quick: bool, addresses: Mapping[str, str] = MappingProxyType({})
) -> Results:
    """One suite with all that belongs to it: the machine, its limits before and after. addresses: as `Context` has
    them."""
    from bench.suites import SUITES

    rule = timing.QUICK if quick else timing.Rule()
    results = Results(suite, {"size": size, "threads": threads, "quick": quick})
    with (
        machine.torch_threads(threads),
        tempfile.TemporaryDirectory(prefix="mubic-bench-") as folder,
        bar(suite) as progress,
    ):
        context = Context(
            size,
            threads,
            Path(folder),
            say=lambda text: progress(f"{suite}: {text}", 0, None),
            count=lambda name, done, total: progress(f"{suite}: {name}", done, total),
            addresses=addresses,
        )
        with limits(results, threads, context.say):
            SUITES[suite](context, rule, results)
    return results


@contextlib.contextmanager
def limits(results: Results, threads: int, say: Say) -> Iterator[None]:
    """What is measured within, between two measurements of the machine, of which the better one is its limit. Rows that
    say what they compute get the share of it that they reached. A machine that changed is warned of."""
    say("measuring the machine")
    before = machine.limits(threads=threads)
    yield
    say("measuring the machine again")
    after = machine.limits(threads=threads)
    results.limits = machine.best(before, after)
    results.notes |= {"limits_before": before, "limits_after": after}
    results.finish()
    for row in results.rows:
        if (share := results.share_of_limit(row)) is not None:
            row.values["share_of_limit"] = share
    rates = [measured["gemm_float32"] / 1e9 for measured in (before, after)]
    if abs(rates[1] / rates[0] - 1) > timing.WIDE:
        warn([f"the machine's GEMM rate went from {rates[0]:.0f} to {rates[1]:.0f} GFLOP/s during the run"])


def show(results: Results) -> None:
    """The rows as a table, and what was left out."""
    settings = results.settings
    table = Table(title=f"{results.suite}, {settings['size']}, {settings['threads']} threads")
    for heading in ("", "side", "median ms", "95 %", "p99 ms", "calls", "more"):
        table.add_column(heading, justify="right" if heading in ("median ms", "95 %", "p99 ms", "calls") else "left")
    for row in results.rows:
        times = [""] * 4
        if row.timing is not None:
            low, high = (1000 * end for end in row.timing.interval)
            mark = " *" if row.timing.wide else ""
            times = [
                f"{1000 * row.timing.median:.1f}{mark}",
                text.ends(low, high, ".1f"),
                f"{1000 * row.timing.percentile(99):.1f}" if 99 in timing.told(len(row.timing.samples)) else "-",
                str(len(row.timing.samples)),
            ]
        more = {**row.axes, **{key: f"{value:.4g}" for key, value in row.values.items()}}
        table.add_row(row.what, row.side, *times, ", ".join(f"{key} {value}" for key, value in more.items()))
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # a file has room
    console.print(table)
    gemm, copy = results.limits["gemm_float32"], results.limits["copy"]
    console.print(f"this machine at best: {gemm / 1e9:.0f} GFLOP/s in FP32, {copy / 1e9:.0f} GB/s copied")
    if any(row.timing is not None and row.timing.wide for row in results.rows):
        console.print("* too wide, or not settled: measure again on a quieter machine")
    warn([f"{name} was left out: {why}" for name, why in results.left_out.items()])
