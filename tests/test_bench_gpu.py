"""bench/gpu.py without a GPU: every section that a CPU can run does, the others are named."""

from __future__ import annotations

import gzip
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from half_fixtures import TINY

from bench import compare, goals, gpu, gpu_child, gpu_run, groups, machine, results, stages, timing
from mubic_deploy import graphs
from mubic_deploy.cli import guarded
from mubic_deploy.config import Config
from mubic_deploy.engines import eager
from mubic_deploy.engines.lanes import Part
from mubic_deploy.engines.replay import Run
from mubic_deploy.model.mubic import random_model
from mubic_deploy.parity import random_clip
from mubic_deploy.pipeline import Pipeline

SMALL = replace(TINY, frames=8, height=32, width=48)  # FP16 is slow on a CPU
RULE = timing.Rule(repeats=2, seconds=0.2, short_s=0.0, warm_up_s=0.0, quick=True)
# what compiles takes minutes, and PyTorch's convolutions of many groups on a CPU are too many events to count quickly
SKIPPED = (*list(stages.COMPILED)[:2], gpu_child.AOTINDUCTOR, "kernels")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """FP16 on a CPU: many threads on busy cores wait for each other longer than they work."""
    with machine.torch_threads(1):
        yield


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> results.Results:
    out, traces = tmp_path_factory.mktemp("gpu"), tmp_path_factory.mktemp("traces") / "new"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_run, "BATCHES", (1, 3))
        patch.setattr(machine, "GEMM_SHAPES", {"cpu": ((256, 128, 64),)})
        patch.setattr(machine, "COPY_BYTES", {"cpu": 1 << 20})
        patch.setattr(gpu_run, "PROFILED", 1)
        patch.setattr(gpu_run, "CLIPS", 2)
        patch.setattr(timing, "AT_LEAST", 2)
        name, _ = gpu.measure(SMALL, "cpu", 60, RULE, out, SKIPPED, traces=traces)
    assert [p.name for p in out.iterdir()] == [name] == ["gpu_tiny_cpu.json"]
    (trace,) = traces.iterdir()
    assert trace.name == "eager_fp16.json.gz"
    assert json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    return results.read(out / name)


def script(out: Path, minutes: float = 1.0) -> gpu.Script:
    run = gpu.Run(SMALL, "cpu", RULE, out / "gpu_tiny_cpu.json.unfinished")
    return gpu.Script(run, out / "gpu_tiny_cpu.json", minutes)


def test_all_that_needs_no_gpu_is_measured(measured: results.Results) -> None:
    what = {row.what for row in measured.rows if not row.what.startswith("parity")}
    assert what - {gpu_run.ON_GPU} == {
        "whole",
        "waterfall",
        "steps",
        "alone",
        "without",
        "batch",
        *(f"{g}_encoder" for g in ("visual", "audio")),
    } | {
        "fusion",
        "denoiser",
    }
    sides = [row.side for row in measured.rows if row.what == "waterfall"]
    assert sides == [name for name, s in stages.WATERFALL.items() if not (s.graphs or s.one)]
    assert [row.side for row in measured.rows if row.what == "whole"] == [*stages.COMPETITORS, gpu.OPTIMISED]
    assert [row.side for row in measured.rows if row.what == "alone"] == list(stages.ALONE)
    assert [row.side for row in measured.rows if row.what == "without"] == list(stages.WITHOUT)
    assert [row.axes["batch"] for row in measured.rows if row.what == "batch"] == [1, 3]
    assert {row.timing is None for row in measured.rows if not row.what.startswith("parity")} == {False}
    assert measured.limits.keys() == {"gemm_float32", "copy"}


def test_what_was_left_out_says_why(measured: results.Results) -> None:
    assert measured.left_out.keys() == {"TensorRT", "ONNX Runtime CUDA", *SKIPPED}
    assert "TensorRT" in measured.left_out["TensorRT"]
    assert "this ONNX Runtime has no CUDA" in measured.left_out["ONNX Runtime CUDA"]
    assert measured.left_out["AOTInductor"] == "as was asked for (--skip)"


def test_the_stages_compute_the_same_maps(measured: results.Results) -> None:
    parity = {(row.what, row.side): row.values for row in measured.rows if row.what.startswith("parity")}
    sides = {
        "parity": [*stages.COMPETITORS, gpu.OPTIMISED],
        "parity, alone": stages.ALONE,
        "parity, without": stages.WITHOUT,
    }
    assert parity.keys() >= {(what, side) for what, names in sides.items() for side in names}
    for side, values in parity.items():
        assert values["largest_difference"] < 0.02, side
    assert parity["parity", "eager FP32"]["largest_difference"] == 0
    assert parity["parity, waterfall", "positions folded into the product"]["largest_difference"] == 0
    for name in stages.COMPETITORS:
        if "FP16" in name:  # or it would be FP32 under another name
            assert parity["parity", name]["largest_difference"] > 0
    assert 0 < parity["parity, waterfall", "eager FP32, torchvision's attention"]["largest_difference"] < 1e-5
    assert 0 < parity["parity, alone", "BatchNorm folded, FP32"]["largest_difference"] < 1e-5
    tables = [parity["parity, without", side] for side in ("FP16, CUDA graphs", "without position tables kept")]
    assert tables[0] == tables[1]


def test_gains_are_of_the_bar_before(measured: results.Results) -> None:
    rows = [row for row in measured.rows if row.what == "waterfall"]
    for before, row in itertools.pairwise(rows):
        assert before.timing is not None
        assert row.timing is not None
        expected, *_ = timing.ratio_in_run(before.timing, row.timing)
        assert row.values["gain"] == pytest.approx(expected, rel=1e-4)


def test_gains_have_intervals(tmp_path: Path) -> None:
    """Of calls that were made in turn by their pairs, else of the medians; the row that a gain is over has none."""
    run, rng = script(tmp_path).run, np.random.default_rng(0)
    pace = np.repeat([1.0, 1.5], 20)
    first, now = (timing.Timing(tuple(s * pace * rng.normal(1, 0.005, 40)), measurement=1) for s in (1.0, 0.8))
    run.results.add("alone", {"a": first, "b": now})
    run._gain("alone", "b", "a", {"a": first, "b": now})
    values = run.results.row("alone", "b").values
    assert (values["gain_low"], values["gain_high"]) == pytest.approx((1.25, 1.25), rel=0.01)
    assert values["gain_low"] < values["gain"] < values["gain_high"]
    run.results.add("waterfall", {"a": first})
    run.results.add("whole", {"b": replace(now, measurement=2)})
    run.compiled_waterfall({"compiled": "b"})
    values = run.results.row("waterfall", "compiled").values
    assert values["gain_high"] - values["gain_low"] > 0.3


def test_a_technique_alone_gains_over_the_plain_one_of_its_precision(measured: results.Results) -> None:
    for what, side, over in (
        ("alone", "pad_heads", "FP16, CUDA graphs"),
        ("alone", "BatchNorm folded, FP32", "FP32, CUDA graphs"),
        ("without", "without positions folded", "FP16, CUDA graphs"),
    ):
        row, first = measured.row(what, side), measured.row(what, over)
        assert row.timing is not None
        assert first.timing is not None
        assert row.values["gain"] == pytest.approx(timing.ratio_in_run(first.timing, row.timing)[0], rel=1e-4)
    assert "gain" not in measured.row("alone", "FP32, CUDA graphs").values


def test_the_gpus_own_time_is_kept_call_by_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_run, "BATCHES", (1, 2))
    run = script(tmp_path).run
    run.results.limits = {"gemm_float16": 1e12}
    run.batches("a side", stages.build(stages.Stage(sampler=True), SMALL, "cpu"))
    for batch in (1, 2):
        alone = run.results.row(gpu_run.ON_GPU, "a side", batch=batch).timing
        assert alone is not None
        assert len(alone.samples) >= timing.AT_LEAST
        assert run.results.row("batch", "a side", batch=batch).values["on_gpu_s"] == alone.median


def test_results_say_where_clips_lie(
    measured: results.Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert measured.settings["memory"] == "plain"
    monkeypatch.setattr(gpu_run.Run, "clip", lambda *_: {})
    pinned = gpu.Run(SMALL, "cuda", RULE, tmp_path / "x").results
    assert pinned.settings["memory"] == "pinned"
    older = results.Results("gpu", {name: v for name, v in pinned.settings.items() if name != "memory"})
    assert "the setting memory differs: None and pinned" in compare.warnings(older, pinned)


def test_a_step_more(measured: results.Results) -> None:
    eight, four = (measured.row("steps", gpu.OPTIMISED, steps=n) for n in (8, 4))
    assert eight.timing is not None
    assert four.timing is not None
    assert eight.values["step_s"] == pytest.approx((eight.timing.median - four.timing.median) / 4, rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "PyTorch finds no NVIDIA GPU here"),
        (["--device", "cpu", "--skip", "kernel"], "--skip 'kernel' is no section of this run: choose among limits, "),
        (["--device", "cpu", "--minutes", "few"], "argument --minutes: few is not a number"),
        (["--device", "cpu", "--minutes", "nan"], "argument --minutes: nan is no time: use minutes above 0"),
        (["--device", "cpu", "--skp", "kernels"], "unrecognized arguments: --skp kernels"),
        (
            ["--device", "cpu", "--traces", __file__],
            f"{__file__} cannot be made (File exists): choose another --traces",
        ),
    ],
)
def test_wrong_input_is_one_line(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu.py", "--out", str(tmp_path), *arguments])
    assert guarded(gpu.main) == 2
    out, said = capsys.readouterr()
    assert (out, said.count("\n"), list(tmp_path.iterdir())) == ("", 1, [])
    assert says in said


def test_the_reference_is_in_fp32_whatever_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_run, "CLIPS", 1)
    run = script(tmp_path).run
    run.compare("whole", "half", stages.build(stages.HALF, SMALL, "cpu"))
    assert 0 < run.results.row("parity", "half").values["largest_difference"] < 0.02


def test_a_stage_that_fails_does_not_take_the_others_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_run, "CLIPS", 1)
    run = script(tmp_path).run
    broken = stages.Stage(optimisations=("no such",))
    run.stages("waterfall", {"a": stages.REFERENCE, "b": broken, "c": stages.REFERENCE}, RULE)
    assert [row.side for row in run.results.rows if row.what == "waterfall"] == ["a", "c"]
    assert "no such" in run.results.left_out["b"]
    assert "gain" not in run.results.row("waterfall", "c").values


def test_stages_leave_the_weights_that_they_share_alone() -> None:
    shared = stages.weights(SMALL, True, "cpu")
    before = {name: value.clone() for name, value in shared.state_dict().items()}
    everything = stages.Stage(
        precision="float16", optimisations=("pad_heads", "split_depthwise", "channels_last"), tables=False
    )
    for stage in (everything, stages.Stage(norms=True)):
        stages.build(stage, SMALL, "cpu")
    assert stages.weights(SMALL, True, "cpu") is shared
    after = shared.state_dict()
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert after[name].dtype == value.dtype
        assert torch.equal(after[name], value)


@pytest.mark.parametrize(("tf32", "benchmark"), [(True, False), (False, True), (False, False)])
def test_switches_hold_in_a_stages_calls_alone(tf32: bool, benchmark: bool) -> None:
    seen = []

    class Looks(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            seen.append((torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark))
            return (torch.arange(2), x)

    before = (torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark)
    made, _ = stages.Switched(Looks(), stages.Stage(tf32=tf32, benchmark=benchmark), "meta")(torch.zeros(1))
    assert seen == [(tf32, benchmark)]
    assert made.device.type == "meta"  # what a CUDA graph would refuse to copy
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark) == before


def test_the_gpus_own_time_is_of_the_same_maps() -> None:
    clip = random_clip(SMALL, 0, 2)
    sampler = stages.build(stages.Stage(sampler=True), SMALL, "cpu")
    call = gpu_run.resident(sampler, clip, "cpu")
    assert call is not None
    expected, _ = sampler.predict(clip["VIDEO"], clip["AUDIO"], np.arange(2))
    np.testing.assert_allclose(call(0)["SALIENCY"], expected, atol=1e-6)
    assert gpu_run.resident(stages.build(stages.REFERENCE, SMALL, "cpu"), clip, "cpu") is None


@pytest.mark.parametrize(("call_s", "calls"), [(0.005, 1000), (0.008, 625), (0.025, 200), (1.0, 5)])
def test_an_engine_is_called_often_enough_for_its_p99(call_s: float, calls: int, tmp_path: Path) -> None:
    run = gpu.Run(SMALL, "cpu", gpu_run.RULE, tmp_path / "x")
    assert run.tail.calls(call_s) == calls
    assert gpu.Run(SMALL, "cpu", RULE, tmp_path / "x").tail == RULE  # a look stays one


def test_parts_are_of_a_real_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each at both batch sizes, given what those before it made."""
    monkeypatch.setattr(gpu_run, "BATCHES", (1, 2))
    model, run = random_model(SMALL).eval(), script(tmp_path).run
    given: dict[str, list[torch.Tensor]] = {}

    class Engine:
        def __init__(self, name: str, signatures: Sequence[graphs.Signature]) -> None:
            modules = zip(signatures, model.parts(name, 4), strict=True)
            self.parts = [Part(signature, self.noted(signature.name, module)) for signature, module in modules]

        @staticmethod
        def noted(name: str, module: torch.nn.Module) -> Run:
            def run(*inputs: torch.Tensor) -> Sequence[torch.Tensor]:
                given[name] = list(inputs)
                return module(*inputs)

            return run

    held = graphs.parts(SMALL, sampler=True)
    run.parts("packages", {name: Engine(name, signatures) for name, signatures in held.items()})
    names = [signature.name for signatures in held.values() for signature in signatures]
    rows = [(row.axes["batch"], row.side) for row in run.results.rows if row.what == gpu_run.PARTS]
    assert rows == [(batch, name) for batch in (1, 2) for name in names]
    assert not run.results.left_out
    clip = run.clip(0, 2)
    cond = Pipeline(SMALL, eager.load_engines(model)).condition(clip)
    for signature in (held["denoiser"][0], held["sampler"][0]):
        for tensor, x in zip(signature.inputs, given[signature.name], strict=True):
            tensor.check(x.numpy())
            if tensor.name in cond:
                torch.testing.assert_close(x, torch.from_numpy(cond[tensor.name]))


def test_parts_of_one_clip_are_kept_where_those_of_the_largest_batch_are_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(config: Config, clip: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        if len(clip["VIDEO"]) > 1:
            raise KeyboardInterrupt
        return chain(config, clip)

    chain, run = gpu_run.chain, script(tmp_path).run
    monkeypatch.setattr(gpu_run, "BATCHES", (1, 2))
    monkeypatch.setattr(gpu_run, "chain", cut)
    part = Part(graphs.signatures(SMALL)["audio_encoder"], random_model(SMALL).audio_encoder)
    with pytest.raises(KeyboardInterrupt):
        run.parts("packages", {"audio_encoder": SimpleNamespace(parts=[part])})
    assert [row.side for row in results.read(run.file).rows] == ["audio_encoder"]


def test_the_gpu_is_asleep_until_all_is_enqueued(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the time that the host takes to launch is in the figure."""
    did = list[str]()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            did.append("record")

        def elapsed_time(self, _: Event) -> float:
            return 2.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    for name in ("synchronize", "_sleep"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: did.append(name))
    assert timing.cuda_events(lambda: did.append("call")) == pytest.approx(0.0025)
    assert did == ["synchronize", "_sleep", "record", "call", "record", "synchronize"]


def test_graphs_say_what_they_move(measured: results.Results) -> None:
    """Weights in FP16, two bytes each, and inputs and outputs: enough for a roofline."""
    weights = sum(p.numel() for p in random_model(SMALL).graph("denoiser").parameters())
    moved = measured.row("denoiser", "PyTorch FP16, optimised").values["bytes"]
    assert 2 * weights < moved < 2.5 * weights + 1e6
    measured.limits["gemm_float16"] = 1e12
    assert len(groups.reached(measured)) == 4


def test_kernels_are_listed_by_share(measured: results.Results) -> None:
    shares = [kernel["share"] for kernel in measured.notes["kernels, eager FP16"]]
    assert shares == sorted(shares, reverse=True)
    assert 0.5 < sum(shares) <= 1


def test_a_look_at_a_cpu_reaches_no_goal(measured: results.Results) -> None:
    assert goals.outcomes({"gpu_full_cpu.json": measured}) == []


def test_what_was_compiled_ends_the_waterfall(tmp_path: Path) -> None:
    run = script(tmp_path).run
    for what, side, seconds in (("waterfall", "last", 0.016), ("whole", "compiled", 0.008), ("whole", "ours", 0.002)):
        run.results.add(what, {side: timing.Timing((seconds,) * 5)}, batch=1)
    run.compiled_waterfall({"a compiler": "compiled", "another": "was left out", "tokens": "ours"})
    found = [(row.side, row.values.get("gain")) for row in run.results.rows if row.what == "waterfall"]
    assert found == [("last", None), ("a compiler", 2.0), ("tokens", 4.0)]
    assert set(gpu.COMPILED_WATERFALL.values()) <= {*stages.COMPILED, gpu_child.AOTINDUCTOR}


def test_goals_name_sides_that_are_measured() -> None:
    assert {*goals.EAGER, *goals.EAGER_FP16} < stages.COMPETITORS.keys()
    assert set(goals.MAX_AUTOTUNE) < stages.COMPILED.keys()
    assert set(goals.OURS) == {gpu_child.AOTINDUCTOR, gpu_child.TENSORRT, gpu_child.ONNXRUNTIME, gpu.OPTIMISED}
    assert goals.FOR_BATCHES == gpu_child.TENSORRT_BATCHES


def test_all_that_pytorch_alone_can_run_is_planned_under_8_minutes(tmp_path: Path) -> None:
    plan = gpu.sections(script(tmp_path).run)
    assert sum(s.seconds for s in plan if not s.missing) <= 480
    assert {s.name for s in plan if s.measure is None} <= gpu_child.SECTIONS.keys()


def test_the_profiler_comes_after_all_that_is_timed_in_its_process(tmp_path: Path) -> None:
    """It makes launches slower for as long as the process lives."""
    names = [s.name for s in gpu.sections(script(tmp_path).run) if s.measure is not None]
    assert names[-2:] == ["kernels", "kernels of eager FP16"]


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [
        (["--device", "cpu"], gpu.LOOKS),
        (["--skip", "batches"], gpu.LOOKS),
        ([], gpu.FOLDER),
        (["--skip", "batches", "--out", "mine"], Path("mine")),
    ],
)
def test_a_look_replaces_no_results(arguments: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = list[Path]()

    def measure(*_: object, out: Path, **__: object) -> tuple[str, None]:
        given.append(out)
        return "", None

    monkeypatch.setattr(gpu, "measure", measure)
    monkeypatch.setattr(gpu, "summary", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("sys.argv", ["gpu.py", *arguments])
    gpu.main()
    assert given == [folder]


def test_the_summary_says_goals_and_what_is_missing(
    measured: results.Results, capsys: pytest.CaptureFixture[str]
) -> None:
    timed = timing.Timing((0.003,) * 5)
    found = results.Results("gpu", {"size": "full"}, rows=[results.Row("whole", "AOTInductor", {"batch": 1}, timed)])
    found.left_out["TensorRT"] = "pip install 'mubic-deploy[tensorrt]'"
    gpu.summary("gpu_full_nvidia_h200.json", found)
    said = capsys.readouterr().out
    assert "3 ms" in said
    assert "at most 4 ms" in said
    assert goals.NOT_MEASURED in said
    assert "left out: TensorRT: pip install 'mubic-deploy[tensorrt]'" in said
    gpu.summary("gpu_tiny_cpu.json", measured)


@pytest.mark.parametrize("name", stages.COMPILED)
def test_compiled_graphs_are_captured_by_us_alone(name: str) -> None:
    """Inductor's own CUDA graphs would free one graph's outputs at the call of the next."""
    stage = stages.COMPILED[name]
    assert stage.search is not None
    assert not stages.SEARCHES[stage.search].get("triton.cudagraphs")
    pipeline = stages.build(stage, SMALL, "cpu")
    assert isinstance(pipeline, Pipeline)
    for engine in pipeline.engines.values():
        graphed = engine.module  # type: ignore[attr-defined]
        assert isinstance(graphed, stages.Graphed)
        assert isinstance(graphed.module, torch._dynamo.OptimizedModule)


def test_the_whole_search_is_max_autotunes() -> None:
    mode = torch._inductor.list_mode_options()["max-autotune-no-cudagraphs"]
    assert mode == stages.SEARCHES[stages.UNLIMITED]
    assert os.environ.get("TORCHINDUCTOR_MAX_AUTOTUNE_GEMM_BACKENDS") is None
