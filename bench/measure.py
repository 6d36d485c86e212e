#!/usr/bin/env python3
"""The figures of docs/measured.md, each by one command:

    python bench/measure.py visual      visual encoder: ONNX Runtime against torchvision's eager attention
    python bench/measure.py whole       a whole inference: ONNX Runtime against eager with torchvision's attention
    python bench/measure.py steps       what 8 steps cost over 4: four denoiser calls and nothing else
    python bench/measure.py logmel      the in-graph log-mel against torchaudio
    python bench/measure.py parity      every graph and the final map against eager PyTorch, both sizes
    python bench/measure.py ensemble    Triton's ensemble against the in-process pipeline: maps and latency
    python bench/measure.py memory      of `predict` over a 10-minute 720p film and over a 1-minute one

Both sides run in this process, or on this machine at once, interleaved; a figure is the median. Timings are in
seconds. The result goes to stdout as JSON and, with --save, to bench/results/."""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from mubic_deploy import exported
from mubic_deploy.artifacts import Artifacts
from mubic_deploy.config import get_config
from mubic_deploy.engines import Arrays, onnxruntime
from mubic_deploy.parity import compare, random_clip
from mubic_deploy.pipeline import Pipeline, request, sample

RESULTS = Path(__file__).parent / "results"
CLIPS = 8  # random inputs that take turns


def interleave(sides: dict[str, Callable[[int], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, one of each side a round, in random order; the first round is warm-up."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    order = random.Random(0)
    for i in range(rounds + 1):
        for name in order.sample(list(sides), len(sides)):
            began = time.perf_counter()
            sides[name](i)
            if i:
                times[name].append(time.perf_counter() - began)
    return times


def summary(times: dict[str, list[float]]) -> dict[str, Any]:
    return {
        name: {"median_s": median(t), "min_s": min(t), "max_s": max(t), "repeats": len(t)} for name, t in times.items()
    }


def machine() -> dict[str, Any]:
    cpu = next(
        (x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), "?"
    )
    packages = ("torch", "torchvision", "onnxruntime", "numpy", "tritonclient", "nvidia-pytriton", "av")
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "load": os.getloadavg(),
        "versions": {name: version(name) for name in packages},
    }


def artifacts(size: str) -> Artifacts:
    return exported.cached(f"random:{size}", progress=lambda text, *_: print(text, file=sys.stderr))


def eager_pipeline(size: str, folded: bool) -> Pipeline:
    from mubic_deploy.engines import eager
    from mubic_deploy.model.mubic import random_model

    model = random_model(get_config(size), folded=folded)
    return Pipeline(model.config, eager.load_engines(model))


def visual(rounds: int) -> dict[str, Any]:
    """The visual encoder of `full`, as torchvision ships its attention and exported with the rewrite."""
    reference = eager_pipeline("full", folded=False).engines["visual_encoder"]
    folded = eager_pipeline("full", folded=True).engines["visual_encoder"]
    candidate = onnxruntime.load_engines(artifacts("full"))["visual_encoder"]
    clips = [random_clip(get_config("full"), seed) for seed in range(CLIPS)]
    expected, got = reference(clips[0]), candidate(clips[0])
    times = interleave(
        {
            "eager_torchvision": lambda i: reference(clips[i % CLIPS]),
            "eager_folded": lambda i: folded(clips[i % CLIPS]),
            "onnxruntime": lambda i: candidate(clips[i % CLIPS]),
        },
        rounds,
    )
    return {
        "times": summary(times),
        "onnxruntime_over_torchvision": median(times["onnxruntime"]) / median(times["eager_torchvision"]),
        "largest_difference": {n: float(np.abs(np.asarray(expected[n]) - np.asarray(got[n])).max()) for n in expected},
    }


def whole(rounds: int) -> dict[str, Any]:
    """A whole inference of `full`, 4 steps, encoders once on both sides."""
    reference = eager_pipeline("full", folded=False)
    loaded = artifacts("full")
    candidate = Pipeline(loaded.config, onnxruntime.load_engines(loaded))
    clips = [random_clip(loaded.config, seed) for seed in range(CLIPS)]

    def run(pipeline: Pipeline) -> Callable[[int], Any]:
        return lambda i: pipeline.predict(clips[i % CLIPS]["VIDEO"], clips[i % CLIPS]["AUDIO"], i)

    times = interleave({"eager_torchvision": run(reference), "onnxruntime": run(candidate)}, rounds)
    faster = median(times["eager_torchvision"]) / median(times["onnxruntime"])
    return {"times": summary(times), "onnxruntime_faster_by": faster}


def steps(rounds: int) -> dict[str, Any]:
    """8 steps minus 4 steps against the four denoiser calls between them, all timed inside the same runs: the loop
    alone, and the whole inference, whose encoders wander by more than a call takes."""
    loaded = artifacts("full")
    engines = onnxruntime.load_engines(loaded)
    pipeline = Pipeline(loaded.config, engines)
    clips = [random_clip(loaded.config, seed) for seed in range(CLIPS)]
    parts: dict[str, list[float]] = {f"{part} {n}": [] for part in ("loop", "calls", "whole") for n in (4, 8)}
    denoiser = engines["denoiser"]
    calls: list[float] = []

    def timed(inputs: Arrays) -> Arrays:
        began = time.perf_counter()
        outputs = denoiser(inputs)
        calls.append(time.perf_counter() - began)
        return outputs

    def run(n: int) -> Callable[[int], Any]:
        def predict(i: int) -> None:  # what Pipeline.predict does, in two parts
            calls.clear()
            clip = clips[i % CLIPS]
            began = time.perf_counter()
            arrays = request(loaded.config, clip["VIDEO"], clip["AUDIO"], i, n)
            cond = pipeline.condition(arrays)
            middle = time.perf_counter()
            sample(loaded.config, timed, cond, arrays["SEED"], arrays["STEPS"])  # type: ignore[arg-type]
            end = time.perf_counter()
            for part, seconds in (("loop", end - middle), ("calls", sum(calls)), ("whole", end - began)):
                parts[f"{part} {n}"].append(seconds)

        return predict

    interleave({"4": run(4), "8": run(8)}, rounds)
    difference = {part: median(parts[f"{part} 8"]) - median(parts[f"{part} 4"]) for part in ("loop", "calls", "whole")}
    return {
        "times": summary(parts),
        "difference_s": difference,
        "loop_over_calls": difference["loop"] / difference["calls"],
        "whole_over_calls": difference["whole"] / difference["calls"],
    }


def logmel(rounds: int) -> dict[str, Any]:
    """Largest difference from torchaudio in float64 of the exported log-mel, and of torchaudio's own float32."""
    import torch
    import torchaudio

    from mubic_deploy.graphs import Signature, Tensor, audio
    from mubic_deploy.model.audio import LogMel
    from mubic_deploy.sources import load_script, source_dir

    signature = Signature("log_mel", (audio(),), (Tensor("LOG_MEL", "float32", (4, 96, 64)),))
    size = {"n_fft": 512, "win_length": 400, "hop_length": 160, "n_mels": 64}
    mel = torchaudio.transforms.MelSpectrogram(16_000, f_min=125, f_max=7500, power=1, center=False, **size).double()
    rng = np.random.default_rng(0)
    t = np.arange(16_608) / 16_000
    sounds = {f"tone {f} Hz, amplitude {a}": a * np.sin(2 * np.pi * f * t) for f in (220, 1000, 5000) for a in (0.5, 1)}
    sounds |= {"noise": rng.uniform(-1, 1, t.size), "quiet noise": 1e-4 * rng.normal(size=t.size), "silence": 0 * t}
    differences, torchaudios = {}, {}
    single = torchaudio.transforms.MelSpectrogram(16_000, f_min=125, f_max=7500, power=1, center=False, **size)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log_mel.onnx"
        load_script(source_dir("export") / "onnx_graphs.py").trace(LogMel(), signature, path)
        engine = onnxruntime.OnnxRuntimeEngine(path, signature)
        for name, sound in sounds.items():
            x = torch.tensor(sound[None], dtype=torch.float32)
            got = engine({"AUDIO": x.numpy()})["LOG_MEL"][0]
            slices = torch.stack([x[0, 336 * i : 336 * i + 15_600] for i in range(4)])
            expected = (mel(torch.nn.functional.pad(slices, (56, 56)).double()) + 0.01).log().mT
            differences[name] = float(np.abs(got - expected.numpy()).max())
            rounded = (single(torch.nn.functional.pad(slices, (56, 56))) + 0.01).log().mT
            torchaudios[name] = float((rounded - expected).abs().max())
    return {"by_sound": differences, "torchaudio_in_float32": torchaudios}


def parity(rounds: int) -> dict[str, Any]:
    """Three random clips through every graph and the whole chain."""
    from mubic_deploy.engines import eager
    from mubic_deploy.model.mubic import random_model

    results = {}
    for size in ("full", "demo"):
        loaded = artifacts(size)
        reference = eager.load_engines(random_model(loaded.config))
        results[size] = compare(loaded.config, reference, onnxruntime.load_engines(loaded)).to_json()
    return results


def ensemble(rounds: int) -> dict[str, Any]:
    """One client of the real server against the pipeline in this process, `demo`, 4 steps; the denoiser inside
    `ddim`, as `serve` has it on a CPU, and called through BLS."""
    loaded = artifacts("demo")
    pipeline = Pipeline(loaded.config, onnxruntime.load_engines(loaded))
    return {
        "denoiser_in_ddim": _through_triton(loaded, pipeline, rounds, call_denoiser=False),
        "denoiser_called": _through_triton(loaded, pipeline, rounds, call_denoiser=True),
    }


def _through_triton(loaded: Artifacts, pipeline: Pipeline, rounds: int, call_denoiser: bool) -> dict[str, Any]:
    from mubic_deploy.triton.client import TritonPredictor
    from mubic_deploy.triton.repository import write_repository
    from mubic_deploy.triton.server import TritonServer

    clips = [random_clip(loaded.config, seed) for seed in range(CLIPS)]

    def run(predictor: Any) -> Callable[[int], Any]:
        return lambda i: predictor.predict(clips[i % CLIPS]["VIDEO"], clips[i % CLIPS]["AUDIO"], i)

    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder) / "models"
        write_repository(loaded, repository, call_denoiser=call_denoiser)
        with (
            TritonServer(repository, http_port=0, grpc_port=0, metrics_port=0) as server,
            TritonPredictor(server.url) as client,
        ):
            difference = max(float(np.abs(run(client)(i)[0] - run(pipeline)(i)[0]).max()) for i in range(CLIPS))
            times = interleave({"triton": run(client), "in_process": run(pipeline)}, rounds)
    return {
        "times": summary(times),
        "largest_difference": difference,
        "triton_over_in_process": median(times["triton"]) / median(times["in_process"]),
    }


def render_film(path: Path, seconds: float, fps: int = 30) -> None:
    """A 1280 x 720 film with moving noise and a tone."""
    import av

    rng = np.random.default_rng(0)
    texture = rng.integers(0, 256, (720, 1280 + 64, 3), np.uint8)
    with av.open(path, "w") as out:
        video = out.add_stream("libx264", fps, options={"preset": "ultrafast", "crf": "35"})
        video.width, video.height, video.pix_fmt = 1280, 720, "yuv420p"
        sound = out.add_stream("aac", 48_000)
        for i in range(int(seconds * fps)):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(texture[:, i % 64 : i % 64 + 1280]), "rgb24")
            out.mux(video.encode(frame))
            if i % fps == 0:
                tone = np.sin(2 * np.pi * 440 * np.arange(48_000) / 48_000).astype(np.float32)[None] * 0.3
                chunk = av.AudioFrame.from_ndarray(tone, "fltp", "mono")
                chunk.sample_rate, chunk.pts = 48_000, (i // fps) * 48_000
                out.mux(sound.encode(chunk))
        for s in (video, sound):
            out.mux(s.encode(None))


def memory(rounds: int) -> dict[str, Any]:
    """Largest resident memory of `mubic-deploy predict`, films of 1 and of 10 minutes, overlay and maps written."""
    loaded = artifacts("demo")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for minutes in (1, 10):
            film = Path(folder) / f"{minutes}.mp4"
            render_film(film, 60 * minutes)
            command = [sys.executable, "-m", "mubic_deploy.cli", "predict", str(film), "--stride", "16", "--json"]
            command += ["--artifacts", str(loaded.path), "-o", f"{folder}/o.mp4", "--maps", f"{folder}/m.npz"]
            began = time.perf_counter()
            process = subprocess.Popen(command, stdout=subprocess.PIPE)
            assert process.stdout is not None
            output = json.loads(process.stdout.read())
            _, status, usage = os.wait4(process.pid, 0)
            assert status == 0, output
            results[f"{minutes}_min"] = {
                "peak_mb": usage.ru_maxrss / 1024,
                "seconds": time.perf_counter() - began,
                "maps": output["maps"],
                "frames": output["frames"],
            }
    results["ten_over_one"] = results["10_min"]["peak_mb"] / results["1_min"]["peak_mb"]
    return results


MEASUREMENTS = {f.__name__: f for f in (visual, whole, steps, logmel, parity, ensemble, memory)}
ROUNDS = {"visual": 9, "whole": 7, "steps": 25, "ensemble": 100}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(MEASUREMENTS))
    parser.add_argument("--rounds", type=int, help="repeats of each side")
    parser.add_argument("--save", action="store_true", help="also write bench/results/NAME.json")
    arguments = parser.parse_args()
    before = machine()
    result = MEASUREMENTS[arguments.name](arguments.rounds or ROUNDS.get(arguments.name, 1))
    text = json.dumps({"name": arguments.name, "machine": before, "result": result}, indent=2)
    print(text)
    if arguments.save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{arguments.name}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
