"""A GPU whose memory is short: how the libraries say it, and what is said here."""

from __future__ import annotations

import re

from mubic_deploy.errors import UserError

REMEDY = "send fewer clips at once, run fewer loops (in Triton), or use a GPU that is freer (see nvidia-smi)"
# CUDA, TensorRT, PyTorch, cuBLAS and cuDNN, ONNX Runtime
SHORT = re.compile(r"out ?of ?memory|could not be allocated|failed to allocate memory|_ALLOC_FAILED", re.IGNORECASE)


def is_short(reason: object) -> bool:
    """Whether a library's error says that there is not enough memory."""
    return SHORT.search(str(reason)) is not None


def short_of_memory(what: str, reason: object, remedy: str = REMEDY) -> UserError:
    """The error for `what` needed the memory. reason: the library's own words, of which the first line is given."""
    return UserError(f"the GPU has not enough memory for {what} ({first_line(reason)}): {remedy}")


def first_line(reason: object) -> str:
    """Of a library's error."""
    return next(iter(str(reason).strip().splitlines()), "no reason given")
