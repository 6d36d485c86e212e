"""System shared memory between a client and a Triton server on the same machine: through gRPC the way of a clip takes
three times the CPU time, and that of several longer than a GPU computes them (docs/measured.md, "Triton")."""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException

from mubic_deploy.graphs import Tensor

with contextlib.suppress(ImportError):  # Windows has none, and no FOLDER
    import fcntl

FOLDER = Path("/dev/shm")  # where shm_open has its files, the server's too
OWNER = "mubic_client_"  # a client's own file, locked for as long as the client lives; its regions' names begin with it
_NOT_YET = "mubic_starting_"  # the same before it is locked
_OLDEST = (2, 50)  # an older Triton ends by a signal when memory that it reads is unregistered (server#3207)
_EXTENSION = "system_shared_memory"
_OF_FREE = 4  # a region takes at most this part of what is free: the models' processes need room there too
_ALIGNMENT = 64  # bytes
_TIMEOUT = 5.0  # s, of what is asked besides clips
_LINGER = 1.0  # s that `close` waits for a region: the server lets go of it a little after its answer
_POLL = 0.01  # s
# what it was asked may still be at work in the server
UNFINISHED = {"StatusCode.CANCELLED", "StatusCode.DEADLINE_EXCEEDED", "StatusCode.UNAVAILABLE"}


class NotSharedError(Exception):
    """This client and this server share no memory, for the reason that it gives."""


class Place(NamedTuple):
    array: np.ndarray  # [clips, ...], in the region
    offset: int  # bytes


class Region:
    """`size` bytes, which a server can map as /dev/shm/`name` until `unlink`, and this process has for as long as it
    holds the region or an array in it. OSError if there is no room."""

    def __init__(self, name: str, size: int) -> None:
        self.name, self.size = name, size
        handle = os.open(FOLDER / name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.posix_fallocate(handle, 0, size)  # or a signal would say so, when it is written
            self._memory = mmap.mmap(handle, size)
        except BaseException:
            self.unlink()
            raise
        finally:
            os.close(handle)

    def unlink(self) -> None:
        """Whoever has mapped it keeps it."""
        (FOLDER / self.name).unlink(missing_ok=True)

    def tensors(self, tensors: Iterable[Tensor], clips: int) -> dict[str, Place]:
        """One after the other, for so many clips."""
        places, offset = {}, 0
        for tensor in tensors:
            array: np.ndarray = np.ndarray((clips, *tensor.shape), tensor.dtype, self._memory, offset)
            places[tensor.name] = Place(array, offset)
            offset += _aligned(array.nbytes)
        return places


def bytes_of(tensors: Iterable[Tensor], clips: int) -> int:
    """What `Region.tensors` of these takes."""
    return sum(_aligned(clips * tensor.nbytes) for tensor in tensors)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


class SharedMemory:
    """Regions that the server behind `client` has mapped too, one for each request on the way. Usable from several
    threads.

    size: bytes of the first. NotSharedError if the server is elsewhere, has a /dev/shm of its own (a container) or
    none for this user, does not allow it (--allow-client-shm), is too old, or memory is short. Sweeps out what clients
    left that were killed."""

    def __init__(self, client: InferenceServerClient, size: int) -> None:
        if not FOLDER.is_dir():
            raise NotSharedError(f"there is no {FOLDER}")
        self._client, self._lock = client, threading.Lock()
        self._free: list[Region] = []
        self._abandoned: list[str] = []
        self._made, self._closed = 0, False
        try:
            said = client.get_server_metadata(client_timeout=_TIMEOUT)
            if tuple(map(int, said.version.split(".")[:2])) < _OLDEST or _EXTENSION not in said.extensions:
                raise NotSharedError(f"Triton {said.version} does not do it safely")
            self._owner = _Owner()
        except (InferenceServerException, ValueError, OSError) as error:
            raise NotSharedError(" ".join(str(error).split())) from None
        try:
            self._free.append(self._register(size))
            self._sweep()
        except BaseException:
            self._owner.close()
            raise

    def take(self, size: int, timeout: float) -> Region | None:
        """A region of at least so many bytes, for one request. None where no more can be had, or the server does not
        answer within so many seconds: then the request has to travel."""
        with self._lock:
            if self._closed:
                return None
            fitting = min((r for r in self._free if r.size >= size), key=lambda r: r.size, default=None)
            outgrown = self._free[0] if self._free and fitting is None else None
            for region in (fitting, outgrown):
                if region is not None:
                    self._free.remove(region)
        if fitting is not None:
            return fitting
        if outgrown is not None:
            self.abandon(outgrown)
        timeout = min(timeout, _TIMEOUT)
        with contextlib.suppress(NotSharedError):
            if self._unregister_abandoned(timeout):
                return self._register(size, timeout)
        return None

    def give(self, region: Region) -> None:
        """Back, when the server is done with it."""
        with self._lock:
            if not self._closed:
                self._free.append(region)

    def abandon(self, region: Region) -> None:
        """Instead of `give`: it goes as soon as the server does not use it any more."""
        with self._lock:
            self._abandoned.append(region.name)

    def abandon_all(self) -> None:
        """Those that no request uses. A server that was started again knows none of them, or only the newest."""
        with self._lock:
            self._abandoned += [region.name for region in self._free]
            self._free.clear()

    def close(self) -> None:
        """Nothing of it stays in the server but what a request still uses, until a later client sweeps."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self.abandon_all()
        end = time.monotonic() + _LINGER
        while self._unregister_abandoned() and self._abandoned and time.monotonic() < end:
            time.sleep(_POLL)
        self._owner.close()

    def _register(self, size: int, timeout: float = _TIMEOUT) -> Region:
        with self._lock:
            self._made += 1
            name = f"{self._owner.name}_{self._made}"
        try:
            free = os.statvfs(FOLDER)
            if size * _OF_FREE > free.f_bavail * free.f_frsize:
                raise NotSharedError(f"{FOLDER} has no room")
            region = Region(name, size)
        except OSError as error:
            raise NotSharedError(f"{FOLDER}: {error.strerror}") from None
        try:
            self._client.register_system_shared_memory(name, f"/{name}", size, client_timeout=timeout)
        except InferenceServerException as error:
            if error.status() in UNFINISHED:  # it may have it all the same
                self.abandon(region)
            raise NotSharedError(" ".join((error.message() or "").split())) from None
        finally:
            region.unlink()  # both have it by now, so nothing of it can stay behind
        return region

    def _unregister_abandoned(self, timeout: float = _TIMEOUT) -> bool:
        """Those that the server uses no more. Others it refuses, or will unregister later, by its version. Whether it
        answers."""
        with self._lock:
            names, self._abandoned = self._abandoned, []
        used = []
        while names:
            try:
                self._unregister(names[-1], timeout)
            except InferenceServerException as error:
                if error.status() in UNFINISHED:  # the server is gone, or hangs
                    break
                used.append(names[-1])
            names.pop()
        with self._lock:
            self._abandoned += names + used
        return not names

    def _unregister(self, name: str, timeout: float = _TIMEOUT) -> None:
        self._client.unregister_system_shared_memory(name, client_timeout=timeout)

    def _sweep(self) -> None:
        """What killed clients left: their files, and what the server keeps of them."""
        with contextlib.suppress(InferenceServerException):
            for name in self._client.get_system_shared_memory_status(client_timeout=_TIMEOUT).regions:
                if name.startswith(OWNER) and not _lives(name):
                    with contextlib.suppress(InferenceServerException):  # a request of it still runs
                        self._unregister(name)
        for path in FOLDER.glob(f"{OWNER}*"):
            if not _lives(path.name):
                with contextlib.suppress(OSError):  # of another user, or gone
                    path.unlink()


class _Owner:
    """An empty file, by whose lock others see that this client lives, also from another container. Whoever drops its
    client without `close` drops the lock too."""

    def __init__(self) -> None:
        number = uuid.uuid4().hex
        self.name = f"{OWNER}{number}"
        starting = FOLDER / f"{_NOT_YET}{number}"
        self._file = os.fdopen(os.open(starting, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600), "rb")
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        starting.rename(FOLDER / self.name)

    def close(self) -> None:
        (FOLDER / self.name).unlink(missing_ok=True)
        self._file.close()


def _lives(name: str) -> bool:
    """Whether the client lives whose file, or region, has this name."""
    owner = OWNER + name.removeprefix(OWNER).partition("_")[0]
    try:
        handle = os.open(FOLDER / owner, os.O_RDWR)
    except FileNotFoundError:
        return False
    except OSError:  # of another user
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False
