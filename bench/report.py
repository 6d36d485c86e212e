"""`python -m bench report`: all results of a folder as one page with its charts, and the charts as PNGs.

What rows become which chart stands in `bench.groups`. A chart appears only where its data is; a table always does."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Collection, Iterator
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

from bench import page, text
from bench.drawing import Styles
from bench.goals import NO, UNDECIDED, outcomes
from bench.groups import Group, first_of, group_charts, groups, reached, roofline, with_gains
from bench.page import Chart
from bench.results import FOLDER, Results, Row, read_folder
from bench.timing import CONFIDENCE, FEW, PERCENTILES, WIDE, ratio_in_run
from mubic_deploy.console import bar, say
from mubic_deploy.errors import UserError
from mubic_deploy.folders import replacing

PAGE = "report.html"
OUT = Path("out") / "bench"
QUICK = "quick"  # a setting
TITLE = "MUBiC Deploy, measured"
ABOUT = {  # suites, as they come on the page
    "engines": "Each graph, and the whole inference, by engine.",
    "waterfall": "What each technique gives, added to all those before it.",
    "steps": "What a denoising step more costs.",
    "batch": "What clips together give.",
    "server": "Triton, from the client's call to its answer. Of a load, figures up to the number of calls are of all "
    "calls, those behind it medians over the rounds, for our clients as for perf_analyzer.",
    "transport": "What a clip's way to Triton and back takes, without what is computed there.",
    "tune": "The server's settings, one changed at a time.",
    "parity": "How far the engines' maps are from eager PyTorch's in FP32, and from where viewers looked.",
    "growth": "How time and memory grow.",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", metavar="DIR", type=Path, nargs="?", default=FOLDER, help="default bench/results")
    parser.add_argument("--out", metavar="OUT", type=Path, default=OUT, help=f"a report's folder (default {OUT})")


def run(arguments: argparse.Namespace) -> int:
    """Writes the report. UserError if there are no results, or OUT cannot or should not be written."""
    found = read_folder(arguments.results)
    require_report(arguments.out)
    with bar("drawing") as progress:
        pictures = write(found, arguments.out, progress)
    say(f"{arguments.out / PAGE}: {len(found)} results, {pictures} charts, which are there as PNGs too")
    return 0


def require_report(out: Path) -> None:
    """UserError unless `out` is new, empty, or holds a report and nothing else: it will be replaced."""
    if not out.exists():
        return
    names = sorted(p.name for p in out.iterdir()) if out.is_dir() else [out.name]
    strange = [name for name in names if name != PAGE and not name.endswith(".png")]
    if not out.is_dir() or strange or (names and PAGE not in names):
        raise UserError(f"{out} exists and holds what is no report ({(strange or names)[0]}): choose another --out")


def write(found: dict[str, Results], out: Path, progress: Any = lambda *_: None) -> int:
    """The page and its PNGs into `out`, whole or not at all; how many charts there are. found: by file name."""
    styles, drawn = Styles(), 0
    found = dict(sorted(found.items(), key=lambda item: (_place(item[1].suite), item[0])))
    try:
        with replacing(out) as folder:
            sections = []
            for i, (name, results) in enumerate(found.items()):
                progress(f"drawing {name}", i, len(found))
                section, charts = _section(name, results, styles)
                sections.append(section)
                for chart in charts:
                    page.png(chart, folder)
                drawn += len(charts)
            body = "\n".join([_opening(found), _goals(found), *sections, _machines(found)])
            (folder / PAGE).write_text(page.document(TITLE, body), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror or error}): choose another --out") from None
    return drawn


def _opening(found: dict[str, Results]) -> str:
    """What was measured on what, when, from which commit, and what is not there."""
    about: dict[str, dict[str, Results]] = {}
    for name, results in found.items():
        about.setdefault(_hardware(results), {})[Path(name).stem] = results
    if len(about) == 1:
        measured = [f"Measured on {hardware}, {_when(runs.values())}." for hardware, runs in about.items()]
    else:
        measured = [
            f"{', '.join(runs)}: measured on {hardware}, {_when(runs.values())}." for hardware, runs in about.items()
        ]
    missing: dict[str, list[str]] = {}
    for name, results in found.items():
        for side, why in results.left_out.items():
            missing.setdefault(f"{side} ({why.rstrip('.')})", []).append(Path(name).stem)
    everywhere = len(found)
    left = [m if len(n) == everywhere else f"{m} in {', '.join(n)}" for m, n in missing.items()]
    measured.append(f"Left out: {'; '.join(left)}." if left else "Nothing was left out.")
    links = "".join(f'<li><a href="#{_slug(n)}">{escape(_heading(n, r))}</a></li>' for n, r in found.items())
    reading = (
        f"Figures are medians of all calls, beside them the {100 * CONFIDENCE:.0f} % bootstrap interval of the median; "
        "p95 is what 95 of 100 calls stayed under, left out where so few calls cannot tell. The ratio is to the "
        f"table's first side with the same settings: under 1 is faster. A load of fewer than {FEW} rounds has no "
        f"interval. <mark>{text.UNSURE}</mark> marks a gain whose interval includes 1, <mark>wide</mark> a median that "
        f"has none, or one of more than {100 * WIDE:.0f} % to each side, <mark>not settled</mark> one whose warm-up "
        "calls still changed: rely on neither."
    )
    return (
        f"<h1>{escape(TITLE)}</h1>\n<p>{escape(' '.join(measured))}</p>\n<p>{reading}</p>\n"
        f'<nav aria-label="Results"><ul>{links}<li><a href="#machines">Machines and software</a></li></ul></nav>'
    )


def _goals(found: dict[str, Results]) -> str:
    """What was aimed at beside what was measured; nothing where no goal was measured."""
    if not any(outcome.figure for outcome in outcomes(found)):
        return ""
    rows = []
    for outcome in outcomes(found, absent=True):
        goal, figure, said = outcome.goal, outcome.figure, outcome.reached
        measured = f"{figure.measured:.4g} {goal.unit}".rstrip() if figure else "-"
        interval = text.ends(*figure.interval, ".4g") if figure and figure.interval else "-"
        if figure and not figure.settled:
            interval += " <mark>not settled</mark>"
        strong = f"<strong>{said}</strong>" if said in (NO, UNDECIDED) else said
        bounds = escape(goal.bounds)
        if goal.unit:
            bounds = bounds.replace(f" {goal.unit}", f"&nbsp;{goal.unit}")  # or a line would begin with it
        rows.append([escape(goal.name), bounds, measured, interval, strong])
    headings = ["what", "goal", "measured", "interval", "reached"]
    about = (
        f"<p>{UNDECIDED}: the interval of what was measured reaches over the goal, or too few rounds tell none, or the "
        "times never settled.</p>\n"
    )
    return f'<h2 id="goals">Goals</h2>\n{about}' + page.table("Goals", headings, rows, texts=2)


def _hardware(results: Results) -> str:
    facts, gpu = results.machine, results.machine["gpu"]
    memory = f", {facts['memory_gb']:g} GB" if "memory_gb" in facts else ""
    with_gpu = f"one {gpu['name']}" if gpu else "no GPU"
    return f"{facts['cores']} cores of {facts['cpu']}{memory}, {with_gpu}"


def _when(runs: Collection[Results]) -> str:
    """24 November 2026, commit 0123456789ab. Of more commits only how many; `_machines` tells them."""
    days = list(dict.fromkeys(_date(r.created) for r in sorted(runs, key=lambda r: r.created)))
    commits = {r.commit or "unknown" for r in runs}
    which = f"commit {min(commits).rstrip('+')}" if len(commits) == 1 else f"{len(commits)} commits, named at the end"
    changed = sum((r.commit or "").endswith("+") for r in runs)
    some = "" if changed == len(runs) else f", {changed} of {len(runs)}"
    dirty = f"{some} with changes that were not committed" if changed else ""
    return f"{days[0] if len(days) == 1 else f'{days[0]} to {days[-1]}'}, {which}{dirty}"


def _date(created: str) -> str:
    """24 November 2026, from ISO 8601."""
    try:
        day = datetime.fromisoformat(created)
    except ValueError:
        return created
    return f"{day.day} {day:%B %Y}"


def _section(name: str, results: Results, styles: Styles) -> tuple[str, list[Chart]]:
    """A results file's part of the page, and its charts."""
    stem, charts = _slug(name), []
    parts = [f'<h2 id="{stem}">{escape(_heading(name, results))}</h2>']
    about = [ABOUT[results.suite]] if results.suite in ABOUT else []
    settings = {key: value for key, value in results.settings.items() if value not in (None, False) and key != QUICK}
    if settings:
        about.append(f"With {', '.join(_setting(key, value) for key, value in settings.items())}.")
    if results.settings.get(QUICK):
        about.append("A quick look, of few calls: rely on none of it.")
    parts += [f"<p>{escape(' '.join(about))}</p>"] if about else []
    used: set[str] = set()
    for group in groups(results.rows):
        what = _slug(group.what)
        label = _unused(what if what.startswith(stem) else f"{stem}_{what}", used)
        drawn = list(group_charts(group, label, styles))
        charts += drawn
        if group.title != _heading(name, results):
            parts.append(f"<h3>{escape(group.title)}</h3>")
        parts += [page.chart(chart) for chart in drawn]
        parts.append(_table(group))
    if (chart := roofline(results, stem, styles)) is not None:
        charts.append(chart)
        parts += ["<h3>How much of the machine is used</h3>", page.chart(chart), _limits(results)]
    parts += _notes(results)
    return "\n".join(parts), charts


def _table(group: Group) -> str:
    """Sides with their times and other figures."""
    if group.what == "waterfall" and not group.varying:
        group = Group(group.what, with_gains(group.rows))
    timed = [row for row in group.rows if row.timing is not None]
    compared = any(first_of(group, row) is not row for row in timed)
    values = list(dict.fromkeys(name for row in group.rows for name in row.values if not _is_end(row, name)))
    headings = ["side", *map(text.heading, group.varying)]
    texts = len(headings)
    if timed:
        headings += ["median", "interval", "p90", "p95", "p99", "calls"] + (["ratio", "interval"] if compared else [])
    headings += map(text.heading, values)
    rows = []
    for row in group.rows:
        cells = [escape(row.side), *(escape(str(row.axes.get(name, "-"))) for name in group.varying)]
        cells += (_times(group, row, compared)) if timed else []
        cells += [_value(row, name) if name in row.values else "-" for name in values]
        rows.append(cells)
    return page.table(group.title, headings, rows, texts)


def _is_end(row: Row, name: str) -> bool:
    """Whether it is an end of another value's interval."""
    return name.endswith(("_low", "_high")) and name.removesuffix("_low").removesuffix("_high") in row.values


def _value(row: Row, name: str) -> str:
    """With its interval, if it has one; a gain is marked whose interval includes 1."""
    said = text.figure(name, row.values[name])
    low, high = (row.values.get(f"{name}_{end}", math.nan) for end in ("low", "high"))
    if not (math.isfinite(low) and math.isfinite(high)):
        return said
    mark = f" <mark>{text.UNSURE}</mark>" if name == "gain" and low <= 1 <= high else ""
    ends = text.ends(low, high, ".2f") if name == "gain" else " to ".join(text.figure(name, x) for x in (low, high))
    return f"{said} ({ends}){mark}"


def _times(group: Group, row: Row, compared: bool) -> list[str]:
    if row.timing is None:
        return ["-"] * (8 if compared else 6)
    s = row.timing.summary()
    mark = "not settled" if not row.timing.settled else "wide" if s["wide"] else ""
    median = f"<strong>{text.seconds(s['median'])}</strong>" + (f" <mark>{mark}</mark>" if mark else "")
    cells = [median, text.interval(s["low"], s["high"])]
    cells += [text.seconds(s.get(f"p{q}", math.nan)) for q in PERCENTILES] + [str(s["calls"])]
    if not compared:
        return cells
    first = first_of(group, row)
    if first is row or first is None or first.timing is None:
        return [*cells, "1", "-"]
    against, low, high = ratio_in_run(row.timing, first.timing)
    return [*cells, f"{against:.3f}", text.ends(low, high)]


def _limits(results: Results) -> str:
    """The roofline in words."""
    lines = []
    for r in reached(results):
        cells = [r.work.graph, r.work.side, r.bound, text.seconds(r.best_s), text.seconds(r.took_s)]
        lines.append([*map(escape, cells), f"{100 * r.best_s / r.took_s:.0f} %"])
    rates = [
        f"{'copies' if name == 'copy' else 'matrix products, ' + name.removeprefix('gemm_')}: "
        + text.scaled(value, "B/s" if name == "copy" else "FLOP/s")
        for name, value in results.limits.items()
    ]
    explained = (
        "The least time that a graph could take is that of its arithmetic at the rate of large matrix products, or of "
        "reading and writing its weights, inputs and outputs once at the rate of a large copy, whichever is longer. "
        f"Measured in the same run: {'; '.join(rates)}."
    )
    if any(r.best_s > r.took_s for r in reached(results)):
        explained += (
            " Where more than 100 % was reached, that limit was measured too low, and so every share is too high."
        )
    headings = ["graph", "side", "bound by", "limit", "took", "of the limit"]
    return f"<p>{escape(explained)}</p>" + page.table("Share of the limit reached", headings, lines, 3)


def _notes(results: Results) -> Iterator[str]:
    for name, note in results.notes.items():
        yield f"<h3>{escape(text.heading(name))}</h3>"
        if isinstance(note, list) and note and all(isinstance(entry, dict) for entry in note):
            keys = list(dict.fromkeys(key for entry in note for key in entry))
            rows = [[_cell(key, entry.get(key)) for key in keys] for entry in note]
            yield page.table(name, list(map(text.heading, keys)), rows)
        elif isinstance(note, list) and not any(isinstance(entry, dict | list) for entry in note):
            yield f"<ul>{''.join(f'<li>{escape(str(entry))}</li>' for entry in note)}</ul>"
        elif isinstance(note, dict) and not any(isinstance(entry, dict | list) for entry in note.values()):
            yield f"<ul>{''.join(f'<li>{escape(k)}: {_cell(k, v)}</li>' for k, v in note.items())}</ul>"
        else:
            said = note if isinstance(note, str) else json.dumps(note, indent=1)
            yield page.box(f"<pre>{escape(said)}</pre>", name)


def _cell(name: str, value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return text.figure(name, value)
    return "-" if value is None else escape(str(value))


def _machines(found: dict[str, Results]) -> str:
    """When each results file was made and how busy the machine was; then machines and software, each once."""
    rows: list[list[str]] = []
    software: dict[str, list[str]] = {}
    for name, results in found.items():
        facts, states = results.machine, [results.state.get(k) for k in ("before", "after")]
        loads = " to ".join(f"{s['load'][0]:.1f}" for s in states if s)
        clocks = " to ".join(_clocks(s) for s in states if s)
        began = results.created[:19].replace("T", " ")
        rows.append([escape(c) for c in (Path(name).stem, began, results.commit or "-", loads, clocks)])
        parts = [_hardware(results), facts.get("system", ""), f"Python {facts.get('python', '-')}"]
        parts += [f"driver {facts['gpu']['driver']}"] if "driver" in (facts["gpu"] or {}) else []
        parts += [f"{package} {version}" for package, version in facts.get("versions", {}).items()]
        software.setdefault(", ".join(filter(None, parts)), []).append(Path(name).stem)
    title = "Machines and software"
    lines = "".join(f"<li>{escape(', '.join(names))}: {escape(facts)}</li>" for facts, names in software.items())
    table = page.table(title, ["results", "began, UTC", "commit", "load", "clocks"], rows, texts=5)
    return f'<h2 id="machines">{title}</h2>\n<ul>{lines}</ul>\n{table}'


def _clocks(state: dict[str, Any]) -> str:
    gpu = state.get("gpu")
    if gpu:
        return f"{gpu['sm_mhz']:g} MHz, {gpu['power_w']:.0f} W"
    return f"{state['cpu_mhz']:g} MHz" if state.get("cpu_mhz") else "-"


def _setting(name: str, value: Any) -> str:
    if value is True:
        return name
    return f"{name} {', '.join(map(str, value)) if isinstance(value, list) else value}"


def _place(suite: str) -> int:
    """Of a suite on the page: the order in which `ABOUT` names them, then the others."""
    return list(ABOUT).index(suite) if suite in ABOUT else len(ABOUT)


def _heading(name: str, results: Results) -> str:
    """The suite's name, and what else the file's name says: engines_full.json is engines, full."""
    stem = Path(name).stem
    more = stem.removeprefix(results.suite).strip("_- ").replace("_", " ")
    return ", ".join(filter(None, (results.suite, more)))


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.removesuffix(".json").lower()).strip("_")


def _unused(name: str, used: set[str]) -> str:
    """The name, with a number if another group has it."""
    free, i = name, 1
    while free in used:
        i += 1
        free = f"{name}_{i}"
    used.add(free)
    return free
