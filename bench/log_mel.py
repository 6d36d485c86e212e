"""The log-mel spectrogram inside the audio encoder's graph against torchaudio in float64, sound by sound."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torchaudio

from bench.results import Row
from bench.sides import onnx_graphs
from mubic_deploy.config import AUDIO_SAMPLES, SAMPLE_RATE
from mubic_deploy.engines import cpu
from mubic_deploy.graphs import Signature, Tensor, audio
from mubic_deploy.model.audio import LogMel

SLICES, HOP, LENGTH = 4, 336, 15_600  # of a window's sound
PADDING = 56  # samples on both sides of a slice's frames of 400, in FFTs of 512
OFFSET = 0.01  # in the logarithm


def rows(folder: Path) -> list[Row]:
    """The largest difference for each sound, of the exported graph and of torchaudio's own float32. folder: for the
    graph."""
    signature = Signature("log_mel", (audio(),), (Tensor("LOG_MEL", "float32", (SLICES, 96, 64)),))
    path = folder / "log_mel.onnx"
    onnx_graphs().trace(LogMel(), signature, path)
    engine = cpu.load_engine("onnxruntime", path, signature)
    found = []
    for name, sound in sounds().items():
        x = torch.tensor(sound[None], dtype=torch.float32)
        expected = reference(x, torch.float64)
        given = {"ONNX Runtime": engine({"AUDIO": x.numpy()})["LOG_MEL"][0]}
        given["torchaudio, float32"] = reference(x, torch.float32)
        for side, got in given.items():
            values = {"largest_difference": float(np.abs(np.asarray(got) - expected).max())}
            found.append(Row("log-mel", side, {"sound": name}, values=values))
    return found


def sounds() -> dict[str, np.ndarray]:
    rng, t = np.random.default_rng(0), np.arange(AUDIO_SAMPLES) / SAMPLE_RATE
    tones = {f"tone {f} Hz, amplitude {a}": a * np.sin(2 * np.pi * f * t) for f in (220, 1000, 5000) for a in (0.5, 1)}
    noises = {"noise": rng.uniform(-1, 1, t.size), "quiet noise": 1e-4 * rng.normal(size=t.size)}
    return {**tones, **noises, "silence": 0 * t}


def reference(sound: torch.Tensor, dtype: torch.dtype) -> np.ndarray:
    """[SLICES, 96, 64] of a sound [1, AUDIO_SAMPLES]."""
    size = {"n_fft": 512, "win_length": 400, "hop_length": 160, "n_mels": 64}
    mel = torchaudio.transforms.MelSpectrogram(SAMPLE_RATE, f_min=125, f_max=7500, power=1, center=False, **size).to(
        dtype
    )
    slices = torch.stack([sound[0, HOP * i : HOP * i + LENGTH] for i in range(SLICES)])
    padded = torch.nn.functional.pad(slices, (PADDING, PADDING)).to(dtype)
    return (mel(padded) + OFFSET).log().mT.numpy()
