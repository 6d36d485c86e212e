"""bench/streams.py: the figures that it computes, and one short load on the real server."""

from __future__ import annotations

import json
import math
import mmap
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from films import click, frame_times, write_film
from jsonschema import Draft202012Validator

from bench import goals, results, soak, streams
from bench.drawing import Styles
from bench.groups import group_charts, groups
from bench.looped import RATE, Loop
from bench.results import Results, Row
from mubic_deploy.errors import UserError
from mubic_deploy.triton.server import TritonServer

pytest_plugins = ("triton_fixtures",)


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 frames and 0.8 s of sound with a click at 0.4 s."""
    path = tmp_path_factory.mktemp("films") / "film.mkv"
    return write_film(path, frame_times(25, 20), np.full((36, 64, 3), 90, np.uint8), sound=click(0.4, 0.8))


def test_what_a_failed_client_lost_is_not_nothing() -> None:
    process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"], stdout=subprocess.PIPE, text=True)
    said = soak._said(process, 2)
    assert said.pop("gaps") == ["client 2 ended with exit code 3"]
    found = Results("streams_soak", {})
    found.rows += [Row("soak", "clients", {"client": i}, values=v) for i, v in enumerate(({"lost": 0.0}, said))]
    (outcome,) = (o for o in goals.outcomes({"streams_soak.json": found}) if o.goal.name.endswith("windows lost"))
    assert outcome.reached not in (goals.YES, goals.UNDECIDED)


def test_growth_is_of_the_last_twenty_minutes() -> None:
    """30 minutes: what happens in the first ten does not count, nor does one odd sample."""
    samples = [(15.0 * n, 500.0) for n in range(121)]
    samples[:40] = [(at, 10 * at) for at, _ in samples[:40]]
    assert soak.growth(samples) == 0
    samples[-1] = samples[-1][0], 900.0
    assert soak.growth(samples) == 0
    # 100 MB and 0.1 MB a second more; samples of 600 to 990 s against those of 1410 to 1800 s
    assert soak.growth([(at, 100 + at / 10) for at, _ in samples]) == pytest.approx(260.5 / 179.5 - 1)
    assert soak.growth([(at, 100 - at / 100) for at, _ in samples]) < 0


def test_growth_of_a_long_and_of_a_short_run() -> None:
    hour = [(15.0 * n, 100.0 if n < 160 else 100.0 + n) for n in range(241)]
    # of 2400 to 3600 s, samples 160 to 240: medians of 160 to 186 and of 214 to 240
    assert soak.growth(hour) == pytest.approx((100 + 227) / (100 + 173) - 1)
    minute = [(0.0, 900.0), (15.0, 900.0), (30.0, 100.0), (45.0, 100.0), (60.0, 150.0)]
    assert soak.growth(minute) == 0.5
    assert math.isnan(soak.growth([]))
    assert math.isnan(soak.growth([(0.0, 100.0)]))
    assert math.isnan(soak.growth([(0.0, 100.0), (60.0, 100.0)]))  # nobody looked in the first third


def test_growth_if_the_run_had_stopped_before() -> None:
    """Half as much again for some minutes: it is out of the last third when the run ends, and not, had it ended
    sooner."""
    flat = [(15.0 * n, 100.0) for n in range(121)]
    assert soak.growths(flat) == (0, 0)
    came_and_went = [(at, 150.0 if 1160 <= at <= 1560 else mb) for at, mb in flat]
    assert soak.growth(came_and_went) == 0
    assert soak.growths(came_and_went) == (0, 0.5)
    slowly = [(at, 100 + at / 10) for at, _ in flat]
    low, high = soak.growths(slowly)
    found = [soak.growth(slowly[:i]) for i in range(94, 122)]  # 1395 s is before the last third, 1410 s in it
    assert (low, high) == (min(found[1:]), max(found[1:]))
    assert low < high
    assert all(math.isnan(end) for few in ([], flat[:2]) for end in soak.growths(few))


def test_private_memory() -> None:
    before = soak.private_mb(os.getpid())
    # pages of its own: an array may get pages that the process has already
    with mmap.mmap(-1, 20_000_000, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:
        for at in range(0, len(block), mmap.PAGESIZE):
            block[at] = 1
        assert soak.private_mb(os.getpid()) - before == pytest.approx(20, abs=3)
    with pytest.raises(OSError, match=r"[Nn]o such"):
        soak.private_mb(2**22 + 1)


def test_a_loop_goes_on(film: Path) -> None:
    """Sound and frames come around together: the click at 0.4 s, 1.2 s, 2 s."""
    fed: list[tuple[float, np.ndarray]] = []
    client = SimpleNamespace(
        frame=lambda image, time_s: None, sound=lambda samples, time_s: fed.append((time_s, samples))
    )
    loop = Loop(film)
    for i in range(60):
        loop.feed(client, i)  # type: ignore[arg-type]
    assert (len(loop.frames), loop.frames[0].shape, {len(samples) for _, samples in fed}) == (20, (112, 192, 3), {640})
    loud = [time_s for time_s, samples in fed if np.abs(samples).max() > 0.3]
    assert loud == [10 / RATE, 30 / RATE, 50 / RATE]


def test_streams_on_a_server(film: Path, toy_server: TritonServer) -> None:
    values = streams.hold(toy_server.url, Loop(film), count=2, seconds=2.0)
    assert values.keys() == {"median_s", "p99_s", "maps_per_s", "dropped", "share_dropped"}
    # each stream's 50 frames make windows 0..15, 5..20 .. 30..45: 7, of which none is dropped
    assert (values["dropped"], values["share_dropped"]) == (0, 0)
    assert 5 < values["maps_per_s"] < 10  # the last ones come after the last frame
    # half the excerpt of sound, 0.519 s, has to be waited for, but at the end; the last of it is in the piece of 0.04 s
    # that comes 0.48 s after the middle frame
    assert 0.47 < values["median_s"] <= values["p99_s"] < 2


def test_maps_that_come_late_take_their_time() -> None:
    """Two streams of 100 windows, 20 s: one with all maps half a second after its last frame, the other with 60, of
    which the last came 10 s later."""
    prompt, slow = (
        SimpleNamespace(median_s=m, p99_s=2 * m, maps=maps, dropped=100 - maps) for m, maps in ((0.6, 100), (2.0, 60))
    )
    values = streams.held([(prompt, 0.5), (slow, 10.0)], 100)  # type: ignore[list-item]
    assert values == {
        "median_s": 1.3,
        "p99_s": 4.0,
        "maps_per_s": pytest.approx(100 / 20.5 + 60 / 30),
        "dropped": 40,
        "share_dropped": 0.2,
    }


def test_work_is_of_pairs() -> None:
    """A machine that is half as fast for a while: the share beside the engines does not move, nor does the ratio."""
    pace = np.repeat([1.0, 2.0], 30)
    noise = np.random.default_rng(0).normal(1, 0.01, 60)
    mine, engines, alone = streams.worked((0.11 * pace * noise).tolist(), (0.1 * pace).tolist(), (0.08 * pace).tolist())
    assert (mine.side, alone.side) == (streams.SIDE, "in process")
    for name, true in (("share_besides_engines", 0.1), ("over_in_process", 1.375)):
        figures = [mine.values[f"{name}{end}"] for end in ("_low", "", "_high")]
        assert figures == sorted(figures)
        assert figures[1] == pytest.approx(true, abs=0.01)
        assert 0 < figures[2] - figures[0] < 0.02
    assert engines.timing is not None
    assert mine.timing is not None
    shares = np.divide(mine.timing.samples, engines.timing.samples) - 1  # of each map, in the file
    assert mine.values["share_besides_engines"] == pytest.approx(np.median(shares))
    assert engines.timing.measurement == mine.timing.measurement is not None


def test_a_stream_that_fails_is_not_left_out(film: Path) -> None:
    with pytest.raises(UserError, match="Triton"):
        streams.hold("127.0.0.1:9", Loop(film), count=2, seconds=0.1)


def test_alignment_says_the_largest_offset() -> None:
    found = [streams.alignment.Offset(8, 0.001, 0.025), streams.alignment.Offset(9, -0.004, -0.1)]
    row = streams.aligned("25 fps", found)
    assert (row.side, row.values) == ("25 fps", {"offset_ms": 4.0, "offset_frames": 0.1, "windows": 2})


def test_alignment_as_a_script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """One rate, saved in the one format of results."""
    times = [Fraction(i, 25) for i in range(60)]
    monkeypatch.setattr(streams.alignment, "RATES", {"25 fps": times})
    monkeypatch.setattr(streams, "FOLDER", tmp_path)
    assert streams.main(["align", "--save"]) == 0
    written = json.loads((tmp_path / "streams_align.json").read_text())
    Draft202012Validator(json.loads(Path(results.__file__).with_name("schema.json").read_text())).validate(written)
    (row,) = results.read(tmp_path / "streams_align.json").rows
    assert row.values["windows"] == 16
    assert 0 <= row.values["offset_frames"] < 0.5
    assert (written["suite"], written["settings"]) == ("streams_align", {"size": "demo"})
    assert "25 fps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "usual"),
    [
        (["soak"], True),
        (["soak", "--maps", "9"], True),  # a setting of `work`
        (["soak", "--minutes", "1"], False),
        (["load", "--streams", "1"], False),
        (["bytes", "--film", "film.mp4"], False),
    ],
)
def test_only_whole_measurements_are_kept_among_the_results(
    given: list[str], usual: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    name, (_, names) = given[0], streams.MEASUREMENTS[given[0]]
    monkeypatch.setitem(streams.MEASUREMENTS, name, (lambda *_: None, names))
    monkeypatch.setattr(streams, "FOLDER", tmp_path / "results")
    monkeypatch.setattr(streams, "LOOKS", tmp_path / "looks")
    assert streams.main([*given, "--save"]) == 0
    (folder,) = tmp_path.iterdir()
    assert folder.name == ("results" if usual else "looks")


def test_load_is_drawn_over_the_streams() -> None:
    found = Results("streams_load", {"size": "demo"})
    for count in (1, 2, 4):
        values = {"median_s": 0.6 * count, "p99_s": 0.7 * count, "maps_per_s": 5.0 * count, "dropped": 0}
        found.rows.append(Row("growth over streams", streams.SIDE, {"streams": count}, values=values))
    (group,) = groups(found.rows)
    charts = list(group_charts(group, "load", Styles()))
    assert [chart.name for chart in charts] == [f"load_streams_{value}" for value in found.rows[0].values]
    assert "median over streams" in charts[0].alt


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["work", "--maps", "0"], "0"),
        (["load", "--streams", "0"], "0"),
        (["load", "--seconds", "0"], "--seconds 0 is out of range: use 2 or more"),
        (["soak", "--minutes", "inf"], "--minutes inf is out of range"),
        (["dance"], "invalid choice: 'dance'"),
    ],
)
def test_wrong_input_is_one_line(given: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said) as raised:
        streams.main(given)
    assert "\n" not in str(raised.value)
