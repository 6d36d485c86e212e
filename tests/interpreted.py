"""Triton's kernels without a GPU: its interpreter runs them on the CPU, in a process of its own, because it is chosen
before Triton is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np


def interpreted(file: str) -> dict[str, float]:
    """What a test's file prints last when it is run as a script with the interpreter: a JSON object."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, file], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def report(found: Callable[[], dict[str, float]]) -> None:
    """Prints what `interpreted` reads, in the script's process. AssertionError if a kernel reads or writes outside of
    the tensors that it was given, which a GPU may not notice either."""
    from triton.runtime import interpreter

    builder: Any = interpreter.InterpreterBuilder
    executor: Any = interpreter.GridExecutor
    load, store, given = builder.create_masked_load, builder.create_masked_store, executor._init_args_hst
    ranges: list[tuple[int, int]] = []

    def check(pointers: Any, mask: Any) -> None:
        places = np.asarray(pointers.data)[np.asarray(mask.data, bool)].astype(np.int64)
        size = np.dtype(interpreter._get_np_dtype(pointers.get_element_ty())).itemsize
        inside = [(places >= begin) & (places + size <= end) for begin, end in ranges]
        assert np.any(inside, axis=0).all(), "a kernel went outside of its tensors"

    def checked_load(self: Any, pointers: Any, mask: Any, *more: Any) -> Any:
        check(pointers, mask)
        return load(self, pointers, mask, *more)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *more: Any) -> Any:
        check(pointers, mask)
        return store(self, pointers, value, mask, *more)

    def noted(self: Any, arguments: Any, more: Any) -> Any:
        on_host = given(self, arguments, more)
        tensors = [x for x in (*on_host[0], *on_host[1].values()) if hasattr(x, "data_ptr")]
        spans = (sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) + 1 for x in tensors)
        ranges[:] = [(x.data_ptr(), x.data_ptr() + n * x.element_size()) for x, n in zip(tensors, spans, strict=True)]
        return on_host

    builder.create_masked_load, builder.create_masked_store = checked_load, checked_store
    executor._init_args_hst = noted
    print(json.dumps(found()))
