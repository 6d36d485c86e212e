"""The first hearing: what is drawn is what is heard, and it is learned."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mubic_deploy.config import DEMO
from mubic_deploy.errors import UserError
from mubic_deploy.model.mubic import random_model
from mubic_deploy.scenes.plan import KINDS, OFF_SCREEN, SILENCE
from mubic_deploy.training import listen as listening
from mubic_deploy.training.clips import INT16
from mubic_deploy.training.listen import CLASSES, Sounds, listen
from mubic_deploy.training.pretrained import load_vggish

SMALL = replace(DEMO, audio_patch=(32, 48))


@pytest.fixture(scope="module")
def sounds() -> Sounds:
    return Sounds(5, 8)


def test_what_is_drawn_is_what_is_heard_a_quarter_of_a_second_before_the_middle(sounds: Sounds) -> None:
    heard = sounds.draw(np.random.default_rng(0), 60)
    assert heard.audio.shape == (60, 16608)
    found = set()
    for audio, kind, octave in zip(heard.audio.numpy(), heard.kind.tolist(), heard.octave.tolist(), strict=True):
        # where in which scene: the excerpt's own samples, found again
        inner = np.rint(audio[4000:4400] * INT16)
        for plan, sound in zip(sounds.plans, sounds.sounds, strict=True):
            spots = np.flatnonzero(sound == inner[0])
            start = next((s for s in spots if np.array_equal(sound[s : s + 400], inner)), None)
            if start is None:
                continue
            time_s = (start - 4000 + 8304) / 16_000
            who = int(plan.heard(np.array([time_s - 0.25]))[0])
            assert who != OFF_SCREEN
            if who == SILENCE:
                assert CLASSES[kind] == "silence"
                assert np.isnan(octave)
            else:
                assert CLASSES[kind] == plan.candidates[who].kind
                assert octave == pytest.approx(np.log2(plan.candidates[who].pitch / 300), abs=1e-5)
            found.add(kind)
            break
        else:
            pytest.fail("an excerpt is of none of the scenes")
    assert len(found) >= 3


def test_it_learns_to_tell_the_kinds_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "SCENES", 24)
    monkeypatch.setattr(listening, "CHECKED", 8)
    said: list[tuple[int, int]] = []
    encoder, right, octaves = listen(SMALL, 1, 60, lambda _, done, total: said.append((done, total)))
    assert right > 0.6  # the most frequent one is a third
    assert octaves < 0.8
    assert said[-1] == (60, 60)
    # what is learned is in the features: they tell sounds apart better than those it began with
    audio = Sounds(9, 6).draw(np.random.default_rng(1), 24).audio

    def spread(module: torch.nn.Module) -> float:
        with torch.no_grad():
            features = module(audio)[0].mean((2, 3, 4))
        return float(features.std(0).mean() / features.abs().mean())

    assert spread(encoder) > 1.5 * spread(random_model(SMALL, 1).audio_encoder)


def test_the_command_leaves_a_file_that_train_takes(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "SCENES", 2)
    monkeypatch.setattr(listening, "CHECKED", 2)
    out = tmp_path / "hearing.safetensors"
    report = json.loads(run("listen", out, "--steps", 10, "--json").out)
    assert set(report) == {"weights", "kinds_right", "octaves_off", "seconds"}
    model = random_model(DEMO)
    loaded = load_vggish(model, out)
    assert loaded.format == "MUBiC audio encoder"
    assert not loaded.missing
    weights = load_file(out)
    for name, value in model.audio_encoder.state_dict().items():
        assert torch.equal(value, weights[f"audio_encoder.{name}"])
    with pytest.raises(UserError, match="make one with mubic-deploy listen --config demo"):
        load_vggish(random_model(replace(DEMO, vggish_channels=(16, 32, 64, 48))), out)
    assert run("listen", tmp_path / "no" / "h.safetensors").code == 2
    assert run("listen", tmp_path / "h.pth").code == 2
    ran = run("listen", tmp_path / "h.safetensors", "--steps", 2)
    assert (ran.code, ran.err) == (2, "mubic-deploy: steps 2 is out of range: use 10 or more\n")
    assert not (tmp_path / "h.safetensors").exists()
    assert len(KINDS) + 1 == len(CLASSES)
