"""`bench report`: the page, its charts, and what it does to the folder it writes."""

from __future__ import annotations

import argparse
import itertools
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.patches import Rectangle

from bench import drawing, groups, page, report
from bench.drawing import Styles
from bench.groups import Group
from bench.results import Results, Row
from bench.timing import Timing
from mubic_deploy.arguments import Parser
from mubic_deploy.errors import UserError

MACHINE = {"cpu": "AMD EPYC", "cores": 2, "memory_gb": 24.0, "gpu": None, "versions": {"torch": "2.11.0"}}
STATE: dict[str, Any] = {"before": {"load": [0.5, 0.5, 0.5], "cpu_mhz": 2450.0, "gpu": None}}
LIMITS = {"gemm_float32": 100e9, "copy": 10e9}
VOID = {"meta", "br", "link", "img", "input", "hr"}


def run_of(suite: str, rows: list[Row], **others: Any) -> Results:
    kept: dict[str, Any] = {"settings": {"threads": 2}, "limits": LIMITS, "machine": MACHINE, "state": STATE}
    kept |= {"commit": "0123456789ab", "created": "2026-11-24T20:07:09+00:00"}
    return Results(**({"suite": suite, "rows": rows} | kept | others))


def constant(seconds: float) -> Timing:
    return Timing((seconds,) * 10, 6)


def graph(name: str, seconds: float, macs: float, moved: float, side: str = "onnxruntime") -> Row:
    return Row(name, side, {"batch": 1}, constant(seconds), {"macs": macs, "bytes": moved})


def everything() -> dict[str, Results]:
    engines = run_of("engines", [graph("fusion", 0.04, 1e9, 1e6), graph("encoder", 0.125, 1e6, 1e9)])
    engines.add("whole", {"eager": constant(0.4), "<b>ours</b>": constant(0.2)}, batch=1, steps=4)
    engines.left_out["openvino"] = "it is not installed."
    engines.notes["operators"] = [{"operator": "MatMul", "share": 0.44}]
    waterfall = run_of("waterfall", [])
    waterfall.add("waterfall", {"eager": constant(1.0), "folded": constant(0.5), "FP16": constant(0.8)})
    steps = run_of("steps", [])
    for n in (1, 4, 8):
        steps.add("steps", {"eager": constant(0.1 * n)}, steps=n)
    steps.add("steps", {"eager": constant(0.3)}, steps="adaptive")
    batch = run_of("batch", [Row("batch", "eager", {"batch": n}, constant(0.1 + 0.1 * n)) for n in (1, 4)])
    axes: list[dict[str, int | str]] = [{"protocol": "grpc", "concurrency": n} for n in (1, 4)]
    server = run_of("server", [Row("server", "client", a, constant(0.1), {"clips_per_s": 10.0}) for a in axes])
    server.rows += [Row("server", "perf_analyzer", a, None, {"clips_per_s": 9.0, "median_s": 0.11}) for a in axes]
    parity = run_of("parity", [Row("parity", "eager", {"graph": "fusion", "tensor": "A"}, None, {"cc": 1.0})])
    for side, value in (("onnxruntime", 1e-6), ("openvino", 1e-4)):
        cell: dict[str, int | str] = {"graph": "fusion", "tensor": "A"}
        parity.rows.append(Row("parity", side, cell, None, {"largest_difference": value}))
    growth = run_of(
        "growth", [Row("growth of films", "predict", {"minutes": n}, None, {"peak_mb": 468}) for n in (1, 9)]
    )
    found = (engines, waterfall, steps, batch, server, parity, growth)
    return {f"{results.suite}.json": results for results in found}


class Page(HTMLParser):
    """What a page is made of; fails on a tag that is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None], tuple[str, ...]]] = []
        self.open: list[tuple[str, str]] = []
        self.headings: list[list[Any]] = []
        self.said = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found, tuple(name for _, name in self.open)))
        if tag not in VOID:
            self.open.append((tag, found.get("class") or ""))
        if re.fullmatch("h[1-6]", tag):
            self.headings.append([int(tag[1]), ""])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs), ()))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        self.said += data
        if self.open and re.fullmatch("h[1-6]", self.open[-1][0]):
            self.headings[-1][1] += data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "out"
    report.write(everything(), out)
    return out


@pytest.fixture(scope="module")
def written(folder: Path) -> str:
    return (folder / report.PAGE).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def parsed(written: str) -> Page:
    return Page(written)


def test_a_chart_a_kind_of_data(folder: Path) -> None:
    assert sorted(p.stem for p in folder.glob("*.png")) == [
        "batch_throughput",
        "engines_encoder_latency",
        "engines_fusion_latency",
        "engines_roofline",
        "engines_whole_latency",
        "growth_of_films_minutes_peak_mb",
        "parity",
        "server_throughput",
        "steps_median_s",
        "waterfall",
    ]


def test_the_page_needs_nothing_else(written: str, parsed: Page) -> None:
    names = Counter(tag for tag, _, _ in parsed.tags)
    assert not names.keys() & {"script", "link", "img", "iframe", "object", "image"}
    assert not re.search(r"https?:|@import|url\((?!#)", written)
    links = [a for _, attrs, _ in parsed.tags for a in (attrs.get("href"), attrs.get("src")) if a]
    ids = [attrs["id"] for _, attrs, _ in parsed.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {link.removeprefix("#") for link in links} <= set(ids)
    referred = set(re.findall(r"url\(#([^)]+)\)", written))
    assert referred <= set(ids)
    assert any("waterfall" in name for name in referred)  # its hatches


def test_it_can_be_read_everywhere(written: str, parsed: Page) -> None:
    headings = [level for level, _ in parsed.headings]
    assert headings[0] == 1
    assert headings.count(1) == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(headings))
    for tag, attrs, inside in parsed.tags:
        if tag in ("table", "svg"):
            assert any("box" in classes for classes in inside)
        if tag == "svg":
            assert attrs["role"] == "img"
            assert len(attrs["aria-label"] or "") > 40
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}, ("", "")) in parsed.tags
    assert "prefers-color-scheme: dark" in written
    sizes = [float(s) for s in re.findall(r"font(?:-size)?: ([\d.]+)rem", written)]
    assert sizes
    assert min(sizes) >= 1
    for colour in drawing.COLOURS:  # those of the charts are the page's variables, or they would not turn dark
        assert written.count(colour) == 2  # on a light ground, and on paper


def test_first_paragraph(parsed: Page) -> None:
    opening = parsed.said[parsed.said.index("Measured on") :]
    assert opening.startswith(
        "Measured on 2 cores of AMD EPYC, 24 GB, no GPU, 24 November 2026, commit 0123456789ab. "
        "Left out: openvino (it is not installed) in engines."
    )


def test_machines_are_told_apart() -> None:
    other = run_of("gpu", [], machine=MACHINE | {"gpu": {"name": "NVIDIA H200"}}, commit="0123456789ab+")
    said = report._opening({"engines.json": run_of("engines", []), "gpu.json": other})
    assert "engines: measured on 2 cores of AMD EPYC, 24 GB, no GPU, 24 November 2026, commit 0123456789ab. " in said
    assert (
        "gpu: measured on 2 cores of AMD EPYC, 24 GB, one NVIDIA H200, 24 November 2026, commit 0123456789ab with "
        in said
    )
    assert "Nothing was left out." in said


def test_one_machine_is_said_once() -> None:
    """Days and commits in short where there are more; a changed tree is counted."""
    later = run_of("steps", [], commit="fedcba987654+", created="2026-11-26T01:00:00+00:00")
    said = report._opening({"steps.json": later, "engines.json": run_of("engines", [])})
    assert (
        "Measured on 2 cores of AMD EPYC, 24 GB, no GPU, 24 November 2026 to 26 November 2026, "
        "2 commits, named at the end, 1 of 2 with changes that were not committed. Nothing was left out." in said
    )


def test_headings_say_the_file() -> None:
    found = run_of("engines", [])
    names = ("engines.json", "engines_full.json", "h200.json")
    assert [report._heading(name, found) for name in names] == ["engines", "engines, full", "engines, h200"]


def test_a_quick_look_is_called_one() -> None:
    section, _ = report._section("a.json", run_of("engines", [], settings={"threads": 2, "quick": True}), Styles())
    assert "<p>Each graph, and the whole inference, by engine. With threads 2. A quick look, of few calls" in section
    section, _ = report._section("a.json", run_of("engines", [], settings={"threads": 2, "quick": False}), Styles())
    assert "quick" not in section


def test_parity_over_steps_is_a_heat_map_too() -> None:
    rows = [
        Row("parity of maps", "openvino", {"steps": n}, None, {"largest_difference": n / 1e7, "mean_difference": 1e-9})
        for n in (1, 2)
    ]
    (chart,) = groups.group_charts(Group("parity of maps", rows), "x", Styles())
    assert "The largest: 2.0e-7, steps 2, openvino." in chart.alt


def test_nan_is_the_largest_difference() -> None:
    """In whichever row it is; a row that has no difference is no cell."""
    axes: list[dict[str, int | str]] = [{"steps": n} for n in range(1, 5)]
    values = [{"largest_difference": 1e-7}, {"largest_difference": float("nan")}, {"largest_difference": 2e-7}, {}]
    rows = [Row("parity of maps", "openvino", a, None, v) for a, v in zip(axes, values, strict=True)]
    (chart,) = groups.group_charts(Group("parity of maps", rows), "x", Styles())
    assert "The largest: NaN, steps 2, openvino." in chart.alt
    drawn = [t.get_text() for t in chart.draw(page.WIDE).axes[0].texts]
    assert drawn == ["1.0e-7", "NaN", "2.0e-7"]


def test_what_is_named_by_others_is_text(written: str, parsed: Page) -> None:
    assert "<b>" not in written
    assert "<b>ours</b>" in parsed.said


def test_a_table_has_times_and_ratios() -> None:
    rows = [Row("whole", side, {"batch": 1}, Timing(s, 6)) for side, s in (("a", (0.4,) * 100), ("b", (0.1,) * 100))]
    samples = tuple(np.arange(1, 102) / 1000)  # 1 to 101 ms: p90 is 91, p99 100
    rows.append(Row("whole", "c", {"batch": 1}, Timing(samples, 6, False), {"clips_per_s": 19.6}))
    cells = [
        re.findall(r"<t[hd] ?[^>]*>(.*?)</t[hd]>", row) for row in report._table(Group("whole", rows)).split("<tr>")
    ]
    assert cells[1] == ["side", "median", "interval", "p90", "p95", "p99", "calls", "ratio", "interval", "clips"]
    assert cells[2][:8] == ["a", "<strong>400 ms</strong>", "400 to 400 ms", *["400 ms"] * 3, "100", "1"]
    assert cells[3][7:] == ["0.250", "0.250 to 0.250", "-"]
    assert cells[4][1] == "<strong>51.0 ms</strong> <mark>not settled</mark>"
    assert (cells[4][3], cells[4][4], cells[4][5], cells[4][9]) == ("91.0 ms", "96.0 ms", "100 ms", "19.6 /s")
    few = report._table(Group("whole", [Row("whole", "d", {}, Timing(samples[:19], 6))]))
    assert re.findall(r"<td ?[^>]*>(.*?)</td>", few)[2:6] == ["17.2 ms", "-", "-", "19"]
    rows[2] = Row("whole", "c", {"batch": 1}, Timing(samples, 6))
    assert "<mark>wide</mark>" in report._table(Group("whole", rows))


def test_values_have_their_intervals_beside_them() -> None:
    ends = {"gain": 1.02, "gain_low": 0.95, "gain_high": 1.08}
    rows = [
        Row("waterfall", "a", values=ends),
        Row("waterfall", "b", values={"gain": 1.5, "gain_low": 1.4, "gain_high": 1.6}),
        Row("waterfall", "c", values={"gain": 1.5, "gain_low": 0.0, "gain_high": float("nan")}),  # of too few pairs
        Row("waterfall", "d", values={"gain": 1.5}),
    ]
    said = report._table(Group("waterfall", rows))
    assert re.findall(r"<th scope=.col.[^>]*>(.*?)</th>", said) == ["side", "gain"]
    assert re.findall(r"<td>(.*?)</td>", said) == [
        "1.02 x (0.95 to 1.08) <mark>unsure</mark>",
        "1.50 x (1.40 to 1.60)",
        "1.50 x",
        "1.50 x",
    ]
    share = Row(
        "work", "a", values={f"share_besides_engines{e}": v for e, v in (("", 0.1), ("_low", 0.09), ("_high", 0.11))}
    )
    assert "<td>10.0 % (9.0 % to 11.0 %)</td>" in report._table(Group("work", [share]))


def test_ratios_are_to_the_first_side_of_the_same_batch() -> None:
    rows = [Row("batch", side, {"batch": n}, constant(s * n)) for n in (1, 2) for side, s in (("a", 1.0), ("b", 3.0))]
    first = groups.first_of(Group("batch", rows), rows[3])
    assert first is rows[2]


def test_text_axes_part_groups_unless_mixed_with_numbers() -> None:
    rows = [
        Row("whole", "a", {"size": size, "steps": steps}) for size in ("full", "demo") for steps in (1, 4, "adaptive")
    ]
    found = groups.groups(rows)
    assert [(g.title, len(g.rows), g.varying) for g in found] == [
        ("whole, size full", 3, ["steps"]),
        ("whole, size demo", 3, ["steps"]),
    ]


def test_roofline_by_hand() -> None:
    """2 GFLOP at 100 GFLOP/s are 20 ms, half of 40 ms; 1 GB at 10 GB/s is 100 ms, four fifths of 125 ms."""
    rows = [graph("fusion", 0.04, 1e9, 1e6), graph("encoder", 0.125, 1e6, 1e9)]
    arithmetic, traffic = groups.reached(run_of("engines", rows))
    assert (arithmetic.bound, traffic.bound) == ("matrix products", "copies")
    assert arithmetic.best_s / arithmetic.took_s == pytest.approx(0.5)
    assert traffic.best_s / traffic.took_s == pytest.approx(0.8)
    assert (arithmetic.work.intensity, arithmetic.work.rate) == (pytest.approx(2000), pytest.approx(50e9))
    chart = groups.roofline(run_of("engines", rows), "x", Styles())
    assert chart is not None
    assert "fusion, onnxruntime: 50 % of the limit; encoder, onnxruntime: 80 % of the limit" in chart.alt
    assert groups.roofline(run_of("engines", rows, limits={}), "x", Styles()) is None


def test_a_share_over_one_is_a_limit_that_is_too_low() -> None:
    """2 GFLOP at 100 GFLOP/s are 20 ms."""
    for seconds, low in ((0.021, False), (0.019, True)):
        said = report._limits(run_of("engines", [graph("fusion", seconds, 1e9, 1e6)]))
        assert ("that limit was measured too low" in said) is low


def test_roofline_takes_the_limit_of_the_precision() -> None:
    row = graph("fusion", 0.04, 1e9, 1e6, "PyTorch FP16")
    limits = LIMITS | {"gemm_float16": 400e9}
    (half,) = groups.reached(run_of("gpu", [row], limits=limits))
    assert half.best_s == pytest.approx(0.005)
    (said,) = groups.reached(run_of("gpu", [row], limits=limits, settings={"precision": "float32"}))
    assert said.best_s == pytest.approx(0.02)
    assert groups.reached(run_of("gpu", [row])) == []  # no limit for FP16, no share


def test_waterfall_by_hand() -> None:
    rows = [Row("waterfall", name, {}, constant(s)) for name, s in (("eager", 1.0), ("folded", 0.5), ("FP16", 0.8))]
    (chart,) = groups.group_charts(Group("waterfall", rows), "x", Styles())
    said = "eager: 1.00 s; folded: 500 ms, 2.00 x (2.00 to 2.00); FP16: 800 ms, 0.62 x (0.62 to 0.62). 1.25 x in all."
    assert said in chart.alt
    (axes,) = chart.draw(page.WIDE).axes
    bars = [(b.get_x(), b.get_width(), b.get_hatch()) for b in axes.patches if isinstance(b, Rectangle)]
    assert bars == [
        (0, 1.0, None),
        (0, 0.5, None),
        (0.5, 0.5, "///"),  # saved
        (0, 0.5, None),
        (0.5, pytest.approx(0.3), "xxx"),  # lost again
    ]


def test_a_gain_that_may_be_none_is_marked() -> None:
    """Sides whose calls were made in turn, on a machine that wanders: by pairs a gain of 1.1 x is sure, one of 1.005 x
    is not."""
    rng = np.random.default_rng(1)
    pace = np.repeat([1.0, 1.5], 20)
    times = {name: s * pace * rng.normal(1, 0.02, 40) for name, s in (("a", 1.0), ("b", 0.91), ("c", 0.905))}
    rows = [Row("waterfall", name, {}, Timing(tuple(t), measurement=1)) for name, t in times.items()]
    (chart,) = groups.group_charts(Group("waterfall", rows), "x", Styles())
    assert [", unsure" in part for part in chart.alt.split(";")] == [False, False, True]
    (axes,) = chart.draw(page.NARROW).axes
    drawn = [t.get_text() for t in axes.texts]
    assert sum(text.endswith("), unsure") for text in drawn) == 1
    assert any(re.fullmatch(r"1\.(09|10) x \(1\.0\d to 1\.1\d\)", text) for text in drawn)


def test_the_table_of_a_waterfall_says_what_its_chart_does() -> None:
    """Whatever older results state."""
    rows = [Row("waterfall", name, {}, constant(s), {"gain": 9.0}) for name, s in (("a", 1.0), ("b", 0.5))]
    del rows[0].values["gain"]
    assert "<td>2.00 x (2.00 to 2.00)</td>" in report._table(Group("waterfall", rows))
    assert rows[1].values == {"gain": 9.0}


def test_loads_are_drawn_by_what_both_clients_say() -> None:
    """perf_analyzer's latencies are medians over rounds: ours are set against them by the same."""
    axes: list[dict[str, int | str]] = [{"protocol": "grpc", "concurrency": n} for n in (1, 4)]
    rows = [Row("server", "ours", a, constant(0.1), {"clips_per_s": 10.0, "median_s": 0.12}) for a in axes]
    (chart,) = groups.group_charts(Group("server", rows), "x", Styles())
    (line,) = chart.draw(page.WIDE).axes[0].lines
    assert np.asarray(line.get_xdata()) == pytest.approx(np.array([0.12, 0.12]))


def test_throughput_of_a_batch_is_worked_out() -> None:
    rows = [Row("batch", "eager", {"batch": n}, constant(0.1 + 0.1 * n)) for n in (4, 1)]
    (chart,) = groups.group_charts(Group("batch", rows), "x", Styles())
    (axes,) = chart.draw(page.WIDE).axes
    (line,) = axes.lines
    assert line.get_xydata() == pytest.approx(np.array([[0.2, 5.0], [0.5, 8.0]]))
    assert sorted(t.get_text() for t in axes.texts) == ["1", "4"]


def parse(*arguments: object) -> argparse.Namespace:
    parser = Parser()
    report.add_arguments(parser)
    return parser.parse_args([str(a) for a in arguments])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_of("waterfall", [Row("waterfall", s, {}, constant(1.0)) for s in "ab"]).write(
        tmp_path / "in" / "waterfall.json"
    )
    out = tmp_path / "a" / "out"
    assert report.run(parse(tmp_path / "in", "--out", out)) == 0
    said = capsys.readouterr()
    assert said.out == f"{out / report.PAGE}: 1 results, 1 charts, which are there as PNGs too\n"
    assert said.err == ""
    (out / "gone.png").touch()
    assert report.run(parse(tmp_path / "in", "--out", out)) == 0  # its own report it may replace
    assert sorted(p.name for p in out.iterdir()) == [report.PAGE, "waterfall.png"]


def test_it_replaces_nothing_but_a_report(tmp_path: Path) -> None:
    run_of("engines", [graph("fusion", 0.04, 1e9, 1e6)]).write(tmp_path / "engines.json")
    with pytest.raises(UserError, match=r"holds what is no report \(engines\.json\)"):
        report.run(parse(tmp_path, "--out", tmp_path))
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "holiday.png").touch()
    with pytest.raises(UserError, match=r"holiday\.png"):
        report.run(parse(tmp_path, "--out", tmp_path / "pictures"))
    with pytest.raises(UserError, match=r"engines\.json"):
        report.run(parse(tmp_path, "--out", tmp_path / "engines.json"))
    assert (tmp_path / "pictures" / "holiday.png").exists()


def test_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"waterfall.json": everything()["waterfall.json"]}
    report.write(found, tmp_path / "out")
    before = (tmp_path / "out" / report.PAGE).read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(page, "png", full)
    with pytest.raises(UserError, match="No space left"):
        report.write(found | {"steps.json": everything()["steps.json"]}, tmp_path / "out")
    assert (tmp_path / "out" / report.PAGE).read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_trials_of_tune_are_one_table_without_charts() -> None:
    settings = [{"engine": e, "threads": n} for e in ("openvino", "onnxruntime") for n in (0, 1)]
    rows = [Row("tune", f"{s['engine']}, {s['threads']}", s, constant(0.1), {"clips_per_s": 10.0}) for s in settings]
    (group,) = groups.groups(rows)
    assert len(group.rows) == 4
    assert list(groups.group_charts(group, "tune", Styles())) == []
