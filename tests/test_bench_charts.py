"""The report's charts, and how figures are written."""

from __future__ import annotations

import numpy as np
import pytest

from bench import charts, drawing, page, text
from bench.charts import Bar, Point
from bench.drawing import Styles
from bench.timing import Timing

LIMITS = {"gemm_float32": 100e9, "copy": 10e9}


def constant(seconds: float) -> Timing:
    return Timing((seconds,) * 10, 6)


def test_a_distribution_is_of_all_calls() -> None:
    figure = charts.cdf({"a": Timing((4.0, 1.0, 2.0, 3.0))}, Styles(), page.WIDE)
    (line,) = figure.axes[0].lines
    assert line.get_xydata() == pytest.approx(np.array([[1, 25], [2, 50], [3, 75], [4, 100]]))
    many = charts.cdf({"a": Timing(tuple(np.linspace(1, 2, 10_000)))}, Styles(), page.WIDE).axes[0].lines[0]
    shares = np.asarray(many.get_ydata())
    assert len(shares) == 200
    assert (shares[0], shares[-1]) == (pytest.approx(0.01), 100)


def test_heat_map_is_dark_where_it_is_close() -> None:
    cells = {("fusion", "a"): 1e-8, ("fusion", "b"): 1e-6, ("fusion", "c"): 1e-4, ("fusion", "d"): 0.0}
    axes = charts.heat_map(cells, "largest_difference", page.WIDE).axes[0]
    shades = [drawing.luminance(np.asarray(c.get_facecolor())[0]) for c in axes.collections]
    assert shades[0] < shades[1] < shades[2]
    assert shades[3] == shades[0]
    assert [t.get_text() for t in axes.texts] == ["1.0e-8", "1.0e-6", "1.0e-4", "0"]
    for shade, label in zip(shades, axes.texts, strict=True):  # WCAG's 4.5 : 1
        ink = drawing.luminance([int(str(label.get_color())[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        low, high = sorted((ink, shade))
        assert (high + 0.05) / (low + 0.05) > 4.5


@pytest.mark.parametrize(
    ("colours", "ground"), [(drawing.COLOURS, drawing.GROUND), (None, drawing.DARK[drawing.GROUND])]
)
def test_colours_stand_out(colours: tuple[str, ...] | None, ground: str) -> None:
    """WCAG's 3 : 1 for graphics."""
    of = lambda c: drawing.luminance([int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)])  # noqa: E731
    for colour in colours or [drawing.DARK[c] for c in drawing.COLOURS]:
        low, high = sorted((of(colour), of(ground)))
        assert (high + 0.05) / (low + 0.05) > 3


def test_series_differ_without_colour() -> None:
    styles = Styles()
    looks = [(styles[str(i)].marker, styles[str(i)].line) for i in range(40)]
    assert len(set(looks)) == 40
    assert styles["0"].marker == looks[0][0]  # the same when it comes again


@pytest.mark.parametrize("width", [page.NARROW, page.WIDE])
def test_charts_keep_their_width_and_their_text(width: int) -> None:
    styles, times = Styles(), {f"torch.compile FP16, optimised for side {i}": constant(0.1 * i + 0.1) for i in range(8)}
    bars = [
        Bar("a technique with a name that is longer than a phone is wide", 1.0, 0.9, 1.1),
        Bar("b", 0.5, 0.5, 0.5, (1.02, 0.98, 1.05)),
    ]
    points = {"a": [Point(1, 2.0, "1"), Point(2, 3.0, "2")]}
    for figure in (
        charts.cdf(times, styles, width),
        charts.waterfall(bars, width),
        charts.lines(points, styles, ("steps", "latency"), "median_s", width),
        charts.throughput(points, styles, width),
        charts.roofline([charts.Work("fusion", "a", 20.0, 5e10)], LIMITS, styles, width),
    ):
        figure.draw_without_rendering()
        (axes,) = figure.axes
        assert figure.get_size_inches()[0] * drawing.DOTS == pytest.approx(width)
        labels = [*axes.texts, *axes.get_xticklabels(), *axes.get_yticklabels(), axes.xaxis.label, axes.title]
        for legend in figure.legends:
            labels += legend.get_texts()
        for label in labels:
            assert float(label.get_fontsize()) >= 16
        for label in (label for legend in figure.legends for label in legend.get_texts()):
            assert label.get_window_extent().x1 <= width
        for label in axes.texts:
            assert label.get_window_extent().x1 <= width + 1


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("median_s", 1.8123, "1.81 s"),
        ("median_s", 0.0882, "88.2 ms"),
        ("median_s", 0.9996, "1.00 s"),
        ("queue_ms", 3.5e-1, "350 µs"),
        ("peak_mb", 478.36, "478 MB"),
        ("clips_per_s", 12.345, "12.3 /s"),
        ("clips_per_s_of_all_calls", 12.345, "12.3 /s"),
        ("cpu_s_models", 0.0968, "96.8 ms"),
        ("bytes", 1.4e8, "140 MB"),
        ("macs", 190.8e9, "191 GMAC"),
        ("gemm_rate", 2.41e11, "241 GFLOP/s"),
        ("cc", 0.99999999, "0.99999999"),
        ("auc_judd", 0.93144, "0.9314"),
        ("largest_difference", 1.3e-5, "1.3e-5"),
        ("share_of_peak", 0.416, "41.6 %"),
        ("gain", 1.346, "1.35 x"),
        ("maps", 112.0, "112"),
        ("peak_mb", float("nan"), "-"),
    ],
)
def test_figures(name: str, value: float, said: str) -> None:
    assert text.figure(name, value) == said


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("clips_per_s", "clips"),
        ("clips_per_s_of_all_calls", "clips of all calls"),
        ("cpu_s_models", "cpu models"),
        ("peak_bytes", "peak"),
    ],
)
def test_headings_leave_units_out(name: str, said: str) -> None:
    assert text.heading(name) == said


def test_intervals_and_ticks() -> None:
    assert text.interval(0.0816, 0.0824) == "81.6 to 82.4 ms"
    assert text.interval(0.998, 1.002) == "998 ms to 1.00 s"
    assert [text.tick(t) for t in ("2.00 s", "50.0 ms", "300 µs", "1.20 s")] == ["2 s", "50 ms", "300 µs", "1.2 s"]


def test_a_heat_map_says_nan() -> None:
    cells = {("fusion", "a"): 1e-8, ("fusion", "b"): float("nan"), ("fusion", "c"): 1e-4}
    axes = charts.heat_map(cells, "largest_difference", page.WIDE).axes[0]
    assert [t.get_text() for t in axes.texts] == ["1.0e-8", "NaN", "1.0e-4"]
    shades = [drawing.luminance(np.asarray(c.get_facecolor())[0]) for c in axes.collections]
    assert shades[1] == pytest.approx(1)  # white, lighter than the largest difference
    assert shades[2] < 0.9


def test_what_grows_in_proportion_is_straight() -> None:
    styles, labels = Styles(), ("steps", "latency")
    for places, kind in (((1, 4, 12), "linear"), ((1, 8, 32), "log")):
        points = {"a": [Point(n, 0.1 * n) for n in places]}
        axes = charts.lines(points, styles, labels, "median_s", page.WIDE).axes[0]
        assert (axes.get_xscale(), axes.get_yscale()) == (kind, kind)


def test_ticks_have_the_digits_they_need() -> None:
    """Three digits would write 247.5 µs as 248 µs, and make two of the others alike."""
    ticks = drawing.Ticks(text.seconds)
    assert ticks.format_ticks([245e-6, 247.5e-6, 250e-6]) == ["245 µs", "247.5 µs", "250 µs"]
    assert ticks.format_ticks([1.0002, 1.0004]) == ["1.0002 s", "1.0004 s"]
    assert ticks.format_ticks([0, 0.5, 1.0]) == ["0", "500 ms", "1 s"]


def test_names_on_the_roofline_do_not_cover_each_other() -> None:
    names = ("visual_encoder", "denoiser", "fusion", "audio_encoder")
    works = [charts.Work(name, "a", 1000 + 300 * i, 5e10 * (1 + i % 2)) for i, name in enumerate(names)]
    axes = charts.roofline(works, LIMITS, Styles(), page.NARROW).axes[0]
    axes.figure.draw_without_rendering()  # type: ignore[union-attr]
    boxes = [t.get_window_extent() for t in axes.texts if t.get_text() in names]
    assert len(boxes) == 4
    for i, a in enumerate(boxes):
        assert axes.bbox.x0 <= a.x0 <= a.x1 <= axes.bbox.x1 + 1
        assert not any(a.overlaps(b) for b in boxes[:i])
