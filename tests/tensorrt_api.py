"""What the real TensorRT bindings offer, asked without TensorRT: their wheel over stub libraries of a few lines of C.

The wheels of both major versions are unpacked by `make` into .venv/tensorrt/<major>; they cannot be imported beside
each other, so each is asked in a process of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

MAJORS = (10, 11)
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
FUNCTIONS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)
ASK = """
import json, sys
import tensorrt_bindings as trt
classes, enums, overloads = {}, {}, {}
for name in dir(trt):
    value = getattr(trt, name)
    if not isinstance(value, type):
        continue
    if hasattr(value, "__members__"):
        enums[name] = {key: int(member) for key, member in value.__members__.items()}
    else:
        classes[name] = [key for key in dir(value) if not key.startswith("_")]
        nested = {f"{name}.{key}": getattr(getattr(value, key), "__members__", None) for key in classes[name]}
        enums |= {key: {m: int(v) for m, v in members.items()} for key, members in nested.items() if members}
        lines = {key: (getattr(value, key).__doc__ or "").splitlines() for key in [*classes[name], "__init__"]}
        overloads[name] = {k: [x for x in text if k + "(self: " in x and " -> " in x] for k, text in lines.items()}
print(json.dumps({"version": trt.__version__, "classes": classes, "enums": enums, "overloads": overloads}))
"""


@dataclass(frozen=True)
class Api:
    """classes    public attributes by class
    enums      members by enumeration
    arguments  by class and method, where the bindings say it: fewest and most arguments of each overload"""

    version: str
    classes: dict[str, list[str]]
    enums: dict[str, dict[str, int]]
    arguments: dict[str, dict[str, list[tuple[int, int]]]]


def counted(signature: str) -> tuple[int, int]:
    """Fewest and most arguments, without self, of a line like `f(self: T, a: int, b: Tuple[int] = (1, 2)) -> C`."""
    inside = signature[signature.index("(") + 1 : signature.rindex(") -> ")]
    while (flat := re.sub(r"\[[^][]*\]|\([^()]*\)|<[^<>]*>", "", inside)) != inside:
        inside = flat
    parameters = inside.split(", ")[1:]
    return sum(" = " not in p for p in parameters), len(parameters)


def ask(major: int, folder: Path) -> Api:
    """The bindings of a major version; stub libraries are compiled into `folder`."""
    wheel, compiler = Path(sys.prefix) / "tensorrt" / str(major), shutil.which("cc")
    if not wheel.is_dir():
        pytest.skip(f"TensorRT {major}'s bindings are not in {wheel}: make .venv/installed")
    if compiler is None:
        pytest.skip("there is no C compiler for the stub libraries")
    source = folder / "stub.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in FUNCTIONS))
    for library in LIBRARIES:
        name = f"lib{library}.so.{major}"
        command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(folder / name), str(source)]
        subprocess.run(command, check=True)
    environment = os.environ | {"LD_LIBRARY_PATH": str(folder), "PYTHONPATH": str(wheel)}
    ran = subprocess.run([sys.executable, "-c", ASK], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout)
    overloads = told.pop("overloads")
    arguments = {
        kind: {name: [counted(line) for line in lines] for name, lines in methods.items() if lines}
        for kind, methods in overloads.items()
    }
    return Api(**told, arguments=arguments)
