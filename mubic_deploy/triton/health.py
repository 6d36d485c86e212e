"""Whether the models of the one Triton server on this machine answer, and rightly:
`python3 -m mubic_deploy.triton.health PORT`, of HTTP.

Triton says that it is ready for as long as its own process runs, also when a model's process has died and requests
fail. So this asks for maps, and counts the processes of the Python models: where a model has several, the request may
have met one that lives. And it asks for those of two clips by turns, each of which must be what it was: with CUDA
graphs Triton 25.10 was seen to answer with the result of an earlier request
(https://github.com/triton-inference-server/server/issues/8550). The server is watched from outside, hence nothing but
the standard library."""

from __future__ import annotations

import http.client
import json
import math
import random
import sys
import time
from array import array
from collections import Counter
from pathlib import Path
from typing import Any

ENSEMBLES = ("mubic", "mubic_fixed")  # as `graphs` names them
STUB = "triton_python_backend_stub"  # a process of a Python model
TIMEOUT = 25.0  # s for an answer, waiting behind other requests included
BUSY = 4.0  # s after which no further map is asked for: others wait for theirs
TURNS = (0, 0, 1, 1, 0)
DIFFERENCE = 0.005  # of a map, by what else is in its batch: FP16 was seen to differ by 0.0002
REMEDY = "write the repository again with --no-cuda-graphs, see docs/deployment.md"
_TYPES = {"TYPE_UINT8": "B", "TYPE_INT32": "i", "TYPE_INT64": "q", "TYPE_FP32": "f"}
_STEPS = 2


def check(port: int, processes: Counter[str]) -> None:
    """`processes`: how many each Python model has, by its name. OSError, HTTPException or ValueError if the server at
    127.0.0.1 does not answer, a process is missing, or a clip's map is not finite or another one than before."""
    served = [model["name"] for model in _ask(port, "POST", "/v2/repository/index")]
    for name in served:
        config = _ask(port, "GET", f"/v2/models/{name}/config")
        wanted = sum(group["count"] for group in config["instance_group"]) if config["backend"] == "python" else 0
        if processes[name] < wanted:
            raise ValueError(f"{name} has {processes[name]} of its {wanted} processes")
    until = time.monotonic() + BUSY
    for name in ENSEMBLES:
        if name in served:
            check_maps(port, _ask(port, "GET", f"/v2/models/{name}/config"), until)
        if time.monotonic() > until:
            break


def check_maps(port: int, config: dict[str, Any], until: float) -> None:
    """The maps of two clips, by turns; once the monotonic clock is past `until`, no more. ValueError if one is not
    finite, or not what it was."""
    known: dict[int, array[float]] = {}
    for turn in TURNS:
        saliency = infer(port, config, turn)
        if not all(map(math.isfinite, saliency)):
            raise ValueError(f"a map of {config['name']} is not finite: check the checkpoint, and that FP16 suits it")
        before = known.setdefault(turn, saliency)
        if (found := max(abs(a - b) for a, b in zip(before, saliency, strict=True))) > DIFFERENCE:
            raise ValueError(f"two maps of one clip of {config['name']} differ by {found:.3f}: {REMEDY}")
        if time.monotonic() > until:
            break


def infer(port: int, config: dict[str, Any], turn: int) -> array[float]:
    """SALIENCY of one clip: black and silent for turn 0, else noise; all from one seed."""
    inputs, body, drawn = [], b"", random.Random(turn)
    for tensor in config["input"]:
        shape = [1, *map(int, tensor["dims"])]
        count = math.prod(shape)
        values = bytes(array(_TYPES[tensor["data_type"]], [0]).itemsize * count)
        if tensor["name"] == "STEPS":
            values = array("i", [_STEPS]).tobytes()
        elif tensor["name"] == "VIDEO" and turn:
            values = drawn.randbytes(count)
        elif tensor["name"] == "AUDIO" and turn:
            values = array("f", (drawn.uniform(-0.5, 0.5) for _ in range(count))).tobytes()
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
    return Path(file).parts[-3] if Path(program).name == STUB and word in "\0".join(rest) else ""


def _ask(port: int, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> Any:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
    try:
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        said = answer.read()
        if answer.status != http.client.OK:
            raise ValueError(f"{path}: {answer.status} {said.decode(errors='replace')}")
        length = answer.headers.get("Inference-Header-Content-Length")
        return json.loads(said) if length is None else said[int(length) :]
    finally:
        connection.close()


def main(port: str) -> int:
    try:
        check(int(port), Counter(model_processes().values()))
    except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
        print(f"{type(error).__name__}: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
