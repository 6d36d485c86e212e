"""`python -m bench run`: every suite measures what it says, on the demo size; and wrong input."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import av
import jsonschema
import numpy as np
import pytest
import torch
import toy_graphs

from bench import child, machine, results, run, sides, timing
from bench.__main__ import main
from bench.run import limits, measure
from bench.serving import PROTOCOLS, addresses, serving
from bench.suites import SUITES, batch, engines, growth, parity, server, steps, waterfall
from mubic_deploy.config import get_config
from mubic_deploy.engines import cpu
from mubic_deploy.errors import UserError
from mubic_deploy.model.mubic import cost
from mubic_deploy.parity import random_clip
from mubic_deploy.triton.server import TritonServer

FAST = timing.Rule(repeats=2, seconds=0.1, short_s=0.0, warm_up_s=0.1, quick=True)


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "QUICK", FAST)
    monkeypatch.setattr(timing, "AT_LEAST", 2)
    for module in (sides, engines, steps):
        monkeypatch.setattr(module, "CLIPS", 2)
    monkeypatch.setattr(machine, "GEMM_SHAPES", {"cpu": ((256, 128, 64),)})
    monkeypatch.setattr(machine, "COPY_BYTES", {"cpu": 1 << 20})
    monkeypatch.setattr(machine, "LIMIT_RULE", FAST)


@pytest.fixture(scope="module")
def sampler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exported once for all who ask for it."""
    return sides.Context("demo", 1, tmp_path_factory.mktemp("sampler")).sampler


@pytest.fixture
def one_sampler(sampler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sides.Context, "sampler", sampler)


@pytest.fixture
def context(tmp_path: Path) -> sides.Context:
    return sides.Context("demo", 1, tmp_path)


def rows(measured: results.Results, what: str) -> list[results.Row]:
    return [row for row in measured.rows if row.what == what]


def test_engines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(engines, "WHOLE", ("eager, each step", "eager", "onnxruntime", "openvino"))
    measured = measure("engines", "demo", 1, quick=True)
    assert [row.side for row in rows(measured, "whole")] == ["eager, each step", "eager", "onnxruntime", "openvino"]
    for graph in ("visual_encoder", "audio_encoder", "fusion", "denoiser"):
        assert [row.side for row in rows(measured, graph)] == ["eager", "onnxruntime", "openvino"]
    row = measured.row("denoiser", "openvino")
    assert row.timing is not None
    least = max(2 * row.values["macs"] / measured.limits["gemm_float32"], row.values["bytes"] / measured.limits["copy"])
    assert row.values["share_of_limit"] == pytest.approx(least / row.timing.median)
    whole = measured.row("whole", "onnxruntime").values["macs"]
    parts = {g: measured.row(g, "onnxruntime").values["macs"] for g in ("visual_encoder", "audio_encoder", "fusion")}
    assert whole == sum(parts.values()) + 4 * row.values["macs"]
    assert measured.row("whole", "eager, each step").values["macs"] == 4 * (sum(parts.values()) + row.values["macs"])
    path = tmp_path / "engines.json"
    measured.write(path)
    schema = json.loads((Path(results.__file__).parent / "schema.json").read_text())
    jsonschema.validate(json.loads(path.read_text()), schema)
    assert results.read(path).rows[0].key == measured.rows[0].key


def test_the_limit_is_the_better_of_two_looks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    looks = iter([{"gemm_float32": 100e9, "copy": 9e9}, {"gemm_float32": 200e9, "copy": 8e9}])
    monkeypatch.setattr(machine, "limits", lambda threads: next(looks))
    found = results.Results("engines", {})
    with limits(found, 1, lambda text: None):
        found.rows.append(results.Row("whole", "openvino", timing=timing.Timing((1.0,)), values={"macs": 50e9}))
    assert found.limits == {"gemm_float32": 200e9, "copy": 9e9}
    assert found.rows[0].values["share_of_limit"] == pytest.approx(0.5)
    assert (found.notes["limits_before"]["copy"], found.notes["limits_after"]["copy"]) == (9e9, 8e9)
    assert "GEMM rate went from 100 to 200 GFLOP/s" in " ".join(capsys.readouterr().err.split())


def test_the_engines_multiply_for_the_limit() -> None:
    sides = machine.engines(np.eye(2, 3, dtype=np.float32), np.arange(12, dtype=np.float32).reshape(3, 4), 1)
    assert list(sides) == ["openvino", "onnxruntime"]
    for multiply in sides.values():
        assert multiply(0)["C"].tolist() == [[[0, 1, 2, 3], [4, 5, 6, 7]]]


def test_the_best_shape_is_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 m k n FLOPs each, in a time that is given: the tall one is done at the higher rate."""
    took = {(64, 32, 16): 2 * 64 * 32 * 16 / 3e9, (32, 32, 32): 2 * 32**3 / 2e9}
    monkeypatch.setattr(machine, "GEMM_SHAPES", {"cpu": tuple(took)})
    shapes = [*took, None]  # and the copy

    def timed(sides: dict[str, timing.Side], *_: object) -> dict[str, timing.Timing]:
        shape = shapes.pop(0)
        return {name: timing.Timing((took[shape] if shape else 1.0,)) for name in sides}

    monkeypatch.setattr(timing, "measure", timed)
    assert machine.limits()["gemm_float32"] == pytest.approx(3e9)


def test_steps_over_the_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "SIDES", ("onnxruntime",))
    measured = measure("steps", "demo", 1, quick=True)
    assert [row.axes["steps"] for row in rows(measured, "steps")] == [*range(1, 13), "adaptive"]
    (row,) = rows(measured, "8 steps over 4")
    four, eight, one = *(r.timing for r in rows(measured, "loop")), rows(measured, "denoiser alone")[0].timing
    assert four is not None
    assert eight is not None
    assert one is not None
    assert len(eight.samples) == len(four.samples) == len(one.samples)
    assert row.values["loop_s"] == pytest.approx(np.median(np.subtract(eight.samples, four.samples)))
    assert row.values["calls_s"] == pytest.approx(4 * one.median)
    assert 0 < one.median < four.median


def test_a_loop_that_adds_to_its_calls_shows() -> None:
    """0.1 s a call, and 0.02 s that the loop adds to each: which calls timed inside would share."""
    rng = np.random.default_rng(0)

    def around(seconds: float) -> timing.Timing:
        return timing.Timing(tuple(rng.normal(seconds, seconds / 100, 60)))

    values = steps.over_calls(around(0.96), around(0.48), around(0.1))
    assert values["loop_over_lone_calls"] == pytest.approx(1.2, rel=0.02)
    assert 1.1 < values["loop_over_lone_calls_low"] < 1.2 < values["loop_over_lone_calls_high"] < 1.3
    equal = steps.over_calls(around(0.8), around(0.4), around(0.1))
    assert equal["loop_over_lone_calls_low"] < 1 < equal["loop_over_lone_calls_high"]


def test_a_machine_that_slows_down_is_not_in_the_loop_s_cost() -> None:
    pace = np.repeat([1.0, 1.4], 30)
    eight, four, one = (timing.Timing(tuple(pace * s)) for s in (0.8, 0.4, 0.1))
    values = steps.over_calls(eight, four, one)
    assert (values["loop_over_lone_calls_low"], values["loop_over_lone_calls_high"]) == pytest.approx((1, 1))


def test_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "SIDES", ("openvino",))
    monkeypatch.setattr(batch, "BATCHES", {"demo": (1, 3)})
    measured = measure("batch", "demo", 1, quick=True)
    for row in rows(measured, "batch"):
        assert row.timing is not None
        assert row.values["clips_per_s"] == pytest.approx(row.axes["batch"] / row.timing.median)  # type: ignore[operator]
        share = 2 * cost(get_config("demo")).macs_4_steps * row.values["clips_per_s"] / measured.limits["gemm_float32"]
        assert row.values["share_of_limit"] == pytest.approx(share)


def test_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "QUICK_CONCURRENCY", (2,))
    monkeypatch.setattr(server, "BATCHES", (1, 2))
    measured = measure("server", "demo", 1, quick=True)
    whole = {row.side: row for row in rows(measured, "whole")}
    assert list(whole) == ["in process", *PROTOCOLS]
    for protocol in PROTOCOLS:
        assert whole[protocol].values["largest_difference"] < 1e-5
        a, b = (whole[name].timing for name in (protocol, "in process"))
        assert a is not None
        assert b is not None
        pairs = np.divide(a.samples, b.samples)  # called as often
        assert whole[protocol].values["over_in_process"] == pytest.approx(np.median(pairs))
    loads = {(row.side, row.axes["protocol"]): row.values["clips_per_s"] for row in rows(measured, "server")}
    assert loads.keys() == {(side, p) for side in ("our clients", "perf_analyzer") for p in PROTOCOLS}
    assert [row.axes["batch"] for row in rows(measured, "batch")] == [1, 2]
    best = max(row.values["clips_per_s"] for row in rows(measured, "batch"))
    ours = measured.row("server", "our clients", protocol="grpc", concurrency=2).values
    assert ours["over_in_process"] == pytest.approx(ours["clips_per_s"] / best)
    used = {who: ours[f"cpu_s_{who}"] for who in ("bench", "tritonserver", "models")}
    assert min(used.values()) > 0
    assert used["models"] > used["bench"]
    assert sum(used.values()) * ours["clips_per_s"] < 2 * len(os.sched_getaffinity(0))
    alone = measured.row("batch", "in process", batch=1).values
    assert alone["cpu_s_bench"] > 10 * alone["cpu_s_models"]
    theirs = measured.row("server", "perf_analyzer", protocol="grpc", concurrency=2).values
    assert theirs["over_ours"] == pytest.approx(theirs["clips_per_s"] / ours["clips_per_s"])


def test_transport() -> None:
    measured = measure("transport", "demo", 1, quick=True)
    medians = {}
    for row in rows(measured, "transport"):
        assert row.timing is not None
        medians[row.side, row.axes["batch"]] = row.timing.median
    assert medians.keys() == {(protocol, batch) for protocol in PROTOCOLS for batch in (1, 8)}
    assert medians["shm", 8] < min(medians["grpc", 8], medians["http", 8])
    for protocol in PROTOCOLS:
        values = measured.row("server", "our clients", protocol=protocol, concurrency=4).values
        cpu_s = sum(values[f"cpu_s_{who}"] for who in ("bench", "tritonserver", "models"))
        assert 0 < values["clips_per_s"] * cpu_s < 2 * len(os.sched_getaffinity(0))


def test_a_server_that_runs_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "QUICK_CONCURRENCY", (2,))
    artifacts = toy_graphs.write(get_config("demo"), tmp_path / "toy")
    with serving(artifacts, tmp_path) as running:
        where = addresses(running)
        measured = measure("server", "demo", 1, quick=True, addresses=where)
        for protocol in where:
            with pytest.raises(UserError, match="the server serves demo, full, the clips are of full"):
                measure("server", "full", 1, quick=True, addresses={protocol: where[protocol]})
    with pytest.raises(UserError, match="does not answer over HTTP"):
        measure("server", "demo", 1, quick=True, addresses={"http": where["http"]})
    assert {(row.what, row.side) for row in measured.rows} == {
        *(("whole", protocol) for protocol in PROTOCOLS),
        ("server", "our clients"),
        ("server", "perf_analyzer"),
    }
    assert measured.settings["server"] == ", ".join(f"{protocol}://{where[protocol]}" for protocol in PROTOCOLS)
    assert "engine" not in measured.settings


def test_growth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "STEPS", (1, 12))
    monkeypatch.setattr(growth, "BATCHES", {"demo": (1, 4)})
    monkeypatch.setattr(growth, "MINUTES", (1,))
    monkeypatch.setattr(growth, "STRIDE", 40)
    monkeypatch.setattr(growth, "MINUTE_S", 4)
    monkeypatch.setattr(growth, "STREAMS", (1,))
    measured = measure("growth", "demo", 1, quick=True)
    one, four = rows(measured, "growth over batch")
    assert 1e8 < one.values["peak_bytes"] < four.values["peak_bytes"] < 2e9
    (film,) = rows(measured, "growth over film")
    assert film.values["maps"] == 3  # 120 frames
    assert film.values["maps_per_s"] == pytest.approx(3 / film.values["wall_s"])
    assert 1e8 < film.values["peak_bytes"] < 1.5e9
    (stream,) = rows(measured, "growth over streams")
    assert 0 < stream.values["maps_per_s"] <= 6
    assert stream.values["memory_bytes"] > 1e8


def test_a_film_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "MINUTE_S", 4)
    growth.render_minute(tmp_path / "minute.mp4")
    growth.repeat(tmp_path / "minute.mp4", tmp_path / "two.mp4", 2)
    with av.open(tmp_path / "two.mp4") as film:
        times = [float(frame.time) for frame in film.decode(video=0) if frame.time is not None]
    assert len(times) == 2 * 4 * growth.FPS
    assert np.diff(times).min() > 0
    assert times[-1] == pytest.approx(8, abs=0.2)


def test_peaks_are_of_processes_without_pytorch() -> None:
    said = "import sys; import bench.child; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", said], check=False).returncode == 0


def test_work_that_fails_says_why() -> None:
    with pytest.raises(UserError, match=r"command 1 predict no_film .* failed .*no_film does not exist"):
        child.run("command", "1", "predict", "no_film", "--maps", "maps.npz")


@pytest.mark.usefixtures("one_sampler")
def test_waterfall(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waterfall, "BARS", {k: v for k, v in waterfall.BARS.items() if "folded" not in k})
    measured = measure("waterfall", "demo", 1, quick=True)
    bars = rows(measured, "waterfall")
    assert [row.side for row in bars] == list(waterfall.BARS.values())
    assert bars[0].timing is not None
    assert bars[1].timing is not None
    assert bars[1].values == timing.with_ends("gain", timing.ratio_in_run(bars[0].timing, bars[1].timing))


def test_parity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "SIDES", ("openvino",))
    monkeypatch.setattr(parity, "SCENES", 2)
    monkeypatch.setattr(parity, "SECONDS", 1.5)
    measured = measure("parity", "demo", 1, quick=True)
    assert {row.axes["graph"] for row in rows(measured, "parity")} == {
        "visual_encoder",
        "audio_encoder",
        "fusion",
        "denoiser",
    }
    for row in rows(measured, "parity"):
        assert 0 <= row.values["mean_difference"] <= row.values["largest_difference"] < 1e-4
    assert any(row.values["mean_difference"] > 0 for row in rows(measured, "parity"))
    assert [row.axes["steps"] for row in rows(measured, "parity of maps")] == list(range(1, 13))
    assert all(row.values["cc"] > 0.9999 for row in rows(measured, "parity of maps"))
    log_mel = {(row.side, row.axes["sound"]): row.values["largest_difference"] for row in rows(measured, "log-mel")}
    assert log_mel["ONNX Runtime", "noise"] < 1e-4
    assert log_mel["ONNX Runtime", "silence"] < 1e-6
    assert log_mel["torchaudio, float32", "noise"] < 1e-4
    metrics = {row.side: row.values for row in rows(measured, "metrics")}
    assert metrics.keys() == {"eager", "onnxruntime", "openvino"}
    assert metrics["eager"]["cc"] > 0.3  # it sees something
    assert metrics["openvino"]["largest_difference"] < 5e-4


def test_a_metric_that_is_nan_is_a_difference(context: sides.Context, monkeypatch: pytest.MonkeyPatch) -> None:
    means = iter([dict.fromkeys(parity.METRICS, 0.5), {**dict.fromkeys(parity.METRICS, 0.5), "auc_judd": math.nan}])
    monkeypatch.setattr("mubic_deploy.scenes.write.write_scenes", lambda *_: None)
    monkeypatch.setattr("mubic_deploy.training.layout.read_list", lambda *_: [])
    monkeypatch.setattr("mubic_deploy.training.clips.Clips", lambda *_, **__: None)
    monkeypatch.setattr(
        "mubic_deploy.training.evaluate.evaluate", lambda *_: SimpleNamespace(clips=1, means=lambda: next(means))
    )
    monkeypatch.setattr(parity.Pipeline, "open", lambda *_: SimpleNamespace(config=None))
    monkeypatch.setattr(parity, "installed_engines", lambda _: ["openvino"])
    found = results.Results("parity", {})
    parity._metrics(context, found)
    # the last of the metrics: Python's max would keep the 0 of the first
    assert math.isnan(found.row("metrics", "openvino").values["largest_difference"])


@pytest.mark.parametrize("name", [name for name in sides.SIDES if name != "onnxruntime"])
@pytest.mark.usefixtures("one_sampler")
def test_all_sides_compute_the_same_maps(context: sides.Context, name: str) -> None:
    loaded, left_out = sides.load([name, "onnxruntime"], context)
    assert left_out == {}
    clip = random_clip(context.config, 3)
    a, b = (side.predict(clip["VIDEO"], clip["AUDIO"], 5)[0] for side in loaded.values())
    np.testing.assert_allclose(a, b, atol=1e-4)


def test_encoders_run_at_each_step(context: sides.Context) -> None:
    pipeline = sides.on_cpu("onnxruntime", context)
    calls = []
    encode = pipeline.condition
    pipeline.condition = lambda arrays: calls.append(1) or encode(arrays)  # type: ignore[method-assign,func-returns-value]
    clip = context.clips[0]
    got, _ = sides.Reencoding(pipeline).predict(clip["VIDEO"], clip["AUDIO"], 1, 3)
    assert len(calls) == 3
    expected, _ = sides.on_cpu("onnxruntime", context).predict(clip["VIDEO"], clip["AUDIO"], 1, 3)
    np.testing.assert_array_equal(got, expected)


def test_a_side_that_cannot_be_had_is_named(context: sides.Context, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(context: sides.Context) -> None:
        raise UserError("OpenVINO cannot be used: pip install openvino")

    monkeypatch.setitem(sides.SIDES, "openvino", missing)
    loaded, left_out = sides.load(["onnxruntime", "openvino"], context)
    assert list(loaded) == ["onnxruntime"]
    assert left_out == {"openvino": "OpenVINO cannot be used: pip install openvino"}
    with pytest.raises(UserError, match="unknown side 'tpu'"):
        sides.load(["tpu"], context)


def test_a_compiler_that_is_missing_is_said_when_loading(
    context: sides.Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.compile itself says so at the first call only, in the midst of the timing."""

    def lazy(module: torch.nn.Module, **_: object) -> torch.nn.Module:
        module.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("InvalidCxxCompiler\nmore")))
        return module

    monkeypatch.setattr(torch, "compile", lazy)
    loaded, left_out = sides.load(["torch.compile"], context)
    assert loaded == {}
    why = "torch.compile cannot be used here (RuntimeError: InvalidCxxCompiler): is g++ installed?"
    assert left_out == {"torch.compile": why}


def test_live_streams_without_triton_are_left_out(context: sides.Context, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise UserError("nvidia-pytriton is missing")

    monkeypatch.setattr(growth, "serving", missing)
    monkeypatch.setattr(sides.Context, "artifacts", None)
    found = results.Results("growth", {})
    growth._streams(context, "openvino", 1.0, found)
    assert found.left_out == {"live streams": "nvidia-pytriton is missing"}


def test_all_goes_on_after_a_suite_that_cannot_be_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def some(suite: str, size: str, threads: int, quick: bool, addresses: object) -> results.Results:
        if suite == "server":
            raise UserError("nvidia-pytriton is missing")
        if suite == "batch":
            raise ZeroDivisionError("a bug")
        limits = {"gemm_float32": 1e11, "copy": 1e10}
        return results.Results(suite, {"size": size, "threads": threads, "quick": quick}, limits)

    monkeypatch.setattr(run, "measure", some)
    assert main(["run", "all", "--size", "demo", "--out", str(tmp_path)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "server was left out: nvidia-pytriton is missing" in said
    assert "ZeroDivisionError: a bug" in said
    last = said.split("mubic-deploy:")[-1]
    assert "server" in last
    assert "batch" in last
    assert {p.name for p in tmp_path.iterdir()} == {f"{s}_demo.json" for s in SUITES if s not in ("server", "batch")}
    assert main(["run", "server", "--size", "demo", "--out", str(tmp_path)]) == 2


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [
        ([], "results"),
        (["--quick"], "looks"),
        (["--threads", "1"], "looks"),
        (["--url", "127.0.0.1:9"], "looks"),
        (["--quick", "--out", "mine"], "mine"),
    ],
)
def test_a_look_replaces_no_results(
    arguments: list[str], folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = {"gemm_float32": 1e11, "copy": 1e10}
    settings = {"size": "full", "threads": 1}
    monkeypatch.setattr(run, "measure", lambda suite, *_: results.Results(suite, settings, limits))
    monkeypatch.setattr(run, "client", lambda *_: Mock())
    monkeypatch.setattr(run, "FOLDER", tmp_path / "results")
    monkeypatch.setattr(run, "LOOKS", tmp_path / "looks")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(cpu, "cores", lambda: 2)
    monkeypatch.chdir(tmp_path)
    assert main(["run", "server", *arguments]) == 0
    assert [p.relative_to(tmp_path) for p in tmp_path.rglob("*.json")] == [Path(folder) / "server_full.json"]


def test_wrong_input_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for arguments, said in (
        (["run", "engine"], "invalid choice: 'engine'"),
        (["run", "steps", "--threads", "99"], "99 threads are out of range"),
        (["run", "steps", "--url", "127.0.0.1:9"], "--url is for the suite server"),
        (["run", "server", "--url", "localhost"], "--url: localhost is no address of a server: use HOST:PORT, as 127"),
        (["run", "server", "--url", "a:1", "--http-url", "http://a:2"], "--http-url: http://a:2 is no address"),
        (["run", "server", "--url", "127.0.0.1:70000"], "127.0.0.1:70000 is no address"),
        (["compare", str(tmp_path / "a"), str(tmp_path / "b")], "does not exist"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_server_is_asked_before_the_machine_is_measured(
    toy_server: TritonServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(run, "measure", lambda *_: pytest.fail("measured"))
    good = ["run", "server", "--out", str(tmp_path), "--url", toy_server.url]
    for arguments, said in (
        ([*good[:-1], "127.0.0.1:9"], "no Triton server answers at 127.0.0.1:9"),
        ([*good, "--http-url", "127.0.0.1:9"], "127.0.0.1:9 does not answer over HTTP"),
        ([*good, "--http-url", toy_server.url], f"{toy_server.url} does not answer over HTTP"),  # gRPC's port
        ([*good, "--http-url", f"127.0.0.1:{toy_server.metrics_port}"], "does not answer over HTTP"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
    with pytest.raises(pytest.fail.Exception, match="measured"):
        main([*good, "--http-url", f"127.0.0.1:{toy_server.http_port}"])
