"""Goals against results whose figures are known."""

from __future__ import annotations

import math

import pytest

from bench import goals, report, streams
from bench.results import Results, Row
from bench.suites import SUITES
from bench.timing import Timing


def timed(what: str, side: str, seconds: float, **values: float) -> Row:
    return Row(what, side, {"batch": 1}, Timing((seconds,) * 5), values)


def engines(default_s: float, quick: bool = False) -> dict[str, Results]:
    rows = [
        timed("whole", "eager, each step", 10.0),
        timed("whole", goals.DEFAULT, default_s, share_of_limit=1.1 / default_s),
    ]
    return {"engines_full.json": Results("engines", {"size": "full", "quick": quick}, rows=rows)}


def outcome(found: dict[str, Results], name: str) -> goals.Outcome:
    (one,) = [o for o in goals.outcomes(found) if o.goal.name == name]
    return one


def test_reached_and_missed() -> None:
    name = f"full, {goals.DEFAULT} against eager with the encoders at each step"
    figure = outcome(engines(2.0), name).figure
    assert figure is not None
    assert figure.measured == pytest.approx(5.0)
    assert outcome(engines(2.0), name).reached == goals.YES
    assert outcome(engines(2.1), name).reached == goals.NO
    share = f"full, {goals.DEFAULT}, share of the rate of matrix products"
    assert outcome(engines(2.0), share).reached == goals.YES
    assert outcome(engines(2.2), share).reached == goals.NO


@pytest.mark.parametrize(
    ("times", "settled", "reached"),
    [
        ((1.8, 1.9, 1.8, 1.9, 1.8), True, goals.YES),
        ((1.8, 2.1, 1.8, 2.1, 1.8), True, goals.UNDECIDED),  # 5.6 x, but 4.8 x to 5.6 x
        ((2.1, 2.2, 2.1, 2.2, 2.1), True, goals.NO),
        ((1.8, 1.8, 1.8, 1.8, 1.8), False, goals.UNDECIDED),
        ((2.2, 2.2, 2.2, 2.2, 2.2), False, goals.UNDECIDED),
    ],
)
def test_the_interval_decides(times: tuple[float, ...], settled: bool, reached: str) -> None:
    found = engines(2.0)
    row = found["engines_full.json"].row("whole", goals.DEFAULT)
    row.timing = Timing(times, settled=settled)
    row.values["share_of_limit"] = 0.55 * 2 / row.timing.median
    for what in ("against eager with the encoders at each step", "share of the rate of matrix products"):
        got = outcome(found, f"full, {goals.DEFAULT}, {what}".replace(", against", " against"))
        assert got.figure is not None
        assert got.figure.interval is not None
        assert got.figure.interval[0] == pytest.approx((10 if "eager" in what else 1.1) / max(times))
        assert got.reached == reached, what


def test_intervals_that_results_state() -> None:
    def clients(low: float, high: float) -> goals.Outcome:
        axes: dict[str, int | str] = {"protocol": "grpc", "concurrency": 4}
        values = {"over_in_process": 1.01, "over_in_process_low": low, "over_in_process_high": high}
        found = Results("server", {}, rows=[Row("server", "our clients", axes, values=values)])
        return outcome({"server_demo.json": found}, "demo, 4 clients against the best batch in process")

    assert [clients(*ends).reached for ends in ((1.0, 1.1), (0.9, 1.1), (0.9, 0.99))] == ["yes", "undecided", "no"]


@pytest.mark.parametrize(
    ("ours", "best", "other", "reached"),
    [
        (True, True, True, goals.YES),
        (False, True, True, goals.UNDECIDED),
        (True, False, True, goals.UNDECIDED),
        (True, True, False, goals.YES),  # a batch that is not the best
    ],
)
def test_a_ratio_settled_if_both_did(ours: bool, best: bool, other: bool, reached: str) -> None:
    def load(settled: bool) -> Timing:
        return Timing((1.0,) * 5, settled=settled, rounds=(1,) * 5)

    axes: dict[str, int | str] = {"protocol": "grpc", "concurrency": 4}
    values = {"over_in_process": 1.2, "over_in_process_low": 1.1, "over_in_process_high": 1.3}
    rows = [Row("server", "our clients", axes, load(ours), values)]
    for batch, clips, settled in ((1, 5.0, other), (2, 9.0, best), (4, 6.0, other)):
        rows.append(Row("batch", "in process", {"batch": batch}, load(settled), {"clips_per_s": clips}))
    found = {"server_demo.json": Results("server", {}, rows=rows)}
    got = outcome(found, "demo, 4 clients against the best batch in process")
    assert got.reached == reached
    assert got.figure is not None
    assert got.figure.settled == (ours and best)


@pytest.mark.parametrize("unsettled", [None, "loop", "denoiser alone"])
def test_the_loop_settled_with_its_calls(unsettled: str | None) -> None:
    rows = [Row("8 steps over 4", goals.DEFAULT, values={"loop_over_lone_calls": 1.0})]
    for side in (goals.DEFAULT, "another"):
        for what in ("loop", "denoiser alone"):
            rows.append(Row(what, side, {}, Timing((1.0,), settled=side == goals.DEFAULT and what != unsettled)))
    name = f"full, {goals.DEFAULT}, loop of 8 steps minus 4 over four denoiser calls by themselves"
    got = outcome({"steps_full.json": Results("steps", {}, rows=rows)}, name)
    assert got.reached == (goals.UNDECIDED if unsettled else goals.YES)


@pytest.mark.parametrize(
    ("ends", "reached"),
    [
        ([(0.01, 0.015), (0.005, 0.018)], goals.YES),
        ([(0.01, 0.015), (0.005, 0.05)], goals.UNDECIDED),  # of one of them it hangs on when the run stopped
        ([(0.03, 0.04), (0.005, 0.05)], goals.NO),
        ([None, None], goals.YES),
    ],
)
def test_the_worst_growth_has_the_worst_interval(ends: list[tuple[float, float] | None], reached: str) -> None:
    rows = []
    for i, both in enumerate(ends):
        values = {"growth": 0.012 if both is None else sum(both) / 2}
        if both is not None:
            values |= {"growth_low": both[0], "growth_high": both[1]}
        rows.append(Row("soak", f"client {i}", values=values))
    got = outcome({"streams_soak.json": Results("streams_soak", {}, rows=rows)}, "live streams, growth of memory")
    assert got.reached == reached


@pytest.mark.parametrize(("high", "reached"), [(0.09, goals.YES), (0.11, goals.UNDECIDED)])
def test_work_beside_the_engines_has_an_interval(high: float, reached: str) -> None:
    values = {f"share_besides_engines{end}": v for end, v in (("", 0.08), ("_low", 0.07), ("_high", high))}
    found = Results("streams_work", {}, rows=[Row("work", "mubic_stream", {}, Timing((1.0,) * 9), values)])
    assert outcome({"streams_work.json": found}, "live stream, work besides the engines").reached == reached


@pytest.mark.parametrize("rounds", [1, 4, 5])
def test_too_few_rounds_decide_nothing(rounds: int) -> None:
    """Whatever interval older results state for them."""
    axes: dict[str, int | str] = {"protocol": "grpc", "concurrency": 4}
    load = Timing((1.0,) * rounds, rounds=(1,) * rounds)
    values = {"over_in_process": 1.2, "over_in_process_low": 1.2, "over_in_process_high": 1.2}
    for stated in (values, {"over_in_process": 1.2}):
        found = {"server_demo.json": Results("server", {}, rows=[Row("server", "our clients", axes, load, stated)])}
        got = outcome(found, "demo, 4 clients against the best batch in process").reached
        assert got == (goals.YES if rounds == 5 else goals.UNDECIDED)
    run = engines(1.0)
    run["engines_full.json"].row("whole", goals.DEFAULT).timing = load
    for what in (" against eager with the encoders at each step", ", share of the rate of matrix products"):
        got = outcome(run, f"full, {goals.DEFAULT}{what}").reached
        assert got == (goals.YES if rounds == 5 else goals.UNDECIDED), what


@pytest.mark.parametrize("values", [(math.nan, 0.99999), (0.99999, math.nan), (0.99999, math.nan, 0.99995)])
def test_nan_reaches_nothing(values: tuple[float, ...]) -> None:
    rows = [Row("parity of maps", "openvino", {"steps": i}, values={"cc": v}) for i, v in enumerate(values)]
    parity = outcome({"parity_full.json": Results("parity", {}, rows=rows)}, "full, lowest CC of a map")
    assert parity.figure is not None
    assert math.isnan(parity.figure.measured)
    assert parity.reached == goals.NO


def test_what_was_not_measured_is_neither() -> None:
    missing = outcome(engines(2.0), f"full, {goals.DEFAULT} against torch.compile")
    assert missing.figure is None
    assert missing.reached == goals.NOT_MEASURED


def test_a_quick_look_reaches_nothing() -> None:
    assert goals.outcomes(engines(2.0, quick=True)) == []
    assert goals.outcomes({}) == []


def test_bounds_on_both_sides() -> None:
    def steps(over: float) -> dict[str, Results]:
        row = Row("8 steps over 4", goals.DEFAULT, values={"loop_over_lone_calls": over})
        return {"steps_full.json": Results("steps", {"size": "full"}, rows=[row])}

    name = f"full, {goals.DEFAULT}, loop of 8 steps minus 4 over four denoiser calls by themselves"
    assert [outcome(steps(over), name).reached for over in (0.94, 0.96, 1.04, 1.06)] == ["no", "yes", "yes", "no"]
    assert outcome(steps(1.0), name).goal.bounds == "0.95 to 1.05 x"
    older = steps(1.0)
    older["steps_full.json"].rows[0].values = {"loop_over_calls": 1.0}  # of calls inside the loop: it shows nothing
    assert outcome(older, name).reached == goals.NOT_MEASURED


def test_memory_is_of_the_longest_film_over_the_shortest() -> None:
    rows = [Row("growth over film", "x", {"minutes": m}, values={"peak_bytes": b}) for m, b in ((10, 2.2), (1, 2.0))]
    found = {"growth_demo.json": Results("growth", {"size": "demo"}, rows=rows)}
    figure = outcome(found, "demo, memory of predict, 10 minutes over 1").figure
    assert figure is not None
    assert figure.measured == pytest.approx(1.1)


def test_goals_are_of_files_that_a_suite_writes() -> None:
    assert len({goal.name for goal in goals.GOALS}) == len(goals.GOALS)
    for goal in goals.GOALS:
        suite, which, *_device = goal.file.split("_")
        assert which in (streams.MEASUREMENTS if suite == "streams" else ("full", "demo"))
        assert suite in (*SUITES, "streams", "gpu")


H200 = "gpu_full_nvidia_h200.json"


def on_gpu(**medians: float) -> dict[str, Results]:
    """Of AOTInductor and whoever is named, in milliseconds; the parity of all, and AOTInductor's steps and batches."""
    sides = {
        "ours": "AOTInductor",
        "pytorch": "PyTorch FP16, optimised",
        "fp32": "eager FP32",
        "folded": "eager FP16, positions folded",
        "torchvision": "eager FP16, torchvision's attention",
        "limited": "torch.compile max-autotune FP16, limited search",
        "whole": "torch.compile max-autotune FP16",
    }
    rows = [timed("whole", sides[name], ms / 1000) for name, ms in medians.items()]
    maps = (("eager FP16, positions folded", 0.5, 0.5), ("AOTInductor", 0.9992, 0.004))
    rows += [Row("parity", side, values={"cc": cc, "largest_difference": d}) for side, cc, d in maps]
    rows += [Row("steps", "AOTInductor", {"steps": n}, Timing((0.002 + 0.0003 * n,) * 5)) for n in (4, 8, 12)]
    speeds = ((1, 250.0), (32, 640.0))
    rows += [Row("batch", "AOTInductor", {"batch": b}, Timing((b / v,) * 5), {"clips_per_s": v}) for b, v in speeds]
    return {H200: Results("gpu", {"size": "full", "quick": False}, rows=rows)}


def gpu_outcome(found: dict[str, Results], name: str) -> goals.Outcome:
    return outcome(found, f"nvidia h200: {name}")


def test_goals_of_a_gpu_are_found_by_its_file() -> None:
    found = on_gpu(ours=3.5, pytorch=3.8)
    median = gpu_outcome(found, "one clip, best engine, median")
    assert median.reached == goals.YES
    assert median.figure is not None
    assert median.figure.measured == pytest.approx(3.5)
    assert median.figure.of == "AOTInductor"
    assert gpu_outcome(on_gpu(ours=4.1), "one clip, best engine, median").reached == goals.NO
    assert gpu_outcome(on_gpu(fp32=50), "one clip, best engine, median").reached == goals.NOT_MEASURED
    names = [o.goal.name for o in goals.outcomes({**found, "gpu_full_nvidia_h100.json": found[H200]})]
    assert len(names) == len(set(names))
    assert "nvidia h100: best batch" in names
    assert goals.outcomes({"gpu_demo_nvidia_h200.json": found[H200]}) == []


@pytest.mark.parametrize(
    ("medians", "against", "reached"),
    [
        ({"fp32": 36}, "eager FP32", goals.YES),
        ({"fp32": 34}, "eager FP32", goals.NO),
        ({"folded": 20, "torchvision": 15}, "the faster eager FP16", goals.YES),
        ({"folded": 13, "torchvision": 20}, "the faster eager FP16", goals.NO),
        ({"folded": 20}, "the faster eager FP16", goals.NOT_MEASURED),  # the other one may be faster
        ({"limited": 4.3}, "torch.compile max-autotune FP16", goals.YES),
        ({"limited": 4.3, "whole": 4.1}, "torch.compile max-autotune FP16", goals.NO),
        ({}, "torch.compile max-autotune FP16", goals.NOT_MEASURED),
    ],
)
def test_times_as_fast_as_others(medians: dict[str, float], against: str, reached: str) -> None:
    assert gpu_outcome(on_gpu(ours=3.5, **medians), f"one clip, best engine, against {against}").reached == reached


def test_a_side_that_never_settled_decides_nothing() -> None:
    found = on_gpu(ours=3.5, fp32=36)
    found[H200].rows[1].timing = Timing((0.036,) * 5, settled=False)
    assert gpu_outcome(found, "one clip, best engine, against eager FP32").reached == goals.UNDECIDED


def test_the_tail_of_the_best_engine() -> None:
    """Of so few calls that none need be among the slowest hundredth, nobody knows how slow these are."""

    def tail(slow: float, calls: int) -> goals.Outcome:
        found = on_gpu(ours=3.5)
        found[H200].rows[0].timing = Timing((*(0.0035,) * (calls - calls // 20), *(slow,) * (calls // 20)))
        return gpu_outcome(found, "one clip, best engine, p99 over median")

    figure = tail(0.0035 * 1.1, 200).figure
    assert figure is not None
    assert figure.measured == pytest.approx(1.1)
    assert figure.interval == (pytest.approx(1.1), math.inf)
    for times, calls, reached in (
        (1.1, 200, goals.UNDECIDED),
        (1.3, 200, goals.NO),
        (1.1, 1000, goals.YES),
        (1.3, 1000, goals.NO),
    ):
        assert tail(0.0035 * times, calls).reached == reached


def test_batches_steps_and_maps_of_a_gpu() -> None:
    found = on_gpu(ours=3.5)
    wanted = {
        "best batch": (640, "AOTInductor, batch 32"),
        "a step more": (0.3, "AOTInductor"),
        "lowest CC of a map with eager FP32's": (0.9992, "AOTInductor"),  # not of who is no engine of ours
        "largest difference of a map from eager FP32's": (0.004, "AOTInductor"),
    }
    for name, (measured, of) in wanted.items():
        got = gpu_outcome(found, name)
        assert got.figure is not None
        assert got.figure.measured == pytest.approx(measured), name
        assert got.figure.of == of
        assert got.reached == goals.YES
    found[H200].rows.append(Row("parity", "TensorRT", values={"cc": math.nan, "largest_difference": math.nan}))
    assert gpu_outcome(found, "lowest CC of a map with eager FP32's").reached == goals.NO
    assert gpu_outcome(found, "largest difference of a map from eager FP32's").reached == goals.NO
    found[H200].rows.clear()
    assert {o.reached for o in goals.outcomes(found)} == {goals.NOT_MEASURED}


def test_the_report_says_them() -> None:
    said = report._goals(engines(2.1))
    assert "at least 5&nbsp;x" in said
    assert "4.762 x" in said
    assert "4.762 to 4.762" in said
    assert "<strong>no</strong>" in said
    assert "not measured" in said
    assert report._goals({}) == ""


def test_goals_without_results_are_not_measured() -> None:
    """All of them are in the report, those of a GPU once for all devices."""
    told = goals.outcomes(engines(2.0), absent=True)
    assert {o.goal.name for o in told} >= {o.goal.name for o in goals.outcomes(engines(2.0))}
    assert len(told) == len(goals.GOALS)
    steps = f"full, {goals.DEFAULT}, loop of 8 steps minus 4 over four denoiser calls by themselves"
    reached = {o.goal.name: o.reached for o in told}
    assert reached[steps] == reached["GPU: best batch"] == goals.NOT_MEASURED
    assert {o.goal.name for o in goals.outcomes(on_gpu(ours=3.5), absent=True)} >= {"nvidia h200: best batch", steps}
    assert steps in report._goals(engines(2.0))
    assert report._goals(engines(2.0, quick=True)) == ""
