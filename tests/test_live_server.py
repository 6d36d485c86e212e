"""The model `mubic_stream` in the real server, over toy graphs."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import toy_graphs
from live_sequence import FPS, Answer, Sequences, check, expected, frames, sound, times
from triton_serving import serving

from mubic_deploy.config import get_config
from mubic_deploy.engines.cpu import load_engines
from mubic_deploy.live.packets import Decoder, Encoder
from mubic_deploy.pipeline import Pipeline
from mubic_deploy.triton.server import TritonServer

pytest_plugins = ("triton_fixtures",)


@pytest.fixture
def sequences(toy_server: TritonServer) -> Iterator[Sequences]:
    with Sequences(toy_server.url) as client:
        yield client


def stream(
    client: Sequences, sequence: int | str, video: np.ndarray, audio: np.ndarray, seed: int, **settings: object
) -> list[Answer]:
    """Everything in parts of random size, frames and sound each in their own time."""
    rng = random.Random(seed)
    answers = client.ask(sequence, start=True, **settings)
    at = heard = 0
    while at < len(video) or heard < len(audio):
        more, samples = min(rng.randint(0, 9), len(video) - at), min(rng.randint(0, 6000), len(audio) - heard)
        tensors: dict[str, object] = {}
        if more:
            tensors |= {"FRAMES": video[at : at + more], "FRAME_TIME": times(more, at)}
        if samples:
            tensors |= {"SOUND": audio[heard : heard + samples], "SOUND_TIME": heard / 16_000}
        at, heard = at + more, heard + samples
        answers += client.ask(sequence, **tensors)
    return answers + client.ask(sequence, end=True)


@pytest.mark.parametrize(("stride", "sequence"), [(1, 11), (4, "a camera"), (20, 12)])
def test_maps_of_a_stream(sequences: Sequences, toy_pipeline: Pipeline, stride: int, sequence: int | str) -> None:
    video, audio = frames(45), sound(45 * 640)
    answers = stream(sequences, sequence, video, audio, 5, STRIDE=stride, SEED=3, STEPS=2)
    check(answers, expected(toy_pipeline, video, audio, stride, 3, 2), steps=2)
    assert answers[0]["HEARD"][0] == pytest.approx((5120 + 8304) / 16_608)


def test_a_window_is_answered_as_soon_as_it_is_complete(sequences: Sequences, toy_pipeline: Pipeline) -> None:
    video, audio = frames(20), sound(20_000)
    assert sequences.ask(1, start=True, STRIDE=4, FRAMES=video[:16], FRAME_TIME=times(16), SOUND=audio[:13_423]) == []
    first = sequences.ask(1, SOUND=audio[13_423:13_424])
    both = sequences.ask(1, FRAMES=video[16:], FRAME_TIME=times(4, 16), SOUND=audio[13_424:])
    maps = expected(toy_pipeline, video, audio, 4, 0, 4)
    check(first, {8: maps[8]})
    check(both, {12: maps[12]})
    assert sequences.ask(1, end=True) == []


def test_several_windows_of_one_request(sequences: Sequences, toy_pipeline: Pipeline) -> None:
    video = frames(19)
    answers = sequences.ask(2, True, True, STRIDE=1, FRAMES=video, FRAME_TIME=times(19), SOUND_END=True)
    check(answers, expected(toy_pipeline, video, np.zeros(0, np.float32), 1, 0, 4))
    assert [a["HEARD"][0] for a in answers] == [0] * 4


def test_a_short_stream(sequences: Sequences, toy_pipeline: Pipeline) -> None:
    video = frames(10)
    (answer,) = sequences.ask(3, True, True, FRAMES=video, FRAME_TIME=times(10))
    whole = np.concatenate([video, np.repeat(video[-1:], 6, axis=0)])
    check([answer], expected(toy_pipeline, whole, np.zeros(0, np.float32), 4, 0, 4))


def test_windows_that_are_not_wanted(sequences: Sequences, toy_pipeline: Pipeline) -> None:
    video = frames(24)
    answers = sequences.ask(4, True, SKIP=[8, 16], SOUND_END=True, FRAMES=video[:20], FRAME_TIME=times(20))
    answers += sequences.ask(4, end=True, FRAMES=video[20:], FRAME_TIME=times(4, 20))
    maps = expected(toy_pipeline, video, np.zeros(0, np.float32), 4, 0, 4)
    check(answers, {12: maps[12]})


def test_going_on_after_an_outage(sequences: Sequences, toy_pipeline: Pipeline) -> None:
    video, audio = frames(40), sound(40 * 640)
    answers = sequences.ask(
        5,
        True,
        True,
        FRAME_INDEX=np.arange(12, 40),
        FRAMES=video[12:],
        FRAME_TIME=times(28, 12),
        SOUND=audio[3000:],
        SOUND_TIME=3000 / 16_000,
    )
    maps = expected(toy_pipeline, video, audio, 4, 0, 4)
    check(answers, {index: maps[index] for index in (20, 24, 28, 32)})


@pytest.mark.parametrize(("encoding", "smaller"), [("jpeg", 9), ("h264", 9)])
def test_encoded_frames(sequences: Sequences, toy_pipeline: Pipeline, encoding: str, smaller: float) -> None:
    video = frames(20)
    encode, decode = Encoder(encoding, (112, 192)), Decoder(encoding, (112, 192))
    packets = [encode(frame) for frame in video]
    decoded = np.stack([decode(packet) for packet in packets])
    assert np.abs(decoded.astype(int) - video).mean() < 8
    assert sum(len(packet) for packet in packets) < video.nbytes / smaller
    answers = sequences.ask(6, True, ENCODING=encoding.encode(), SOUND_END=True)
    for i, packet in enumerate(packets):
        answers += sequences.ask(6, PACKETS=[packet], FRAME_TIME=times(1, i))
    check(answers + sequences.ask(6, end=True), expected(toy_pipeline, decoded, np.zeros(0, np.float32), 4, 0, 4))


def test_streams_side_by_side(sequences: Sequences, toy_pipeline: Pipeline) -> None:
    """Requests of four streams in one another's way, none waiting for an answer."""
    videos, audio = [frames(24, seed) for seed in range(4)], sound(24 * 640)
    sent = {}
    for at in range(0, 24, 8):
        for i, video in enumerate(videos):
            request = sequences.send(
                f"camera {i}",
                start=at == 0,
                end=at == 16,
                FRAMES=video[at : at + 8],
                FRAME_TIME=times(8, at),
                SOUND=audio[640 * at : 640 * (at + 8)],
                SOUND_TIME=at / FPS,
                **({"SEED": i} if at == 0 else {}),
            )
            sent[request] = i
    found: dict[int, list[Answer]] = {i: [] for i in range(4)}
    left = len(sent)
    while left:
        request, final, what = sequences.answers.get(timeout=60)
        assert isinstance(what, Answer), what
        if what:
            found[sent[request]].append(what)
        left -= final
    for i, answers in found.items():
        check(answers, expected(toy_pipeline, videos[i], audio, 4, i, 4))


def test_visual_only(tmp_path: Path) -> None:
    artifacts = toy_graphs.write(get_config("demo", "visual_only"), tmp_path / "toy")
    video = frames(16)
    with serving(artifacts, tmp_path) as server, Sequences(server.url) as client:
        (answer,) = client.ask(1, start=True, FRAMES=video, FRAME_TIME=times(16))
    pipeline = Pipeline(artifacts.config, load_engines("onnxruntime", artifacts))
    maps, _ = pipeline.predict(video[None], np.zeros((1, 16_608), np.float32), 0)
    np.testing.assert_allclose(answer["SALIENCY"], maps[0], atol=1e-5)
