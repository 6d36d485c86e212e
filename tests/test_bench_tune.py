"""`python -m bench tune`: the search on known functions, its verdict, one run against the real server, wrong input."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import jsonschema
import pytest

from bench import descent, machine, results, timing, tune
from bench.__main__ import main
from bench.descent import P99, RATE, Verdict, descend, judged, rank
from bench.load import Answers, Load
from bench.results import Results
from bench.tune import Setting, Space
from mubic_deploy.artifacts import Artifacts
from mubic_deploy.cli import build_parser
from mubic_deploy.engines import cpu
from mubic_deploy.errors import UserError
from mubic_deploy.triton.commands import serving_options
from mubic_deploy.triton.repository import write_repository

Pair = tuple[int, int]
GROUPS: list[Callable[[Pair], Iterable[Pair]]] = [
    lambda s: [(x, s[1]) for x in range(5)],
    lambda s: [(s[0], y) for y in range(5)],
]


def found(function: Callable[[Pair], tuple[float, float] | None], target_s: float = 1.0, rounds: int | None = None):
    """The best pair of a function -> (clips a second, p99), and the pairs it was asked for, in order."""
    asked: list[Pair] = []

    def measure(pair: Pair) -> descent.Rank | None:
        asked.append(pair)
        figures = function(pair)
        return None if figures is None else rank(*figures, target_s)

    best, tried = descend((0, 0), GROUPS, measure, rounds)
    assert list(tried) == asked  # none twice
    return best, asked


def test_the_best_is_found_and_nothing_is_measured_twice() -> None:
    """The best x depends on y, so that the first round's x is not the last one's."""
    bent = lambda p: (100 - 3 * (p[0] - p[1]) ** 2 - 5 * (p[1] - 3) ** 2, 0.5)  # noqa: E731
    best, asked = found(bent)
    assert best == (3, 3)
    assert len(asked) == len(set(asked)) < 25
    assert found(bent, rounds=1)[0] == (0, 2)  # 100 - 12 - 5; (0, 3) has 73


def test_throughput_counts_among_those_that_meet_the_target() -> None:
    """More x is more throughput and more latency."""
    assert found(lambda p: (10 + p[0], 0.3 * (1 + p[0])), target_s=1.0)[0] == (2, 0)
    assert found(lambda p: (10 + p[0], 0.3 * (1 + p[0])), target_s=float("inf"))[0] == (4, 0)


def test_without_one_that_meets_the_target_the_lowest_p99_counts() -> None:
    assert found(lambda p: (10 + p[0], 4.0 - 0.5 * p[0] + p[1]), target_s=1.0)[0] == (4, 0)
    # and one that meets it is worth any throughput
    assert found(lambda p: (10 - p[0], 4.0 - p[0]), target_s=2.0)[0] == (2, 0)


def test_what_brings_next_to_nothing_is_not_kept() -> None:
    assert found(lambda p: (100 + 1.9 * (p != (0, 0)), 0.5))[0] == (0, 0)
    assert found(lambda p: (100 + 2.1 * (p == (0, 1)), 0.5))[0] == (0, 1)


def test_a_setting_that_cannot_be_had_is_left_out() -> None:
    assert found(lambda p: None if p[0] == 4 else (10 + p[0], 0.5))[0] == (3, 0)
    with pytest.raises(UserError, match="to begin from"):
        found(lambda p: None)


def test_threads_and_instances_change_together() -> None:
    """Where fewer threads alone leave cores idle and more instances alone fight, as a server with one model would."""
    space = Space(["openvino"], ["fusion"], cores=4, concurrency=4, target_s=1.0)

    def rate(setting: Setting) -> float:
        threads, count = setting.threads or 4, dict(setting.instances).get("fusion", 1)
        each = threads**0.7
        return count * each * min(1, 4 / (threads * count)) ** 2

    best, tried = descend(Setting("openvino"), space.groups(), lambda s: rank(rate(s), 0.5, 1.0))
    assert best == Setting("openvino", threads=1, instances=(("fusion", 4),))
    alone = [Setting("openvino", threads=1), Setting("openvino", instances=(("fusion", 4),))]
    assert all(rate(s) < rate(Setting("openvino")) for s in alone)
    assert {s.queue_delay_us for s in tried} == {0, 500, 2000, 10000}
    assert {s.max_batch for s in tried} == {1, 2, 4, 8}


def test_settings_of_the_same_server_are_one() -> None:
    default = Setting("openvino")
    assert default.changed(max_batch=1, queue_delay_us=500) == default.changed(max_batch=1)
    assert default.with_instances({"denoiser": 3}) == default
    called = default.changed(call_denoiser=True).with_instances({"denoiser": 3, "fusion": 1})
    assert called.instances == (("denoiser", 3),)
    assert called.changed(call_denoiser=False) == default
    assert default.text(default) == "default"
    assert called.changed(queue_delay_us=500, threads=1).text(default) == "threads 1, 3 x denoiser, delay 500 us, calls"


@pytest.mark.parametrize(
    "setting",
    [
        Setting(cpu.ENGINES[0]),
        Setting(cpu.ENGINES[1], 1, (("ddim", 2), ("fusion", 3)), 4, 700, True),
    ],
)
def test_one_command_serves_it(setting: Setting, toy_artifacts: Artifacts) -> None:
    arguments = build_parser().parse_args(["serve", *setting.flags()])
    told = serving_options(arguments, toy_artifacts)
    assert setting.options() | told == setting.options()
    unsaid = set(setting.options()) - set(told)
    assert all(setting.options()[name] == Setting(cpu.ENGINES[0]).options()[name] for name in unsaid)


def load(rates: list[float], p99_s: float = 0.1) -> Load:
    return Load(tuple(Answers(round(100 * rate), 100.0, (p99_s,) * 5, 5) for rate in rates))


@pytest.mark.parametrize(
    ("rates", "p99_s", "expected"),
    [
        ([11.0, 11.1, 10.9, 11.2, 11.1], 0.1, (RATE, 1.11, True)),  # more than both spreads
        ([11.0, 11.1, 10.9, 11.2], 0.1, (RATE, 1.11, False)),  # too few rounds
        ([10.1, 10.1, 10.1, 10.1, 10.1], 0.1, (RATE, 1.01, False)),  # under 2 %
        ([11.0, 11.0, 5.6, 5.6, 11.1], 0.1, (RATE, 1.1, False)),  # the machine was slow, twice, for one of the two
        ([9.0, 11.9, 9.5, 11.5, 10.5], 0.1, (RATE, 1.05, False)),  # inside the spread
        ([20.0, 20.0, 20.0, 20.0, 20.0], 0.3, (RATE, 2.0, False)),  # misses the target
    ],
)
def test_the_default_stays_without_a_real_gain(
    rates: list[float], p99_s: float, expected: tuple[str, float, bool]
) -> None:
    verdict = judged(load([10.0, 9.9, 10.1, 10.0, 10.0][: len(rates)]), load(rates, p99_s), 0.2)
    assert (verdict.figure, verdict.real, verdict.misses) == (expected[0], expected[2], p99_s > 0.2)
    assert verdict.gain == pytest.approx(expected[1], abs=0.001)
    assert verdict.low <= verdict.gain <= verdict.high


def test_a_machine_that_is_slow_for_some_rounds_hides_no_gain() -> None:
    verdict = judged(load([10.0, 6.0, 5.9, 10.1, 10.0]), load([11.0, 6.5, 6.5, 11.2, 11.0]), 0.2)
    assert (verdict.gain, verdict.real) == (pytest.approx(1.1, abs=0.005), True)


def test_a_default_that_misses_the_target_is_judged_by_its_p99() -> None:
    verdict = judged(load([10.0] * 5, 0.4), load([8.0] * 5, 0.2), 0.3)
    assert (verdict.figure, verdict.gain, verdict.real) == (P99, pytest.approx(2.0), True)


class Pretended(tune.Bench):
    """Without servers: one thread gives 12 clips a second for 10, calls do not start; side by side, what is said."""

    beside: float | None = 12.0

    def trial(self, setting: Setting) -> Load:
        if setting.call_denoiser:
            raise UserError("the server ended by itself")
        return load([12.0 if setting.threads == 1 else 10.0] * 2)

    def against(self, default: Setting, found: Setting, rounds: int, count: tune.Count) -> dict[str, Load]:
        if self.beside is None:
            raise UserError("there is no memory for two")
        return {"default": load([10.0] * rounds), found.text(default): load([self.beside] * rounds)}


@pytest.mark.parametrize(
    ("beside", "threads", "said"),
    [
        (12.0, 1, "threads 1: 1.200 x the default's clips a second (95 %: 1.200 to 1.200), it is kept"),
        (10.1, 0, "which is no real difference: the default stays"),
        (None, 0, "threads 1 and the default do not run side by side: the default stays"),
    ],
)
def test_only_what_is_better_beside_the_default_is_kept(
    toy_artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beside: float, threads: int, said: str
) -> None:
    monkeypatch.setattr(cpu, "cores", lambda: 2)
    monkeypatch.setattr(Pretended, "beside", beside)
    written = Results("tune", {})
    pretended = Pretended(toy_artifacts, tmp_path, "grpc", 4, 1.0)
    kept = tune.tune(pretended, 1.0, False, written, lambda *_: None)
    assert kept == Setting(cpu.ENGINES[0], threads)
    assert said in written.notes["verdict"]
    assert written.left_out["threads 1, calls"] == "the server ended by itself"
    assert written.row("tune", "threads 1").values["clips_per_s"] == 12
    assert [row.side for row in written.rows if row.what == "tuned"] == (["default", "threads 1"] if beside else [])


# ---- with the real server


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "GEMM_SHAPES", {"cpu": ((256, 128, 64),)})
    monkeypatch.setattr(machine, "COPY_BYTES", {"cpu": 1 << 20})
    monkeypatch.setattr(machine, "LIMIT_RULE", timing.Rule(repeats=2, seconds=0.1, short_s=0.0, warm_up_s=0.1))
    monkeypatch.setattr(tune, "QUICK_ROUNDS", 2)


def test_a_run(
    fast: None,
    toy_artifacts: Artifacts,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Three servers: the default, one that cannot be had, one that is taken to be better."""
    wanted = Setting(cpu.ENGINES[0], max_batch=2, queue_delay_us=300)
    monkeypatch.setattr(Space, "groups", lambda self: [lambda s: [Setting("abacus"), wanted]])
    monkeypatch.setattr(descent, "better", lambda a, b: True)
    monkeypatch.setattr(tune, "judged", lambda *_: Verdict(RATE, 1.2, 1.1, 1.3, False, True))
    (tmp_path / "best").mkdir()
    options = ["--quick", "--seconds", "0.2", "--concurrency", "2", "--target-ms", "60000"]
    monkeypatch.setattr(tune, "LOOKS", tmp_path / "results")  # what is of other graphs replaces no measurement
    places = ["--out", str(tmp_path / "best")]
    assert main(["tune", "--artifacts", str(toy_artifacts.path), *options, *places]) == 0
    printed = capsys.readouterr().out

    path = tmp_path / "results" / "tune_demo.json"
    schema = json.loads((Path(results.__file__).parent / "schema.json").read_text())
    jsonschema.validate(json.loads(path.read_text()), schema)
    read = results.read(path)
    assert read.settings["artifacts"] == str(toy_artifacts.path)
    assert [(row.what, row.side) for row in read.rows] == [
        ("tune", "default"),
        ("tune", "max batch 2, delay 300 us"),
        ("tuned", "default"),
        ("tuned", "max batch 2, delay 300 us"),
    ]
    assert "unknown engine 'abacus'" in read.left_out["abacus"]
    axes = read.rows[1].axes
    assert (axes["engine"], axes["max_batch"], axes["queue_delay_us"]) == (cpu.ENGINES[0], 2, 300)
    assert axes["instances of ddim"] == 1
    assert "instances of sampler" not in axes
    for row in read.rows:
        assert row.timing is not None
        assert row.values["meets_target"] == 1
        # two clients that always wait for an answer: throughput is what their latency allows
        mean = sum(row.timing.samples) / len(row.timing.samples)
        assert row.values["clips_per_s"] == pytest.approx(2 / mean, rel=0.5)

    command = f"mubic-deploy serve --artifacts {toy_artifacts.path} --max-batch 2 --queue-delay 300"
    assert command in printed
    assert read.notes["command"] == command
    assert "1.200 x the default's clips a second (95 %: 1.100 to 1.300), it is kept" in printed
    write_repository(toy_artifacts, tmp_path / "expected", max_batch=2, queue_delay_us=300)
    written = {
        str(p.relative_to(tmp_path / "best")): p.read_bytes() for p in (tmp_path / "best").rglob("*") if p.is_file()
    }
    assert written == {
        str(p.relative_to(tmp_path / "expected")): p.read_bytes()
        for p in (tmp_path / "expected").rglob("*")
        if p.is_file()
    }


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--size", "huge"], "invalid choice: 'huge'"),
        (["--size", "demo", "--artifacts", "x"], "not allowed with"),
        (["--artifacts", "{folder}/none"], "none"),
        (["--target-ms", "0"], "--target-ms 0 is out of range"),
        (["--target-ms", "nan"], "--target-ms nan is out of range"),
        (["--target-ms", "soon"], "soon is not a number"),
        (["--seconds", "-1"], "--seconds -1 is out of range"),
        (["--concurrency", "0"], "argument --concurrency: 0 is too small"),
        (["--protocol", "smtp"], "invalid choice: 'smtp'"),
        (["--out", "{folder}/letters"], "letters exists and is no model repository"),
        (["--results", "{folder}/letters/one.txt"], "one.txt cannot be written"),
    ],
)
def test_wrong_input_is_one_line(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "one.txt").write_text("dear")
    given = [argument.format(folder=tmp_path) for argument in arguments]
    if "--out" not in given:
        given += ["--out", str(tmp_path / "best")]
    if "--results" not in given:
        given += ["--results", str(tmp_path)]
    assert main(["tune", *given]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["letters", "one.txt"]
