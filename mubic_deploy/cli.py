"""The command line, `mubic-deploy`: what can be asked; `commands` does it.

Exit code 0 only on success; 2 with one line on stderr for wrong input; 130 after Ctrl-C. With --json one JSON value
goes to stdout and nothing else does; progress and messages go to stderr."""

from __future__ import annotations

import argparse
import errno
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from mubic_deploy.arguments import Parser, instances, natural, number, port, positive, seconds, steps
from mubic_deploy.config import (
    CONFIGS,
    DEFAULT_STEPS,
    FITS,
    MAX_BATCH,
    MAX_STEPS,
    ON_GPU,
    OPTIMISATIONS,
    PRECISIONS,
    REWRITES,
    VARIANTS,
)
from mubic_deploy.engines import cpu
from mubic_deploy.errors import UserError
from mubic_deploy.graphs import FLOAT16, FLOAT32
from mubic_deploy.live.settings import DEFAULTS, ENCODINGS, ON_LAG, RAW, WAITING
from mubic_deploy.pipeline import AOTINDUCTOR, TENSORRT
from mubic_deploy.sources import versions
from mubic_deploy.training.settings import (
    DATASETS,
    LIGHTNING_PRECISIONS,
    NEGATIVES,
    PARTS,
    RECIPES,
    SCHEDULES,
    SPLITS,
    Settings,
)
from mubic_deploy.triton.server import GRPC_PORT, HTTP_PORT, METRICS_PORT

INSTALL = "install it with: pip install 'mubic-deploy[{}]'"
EXTRAS = {
    **dict.fromkeys(("tritonclient", "grpc", "google"), "client"),
    "pytriton": "serve",
    **dict.fromkeys(("lightning_fabric", "tensorboard", "scipy", "PIL"), "train"),
}  # else torch's
HOMES = {
    **dict.fromkeys(("scenes", "listen", "train", "evaluate", "pack"), "mubic_deploy.training.commands"),
    **dict.fromkeys(("serve", "repository", "demo"), "mubic_deploy.triton.commands"),
    "stream": "mubic_deploy.live.commands",
}  # else commands
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CHECKPOINT_HELP = "a .safetensors file, random:full, random:demo, or demo (default)"


def _weights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--variant", choices=VARIANTS, help="of random weights, or that the file must be of")


def _optimise(parser: argparse.ArgumentParser, choices: Sequence[str], default: str = "none") -> None:
    text = f"a rewrite for a GPU's kernels, same result; may be repeated (default {default})"
    parser.add_argument("--optimise", action="append", choices=choices, help=text)


def _weights_seed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=natural, help="of random weights (default 0)")


def _graphs(parser: argparse.ArgumentParser) -> None:
    """Which graphs: a checkpoint, exported on first use and cached, or a folder of exported ones."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--checkpoint", metavar="C", help=CHECKPOINT_HELP)
    which.add_argument("--artifacts", metavar="DIR", type=Path, help="exported graphs")
    _weights(parser)


def _prediction(parser: argparse.ArgumentParser, stride: int) -> None:
    numbers = (
        f"denoising steps, 1 to {MAX_STEPS}, of no_diffusion 1 (default {DEFAULT_STEPS}, or what the model is fixed to)"
    )
    parser.add_argument("--steps", type=steps, metavar="N|adaptive", help=numbers)
    parser.add_argument("--seed", type=natural, default=0, help="of the noise (default 0)")
    parser.add_argument("--stride", type=positive, default=stride, help=f"frames between two maps (default {stride})")
    _fit(parser)


def _fit(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--fit", choices=FITS, help="how frames meet the model's size (default: as it was trained)")


def _serving(parser: argparse.ArgumentParser) -> None:
    """How a server computes. Unset ones keep the repository's default."""
    parser.add_argument("--threads", type=natural, metavar="N", help="of each graph (default: one a core)")
    many = "processes of each model that computes, or of one model; may be repeated (default 1)"
    parser.add_argument("--instances", type=instances, action="append", metavar="N|MODEL=N", help=many)
    merged = f"clips that a model merges (default {MAX_BATCH}, or the largest batch of packages or engines)"
    parser.add_argument("--max-batch", type=positive, metavar="N", help=merged)
    waits = "microseconds that a request waits for company, in each model (default 0)"
    parser.add_argument("--queue-delay", type=natural, metavar="US", help=waits)
    refused = "refuse a request that waits longer than this in a model's queue (default: never)"
    parser.add_argument("--queue-timeout", type=seconds, metavar="SECONDS", help=refused)
    held = f"live streams that the server holds at once (default {DEFAULTS.max_streams})"
    parser.add_argument("--max-streams", type=positive, metavar="N", help=held)
    calls = "the DDIM loop calls the model denoiser, which merges the steps of several clips"
    parser.add_argument("--call-denoiser", action="store_true", default=None, help=calls)


def _engine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--engine",
        default=cpu.ENGINES[0],
        metavar="E",
        help="openvino (default), onnxruntime, onnxruntime-cuda, eager, eager-cuda, "
        "aotinductor (with --artifacts PACKAGES), tensorrt (with --artifacts ENGINES), "
        "triton://HOST:PORT, or triton://HOST:PORT/mubic_fixed for fixed steps",
    )
    parser.add_argument("--no-cuda-graphs", action="store_true", help="on a GPU: launch kernel by kernel")
    waits = "that a Triton server may take for a request (default 60)"
    parser.add_argument("--timeout", type=seconds, metavar="SECONDS", help=waits)


def _json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON value on stdout")


def _data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="DATA", type=Path, help="folder with video_frames, annotations, fold_lists")
    _folds(parser)


def _folds(parser: argparse._ActionsContainer) -> None:
    which = f"{', '.join(DATASETS)}, or another; may be repeated (default: all that are there)"
    parser.add_argument("--dataset", action="append", metavar="NAME", help=which)
    parser.add_argument("--split", type=int, choices=SPLITS, default=1, help="which fold lists (default 1)")


SETTINGS_HELP: dict[str, tuple[Callable[[str], Any] | None, Sequence[str] | None, str]] = {
    "config": (str, tuple(CONFIGS), "size of the model"),
    "variant": (str, VARIANTS, "full, or an ablation"),
    "epochs": (positive, None, "passes over the data"),
    "batch": (positive, None, "clips a step, over all devices"),
    "learning_rate": (number, None, "of Adam"),
    "schedule": (str, SCHEDULES, "of the learning rate"),
    "warmup": (natural, None, "steps over which the learning rate rises"),
    "noises": (positive, None, "diffusion steps drawn for each clip"),
    "timestep_power": (number, None, "1 draws diffusion steps uniformly, more prefers noisy ones"),
    "rollout": (number, None, "share of samples, 0 to 1, whose noise lies on the model's own guess, as in inference"),
    "stochastic_depth": (number, None, "of the visual encoder's last block"),
    "freeze_vggish": (None, None, "keep VGGish's convolutions as they are"),
    "stride": (positive, None, "frames between the starts of two clips"),
    "fit": (str, FITS, "how frames meet the model's size"),
    "flip": (None, None, "mirror half of the clips"),
    "jitter": (None, None, "start each clip a little later, anew in each epoch"),
    "precision": (str, LIGHTNING_PRECISIONS, "Lightning Fabric's name"),
    "validate": (positive, None, "clips of the test part to evaluate after each epoch"),
    "seed": (natural, None, "of everything random"),
}


def _settings(parser: argparse.ArgumentParser) -> None:
    """An option for each of a run's settings; unset ones keep the recipe's value, which the help has of each recipe
    where they differ."""
    for field in fields(Settings):
        kind, choices, text = SETTINGS_HELP[field.name]
        flag = "--" + field.name.replace("_", "-")
        values = {name: getattr(recipe, field.name) for name, recipe in RECIPES.items()}
        each = ", ".join(f"{name} {value}" for name, value in values.items())
        text = f"{text} (default: {each if len(set(values.values())) > 1 else values['thesis']})"
        if kind is None:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            parser.add_argument(flag, type=kind, choices=choices, default=None, help=text)


def _training(commands: argparse._SubParsersAction) -> None:
    scenes = commands.add_parser("scenes", help="render audio-visual scenes with simulated viewers to train on")
    scenes.add_argument("out", metavar="OUT", type=Path)
    scenes.add_argument("--videos", type=positive, required=True, metavar="N")
    scenes.add_argument("--seed", type=natural, default=0, help="other seeds give other scenes (default 0)")
    scenes.add_argument("--seconds", type=number, default=6.0, help="length of each (default 6)")
    scenes.add_argument("--workers", type=positive, help="processes that render (default: one a core)")
    _json(scenes)

    train = commands.add_parser("train", help="train on a folder in the field's layout; --resume goes on after a stop")
    _data(train)
    train.add_argument("--out", metavar="RUN", type=Path, help="folder of the run")
    train.add_argument("--check", action="store_true", help="only look for what is wrong with the data")
    train.add_argument("--deep", action="store_true", help="decode every picture when the data are checked")
    train.add_argument("--resume", action="store_true", help="go on with the run in --out")
    train.add_argument("--recipe", choices=tuple(RECIPES), help="settings to start from (default thesis)")
    train.add_argument("--checkpoint", metavar="C", help="start from these weights")
    train.add_argument("--visual", metavar="FILE", help="pretrained MViTv2-S: torchvision's or MMAction2's")
    train.add_argument("--vggish", metavar="FILE", help="pretrained VGGish: vggish-10086976.pth, or what `listen` made")
    kinds = "where to train (default auto: a GPU if there is one)"
    train.add_argument("--accelerator", default="auto", choices=("auto", "cpu", "cuda", "mps"), help=kinds)
    train.add_argument("--devices", type=positive, default=1, help="how many (default 1)")
    train.add_argument("--workers", type=natural, default=2, help="processes that read clips (default 2)")
    _settings(train)
    _json(train)

    listen = commands.add_parser(
        "listen", help="teach a small VGGish the sounds of rendered scenes, for train --vggish"
    )
    listen.add_argument("out", metavar="OUT.safetensors", type=Path)
    listen.add_argument("--config", choices=list(CONFIGS), default="demo", help="default demo")
    listen.add_argument("--steps", type=positive, default=600, help="of training, 32 sounds each (default 600)")
    listen.add_argument("--seed", type=natural, default=1, help="of scenes and weights (default 1)")
    _json(listen)

    evaluate = commands.add_parser("evaluate", help="CC, NSS, SIM, AUC-Judd and shuffled AUC, the mean over the videos")
    _data(evaluate)
    evaluate.add_argument("--part", choices=(*PARTS, "all"), default="test", help="which fold lists (default test)")
    evaluate.add_argument("--sounds", action="store_true", help="also with the sound muted, swapped and shifted by 1 s")
    negatives = f"of s-AUC: fixations of other videos, or of all frames of the own one (default {NEGATIVES[0]})"
    evaluate.add_argument("--negatives", choices=NEGATIVES, default=NEGATIVES[0], help=negatives)
    evaluate.add_argument("--baselines", action="store_true", help="also the mean map of all videos, and of each")
    saved = "the predicted maps, at the size of the true ones, 8-bit grey: DATASET/VIDEO/eyeMap_00001.png"
    evaluate.add_argument("--save-maps", type=Path, metavar="DIR", help=saved)
    _engine(evaluate)
    _graphs(evaluate)
    _prediction(evaluate, stride=8)
    _json(evaluate)

    pack = commands.add_parser("pack", help="a checkpoint's weights in FP16, half the size")
    pack.add_argument("checkpoint", metavar="CHECKPOINT", type=Path)
    pack.add_argument("out", metavar="OUT.safetensors", type=Path)
    fit = "fit the adaptive steps to the packed weights, on clips of this folder's test part"
    pack.add_argument("--fit-steps", metavar="DATA", dest="data", type=Path, help=fit)
    fitting = pack.add_argument_group("for --fit-steps")
    _folds(fitting)
    _fit(fitting)
    fitting.add_argument("--clips", type=positive, help="how many (default 64)")
    fitting.add_argument("--stride", type=positive, help="frames between the starts of two (default 4)")
    pack.set_defaults(split=None, fit=None)  # the command has the defaults, to know what was given


def _version() -> str:
    return versions(["mubic-deploy"]).get("mubic-deploy", "of a checkout, not installed")


def build_parser() -> Parser:
    parser = Parser(
        prog="mubic-deploy", description="Where do people look? Audio-visual saliency of films and streams."
    )
    parser.add_argument("--version", action="version", version=f"mubic-deploy {_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    info = commands.add_parser("info", help="parameters and MACs of each variant, beside the thesis's")
    info.add_argument("--config", choices=list(CONFIGS), help="only this size")
    info.add_argument("--variant", choices=VARIANTS, help="only this variant")
    _json(info)

    export = commands.add_parser("export", help="trace a checkpoint to ONNX graphs, checked against eager PyTorch")
    export.add_argument("checkpoint", metavar="CHECKPOINT", help=CHECKPOINT_HELP)
    export.add_argument("--out", metavar="DIR", type=Path, required=True)
    export.add_argument("--precision", choices=PRECISIONS, default=PRECISIONS[0], help=f"default {PRECISIONS[0]}")
    fixed = "also the loop of N steps as one graph, for the lowest latency"
    export.add_argument("--fixed-steps", type=positive, metavar="N", help=fixed)
    _optimise(export, OPTIMISATIONS)
    _weights(export)
    _weights_seed(export)
    _json(export)

    engines = commands.add_parser(
        "engines", help="build TensorRT engines of exported graphs, on the GPU that runs them"
    )
    best = "what export made, best with --precision float16"
    engines.add_argument("artifacts", metavar="GRAPHS", type=Path, help=best)
    engines.add_argument("--out", metavar="DIR", type=Path, required=True)
    largest = f"largest batch (default {MAX_BATCH})"
    engines.add_argument("--max-batch", type=positive, default=MAX_BATCH, help=largest)
    engines.add_argument("--best-batch", type=positive, default=1, help="batch to choose kernels for (default 1)")
    engines.add_argument("--level", type=natural, default=4, help="0, quick to build, to 5, quick to run (default 4)")
    engines.add_argument("--version-compatible", action="store_true", help="to run with later minor versions too")
    engines.add_argument("--no-cuda-graphs", action="store_true", help="launch kernel by kernel when checking")
    engines.add_argument("--timing-cache", type=Path, metavar="FILE", help="kernel timings, kept from build to build")
    _json(engines)

    compiled = commands.add_parser("compile", help="compile a checkpoint with AOTInductor, on the machine that runs it")
    compiled.add_argument("checkpoint", metavar="CHECKPOINT", help=CHECKPOINT_HELP)
    compiled.add_argument("--out", metavar="DIR", type=Path, required=True)
    compiled.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")
    by_device = f"default {FLOAT16} on cuda, {FLOAT32} on a CPU"
    compiled.add_argument("--precision", choices=PRECISIONS, help=by_device)
    compiled.add_argument("--max-batch", type=positive, default=MAX_BATCH, help=largest)
    compiled.add_argument("--fixed-steps", type=positive, metavar="N", help=fixed)
    _optimise(compiled, REWRITES, f"on cuda {', '.join(ON_GPU)}, on a CPU none")
    compiled.add_argument("--autotune", action="store_true", help="measure all kernels there are to choose from")
    at_once = "parts to compile at once, each in a process (default: one a core on cuda, 1 on a CPU)"
    compiled.add_argument("--jobs", type=positive, metavar="N", help=at_once)
    _weights(compiled)
    _weights_seed(compiled)
    _json(compiled)

    predict = commands.add_parser("predict", help="a film in, its saliency out")
    predict.add_argument("video", metavar="VIDEO")
    predict.add_argument("-o", "--overlay", metavar="OVERLAY.mp4", type=Path, help="the film with its saliency over it")
    predict.add_argument("--maps", metavar="MAPS.npz", type=Path, help="the maps, their frames and times")
    predict.add_argument("--contact-sheet", metavar="SHEET.png", type=Path, help="a picture of some frames and maps")
    _engine(predict)
    _graphs(predict)
    _prediction(predict, stride=4)
    predict.add_argument("--batch", type=positive, default=1, metavar="N", help="clips at once (default 1; for a GPU)")
    _json(predict)

    serve = commands.add_parser("serve", help="run a Triton server until Ctrl-C")
    _graphs(serve)
    _weights_seed(serve)
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    serve.add_argument("--http-port", type=port, default=HTTP_PORT, help=f"default {HTTP_PORT}; 0 picks a free one")
    serve.add_argument("--grpc-port", type=port, default=GRPC_PORT, help=f"default {GRPC_PORT}")
    serve.add_argument("--metrics-port", type=port, default=METRICS_PORT, help=f"default {METRICS_PORT}")
    of_packages = f"{AOTINDUCTOR} (with --artifacts PACKAGES)"
    kind = f"{cpu.ENGINES[0]} (default), {cpu.ENGINES[1]}, {of_packages}"
    serve.add_argument("--engine", choices=(*cpu.ENGINES, AOTINDUCTOR), default=cpu.ENGINES[0], help=kind)
    _serving(serve)
    serve.add_argument("--log", type=Path, default=Path("tritonserver.log"), help="default tritonserver.log")

    repository = commands.add_parser("repository", help="write Triton's model repository, for a server of your own")
    repository.add_argument(
        "artifacts", metavar="DIR", type=Path, help="exported graphs, packages, or TensorRT engines"
    )
    of = f"{cpu.ENGINES[0]} (default) or {cpu.ENGINES[1]} of graphs, {AOTINDUCTOR} of packages, {TENSORRT} of engines"
    repository.add_argument("--engine", choices=(*cpu.ENGINES, AOTINDUCTOR, TENSORRT), default=cpu.ENGINES[0], help=of)
    repository.add_argument("--out", metavar="REPOSITORY", type=Path, required=True)
    _serving(repository)
    repository.add_argument("--loops", type=positive, help="tensorrt: instances of the DDIM loop (default 4)")
    off: dict[str, Any] = {"action": "store_const", "const": False}
    repository.add_argument("--no-cuda-graphs", dest="cuda_graphs", help="tensorrt: launch kernel by kernel", **off)
    repository.add_argument("--no-warm-up", dest="warm_up", help="tensorrt: be ready before the first request", **off)

    stream = commands.add_parser(
        "stream", help="a film, a camera or a broadcast to a running server, maps as they come"
    )
    stream.add_argument(
        "source", metavar="SOURCE", help="a file, an address (rtsp://, http://, udp://), /dev/videoN, or - for stdin"
    )
    stream.add_argument("--url", required=True, metavar="HOST:PORT", help="the server's gRPC address")
    stream.add_argument("-o", "--overlay", metavar="OVERLAY.mp4", type=Path, help="the film with its saliency over it")
    stream.add_argument("--maps", metavar="MAPS.npz", type=Path, help="the maps, their frames and times")
    stream.add_argument(
        "--ndjson", metavar="MAPS.ndjson", type=Path, help="a line of JSON a map, at once; - for stdout"
    )
    stream.add_argument(
        "--show", action="store_true", help="a window with the saliency over the frames; q, Esc or closing it ends"
    )
    stream.add_argument("--realtime", action="store_true", help="a file in its own time, not as fast as possible")
    stream.add_argument("--encoding", choices=ENCODINGS, default=RAW, help=f"how frames travel (default {RAW})")
    lag = (
        "where the server is too slow: queue waits (default for files without --realtime), drop gives up the oldest "
        "window (default else)"
    )
    stream.add_argument("--on-lag", choices=ON_LAG, help=lag)
    waiting = ", ".join(f"{on_lag}: {count}" for on_lag, count in WAITING.items())
    stream.add_argument("--max-waiting", type=positive, metavar="N", help=f"windows that may wait (default {waiting})")
    _prediction(stream, stride=4)
    _json(stream)

    parity = commands.add_parser("parity", help="exported graphs against eager PyTorch, as a table")
    parity.add_argument("artifacts", metavar="DIR", type=Path)
    parity.add_argument("--checkpoint", metavar="C", help="where the weights are now, if not where the export says")
    parity.add_argument("--engine", choices=cpu.ENGINES, default=cpu.ENGINES[0], help=f"default {cpu.ENGINES[0]}")
    parity.add_argument("--clips", type=positive, default=3, help="random clips to compare (default 3)")
    _json(parity)

    _training(commands)

    demo = commands.add_parser("demo", help="export, serve, predict a film, stop: the whole way once")
    demo.add_argument("--video", help="a film (default: a rendered scene, which is written beside the results)")
    demo.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="default out")
    _json(demo)
    return parser


def _terminate(signum: int, frame: object) -> NoReturn:
    raise SystemExit(128 + signum)  # on the way out half-written outputs are removed


def main(argv: Sequence[str] | None = None) -> int:
    def work() -> int:
        arguments = build_parser().parse_args(argv)
        # after --help, which shall be quick
        commands = import_module(HOMES.get(arguments.command, "mubic_deploy.commands"))
        return getattr(commands, arguments.command)(arguments)

    return guarded(work)


def guarded(work: Callable[[], int]) -> int:
    """What `work` returns, as an exit code; 2 and one line where it cannot be done, 130 where it was interrupted."""
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
    for each in (signal.SIGTERM, signal.SIGHUP):
        if before[each] != signal.SIG_IGN:  # as nohup has it
            signal.signal(each, _terminate)
    try:
        code = work()
        sys.stdout.flush()  # here, where it can be said that nobody reads it
        return code
    except BrokenPipeError:
        from mubic_deploy.console import forget_stdout

        forget_stdout()
        print("mubic-deploy: whatever read the standard output has ended", file=sys.stderr)
        return 2
    except UserError as error:
        print(f"mubic-deploy: {error}", file=sys.stderr)
        return 2
    except PermissionError as error:
        place = error.filename or error
        print(f"mubic-deploy: {place} may not be read or entered: see its permissions", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        from mubic_deploy.console import forget_stdout

        forget_stdout()  # it may be what is full
        place = error.filename or "standard output, or the folder for temporary files,"
        print(f"mubic-deploy: {place} cannot be written ({error.strerror}): make room", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:  # importlib.metadata's error too
        package = (error.name or "").split(".")[0]
        if package == "mubic_deploy":
            raise
        print(f"mubic-deploy: {package} is missing: {INSTALL.format(EXTRAS.get(package, 'torch'))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # there is nothing left to interrupt
        print("mubic-deploy: interrupted", file=sys.stderr)
        return 130
    finally:
        for each, handler in before.items():
            signal.signal(each, handler if handler is not None else signal.SIG_DFL)


if __name__ == "__main__":
    sys.exit(main())
