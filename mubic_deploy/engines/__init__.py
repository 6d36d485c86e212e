"""Engines: what runs a graph. One small protocol; each engine is a file of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from mubic_deploy.graphs import Signature

Fetch = Callable[[], np.ndarray]


@dataclass(frozen=True)
class DeviceArray:
    """A tensor in a GPU's memory, as an engine there returned it. `np.asarray` brings it over and waits for it.

    The memory is the engine's: it holds this tensor until an engine of the same chain writes one of its name again.

    value  what the engines of that kind know it by
    fetch  copies it to the host
    begin  begins to, and what it returns waits for that: the memory may be written again by what is asked for from then
           on. None where the engine cannot do something else meanwhile"""

    value: Any
    shape: tuple[int, ...]
    dtype: np.dtype
    fetch: Fetch
    begin: Callable[[], Fetch] | None = None

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self.fetch()
        return array if dtype is None else array.astype(dtype, copy=False)


def fetching(array: Array) -> Fetch:
    """Begins to bring an array to the host, if it is not there: what waits for it, if the engine can go on meanwhile,
    and gives it."""
    if isinstance(array, DeviceArray) and array.begin is not None:
        return array.begin()
    there = np.asarray(array)
    return lambda: there


Array = np.ndarray | DeviceArray
Arrays = Mapping[str, Array]
HostArrays = dict[str, np.ndarray]


class Engine(Protocol):
    """One graph, ready to run."""

    signature: Signature

    def __call__(self, inputs: Arrays) -> Arrays:
        """Arrays by tensor name, each [B, *shape] as the signature says, in; the outputs by name out.

        An engine on a GPU returns what it made where it is, perhaps before it is done, and takes such arrays of its own
        kind as they are: so a chain of them moves nothing, and waits once, but for ONNX Runtime, which waits after each
        graph."""
        ...
