"""Work that goes on in threads beside: reading ahead of whoever wants the items, and writing behind whoever has them.
Decoders, encoders, engines and NumPy let Python's other threads run while they work."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")
P = ParamSpec("P")
END: Any = object()


def ahead(items: Iterable[Item], count: int) -> Generator[Item]:
    """The same items in the same order, of which a thread makes up to `count` before they are asked for. What making
    one raises is raised in its place. `items` is at rest when this generator was closed."""
    iterator = iter(items)
    with ThreadPoolExecutor(1, "mubic-ahead") as thread:
        waiting = deque(thread.submit(next, iterator, END) for _ in range(count))
        try:
            while (item := waiting.popleft().result()) is not END:
                waiting.append(thread.submit(next, iterator, END))
                yield item
        finally:
            thread.shutdown(cancel_futures=True)


def in_order(make: Callable[[Item], Made], items: Iterable[Item], count: int, threads: int) -> Generator[Made]:
    """`make` of each item, in the items' order, by some threads. The items are asked for in the caller's own, while up
    to `count` of those before are being made. What making one raises is raised in its place."""
    with ThreadPoolExecutor(threads, "mubic-beside") as pool:
        waiting: deque[Future[Made]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(make, item))
                if len(waiting) > count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


class Behind:
    """Calls that a thread makes, in the order they are handed over. What one raises is raised by a later call or by
    `drain`, the first one's first. At the end of its `with` no call is made any more: what was not drained is left."""

    def __init__(self, count: int) -> None:
        """count: of the calls that may wait; who hands over one more waits."""
        self._thread = ThreadPoolExecutor(1, "mubic-behind")
        self._waiting: deque[Future[object]] = deque()
        self._count = count

    def __enter__(self) -> Behind:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def __call__(self, function: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        while self._waiting and (len(self._waiting) >= self._count or self._waiting[0].done()):
            self._waiting.popleft().result()
        self._waiting.append(self._thread.submit(function, *args, **kwargs))

    def drain(self) -> None:
        """Waits until all calls were made."""
        while self._waiting:
            self._waiting.popleft().result()
