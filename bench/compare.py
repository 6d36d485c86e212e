"""`python -m bench compare A B`: which differences between two runs are real.

A median differs really if the bootstrap interval of the ratio leaves out 1 and the ratio is 2 % or more from it; there
is no difference if the interval keeps within 2 %; else, and of a load of too few rounds, it is undecided. What B did
not measure, or what became NaN or infinite there, is lost. The interval covers what varied within the runs. What the
machine did between them is not in it: hence the warnings about machines, settings and measured limits, and hence one
pair of runs proves little where the difference is small."""

from __future__ import annotations

import argparse
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench import machine, results, text
from bench.results import Results, Row
from bench.timing import Timing, ratio
from mubic_deploy.arguments import number
from mubic_deploy.console import print_json, say, warn
from mubic_deploy.errors import UserError

AT_LEAST = 1.02  # the ratio from which on a difference is worth a word, either way
METRIC_AT_LEAST = 0.0005  # of CC, SIM, NSS and AUC, whose scale is fixed
LIMIT_DRIFT = 0.05  # by which two runs' measured limits may differ
FASTER, SLOWER, ALIKE, UNDECIDED, LOST = "faster", "slower", "no difference", "undecided", "lost"
PERCENTILE = re.compile(r"p\d+_s")
LOOKS = {FASTER: "green", SLOWER: "bold red", LOST: "bold red", "better": "green", "worse": "bold red"}


@dataclass(frozen=True)
class Timed:
    """A row's times in two runs: medians in seconds, b's over a's with its interval; NaN where it is lost.

    wide: the runs in which the row was marked as not to be relied on"""

    what: str
    side: str
    axes: dict[str, int | str]
    a: float
    b: float
    ratio: float
    low: float
    high: float
    verdict: str
    wide: tuple[str, ...]

    @property
    def real(self) -> bool:
        return self.verdict in (FASTER, SLOWER)


@dataclass(frozen=True)
class Value:
    """A row's figure in two runs. It was taken once in each, so there is no interval: `verdict` says which way it went
    where it moved by more than a little, or that it is lost, b being NaN or infinite then."""

    what: str
    side: str
    axes: dict[str, int | str]
    name: str
    a: float
    b: float
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """Two runs of a suite. only: rows that one of them has, as text; both: how many both have."""

    suite: str
    a: str
    b: str
    warnings: list[str]
    times: list[Timed]
    values: list[Value]
    only_a: list[str] = field(default_factory=list)
    only_b: list[str] = field(default_factory=list)
    both: int = 0

    def slower(self, percent: float) -> list[Timed]:
        """Rows that are slower in b by more than `percent` %, wherever in its interval the ratio lies."""
        return [t for t in self.times if 100 * (t.low - 1) > percent]

    def perhaps_slower(self, percent: float) -> list[Timed]:
        """Rows that may be: their interval reaches over it."""
        return [t for t in self.times if 100 * (t.low - 1) <= percent < 100 * (t.high - 1)]

    @property
    def lost(self) -> list[str]:
        """What only A has, by name: rows with their times, and figures of the others."""
        rows = [_name(t) for t in self.times if t.verdict == LOST]
        figures = [v for v in self.values if v.verdict == LOST and _name(v) not in rows]
        return rows + [f"{_name(v)}: {text.heading(v.name)}" for v in figures]

    def to_json(self) -> dict[str, Any]:
        out = asdict(self)
        for row, timed in zip(out["times"], self.times, strict=True):
            row["real"] = timed.real
        return out | {"lost": self.lost}


def compare(a: Results, b: Results, name_a: str = "A", name_b: str = "B") -> Comparison:
    """Pairs the rows of two runs by what was measured, who, and the other settings."""
    rows_a, rows_b = _by_key(a.rows), _by_key(b.rows)
    times, values = [], []
    for key, row_a in rows_a.items():
        row_b = rows_b.get(key)
        if row_a.timing is not None:
            times.append(_timed(row_a, row_a.timing, row_b.timing if row_b else None))
        values += _values(row_a, row_b.values if row_b else {})
    return Comparison(
        a.suite if a.suite == b.suite else f"{a.suite} and {b.suite}",
        name_a,
        name_b,
        warnings(a, b) + _partly(rows_a, rows_b),
        times,
        values,
        [_missing(row, b) for key, row in rows_a.items() if key not in rows_b],
        [_missing(row, a) for key, row in rows_b.items() if key not in rows_a],
        len(rows_a.keys() & rows_b.keys()),
    )


def warnings(a: Results, b: Results) -> list[str]:
    """Why two runs may not compare."""
    found = []
    if a.suite != b.suite:
        found.append(f"A is of the suite {a.suite!r}, B of {b.suite!r}")
    if not machine.same(a.machine, b.machine):
        found.append(f"different machines: A on {hardware(a.machine)}, B on {hardware(b.machine)}")
    for name in sorted(a.limits.keys() & b.limits.keys()):
        change = b.limits[name] / a.limits[name]
        if name.startswith("gemm_") and max(change, 1 / change) > 1 + LIMIT_DRIFT:
            faster = "faster" if change > 1 else "slower"
            rates = " and ".join(text.scaled(r.limits[name], "FLOP/s") for r in (a, b))
            kind = name.removeprefix("gemm_")
            found.append(
                f"the machine itself was {100 * abs(change - 1):.0f} % {faster} in B: matrix products in {kind} "
                f"reached {rates}, so times may differ by as much without any change of ours"
            )
    for name in sorted(a.settings.keys() | b.settings.keys()):
        if a.settings.get(name) != b.settings.get(name):
            found.append(f"the setting {name} differs: {a.settings.get(name)} and {b.settings.get(name)}")
    versions = [r.machine.get("versions", {}) for r in (a, b)]
    for name in sorted(versions[0].keys() | versions[1].keys()):
        old, new = (v.get(name, "not installed") for v in versions)
        if old != new:
            found.append(f"{name} differs: {old} and {new}")
    return found


def hardware(facts: dict[str, Any]) -> str:
    """AMD EPYC (2 cores, NVIDIA H200)."""
    gpu = (facts["gpu"] or {}).get("name", "no GPU")
    return f"{facts['cpu']} ({facts['cores']} cores, {gpu})"


def _by_key(rows: list[Row]) -> dict[tuple, Row]:
    """By key, and for rows of the same key by their order."""
    seen: Counter[tuple] = Counter()
    out = {}
    for row in rows:
        key = (row.what, row.side, *sorted((name, str(value)) for name, value in row.axes.items()))
        out[(*key, seen[key])] = row
        seen[key] += 1
    return out


def _timed(row: Row, a: Timing, b: Timing | None) -> Timed:
    change, low, high = (math.nan,) * 3 if b is None else ratio(b, a)
    if not math.isfinite(change):
        verdict = LOST
    elif not low <= 1 <= high and max(change, 1 / change) >= AT_LEAST:
        verdict = SLOWER if change > 1 else FASTER
    else:
        verdict = ALIKE if low >= 1 / AT_LEAST and high <= AT_LEAST else UNDECIDED
    wide = tuple(name for name, timing in (("A", a), ("B", b)) if timing is not None and timing.wide)
    b_s = math.nan if b is None else b.median
    return Timed(row.what, row.side, row.axes, a.median, b_s, change, low, high, verdict, wide)


def _values(row: Row, b: Mapping[str, float]) -> list[Value]:
    """Of all that A could tell; the ends of intervals are no figures of their own."""
    out = []
    for name, old in row.values.items():
        if not math.isfinite(old) or name.removesuffix("_low").removesuffix("_high") in row.values.keys() - {name}:
            continue
        new, verdict = b.get(name, math.nan), ALIKE
        if name not in b and PERCENTILE.fullmatch(name) and math.isfinite(b.get("median_s", math.nan)):
            continue  # too few answers tell none: `timing.told`
        if not math.isfinite(new):
            verdict = LOST
        elif _moved(name, old, new):
            better = text.better(name, row.what) * (1 if new > old else -1)
            verdict = {0: "changed", 1: "better", -1: "worse"}[better]
        out.append(Value(row.what, row.side, row.axes, name, old, new, verdict))
    return out


def _moved(name: str, old: float, new: float) -> bool:
    if name.startswith(text.METRICS) and "difference" not in name:
        return abs(new - old) > METRIC_AT_LEAST
    smaller, larger = sorted((abs(old), abs(new)))
    return old * new < 0 or (larger > 0 and (smaller == 0 or larger / smaller >= AT_LEAST))


def _partly(rows_a: dict[tuple, Row], rows_b: dict[tuple, Row]) -> list[str]:
    """Rows of both runs that B alone timed."""
    both = rows_a.keys() & rows_b.keys()
    return sorted(f"{_name(rows_a[k])} was timed in B only" for k in both if rows_b[k].timing and not rows_a[k].timing)


def _name(row: Row | Timed | Value) -> str:
    return ", ".join(part for part in (row.what, row.side, text.setting(row.axes)) if part)


def _missing(row: Row, other: Results) -> str:
    why = other.left_out.get(row.side) or other.left_out.get(row.what)
    return _name(row) + (f" (left out: {why})" if why else "")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A", type=Path, help="results, or a folder of them: before")
    parser.add_argument("b", metavar="B", type=Path, help="... after; files of two folders pair by name")
    parser.add_argument(
        "--fail-if-slower",
        metavar="PERCENT",
        type=number,
        help="exit code 1 if a row is slower in B by more than this, with all of its interval, or lost there",
    )
    parser.add_argument("--json", action="store_true", help="one JSON value on stdout")


def run(arguments: argparse.Namespace) -> int:
    """Prints the comparison. 1 if --fail-if-slower finds something, else 0. UserError if nothing can be compared."""
    percent = arguments.fail_if_slower
    if percent is not None and not 0 <= percent < math.inf:
        raise UserError(f"--fail-if-slower {percent:g}: use 0 or more per cent")
    comparisons, only_a, only_b = _load(arguments.a, arguments.b)
    if not any(c.both for c in comparisons):  # nor may --fail-if-slower pass for want of rows
        raise UserError(f"{arguments.a} and {arguments.b} have no row in common: nothing to compare")
    counted = comparisons if percent is not None else []
    slower = [t for c in counted for t in c.slower(percent)]
    perhaps = [t for c in counted for t in c.perhaps_slower(percent)]
    lost = [*(name for c in comparisons for name in c.lost), *only_a]
    alone = [f"{name} is in {a} only" for a, names in ((arguments.a, only_a), (arguments.b, only_b)) for name in names]
    if arguments.json:
        names = {"too_slow": [_name(t) for t in slower], "perhaps_too_slow": [_name(t) for t in perhaps]}
        said = {"warnings": alone, **names, "lost": lost}
        print_json({"comparisons": [c.to_json() for c in comparisons], **said})
    else:
        warn(alone)
        for comparison in comparisons:
            _show(comparison)
        for timed in slower:
            say(f"too slow: {_name(timed)}: {100 * (timed.ratio - 1):.1f} % slower, {percent:g} % are allowed")
        for name in lost if counted else ():
            say(f"lost in B, so nobody knows whether it is worse: {name}")
        if perhaps:
            warn([f"perhaps slower than that, and not counted: {len(perhaps)} rows, measure them again"])
    return 1 if slower or (lost and counted) else 0


def _load(a: Path, b: Path) -> tuple[list[Comparison], list[str], list[str]]:
    """Comparisons of what pairs, and the files that only one folder has."""
    for path in (a, b):
        if not path.exists():
            raise UserError(f"{path} does not exist: name results that `bench run` wrote")
    if a.is_dir() != b.is_dir():
        raise UserError(f"{a} and {b} are a file and a folder: name two files or two folders")
    if not a.is_dir():
        return [compare(results.read(a), results.read(b), str(a), str(b))], [], []
    found_a, found_b = results.read_folder(a), results.read_folder(b)
    if not (names := sorted(found_a.keys() & found_b.keys())):
        raise UserError(f"no file of {a} has the name of one of {b}: name the two files to compare")
    comparisons = [compare(found_a[n], found_b[n], str(a / n), str(b / n)) for n in names]
    return comparisons, sorted(found_a.keys() - found_b.keys()), sorted(found_b.keys() - found_a.keys())


def _show(found: Comparison) -> None:
    screen = Console()
    say(f"{found.suite}: A is {found.a}, B is {found.b}")
    warn(found.warnings)
    if found.times:
        table = Table(title="times, B over A: under 1 is faster", title_justify="left")
        table.add_column("what", overflow="fold")
        for heading in ("A", "B", "B / A", "95 % interval"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("", no_wrap=True)
        for t in found.times:
            verdict = t.verdict + (f", wide in {' and '.join(t.wide)}" if t.wide else "")
            change = f"{t.ratio:.3f}" if t.verdict != LOST else "-"
            figures = (text.seconds(t.a), text.seconds(t.b), change, text.ends(t.low, t.high))
            table.add_row(escape(_name(t)), *figures, verdict, style=LOOKS.get(t.verdict))
        screen.print(table)
    if any(t.wide for t in found.times):
        say("wide: the spread was too large, or the warm-up too short, to rely on the median; measure again")
    if moved := [v for v in found.values if v.verdict != ALIKE]:
        table = Table(title="other figures that moved or were lost, each taken once", title_justify="left")
        for heading, justify in (("what", "left"), ("figure", "left"), ("A", "right"), ("B", "right"), ("", "left")):
            table.add_column(heading, justify=justify, overflow="fold")  # type: ignore[arg-type]
        for v in moved:
            name, values = text.heading(v.name), [text.figure(v.name, x) for x in (v.a, v.b)]
            table.add_row(escape(_name(v)), escape(name), *values, v.verdict, style=LOOKS.get(v.verdict))
        screen.print(table)
    for side, rows in (("A", found.only_a), ("B", found.only_b)):
        for row in rows:
            say(f"only in {side}: {row}")
    count = Counter(t.verdict for t in found.times)
    still = sum(v.verdict == ALIKE for v in found.values)
    gone = sum(v.verdict == LOST for v in found.values)
    say(
        f"{count[FASTER]} faster, {count[SLOWER]} slower, {count[ALIKE]} without a difference, "
        f"{count[UNDECIDED]} undecided"
        + (f", {count[LOST]} lost; " if count[LOST] else "; ")
        + f"{len(found.values) - still - gone} of {len(found.values)} other figures moved"
        + (f", {gone} lost" if gone else "")
    )
