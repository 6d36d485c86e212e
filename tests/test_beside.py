"""Threads beside: what they do ahead, what behind, and what is left of them."""

from __future__ import annotations

import threading
import time

import pytest

from mubic_deploy.beside import Behind, ahead, in_order


class Counting:
    """0, 1, 2 .. and how many were made; `failing` raises in its place."""

    def __init__(self, end: int, failing: int | None = None) -> None:
        self.made = 0
        self.thread: threading.Thread | None = None
        self._end, self._failing = end, failing

    def __iter__(self):
        for i in range(self._end):
            if i == self._failing:
                raise KeyError(i)
            self.made += 1
            self.thread = threading.current_thread()
            yield i


def until(true) -> None:
    end = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end
        time.sleep(0.001)


def mubics() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("mubic-")]


@pytest.mark.parametrize("count", [1, 3, 100])
def test_the_same_items_in_order(count):
    source = Counting(20)
    assert list(ahead(source, count)) == list(range(20))
    assert source.thread is not threading.current_thread()
    assert not mubics()


def test_as_many_ahead_as_asked_for_and_no_more():
    source = Counting(20)
    items = ahead(source, 3)
    assert next(items) == 0
    until(lambda: source.made == 4)  # one was taken, three wait
    time.sleep(0.05)
    assert source.made == 4
    items.close()
    assert source.made == 4
    assert not mubics()


@pytest.mark.parametrize("count", [1, 8])
def test_an_error_comes_in_its_place(count):
    items = ahead(Counting(20, failing=5), count)
    assert [next(items) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(KeyError, match="5"):
        next(items)
    assert not mubics()


@pytest.mark.parametrize("threads", [1, 4])
def test_what_several_threads_make_keeps_its_order(threads):
    def squared(i):
        time.sleep(0.003 * (i % 3))
        return i * i

    assert list(in_order(squared, range(20), 5, threads)) == [i * i for i in range(20)]
    assert not mubics()


def test_items_are_asked_for_while_those_before_are_made():
    source, go = Counting(20), threading.Event()
    begun: list[int] = []
    asked: list[int] = []

    def slow(i):
        begun.append(i)
        assert go.wait(10)
        return i

    made = in_order(slow, source, 3, threads=2)

    def let_go():
        until(lambda: source.made == 4 and len(begun) == 2)
        time.sleep(0.05)
        asked.append(source.made)
        asked.append(len(begun))
        go.set()

    threading.Thread(target=let_go).start()
    assert next(made) == 0
    assert asked == [4, 2]  # the first must be made before the fifth is asked for
    assert source.thread is threading.current_thread()
    assert list(made) == list(range(1, 20))


def test_an_error_of_asking_comes_behind_what_was_asked_for_before():
    made = in_order(lambda i: 12 // (3 - i), Counting(20, failing=5), 8, threads=2)
    assert [next(made) for _ in range(3)] == [4, 6, 12]
    with pytest.raises(ZeroDivisionError):  # of 3, though 5 was asked for already
        next(made)
    made = in_order(lambda i: i, Counting(20, failing=5), 8, threads=2)
    assert [next(made) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(KeyError, match="5"):
        next(made)
    assert not mubics()


def test_an_error_of_one_item_comes_in_its_place():
    made = in_order(lambda i: 6 // (3 - i), range(20), 4, threads=3)
    assert [next(made) for _ in range(3)] == [2, 3, 6]
    with pytest.raises(ZeroDivisionError):
        next(made)
    assert not mubics()


def test_calls_are_made_in_order_by_one_thread():
    made = []
    with Behind(4) as behind:
        for i in range(50):
            behind(lambda i: made.append((i, threading.current_thread().name)), i)
        behind.drain()
        assert made == [(i, "mubic-behind_0") for i in range(50)]
    assert not mubics()


def test_who_hands_over_too_many_waits():
    go, handed = threading.Event(), []

    def hand_over(behind):
        for i in range(5):
            behind(go.wait)
            handed.append(i)

    with Behind(3) as behind:
        thread = threading.Thread(target=hand_over, args=(behind,))
        thread.start()
        until(lambda: len(handed) == 3)
        time.sleep(0.05)
        assert len(handed) == 3
        go.set()
        thread.join(10)
        assert len(handed) == 5


def test_the_first_error_is_raised_and_the_rest_is_left():
    made = []

    def call(i):
        made.append(i)
        if i in (2, 3):
            raise KeyError(i)

    with Behind(8) as behind:
        behind(call, 2)
        until(lambda: behind._waiting[0].done())
        with pytest.raises(KeyError, match="2"):
            behind(call, 3)
        assert made == [2]
    with Behind(8) as behind:
        for i in range(5):
            behind(call, i)
        with pytest.raises(KeyError, match="2"):
            behind.drain()
    assert made == [2, 0, 1, 2]  # none after one that failed


def test_what_was_not_drained_is_left():
    go = threading.Event()
    made: list[int] = []
    with Behind(8) as behind:
        behind(go.wait)
        for i in range(5):
            behind(made.append, i)
        futures = list(behind._waiting)

        def let_go():
            until(lambda: all(future.cancelled() for future in futures[1:]))
            go.set()

        threading.Thread(target=let_go).start()
    assert made == []
    assert not mubics()
