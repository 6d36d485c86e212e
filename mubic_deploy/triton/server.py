"""Triton's server from the wheel nvidia-pytriton, as a child process: no container, no root."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import http.client
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import sysconfig
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable
from ctypes.util import find_library
from importlib.util import find_spec
from pathlib import Path
from shutil import Error as CopyError
from shutil import copy2, copytree, rmtree
from typing import BinaryIO

from mubic_deploy.errors import UserError
from mubic_deploy.triton import watchdog
from mubic_deploy.triton.health import model_of, model_processes

HTTP_PORT, GRPC_PORT, METRICS_PORT = 8000, 8001, 8002
_GRACE = 10.0  # s for requests in flight and for the models to end
_POLL = 0.05  # s
_LAST = 3.0  # s between the end of a server's models and that of its watchdog
SHM_BYTES = 16 << 20  # of each model process at the start; it grows as needed
_INSTALL = "install it with: pip install 'mubic-deploy[serve]'"


class TritonServer:
    """A running server: `with TritonServer(repository) as server:`, or `start` and `stop`.

    repository: a folder that `write_repository` made. host: the address to listen on. Ports: 0 picks a free one.
    log: the file for the server's output, of no other server that runs; without one a temporary file, which stays only
    if the server failed. timeout: seconds until every model must be ready. remove: folders that go when the server has
    ended, even if this process was killed.

    UserError when starting: the wheel is missing, a port or the log is in use, or the server ends or is not ready in
    time, with the cause from its log."""

    def __init__(
        self,
        repository: Path,
        *,
        host: str = "127.0.0.1",
        http_port: int = HTTP_PORT,
        grpc_port: int = GRPC_PORT,
        metrics_port: int = METRICS_PORT,
        log: Path | None = None,
        timeout: float = 120.0,
        remove: Iterable[Path] = (),
    ) -> None:
        self.repository = Path(repository).resolve()
        self.host = _number(host)
        self.http_port, self.grpc_port, self.metrics_port = http_port, grpc_port, metrics_port
        self.timeout = timeout
        self.log = log
        self.remove = [str(Path(folder).resolve()) for folder in remove]
        self.shm_prefix = f"mubic_{uuid.uuid4().hex[:12]}_"  # of its files in /dev/shm
        self._keep_log = log is not None
        self._process: subprocess.Popen | None = None
        self._models: dict[int, str] = {}  # by the numbers of their processes, once the server is ready

    @property
    def url(self) -> str:
        """Where clients connect: "HOST:PORT" of gRPC."""
        return f"{_reachable(self.host)}:{self.grpc_port}"

    def __enter__(self) -> TritonServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, wanted: Callable[[], bool] = lambda: True) -> bool:
        """Returns True when every model is ready; stops and returns False as soon as `wanted()` is false."""
        if not self.repository.is_dir():
            raise UserError(f"there is no model repository {self.repository}: make it with write_repository")
        self.http_port, self.grpc_port, self.metrics_port = _ports(
            self.host, {"HTTP": self.http_port, "gRPC": self.grpc_port, "metrics": self.metrics_port}
        )
        package = _package()
        try:
            folder = Path(tempfile.mkdtemp(prefix="mubic-triton-"))
        except OSError as error:
            raise _not_started(error) from None
        try:
            self._launch(package, folder)
            ready = self._wait(wanted)
        except BaseException:
            self._end(kindly=False, keep_log=True)
            rmtree(folder, ignore_errors=True)
            raise
        if ready:
            self._models = model_processes(self.shm_prefix)
        else:
            self._end(kindly=False, keep_log=False)
        return ready

    def stop(self) -> None:
        """Ends the server, after the requests in flight, and its model processes, and removes what they left. Harmless
        if there is none."""
        self._end(kindly=True, keep_log=False)

    def _end(self, kindly: bool, keep_log: bool) -> None:
        process, self._process, self._models = self._process, None, {}
        if process is None:
            return
        keep_log = keep_log or process.poll() is not None  # it ended by itself: the log says why
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            if not kindly:
                process.stdin.write(b"!")
            process.stdin.close()
        try:
            process.wait(_GRACE + 5)
        except subprocess.TimeoutExpired:
            process.kill()  # the server dies with it
            process.wait()
        if not self._keep_log and not keep_log and self.log is not None:
            self.log.unlink(missing_ok=True)
            self.log = None

    def check(self) -> None:
        """UserError if the server is not running any more, with the cause from the log, or if a model's process is not:
        Triton (2.51) starts none again and still calls itself ready, but every request to that process fails."""
        if self._process is None:
            raise UserError("the Triton server is not started: use start, or `with`")
        gone = [model for number, model in self._models.items() if not model_of(number, self.shm_prefix)]
        if gone:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_LAST)  # it may be the server that ends, and all its models with it
        status = self._process.poll()
        if status is not None:
            raise UserError(f"the Triton server ended by itself ({_ended(status)}): {self._cause()}")
        if gone:
            self._keep_log = True
            raise UserError(
                f"the process of the model {gone[0]} ended by itself, and Triton starts no other: start the server "
                f"again; memory may have run out, see dmesg (log: {self.log})"
            )

    def _launch(self, package: Path, folder: Path) -> None:
        prefix = self.shm_prefix
        try:
            job = {
                "command": self._command(package, _backends(package, folder), prefix),
                "env": _environment(package) | {"TMPDIR": str(folder)},  # what the models leave there goes with it
                "grace": _GRACE,
                "shm_prefix": prefix,
                "remove": [str(folder), *self.remove],
            }
            if self.log is None:
                handle, name = tempfile.mkstemp(prefix="mubic-triton-", suffix=".log")
                os.close(handle)
                self.log = Path(name)
        except OSError as error:
            raise _not_started(error) from None
        try:
            with _fresh(self.log) as log:
                # a session of its own: an interrupt from the terminal reaches this process only, which ends the server
                self._process = subprocess.Popen(
                    [sys.executable, "-I", watchdog.__file__, json.dumps(job)],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
        except OSError as error:
            raise UserError(f"the Triton server cannot be started ({error}): end what else runs here") from None

    def _command(self, package: Path, backends: Path, shm_prefix: str) -> list[str]:
        options = {
            "model-repository": self.repository,
            "backend-directory": backends,
            "strict-readiness": "true",
            "exit-timeout-secs": int(_GRACE) - 2,
            "http-address": self.host,
            "http-port": self.http_port,
            "grpc-address": self.host,
            "grpc-port": self.grpc_port,
            "metrics-address": self.host,
            "metrics-port": self.metrics_port,
            "allow-gpu-metrics": "false",
        }
        python = {
            "shm-region-prefix-name": shm_prefix,
            "shm-default-byte-size": SHM_BYTES,
            "stub-timeout-seconds": int(self.timeout),
        }
        # the configurations are complete; completing them would start every model process twice
        command = [str(package / "tritonserver" / "bin" / "tritonserver"), "--disable-auto-complete-config"]
        command += [f"--{key}={value}" for key, value in options.items()]
        return command + [f"--backend-config=python,{key}={value}" for key, value in python.items()]

    def _wait(self, wanted: Callable[[], bool]) -> bool:
        end = time.monotonic() + self.timeout
        while wanted():
            self.check()
            if self._is_ready():
                return True
            if time.monotonic() > end:
                raise UserError(f"the Triton server is not ready after {self.timeout:g} s: see its log {self.log}")
            time.sleep(_POLL)
        return False

    def _is_ready(self) -> bool:
        """Health, which with strict readiness says that all the models are ready too."""
        connection = http.client.HTTPConnection(_reachable(self.host), self.http_port, timeout=5)
        try:
            connection.request("GET", "/v2/health/ready")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _cause(self) -> str:
        assert self.log is not None
        return f"{_cause(self.log.read_text(errors='replace'))} (log: {self.log})"


def serve(repository: Path, *, on_ready: Callable[[TritonServer], None] | None = None, **options: object) -> None:
    """Serves until SIGINT or SIGTERM; call it from the main thread. `on_ready` gets the server when it is ready;
    options: those of `TritonServer`. UserError if the server cannot start or ends by itself."""
    stopped = False

    def stop(number: int, frame: object) -> None:
        nonlocal stopped
        stopped = True

    server = TritonServer(repository, **options)  # type: ignore[arg-type]
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        if server.start(lambda: not stopped) and on_ready is not None:
            on_ready(server)
        while not stopped:
            server.check()
            time.sleep(_POLL)
    finally:
        server.stop()
        for number, handler in before.items():
            signal.signal(number, handler)


def _package() -> Path:
    """The folder of pytriton, which is not imported: that takes a second and starts things."""
    spec = find_spec("pytriton")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"nvidia-pytriton, which holds the Triton server, is missing: {_INSTALL}")
    package = Path(spec.submodule_search_locations[0])
    if not (package / "tritonserver" / "bin" / "tritonserver").is_file():
        raise UserError(f"{package} holds no tritonserver (it exists for Linux on x86-64): {_INSTALL}")
    return package


def own_command(repository: Path) -> list[str]:
    """What starts a Triton of one's own on a repository; that of a GPU wants more."""
    options = [f"--model-repository={repository}", f"--backend-config=python,shm-default-byte-size={SHM_BYTES}"]
    return ["tritonserver", "--disable-auto-complete-config", *options]


def _not_started(error: OSError) -> UserError:
    """A server wants some files of its own: a log, and the wheel's backends."""
    reason = error.args[0][0][2] if isinstance(error, CopyError) else error  # of copytree: the first file's
    return UserError(
        f"the Triton server cannot be started ({reason}): make room in the folder for temporary files, or set TMPDIR "
        f"to another one"
    )


def _fresh(log: Path) -> BinaryIO:
    """An empty log. Whoever inherits it holds its lock until the last of them has ended. UserError if it cannot be
    written or another server has it."""
    try:
        file = log.open("ab")
    except OSError as error:
        raise UserError(f"{log} cannot be written ({error.strerror or error}): choose another --log") from None
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # not /dev/null
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise UserError(f"{log} is the log of another server, which runs: choose another --log") from None
        except OSError:  # a file system without locks
            pass
        file.truncate(0)
    return file


def _backends(package: Path, folder: Path) -> Path:
    """A copy of the wheel's backends with the stub of this Python in it."""
    version = sysconfig.get_python_version()
    stubs = package / "tritonserver" / "python_backend_stubs"
    stub = stubs / version / "triton_python_backend_stub"
    if not stub.is_file():
        known = ", ".join(sorted(p.name for p in stubs.iterdir()))
        raise UserError(f"the Triton server of the wheel has no stub for Python {version}: use one of {known}")
    library = f"libpython{version}.so.1.0"  # the stub is linked to it, but a Python may do without
    beside = Path(sysconfig.get_config_var("LIBDIR") or "") / library
    if not beside.is_file() and find_library(f"python{version}") is None:
        raise UserError(
            f"the Triton server needs {library}, which this Python lacks: install the package libpython{version} (on "
            f"Debian and Ubuntu), or use a Python that was built with --enable-shared"
        )
    backends = folder / "backends"
    copytree(package / "tritonserver" / "backends", backends)
    copy2(stub, backends / "python" / stub.name)
    return backends


def _environment(package: Path) -> dict[str, str]:
    """What the server's environment has besides ours: its model processes shall find this Python, its libraries and
    its packages."""
    site = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    libraries = [package.parent / "nvidia_pytriton.libs", sysconfig.get_config_var("LIBDIR")]

    def joined(name: str, *first: object) -> str:
        return os.pathsep.join([str(p) for p in first if p] + [p for p in [os.environ.get(name)] if p])

    return {
        "PATH": joined("PATH", Path(sys.executable).parent),
        "LD_LIBRARY_PATH": joined("LD_LIBRARY_PATH", *libraries),
        "PYTHONPATH": joined("PYTHONPATH", Path(__file__).parents[2], *site),
    }


def _reachable(host: str) -> str:
    """An address at which a server that listens on `host` answers."""
    return "127.0.0.1" if host == "0.0.0.0" else host


def _number(host: str) -> str:
    """The IPv4 address of `host`: Triton's HTTP server takes a name, or an address of IPv6, for 255.255.255.255."""
    try:
        return str(socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])
    except (OSError, UnicodeError):
        raise UserError(
            f"{host!r} has no IPv4 address, which Triton needs: use 127.0.0.1, 0.0.0.0 or one of this machine's"
        ) from None


def _ports(host: str, ports: dict[str, int]) -> list[int]:
    """The ports with free ones for 0, all of them tried out. UserError names a port, or the host, that cannot be
    had."""
    with contextlib.ExitStack() as held:
        found = []
        for use, port in ports.items():
            try:
                family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
                listener = held.enter_context(socket.socket(family, kind))
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(address)
                listener.listen()
            except (OSError, OverflowError) as error:
                if getattr(error, "errno", None) == errno.EADDRNOTAVAIL:
                    raise UserError(
                        f"{host} is no address of this machine: use 127.0.0.1, 0.0.0.0 or one of its own"
                    ) from None
                reason = getattr(error, "strerror", None) or error
                raise UserError(
                    f"{use} port {port} of {host} cannot be used ({reason}): choose another with --{use.lower()}-port"
                ) from None
            found.append(listener.getsockname()[1])
    return found


def _ended(status: int) -> str:
    """What the watchdog's exit status says: over 128 it is that of a signal."""
    try:
        name = signal.Signals(status - 128).name
    except ValueError:
        return f"status {status}"
    return f"status {status}, {name}" + (": memory may have run out, see dmesg" if name == "SIGKILL" else "")


def _cause(log: str) -> str:
    """The most telling line of the log of a server that ended."""
    models = re.findall(r"\"failed to load '(\S+)' version \d+: \w+: (.*?)(?:\\n|\"$)", log, re.M)
    if models:
        name, reason = models[0]
        return f"the model {name} cannot be loaded: {reason.removeprefix('UserError: ')}"
    log = "\n".join(line for line in log.splitlines() if not re.search("cuda", line, re.I))  # where there is no GPU
    errors = re.findall(r"^E\d{4} [^\]]*\] \"(.*)\"$", log, re.M)
    # the first error, or else the last that it said
    line = errors[0] if errors else (log.strip().splitlines() or ["it wrote nothing"])[-1]
    return line.split("\\n")[0]
