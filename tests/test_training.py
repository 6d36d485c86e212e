"""Algorithm 1: the objective by hand, the schedules as in the thesis, runs that are stopped, killed and resumed."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from field_data import SPECS, write_field
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torchvision.ops import StochasticDepth

from mubic_deploy import checkpoint
from mubic_deploy.config import DEMO, get_config
from mubic_deploy.diffusion import alpha_bar
from mubic_deploy.errors import UserError
from mubic_deploy.folders import replacing
from mubic_deploy.model.mubic import random_model
from mubic_deploy.training import train as training
from mubic_deploy.training.clips import Clips
from mubic_deploy.training.evaluate import centre_bias, evaluate_maps
from mubic_deploy.training.layout import digest
from mubic_deploy.training.machine import Machine
from mubic_deploy.training.objective import Draw, Objective, draw
from mubic_deploy.training.run import Run, write_json
from mubic_deploy.training.settings import RECIPES, Settings
from mubic_deploy.training.state import State, load_state, save_state
from mubic_deploy.training.train import train

# everything random is switched on
QUICK = Settings(
    config="demo", epochs=2, batch=3, stride=4, validate=2, noises=2, rollout=0.5, stochastic_depth=0.3, seed=5
)
HERE = Machine("cpu", 1, 0)
VISUAL = get_config("demo", "visual_only")


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path)


def same(a: Path, b: Path) -> bool:
    one, other = weights(a), weights(b)
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


TWO = """
import hashlib, os, pathlib, signal, sys
from mubic_deploy.training import train
rank = os.environ.get("LOCAL_RANK", "0")
train.SAVE_S = 0.0 if rank == "0" else 1e9  # clocks that disagree about every save
fit, save = train.Trainer.fit, train.Trainer._save

def fit_and_tell(self):
    fit(self)
    weights = b"".join(p.detach().numpy().tobytes() for p in self.model.parameters())
    pathlib.Path(__file__).with_suffix("." + rank).write_text(hashlib.sha256(weights).hexdigest())

def save_and_die(self, *where):
    save(self, *where)
    os.killpg(0, signal.SIGKILL)

train.Trainer.fit = fit_and_tell
if "--resume" not in sys.argv and "dies" in pathlib.Path(__file__).stem:
    train.Trainer._save = save_and_die
from mubic_deploy.cli import main
sys.exit(main())
"""


def on_two_devices(data: Path, out: Path, *options: object) -> subprocess.CompletedProcess[str]:
    """`mubic-deploy train` in two processes on the CPU, ended with all that it started after a while."""
    script = out.with_suffix(".py")
    script.write_text(TWO)
    given = ("train", data, "--out", out, "--config", "demo", "--batch", 4, "--validate", 1, *options)
    machine = ("--accelerator", "cpu", "--workers", 0, "--devices", 2)
    command = [sys.executable, str(script), *map(str, given + machine)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out_text, err_text = process.communicate(timeout=120)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(command, process.returncode, out_text, err_text)


class StopError(Exception):
    """Raised from outside in the middle of a run."""


def stop_at(step: int):
    def progress(text: str, done: int, total: int) -> None:
        if done == step:
            raise StopError

    return progress


# ---- the objective


def test_steps_are_uniform_or_prefer_noise():
    generator = torch.Generator().manual_seed(0)
    steps = draw(DEMO, 20_000, generator).step.double()
    assert (steps.min(), steps.max()) == (0, 999)
    assert abs(steps.mean() - 499.5) < 8
    noisy = draw(DEMO, 20_000, generator, power=3).step.double()
    # P(t > 0.9 T) = P(u^3 < 0.1)
    assert abs((noisy >= 900).double().mean() - 0.1 ** (1 / 3)) < 0.01


def test_draw_is_one_row_a_noise():
    drawn = draw(DEMO, 4, torch.Generator().manual_seed(1), noises=3)
    assert drawn.step.shape == drawn.guessed.shape == (12, 1)
    assert drawn.noise.shape == (12, 1, 56, 96)
    assert abs(drawn.noise.std() - 1) < 0.01


def test_mixed_precision_keeps_alpha_whole(monkeypatch):
    """With no noise and an empty map S_t is -sqrt(alpha-bar)."""
    model = random_model(get_config("demo", "visual_only"))
    predict = mock.Mock(side_effect=lambda cond, s_t, step: s_t)
    monkeypatch.setattr(model.denoiser, "predict", predict)
    objective = training.make_fabric(HERE, "bf16-mixed").setup(Objective(model))
    step = torch.tensor([[0], [20], [400]], dtype=torch.int32)
    drawn = Draw(step, torch.zeros(3, 1, 56, 96), torch.zeros(3, 1, dtype=torch.bool))
    objective({"VIDEO": torch.zeros(3, 16, 112, 192, 3, dtype=torch.uint8), "TARGET": torch.zeros(3, 1, 56, 96)}, drawn)
    expected = [-math.sqrt(alpha_bar(t)) for t in (0, 20, 400)]
    np.testing.assert_allclose(predict.call_args.args[1][:, 0, 0, 0].numpy(), expected, rtol=1e-6)


def test_mixed_precision_hears_in_32_bits(monkeypatch):
    """The audio encoder gets what it gets in inference."""
    model = random_model(DEMO)
    audio = 0.5 * torch.sin(torch.arange(16_608) * (2 * math.pi * 440 / 16_000))[None].repeat(2, 1)
    with torch.no_grad():
        expected = model.audio_encoder.patches(audio)
    heard = []
    features = model.audio_encoder.features

    def hears(patches: torch.Tensor) -> torch.Tensor:
        heard.append(patches)
        return features(patches)

    monkeypatch.setattr(model.audio_encoder, "features", hears)
    shapes = {"VIDEO": torch.zeros(2, 16, 112, 192, 3, dtype=torch.uint8), "TARGET": torch.zeros(2, 1, 56, 96)}
    objective = training.make_fabric(HERE, "bf16-mixed").setup(Objective(model))
    objective({**shapes, "AUDIO": audio}, draw(DEMO, 2, torch.Generator().manual_seed(0)))
    torch.testing.assert_close(heard[0], expected, rtol=0, atol=1e-5)


def test_a_guess_takes_the_truths_place_where_it_is_drawn(monkeypatch):
    """With a denoiser whose first guess is 0.75 everywhere, and which else hands S_t through."""
    model = random_model(get_config("demo", "visual_only"))
    first = []

    def predict(cond: Any, s_t: torch.Tensor, step: Any) -> torch.Tensor:
        if not torch.is_grad_enabled():
            first.append(s_t)
            return torch.full_like(s_t, 0.75)
        return s_t

    monkeypatch.setattr(model.denoiser, "predict", predict)
    target = torch.rand(2, 1, 56, 96)
    batch = {"VIDEO": torch.zeros(2, 16, 112, 192, 3, dtype=torch.uint8), "TARGET": target}
    drawn = draw(DEMO, 2, torch.Generator().manual_seed(2), noises=2)
    drawn = drawn._replace(guessed=torch.tensor([[True], [False], [False], [True]]))
    found = Objective(model).predict(batch, drawn)
    assert torch.equal(first[0], drawn.noise)  # the first step begins with the same noise
    for i, clean in enumerate((torch.tensor(0.75), target[0], target[1], torch.tensor(0.75))):
        a = alpha_bar(int(drawn.step[i, 0]))
        expected = math.sqrt(a) * (2 * clean - 1) + math.sqrt(1 - a) * drawn.noise[i]
        torch.testing.assert_close(found[i], expected.expand(1, 56, 96), rtol=1e-5, atol=1e-5)


def test_how_many_are_guessed():
    for rollout in (0.0, 0.25, 1.0):
        share = draw(DEMO, 4000, torch.Generator().manual_seed(1), 1, 1.0, rollout).guessed.float().mean()
        assert float(share) == pytest.approx(rollout, abs=0.03)


def test_loss_is_the_squared_error_summed_over_pixels(monkeypatch):
    """With a denoiser that hands S_t through the loss can be computed by hand, and shows eq. 3.55 too."""
    model = random_model(get_config("demo", "visual_only"))
    monkeypatch.setattr(model.denoiser, "predict", lambda cond, s_t, step: (s_t + 1) / 2)
    target = torch.rand(2, 1, 56, 96)
    batch = {"VIDEO": torch.zeros(2, 16, 112, 192, 3, dtype=torch.uint8), "TARGET": target}
    drawn = draw(DEMO, 2, torch.Generator().manual_seed(2), noises=2)
    loss = Objective(model)(batch, drawn)
    by_hand = []
    for i in range(4):
        a = alpha_bar(int(drawn.step[i, 0]))
        noisy = math.sqrt(a) * (2 * target[i // 2].double() - 1) + math.sqrt(1 - a) * drawn.noise[i].double()
        by_hand.append((((noisy + 1) / 2 - target[i // 2]) ** 2).sum())
    assert float(loss) == pytest.approx(float(torch.stack(by_hand).mean()), rel=1e-5)


@pytest.mark.parametrize("mixed", [False, True], ids=["32", "bf16"])
def test_gradients_reach_every_trained_part(mixed):
    """Also the weights of the denoiser that has made the guess before, which autocast has copies of."""
    model = random_model(DEMO).train()
    training._prepare_modules(model, replace(QUICK, freeze_vggish=False, stochastic_depth=0.0))
    batch = {
        "VIDEO": torch.randint(0, 256, (2, 16, 112, 192, 3), dtype=torch.uint8),
        "AUDIO": torch.rand(2, 16_608) * 2 - 1,
        "TARGET": torch.rand(2, 1, 56, 96),
    }
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        loss = Objective(model)(batch, draw(DEMO, 2, torch.Generator().manual_seed(3), rollout=1.0))
    loss.backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert {name.rsplit(".", 3)[0] for name in without} <= {"fusion.adaptive", "visual_encoder.blocks"}
    # the class token of the last block leads nowhere; all else learns
    for name, p in model.named_parameters():
        if p.grad is not None and not p.grad.any():
            assert name.startswith("visual_encoder.blocks.6."), name
    last = model.get_parameter("visual_encoder.blocks.6.mlp.0.weight").grad
    assert last is not None
    assert last.any()


def test_stochastic_depth_rises_to_its_rate():
    model = random_model(DEMO)
    training._prepare_modules(model, replace(QUICK, stochastic_depth=0.3))
    rates = [m.p for m in model.visual_encoder.modules() if isinstance(m, StochasticDepth)]
    np.testing.assert_allclose(rates, np.linspace(0, 0.3, 7), atol=1e-9)


@pytest.mark.parametrize("settings", [replace(QUICK, batch=4), replace(QUICK, batch=2)], ids=["4", "2"])
def test_two_devices_share_each_batch(shared, tmp_path, settings):
    """7 clips: the last batch is filled up, so that both have as many."""
    seen = []
    for rank in (0, 1):
        clips = Clips(shared, DEMO)
        fabric = mock.Mock(world_size=2, global_rank=rank, is_global_zero=False)
        fabric.setup.side_effect = lambda *modules: modules
        fabric.to_device.side_effect = lambda batch: batch
        model = random_model(get_config("demo", "visual_only"))
        run = Run(tmp_path, settings, [])
        trainer = training.Trainer(fabric, settings, run, model, clips, clips, 0, lambda *_: None)
        monkey = mock.patch.object(Clips, "__getitem__", lambda self, index: {"LABEL": torch.tensor(index)})
        with monkey:
            seen.append([batch["LABEL"].tolist() for _, batch in trainer._batches(0, 0)])
    assert [len(batch) for batch in seen[0]] == [len(batch) for batch in seen[1]]
    whole = [one + other for one, other in zip(*seen, strict=True)]
    order = torch.randperm(7, generator=training.generator(settings.seed, 0)).tolist()
    for i, batch in enumerate(whole):
        wanted = order[i * settings.batch : (i + 1) * settings.batch]
        assert set(wanted) <= set(batch)
        assert len(batch) == len(wanted) + len(wanted) % 2


# ---- the schedules


def test_piecewise_is_the_theses():
    rates = [1e-4 * RECIPES["thesis"].factor(epoch, 0, 100) for epoch in range(12)]
    np.testing.assert_allclose(rates, [1e-4] * 6 + [1e-5] * 3 + [1e-6] * 3)


def test_cosine_and_warmup():
    settings = Settings(schedule="cosine", epochs=4, warmup=10)
    assert settings.factor(0, 0, 100) == pytest.approx(0.1)
    assert settings.factor(0, 9, 100) == pytest.approx(1, abs=1e-2)
    assert settings.factor(2, 0, 100) == pytest.approx((1 + 0.01) / 2)
    assert settings.factor(3, 99, 100) == pytest.approx(0.01, abs=1e-3)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("config", "huge"),
        ("variant", "none"),
        ("schedule", "step"),
        ("precision", "8"),
        ("fit", "squeeze"),
        ("epochs", 0),
        ("batch", -1),
        ("warmup", -1),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("timestep_power", 0.5),
        ("stochastic_depth", 1.0),
    ],
)
def test_settings_out_of_range(field, value):
    with pytest.raises(UserError, match=field.replace("_", " ")):
        Settings(**{field: value})


# ---- runs


@pytest.fixture(scope="module")
def whole(shared, tmp_path_factory) -> Path:
    """A run of 2 epochs, 3 steps each, without a stop."""
    out = tmp_path_factory.mktemp("whole")
    train(QUICK, shared, shared, out, machine=HERE)
    return out


def test_run_leaves_what_it_promises(whole):
    history = json.loads((whole / "history.json").read_text())
    assert [e["epoch"] for e in history] == [1, 2]
    assert {"loss", "learning_rate", "cc", "nss", "sim", "auc_judd"} <= history[0].keys()
    assert history[0]["learning_rate"] == pytest.approx(1e-4)
    assert history[1]["learning_rate"] == pytest.approx(1e-5)  # the second half
    best = max(history, key=lambda e: e["cc"])["epoch"]
    a, b = weights(whole / "best.safetensors"), weights(whole / "model.safetensors")
    trained = [k for k in a if not k.startswith("fusion.adaptive")]  # which is fitted after the last epoch
    assert all(torch.equal(a[k], b[k]) for k in trained) == (best == 2)
    for name in ("curves.png", "samples/epoch_001.png", "samples/epoch_002.png"):
        assert (whole / name).read_bytes().startswith(b"\x89PNG")
    assert any((whole / "tensorboard").iterdir())
    model, _ = checkpoint.load(str(whole / "model.safetensors"))
    assert model.config == DEMO


def test_weights_move_but_vggish_stays(whole):
    before = random_model(DEMO, QUICK.seed).state_dict()
    after = weights(whole / "model.safetensors")
    moved = {k for k, v in after.items() if not torch.equal(v, before[k])}
    assert not [k for k in moved if k.startswith("audio_encoder.vggish")]
    assert len([k for k in moved if k.startswith("visual_encoder")]) > 60
    assert [k for k in moved if k.startswith("fusion.adaptive")]  # fitted at the end


def test_interrupted_at_any_moment_and_resumed_it_has_the_same_weights(whole, shared, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "SAVE_S", 0.0)  # after each step
    with pytest.raises(StopError):
        train(QUICK, shared, shared, tmp_path, machine=HERE, progress=stop_at(2))
    with pytest.raises(StopError):  # in the second epoch, read by other processes
        train(QUICK, shared, shared, tmp_path, resume=True, machine=Machine("cpu", 1, 2), progress=stop_at(5))
    torch.manual_seed(123)  # the global state must not matter
    train(QUICK, shared, shared, tmp_path, resume=True, machine=HERE)
    assert same(tmp_path / "model.safetensors", whole / "model.safetensors")
    assert same(tmp_path / "best.safetensors", whole / "best.safetensors")
    assert json.loads((tmp_path / "history.json").read_text()) == json.loads((whole / "history.json").read_text())


def test_killed_run_resumes(whole, shared, tmp_path):
    """A real process, ended by a signal that nothing can catch, somewhere after its first epoch."""
    options = ["--config", "demo", "--epochs", "2", "--batch", "3", "--validate", "2", "--noises", "2"]
    options += [
        "--stochastic-depth",
        "0.3",
        "--rollout",
        "0.5",
        "--seed",
        "5",
        "--accelerator",
        "cpu",
        "--workers",
        "0",
    ]
    command = [sys.executable, "-m", "mubic_deploy.cli", "train", str(shared[0].root), "--out", str(tmp_path), *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 240
        while not (tmp_path / "state.safetensors").exists() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    checkpoint.load(str(tmp_path / "best.safetensors"))
    train(QUICK, shared, shared, tmp_path, resume=True, machine=HERE)
    assert same(tmp_path / "model.safetensors", whole / "model.safetensors")


def test_two_devices_whose_clocks_disagree_have_the_same_weights_and_answer_once(shared, tmp_path):
    """With the same weights on both, though each has clips and noise of its own. Killed on the way, the run goes on to
    the same ones."""
    options = ("--epochs", 1, "--rollout", 0.5, "--json")
    ran = on_two_devices(shared[0].root, tmp_path / "run", *options)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["checkpoint"] == str(tmp_path / "run" / "model.safetensors")
    assert ran.stderr.count("VGGish is frozen with random weights") == 1
    checkpoint.load(str(tmp_path / "run" / "model.safetensors"))
    assert (tmp_path / "run.0").read_text() == (tmp_path / "run.1").read_text()
    assert on_two_devices(shared[0].root, tmp_path / "dies", *options).returncode == -signal.SIGKILL
    assert load_state(tmp_path / "dies" / "state.safetensors").step == 1
    ran = on_two_devices(shared[0].root, tmp_path / "dies", *options, "--resume")
    assert ran.returncode == 0, ran.stderr
    assert same(tmp_path / "dies" / "model.safetensors", tmp_path / "run" / "model.safetensors")


def test_one_device_that_fails_ends_the_others(shared, tmp_path):
    (tmp_path / "run" / "best.safetensors").mkdir(parents=True)  # what only the first of them writes
    ran = on_two_devices(shared[0].root, tmp_path / "run", "--epochs", 2, "--variant", "no_diffusion")
    assert ran.returncode == 2, ran.stderr
    assert "cannot be written (Is a directory)" in ran.stderr.splitlines()[-1]
    assert "Traceback" not in ran.stderr


def test_full_disk_keeps_the_last_state(shared, tmp_path, monkeypatch):
    """Files may not grow beyond 1 MB from the second epoch on: the system's own refusal, as of a full disk."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(text: str, done: int, total: int) -> None:
        if done == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))

    try:
        with pytest.raises(UserError, match=r"cannot be written.*--resume"):
            train(QUICK, shared, shared, tmp_path, machine=HERE, progress=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.glob(".*"))
    checkpoint.load(str(tmp_path / "best.safetensors"))
    assert load_state(tmp_path / "state.safetensors").epoch == 1


def test_a_save_is_on_the_disk_before_it_takes_the_last_ones_place(tmp_path, monkeypatch):
    """What a machine that loses its power keeps: first the bytes, then the name."""
    done: list[tuple[str, str]] = []
    fsync, replace = os.fsync, Path.replace

    def synced(number: int) -> None:
        done.append(("sync", Path(f"/proc/self/fd/{number}").readlink().name))
        fsync(number)

    def renamed(self: Path, target: Path) -> Path:
        done.append(("rename", target.name))
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    model = random_model(get_config("demo", "visual_only"))
    state = State(QUICK, [], 0, 0, 0.0, {}, [])
    for name, save in {
        "model.safetensors": lambda path: checkpoint.save(model, path),
        "state.safetensors": lambda path: save_state(path, state, model, torch.optim.Adam(model.parameters())),
        "history.json": lambda path: write_json(path, []),
    }.items():
        done.clear()
        save(tmp_path / name)
        assert done == [("sync", name), ("rename", name), ("sync", tmp_path.name)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["history.json", "model.safetensors", "state.safetensors"]


def test_a_run_without_room_for_tensorboard(shared, tmp_path, monkeypatch):
    (tmp_path / "tensorboard").write_text("no folder")
    with pytest.raises(UserError, match=r"tensorboard cannot be written \(File exists\)"):
        train(QUICK, shared, shared, tmp_path, machine=HERE)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", mock.Mock(side_effect=full))
    with pytest.raises(UserError, match=r"cannot be written.*No space left on device"):
        train(QUICK, shared, shared, tmp_path / "full", machine=HERE)


def test_a_damaged_picture_in_a_worker_process_is_one_line(field, tmp_path):
    path = field[0].frame(12)
    path.write_bytes(path.read_bytes()[:-200])
    settings = replace(QUICK, variant="visual_only")
    with pytest.raises(UserError) as caught:
        train(settings, field[:1], field[1:], tmp_path, machine=Machine("cpu", 1, 1))
    assert str(caught.value).startswith(f"{path} is damaged (")
    assert str(caught.value).endswith("): get it again")
    assert "\n" not in str(caught.value)


def test_a_damaged_fixation_map_is_found_before_the_first_step(field, tmp_path):
    """Of a frame that the check does not decode, but the validation after an epoch reads."""
    video = field[0]
    label = next(i for i in (13, 9, 17) if video.fixations(i).exists())
    video.fixations(label).write_bytes(b"no matrix")
    steps = []
    settings = replace(QUICK, variant="no_diffusion", validate=100)
    with pytest.raises(UserError, match=rf"fixMap_{label:05d}\.mat is not a MATLAB file"):
        train(settings, field, field, tmp_path / "run", machine=HERE, progress=lambda *said: steps.append(said))
    assert not steps
    assert not (tmp_path / "run").exists()


def test_a_gpu_short_of_memory(shared, tmp_path, monkeypatch):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    monkeypatch.setattr(Objective, "forward", mock.Mock(side_effect=error))
    with pytest.raises(UserError, match=r"for a training step of 3 clips \(CUDA out of memory.*smaller --batch"):
        train(replace(QUICK, variant="no_diffusion"), shared, shared, tmp_path, machine=HERE)


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_killed_worker_process_is_one_line(shared, tmp_path):
    """As the system kills one where memory is short: here while a step is computed."""

    def kill(text: str, done: int, total: int) -> None:
        for child in multiprocessing.active_children():
            child.kill()
        time.sleep(1)

    settings = replace(QUICK, variant="no_diffusion", batch=1)
    with pytest.raises(UserError, match=r"reads clips was ended \(DataLoader worker .*: use fewer --workers") as caught:
        train(settings, shared, shared, tmp_path, machine=Machine("cpu", 1, 1), progress=kill)
    assert "\n" not in str(caught.value)


def test_clips_that_are_left_out_are_said(field, tmp_path):
    field[0].map(9).unlink()
    Image.new("L", (64, 36)).save(field[1].map(13))
    said: list[str] = []
    with pytest.raises(StopError):
        train(QUICK, field[:1], field[1:], tmp_path, machine=HERE, progress=stop_at(1), note=said.append)
    assert said == [
        "1 of 3 clips of the training part are left out: their map is missing or empty",
        "1 of 4 clips of the test part are left out: their map is missing or empty",
    ]


def test_scaled_gradients_resume_to_the_same_weights(shared, tmp_path, monkeypatch):
    """16-mixed's scaler, too high at first: its first steps are skipped, so that a save has no moments yet."""

    class Scaled(MixedPrecision):
        def __init__(self) -> None:
            scaler = torch.amp.GradScaler("cpu", init_scale=3e38, backoff_factor=0.01)
            super().__init__("16-mixed", "cpu", scaler)

        def forward_context(self) -> contextlib.AbstractContextManager[None]:
            return contextlib.nullcontext()

        def convert_input(self, data: Any) -> Any:
            return data

    monkeypatch.setattr(training, "make_fabric", lambda *_: Fabric(accelerator="cpu", devices=1, plugins=Scaled()))
    monkeypatch.setattr(training, "SAVE_S", 0.0)
    settings = replace(QUICK, variant="no_diffusion", epochs=1, batch=2)
    train(settings, shared, shared, tmp_path / "whole", machine=HERE)
    with pytest.raises(StopError):
        train(settings, shared, shared, tmp_path / "cut", machine=HERE, progress=stop_at(3))
    saved = load_state(tmp_path / "cut" / "state.safetensors")
    assert saved.step == 2
    assert not [name for name in saved.tensors if name.startswith("adam")]
    train(settings, shared, shared, tmp_path / "cut", resume=True, machine=HERE)
    assert same(tmp_path / "cut" / "model.safetensors", tmp_path / "whole" / "model.safetensors")
    first = weights(tmp_path / "cut" / "model.safetensors")
    assert any(not torch.equal(value, saved.tensors[f"model.{name}"]) for name, value in first.items())


def test_the_best_epoch_is_one_whose_metric_is_defined():
    history = [{"epoch": epoch, "cc": cc} for epoch, cc in enumerate((math.nan, 0.1, 0.3, 0.3, math.nan), 1)]
    best = [max(history[:n], key=training._merit)["epoch"] for n in range(1, 6)]
    assert best == [1, 2, 3, 3, 3]


def test_plateau_lowers_the_rate_and_remembers(shared, tmp_path):
    """The rule (a tenth after more than one epoch without a loss 1e-4 lower) worked out from the run's own losses."""
    settings = replace(QUICK, schedule="plateau", epochs=7, learning_rate=1e-9, stride=16, batch=2)
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    train(settings, shared[:1], shared[:1], straight, machine=HERE)
    history = json.loads((straight / "history.json").read_text())
    rate, best, bad = 1e-9, math.inf, 0
    for entry in history:
        assert entry["learning_rate"] == pytest.approx(rate)
        bad = 0 if entry["loss"] < best * (1 - 1e-4) else bad + 1
        best = min(best, entry["loss"])
        if bad > 1:
            rate, bad = rate / 10, 0
    assert rate < 1e-9  # the rule was met
    with pytest.raises(StopError):
        train(settings, shared[:1], shared[:1], stopped, machine=HERE, progress=stop_at(5))
    train(settings, shared[:1], shared[:1], stopped, resume=True, machine=HERE)
    assert json.loads((stopped / "history.json").read_text()) == history


def test_plateau_ends_at_a_hundredth(shared, tmp_path):
    """Table 4.1: 1e-4 to 1e-6."""
    fabric = mock.Mock(world_size=1, global_rank=0, is_global_zero=False)
    fabric.setup.side_effect = lambda *modules: modules
    clips, model = Clips(shared, DEMO), random_model(get_config("demo", "visual_only"))
    settings = replace(QUICK, schedule="plateau")
    run = Run(tmp_path, settings, [])
    plateau = training.Trainer(fabric, settings, run, model, clips, clips, 0, lambda *_: None).plateau
    for _ in range(20):
        plateau.step(1.0)
    assert plateau.optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


def test_what_a_run_refuses(whole, shared, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="holds a run already"):
        train(QUICK, shared, shared, whole, machine=HERE)
    with pytest.raises(UserError, match="no run to resume"):
        train(QUICK, shared, shared, tmp_path, resume=True, machine=HERE)
    strange = tmp_path / "other"
    strange.mkdir()
    (strange / "settings.json").write_text('{"theme": "dark"}')  # of an editor, say
    with pytest.raises(UserError, match=r"other/settings.json is not of a run: choose another --out"):
        train(QUICK, shared, shared, strange, machine=HERE)
    assert [p.name for p in strange.iterdir()] == ["settings.json"]
    assert json.loads((strange / "settings.json").read_text()) == {"theme": "dark"}
    with pytest.raises(UserError, match=r"other settings \(batch 3 instead of 4\)"):
        train(replace(QUICK, batch=4), shared, shared, whole, resume=True, machine=HERE)
    with pytest.raises(UserError, match="other videos"):
        train(QUICK, shared[:1], shared, whole, resume=True, machine=HERE)
    for longer in (replace(shared[0], frames=25), replace(shared[0], fps=30.0)):
        with pytest.raises(UserError, match="other videos"):
            train(QUICK, [longer, *shared[1:]], shared, whole, resume=True, machine=HERE)
    other = write_field(tmp_path / "data", [*SPECS[:2], replace(SPECS[2], click=1)])  # one of the sounds
    assert [str(video) for video in other] == [str(video) for video in shared]
    with pytest.raises(UserError, match="other files under the videos' names"):
        train(QUICK, other, other, whole, resume=True, machine=HERE)
    state = load_state(whole / "state.safetensors")
    with pytest.raises(UserError, match=r"was not begun with 3 devices: resume with --devices 1"):
        train(replace(QUICK, batch=3), shared, shared, whole, resume=True, machine=Machine("cpu", 3, 0))
    with pytest.raises(UserError, match=r"batch 3 cannot be shared by 2 devices"):
        train(QUICK, shared, shared, whole, resume=True, machine=Machine("cpu", 2, 0))
    del state.tensors["model.fusion.adaptive.mlp.0.weight"]
    monkeypatch.setattr("mubic_deploy.training.run.load_state", lambda path: state)
    with pytest.raises(UserError, match=r"does not fit this version \(model\.fusion\.adaptive\.mlp\.0\.weight\)"):
        train(QUICK, shared, shared, whole, resume=True, machine=HERE)
    monkeypatch.undo()
    with pytest.raises(UserError, match="a CPU does not train in 16-mixed"):
        train(replace(QUICK, precision="16-mixed"), shared, shared, tmp_path, machine=HERE)
    (tmp_path / "state.safetensors").write_bytes(b"no state")
    with pytest.raises(UserError, match="no state of a run"):
        train(QUICK, shared, shared, tmp_path, resume=True, machine=HERE)


def clips_of(training_videos, test_videos, jitter: bool = True) -> tuple[Clips, Clips]:
    return Clips(training_videos, VISUAL, jitter=jitter), Clips(test_videos, VISUAL)


@pytest.mark.parametrize(
    "change", ["a label", "a map that jitter may choose", "an empty label", "the parts", "nothing"]
)
def test_other_clips_of_the_same_videos_are_refused(field, tmp_path, change):
    """As where annotations were extracted by halves at the beginning. Neither map is the one that `digest` reads."""
    path = field[1].map(10 if "jitter" in change else 9)
    kept = path.rename(tmp_path / "kept.jpg")
    if change == "an empty label":
        Image.new("L", (64, 36)).save(path)
    run = Run(tmp_path / "run", QUICK, field)
    run.require_clips(*clips_of(field[:2], field[2:]), None)
    state = State(QUICK, run.videos, 0, 1, 0.0, {}, [], clips=run.clips)
    if change not in ("the parts", "nothing"):
        kept.replace(path)
    again = Run(tmp_path / "run", QUICK, field)
    parts = clips_of(field[:1], field[1:]) if change == "the parts" else clips_of(field[:2], field[2:])
    if change == "nothing":
        again.require_clips(*parts, state)
        return
    with pytest.raises(UserError, match=r"run was begun with other clips .*resume with the same data") as caught:
        again.require_clips(*parts, state)
    assert "\n" not in str(caught.value)


def test_a_map_that_no_clip_may_have_does_not_matter(field, tmp_path):
    """Without jitter, of a frame between the labels."""
    kept = field[1].map(10).rename(tmp_path / "kept.jpg")
    before = clips_of(field, field, jitter=False)[0].digest()
    kept.replace(field[1].map(10))
    assert clips_of(field, field, jitter=False)[0].digest() == before


def test_a_run_keeps_by_what_it_knows_its_clips(field, tmp_path):
    """In its state; one of an earlier version has none, and goes on."""
    settings, out = replace(QUICK, variant="visual_only", batch=7, validate=1), tmp_path / "run"
    with pytest.raises(StopError):
        train(settings, field, field, out, machine=HERE, progress=stop_at(2))
    field[1].map(9).rename(tmp_path / "kept.jpg")
    with pytest.raises(UserError, match="run was begun with other clips"):
        train(settings, field, field, out, resume=True, machine=HERE)
    with safe_open(out / "state.safetensors", "pt") as file:
        facts = json.loads(file.metadata()["state"])
    assert facts.pop("clips")
    save_file(weights(out / "state.safetensors"), out / "state.safetensors", {"state": json.dumps(facts)})
    with pytest.raises(StopError):
        train(settings, field, field, out, resume=True, machine=HERE, progress=stop_at(2))


def test_sounds_may_come_and_go_where_nothing_hears_them(field, tmp_path, monkeypatch):
    """In a run of an earlier version, whose digest has the sounds, too."""

    def goes_on(variant: str, data: str) -> bool:
        run = Run(tmp_path / "run", replace(QUICK, variant=variant), field)
        state = State(run.settings, run.videos, 0, 1, 0.0, {}, [], data=data)
        monkeypatch.setattr("mubic_deploy.training.run.load_state", lambda _: state)
        with contextlib.suppress(UserError):
            return run.resume() is state
        return False

    seen = Run(tmp_path / "run", replace(QUICK, variant="visual_only"), field).data
    heard = Run(tmp_path / "run", QUICK, field).data
    assert heard == digest(field) != seen
    assert goes_on("visual_only", seen)
    assert goes_on("visual_only", heard)
    assert goes_on("full", heard)
    for video in field:
        video.sound.unlink()
    assert goes_on("visual_only", seen)
    assert not goes_on("full", heard)


@pytest.mark.parametrize(("clips", "size", "devices"), [(7, 4, 2), (1, 4, 4), (2, 8, 4), (8, 4, 2), (5, 2, 1)])
def test_devices_share_out_every_batch(clips, size, devices):
    order = list(range(10, 10 + clips))
    found = [training.shares(order, size, devices, device) for device in range(devices)]
    assert {len(of) for of in found} == {math.ceil(clips / size)}
    for number, parts in enumerate(zip(*found, strict=True)):
        batch = order[number * size : (number + 1) * size]
        assert {len(part) for part in parts} == {math.ceil(len(batch) / devices)}
        dealt = [clip for turn in zip(*parts, strict=True) for clip in turn]
        assert dealt[: len(batch)] == batch
        assert set(dealt) <= set(order)


def test_a_warm_up_as_long_as_the_run_is_said(shared, tmp_path):
    """7 clips in batches of 7, for two epochs."""
    for warmup, said in ((1, True), (0, False)):
        notes: list[str] = []
        settings = replace(QUICK, variant="visual_only", batch=7, warmup=warmup)
        with pytest.raises(StopError):
            train(
                settings, shared, shared, tmp_path / str(warmup), machine=HERE, progress=stop_at(1), note=notes.append
            )
        found = [
            note for note in notes if note.startswith("the learning rate still rises for the first 1 of the run's 2")
        ]
        assert len(found) == said


def test_two_trainings_into_one_folder(shared, tmp_path):
    """The second is refused at once, new or resumed, while the first one lives; and not after it."""
    out, settings = tmp_path / "runs" / "one", replace(QUICK, variant="visual_only", batch=1)
    reads = mock.patch.object(training, "Clips", side_effect=AssertionError("it reads the data"))

    def second(text: str, done: int, total: int) -> None:
        for resume in (False, True):
            with pytest.raises(UserError) as caught, reads:
                train(settings, shared, shared, out, resume=resume, machine=HERE)
            assert str(caught.value) == f"another training writes to {out}: wait for it or choose another --out"
        with replacing(out / "graphs") as folder:  # nothing else waits for it
            (folder / "file").touch()
        raise StopError

    with pytest.raises(StopError):
        train(settings, shared, shared, out, machine=HERE, progress=second)
    assert sorted(p.name for p in out.iterdir()) == ["graphs", "settings.json", "tensorboard"]
    with pytest.raises(UserError, match="holds no run to resume"):
        train(settings, shared, shared, out, resume=True, machine=HERE)
    with pytest.raises(UserError, match="holds no run to resume"):
        train(settings, shared, shared, tmp_path / "no" / "run", resume=True, machine=HERE)
    assert [p.name for p in tmp_path.iterdir()] == ["runs"]


def test_what_was_read_is_let_go_of_once_it_is_restored(tmp_path):
    """Neither are the tensors kept, nor is the file in memory; weights and moments are those that were saved."""
    path, models = tmp_path / "state.safetensors", [random_model(VISUAL, seed) for seed in (1, 2)]
    adams = [torch.optim.Adam(model.parameters()) for model in models]
    for p in models[0].parameters():
        p.grad = torch.rand_like(p)
    adams[0].step()
    save_state(path, State(QUICK, [], 0, 1, 0.0, {}, []), models[0], adams[0])
    state = load_state(path)
    assert str(path) in Path("/proc/self/maps").read_text()
    state.into(models[1], adams[1])
    assert not state.tensors
    assert str(path) not in Path("/proc/self/maps").read_text()
    for (name, one), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other), name
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(adams[0].state[one][key], adams[1].state[other][key]), (name, key)


def test_it_learns(shared, tmp_path):
    """One video, again and again: better than the best map that does not look."""
    settings = replace(
        QUICK,
        epochs=12,
        stride=2,
        jitter=False,
        learning_rate=3e-3,
        schedule="cosine",
        noises=4,
        timestep_power=3.0,
        rollout=0.0,
        stochastic_depth=0.0,
    )
    train(settings, shared[:1], shared[:1], tmp_path, machine=HERE)
    history = json.loads((tmp_path / "history.json").read_text())
    clips = Clips(shared[:1], DEMO, stride=2)
    blind = evaluate_maps(centre_bias(clips), clips).means()["cc"]
    assert blind > 0.6
    assert history[-1]["cc"] > blind + 0.1
    assert history[-1]["loss"] < 0.15 * history[0]["loss"]
