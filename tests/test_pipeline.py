"""The pipeline as a user calls it: what it refuses, what may be shared, and the map of the shipped checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mubic_deploy import graphs
from mubic_deploy.artifacts import Artifacts
from mubic_deploy.config import DEMO, DEMO_CHECKPOINT
from mubic_deploy.engines import cpu, eager
from mubic_deploy.errors import UserError
from mubic_deploy.parity import random_clip
from mubic_deploy.pipeline import Pipeline, request, sample, stacked

KNOWN = (
    (6.44, 5.14, 5.03, 5.19, 4.94, 4.93, 4.80, 7.47),
    (7.09, 6.44, 6.50, 6.23, 6.12, 6.47, 5.49, 6.65),
    (9.43, 11.64, 12.25, 8.92, 9.28, 11.03, 9.89, 8.92),
    (9.28, 17.63, 20.75, 16.77, 23.00, 31.98, 17.00, 7.97),
    (8.23, 17.40, 37.30, 118.82, 210.13, 94.50, 19.48, 7.64),
    (7.83, 9.69, 27.33, 122.13, 212.17, 58.62, 11.55, 7.53),
    (9.69, 8.08, 9.30, 14.97, 15.97, 10.63, 9.14, 9.01),
)


def scene() -> tuple[np.ndarray, np.ndarray]:
    """A clip from arithmetic alone: a light that circles over a gradient, and a tone that swells with it."""
    y, x = np.mgrid[: DEMO.height, : DEMO.width]
    time = np.arange(DEMO.frames)[:, None, None] / 25
    centre_y, centre_x = 56 + 24 * np.sin(6 * time), 96 + 48 * np.cos(6 * time)
    light = np.exp(-((y - centre_y) ** 2 + (x - centre_x) ** 2) / 200)
    video = np.stack([40 + 200 * light, 60 + 0.4 * x + 120 * light, 90 - 0.3 * y + 0 * light], axis=-1)
    seconds = np.arange(16_608) / 16_000
    audio = 0.4 * np.sin(2 * np.pi * 440 * seconds) * np.sin(6 * seconds) ** 2
    return video.clip(0, 255).astype(np.uint8)[None], audio.astype(np.float32)[None]


def test_the_shipped_checkpoint_gives_the_map_it_gave() -> None:
    """Means over blocks of 8 x 12 places, in thousandths, written down when the checkpoint was made known: every engine
    is compared with eager PyTorch elsewhere, so a change of the model alone would change all of them alike."""
    video, audio = scene()
    saliency, _ = Pipeline.open(engine="eager").predict(video, audio, seed=3)
    blocks = saliency[0].reshape(7, 8, 8, 12).mean(axis=(1, 3))
    np.testing.assert_allclose(1000 * blocks, KNOWN, atol=0.1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": 4.5}, "STEPS cannot be 4.5: give one whole number for all clips, or 2, one a clip: 1 to 12, or 0"),
        ({"steps": [4, 0.5]}, r"STEPS cannot be \[4, 0.5\]: give one whole number"),
        ({"steps": "many"}, "STEPS cannot be 'many'"),
        ({"seed": 1.7}, r"SEED cannot be 1.7: give one whole number for all clips, or 2, one a clip: 0 to 2\^63 - 1"),
        ({"seed": 2**63}, "SEED cannot be 9223372036854775808"),
        ({"seed": np.arange(4).reshape(2, 2)}, r"SEED cannot be array\(\[\[0, 1\], \[2, 3\]\]\): give"),
    ],
)
def test_steps_and_seeds_that_are_none(given: dict, message: str) -> None:
    clip = random_clip(DEMO, 0, 2)
    with pytest.raises(UserError, match=message):
        request(DEMO, clip["VIDEO"], clip["AUDIO"], **{"seed": 0, "steps": 4, **given})


def test_whole_numbers_of_any_type_are_steps() -> None:
    clip = random_clip(DEMO, 0, 2)
    for steps in (4, 4.0, np.uint8(4), [4, 4]):
        arrays = request(DEMO, clip["VIDEO"], clip["AUDIO"], 0, steps)  # type: ignore[arg-type]
        assert arrays["STEPS"].tolist() == [[4], [4]]
        assert arrays["STEPS"].dtype == np.int32


def test_clips_that_are_no_arrays() -> None:
    clip = random_clip(DEMO, 0)
    video, audio = clip["VIDEO"], clip["AUDIO"]
    wrongs: tuple[tuple[Any, Any, str], ...] = (
        (list(video), audio, r"VIDEO must be uint8 \[batch, 16, 112, 192, 3\], not list: give an array"),
        (video, None, r"AUDIO must be float32 \[batch, 16608\], not NoneType: give an array"),
        (video, audio.astype(np.float64), r"AUDIO must be .*, not float64 \[1, 16608\]: convert it"),
        (video[:, :, :100], audio, r"VIDEO must be .*: give clips of the model's configuration"),
    )
    for frames, sound, message in wrongs:
        with pytest.raises(UserError, match=message):
            request(DEMO, frames, sound, 0, 4)


def test_a_folder_that_is_called_as_a_checkpoint(
    demo_artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A string names the checkpoint first, as everywhere; a Path, and ./demo, the folder."""
    monkeypatch.chdir(tmp_path)
    Path("demo").mkdir()
    assert Pipeline.open().source == demo_artifacts.source
    for folder in ("./demo", Path("demo")):
        with pytest.raises(UserError, match=r"demo holds no manifest.json: make it with"):
            Pipeline.open(folder)


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ("packages.json", "holds no manifest.json, but AOTInductor's packages: name the engine that runs these, or "),
        ("engines.json", "holds no manifest.json, but TensorRT engines: name the engine that runs these"),
    ],
)
def test_a_folder_for_another_engine(tmp_path: Path, manifest: str, message: str) -> None:
    (tmp_path / manifest).write_text("{}")
    with pytest.raises(UserError, match=message):
        Pipeline.open(tmp_path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_sound_that_is_not_finite(value: float) -> None:
    clip = random_clip(DEMO, 0)
    clip["AUDIO"][0, 8000] = value
    with pytest.raises(UserError, match=r"AUDIO holds NaN or infinite samples: give -1 to 1"):
        request(DEMO, clip["VIDEO"], clip["AUDIO"], 0, 4)


def test_sound_in_the_scale_of_integers() -> None:
    clip = random_clip(DEMO, 0)
    assert request(DEMO, clip["VIDEO"], 2 * clip["AUDIO"], 0, 4)["AUDIO"].max() > 1.9  # a loud mix
    with pytest.raises(UserError, match=r"AUDIO reaches 3\.27\de\+04, as integers do: scale it to -1 to 1"):
        request(DEMO, clip["VIDEO"], 32_767 * clip["AUDIO"], 0, 4)


def test_adaptive_steps_that_no_model_should_give() -> None:
    """As of features that are not finite."""
    cond = {t.name: np.zeros((1, *t.shape), t.dtype) for t in graphs.conditioning(DEMO)}
    cond["ADAPTIVE_STEPS"] = np.array([[np.iinfo(np.int32).min]], np.int32)
    seed, adaptive = np.zeros((1, 1), np.int64), np.zeros((1, 1), np.int32)
    with pytest.raises(UserError, match="ADAPTIVE_STEPS is out of range: it must be 1 to 12"):
        sample(DEMO, lambda _: pytest.fail("a step was taken"), cond, seed, adaptive)  # type: ignore[arg-type]


def test_steps_used_are_the_callers_own(demo_artifacts: Artifacts) -> None:
    clip, steps = random_clip(DEMO, 0), np.array([2], np.int32)
    _, used = Pipeline.open(demo_artifacts.path).predict(clip["VIDEO"], clip["AUDIO"], steps=steps)
    steps[0] = 9
    assert used.tolist() == [[2]]
    used += 1  # may be written to


@pytest.mark.parametrize("engine", cpu.ENGINES)
def test_threads_may_share_a_pipeline(demo_artifacts: Artifacts, engine: str) -> None:
    pipeline = Pipeline.open(demo_artifacts.path, engine)
    clips = [random_clip(DEMO, seed) for seed in range(4)]

    def predict(i: int) -> np.ndarray:
        return pipeline.predict(clips[i % 4]["VIDEO"], clips[i % 4]["AUDIO"], i % 4)[0]

    alone = [predict(i) for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for i, saliency in enumerate(pool.map(predict, range(16))):
            np.testing.assert_allclose(saliency, alone[i % 4], atol=1e-6)


@pytest.mark.parametrize("engine", [*cpu.ENGINES, "eager"])
def test_a_clip_may_be_a_view(demo_artifacts: Artifacts, engine: str) -> None:
    """As `frames[..., ::-1]` is, which makes RGB of OpenCV's BGR."""
    source = demo_artifacts.path if engine in cpu.ENGINES else "random:demo"
    pipeline = Pipeline.open(source, engine)
    clip = random_clip(DEMO, 0)
    turned = np.ascontiguousarray(clip["VIDEO"][..., ::-1])[..., ::-1]
    assert turned.strides[-1] == -1
    expected = pipeline.predict(clip["VIDEO"], clip["AUDIO"])[0]
    np.testing.assert_array_equal(pipeline.predict(turned, clip["AUDIO"])[0], expected)


@pytest.mark.parametrize("engine", cpu.ENGINES)
def test_a_folder_of_another_variant(demo_artifacts: Artifacts, engine: str) -> None:
    with pytest.raises(UserError, match=r"holds the variant 'full', not 'no_beca': ask for none, or export that one"):
        Pipeline.open(demo_artifacts.path, engine, "no_beca")


def test_eager_on_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="PyTorch finds no NVIDIA GPU here: use --engine eager"):
        Pipeline.open(engine="eager-cuda")


@pytest.mark.parametrize(
    ("text", "found"),
    [("200000 100000", 2), ("150000 100000", 2), ("50000 100000", 1), ("max 100000", 3), ("900000 100000", 3), ("", 3)],
)
def test_how_many_cores_there_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, found: int) -> None:
    """Eight hardware threads of four cores, five of which this process may run on; and a container's quota."""
    for number in range(8):
        folder = tmp_path / f"cpu{number}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{number % 4},{number % 4 + 4}\n")
    (tmp_path / "cpu.max").write_text(text + "\n")
    monkeypatch.setattr(cpu, "QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(cpu, "TOPOLOGY", tmp_path)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 4, 5, 6})
    assert cpu.cores() == found


def test_cores_without_a_topology(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cpu, "QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(cpu, "TOPOLOGY", tmp_path)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {2, 3, 5})
    assert cpu.cores() == 3


def test_a_graph_gets_a_thread_a_core(demo_artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "cores", lambda: 1)
    engine = cpu.load_engine("openvino", demo_artifacts.file("fusion"), demo_artifacts.signatures["fusion"])
    assert engine._request.get_compiled_model().get_property("INFERENCE_NUM_THREADS") == 1  # type: ignore[attr-defined]


ALONE = """
import contextlib, json, os, sys, threading
from pathlib import Path
import numpy as np
from mubic_deploy.artifacts import Artifacts
from mubic_deploy.engines import cpu
artifacts = Artifacts.open(Path(sys.argv[1]))
engine = cpu.load_engine(sys.argv[2], artifacts.file("fusion"), artifacts.signatures["fusion"], int(sys.argv[3]))
feed = {t.name: np.zeros((1, *t.shape), t.dtype) for t in engine.signature.inputs}
caller = threading.Thread(target=lambda: [engine(feed) for _ in range(100)])
caller.start()
found, most = set(), 0
while caller.is_alive():
    threads = os.listdir("/proc/self/task")
    most = max(most, len(threads))
    for thread in threads:
        with contextlib.suppress(ProcessLookupError):  # it has ended
            found.add(tuple(sorted(os.sched_getaffinity(int(thread)))))
print(json.dumps([most, sorted(found)]))
"""


@pytest.mark.parametrize("threads", [0, 1, 3])
@pytest.mark.parametrize("engine", cpu.ENGINES)
def test_threads_may_run_on_every_core(toy_artifacts: Artifacts, engine: str, threads: int) -> None:
    """Those of several processes would crowd on the first ones."""
    command = [sys.executable, "-c", ALONE, str(toy_artifacts.path), engine, str(threads)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    told = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    most, found = json.loads(told.stdout)
    assert most > threads
    assert found == [sorted(os.sched_getaffinity(0))]


def test_frames_are_put_where_the_engines_take_them_from() -> None:
    made: list[np.ndarray] = []

    def allocate(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        made.append(np.empty(shape, dtype))
        return made[-1]

    frames = [np.full((2, 3), i, np.uint8) for i in range(3)]
    video = stacked(Pipeline(DEMO, {}, allocate=allocate), frames)
    assert video is made[0]
    np.testing.assert_array_equal(video, np.stack(frames))
    np.testing.assert_array_equal(stacked(Pipeline(DEMO, {}), frames), video)


def test_where_no_memory_can_be_pinned_it_is_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def short(*_: object, pin_memory: bool, **__: object) -> None:
        assert pin_memory
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "empty", short)
    array = eager.pinned_array((2, 3), np.dtype(np.uint8))
    assert (array.shape, array.dtype) == ((2, 3), np.uint8)
    monkeypatch.setattr(torch, "empty_like", short)
    assert eager.begun(torch.arange(3.0))().tolist() == [0, 1, 2]


@pytest.mark.parametrize("engine", [*cpu.ENGINES, "eager"])
def test_a_batch_above_what_the_engines_take_goes_in_parts(demo_artifacts: Artifacts, engine: str) -> None:
    pipeline = Pipeline.open(demo_artifacts.path if engine in cpu.ENGINES else DEMO_CHECKPOINT, engine)
    clip, seeds, steps = random_clip(DEMO, 0, 3), np.arange(3), np.array([1, 0, 3])
    expected = [pipeline.predict(clip["VIDEO"][i : i + 1], clip["AUDIO"][i : i + 1], i, steps[i]) for i in range(3)]
    pipeline.max_batch = 2
    maps, used = pipeline.predict(clip["VIDEO"], clip["AUDIO"], seeds, steps)
    np.testing.assert_allclose(maps, np.concatenate([s for s, _ in expected]), atol=1e-6)
    assert used.tolist() == [n.tolist()[0] for _, n in expected]
    assert maps.flags.owndata
    assert maps.flags.writeable
