"""What the command line does with Triton: serve, repository, demo. Each function takes the parsed arguments and returns
the exit code."""

from __future__ import annotations

import contextlib
import functools
import shlex
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mubic_deploy import exported
from mubic_deploy.artifacts import Artifacts, Folder
from mubic_deploy.commands import artifacts_of, built, untrained
from mubic_deploy.config import DEMO_CHECKPOINT, weights_seed
from mubic_deploy.console import bar, messages, print_json, say, warn
from mubic_deploy.errors import UserError
from mubic_deploy.live.settings import DEFAULTS, StreamSettings
from mubic_deploy.media.outputs import replacing
from mubic_deploy.pipeline import AOTINDUCTOR, TENSORRT

if TYPE_CHECKING:
    from mubic_deploy.engines.aotinductor import Packages

PACKAGES_START_S = 600.0  # on a GPU each batch size is captured before the server is ready
DEMO_SCENE_SEED = 1001  # of the scenes that the shipped checkpoint is evaluated on


def _instances(arguments: Namespace, artifacts: Artifacts) -> dict[str, int]:
    """--instances by model; what comes later counts."""
    found: dict[str, int] = {}
    of_all = {*artifacts.signatures, "ddim"}
    if not arguments.call_denoiser:
        of_all.remove("denoiser")  # `ddim` runs that graph itself
    for model, count in arguments.instances or []:
        found |= dict.fromkeys(of_all, count) if model is None else {model: count}
    return found


def _given(arguments: Namespace, **more: Any) -> dict[str, Any]:
    """What the command line says of the queues and more, for what writes a repository; what it does not say is left
    out."""
    options = {"queue_delay_us": arguments.queue_delay, "queue_timeout_s": arguments.queue_timeout, **more}
    return {name: value for name, value in options.items() if value is not None}


def _streams(arguments: Namespace) -> StreamSettings | None:
    return None if arguments.max_streams is None else StreamSettings(arguments.max_streams)


def serving_options(arguments: Namespace, artifacts: Artifacts) -> dict[str, Any]:
    """What the command line says of a server on a CPU, for `write_repository`."""
    return _given(
        arguments,
        engine=arguments.engine,
        threads=arguments.threads,
        instances=_instances(arguments, artifacts),
        max_batch=arguments.max_batch,
        call_denoiser=arguments.call_denoiser,
        streams=_streams(arguments),
    )


def _count(arguments: Namespace, of: str) -> int | None:
    """--instances of what has but one number of them; what comes later counts. of: that they are of."""
    found = None
    for model, found in arguments.instances or []:
        if model is not None:
            raise UserError(f"--instances {model}={found} is for exported graphs on a CPU: say how many {of}")
    return found


def _packages(folder: Path) -> Packages:
    """Compiled packages; with PyTorch, which nothing else here wants."""
    from mubic_deploy.engines.aotinductor import Packages

    return Packages.open(folder)


def package_options(arguments: Namespace) -> dict[str, Any]:
    """What the command line says, for `write_package_repository`."""
    if arguments.max_batch is not None or arguments.call_denoiser is not None:
        raise UserError("--max-batch and --call-denoiser are for exported graphs on a CPU: leave them out")
    counts = {"threads": arguments.threads, "instances": _count(arguments, "processes")}
    return _given(arguments, **counts, streams=_streams(arguments))


def serve(arguments: Namespace) -> int:
    """A Triton server in the foreground."""
    import tempfile

    from mubic_deploy.triton.repository import write_package_repository, write_repository
    from mubic_deploy.triton.server import TritonServer
    from mubic_deploy.triton.server import serve as run_server

    served: Folder
    write: Callable[..., None]
    options: dict[str, Any] = {}
    if arguments.engine == AOTINDUCTOR:
        weights_seed(built(arguments), arguments.seed)
        served = packages = _packages(arguments.artifacts)
        packages.require()  # else a model's process would say it
        options["timeout"] = PACKAGES_START_S
        write = functools.partial(write_package_repository, packages, **package_options(arguments))
    else:
        served = artifacts = artifacts_of(arguments, arguments.seed)
        write = functools.partial(write_repository, artifacts, **serving_options(arguments, artifacts))
    with contextlib.ExitStack() as starting, tempfile.TemporaryDirectory(prefix="mubic-repository-") as folder:

        def ready(server: TritonServer) -> None:
            starting.close()
            warn(untrained(served.source["seed"]))
            say(f"serving {served.config.name} ({served.config.variant}): gRPC {server.url}")
            say(f"  HTTP {server.host}:{server.http_port}, metrics {server.host}:{server.metrics_port}/metrics")
            say(f"  log {server.log}; stop with Ctrl-C")

        starting.enter_context(messages.status("starting Triton"))
        repository = Path(folder) / "models"
        write(out=repository)
        run_server(
            repository,
            on_ready=ready,
            host=arguments.host,
            http_port=arguments.http_port,
            grpc_port=arguments.grpc_port,
            metrics_port=arguments.metrics_port,
            log=arguments.log,
            remove=[Path(folder)],
            **options,
        )
    say("stopped")
    return 0


def repository(arguments: Namespace) -> int:
    """A model repository, for a server of one's own."""
    from mubic_deploy.triton.repository import (
        GpuSettings,
        pool_bytes,
        write_gpu_repository,
        write_package_repository,
        write_repository,
    )
    from mubic_deploy.triton.server import own_command

    options = {"loops": arguments.loops, "cuda_graphs": arguments.cuda_graphs, "warm_up": arguments.warm_up}
    given = {name: value for name, value in options.items() if value is not None}
    served = own_command(arguments.out)
    if arguments.engine == TENSORRT:
        from mubic_deploy.engines.tensorrt import Plans

        if any(option is not None for option in (arguments.threads, arguments.max_batch, arguments.call_denoiser)):
            raise UserError("--threads, --max-batch and --call-denoiser are for a CPU: leave them out")
        given = _given(arguments, **given, instances=_count(arguments, "of each engine, or --loops"))
        plans = Plans.open(arguments.artifacts)
        settings = GpuSettings(**given)
        write_gpu_repository(plans, arguments.out, settings, _streams(arguments) or DEFAULTS)
        served += [f"--cuda-memory-pool-byte-size=0:{pool_bytes(plans, settings)}", "--model-load-thread-count=1"]
        if plans.manifest["version_compatible"]:
            served.append("--backend-config=tensorrt,version-compatible=true")
    elif given:
        raise UserError("--loops, --no-cuda-graphs and --no-warm-up are for --engine tensorrt: leave them out")
    elif arguments.engine == AOTINDUCTOR:
        write_package_repository(_packages(arguments.artifacts), arguments.out, **package_options(arguments))
    else:
        artifacts = Artifacts.open(arguments.artifacts)
        write_repository(artifacts, arguments.out, **serving_options(arguments, artifacts))
    say(f"{arguments.out}: serve it with {shlex.join(served)}")
    say('  with this package on its PYTHONPATH; docs/deployment.md, "A Triton of your own", says what else it wants')
    return 0


def demo(arguments: Namespace) -> int:
    """Export, serve, predict a rendered scene, or a film that was named, through the server, stop."""
    from mubic_deploy.media.film import Film
    from mubic_deploy.predict import check, predict_film
    from mubic_deploy.triton.client import TritonPredictor
    from mubic_deploy.triton.repository import write_repository
    from mubic_deploy.triton.server import TritonServer

    out: Path = arguments.out
    if arguments.video is not None:
        Film(arguments.video).close()  # before a folder is made
    try:
        out.mkdir(parents=True, exist_ok=True)
        film = arguments.video or str(_scene(out / "scene.mp4"))
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror or error}): choose another --out") from None
    files = {"overlay": out / "overlay.mp4", "contact_sheet": out / "contact_sheet.png", "maps": out / "maps.npz"}
    check(film, **files)
    with bar("demo") as progress:
        artifacts = exported.export(DEMO_CHECKPOINT, out / "graphs", progress=progress)
        progress("starting Triton", 0, None)
        write_repository(artifacts, out / "repository")
        log = out / "tritonserver.log"
        with TritonServer(out / "repository", http_port=0, grpc_port=0, metrics_port=0, log=log) as server:
            with TritonPredictor(server.url) as predictor:
                result = predict_film(
                    predictor,
                    film,
                    overlay=files["overlay"],
                    maps=files["maps"],
                    contact_sheet=files["contact_sheet"],
                    progress=lambda done, total: progress("predicting through Triton", done, total),
                )
            progress("stopping Triton", 1, 1)
    warnings = untrained(artifacts.manifest["source"]["seed"]) + result.warnings
    paths = {name: str(path) for name, path in files.items()} | {"graphs": str(artifacts.path), "log": str(log)}
    if arguments.json:
        print_json({"film": film, "maps": result.maps, "frames": result.frames, "warnings": warnings, "files": paths})
        return 0
    warn(warnings)
    say(f"{result.maps} maps of {result.frames} frames of {Path(film).name}, through Triton:")
    for name, path in paths.items():
        say(f"  {name.replace('_', ' '):14} {path}")
    return 0


def _scene(path: Path) -> Path:
    """A film that the demo checkpoint can make sense of, rendered anew: a scene that no training saw."""
    from mubic_deploy.scenes.film import write_film

    with replacing({"scene": path}) as staged:
        write_film(staged["scene"], DEMO_SCENE_SEED)
    return path
