"""Clips and maps through shared memory, with a real server: the same maps, and nothing stays behind."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from triton_serving import FREE_PORTS, SLOW, clips, processes, serving, wait_until
from tritonclient.utils import InferenceServerException

from mubic_deploy import graphs
from mubic_deploy.artifacts import Artifacts
from mubic_deploy.errors import UserError
from mubic_deploy.pipeline import Pipeline
from mubic_deploy.triton import shared_memory
from mubic_deploy.triton.client import TritonPredictor
from mubic_deploy.triton.repository import write_repository
from mubic_deploy.triton.server import TritonServer
from mubic_deploy.triton.shared_memory import NotSharedError, Region, SharedMemory, bytes_of

pytest_plugins = ("triton_fixtures",)

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def server(toy_server: TritonServer) -> TritonServer:
    return toy_server


@pytest.fixture
def predictor(server: TritonServer) -> Iterator[TritonPredictor]:
    with TritonPredictor(server.url, shared_memory=True) as predictor:
        yield predictor


@pytest.fixture(autouse=True)
def nothing_stays_behind(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """With names of these tests' own: other clients on this machine come, sweep and go meanwhile."""
    monkeypatch.setattr(shared_memory, "OWNER", f"mubic_tests_{os.getpid()}_")
    monkeypatch.setattr(shared_memory, "_NOT_YET", f"mubic_tests_starting_{os.getpid()}_")
    yield
    left = files()
    for name in left:  # nobody else would
        (Path("/dev/shm") / name).unlink()
    assert not left


def files() -> set[str]:
    """Of clients, whether they live or not."""
    names = [path.name for path in Path("/dev/shm").iterdir()]
    return {name for name in names if name.startswith((shared_memory.OWNER, shared_memory._NOT_YET))}


def known(server: TritonServer) -> set[str]:
    """The regions of these tests' clients that the server has mapped: others share it."""
    with triton.InferenceServerClient(server.url) as client:
        regions = client.get_system_shared_memory_status().regions
    return {name for name in regions if name.startswith(shared_memory.OWNER)}


def inference(server: TritonServer, model: str = graphs.ENSEMBLE) -> int:
    with triton.InferenceServerClient(server.url) as client:
        (statistics,) = client.get_inference_statistics(model).model_stats
    return statistics.inference_count


@pytest.fixture
def without_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever would send a tensor through gRPC, or read one from there, fails."""

    def fail(*_: object) -> None:
        raise AssertionError("a tensor goes through gRPC")

    monkeypatch.setattr(triton.InferInput, "set_data_from_numpy", fail)
    monkeypatch.setattr(triton.InferResult, "as_numpy", fail)


@pytest.mark.usefixtures("without_messages")
@pytest.mark.parametrize("model", [graphs.ENSEMBLE, graphs.FIXED_ENSEMBLE])
def test_the_same_maps_as_in_process(server: TritonServer, toy_pipeline: Pipeline, model: str) -> None:
    """Of batches that grow and shrink, with a region that is larger than what lies in it."""
    with TritonPredictor(f"{server.url}/{model}") as predictor:
        assert predictor.transport == "shared memory"
        for count in (1, 3, predictor.max_batch + 2, 2, 1):
            video, audio = clips(toy_pipeline.config, count, seed=count)
            saliency, used = predictor.predict(video, audio, np.arange(count), 3)
            expected, expected_used = toy_pipeline.predict(video, audio, np.arange(count), 3)
            np.testing.assert_allclose(saliency, expected, rtol=0, atol=TOLERANCE)
            np.testing.assert_array_equal(used, expected_used)
            assert saliency.flags.owndata  # a view would change with the next request
        assert len(known(server)) < 3  # one is used, one was outgrown as the server let go of it, the rest is gone
    assert not known(server)


@pytest.mark.usefixtures("without_messages")
def test_requests_on_the_way_have_each_a_region(predictor: TritonPredictor, toy_pipeline: Pipeline) -> None:
    video, audio = clips(toy_pipeline.config, 12)

    def ask(i: int) -> np.ndarray:
        return predictor.predict_async(video[[i % 12]], audio[[i % 12]], i, 1 + i % 4).result()[0]

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, range(48)))
    for i, saliency in enumerate(answers):
        expected, _ = toy_pipeline.predict(video[[i % 12]], audio[[i % 12]], i, 1 + i % 4)
        np.testing.assert_allclose(saliency, expected, rtol=0, atol=TOLERANCE)


def test_what_is_asked_for(server: TritonServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where the server has another /dev/shm, as in a container."""
    with TritonPredictor(server.url, shared_memory=False) as predictor:
        assert predictor.transport == "gRPC"
        assert not known(server)
    monkeypatch.setattr(shared_memory, "FOLDER", tmp_path)
    with TritonPredictor(server.url) as predictor:
        assert predictor.transport == "gRPC"
        predictor.predict(*clips(predictor.config, 1))
    why = f"{shared_memory.OWNER}.*"
    message = rf"server at {server.url} shares no memory with this process \(.*{why}\): leave shared_memory"
    with pytest.raises(UserError, match=message):
        TritonPredictor(server.url, shared_memory=True)
    assert not list(tmp_path.iterdir())
    assert not known(server)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"FOLDER": Path("/dev/nowhere")}, "there is no /dev/nowhere"),
        ({"_OLDEST": (99, 0)}, r"Triton 2\.\d+\.0 does not do it safely"),
        ({"_OF_FREE": 1 << 40}, "/dev/shm has no room"),
        ({"Region": lambda name, size: Region(name, 1 << 50)}, "/dev/shm: "),
    ],
)
def test_why_not(server: TritonServer, monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any], reason: str) -> None:
    for name, value in wrong.items():
        monkeypatch.setattr(shared_memory, name, value)
    with triton.InferenceServerClient(server.url) as client, pytest.raises(NotSharedError, match=reason):
        SharedMemory(client, 4096)


def test_a_request_without_room_goes_through_grpc(
    predictor: TritonPredictor, toy_pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    video, audio = clips(toy_pipeline.config, 4)
    monkeypatch.setattr(shared_memory, "_OF_FREE", 1 << 40)
    expected, _ = toy_pipeline.predict(video, audio)
    np.testing.assert_allclose(predictor.predict(video, audio)[0], expected, rtol=0, atol=TOLERANCE)


def test_a_server_that_was_started_again(toy_artifacts: Artifacts, toy_pipeline: Pipeline, tmp_path: Path) -> None:
    """It knows no region: that request goes through gRPC, the next in shared memory again."""
    video, audio = clips(toy_pipeline.config, 2)
    expected, _ = toy_pipeline.predict(video, audio, 5)
    with serving(toy_artifacts, tmp_path) as first, TritonPredictor(first.url, shared_memory=True) as predictor:
        for answer in [predictor.predict_async(video, audio, 5) for _ in range(3)]:
            answer.result()
        assert len(known(first)) >= 2
        first.stop()
        ports: dict[str, Any] = FREE_PORTS | {"grpc_port": first.grpc_port}
        with TritonServer(tmp_path / "repository", **ports) as second:
            wait_until(lambda: answers(predictor))
            for regions in (0, 1):
                np.testing.assert_allclose(predictor.predict(video, audio, 5)[0], expected, rtol=0, atol=TOLERANCE)
                assert len(known(second)) == regions


def test_a_region_that_the_server_does_not_know(server: TritonServer, toy_pipeline: Pipeline) -> None:
    """The others, which it may know, go with it and do not stay there."""
    video, audio = clips(toy_pipeline.config, 1)
    expected, _ = toy_pipeline.predict(video, audio, 5)
    with TritonPredictor(server.url, shared_memory=True) as predictor:
        for answer in [predictor.predict_async(video, audio) for _ in range(3)]:
            answer.result()
        lose_a_region(predictor)
        np.testing.assert_allclose(predictor.predict(video, audio, 5)[0], expected, rtol=0, atol=TOLERANCE)
        predictor.predict(video, audio)
        assert len(known(server)) == 1
    assert not known(server)


def test_an_answer_that_nobody_wants_gives_its_region_back(predictor: TritonPredictor, server: TritonServer) -> None:
    """As asyncio's `wait_for` leaves it."""
    video, audio = clips(predictor.config, 1)

    async def impatient() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.wrap_future(predictor.predict_async(video, audio, steps=12)), 0)

    for _ in range(5):
        asyncio.run(impatient())
    predictor.predict(video, audio)
    predictor.close()
    wait_until(lambda: not known(server))


@pytest.mark.parametrize("shared", [True, False])
def test_an_answer_that_is_empty_is_an_error(
    server: TritonServer, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    """As others saw them where a GPU's pool of memory was full: not the map that an earlier request left in the region,
    nor a wait without an end."""
    elsewhere = triton.InferRequestedOutput.set_shared_memory

    def besides(self: triton.InferRequestedOutput, region: str, count: int, offset: int = 0) -> None:
        """The output goes over the clip, at the region's beginning."""
        elsewhere(self, region, count, 0 * offset)

    with TritonPredictor(server.url, shared_memory=shared) as predictor:
        video, audio = clips(predictor.config, 1)
        expected, _ = predictor.predict(video, audio)
        monkeypatch.setattr(triton.InferRequestedOutput, "set_shared_memory", besides)
        monkeypatch.setattr(triton.InferResult, "as_numpy", lambda *_: np.empty((0, 1), np.float32))
        with pytest.raises(
            UserError, match=r"answered with something else than maps \(SALIENCY is empty\): see its log"
        ):
            predictor.predict_async(video, audio).result(timeout=20)
        monkeypatch.undo()
        np.testing.assert_array_equal(predictor.predict(video, audio)[0], expected)


def test_a_client_that_is_closed_before_the_second_try(
    predictor: TritonPredictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = predictor._send

    def send_late(*arguments: Any) -> None:
        predictor.close()
        send(*arguments)

    monkeypatch.setattr(predictor, "_send", send_late)
    lose_a_region(predictor)
    answer = predictor.predict_async(*clips(predictor.config, 1))
    with pytest.raises(ValueError, match="closed"):
        answer.result(timeout=20)


def lose_a_region(predictor: TritonPredictor) -> None:
    """The server forgets the one that is taken next."""
    assert predictor._memory is not None
    name = predictor._memory._free[0].name

    def lost() -> bool:
        try:
            predictor._client.unregister_system_shared_memory(name)
        except InferenceServerException:  # its request has only just been answered
            return False
        return True

    wait_until(lost)


def test_a_server_that_lets_go_late(server: TritonServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it does now and then: its answer comes first."""
    refusals = iter([True] * 3)
    with TritonPredictor(server.url, shared_memory=True) as predictor:
        unregister = predictor._client.unregister_system_shared_memory

        def refuse_first(*arguments: Any, **options: Any) -> None:
            if next(refusals, False):
                raise InferenceServerException("it is currently in use", "StatusCode.INTERNAL")
            unregister(*arguments, **options)

        monkeypatch.setattr(predictor._client, "unregister_system_shared_memory", refuse_first)
    assert not known(server)


def answers(predictor: TritonPredictor) -> bool:
    """Not while gRPC still believes that the server is gone."""
    try:
        return predictor._client.is_server_ready()
    except InferenceServerException:
        return False


def test_what_nobody_waited_for(toy_artifacts: Artifacts, toy_pipeline: Pipeline, tmp_path: Path) -> None:
    """The server still reads and writes its region, which nothing else may use meanwhile, and goes on serving."""
    write_repository(toy_artifacts, tmp_path / "repository")
    with (tmp_path / "repository" / "visual_encoder" / "1" / "model.py").open("a") as source:
        source.write(SLOW)
    video, audio = clips(toy_pipeline.config, 2)
    server = TritonServer(tmp_path / "repository", log=tmp_path / "log", **FREE_PORTS)
    with server, TritonPredictor(server.url, shared_memory=True) as predictor:
        for i in range(2):
            predictor.timeout = 0.3
            with pytest.raises(UserError, match=r"did not answer within 0\.3 s"):
                predictor.predict(video[:1], audio[:1])
            assert len(known(server)) == 1 + i
        predictor.timeout = 60
        saliency, _ = predictor.predict(video, audio, 5)
        np.testing.assert_allclose(saliency, toy_pipeline.predict(video, audio, 5)[0], rtol=0, atol=TOLERANCE)
        server.check()
        wait_until(lambda: inference(server, "visual_encoder") >= 4)
        predictor.predict(np.repeat(video, 2, 0), np.repeat(audio, 2, 0))  # with a larger region the others go

        def settled() -> bool:
            assert predictor._memory is not None
            predictor._memory._unregister_abandoned()  # again those that the server had not let go of yet
            return len(known(server)) == 1

        wait_until(settled)


def test_a_server_that_hangs(toy_artifacts: Artifacts, toy_pipeline: Pipeline, tmp_path: Path) -> None:
    """Whoever allows little waits little, for regions too."""
    with serving(toy_artifacts, tmp_path) as server, TritonPredictor(server.url, shared_memory=True) as predictor:
        video, audio = clips(toy_pipeline.config, 1)
        predictor.timeout = 0.5
        names = {n: Path(f"/proc/{n}/comm").read_text().strip() for n in processes(server.shm_prefix)}
        (process,) = [number for number, name in names.items() if name == "tritonserver"]
        os.kill(process, signal.SIGSTOP)
        try:
            for _ in range(2):
                start = time.monotonic()
                with pytest.raises(UserError, match=r"did not answer within 0\.5 s"):
                    predictor.predict(video, audio)
                assert time.monotonic() - start < 4  # and not another 5 s
        finally:
            os.kill(process, signal.SIGCONT)
        predictor.timeout = 60
        expected, _ = toy_pipeline.predict(video, audio)
        np.testing.assert_allclose(predictor.predict(video, audio)[0], expected, rtol=0, atol=TOLERANCE)


def test_an_answer_that_was_lost(server: TritonServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server has a region, and the client does not know: it goes with the next."""
    with triton.InferenceServerClient(server.url) as client:
        memory = SharedMemory(client, 4096)
        register = client.register_system_shared_memory

        def lost(*arguments: Any, **options: Any) -> None:
            register(*arguments, **options)
            raise InferenceServerException("Deadline Exceeded", "StatusCode.DEADLINE_EXCEEDED")

        with monkeypatch.context() as patch:
            patch.setattr(client, "register_system_shared_memory", lost)
            assert memory.take(8192, 60) is None
        (left,) = known(server)
        assert memory.take(8192, 60) is not None
        assert left not in known(server)
        memory.close()


KILLED = """
import os, signal, sys
import numpy as np
from mubic_deploy.triton import shared_memory
from mubic_deploy.triton.client import TritonPredictor
shared_memory.OWNER = sys.argv[2]
predictor = TritonPredictor(sys.argv[1], shared_memory=True)
c = predictor.config
video = np.zeros((1, c.frames, c.height, c.width, 3), np.uint8)
predictor.predict(video, np.zeros((1, 16608), np.float32))
print(flush=True)
sys.stdin.read()
"""


def test_a_client_that_was_killed(server: TritonServer) -> None:
    """The next one removes what it left, in the server too, and leaves what belongs to those that live."""
    command = [sys.executable, "-c", KILLED, server.url, shared_memory.OWNER]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"
        (its_file,), (its_region,) = files(), known(server)
        assert its_region.startswith(f"{its_file}_")
        with TritonPredictor(server.url):
            assert its_file in files()
            assert its_region in known(server)
        process.send_signal(signal.SIGKILL)
    assert its_file in files()
    with TritonPredictor(server.url):
        assert its_file not in files()
        assert its_region not in known(server)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_client_that_was_dropped(server: TritonServer) -> None:
    """Without `close`, in a process that lives on: the next one sweeps up after it all the same."""
    predictor = TritonPredictor(server.url, shared_memory=True)
    predictor.predict(*clips(predictor.config, 1))
    (its_region,) = known(server)
    del predictor
    gc.collect()
    with TritonPredictor(server.url):
        assert its_region not in known(server)


def test_closing_twice_closes_no_file_of_others(server: TritonServer, tmp_path: Path) -> None:
    with TritonPredictor(server.url, shared_memory=True) as predictor:
        predictor.close()
        handles = [os.open(tmp_path, os.O_RDONLY) for _ in range(32)]  # one has the number that is free now
    for handle in handles:
        os.close(handle)


def test_a_sweep_leaves_a_region_that_is_being_made(predictor: TritonPredictor) -> None:
    assert predictor._memory is not None
    name = f"{predictor._memory._owner.name}_99"
    region = Region(name, 4096)
    try:
        with TritonPredictor(predictor.address):
            assert (shared_memory.FOLDER / name).exists()
    finally:
        region.unlink()


def test_a_sweep_leaves_what_it_cannot_remove(server: TritonServer) -> None:
    """As another user's file; here a folder, since root may remove all files."""
    alien = shared_memory.FOLDER / f"{shared_memory.OWNER}alien_1"
    alien.mkdir()
    try:
        with TritonPredictor(server.url) as predictor:
            assert predictor.transport == "shared memory"
    finally:
        alien.rmdir()
    assert not known(server)


def test_a_client_elsewhere_than_on_unix(server: TritonServer) -> None:
    """It has no fcntl, and goes through gRPC."""
    program = """
import sys
from pathlib import Path
sys.modules["fcntl"] = None
from mubic_deploy.triton import client, shared_memory
shared_memory.FOLDER = Path("/nowhere")
with client.TritonPredictor(sys.argv[1]) as predictor:
    print(predictor.transport)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    said = subprocess.run(
        [sys.executable, "-c", program, server.url], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    assert said.stdout == "gRPC\n"


def test_bytes_of_is_what_tensors_take(predictor: TritonPredictor) -> None:
    tensors = (*predictor.signature.inputs, *predictor.signature.outputs)
    for count in (1, 3):
        region = Region(f"{shared_memory.OWNER}test_{count}", bytes_of(tensors, count))
        region.unlink()
        places = list(region.tensors(tensors, count).values())
        ends = [place.offset + place.array.nbytes for place in places]
        assert all(end <= place.offset for end, place in zip(ends, places[1:], strict=False))
        assert ends[-1] <= region.size
