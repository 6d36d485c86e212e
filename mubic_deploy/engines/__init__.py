"""Engines: what runs a graph. One small protocol; each engine is a file of its own."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from mubic_deploy.graphs import Signature

Arrays = dict[str, np.ndarray]


class Engine(Protocol):
    """One graph, ready to run."""

    signature: Signature

    def __call__(self, inputs: Arrays) -> Arrays:
        """Arrays by tensor name, each [B, *shape] as the signature says, in; the outputs by name out."""
        ...
