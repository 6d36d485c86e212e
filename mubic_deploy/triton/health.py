"""Whether the models of the one Triton server on this machine answer, and rightly:
`python3 -m mubic_deploy.triton.health PORT [PROCESS]`, of HTTP. PROCESS: the server's number; it is ended if a model's
process is gone, or after a fault of the GPU, as an illegal address: CUDA refuses all that a process asks of it from
then on, and TensorRT's engines run in the server's own.

Triton says that it is ready for as long as its own process runs, in versions before 2026 also when a model's process
has died and requests fail. So this asks for maps, and counts the processes of the Python models: where a model has
several, the request may have met one that lives. And it asks for those of two clips by turns, alone and both in a
batch, each of which must be what it was: with CUDA graphs Triton 25.10 was seen to answer with the result of an earlier
request (https://github.com/triton-inference-server/server/issues/8550), and TensorRT 10.11 and 11.1 were seen to
compute no sample rightly but that of a batch of one (https://github.com/NVIDIA/TensorRT/issues/4853). The server is
watched from outside, hence nothing but the standard library."""

from __future__ import annotations

import functools
import http.client
import json
import math
import os
import random
import re
import signal
import sys
import time
from array import array
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ENSEMBLES = ("mubic", "mubic_fixed")  # as `graphs` names them
STUB = "triton_python_backend_stub"  # a process of a Python model
TIMEOUT = 25.0  # s for an answer, waiting behind other requests included
BUSY = 4.0  # s after which no further map is asked for: others wait for theirs
# CUDA's words and names for what leaves no context behind; not for a want of memory, which passes
FAULT = re.compile(
    r"illegal (memory access|address|instruction)|misaligned address|unspecified launch failure|hardware stack error"
    r"|device-side assert|uncorrectable ECC|context is destroyed"
    r"|CUDA_?ERROR_?(ILLEGAL|MISALIGNED|LAUNCH_?FAILED|LAUNCH_?FAILURE|HARDWARE|ASSERT|ECC|CONTEXT_?IS_?DESTROYED)",
    re.IGNORECASE,
)
AGAIN = 1.0  # s after which a process that is gone is still gone, and the server does not just end
LARGEST = 8  # clips in a request, or the whole check would take long
TURNS = ((0,), (0,), (1,), (1,), (0,))  # the clips of each request; then those of the batches
DIFFERENCE = 0.005  # of a map, by what else is in its batch: FP16 was seen to differ by 0.0002
REMEDY = "write the repository again with --no-cuda-graphs, see docs/deployment.md"
_TYPES = {"TYPE_UINT8": "B", "TYPE_INT32": "i", "TYPE_INT64": "q", "TYPE_FP32": "f"}
_ONE_STEP, _STEPS = "no_diffusion", 2  # the variant that takes no more, and those of the others


class GoneError(ValueError):
    """A model's process, which Triton does not start again."""


class FaultError(ValueError):
    """Of the GPU, after which it is lost to the process that met it."""


def check(port: int, processes: Counter[str]) -> None:
    """`processes`: how many each Python model has, by its name. OSError, HTTPException or ValueError if the server at
    127.0.0.1 does not answer, or a clip's map is not finite or another one than before; GoneError if a process is
    missing."""
    served = [model["name"] for model in _ask(port, "POST", "/v2/repository/index")]
    for name in served:
        config = _ask(port, "GET", f"/v2/models/{name}/config")
        wanted = sum(group["count"] for group in config["instance_group"]) if config["backend"] == "python" else 0
        if processes and processes[name] < wanted:  # where none is seen at all they are only not visible from here
            raise GoneError(f"{name} has {processes[name]} of its {wanted} processes")
    until = time.monotonic() + BUSY
    for name in ENSEMBLES:
        if name in served:
            check_maps(port, _ask(port, "GET", f"/v2/models/{name}/config"), until)
        if time.monotonic() > until:
            break


def check_maps(port: int, config: dict[str, Any], until: float) -> None:
    """The maps of two clips, by turns, then in a batch of two and in the largest, of LARGEST at most; once the
    monotonic clock is past `until`, no more. ValueError if one is not finite, or not what it was."""
    known: dict[int, array[float]] = {}
    largest = min(config["max_batch_size"], LARGEST)
    batches = [tuple(i % 2 for i in range(size)) for size in sorted({2, largest}) if size <= largest]
    for clips in (*TURNS, *batches):
        saliency = infer(port, config, clips)
        if not all(map(math.isfinite, saliency)):
            raise ValueError(f"a map of {config['name']} is not finite: check the checkpoint, and that FP16 suits it")
        pixels = len(saliency) // len(clips)
        for i, clip in enumerate(clips):
            found = saliency[i * pixels : (i + 1) * pixels]
            before = known.setdefault(clip, found)
            if (difference := max(abs(a - b) for a, b in zip(before, found, strict=True))) > DIFFERENCE:
                held = f", one in a batch of {len(clips)}" if len(clips) > 1 else ""
                raise ValueError(f"two maps of one clip of {config['name']}{held} differ by {difference:.3f}: {REMEDY}")
        if time.monotonic() > until:
            break


def infer(port: int, config: dict[str, Any], clips: Sequence[int]) -> array[float]:
    """SALIENCY of some clips in a batch: one that is black and silent for 0, else noise; all from one seed."""
    inputs, body = [], b""
    variant = json.loads(config["parameters"]["CONFIG"]["string_value"])["variant"]
    for tensor in config["input"]:
        shape = [len(clips), *map(int, tensor["dims"])]
        count = math.prod(shape[1:])
        values = b"".join(_values(tensor["name"], tensor["data_type"], count, clip, variant) for clip in clips)
        body += values
        inputs.append(
            {
                "name": tensor["name"],
                "shape": shape,
                "datatype": tensor["data_type"].removeprefix("TYPE_"),
                "parameters": {"binary_data_size": len(values)},
            }
        )
    wanted = [{"name": "SALIENCY", "parameters": {"binary_data": True}}]
    header = json.dumps({"inputs": inputs, "outputs": wanted}).encode()
    headers = {"Inference-Header-Content-Length": str(len(header))}
    answer = _ask(port, "POST", f"/v2/models/{config['name']}/infer", header + body, headers)
    return array("f", answer)


@functools.cache
def _values(name: str, data_type: str, count: int, clip: int, variant: str) -> bytes:
    """A tensor of a clip."""
    drawn = random.Random(clip)
    if name == "STEPS":
        return array("i", [1 if variant == _ONE_STEP else _STEPS]).tobytes()
    if name == "VIDEO" and clip:
        return drawn.randbytes(count)
    if name == "AUDIO" and clip:
        return array("f", (drawn.uniform(-0.5, 0.5) for _ in range(count))).tobytes()
    return bytes(array(_TYPES[data_type], [0]).itemsize * count)


def model_processes(word: str = "") -> dict[int, str]:
    """The processes of Python models on this machine by their numbers, as `model_of` says them."""
    numbers = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
    return {number: model for number in numbers if (model := model_of(number, word))}


def model_of(process: int, word: str = "") -> str:
    """The Python model whose process this is, one with `word` on its command line; "" if it is none, or has ended."""
    try:
        # the program, and its model's REPOSITORY/MODEL/VERSION/model.py
        program, file, *rest = Path(f"/proc/{process}/cmdline").read_text(errors="replace").split("\0")
    except (OSError, ValueError):  # it ended, or is another program
        return ""
    folders = Path(file).parts  # none, of one that Triton only tries
    return folders[-3] if Path(program).name == STUB and word in "\0".join(rest) and len(folders) > 2 else ""


def _ask(port: int, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> Any:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
    try:
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        said = answer.read()
        if answer.status != http.client.OK:
            text = f"{path}: {answer.status} {said.decode(errors='replace')}"
            raise FaultError(text) if FAULT.search(text) else ValueError(text)
        length = answer.headers.get("Inference-Header-Content-Length")
        return json.loads(said) if length is None else said[int(length) :]
    finally:
        connection.close()


def end_if_still_so(port: int, server: int) -> None:
    """Ends the server if a model's process is still gone, or the GPU still lost: while a server ends by itself its
    models go too, and then it answers no more."""
    time.sleep(AGAIN)
    try:
        check(port, Counter(model_processes().values()))
    except (GoneError, FaultError):
        print(f"ending the server, process {server}")
        os.kill(server, signal.SIGTERM)
    except (OSError, http.client.HTTPException, ValueError):
        pass  # it has ended, or what is wrong now is something else


def main(port: str, server: str | None = None) -> int:
    try:
        check(int(port), Counter(model_processes().values()))
    except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
        print(f"{type(error).__name__}: {error}")
        if server is not None and isinstance(error, GoneError | FaultError):
            end_if_still_so(int(port), int(server))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
