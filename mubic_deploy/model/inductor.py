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
    are those that it cannot hand on in registers from one loop to the next (`CSE.invalidated_stores`).

    UserError where this PyTorch's Inductor has no such names."""
    from torch._inductor.codegen.common import CSE
    from torch._inductor.codegen.triton import TritonKernel

    if not hasattr(CSE(), "invalidated_stores") or not hasattr(TritonKernel, "get_load_buffer"):
        raise UserError(
            f"the Inductor of PyTorch {torch.__version__} is not known to this version, which could not make its "
            f"kernels wait where they must: use PyTorch 2.11"
        )
    load, get_load_buffer = TritonKernel.load, TritonKernel.get_load_buffer
    read_back = False

    def load_after_all(kernel: Any, name: str, index: Any) -> Any:
        nonlocal read_back
        read_back = name in kernel.cse.invalidated_stores
        try:
            return load(kernel, name, index)
        finally:
            read_back = False

    def buffer_with_barrier(kernel: Any, indexing: Any) -> Any:
        lines = get_load_buffer(kernel, indexing)
        if read_back:
            lines.writeline(BARRIER)  # where the load will be written
        return lines

    kernel_class: Any = TritonKernel
    kernel_class.load, kernel_class.get_load_buffer = load_after_all, buffer_with_barrier
    try:
        yield
    finally:
        kernel_class.load, kernel_class.get_load_buffer = load, get_load_buffer
