"""bench/gpu.py without a GPU: every section that a CPU can run does, the others are named."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from half_fixtures import TINY

from bench import gpu, groups, machine, results, stages, timing
from mubic_deploy.errors import UserError
from mubic_deploy.model.mubic import random_model
from mubic_deploy.pipeline import Pipeline

RULE = timing.Rule(repeats=5, seconds=0.5, short_s=0.0, warm_up_s=0.2)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> results.Results:
    out = tmp_path_factory.mktemp("gpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "BATCHES", (1, 3))
        patch.setattr(gpu.machine, "GEMM_SHAPES", {"cpu": ((256, 128, 64),)})
        patch.setattr(gpu.machine, "COPY_BYTES", {"cpu": 1 << 20})
        patch.setattr(gpu, "PROFILED", 1)
        patch.setattr(gpu, "CLIPS", 2)
        patch.setattr(timing, "AT_LEAST", 2)
        # FP16 on a CPU: many threads on busy cores wait for each other longer than they work
        with machine.torch_threads(1):
            gpu.measure(TINY, "cpu", 60, RULE, out, ["torch.compile", "AOTInductor"])
    assert [p.name for p in out.iterdir()] == ["gpu_tiny_cpu.json"]
    return results.read(out / "gpu_tiny_cpu.json")


def test_all_that_needs_no_gpu_is_measured(measured: results.Results) -> None:
    what = {row.what for row in measured.rows}
    assert what == {"whole", "parity", "waterfall", "batch", "visual_encoder", "audio_encoder", "fusion", "denoiser"}
    sides = [row.side for row in measured.rows if row.what == "waterfall"]
    assert sides == [name for name, s in stages.WATERFALL.items() if not (s.graphs or s.one)]
    assert [row.axes["batch"] for row in measured.rows if row.what == "batch"] == [1, 3]
    assert {row.timing is None for row in measured.rows if row.what != "parity"} == {False}
    assert measured.limits.keys() == {"gemm_float32", "copy"}


def test_what_was_left_out_says_why(measured: results.Results) -> None:
    assert measured.left_out.keys() == {"TensorRT", "ONNX Runtime CUDA", "torch.compile", "AOTInductor"}
    assert "TensorRT" in measured.left_out["TensorRT"]
    assert measured.left_out["torch.compile"] == "as was asked for (--skip)"


def test_the_stages_compute_the_same_maps(measured: results.Results) -> None:
    parity = {row.side: row.values for row in measured.rows if row.what == "parity"}
    assert parity.keys() >= {*stages.COMPETITORS, "channels_last", "eager FP32, torchvision's attention"}
    for side, values in parity.items():
        assert values["largest_difference"] < 0.02, side
    assert parity["eager FP32"]["largest_difference"] == 0
    assert parity["positions folded into the product"]["largest_difference"] == 0
    assert parity["eager FP16"]["largest_difference"] > 0  # or it would be FP32 under another name
    assert 0 < parity["eager FP32, torchvision's attention"]["largest_difference"] < 1e-5


def test_gains_are_of_the_bar_before(measured: results.Results) -> None:
    rows = [row for row in measured.rows if row.what == "waterfall"]
    for before, row in itertools.pairwise(rows):
        assert before.timing is not None
        assert row.timing is not None
        assert row.values["gain"] == pytest.approx(before.timing.median / row.timing.median, rel=1e-4)


def test_the_reference_is_in_fp32_whatever_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "CLIPS", 1)
    run = gpu.Run(TINY, "cpu", 1.0, RULE, tmp_path)
    run.compare("eager FP16", stages.build(stages.HALF, TINY, "cpu"))
    assert 0 < run.results.row("parity", "eager FP16").values["largest_difference"] < 0.02


def test_graphs_say_what_they_move(measured: results.Results) -> None:
    """Weights in FP16, two bytes each, and inputs and outputs: enough for a roofline."""
    weights = sum(p.numel() for p in random_model(TINY).graph("denoiser").parameters())
    moved = measured.row("denoiser", "PyTorch FP16, optimised").values["bytes"]
    assert 2 * weights < moved < 2.5 * weights + 1e6
    measured.limits["gemm_float16"] = 1e12
    assert len(groups.reached(measured)) == 4


def test_kernels_are_listed_by_share(measured: results.Results) -> None:
    for name in ("kernels, optimised", "kernels, eager FP16"):
        shares = [kernel["share"] for kernel in measured.notes[name]]
        assert shares == sorted(shares, reverse=True)
        assert 0.5 < sum(shares) <= 1


def test_the_file_is_written_after_each_section(tmp_path: Path) -> None:
    (tmp_path / "gpu_tiny_cpu.json").write_text("of a run that was finished")
    run = gpu.Run(TINY, "cpu", 1.0, RULE, tmp_path)

    def fails() -> None:
        raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be ...")

    run.section("breaks", 1, fails)
    run.section("too long", 1000, fails)
    left_out = json.loads((tmp_path / "gpu_tiny_cpu.json.unfinished").read_text())["left_out"]
    assert left_out == {"breaks": "RuntimeError: CUDA error: out of memory", "too long": "1000 s were not left"}
    assert (tmp_path / "gpu_tiny_cpu.json").read_text() == "of a run that was finished"
    run.finish()
    assert [p.name for p in tmp_path.iterdir()] == ["gpu_tiny_cpu.json"]
    assert results.read(tmp_path / "gpu_tiny_cpu.json").left_out == left_out


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
    monkeypatch.setattr(gpu, "measure", lambda *_, out, **__: given.append(out))
    monkeypatch.setattr(gpu, "summary", lambda _: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("sys.argv", ["gpu.py", *arguments])
    gpu.main()
    assert given == [folder]


def test_whatever_fails_is_named_and_the_rest_goes_on(tmp_path: Path) -> None:
    run = gpu.Run(TINY, "cpu", 1.0, RULE, tmp_path)
    raised = {"bare": Exception(), "missing": ImportError("No module named 'x'"), "ours": UserError("no")}
    for name, error in raised.items():

        def fails(error: Exception = error) -> None:
            raise error

        run.section(name, 1, fails)
    assert run.results.left_out == {"bare": "Exception", "missing": "ImportError: No module named 'x'", "ours": "no"}


def test_nothing_is_exported_for_a_gpu_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.exported, "export", lambda *_, **__: pytest.fail("exported"))
    with pytest.raises(UserError, match="this ONNX Runtime has no CUDA"):
        gpu.Run(TINY, "cpu", 1.0, RULE, tmp_path).other("ONNX Runtime CUDA", "onnxruntime-cuda")


@pytest.mark.parametrize("name", stages.COMPILED)
def test_compiled_graphs_are_captured_by_us_alone(name: str) -> None:
    """Inductor's own CUDA graphs would free one graph's outputs at the call of the next."""
    stage = stages.COMPILED[name]
    assert stage.mode is not None
    assert not torch._inductor.list_mode_options()[stage.mode].get("triton.cudagraphs")
    pipeline = stages.build(stage, TINY, "cpu")
    assert isinstance(pipeline, Pipeline)
    for engine in pipeline.engines.values():
        graphed = engine.module  # type: ignore[attr-defined]
        assert isinstance(graphed, stages.Graphed)
        assert isinstance(graphed.module, torch._dynamo.OptimizedModule)
