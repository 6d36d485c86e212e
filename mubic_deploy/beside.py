"""Work that goes on in threads beside: reading ahead of whoever wants the items, and writing behind whoever has them.
Decoders, encoders, engines and NumPy let Python's other threads run while they work.

Use `with closing(...)` around the generators: one that was left would be closed by the garbage collector, in whichever
thread that runs. When they are closed, and at the end of `Behind`'s `with`, nothing is being made any more, however
often somebody presses Ctrl-C meanwhile: what the threads worked on may be closed then."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, ParamSpec, TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")
P = ParamSpec("P")
END: Any = object()


def ahead(items: Iterable[Item], count: int) -> Generator[Item]:
    """The same items in the same order, of which a thread makes up to `count` before they are asked for. What making
    one raises is raised in its place."""
    iterator = iter(items)
    with ThreadPoolExecutor(1, "mubic-ahead") as thread:
        waiting = deque(thread.submit(next, iterator, END) for _ in range(count))
        try:
            while (item := waiting[0].result()) is not END:
                waiting.popleft()
                waiting.append(thread.submit(next, iterator, END))
                yield item
        finally:
            _leave(waiting)


def in_order(make: Callable[[Item], Made], items: Iterable[Item], count: int, threads: int) -> Generator[Made]:
    """`make` of each item, in the items' order, by some threads. The items are asked for in the caller's own, while up
    to `count` of those before are being made. What making one raises, or asking for one, is raised in its place."""
    iterator, problem = iter(items), None
    with ThreadPoolExecutor(threads, "mubic-beside") as pool:
        waiting: deque[Future[Made]] = deque()
        try:
            item = None
            while item is not END:
                try:
                    item = next(iterator, END)
                except Exception as error:
                    item, problem = END, error
                if item is not END:
                    waiting.append(pool.submit(make, item))
                while waiting and (item is END or len(waiting) > count):
                    made = waiting[0].result()
                    waiting.popleft()
                    yield made
            if problem is not None:
                raise problem
        finally:
            _leave(waiting)


class Behind:
    """Calls that a thread makes, in the order they are handed over. What one raises is raised by a later call or by
    `drain`, and after it none is made. At the end of its `with` what was not drained is left."""

    def __init__(self, count: int) -> None:
        """count: of the calls that may wait; who hands over one more waits."""
        self._thread = ThreadPoolExecutor(1, "mubic-behind")
        self._waiting: deque[Future[object]] = deque()
        self._count, self._failed = count, False

    def __enter__(self) -> Behind:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            _leave(self._waiting)
        finally:
            self._thread.shutdown()

    def __call__(self, function: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        while self._waiting and (len(self._waiting) >= self._count or self._waiting[0].done()):
            self._wait()

        def call() -> None:
            if self._failed:
                return
            self._failed = True  # until it returns
            function(*args, **kwargs)
            self._failed = False

        self._waiting.append(self._thread.submit(call))

    def drain(self) -> None:
        """Waits until all calls were made."""
        while self._waiting:
            self._wait()

    def _wait(self) -> None:
        self._waiting[0].result()
        self._waiting.popleft()


def _leave(futures: Collection[Future[Any]]) -> None:
    """Waits for what is being made; what has not begun is not made. An interrupt meanwhile is raised afterwards: an
    interrupted `Thread.join` would not wait when it is called again (CPython 3.11)."""
    interrupt: KeyboardInterrupt | None = None
    while True:
        try:
            for future in futures:
                future.cancel()
            wait(futures)
            break
        except KeyboardInterrupt as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt
