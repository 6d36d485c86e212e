"""Whether the models of the one Triton server on this machine answer: `python3 -m mubic_deploy.triton.health PORT`, of
HTTP.

Triton says that it is ready for as long as its own process runs, also when a model's process has died and requests
fail. So this makes one inference, and counts the processes of the Python models: where a model has several, the request
may have met one that lives. The server is watched from outside, hence nothing but the standard library."""

from __future__ import annotations

import http.client
import json
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

ENSEMBLE = "mubic"  # as `graphs` names it
STUB = "triton_python_backend_stub"  # a process of a Python model
TIMEOUT = 25.0  # s for an answer, waiting behind other requests included
_BYTES = {"TYPE_UINT8": 1, "TYPE_INT32": 4, "TYPE_INT64": 8, "TYPE_FP32": 4}


def check(port: int, processes: Counter[str]) -> None:
    """`processes`: how many each Python model has, by its name. OSError, HTTPException or ValueError if the server at
    127.0.0.1 does not answer a clip of zeros, or a process is missing."""
    for model in _ask(port, "POST", "/v2/repository/index"):
        config = _ask(port, "GET", f"/v2/models/{model['name']}/config")
        wanted = sum(group["count"] for group in config["instance_group"]) if config["backend"] == "python" else 0
        if processes[model["name"]] < wanted:
            raise ValueError(f"{model['name']} has {processes[model['name']]} of its {wanted} processes")
    infer(port, _ask(port, "GET", f"/v2/models/{ENSEMBLE}/config"))


def infer(port: int, config: dict[str, Any]) -> None:
    """One request, all of whose values are 0: a black silent clip, seed 0 and adaptive steps."""
    inputs, size = [], 0
    for tensor in config["input"]:
        shape = [1, *map(int, tensor["dims"])]
        length = math.prod(shape) * _BYTES[tensor["data_type"]]
        datatype = tensor["data_type"].removeprefix("TYPE_")
        size += length
        inputs.append(
            {
                "name": tensor["name"],
                "shape": shape,
                "datatype": datatype,
                "parameters": {"binary_data_size": length},
            }
        )
    header = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}).encode()
    headers = {"Inference-Header-Content-Length": str(len(header))}
    _ask(port, "POST", f"/v2/models/{config['name']}/infer", header + bytes(size), headers)


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
        return None if "Inference-Header-Content-Length" in answer.headers else json.loads(said)
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
