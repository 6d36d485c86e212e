"""NVIDIA's perf_analyzer, from tritonclient's wheel or the PATH: the load that users of Triton know.

The wheel's binary wants two libraries that it does not bring: CUDA's runtime, from the wheel nvidia-cuda-runtime-cu12
(no GPU is needed), and libb64, which nvidia-pytriton has under another name."""

from __future__ import annotations

import base64
import contextlib
import csv
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException

from bench.serving import HTTP, SHM
from mubic_deploy import graphs
from mubic_deploy.config import get_config
from mubic_deploy.errors import UserError
from mubic_deploy.triton.shared_memory import FOLDER

WINDOWS = 3  # of requests, whose mean it reports
_OUTPUT_BYTES = 1 << 20  # of shared memory for each output
_STABLE = 10_000  # %: it reports after WINDOWS however much they differ; the spread is ours to judge
_SECONDS = 900  # longest run
_LINGER, _POLL = 5.0, 0.05  # s that regions, and answers about them, may take; and between two tries
_PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True)
class Analyzer:
    """path: of the program; libraries: folders where what it wants is found."""

    path: Path
    libraries: tuple[Path, ...]

    def environment(self) -> dict[str, str]:
        known = os.environ.get("LD_LIBRARY_PATH", "")
        folders = [str(folder) for folder in self.libraries] + ([known] if known else [])
        return {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(folders)}


def find(folder: Path) -> Analyzer:
    """The program beside this Python, or else on the PATH. folder: one that lasts as long as the analyzer is used.
    UserError if there is none, or it does not run here, with the reason."""
    beside = Path(sys.executable).parent / "perf_analyzer"
    path = str(beside) if beside.is_file() else shutil.which("perf_analyzer")
    if path is None:
        raise UserError("perf_analyzer is not installed: it comes with the wheel tritonclient and the Triton SDK image")
    analyzer = Analyzer(Path(path), tuple(_libraries(folder)))
    try:
        done = subprocess.run(
            [path, "--version"], env=analyzer.environment(), capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"perf_analyzer does not run here ({error})") from None
    if done.returncode != 0:
        missing = re.search(r"loading shared libraries: (\S+):", done.stderr)
        if missing is None:
            raise UserError(f"perf_analyzer does not run here ({' '.join(done.stderr.split())})")
        remedy = "pip install nvidia-cuda-runtime-cu12" if "cudart" in missing[1] else "install that library"
        raise UserError(f"perf_analyzer does not run here without {missing[1]}: {remedy}")
    return analyzer


def _libraries(folder: Path) -> Iterator[Path]:
    """Folders of the libraries that Python's packages bring."""
    for site in (Path(p) for p in sys.path if p):
        if (runtime := site / "nvidia" / "cuda_runtime" / "lib").is_dir():
            yield runtime
        if base64s := sorted(site.glob("nvidia_pytriton.libs/libb64-*.so.0d")):
            link = folder / "libraries" / "libb64.so.0d"
            link.parent.mkdir(exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(base64s[0])
            yield link.parent


def write_inputs(path: Path, clips: Sequence[Mapping[str, np.ndarray]], steps: int) -> Path:
    """Random clips, one sample each, as --input-data takes them: it sends one after the other. The seed of each is its
    place."""
    data = []
    for seed, clip in enumerate(clips):
        media = {name: {"b64": base64.b64encode(clip[name][0].tobytes()).decode()} for name in ("VIDEO", "AUDIO")}
        data.append({**media, "SEED": [seed], "STEPS": [steps]})
    path.write_text(json.dumps({"data": data}))
    return path


def run(
    analyzer: Analyzer, address: str, protocol: str, concurrency: int, requests: int, inputs: Path
) -> dict[str, float]:
    """Asks the ensemble over a protocol of `serving.PROTOCOLS`, with `concurrency` requests on the way, for WINDOWS
    windows of `requests` answers each. Returns clips_per_s, and latencies in seconds: median_s, p90_s, p95_s, p99_s.
    UserError if it fails. Over `serving.SHM` the server forgets the regions of all its clients."""
    with (
        tempfile.TemporaryDirectory(dir=inputs.parent) as folder,
        _sharing(address) if protocol == SHM else contextlib.nullcontext(),
    ):
        report = Path(folder) / "report.csv"
        command = [analyzer.path, "-m", graphs.ENSEMBLE, "-u", address, "--input-data", inputs]
        command += ["-i", "http" if protocol == HTTP else "grpc"]
        if protocol == SHM:
            command += ["--shared-memory", "system", "--output-shared-memory-size", _OUTPUT_BYTES]
        command += ["--concurrency-range", concurrency, "--measurement-mode", "count_windows"]
        command += [
            "--measurement-request-count",
            requests,
            "-s",
            _STABLE,
            "-r",
            WINDOWS,
            "-f",
            report,
            "--verbose-csv",
        ]
        try:
            done = subprocess.run(
                [str(part) for part in command],
                env=analyzer.environment(),
                capture_output=True,
                text=True,
                timeout=_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise UserError(f"perf_analyzer did not end within {_SECONDS} s") from None
        if done.returncode != 0 or not report.is_file():
            said = " ".join((done.stderr or done.stdout).split())
            raise UserError(f"perf_analyzer failed ({said[-300:]})")
        return read_report(report)


@contextlib.contextmanager
def _sharing(address: str) -> Iterator[None]:
    """It names its regions and their files by the tensor alone, so this machine has room for one of it at a time; and
    where it is refused to unregister what the server used last, it leaves that."""
    folder = os.open(FOLDER, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        try:
            yield
        finally:
            with contextlib.suppress(InferenceServerException), InferenceServerClient(address) as server:
                end = time.monotonic() + _LINGER
                while (left := _left(server)) and time.monotonic() < end:
                    for name in left:
                        with contextlib.suppress(InferenceServerException):  # still in use
                            server.unregister_system_shared_memory(name, client_timeout=_LINGER)
                    time.sleep(_POLL)
    finally:
        os.close(folder)


def _left(server: InferenceServerClient) -> list[str]:
    """Its regions: TENSOR_0_0 for what a clip brings, TENSOR for what it asks for."""
    signature = graphs.pipeline(get_config("demo"))
    names = "|".join(signature.input_names + signature.output_names)
    known = server.get_system_shared_memory_status(client_timeout=_LINGER).regions
    return [name for name in known if re.fullmatch(rf"({names})(_\d+_\d+)?", name)]


def read_report(path: Path) -> dict[str, float]:
    """The one line of a report, whose times are in microseconds."""
    (line,) = csv.DictReader(path.read_text().splitlines())
    times = {f"p{q}_s": float(line[f"p{q} latency"]) / 1e6 for q in _PERCENTILES}
    median_s = times.pop("p50_s")
    return {"clips_per_s": float(line["Inferences/Second"]), "median_s": median_s, **times}
