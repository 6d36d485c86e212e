"""Dockerfile, compose.yaml and .dockerignore against the code and the repository, without Docker and without a GPU."""

from __future__ import annotations

import ast
import math
import os
import re
import shlex
import subprocess
import sys
import tomllib
from argparse import Namespace
from collections.abc import Iterator
from fnmatch import fnmatchcase
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from packaging.requirements import Requirement

from mubic_deploy import graphs
from mubic_deploy.cli import build_parser
from mubic_deploy.config import get_config
from mubic_deploy.triton import health
from mubic_deploy.triton.server import GRPC_PORT, HTTP_PORT, METRICS_PORT

ROOT = Path(__file__).parent.parent
DOCKERFILE, COMPOSE, IGNORED, GUIDE = (
    (ROOT / name).read_text() for name in ("Dockerfile", "compose.yaml", ".dockerignore", "docs/deployment.md")
)
VARIABLE = re.compile(r"\$\{(\w+):-([^}]*)\}")
NOT_ON_A_GPU = "mubic_deploy.triton.graph_model"  # ONNX Runtime in Triton: the models that plans take the place of
DISTRIBUTIONS = {"tensorrt": {"tensorrt"}, "pycuda": {"pycuda"}} | {
    k: set(v) for k, v in packages_distributions().items()
}


# --- reading the files ---


def services() -> dict[str, Any]:
    """With the variables' defaults."""
    return yaml.safe_load(VARIABLE.sub(r"\2", COMPOSE))["services"]


def stages() -> dict[str, list[tuple[str, str]]]:
    """The Dockerfile's instructions by stage, FROM included; those before the first stage under ""."""
    text = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.M))
    result: dict[str, list[tuple[str, str]]] = {"": []}
    for line in filter(None, map(str.strip, text.splitlines())):
        word, _, rest = line.partition(" ")
        assert word.isupper(), line
        if word == "FROM":
            result[rest.split()[-1]] = []
        result[list(result)[-1]].append((word, " ".join(rest.split())))
    return result


def commands(script: str) -> Iterator[Namespace]:
    """The calls of mubic-deploy in a script, parsed by its own parser."""
    for command in re.split(r"&&|\n|;", re.sub(r"\\\n", " ", script)):
        words = shlex.split(command, comments=True)
        if "mubic-deploy" in words:
            yield build_parser().parse_args(words[words.index("mubic-deploy") + 1 :])


def mounts(service: str) -> dict[str, dict[str, Any]]:
    return {mount["target"]: mount for mount in services()[service]["volumes"]}


def option(name: str) -> str:
    """Of tritonserver."""
    (value,) = (word.split("=", 1)[1] for word in services()["server"]["command"] if word.startswith(f"--{name}="))
    return value


def excluded(path: str) -> bool:
    """Whether .dockerignore keeps a file away: the last pattern that matches it or a folder above it decides."""
    parts, result = path.split("/"), False
    above = ["/".join(parts[:n]) for n in range(1, len(parts) + 1)]
    for line in filter(None, map(str.strip, IGNORED.splitlines())):
        pattern = line.removeprefix("!").removeprefix("**/")
        names = parts if line.removeprefix("!").startswith("**/") else above
        if not line.startswith("#") and any(fnmatchcase(name, pattern) for name in names):
            result = not line.startswith("!")
    return result


# --- what Python imports ---


def source(module: str) -> Path | None:
    path = ROOT.joinpath(*module.split("."))
    return next((p for p in (path / "__init__.py", path.with_suffix(".py")) if p.is_file()), None)


def imports(node: ast.AST, functions: bool = False) -> Iterator[str]:
    """Modules, and names that may be modules; functions: also what is imported when a function is called."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.module
            assert not child.level
            yield from (child.module, *(f"{child.module}.{alias.name}" for alias in child.names))
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        elif functions or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from imports(child, functions)


def reached(first: list[str], deep: tuple[str, ...] = ()) -> set[str]:
    """All modules that these bring in; deep: modules whose functions are called."""
    seen: set[str] = set()
    todo = list(first)
    while todo:
        name = todo.pop()
        path = source(name)
        if name in seen or (name.startswith("mubic_deploy") and path is None):  # seen, or no module but what is in one
            continue
        seen.add(name)
        if path is not None:
            todo += [*imports(ast.parse(path.read_text()), name in deep), *filter(None, [name.rpartition(".")[0]])]
    return seen


def third_party(modules: set[str]) -> set[str]:
    tops = {name.split(".")[0] for name in modules}
    return tops - set(sys.stdlib_module_names) - {"mubic_deploy", "triton_python_backend_utils"}


def installed(stage: str) -> set[str]:
    """The packages that pip puts into a folder which `stage` copies, without their dependencies and our own."""
    copied = {
        rest.split()[1] for word, rest in stages()[stage] if word == "COPY" and rest.startswith("--from=packages")
    }
    packages = set()
    for word, rest in stages()["packages"]:
        for command in rest.split("&&") if word == "RUN" else ():
            words = shlex.split(command)
            if words[1:2] != ["install"] or not words[0].endswith("/bin/pip"):
                continue
            for name, values in {"--constraint": 1, "--target": 1, "--no-deps": 0}.items():
                if name in words:
                    at = words.index(name)
                    where = words[at + 1] if name == "--target" else None
                    del words[at : at + 1 + values]
                    words[0] = f"{where}/bin/pip" if where else words[0]
            if words[0].removesuffix("/bin/pip") in copied:
                packages |= {re.sub(r"\$\{name\}.*", "tensorrt", word) for word in words[2:] if word[0] != "/"}
    return {re.split(r"[=\[]", name)[0] for name in packages}


def python_models() -> list[str]:
    """Of a repository for GPUs."""
    found = []
    for path in sorted((ROOT / "triton_models").glob("*/1/model.py")):
        first = list(imports(ast.parse(path.read_text())))
        if NOT_ON_A_GPU not in reached(first):
            found.append(path.parent.parent.name)
    return found


# --- the tests ---


def test_release_stands_once_and_both_images_have_it() -> None:
    (argument,) = (rest for word, rest in stages()[""] if word == "ARG")
    release = argument.removeprefix("TRITON_RELEASE=")
    assert re.fullmatch(r"\d\d\.\d\d", release)
    assert (DOCKERFILE + COMPOSE).count(release) == 1
    base = {name: content[0][1].split()[0] for name, content in stages().items() if name}
    assert base.pop("triton") == "nvcr.io/nvidia/tritonserver:${TRITON_RELEASE}-py3"
    assert base == dict.fromkeys(("packages", "engines", "serve"), "triton")
    for service, stage in {"engines": "engines", "server": "serve"}.items():
        # no value: the environment's, else the Dockerfile's
        assert services()[service]["build"] == {"context": ".", "target": stage, "args": ["TRITON_RELEASE"]}
        assert "image" not in services()[service]


def test_engines_become_a_repository_that_the_server_serves() -> None:
    shell, flags, script = services()["engines"]["command"]
    assert (shell, flags) == ("sh", "-ec")
    assert [part.split()[0] for part in script.split("&&")] == ["mubic-deploy"] * 2
    engines, repository = commands(script)
    assert (engines.command, repository.command, repository.engine) == ("engines", "repository", "tensorrt")
    assert repository.artifacts == engines.out
    assert str(repository.out) == option("model-repository")
    assert services()["server"]["command"][0] == "tritonserver"
    assert mounts("engines")[str(engines.artifacts)]["read_only"]
    assert mounts("engines")[str(engines.artifacts)]["source"] == "./graphs"


def test_what_is_replaced_by_renaming_lies_inside_the_volume() -> None:
    engines, repository = commands(services()["engines"]["command"][-1])
    (volume,) = (target for target, mount in mounts("engines").items() if mount["type"] == "volume")
    assert engines.out.parent == repository.out.parent == Path(volume)
    assert "read_only" not in mounts("engines")[volume]
    assert mounts("server") == {volume: {**mounts("engines")[volume], "read_only": True}}
    assert list(yaml.safe_load(COMPOSE)["volumes"]) == [mounts("server")[volume]["source"]]
    for stage in ("engines", "serve"):  # whichever runs first, the volume takes over its folder's owner
        (user,) = (rest for word, rest in stages()[stage] if word == "USER")
        owner, group = user.split(":")
        assert owner != "0"
        assert stages()[stage][-1][0] in ("USER", "EXPOSE")
        assert any(rest.endswith(f"install -d -o {owner} -g {group} {volume}") for _, rest in stages()[stage])


def test_server_is_found_and_watched_where_clients_look() -> None:
    server = services()["server"]
    ports = (HTTP_PORT, GRPC_PORT, METRICS_PORT)
    assert server["ports"] == [f"127.0.0.1:{port}:{port}" for port in ports]
    assert ("EXPOSE", " ".join(map(str, ports))) in stages()["serve"]
    how, python, _, module, port, first = server["healthcheck"]["test"]
    assert (how, python, module, port, first) == ("CMD", "python3", health.__name__, str(HTTP_PORT), "1")
    assert "init" not in server  # which would be the first process instead
    assert option("model-load-thread-count") == "1"
    assert not third_party(reached([module]))  # nor time to import it, each time
    assert int(server["healthcheck"]["timeout"].removesuffix("s")) > health.TIMEOUT
    assert (option("model-control-mode"), option("exit-on-error")) == ("none", "true")
    assert "--disable-auto-complete-config" in server["command"]
    assert server["restart"] == "unless-stopped"
    assert "restart" not in services()["engines"]
    assert services()["engines"]["profiles"] == ["build"]
    assert "profiles" not in server


def test_both_services_get_the_same_one_gpu() -> None:
    devices = [services()[name]["deploy"]["resources"]["reservations"]["devices"] for name in ("engines", "server")]
    assert devices[0] == devices[1] == [{"driver": "nvidia", "device_ids": ["0"], "capabilities": ["gpu"]}]


def test_memory_is_enough_for_the_largest_batches() -> None:
    engines, repository = commands(services()["engines"]["command"][-1])
    tensors = [t for s in graphs.signatures(get_config("full"), "float16").values() for t in s.outputs]
    clip = sum(math.prod(t.shape) * np.dtype(t.dtype).itemsize for t in tensors)
    gpu, pool = option("cuda-memory-pool-byte-size").split(":")
    assert gpu == "0"  # the only one that the container sees
    assert int(pool) >= 2 * repository.loops * engines.max_batch * clip
    key, size = option("backend-config").removeprefix("python,").split("=")
    assert key == "shm-default-byte-size"
    processes = repository.loops + len(python_models()) - 1
    assert services()["server"]["shm_size"] == "1gb"
    assert 2 * processes * int(size) <= 10**9


def test_copied_sources_exist_and_are_all_that_the_wheel_needs() -> None:
    copies = [rest.split() for content in stages().values() for word, rest in content if word == "COPY"]
    sources = {name for words in copies if not words[0].startswith("--from") for name in words[:-1]}
    for name in sources:
        assert (ROOT / name).exists(), name
        files = list((ROOT / name).rglob("*.py")) if (ROOT / name).is_dir() else [ROOT / name]
        assert files
        assert not [path for path in files if excluded(path.relative_to(ROOT).as_posix())]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {*wheel["packages"], *wheel["force-include"], project["project"]["readme"], "pyproject.toml"}
    assert sources == needed | {"requirements.txt"}


@pytest.mark.parametrize(
    "path",
    [
        ".git/HEAD",
        ".venv/bin/python",
        "runs/demo/model.safetensors",
        "data/train/fold_lists/a.txt",
        "out/graphs/denoiser.onnx",
        "graphs/denoiser.onnx",
        ".env",
        "tests/test_docker.py",
        "mubic_deploy/weights/demo.safetensors",
        "mubic_deploy/triton/__pycache__/server.cpython-311.pyc",
    ],
)
def test_nothing_else_goes_to_docker(path: str) -> None:
    assert excluded(path)


def test_serve_has_what_its_python_models_import_and_no_more() -> None:
    assert {"ddim", "host"} <= set(python_models())
    assert "denoiser" not in python_models()
    modules: set[str] = set()
    for name in python_models():
        tree = ast.parse((ROOT / "triton_models" / name / "1" / "model.py").read_text())
        modules |= reached(list(imports(tree)))
    assert "mubic_deploy.diffusion" in modules
    assert third_party(modules) == installed("serve") == {"av", "numpy"}
    assert ("ENV", "PYTHONPATH=/opt/models") in stages()["serve"]
    # what the image is checked with brings in all of it
    (check,) = (re.search(r'python3 -c "(.+?)"', rest) for word, rest in stages()["serve"] if word == "RUN")
    assert check
    assert reached(list(imports(ast.parse(check[1])))) >= {m for m in modules if source(m)}


def test_engines_has_what_its_commands_import_and_no_more() -> None:
    homes = {"engines": "mubic_deploy.commands", "repository": "mubic_deploy.triton.commands"}
    files = {command: source(home) for command, home in homes.items()}
    bodies = {command: ast.parse(file.read_text()).body for command, file in files.items() if file}
    defined = {(command, f.name): f for command, body in bodies.items() for f in body if isinstance(f, ast.FunctionDef)}
    called = [defined[command, command] for command in homes]
    first = ["mubic_deploy.cli", *homes.values()]
    first += [name for f in called for name in imports(f)]
    first += imports(ast.parse((ROOT / "export" / "tensorrt_engines.py").read_text()))
    first.append("mubic_deploy.engines.onnxruntime")  # which the check asks for by its name
    modules = reached(first, deep=("mubic_deploy.engines.cuda", "mubic_deploy.engines.tensorrt"))
    wanted = third_party(modules)
    assert {"tensorrt", "pycuda", "onnxruntime", "tritonclient", "google"} <= wanted
    assert "torch" not in wanted
    have = installed("engines")
    assert not [name for name in wanted if not DISTRIBUTIONS[name] & have]
    assert not [name for name in have if not any(name in DISTRIBUTIONS[module] for module in wanted)]


def test_versions_are_the_tested_ones() -> None:
    pinned = {line.split("==")[0] for line in (ROOT / "requirements.txt").read_text().splitlines() if "==" in line}
    loose = {"tensorrt", "pycuda"}  # of the image's version; pinned where it is installed
    assert (installed("engines") | installed("serve")) - loose <= pinned
    installs = [rest for word, rest in stages()["packages"] if word == "RUN" and "pip install" in rest]
    assert len(installs) == 3
    assert all("--constraint requirements.txt" in rest for rest in (installs[0], installs[2]))
    assert re.search(r" pycuda==\d{4}\.", installs[0])
    assert "--no-deps" in installs[1]


def test_bindings_are_of_the_images_tensorrt_also_if_they_came_a_second_time(tmp_path: Path) -> None:
    """In the real shell: what pip is asked for, where dpkg knows a package that is not installed and one that is."""
    (run,) = (rest for word, rest in stages()["packages"] if word == "RUN" and "libnvinfer" in rest)
    query = """case "$*" in *' libnvinfer[0-9]*') echo; echo 10.14.1.48-1+cuda13.0;; esac"""
    (tmp_path / "dpkg-query").write_text(f"#!/bin/sh\n{query}\n")
    (tmp_path / "dpkg-query").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    command = ["sh", "-c", run.replace("/opt/mubic/bin/pip", "echo")]
    asked = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
    packages = [Requirement(word) for word in asked if word.startswith("tensorrt")]
    assert [package.name for package in packages] == ["tensorrt-cu13", "tensorrt-cu13-bindings"]
    for package in packages:
        versions = ("10.14.1.48", "10.14.1.48.post1", "10.14.1.49", "10.15.1.29", "11.4.0.106")
        assert list(package.specifier.filter(versions)) == ["10.14.1.48", "10.14.1.48.post1"]


def test_what_pycuda_is_built_with_is_looked_for_before(tmp_path: Path) -> None:
    """In the real shell, with another root."""
    runs = [rest for word, rest in stages()["packages"] if word == "RUN"]
    (check,) = (rest for rest in runs if "cuda.h" in rest)
    assert runs.index(check) < next(i for i, rest in enumerate(runs) if "pycuda" in rest)
    files = [tmp_path / name for name in ("include/cuda.h", "include/cudaProfiler.h", "lib64/stubs/libcuda.so")]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    command = ["sh", "-c", check.replace("/usr/local/cuda", str(tmp_path))]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    for file in files:
        file.unlink()
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (ran.returncode, ran.stderr) == (1, f"the Triton image has no {file}: see docs/deployment.md\n")
        file.touch()
    assert "`the Triton image has no /usr/local/cuda/...`" in GUIDE


def test_guide_knows_every_variable_and_its_commands_are_ours() -> None:
    defaults = dict(VARIABLE.findall(COMPOSE))
    table = dict(re.findall(r"^\| `([A-Z_]+)` \| `?([^|`]+?)`? \|", GUIDE, flags=re.M))
    assert table.pop("TRITON_RELEASE") == "the Dockerfile's"
    assert defaults.pop("TRITON_RELEASE") == "default"  # in the name of a file
    assert (table.pop("MUBIC_REPOSITORY_OPTIONS"), defaults.pop("MUBIC_REPOSITORY_OPTIONS")) == ("none", "")
    assert table == defaults
    said = list(commands("\n".join(re.findall(r"^```\n(.*?)^```", GUIDE, flags=re.M | re.S))))
    assert {"export", "repository", "predict", "stream"} <= {arguments.command for arguments in said}
    _, repository = commands(services()["engines"]["command"][-1])
    for arguments in said:
        if arguments.command == "repository":
            assert (arguments.artifacts, arguments.out) == (repository.artifacts, repository.out)
        if arguments.command == "export":
            assert (arguments.precision, arguments.out) == ("float16", Path("graphs"))
            assert arguments.optimise == ["pad_heads"]  # what TensorRT's fused attention takes
    # what is installed by hand is what the image has
    (by_hand,) = re.findall(r"`pip install (--no-deps --target /opt/models .*?)`", GUIDE)
    wheel = by_hand.split()[-1]
    in_image = next(rest for word, rest in stages()["packages"] if word == "RUN" and f"/wheels/{wheel}" in rest)
    assert {*by_hand.split()} <= {part.removeprefix("/wheels/") for part in in_image.split()}
    # compose.yaml says the same command
    (header,) = re.findall(r"^# (mubic-deploy export .*?)   ", COMPOSE, flags=re.M)
    assert vars(build_parser().parse_args(shlex.split(header)[1:])) in [vars(arguments) for arguments in said]
