"""What `mubic_stream` refuses, and what it holds back: the real server, over toy graphs. Other streams go on."""

from __future__ import annotations

import gc
import itertools
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from live_sequence import FPS, Sequences, check, expected, frames, sound, times
from triton_serving import processes, serving

from bench.soak import private_mb
from mubic_deploy.artifacts import Artifacts
from mubic_deploy.config import DEMO
from mubic_deploy.errors import UserError
from mubic_deploy.graphs import STREAM
from mubic_deploy.live.packets import Encoder
from mubic_deploy.live.settings import StreamSettings
from mubic_deploy.live.streams import Stream, Streams
from mubic_deploy.pipeline import Pipeline
from mubic_deploy.triton.server import TritonServer

pytest_plugins = ("triton_fixtures",)


@pytest.fixture
def sequences(toy_server: TritonServer) -> Iterator[Sequences]:
    with Sequences(toy_server.url) as client:
        yield client


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
    refused(sequences, 20, "SOUND holds NaN or infinite samples", SOUND=[np.nan], SOUND_TIME=0.32)
    refused(sequences, 20, "SOUND reaches 20, as integers do: scale it", SOUND=[20], SOUND_TIME=0.32)
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
        sequences.ask(23, start=True, ENCODING=b"h264", PACKETS=good[:1], FRAME_TIME=[0.0])
        other = Encoder("h264", (96, 192))(np.zeros((96, 192, 3), np.uint8))  # a camera that changes its size
        refused(sequences, 23, "a packet of h264 is 192 x 96, not 192 x 112", PACKETS=[other], FRAME_TIME=[0.04])
    else:
        other = Encoder("jpeg", (96, 192))(np.zeros((96, 192, 3), np.uint8))
        refused(sequences, 23, "a packet of jpeg is 192 x 96, not 192 x 112", PACKETS=[other], FRAME_TIME=[0.04])
        huge = Encoder("jpeg", (4096, 4096))(np.zeros((4096, 4096, 3), np.uint8))
        refused(sequences, 23, "a packet of jpeg does not decode", PACKETS=[huge], FRAME_TIME=[0.04])
        refused(sequences, 23, "a packet of jpeg holds 0 whole frames", PACKETS=[b""], FRAME_TIME=[0.04])
        assert sequences.ask(23, PACKETS=good[1:], FRAME_TIME=[0.04, 0.08]) == []
    sequences.ask(23, start=True, end=True)  # begins anew


def test_packets_go_on_after_sound_that_was_refused() -> None:
    """A decoder cannot go back, so it is asked last."""
    encode = Encoder("h264", (112, 192))
    packets = [encode(frame) for frame in frames(9)]

    def push(stream: Stream, first: int, last: int, **more: Any) -> None:
        given = {"PACKETS": np.array(packets[first:last], np.object_), "FRAME_TIME": np.arange(first, last) / 25}
        stream.push({**given, **more}, False)

    wrongs: tuple[dict[str, Any], ...] = ({"SOUND": np.array([np.nan], np.float32)}, {"SOUND_TIME": np.array([1e300])})
    seen = []
    for wrong in (None, *wrongs):
        stream = Stream(DEMO, {"ENCODING": np.array([b"h264"], np.object_)})
        push(stream, 0, 4)
        if wrong is not None:
            with pytest.raises(UserError):
                push(stream, 4, 8, **wrong)
        push(stream, 4, 9)
        seen.append([image for _, _, image in stream._timeline.frames(0, 9)])
    np.testing.assert_array_equal(seen[1], seen[0])
    np.testing.assert_array_equal(seen[2], seen[0])


# what is sent beside a good stream: each a sequence's first request, its second one, and what the server says
BAD: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no START": ({}, {"FRAMES": frames(1), "FRAME_TIME": [0.0]}, "must specify the START flag"),
    "another size": (
        {"FRAMES": frames(1), "FRAME_TIME": [0.0]},
        {"FRAMES": frames(1)[:, :96], "FRAME_TIME": [0.04]},
        "unexpected shape for input 'FRAMES'",
    ),
    "time stamps that go back": (
        {"FRAMES": frames(1), "FRAME_TIME": [1.0]},
        {"FRAMES": frames(1), "FRAME_TIME": [0.96]},
        "time stamps go back or stand still",
    ),
    "sound that goes back": (
        {"SOUND": sound(16_000), "SOUND_TIME": 5.0},
        {"SOUND": sound(16_000), "SOUND_TIME": 0.0},
        "time stamps of the sound go back",
    ),
    "a frame number far ahead": (
        {"STRIDE": 1, "SOUND_END": True, "FRAMES": frames(2), "FRAME_TIME": [0.0, 1.0], "FRAME_INDEX": [0, 2**60]},
        {"FRAMES": frames(1), "FRAME_TIME": [1.04], "FRAME_INDEX": [1]},
        "frame number 1 comes after 1152921504606846976",
    ),
    "no picture": (
        {"ENCODING": b"jpeg"},
        {"PACKETS": [b"no picture"], "FRAME_TIME": [0.0]},
        "a packet of jpeg does not decode",
    ),
    "no H.264": (
        {"ENCODING": b"h264"},
        {"PACKETS": [b"\0\0\0\1" + bytes(range(256))], "FRAME_TIME": [0.0]},
        "a packet of h264",
    ),
    "sound of another rate": ({"SOUND_RATE": 48_000}, {}, "sound of 48000 Hz: resample it"),
}


def test_bad_input_beside_a_good_stream(sequences: Sequences, toy_server: TritonServer, toy_pipeline: Pipeline) -> None:
    """Between any two requests of the good stream all of it is sent, on its own connection and on another one: the
    answers are errors there, and here the maps that are due."""
    video, audio = frames(24), sound(24 * 640)
    answers = sequences.ask("good", start=True)
    with Sequences(toy_server.url) as other:
        for i in range(24):
            answers += sequences.ask(
                "good",
                FRAMES=video[i : i + 1],
                FRAME_TIME=times(1, i),
                SOUND=audio[640 * i : 640 * (i + 1)],
                SOUND_TIME=i / FPS,
            )
            for n, (client, (first, second, message)) in enumerate(itertools.product((sequences, other), BAD.values())):
                bad = 100 + n  # begins again each time, without an end
                if not second:
                    refused(client, bad, message, start=True, **first)
                    continue
                if first:
                    client.ask(bad, start=True, **first)
                refused(client, bad, message, **second)
        for n in range(2 * len(BAD)):
            sequences.ask(100 + n, start=True, end=True)
    check(answers + sequences.ask("good", end=True), expected(toy_pipeline, video, audio, 4, 0, 4))


@pytest.mark.parametrize("what", ["frames", "sound"])
def test_a_stream_that_never_ends(sequences: Sequences, toy_server: TritonServer, what: str) -> None:
    """165 MB of frames, or 380 MB of sound without a frame, and no END: the server keeps what it may have to cut."""
    (process,) = set(processes(toy_server.shm_prefix)) & set(processes(f"/{STREAM}/"))
    video, audio = frames(64), np.zeros(60 * 16_000, np.float32)
    sequences.ask(26, start=True, STRIDE=16)
    before = 0.0
    for n in range(40 if what == "frames" else 100):
        if what == "frames":
            answers = sequences.ask(26, FRAMES=video, FRAME_TIME=times(64, 64 * n))
            assert len(answers) == (4 if n else 0)  # sound is waited for, 2 s
        else:
            assert sequences.ask(26, SOUND=audio, SOUND_TIME=60.0 * n) == []
        if n == 10:
            before = private_mb(process)
    assert private_mb(process) - before < 50
    sequences.ask(26, start=True, end=True)


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


def test_windows_of_streams_that_ended_count() -> None:
    """Or one-shot requests would fill the memory, though the server holds few streams."""
    streams = Streams(DEMO, StreamSettings(max_streams=2))
    whole = {"STRIDE": np.array([1]), "SOUND_END": np.array([True]), "FRAMES": frames(64), "FRAME_TIME": times(64)}
    held = [streams.push(key, True, True, whole)[0] for key in ("ended", "ended too")]
    assert [stream.waiting for stream in held] == [49, 49]
    with pytest.raises(UserError, match="the server holds 2 streams, as many as it may"):
        streams.push("one more", True, True, whole)
    held[0].waiting = 0  # all were answered
    streams.push("one more", True, False, whole)
    with pytest.raises(UserError, match="the server holds 2 streams"):
        streams.push("one more", True, False, whole)  # begins anew; what it had is still there


def test_nothing_is_held_of_a_stream_that_ended() -> None:
    """Though no other one starts: its frames would stay as long as the server does."""
    streams = Streams(DEMO, StreamSettings())
    whole = {"SOUND_END": np.array([True]), "FRAMES": frames(20), "FRAME_TIME": times(20)}
    stream, windows = streams.push("ended", True, True, whole)
    held = weakref.ref(stream)
    streams.expire()
    stream.waiting -= len(windows)
    del stream
    assert held() is not None
    streams.expire()
    gc.collect()
    assert held() is None


# ---- limits, on servers of their own


def test_many_abandoned_sequences(toy_artifacts: Artifacts, toy_pipeline: Pipeline, tmp_path: Path) -> None:
    """Ten thousand sequences that begin and never end: a stream among them goes on, and when the idle time is over
    a new one is taken."""
    video = frames(24)
    maps = expected(toy_pipeline, video, np.zeros(0, np.float32), 4, 0, 4)
    settings = StreamSettings(max_streams=8, idle_s=4)
    with serving(toy_artifacts, tmp_path, streams=settings) as server, Sequences(server.url) as good:
        answers = good.ask("good", start=True, FRAMES=video[:10], FRAME_TIME=times(10), SOUND_END=True)
        refusals, at = [], 10
        with Sequences(server.url) as bad:
            for part in range(50):  # the good stream must not be idle for long on a slow machine
                for i in range(200):
                    tensors = {"FRAMES": video[:1], "FRAME_TIME": [0.0]} if i < 20 else {}
                    bad.send(200 * part + i + 1, start=True, **tensors)
                answered = [bad.answers.get(timeout=60)[2] for _ in range(200)]
                refusals += [what for what in answered if isinstance(what, str)]
                frame = {"FRAMES": video[at : at + 1], "FRAME_TIME": times(1, at)} if part % 5 == 4 else {}
                answers += good.ask("good", **frame)
                at += len(frame) // 2
        assert 9900 < len(refusals) <= 10_000 - 7
        assert all("the server holds 8 streams, as many as it may" in text for text in refusals)
        answers += good.ask("good", end=True, FRAMES=video[20:], FRAME_TIME=times(4, 20))
        check(answers, maps)
        time.sleep(4.5)
        answers = good.ask("new", True, True, FRAMES=video, FRAME_TIME=times(24))
        check(answers, maps)


def test_an_idle_stream_is_dropped(toy_artifacts: Artifacts, tmp_path: Path) -> None:
    with serving(toy_artifacts, tmp_path, streams=StreamSettings(idle_s=2)) as server, Sequences(server.url) as client:
        client.ask(1, start=True, FRAMES=frames(1), FRAME_TIME=[0.0])
        time.sleep(0.5)
        client.ask(1, FRAMES=frames(1), FRAME_TIME=[0.1])
        time.sleep(3)
        message = "must specify the START flag|no stream is known under this correlation id"
        refused(client, 1, message, FRAMES=frames(1), FRAME_TIME=[0.2])
