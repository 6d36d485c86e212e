"""The model `mubic_stream` in the real server, over toy graphs."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import toy_graphs
from live_sequence import Answer, Sequences
from triton_serving import serving

from mubic_deploy.artifacts import Artifacts
from mubic_deploy.config import get_config
from mubic_deploy.engines.onnxruntime import load_engines
from mubic_deploy.live.packets import Decoder, Encoder
from mubic_deploy.live.settings import StreamSettings
from mubic_deploy.pipeline import Pipeline
from mubic_deploy.triton.server import TritonServer

pytest_plugins = ("triton_fixtures",)

FPS = 25


@pytest.fixture
def sequences(toy_server: TritonServer) -> Iterator[Sequences]:
    with Sequences(toy_server.url) as client:
        yield client


def frames(count: int, seed: int = 0) -> np.ndarray:
    """uint8 [count, H, W, 3]: pictures that differ, with smooth colours."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, 7, 12, 3), np.uint8)
    return coarse.repeat(16, axis=1).repeat(16, axis=2)


def sound(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, count).astype(np.float32)


def times(count: int, first: int = 0) -> np.ndarray:
    return np.arange(first, first + count) / FPS


def expected(pipeline: Pipeline, video: np.ndarray, audio: np.ndarray, stride: int, seed: int, steps: int) -> dict:
    """The map of each window by its middle frame, from frames and sound as a whole."""
    padded = np.concatenate([np.zeros(8304, np.float32), audio, np.zeros(640 * len(video) + 16_608, np.float32)])
    starts = range(0, len(video) - 15, stride)
    clips = np.stack([video[i : i + 16] for i in starts])
    excerpts = np.stack([padded[640 * (i + 8) : 640 * (i + 8) + 16_608] for i in starts])
    maps, _ = pipeline.predict(clips, excerpts, seed, steps)
    return {i + 8: saliency for i, saliency in zip(starts, maps, strict=True)}


def check(answers: list[Answer], maps: dict, steps: int = 4) -> None:
    assert [int(a["MAP_INDEX"][0]) for a in answers] == list(maps)
    for answer in answers:
        index = int(answer["MAP_INDEX"][0])
        np.testing.assert_allclose(answer["SALIENCY"], maps[index], atol=1e-5)
        assert answer["MAP_TIME"][0] == index / FPS
        assert answer["STEPS_USED"].tolist() == [steps]


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


# ---- what cannot be, and the streams that go on


def refused(client: Sequences, sequence: int | str, message: str, **request: object) -> None:
    with pytest.raises(AssertionError, match=message):
        client.ask(sequence, **request)


def test_bad_requests_leave_the_stream_as_it_was(sequences: Sequences, toy_pipeline: Pipeline) -> None:
    video = frames(16)
    sequences.ask(20, start=True, FRAMES=video[:8], FRAME_TIME=times(8), SOUND=sound(5120), SOUND_TIME=0.0)
    refused(
        sequences, 20, "time stamps go back or stand still: frame 8 is at 0.28", FRAMES=video[:1], FRAME_TIME=[0.28]
    )
    refused(sequences, 20, "1 frames with 0 time stamps", FRAMES=video[:1])
    refused(sequences, 20, "unexpected shape for input 'FRAMES'", FRAMES=video[:1, :96], FRAME_TIME=[0.32])
    refused(sequences, 20, "the sound go back: it goes on at 0.1", SOUND=sound(10), SOUND_TIME=0.1)
    refused(sequences, 20, "SOUND holds numbers that are none", SOUND=[np.nan], SOUND_TIME=0.32)
    refused(sequences, 20, "a request holds 65 frames: send 64 at most", FRAMES=frames(65), FRAME_TIME=times(65, 8))
    refused(sequences, 20, "a request holds 61 s of sound", SOUND=np.zeros(61 * 16_000), SOUND_TIME=0.32)
    refused(sequences, 20, "STRIDE, SOUND_RATE after the stream's start", STRIDE=1, SOUND_RATE=16_000)
    refused(sequences, 20, "PACKETS in a stream that began with ENCODING raw", PACKETS=[b"x"], FRAME_TIME=[0.32])
    refused(sequences, 20, "frame number 3 comes after 7", FRAMES=video[:1], FRAME_TIME=[0.32], FRAME_INDEX=[3])
    answers = sequences.ask(20, end=True, FRAMES=video[8:], FRAME_TIME=times(8, 8))
    check(answers, expected(toy_pipeline, video, sound(5120), 4, 0, 4))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"SOUND_RATE": 44_100}, "sound of 44100 Hz: resample it to 16000 Hz"),
        ({"STRIDE": 0}, "stride 0 is out of range"),
        ({"SEED": -1}, "seed -1 is negative"),
        ({"STEPS": 13}, "steps 13 is out of range"),
        ({"ENCODING": b"vp9"}, "unknown encoding 'vp9' of frames: use raw, jpeg, h264"),
    ],
)
def test_bad_settings(sequences: Sequences, settings: dict, message: str) -> None:
    refused(sequences, 21, message, start=True, **settings)
    refused(sequences, 21, "no stream is known under this correlation id", FRAMES=frames(1), FRAME_TIME=[0.0])
    sequences.ask(21, start=True, end=True)


def test_a_sequence_that_does_not_start(sequences: Sequences) -> None:
    refused(sequences, 22, "must specify the START flag on the first request", FRAMES=frames(1), FRAME_TIME=[0.0])
    sequences.ask(22, start=True, end=True)
    refused(sequences, 22, "must specify the START flag on the first request", FRAMES=frames(1), FRAME_TIME=[0.0])


@pytest.mark.parametrize("encoding", ["jpeg", "h264"])
def test_packets_that_do_not_decode(sequences: Sequences, encoding: str) -> None:
    encode = Encoder(encoding, (112, 192))
    good = [encode(frame) for frame in frames(3)]
    sequences.ask(23, start=True, ENCODING=encoding.encode(), PACKETS=good[:1], FRAME_TIME=[0.0])
    refused(sequences, 23, f"a packet of {encoding} does not decode", PACKETS=[b"no picture"], FRAME_TIME=[0.04])
    if encoding == "h264":
        refused(sequences, 23, "begin a new stream with a key frame", PACKETS=good[1:2], FRAME_TIME=[0.04])
    else:
        other = Encoder("jpeg", (96, 192))(np.zeros((96, 192, 3), np.uint8))
        refused(sequences, 23, "a packet of jpeg is 192 x 96, not 192 x 112", PACKETS=[other], FRAME_TIME=[0.04])
        huge = Encoder("jpeg", (4096, 4096))(np.zeros((4096, 4096, 3), np.uint8))
        refused(sequences, 23, "a packet of jpeg does not decode", PACKETS=[huge], FRAME_TIME=[0.04])
        refused(sequences, 23, "a packet of jpeg holds 0 whole frames", PACKETS=[b""], FRAME_TIME=[0.04])
        assert sequences.ask(23, PACKETS=good[1:], FRAME_TIME=[0.04, 0.08]) == []
    sequences.ask(23, start=True, end=True)  # begins anew


def test_a_stream_that_sends_more_than_is_answered(
    sequences: Sequences, toy_server: TritonServer, toy_pipeline: Pipeline
) -> None:
    """Its windows are bounded; what was accepted is answered, and another stream is served meanwhile."""
    video = frames(64)
    for at in range(0, 1024, 64):
        sequences.send(
            24, at == 0, FRAMES=video, FRAME_TIME=times(64, at), **({"STRIDE": 1, "SOUND_END": True} if at == 0 else {})
        )
    with Sequences(toy_server.url) as other:
        check(
            other.ask(25, True, True, FRAMES=video[:16], FRAME_TIME=times(16)),
            expected(toy_pipeline, video[:16], np.zeros(0, np.float32), 4, 0, 4),
        )
    refusals, answered, left = [], 0, 16
    while left:
        _, final, what = sequences.answers.get(timeout=120)
        left -= final
        if isinstance(what, str):
            refusals.append(what)
        elif what:
            answered += 1
    assert refusals
    assert all("windows of this stream wait for their maps: send no more" in text for text in refusals)
    assert answered >= 64 - 15
    sequences.ask(24, end=True)


# ---- limits, on servers of their own


def test_many_abandoned_sequences(toy_artifacts: Artifacts, toy_pipeline: Pipeline, tmp_path: Path) -> None:
    """Ten thousand sequences that begin and never end: a stream among them goes on, and when the idle time is over
    a new one is taken."""
    video = frames(24)
    maps = expected(toy_pipeline, video, np.zeros(0, np.float32), 4, 0, 4)
    settings = StreamSettings(max_streams=8, idle_s=4)
    with serving(toy_artifacts, tmp_path, streams=settings) as server, Sequences(server.url) as good:
        answers = good.ask("good", start=True, FRAMES=video[:10], FRAME_TIME=times(10), SOUND_END=True)
        refusals = []
        with Sequences(server.url) as bad:
            for at in range(10, 20):
                for i in range(1000):
                    tensors = {"FRAMES": video[:1], "FRAME_TIME": [0.0]} if i < 100 else {}
                    bad.send(1000 * at + i, start=True, **tensors)
                answered = [bad.answers.get(timeout=60)[2] for _ in range(1000)]
                refusals += [what for what in answered if isinstance(what, str)]
                answers += good.ask("good", FRAMES=video[at : at + 1], FRAME_TIME=times(1, at))
        assert 9900 < len(refusals) <= 10_000 - 7
        assert all("the server holds 8 streams, as many as it may" in text for text in refusals)
        answers += good.ask("good", end=True, FRAMES=video[20:], FRAME_TIME=times(4, 20))
        check(answers, maps)
        time.sleep(4.5)
        answers = good.ask("new", True, True, FRAMES=video, FRAME_TIME=times(24))
        check(answers, maps)


def test_an_idle_stream_is_dropped(toy_artifacts: Artifacts, tmp_path: Path) -> None:
    with serving(toy_artifacts, tmp_path, streams=StreamSettings(idle_s=1)) as server, Sequences(server.url) as client:
        client.ask(1, start=True, FRAMES=frames(1), FRAME_TIME=[0.0])
        time.sleep(0.5)
        client.ask(1, FRAMES=frames(1), FRAME_TIME=[0.1])
        time.sleep(1.6)
        message = "must specify the START flag|no stream is known under this correlation id"
        refused(client, 1, message, FRAMES=frames(1), FRAME_TIME=[0.2])


def test_visual_only(tmp_path: Path) -> None:
    artifacts = toy_graphs.write(get_config("demo", "visual_only"), tmp_path / "toy")
    video = frames(16)
    with serving(artifacts, tmp_path) as server, Sequences(server.url) as client:
        (answer,) = client.ask(1, start=True, FRAMES=video, FRAME_TIME=times(16))
    pipeline = Pipeline(artifacts.config, load_engines(artifacts))
    maps, _ = pipeline.predict(video[None], np.zeros((1, 16_608), np.float32), 0)
    np.testing.assert_allclose(answer["SALIENCY"], maps[0], atol=1e-5)
