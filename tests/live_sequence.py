"""A bare client of `mubic_stream`: what a request holds is the test's affair. And what it may hold, and is answered."""

from __future__ import annotations

import queue
from types import TracebackType
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import np_to_triton_dtype

from mubic_deploy.graphs import STREAM
from mubic_deploy.pipeline import Pipeline

FPS = 25

DTYPES = {
    "FRAME_INDEX": np.int64,
    "FRAME_TIME": np.float64,
    "SOUND": np.float32,
    "SOUND_TIME": np.float64,
    "SOUND_END": np.bool_,
    "SKIP": np.int64,
    "STRIDE": np.int32,
    "SEED": np.int64,
    "STEPS": np.int32,
    "SOUND_RATE": np.int32,
    "PACKETS": np.object_,
    "ENCODING": np.object_,
}


class Answer(dict):
    """The tensors of one response, by name."""


class Sequences:
    """One gRPC stream, with any number of sequences on it."""

    def __init__(self, url: str) -> None:
        self.client = triton.InferenceServerClient(url)
        self.answers: queue.Queue[tuple[str, bool, Any]] = queue.Queue()  # request, whether it is its last, what
        self.client.start_stream(self._answered)
        self._count = 0

    def __enter__(self) -> Sequences:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.client.stop_stream(cancel_requests=True)
        self.client.close()

    def send(self, sequence: int | str, start: bool = False, end: bool = False, **tensors: Any) -> str:
        """Sends a request, does not wait. -> its id."""
        self._count += 1
        inputs = []
        for name, value in tensors.items():
            array = np.asarray(value, DTYPES.get(name))
            array = array[None] if array.ndim == 0 else array
            inputs.append(triton.InferInput(name, array.shape, np_to_triton_dtype(array.dtype)))
            inputs[-1].set_data_from_numpy(array)
        self.client.async_stream_infer(
            STREAM,
            inputs,
            request_id=str(self._count),
            sequence_id=sequence,
            sequence_start=start,
            sequence_end=end,
            enable_empty_final_response=True,
        )
        return str(self._count)

    def ask(self, sequence: int | str, start: bool = False, end: bool = False, **tensors: Any) -> list[Answer]:
        """Sends a request and waits for all its answers, while no other request is on its way. AssertionError with
        the server's message if it is refused."""
        self.send(sequence, start, end, **tensors)
        return self.collect(1)

    def collect(self, requests: int) -> list[Answer]:
        """The answers to so many requests that are on their way, in the order in which they come."""
        found = []
        while requests:
            _, final, what = self.answers.get(timeout=60)
            requests -= final
            if isinstance(what, str):
                raise AssertionError(what)
            if what:
                found.append(what)
        return found

    def _answered(self, result: Any, error: Any) -> None:
        if error is not None:
            self.answers.put(("", True, error.message()))
            return
        response = result.get_response()
        tensors = Answer({tensor.name: result.as_numpy(tensor.name) for tensor in response.outputs})
        self.answers.put((response.id, response.parameters["triton_final_response"].bool_param, tensors))


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
