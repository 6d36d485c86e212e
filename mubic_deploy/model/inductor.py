"""Inductor's kernels for a GPU, made right where they are not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from mubic_deploy.errors import UserError

BARRIER = "tl.debug_barrier()"  # Triton's name for __syncthreads


@contextlib.contextmanager
def barriers() -> Iterator[None]:
    """Inside, a kernel that Inductor generates waits for all of its warps before it reads back what it has stored.

    A kernel that loops over a reduction twice may store a buffer in the first loop and load it in the second. Triton
    lays out a store and a load as each is read fastest, so that other threads load than stored, and nothing makes them
    wait (pytorch#190519, triton#10924): what is read may be what lay there before. Inductor knows such buffers: they
    are those that it cannot hand on in registers from one loop to the next (`CSE.invalidated_stores`). What comes from
    Inductor's caches is not generated, and may have no barriers.

    UserError where this PyTorch's Inductor is another than is known here, at the end if a barrier could not be set."""
    unknown = UserError(
        f"the Inductor of PyTorch {torch.__version__} is not known to this version, which could not make its kernels "
        f"wait where they must: use PyTorch 2.11"
    )
    try:
        from torch._inductor.codegen.common import CSE
        from torch._inductor.codegen.triton import TritonKernel
    except ImportError:
        raise unknown from None
    if not hasattr(CSE(), "invalidated_stores") or not hasattr(TritonKernel, "get_load_buffer"):
        raise unknown
    load, get_load_buffer = TritonKernel.load, TritonKernel.get_load_buffer
    wanted = missed = False  # a barrier, before the load that is being generated; before any that was

    def load_after_all(kernel: Any, name: str, index: Any) -> Any:
        nonlocal wanted, missed
        wanted = name in kernel.cse.invalidated_stores
        loaded = load(kernel, name, index)
        wanted, missed = False, missed or wanted
        return loaded

    def buffer_with_barrier(kernel: Any, indexing: Any) -> Any:
        nonlocal wanted
        lines = get_load_buffer(kernel, indexing)
        if wanted:
            lines.writeline(BARRIER)  # where the load will be written
            wanted = False
        return lines

    patched: Any = TritonKernel
    patched.load, patched.get_load_buffer = load_after_all, buffer_with_barrier
    try:
        yield
    finally:
        patched.load, patched.get_load_buffer = load, get_load_buffer
    if missed:
        raise unknown
