"""`bench compare`: which differences it calls real, and what it warns of."""

from __future__ import annotations

import argparse
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import bootstrap

from bench import compare, results
from bench.compare import ALIKE, FASTER, LOST, SLOWER, UNDECIDED
from bench.results import Results, Row
from bench.timing import Timing
from mubic_deploy.arguments import Parser
from mubic_deploy.errors import UserError

MACHINE = {"cpu": "AMD EPYC", "cores": 2, "gpu": None, "versions": {"torch": "2.11.0"}}
STATE: dict[str, Any] = {"before": {"load": [0.5, 0.5, 0.5], "cpu_mhz": 2450.0, "gpu": None}}


def run_of(rows: list[Row], **others: Any) -> Results:
    kept: dict[str, Any] = {
        "settings": {"threads": 2},
        "limits": {"gemm_float32": 2e11},
        "machine": MACHINE,
        "state": STATE,
    }
    return Results(**({"suite": "engines", "rows": rows, "commit": "0123456789ab"} | kept | others))


def timed(*seconds: float, settled: bool = True, **axes: int | str) -> Row:
    return Row("whole", "eager", dict(axes), Timing(tuple(seconds), 6, settled))


def parse(*arguments: object) -> argparse.Namespace:
    parser = Parser()
    compare.add_arguments(parser)
    return parser.parse_args([str(a) for a in arguments])


@pytest.mark.parametrize(
    ("a", "b", "ratio", "verdict"),
    [
        ([1.0] * 30, [1.1] * 30, 1.1, SLOWER),
        ([1.0] * 30, [0.5] * 30, 0.5, FASTER),
        ([1.0] * 30, [1.019] * 30, 1.019, ALIKE),  # surely other, but by under 2 %
        ([1.019] * 30, [1.0] * 30, 1 / 1.019, ALIKE),
        ([1.0] * 30, [1.0] * 30, 1.0, ALIKE),
        ([1.0, 2.0] * 15, [1.1, 2.1] * 15, 1.6 / 1.5, UNDECIDED),  # 7 %, but the spread is far larger
        ([1.0] * 30, [0.99, 1.03] * 15, 1.01, UNDECIDED),  # 2 % or none
        ([0.99, 1.03] * 15, [1.0] * 30, 1 / 1.01, UNDECIDED),
    ],
)
def test_verdict(a: list[float], b: list[float], ratio: float, verdict: str) -> None:
    (found,) = compare.compare(run_of([timed(*a)]), run_of([timed(*b)])).times
    assert found.ratio == pytest.approx(ratio)
    assert (found.verdict, found.real) == (verdict, verdict in (FASTER, SLOWER))


def test_too_few_rounds_leave_it_undecided(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not counted, and not passed over in silence either."""

    def load(seconds: float, rounds: int) -> Results:
        row = Row("server", "our clients", {"concurrency": 4}, Timing((seconds,) * 5 * rounds, rounds=(5,) * rounds))
        return run_of([row])

    for rounds, verdict in ((1, UNDECIDED), (4, UNDECIDED), (5, SLOWER)):
        (found,) = compare.compare(load(1.0, 5), load(1.5, rounds)).times
        assert (found.verdict, found.real) == (verdict, verdict == SLOWER)
    load(1.0, 4).write(tmp_path / "a.json")
    load(1.5, 4).write(tmp_path / "b.json")
    assert compare.run(parse(tmp_path / "a.json", tmp_path / "b.json", "--fail-if-slower", 5)) == 0
    said = capsys.readouterr()
    assert "0 faster, 0 slower, 0 without a difference, 1 undecided; 0 of 0" in said.out
    assert re.search(r"1\.500 │ +- │", said.out)
    assert "perhaps slower than that, and not counted: 1 rows" in said.err


def test_interval_is_scipys() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.gamma(20, 0.01, 60), rng.gamma(20, 0.011, 50)
    (found,) = compare.compare(run_of([timed(*a)]), run_of([timed(*b)])).times
    reference = bootstrap(
        (b, a),
        lambda x, y, axis: np.median(x, axis=axis) / np.median(y, axis=axis),
        n_resamples=20_000,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert found.low == pytest.approx(reference.low, rel=0.01)
    assert found.high == pytest.approx(reference.high, rel=0.01)
    assert found.ratio == pytest.approx(np.median(b) / np.median(a))


def test_rows_pair_by_all_that_was_set() -> None:
    a = run_of([timed(1.0, 1.0, batch=1), timed(8.0, 8.0, batch=8), Row("fusion", "openvino", values={"macs": 5.0})])
    b = run_of([timed(7.0, 7.0, batch=8), timed(1.0, 1.0, batch=16)], left_out={"openvino": "it is not installed"})
    found = compare.compare(a, b)
    assert [(t.axes, t.a, t.b) for t in found.times if t.verdict != LOST] == [({"batch": 8}, 8.0, 7.0)]
    assert found.both == 1
    assert found.only_a == ["whole, eager, batch 1", "fusion, openvino (left out: it is not installed)"]
    assert found.only_b == ["whole, eager, batch 16"]


def test_rows_that_share_a_key_pair_in_order() -> None:
    a, b = (run_of([timed(x, x), timed(y, y)]) for x, y in ((1.0, 2.0), (1.0, 4.0)))
    assert [t.ratio for t in compare.compare(a, b).times] == [1.0, 2.0]


@pytest.mark.parametrize(
    ("name", "a", "b", "verdict"),
    [
        ("clips_per_s", 10.0, 11.0, "better"),
        ("clips_per_s", 10.0, 9.0, "worse"),
        ("clips_per_s", 10.0, 10.1, ALIKE),
        ("peak_mb", 468.0, 500.0, "worse"),
        ("step_s", 0.2, 0.1, "better"),
        ("largest_difference", 1e-6, 1e-5, "worse"),
        ("largest_difference", 0.0, 1e-5, "worse"),
        ("cc", 0.9999, 0.9991, "worse"),  # under 2 %, yet more than a metric may move
        ("cc", 0.9999, 0.9996, ALIKE),
        ("auc_judd", 0.93, 0.94, "better"),
        ("cc_difference", 1e-4, 1e-5, "better"),  # of a metric, and not one itself
        ("share_of_peak", 0.4, 0.5, "better"),
        ("share_besides_engines", 0.05, 0.1, "worse"),
        ("lost", 0.0, 1.0, "worse"),
        ("macs", 1e9, 2e9, "changed"),
        ("cpu_s_models", 0.1, 0.2, "worse"),
        ("clips_per_s_of_all_calls", 10.0, 11.0, "better"),
        ("share_dropped", 0.1, 0.2, "worse"),
    ],
)
def test_values(name: str, a: float, b: float, verdict: str) -> None:
    before, after = (run_of([Row("x", "y", values={name: v})]) for v in (a, b))
    (found,) = compare.compare(before, after).values
    assert found.verdict == verdict


def test_over_in_process_is_of_rates_or_of_times() -> None:
    """Of a load more is better, of a clip's latency less."""
    for what, verdict in (("server", "better"), ("whole", "worse"), ("work", "worse")):
        before, after = (run_of([Row(what, "x", values={"over_in_process": v})]) for v in (1.0, 1.1))
        (found,) = compare.compare(before, after).values
        assert found.verdict == verdict


def test_warnings() -> None:
    a = run_of([], limits={"gemm_float32": 200e9, "copy": 1e10})
    assert compare.warnings(a, a) == []
    assert compare.warnings(a, run_of([], limits={"gemm_float32": 209e9, "copy": 2e10})) == []
    (faster,) = compare.warnings(a, run_of([], limits={"gemm_float32": 220e9}))
    assert "10 % faster in B" in faster
    assert "200 GFLOP/s and 220 GFLOP/s" in faster
    (slower,) = compare.warnings(a, run_of([], limits={"gemm_float32": 150e9}))
    assert "25 % slower in B" in slower
    (other,) = compare.warnings(a, run_of([], machine=MACHINE | {"gpu": {"name": "NVIDIA H200"}}))
    assert other == "different machines: A on AMD EPYC (2 cores, no GPU), B on AMD EPYC (2 cores, NVIDIA H200)"
    assert compare.warnings(a, run_of([], settings={"threads": 4})) == ["the setting threads differs: 2 and 4"]
    assert compare.warnings(a, run_of([], suite="steps")) == ["A is of the suite 'engines', B of 'steps'"]
    newer = MACHINE | {"versions": {"torch": "2.12.0", "openvino": "2026.1"}}
    assert compare.warnings(a, run_of([], machine=newer)) == [
        "openvino differs: not installed and 2026.1",
        "torch differs: 2.11.0 and 2.12.0",
    ]


def test_wide_rows_are_named() -> None:
    found = compare.compare(run_of([timed(1.0, 1.0, settled=False)]), run_of([timed(*[1.0, 2.0] * 10)]))
    assert found.times[0].wide == ("A", "B")
    found = compare.compare(run_of([timed(1.0, 1.0)]), run_of([timed(1.0, 1.0, settled=False)]))
    assert found.times[0].wide == ("B",)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    rows = [[timed(*[x] * 9, batch=1), timed(*[2.0] * 9, batch=2)] for x in (1.0, 1.08)]
    paths = tmp_path / "a" / "engines.json", tmp_path / "b" / "engines.json"
    for path, of in zip(paths, rows, strict=True):
        run_of(of).write(path)
    return paths


@pytest.mark.parametrize(("allowed", "code"), [(None, 0), ("7.9", 1), ("8.1", 0), ("0", 1)])
def test_exit_code(files: tuple[Path, Path], allowed: str | None, code: int) -> None:
    options = [] if allowed is None else ["--fail-if-slower", allowed]
    assert compare.run(parse(*files, *options)) == code


def test_a_row_counts_with_all_of_its_interval_wide_or_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = tmp_path / "a.json", tmp_path / "b.json"
    unsettled = {f"{x}": timed(*[x] * 9, settled=False) for x in (1.0, 2.0)}
    wide = {f"{k}": timed(*(k * x for x in [1.0, 1.3, 0.8] * 5), batch=2) for k in (1, 2)}
    for path, x, k in zip(paths, ("1.0", "2.0"), ("1", "2"), strict=True):
        run_of([unsettled[x], wide[k]]).write(path)
    assert compare.run(parse(*paths, "--fail-if-slower", "5", "--json")) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["too_slow"], found["perhaps_too_slow"]) == (["whole, eager", "whole, eager, batch 2"], [])
    assert [t["wide"] for t in found["comparisons"][0]["times"]] == [["A", "B"]] * 2
    assert compare.run(parse(*paths, "--fail-if-slower", "90", "--json")) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["too_slow"], found["perhaps_too_slow"]) == (["whole, eager"], ["whole, eager, batch 2"])
    assert compare.run(parse(*paths, "--fail-if-slower", "110")) == 0
    assert "perhaps slower than that, and not counted: 1 rows" in " ".join(capsys.readouterr().err.split())


def test_twice_as_slow_is_seen_in_what_was_measured() -> None:
    """However wide its rows are."""
    before, after = (results.read(results.FOLDER / "engines_full.json") for _ in range(2))
    for row in after.rows:
        assert row.timing is not None
        row.timing = replace(row.timing, samples=tuple(2 * s for s in row.timing.samples))
    found = compare.compare(before, after)
    slow = {(t.what, t.side) for t in found.slower(5)}
    assert slow == {(row.what, row.side) for row in before.rows}


@pytest.mark.parametrize("lost", [math.nan, math.inf, None])
def test_what_is_lost_is_a_row_and_fails(
    lost: float | None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    kept = {"cc": 0.99, "spread": math.nan, "gain": 1.5, "gain_low": 1.4}  # what A could not tell cannot be lost
    a = run_of([timed(*[1.0] * 9), Row("maps", "eager", values=kept)])
    values = {"gain": 1.5} if lost is None else {"gain": 1.5, "gain_low": lost, "cc": lost}
    b = run_of([timed(*[1.0] * 9), Row("maps", "eager", values=values)])
    found = compare.compare(a, b)
    assert [(v.name, v.verdict) for v in found.values] == [("cc", LOST), ("gain", ALIKE)]
    paths = tmp_path / "a.json", tmp_path / "b.json"
    a.write(paths[0])
    b.write(paths[1])
    assert compare.run(parse(*paths)) == 0
    said = capsys.readouterr().out
    assert "1 without a difference, 0 undecided; 0 of 2 other figures moved, 1 lost" in said
    assert re.search(r"maps, eager +│ cc +│ 0\.9900 │ +- │ lost", said)
    assert compare.run(parse(*paths, "--fail-if-slower", "5")) == 1
    assert "lost in B, so nobody knows whether it is worse: maps, eager: cc" in capsys.readouterr().out
    assert compare.run(parse(*reversed(paths), "--fail-if-slower", "5")) == 0


def test_a_percentile_that_is_not_told_is_not_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A round of B had some answers less than it takes; what is lost is said where nothing fails of it, too."""

    def load(**values: float) -> Results:
        return run_of([Row("server", "our clients", {"concurrency": 4}, values=values)])

    load(median_s=0.1, p95_s=0.2, clips_per_s=9.0).write(tmp_path / "a.json")
    load(median_s=0.1, clips_per_s=9.0).write(tmp_path / "b.json")
    load(median_s=0.1, p95_s=0.2).write(tmp_path / "c.json")
    assert compare.run(parse(tmp_path / "a.json", tmp_path / "b.json", "--fail-if-slower", 5)) == 0
    capsys.readouterr()
    assert compare.run(parse(tmp_path / "a.json", tmp_path / "c.json", "--json")) == 0
    said = json.loads(capsys.readouterr().out)
    assert len(said["lost"]) == 1
    assert said["comparisons"][0]["lost"] == said["lost"]
    assert "clips" in said["lost"][0]


def test_a_row_that_is_gone_is_lost(tmp_path: Path) -> None:
    gone = Row("parity", "openvino", values={"cc": 1.0, "largest_difference": 1e-6})
    found = compare.compare(run_of([timed(1.0, 1.0), gone]), run_of([Row("whole", "eager", values={"macs": 1.0})]))
    assert [(t.verdict, t.wide) for t in found.times] == [(LOST, ())]
    assert found.lost == ["whole, eager", "parity, openvino: cc", "parity, openvino: largest difference"]


def test_what_was_not_timed_again_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fast = [timed(*[1.0] * 9, batch=batch) for batch in (1, 2, 4)]
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    run_of(fast).write(a)
    run_of([fast[0], Row("whole", "eager", {"batch": 2}, values={"macs": 1.0})]).write(b)
    assert compare.run(parse(a, b)) == 0
    assert compare.run(parse(b, a, "--fail-if-slower", "5")) == 1  # macs
    capsys.readouterr()
    assert compare.run(parse(a, b, "--fail-if-slower", "5")) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "lost in B, so nobody knows whether it is worse: whole, eager, batch 2" in said
    assert "1 without a difference, 0 undecided, 2 lost; 0 of 0" in said
    assert compare.run(parse(a, b, "--fail-if-slower", "5", "--json")) == 1
    assert json.loads(capsys.readouterr().out)["lost"] == ["whole, eager, batch 2", "whole, eager, batch 4"]


def test_json(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.run(parse(*files, "--json", "--fail-if-slower", "5")) == 1
    said = json.loads(capsys.readouterr().out)
    (found,) = said["comparisons"]
    assert [(t["ratio"], t["real"]) for t in found["times"]] == [(1.08, True), (1.0, False)]
    assert said["too_slow"] == ["whole, eager, batch 1"]


def test_table(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    before = [path.read_bytes() for path in files]
    assert compare.run(parse(*files, "--fail-if-slower", "5")) == 1
    said = capsys.readouterr().out
    assert "1.080" in said
    assert "0 faster, 1 slower, 1 without a difference" in said
    assert "too slow: whole, eager, batch 1: 8.0 % slower, 5 % are allowed" in said
    assert [path.read_bytes() for path in files] == before


def test_folders_pair_files_by_name(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    a, b = (path.parent for path in files)
    run_of([]).write(b / "steps.json")
    assert compare.run(parse(a, b, "--json")) == 0
    said = json.loads(capsys.readouterr().out)
    assert [c["a"] for c in said["comparisons"]] == [str(a / "engines.json")]
    assert said["warnings"] == [f"steps.json is in {b} only"]
    assert compare.run(parse(a, b, "--fail-if-slower", "50")) == 0
    assert compare.run(parse(b, a, "--fail-if-slower", "50")) == 1  # nothing of steps.json was measured again


def test_what_cannot_be_compared(files: tuple[Path, Path], tmp_path: Path) -> None:
    other = tmp_path / "c" / "other.json"
    run_of([Row("fusion", "eager", values={"macs": 1.0})]).write(other)
    for arguments, said in (
        ((files[0], tmp_path / "none.json"), "does not exist"),
        ((files[0], files[1].parent), "a file and a folder"),
        ((files[0].parent, other.parent), "no file of"),
        ((files[0], other, "--fail-if-slower", "1"), "no row in common"),
        ((*files, "--fail-if-slower", "-1"), "use 0 or more"),
        ((*files, "--fail-if-slower", "nan"), "use 0 or more"),
        ((*files, "--fail-if-slower", "much"), "much is not a number"),
    ):
        with pytest.raises(UserError, match=said):
            compare.run(parse(*arguments))
