"""`StreamClient` over connections that something on the way holds up."""

from __future__ import annotations

import contextlib
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator

import grpc
import numpy as np
import pytest

from mubic_deploy import StreamClient
from mubic_deploy.live import link as module
from mubic_deploy.live.backlog import Request
from mubic_deploy.live.link import Link, Settings
from mubic_deploy.live.report import Gap
from mubic_deploy.triton.server import TritonServer

pytest_plugins = ("triton_fixtures",)


class Proxy:
    """Carries bytes to a server, `rate` a second on each connection, and back. It can forget the connections that there
    are: then it carries nothing more over these, and closes none, as a router that has lost its table."""

    def __init__(self, port: int, rate: float = math.inf) -> None:
        self._port, self._rate = port, rate
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._forgotten: list[threading.Event] = []
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                here, _ = self._listener.accept()
                there = socket.create_connection(("127.0.0.1", self._port))
                forgotten = threading.Event()
                self._forgotten.append(forgotten)
                self._sockets += (here, there)
                for ends in ((here, there, self._rate), (there, here, math.inf)):
                    threading.Thread(target=self._carry, args=(*ends, forgotten), daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket, rate: float, forgotten: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(8192):
                if not forgotten.is_set():
                    target.sendall(data)
                time.sleep(len(data) / rate)
            if not forgotten.is_set():
                target.shutdown(socket.SHUT_WR)

    def forget(self) -> None:
        for connection in self._forgotten:
            connection.set()

    def close(self) -> None:
        for end in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


@pytest.fixture
def proxies(toy_server: TritonServer) -> Iterator[Callable[..., Proxy]]:
    with contextlib.ExitStack() as stack:
        yield lambda *rate: stack.enter_context(contextlib.closing(Proxy(toy_server.grpc_port, *rate)))


def test_a_connection_that_dies_without_a_word(proxies: Callable[..., Proxy], monkeypatch: pytest.MonkeyPatch) -> None:
    """The server lives, and answers on every new connection: the dead one is given up after `timeout`, not after
    `give_up_s`."""
    monkeypatch.setattr(module, "ALIVE_S", 0.5)
    proxy = proxies()
    gaps: list[Gap] = []
    with StreamClient(proxy.address, steps=1, timeout=0.5, give_up_s=30.0, on_gap=gaps.append) as client:
        client.end_sound()
        for i in range(20):
            client.frame(np.zeros((36, 64, 3), np.uint8), i / 25)
        assert [next(client).frame_index for _ in range(2)] == [8, 12]
        proxy.forget()
        died = time.monotonic()
        for i in range(20, 60):
            client.frame(np.zeros((36, 64, 3), np.uint8), i / 25)
        client.finish()
        found = [next(client).frame_index]
        silent_s = time.monotonic() - died
        found += [m.frame_index for m in client]
    assert found == list(range(16, 53, 4))
    assert 1.0 < silent_s < 15  # asked after 0.5 s, given up after another 0.5 s; a busy machine takes longer
    assert [gap.kind for gap in gaps] == ["connection"]
    assert "(no answer for 0.5 s)" in gaps[0].text


def test_a_line_that_is_slow_is_no_dead_one(proxies: Callable[..., Proxy], monkeypatch: pytest.MonkeyPatch) -> None:
    """The first request takes 2.6 s to the server, and the question whether it lives stands behind it."""
    monkeypatch.setattr(module, "ALIVE_S", 1.0)
    gaps: list[Gap] = []
    asked: list[bool] = []
    lives = Link.lives

    def asking(link: Link) -> bool:
        asked.append(lives(link))
        return asked[-1]

    monkeypatch.setattr(Link, "lives", asking)
    address = proxies(400_000).address
    with StreamClient(address, steps=1, max_waiting=99, timeout=0.5, give_up_s=20.0, on_gap=gaps.append) as client:
        client.end_sound()
        for i in range(44):
            client.frame(np.zeros((36, 64, 3), np.uint8), i / 25)
        client.finish()
        assert [m.frame_index for m in client] == list(range(8, 37, 4))
    assert False in asked
    assert gaps == []


@pytest.mark.parametrize("answered", [True, False])
def test_a_stream_is_cancelled_only_where_something_is_unanswered(toy_server: TritonServer, answered: bool) -> None:
    """Of streams that are cancelled after their last answer Triton loses some requests: it grows, and cannot stop."""
    done = threading.Event()
    link = Link(
        toy_server.url, Settings(4, 0, 1, "raw"), (112, 192), lambda _, answer: done.set() if answer.final else None
    )
    call = link._client._stream._response_iterator
    frames, count = np.zeros((112, 192, 3), np.uint8), 16 if answered else 64
    link.send(Request(True, True, [frames] * count, [*range(count)], [i / 25 for i in range(count)], sound_end=True))
    if answered:
        assert done.wait(10)
    link.close()
    assert call.code() == (grpc.StatusCode.OK if answered else grpc.StatusCode.CANCELLED)


@pytest.mark.parametrize("gone", ["forgotten", "closed"])
def test_a_connection_that_dies_after_the_last_map(
    proxies: Callable[..., Proxy], monkeypatch: pytest.MonkeyPatch, gone: str
) -> None:
    """The server is to end the stream, and cannot."""
    monkeypatch.setattr(module, "ALIVE_S", 0.5)
    proxy = proxies()
    client = StreamClient(proxy.address, steps=1)
    client.end_sound()
    for i in range(16):
        client.frame(np.zeros((36, 64, 3), np.uint8), i / 25)
    assert next(client).frame_index == 8
    time.sleep(0.5)  # until the request is done, too
    if gone == "forgotten":
        proxy.forget()
    else:
        proxy.close()
    began = time.monotonic()
    client.close()
    assert time.monotonic() - began < 5
    assert "mubic-stream" not in [thread.name for thread in threading.enumerate()]
