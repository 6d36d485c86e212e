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
    assert outcome(engines(2.0), name).measured == pytest.approx(5.0)
    assert outcome(engines(2.0), name).reached
    assert outcome(engines(2.1), name).reached is False
    share = f"full, {goals.DEFAULT}, share of the rate of matrix products"
    assert outcome(engines(2.0), share).reached
    assert outcome(engines(2.2), share).reached is False


def test_what_was_not_measured_is_neither() -> None:
    missing = outcome(engines(2.0), f"full, {goals.DEFAULT} against torch.compile")
    assert math.isnan(missing.measured)
    assert missing.reached is None


def test_a_quick_look_reaches_nothing() -> None:
    assert goals.outcomes(engines(2.0, quick=True)) == []
    assert goals.outcomes({}) == []


def test_bounds_on_both_sides() -> None:
    def steps(over: float) -> dict[str, Results]:
        row = Row("8 steps over 4", goals.DEFAULT, values={"loop_over_calls": over})
        return {"steps_full.json": Results("steps", {"size": "full"}, rows=[row])}

    name = f"full, {goals.DEFAULT}, loop of 8 steps minus 4 over four denoiser calls"
    assert [outcome(steps(over), name).reached for over in (0.94, 0.96, 1.04, 1.06)] == [False, True, True, False]
    assert outcome(steps(1.0), name).goal.bounds == "0.95 to 1.05 x"


def test_memory_is_of_the_longest_film_over_the_shortest() -> None:
    rows = [Row("growth over film", "x", {"minutes": m}, values={"peak_bytes": b}) for m, b in ((10, 2.2), (1, 2.0))]
    found = {"growth_demo.json": Results("growth", {"size": "demo"}, rows=rows)}
    assert outcome(found, "demo, memory of predict, 10 minutes over 1").measured == pytest.approx(1.1)


def test_goals_are_of_files_that_a_suite_writes() -> None:
    assert len({goal.name for goal in goals.GOALS}) == len(goals.GOALS)
    for goal in goals.GOALS:
        suite, which = goal.file.split("_")
        assert which in (streams.MEASUREMENTS if suite == "streams" else ("full", "demo"))
        assert suite in (*SUITES, "streams")


def test_the_report_says_them() -> None:
    said = report._goals(engines(2.1))
    assert "at least 5 x" in said
    assert "4.762 x" in said
    assert "<strong>no</strong>" in said
    assert "not measured" in said
    assert report._goals({}) == ""
