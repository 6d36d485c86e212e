"""The command line as a user meets it: the whole way through a real server, and what is said to wrong input."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import av
import films
import numpy as np
import pytest
from triton_serving import processes, serving

from mubic_deploy import checkpoint, console
from mubic_deploy.artifacts import Artifacts
from mubic_deploy.cli import guarded, main
from mubic_deploy.config import DEMO, DEMO_FILE, VARIANTS
from mubic_deploy.model.mubic import random_model
from mubic_deploy.triton.server import TritonServer


@pytest.fixture(scope="session")
def film() -> Path:
    """The real clip: 132 frames at 25 frames a second, 1280 x 720, with sound."""
    return films.bunny()


@pytest.fixture(scope="module")
def server(demo_artifacts: Artifacts, tmp_path_factory: pytest.TempPathFactory):
    with serving(demo_artifacts, tmp_path_factory.mktemp("triton")) as running:
        yield running


def test_a_film_through_triton_is_the_film_in_process(
    run, film: Path, demo_artifacts: Artifacts, server: TritonServer, tmp_path: Path
) -> None:
    common = ("predict", film, "--stride", 32, "--seed", 5, "--json")
    here = run(*common, "--artifacts", demo_artifacts.path, "--maps", tmp_path / "here.npz", "-o", tmp_path / "o.mp4")
    there = run(*common, "--engine", f"triton://{server.url}", "--maps", tmp_path / "there.npz")
    eager = run(*common, "--engine", "eager", "--maps", tmp_path / "eager.npz")
    assert here.code == there.code == 0, here.err + there.err
    assert eager.code == 0, eager.err

    report = json.loads(here.out)
    assert set(report) == {"maps", "frames", "steps", "steps_used", "seconds", "warnings"}
    assert (report["maps"], report["frames"], report["steps"]) == (4, 132, 4)
    assert report["steps_used"] == {"4": 4}
    for ran in (here, there, eager):
        assert json.loads(ran.out)["warnings"] == []

    a, b, c = (np.load(tmp_path / f"{name}.npz") for name in ("here", "there", "eager"))
    assert a["maps"].shape == (4, 216, 384)
    assert a["maps"].dtype == np.float32
    assert a["frame_index"].tolist() == list(range(8, 132 - 8 + 1, 32))
    assert a["time_s"] == pytest.approx(a["frame_index"] / 25, abs=1e-3)
    assert np.abs(a["maps"] - b["maps"]).max() < 1e-5
    assert np.abs(a["maps"] - c["maps"]).max() < 1e-4

    with av.open(str(film)) as source, av.open(str(tmp_path / "o.mp4")) as overlay:
        times = [[f.time for f in c.decode(video=0)] for c in (source, overlay)]
        assert times[0] == pytest.approx(times[1], abs=1e-6)
        size = [(c.streams.video[0].width, c.streams.video[0].height) for c in (source, overlay)]
        assert size == [(1280, 720)] * 2
        assert overlay.streams.audio[0].codec_context.name == source.streams.audio[0].codec_context.name


def test_random_weights_are_announced(run, film: Path, tmp_path: Path) -> None:
    command = ("predict", film, "--stride", 128, "--engine", "eager", "--checkpoint", "random:demo")
    ran = run(*command, "--maps", tmp_path / "m.npz", "--json")
    assert "the weights are random (seed 0)" in json.loads(ran.out)["warnings"][0]


def test_demo_leaves_a_film_a_sheet_and_maps_and_no_server(tmp_path: Path) -> None:
    """As `make demo` does, in a process of its own."""
    command = [sys.executable, "-m", "mubic_deploy.cli", "demo", "--out", str(tmp_path / "out")]
    ran = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    report = json.loads(ran.stdout)
    assert report["film"] == str(tmp_path / "out" / "scene.mp4")
    assert report["frames"] == 150  # 6 s
    assert report["maps"] == 34
    with av.open(report["film"]) as film:
        assert film.streams.audio
    for name in ("overlay", "contact_sheet", "maps", "log"):
        assert Path(report["files"][name]).stat().st_size > 0
    assert not processes(str(tmp_path / "out"))


def test_info_is_an_array_of_every_variant(run) -> None:
    ran = run("info", "--config", "demo", "--json")
    rows = json.loads(ran.out)
    assert [row["variant"] for row in rows] == list(VARIANTS)
    for row in rows:
        assert set(row) == {"config", "variant", "parameters", "parameters_without_vggish", "macs_4_steps"}
    model = random_model(DEMO)
    assert rows[0]["parameters"] == sum(p.numel() for p in model.parameters())
    table = run("info", "--config", "full", "--variant", "concat").out
    assert "77.00" in table  # the thesis's figure beside ours
    assert "184.3" in table


def test_parity_is_a_table_or_json(run, demo_artifacts: Artifacts) -> None:
    ran = run("parity", demo_artifacts.path, "--clips", 1)
    assert ran.code == 0
    assert "SALIENCY" in ran.out
    assert json.loads(run("parity", demo_artifacts.path, "--clips", 1, "--json").out)["ok"] is True


def test_parity_wants_the_weights_that_were_exported(run, demo_artifacts: Artifacts, tmp_path: Path) -> None:
    changed = tmp_path / "demo.safetensors"
    checkpoint.save(random_model(DEMO, 1), changed)
    ran = run("parity", demo_artifacts.path, "--checkpoint", changed, "--clips", 1)
    assert ran.code == 2
    assert f"was not exported from {changed} as it is now: name its weights with --checkpoint" in ran.err


def test_parity_says_how_to_name_weights_that_were_moved(run, demo_artifacts: Artifacts, tmp_path: Path) -> None:
    folder, was = tmp_path / "graphs", tmp_path / "was.safetensors"
    shutil.copytree(demo_artifacts.path, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["source"]["name"] = str(was)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    ran = run("parity", folder, "--clips", 1)
    said = f"{was}, which {folder} was exported from, is not there: name it with --checkpoint"
    assert (ran.code, ran.err) == (2, f"mubic-deploy: {said}\n")
    assert run("parity", folder, "--clips", 1, "--checkpoint", DEMO_FILE).code == 0
    wrong = run("parity", folder, "--clips", 1, "--checkpoint", was)  # as ever
    assert f"checkpoint {was} does not exist: use" in wrong.err


def test_export_is_kept_and_made_again_when_damaged(
    run, film: Path, demo_artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`demo_artifacts` was put into the cache; without --artifacts the same graphs are taken from there."""
    command = ("predict", film, "--stride", 64, "--maps", tmp_path / "m.npz")
    made = (demo_artifacts.path / "manifest.json").stat().st_mtime_ns
    assert run(*command).code == 0
    assert (demo_artifacts.path / "manifest.json").stat().st_mtime_ns == made

    monkeypatch.setenv("MUBIC_CACHE", str(tmp_path / "cache"))
    copy = tmp_path / "cache" / demo_artifacts.path.name
    shutil.copytree(demo_artifacts.path, copy)
    (copy / "fusion.onnx").write_bytes(b"")
    assert run(*command).code == 0
    assert Artifacts.open(copy).manifest["created"] > demo_artifacts.manifest["created"]
    assert [p.name for p in (tmp_path / "cache").glob("[!.]*")] == [copy.name]  # beside its lock


def wrong(*arguments: object, says: str) -> object:
    return pytest.param(arguments, says, id=says)


@pytest.fixture
def bad(tmp_path: Path, demo_artifacts: Artifacts) -> dict[str, Path]:
    """A folder of things that cannot work, by name."""
    text = tmp_path / "text.mp4"
    text.write_text("this is no film")
    sound = tmp_path / "sound.mp4"
    with av.open(str(sound), "w") as out:
        stream = out.add_stream("aac", 16_000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16_000), np.float32), "fltp", "mono")
        frame.sample_rate = 16_000
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    edited = tmp_path / "edited"
    edited.mkdir()
    for file in demo_artifacts.path.iterdir():
        (edited / file.name).write_bytes(file.read_bytes())
    (edited / "fusion.onnx").write_bytes((edited / "fusion.onnx").read_bytes()[:-1] + b"x")
    other = tmp_path / "full.safetensors"
    checkpoint.save(random_model(DEMO), other)
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(films.bunny().read_bytes()[:500_000])
    return {
        "cut": cut,
        "film": films.bunny(),
        "folder": tmp_path,
        "text": text,
        "sound": sound,
        "edited": edited,
        "checkpoint": other,
        "graphs": demo_artifacts.path,
        "out": tmp_path / "out.mp4",
        "nowhere": tmp_path / "nowhere" / "out.mp4",
        "missing": tmp_path / "missing.mp4",
    }


LONG = "x" * 300 + ".mp4"
PREDICT = ("predict", "{film}", "-o", "{out}", "--artifacts", "{graphs}")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        wrong("predict", "{missing}", "-o", "{out}", says="missing.mp4"),
        wrong("predict", "{folder}", "-o", "{out}", says="folder"),
        wrong("predict", "{text}", "-o", "{out}", says="text.mp4"),
        wrong("predict", "{sound}", "-o", "{out}", says="sound.mp4"),
        wrong("predict", "{film}", says="nothing to write"),
        wrong("predict", "{film}", "-o", "{nowhere}", says="does not exist: create it first"),
        wrong("predict", "{film}", "-o", "{folder}/out.txt", says="must end in .mp4"),
        wrong("predict", "{film}", "-o", "{film}", says="is the film itself"),
        wrong(*PREDICT, "--steps", 0, says="0 is no number of steps: use 1 to 12, or adaptive"),
        wrong(*PREDICT, "--steps", 99, says="99 is no number of steps"),
        wrong(*PREDICT, "--steps", "many", says="many is no number of steps"),
        wrong(*PREDICT, "--stride", 0, says="argument --stride: 0 is too small"),
        wrong(*PREDICT, "--seed", -1, says="--seed: -1 is not a whole number, 0 or more"),
        wrong("serve", "--http-port", 93536, says="--http-port: 93536 is no port: use 0 to 65535"),
        wrong(*PREDICT, "--fit", "squeeze", says="--fit"),
        wrong(*PREDICT, "--variant", "concat", says="holds the variant 'full', not 'concat'"),
        wrong(
            "predict", "{film}", "-o", "{out}", "--variant", "concat",
            says="the demo checkpoint is the full model, not 'concat': name random:demo instead",
        ),
        wrong(*PREDICT, "--engine", "tensorflow", says="unknown engine 'tensorflow'"),
        wrong("predict", "file:{film}", "-o", "{film}", says="bunny.mp4 is the film itself"),
        wrong("predict", LONG, "-o", "{out}", says="File name too long"),
        wrong("predict", "{film}", "-o", "{folder}/" + LONG, says="the name is too long: choose a shorter one"),
        wrong(*PREDICT, "--engine", "eager", says="give --checkpoint instead of --artifacts"),
        wrong("predict", "{film}", "-o", "{out}", "--artifacts", "{edited}", says="SHA-256 differs"),
        wrong("predict", "{film}", "-o", "{out}", "--artifacts", "{folder}", says="holds no manifest.json"),
        wrong(
            "predict", "{film}", "-o", "{out}", "--checkpoint", "{checkpoint}", "--variant", "visual_only",
            says="holds the variant 'full', not 'visual_only'",
        ),
        wrong("predict", "{film}", "-o", "{out}", "--checkpoint", "{text}", says="is not a MUBiC checkpoint"),
        wrong("predict", "{film}", "-o", "{out}", "--engine", "triton://127.0.0.1:9", says="no Triton server answers"),
        wrong("predict", "{film}", "-o", "{out}", "--engine", "triton://x", says="is no address of a Triton server"),
        wrong("stream", "{film}", "--url", "127.0.0.1:9", says="no Triton server answers"),
        wrong("stream", "{missing}", "--url", "127.0.0.1:9", says="missing.mp4 does not exist"),
        wrong("stream", "udp://127.0.0.1:9", "--url", "127.0.0.1:9", "--realtime", says="--realtime is for files"),
        wrong("stream", "http://127.0.0.1:9/x", "--url", "127.0.0.1:9", says="http://127.0.0.1:9/x cannot be opened"),
        wrong("stream", "{film}", "--url", "127.0.0.1:9", "--ndjson", "{out}", says="must end in .ndjson"),
        wrong("stream", "{film}", "--url", "127.0.0.1:9", "--ndjson", "-", "--json", says="give --ndjson a file"),
        wrong("serve", "--artifacts", "{edited}", says="SHA-256 differs"),
        wrong("demo", "--video", "{missing}", "--out", "{folder}", says="missing.mp4"),
        wrong("demo", "--video", "{missing}", "--out", "{folder}/new/deep", says="missing.mp4"),
        wrong("demo", "--out", "{text}", says="choose another --out"),
        wrong("predict", "{film}", "--contact-sheet", "{folder}/s.png", says="a contact sheet comes beside"),
        wrong("predict", "{film}", "--colour", "red", says="--colour red (see mubic-deploy predict --help)"),
        wrong("repository", "{folder}", "--out", "{out}", "--loops", "2", says="for --engine tensorrt: leave them out"),
        wrong("predict", "{cut}", "-o", "{out}", says="cut.mp4 ends before its index"),
        wrong("export", "random:huge", "--out", "{folder}/x", says="unknown checkpoint 'random:huge'"),
        wrong("export", "random:demo", "--out", "{text}", says="is not an earlier export"),
        wrong("export", "demo", "--seed", 0, "--out", "{folder}/x", says="no weights are drawn for demo"),
        wrong("export", "{checkpoint}", "--seed", 3, "--out", "{folder}/x", says="safetensors: leave out their seed 3"),
        wrong("serve", "--checkpoint", "demo", "--seed", 3, says="leave out their seed 3, or name random:SIZE"),
        wrong("serve", "--artifacts", "{graphs}", "--seed", 3, says="no weights are drawn for"),
        wrong("parity", "{folder}", says="holds no manifest.json"),
        wrong("info", "--config", "huge", says="invalid choice: 'huge'"),
        wrong("prophesy", says="invalid choice: 'prophesy'"),
        wrong(says="COMMAND"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_line_and_leaves_nothing(run, bad: dict[str, Path], arguments: tuple, says: str) -> None:
    before = sorted(bad["folder"].rglob("*"))
    ran = run(*[str(a).format(**bad) for a in arguments])
    assert ran.code == 2
    assert ran.out == ""
    assert says in ran.err
    assert ran.err.startswith("mubic-deploy: ")
    assert ran.err.count("\n") == 1, ran.err
    assert sorted(bad["folder"].rglob("*")) == before


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_output_that_nobody_reads(options: list[str]) -> None:
    command = [sys.executable, "-m", "mubic_deploy.cli", "info", "--config", "demo", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.close()
        assert running.stderr.read() == "mubic-deploy: whatever read the standard output has ended\n"
        assert running.wait(30) == 2


def test_a_full_disk_behind_the_output() -> None:
    command = [sys.executable, "-m", "mubic_deploy.cli", "info", "--config", "demo", "--json"]
    with Path("/dev/full").open("w") as full:
        ran = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    says = "standard output, or the folder for temporary files, cannot be written (No space left on device): make room"
    assert (ran.returncode, ran.stderr) == (2, f"mubic-deploy: {says}\n")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"mubic-deploy {metadata.version('mubic-deploy')}\n"


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    """Which other readers than Python's refuse: a metric may be undefined for all clips."""
    console.print_json({"cc": math.nan, "rows": [{"nss": -math.inf}, {"sim": 0.5}]})
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {
        "cc": None,
        "rows": [{"nss": None}, {"sim": 0.5}],
    }


def test_a_port_in_use_is_named(run, demo_artifacts: Artifacts) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        free = ("--http-port", 0, "--metrics-port", 0, "--log", os.devnull)
        ran = run("serve", "--artifacts", demo_artifacts.path, "--grpc-port", port, *free)
    assert ran.code == 2
    assert f"gRPC port {port} of 127.0.0.1 cannot be used" in ran.err
    assert ran.err.count("\n") == 1


@pytest.mark.parametrize("name", ["torch", "onnxscript", "tritonclient"])
def test_a_missing_package_is_named(name: str, demo_artifacts: Artifacts, tmp_path: Path) -> None:
    program = (
        f"import sys; sys.modules[{name!r}] = None; from mubic_deploy.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["export", "random:demo", "--out", tmp_path / "x"]
    if name == "tritonclient":
        arguments = ["serve", "--artifacts", demo_artifacts.path, "--log", os.devnull]
    ran = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 2
    assert ran.stderr.startswith(f"mubic-deploy: {name} is missing: install it with: pip install")
    assert ran.stderr.count("\n") == 1


def test_sigterm_leaves_nothing(demo_artifacts: Artifacts, tmp_path: Path) -> None:
    command = ["predict", films.bunny(), "--artifacts", demo_artifacts.path, "-o", tmp_path / "o.mp4", "--stride", "1"]
    running = subprocess.Popen([sys.executable, "-m", "mubic_deploy.cli", *map(str, command)])
    for _ in range(600):
        if list(tmp_path.iterdir()):
            break
        time.sleep(0.05)
    else:
        pytest.fail("nothing was begun")
    running.terminate()
    assert running.wait(30) == 143
    assert not list(tmp_path.iterdir())


def test_serving_and_clients_need_no_torch(demo_artifacts: Artifacts, tmp_path: Path) -> None:
    """Everything but eager, model, checkpoint and export imports and predicts where torch cannot be imported."""
    program = """
import sys
sys.modules.update({name: None for name in ("torch", "torchvision", "torchaudio", "onnx", "safetensors")})
import mubic_deploy.parity, mubic_deploy.metrics, mubic_deploy.triton.repository, mubic_deploy.triton.server
import mubic_deploy.triton.client, mubic_deploy.live.client, mubic_deploy.live.streams
from mubic_deploy.cli import main
sys.exit(main(sys.argv[1:]))
"""
    arguments = ["predict", films.bunny(), "--artifacts", demo_artifacts.path, "--maps", tmp_path / "m.npz"]
    ran = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments), "--stride", "64"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert np.load(tmp_path / "m.npz")["maps"].shape == (2, 216, 384)


def test_a_second_interrupt_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the first one is said."""

    def work() -> int:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr("builtins.print", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
    try:
        assert guarded(work) == 130
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_file_that_may_not_be_read_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> int:
        raise PermissionError(13, "Permission denied", "/somebody/checkpoint")

    assert guarded(work) == 2
    assert capsys.readouterr().err == (
        "mubic-deploy: /somebody/checkpoint may not be read or entered: see its permissions\n"
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_command_on_its_way_out(number: int) -> None:
    """So that what is half-written goes; a SIGHUP that nohup ignores stays ignored."""

    def work() -> int:
        os.kill(os.getpid(), number)
        return 0

    before = signal.signal(number, signal.SIG_DFL)  # the tests may run under nohup
    try:
        with pytest.raises(SystemExit) as ended:
            guarded(work)
        assert ended.value.code == 128 + number
        assert signal.getsignal(number) is signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN)
        assert guarded(work) == 0
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)
