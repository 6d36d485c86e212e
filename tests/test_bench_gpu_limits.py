"""bench/gpu.py's time: what is cut, what fails, and what is left of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from half_fixtures import TINY

from bench import gpu, gpu_child, limited, results, timing
from mubic_deploy.artifacts import Artifacts
from mubic_deploy.engines import eager
from mubic_deploy.engines.replay import Replayed
from mubic_deploy.errors import UserError
from mubic_deploy.model.mubic import random_model
from mubic_deploy.pipeline import Pipeline

pytest_plugins = ("half_fixtures", "tensorrt_fixtures")
SMALL = replace(TINY, frames=8, height=32, width=48)  # FP16 is slow on a CPU
RULE = timing.Rule(repeats=2, seconds=0.2, short_s=0.0, warm_up_s=0.0, quick=True)


def script(out: Path, minutes: float = 1.0) -> gpu.Script:
    run = gpu.Run(SMALL, "cpu", RULE, out / "gpu_tiny_cpu.json.unfinished")
    return gpu.Script(run, out / "gpu_tiny_cpu.json", minutes)


def test_the_file_is_written_after_each_section(tmp_path: Path) -> None:
    (tmp_path / "gpu_tiny_cpu.json").write_text("of a run that was finished")
    whole = script(tmp_path)

    def fails() -> None:
        raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be ...")

    whole.section(gpu.Section("breaks", 1, fails), tmp_path)
    whole.section(gpu.Section("too long", 1000, fails), tmp_path)
    left_out = json.loads((tmp_path / "gpu_tiny_cpu.json.unfinished").read_text())["left_out"]
    assert left_out == {"breaks": "RuntimeError: CUDA error: out of memory", "too long": "1000 s were not left"}
    assert (tmp_path / "gpu_tiny_cpu.json").read_text() == "of a run that was finished"
    whole.measure([])
    assert [p.name for p in tmp_path.iterdir()] == ["gpu_tiny_cpu.json"]
    found = results.read(tmp_path / "gpu_tiny_cpu.json")
    assert found.left_out == left_out
    assert any("in fails" in line for line in found.notes["traceback, breaks"])


def gone(pid: int) -> bool:
    """Whether a process has ended, reaped or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


HANGS = """
import pathlib, subprocess, sys, time
from bench import gpu_child, results
section, folder = sys.argv[1], pathlib.Path(sys.argv[2])
run = gpu_child.read_settings(folder, section)
run.results.rows.append(results.Row("whole", "what was done", {}, None, {"batch": 1}))
run.results.left_out["half of it"] = "broke"
run.write()
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("compiling", child.pid, flush=True)
time.sleep(600)
"""


def test_a_section_that_hangs_is_cut_and_named_and_what_it_had_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_child, "PROCESS", (sys.executable, "-c", HANGS))
    whole = script(tmp_path)
    began = time.monotonic()
    monkeypatch.setattr(whole, "ends", began + 15)
    whole.section(gpu.Section("hangs", 12), tmp_path, later=600)
    assert 11 < time.monotonic() - began < 30
    left_out = whole.run.results.left_out
    assert left_out == {"half of it": "broke", "hangs": "cut after the 12 s that it was given"}
    assert [row.side for row in whole.run.results.rows] == ["what was done"]
    said = whole.run.results.notes["log, hangs"][-1].split()
    assert said[0] == "compiling"
    assert gone(int(said[1]))


def test_a_command_that_fails_says_why_and_leaves_nothing() -> None:
    leaves = "import subprocess, sys; print(subprocess.Popen(['sleep', '600']).pid); sys.exit('no memory')"
    with pytest.raises(limited.EndedError, match=r"ended with 1: no memory") as caught:
        limited.run([sys.executable, "-c", leaves], 60)
    assert gone(int(next(line for line in caught.value.said if line.isdigit())))
    limited.run([sys.executable, "-c", "pass"], 60)


def test_a_command_that_crashes_says_where() -> None:
    crashes = "import ctypes; from bench import gpu_child; gpu_child.say_where_it_crashes(); ctypes.string_at(0)"
    with pytest.raises(limited.EndedError, match=r"ended with SIGSEGV$") as caught:
        limited.run([sys.executable, "-c", crashes], 60)
    said = caught.value.said
    assert [i for i, line in enumerate(said) if line.startswith("SIGSEGV")] == [0]
    assert any("_ctypes" in line for line in said[1 : 1 + limited.TAIL])
    assert any("string_at" in line for line in said[1 + limited.TAIL // 2 :])


@pytest.mark.parametrize(
    ("left", "later", "limit"),
    [
        (500, 100, 395),  # the sections before it were quick
        (150, 100, 90),  # it gets what it was planned with
        (60, 100, 60),  # all that is left
        (40, 0, None),  # not worth a start
    ],
)
def test_what_a_process_is_given(
    left: float, later: float, limit: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, given = script(tmp_path), list[float]()
    monkeypatch.setattr(whole, "ends", time.monotonic() + left)
    monkeypatch.setattr(limited, "run", lambda _, limit_s: given.append(limit_s))
    whole.section(gpu.Section("AOTInductor", 90), tmp_path, later)
    assert given == ([] if limit is None else [pytest.approx(limit, abs=1)])
    assert whole.run.results.left_out == ({"AOTInductor": "45 s were not left"} if limit is None else {})


def test_what_two_processes_measured_was_not_measured_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though each counts its measurements from 1 on."""
    whole = script(tmp_path)

    def run(command: list[str], _limit_s: float) -> None:
        found = results.Results("gpu", {})
        for side, number in (("a", 1), ("b", 1), ("c", 2)):
            found.add("whole", {side: timing.Timing((0.1,) * 5, measurement=number)})
        found.write(gpu_child.results_file(tmp_path, command[3]))

    monkeypatch.setattr(limited, "run", run)
    for section in (gpu_child.AOTINDUCTOR, gpu_child.TENSORRT):
        whole.apart(section, tmp_path, 60)
    numbers = [row.timing.measurement for row in whole.run.results.rows if row.timing is not None]
    assert [numbers.index(number) for number in numbers] == [0, 0, 2, 3, 3, 5]


def test_a_section_in_a_process_of_its_own(tmp_path: Path) -> None:
    """What the child cannot do is named by it, in the results that it leaves."""
    whole = script(tmp_path)
    whole.section(gpu.Section(gpu_child.ONNXRUNTIME, 60), tmp_path)
    assert whole.run.results.left_out.keys() == {gpu_child.ONNXRUNTIME}
    assert "random:tiny" in whole.run.results.left_out[gpu_child.ONNXRUNTIME]


def test_an_engine_whose_packages_are_not_all_there_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("mubic_deploy.engines.cuda.libcuda", lambda: SimpleNamespace(cuInit=lambda _: 100))
        assert "there is no NVIDIA GPU to use" in gpu_child.missing(gpu_child.TENSORRT)
    monkeypatch.setattr("mubic_deploy.engines.cuda.require_gpu", lambda: None)
    monkeypatch.setitem(sys.modules, "tensorrt", ModuleType("tensorrt"))
    monkeypatch.setitem(sys.modules, "pycuda.driver", None)  # as where it is not installed
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, "mubic_deploy.engines.onnxruntime", raising=False)
    monkeypatch.delattr("mubic_deploy.engines.onnxruntime", raising=False)
    assert "pycuda cannot be used" in gpu_child.missing(gpu_child.TENSORRT)
    assert "ONNX Runtime is not installed" in gpu_child.missing(gpu_child.ONNXRUNTIME)


@pytest.mark.parametrize(("limit_s", "again"), [(1e6, True), (0.0, False)])
def test_tensorrt_gets_kernels_for_one_clip_and_for_the_largest_batch(
    limit_s: float,
    again: bool,
    trt: ModuleType,
    half_artifacts: Artifacts,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On the doubles: whether it is quicker, a GPU must say."""
    monkeypatch.setattr(gpu_child, "exported_graphs", lambda *_: half_artifacts)
    monkeypatch.setattr(gpu_child, "BATCHES", (1, 2))
    monkeypatch.setattr("bench.gpu_run.BATCHES", (1, 2))
    run = gpu.Run(TINY, "cpu", RULE, tmp_path / "results.json")
    gpu_child.tensorrt(run, tmp_path, limit_s)
    measured = [(row.side, row.axes) for row in run.results.rows if row.what == "batch"]
    sides = ["TensorRT"] + ["TensorRT for batches"] * again
    assert measured == [(side, {"batch": batch}) for side in sides for batch in (1, 2, 8)]  # 8: in parts
    assert [settings["shapes"]["VIDEO"][1][0] for settings in trt.built[::5]] == ([1, 2] if again else [1])
    assert (trt.built[-1]["cache"] == b"+" * 9) == again  # kernels that were timed before are not timed again
    assert [*run.results.left_out] == ([] if again else ["TensorRT for batches"])


def test_what_compiles_gets_the_optimisations_that_paid() -> None:
    def alone(**gains: float) -> list[str]:
        rows = [results.Row("alone", name, values={"gain": gain}) for name, gain in gains.items()]
        rows.append(results.Row("waterfall", "pad_heads", values={"gain": 0.5}))
        return gpu_child.paying(results.Results("gpu", {}, rows=rows))

    assert alone() == ["pad_heads", "split_depthwise"]
    assert alone(pad_heads=1.3, split_depthwise=0.9, channels_last=1.1) == ["pad_heads"]


PACKAGES = """
import os, pathlib, sys, time
part = sys.argv[2]
print("at", part, os.getpid(), flush=True)
pathlib.Path(sys.argv[1], part + ".json").write_text('{"files": ["a.so"], "reason": ""}')
time.sleep(600 if part == "sampler" else 0)
sys.exit(part == "fusion")
"""


def test_packages_are_compiled_meanwhile_and_the_samplers_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, packages_script = script(tmp_path).run, gpu_child.packages_script()
    monkeypatch.setattr(packages_script, "PROCESS", (sys.executable, "-c", PACKAGES))
    monkeypatch.setattr(gpu_child, "packages_script", lambda: packages_script)
    compiling = threading.Thread(target=gpu_child.compile_parts, args=(run, tmp_path))
    compiling.start()
    began = time.monotonic()
    failed = gpu_child.compiled_parts(run, tmp_path, 2)
    said = {part: lines[0].split()[:2] for part, lines in failed.items()}
    assert said == {"fusion": ["at", "fusion"], "sampler": ["at", "sampler"]}
    assert json.loads((tmp_path / "denoiser.ended").read_text()) == {"files": ["a.so"], "said": []}
    assert 2 <= time.monotonic() - began < 20
    os.kill(int(failed["sampler"][0].split()[2]), signal.SIGKILL)
    compiling.join(10)
    assert not compiling.is_alive()


def test_parts_that_cannot_even_begin_are_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, packages_script = script(tmp_path).run, gpu_child.packages_script()
    monkeypatch.setattr(packages_script, "PROCESS", (str(tmp_path / "no python"),))
    monkeypatch.setattr(gpu_child, "packages_script", lambda: packages_script)
    with pytest.raises(UserError, match="no process can be started"):
        gpu_child.compile_parts(run, tmp_path)
    failed = gpu_child.compiled_parts(run, tmp_path, 60)
    assert failed.keys() == set(gpu_child.part_names(run))
    assert all("no process can be started" in said[0] for said in failed.values())


def test_a_compiler_that_was_killed_is_not_waited_for(tmp_path: Path) -> None:
    """As where memory is short: it leaves nothing."""
    run = script(tmp_path).run
    with gpu_child.compiling(run, tmp_path):
        os.kill(int((tmp_path / gpu_child.COMPILER).read_text()), signal.SIGKILL)
        began = time.monotonic()
        failed = gpu_child.compiled_parts(run, tmp_path, 60)
    assert failed.keys() == set(gpu_child.part_names(run))
    assert time.monotonic() - began < 20


def test_nothing_is_compiled_after_the_last_section(tmp_path: Path) -> None:
    """By the real processes: the one that starts them all, and those of the parts, which import PyTorch first."""
    run, log = script(tmp_path).run, tmp_path / "fusion.log"
    with gpu_child.compiling(run, tmp_path):
        until = time.monotonic() + 60
        while not log.exists() and time.monotonic() < until:
            time.sleep(0.1)
    assert log.exists()
    said = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(tmp_path) not in said


def test_a_package_that_cannot_be_compiled_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = script(tmp_path).run
    monkeypatch.setattr(gpu_child, "compiled_parts", lambda *_: {"fusion": ["Error: no g++"]})
    with pytest.raises(UserError, match="fusion could not be compiled"):
        gpu_child.aotinductor(run, tmp_path, 60)
    compiled_by = run.results.notes.pop("compiler, AOTInductor")
    assert "g++" in compiled_by
    assert run.results.notes == {"log, AOTInductor, fusion": ["Error: no g++"]}


def test_whatever_fails_is_named_and_the_rest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:  # as every call is after an error of CUDA's
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "empty_cache", broken)
    whole = script(tmp_path)
    raised = {"bare": Exception(), "missing": ImportError("No module named 'x'"), "ours": UserError("no")}
    for name, error in raised.items():

        def fails(error: Exception = error) -> None:
            raise error

        whole.section(gpu.Section(name, 1, fails), tmp_path)
    left_out = whole.run.results.left_out
    assert left_out == {"bare": "Exception", "missing": "ImportError: No module named 'x'", "ours": "no"}


def test_what_packages_differ_by_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By tensor, with CUDA graphs and without: a GPU may be there only once."""
    run, model = gpu.Run(SMALL, "cpu", RULE, tmp_path / "results.json"), random_model(SMALL)
    reference, same, other = (eager.load_engines(m) for m in (model, model, random_model(SMALL, 1)))
    gpu_child.noted_comparison(run, SMALL, reference, same, 1)
    assert run.results.notes.keys() == {"parity, AOTInductor, batch 1"}
    for engine in other.values():
        engine.run = Replayed(engine.__call__)  # type: ignore
    found = gpu_child.noted_comparison(run, SMALL, reference, other, 1, batch=2)
    notes = json.loads((tmp_path / "results.json").read_text())["notes"]
    noted = notes["parity, AOTInductor, batch 2"]
    assert not found.ok
    assert noted["graphs"] == found.graphs
    assert noted["means"]["fusion"]["CONTEXT1"] > 0
    engine = other["fusion"]
    assert gpu_child.unreplayed(engine).run == engine.__call__
    assert isinstance(engine.run, Replayed)  # type: ignore[attr-defined]
    monkeypatch.setattr(gpu_child, "unreplayed", lambda engine: same[engine.signature.name])
    chain = Pipeline(SMALL, other).condition  # which replays too
    gpu_child.noted_comparison(run, SMALL, reference, other, 1, batch=2, conditioner=chain)
    singly = run.results.notes["parity, AOTInductor, batch 2, without CUDA graphs"]
    assert (noted["ok"], singly["ok"]) == (False, True)
