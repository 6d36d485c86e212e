"""Do other engines compute what eager PyTorch computes? The check behind `export` and `mubic-deploy parity`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mubic_deploy import graphs
from mubic_deploy.config import DIFFUSION_STEPS, Config
from mubic_deploy.engines import Array, Engine, HostArrays
from mubic_deploy.errors import UserError, whole
from mubic_deploy.graphs import FLOAT32
from mubic_deploy.metrics import cc
from mubic_deploy.pipeline import ALLOCATE, Allocate, Pipeline

CLIPS = 3
CONDITIONER = "conditioner"  # in place of a graph: an engine of several, against these one by one
# of graphs that no check has let pass
EXPORTED = "the exported graphs differ from eager PyTorch"
ANOTHER_EXPORT = "export them with the versions of requirements.txt, which are known to agree"


@dataclass(frozen=True)
class Tolerance:
    """What a candidate may differ by.

    graph     largest difference of any output tensor of a graph
    map       of the final map
    cc        lowest of the final map
    relative  `graph` counts in parts of the largest value of each tensor, where that is above 1"""

    graph: float
    map: float
    cc: float
    relative: bool


TOLERANCES = {
    "float32": Tolerance(graph=1e-4, map=1e-3, cc=0.9999, relative=False),
    "float16": Tolerance(graph=1e-2, map=2e-2, cc=0.999, relative=True),
}


@dataclass
class Parity:
    """Differences of a candidate from the reference over some random clips."""

    graphs: dict[str, dict[str, float]] = field(default_factory=dict)  # graph -> tensor -> largest difference
    means: dict[str, dict[str, float]] = field(default_factory=dict)  # graph -> tensor -> mean difference
    map_difference: float = 0.0
    map_cc: float = 1.0  # the lowest
    clips: int = 0
    precision: str = FLOAT32  # of the candidate

    @property
    def tolerance(self) -> Tolerance:
        return TOLERANCES[self.precision]

    @property
    def ok(self) -> bool:
        # NumPy's, because NaN must not pass: max(0.0, nan) is 0.0
        worst = np.max([d for tensors in self.graphs.values() for d in tensors.values()])
        allowed = self.tolerance
        return bool(worst <= allowed.graph and self.map_difference <= allowed.map and self.map_cc >= allowed.cc)

    def note(self, name: str, expected: HostArrays, got: HostArrays) -> None:
        """The differences of one of `clips` calls of a graph."""
        worst, means = self.graphs.setdefault(name, {}), self.means.setdefault(name, {})
        for tensor, array in expected.items():
            apart = np.abs(array.astype(np.float64) - got[tensor])
            if array.dtype.kind == "i":
                # ADAPTIVE_STEPS is rounded: the entropy behind it may lie between two numbers of steps
                apart = np.maximum(0.0, apart - 1)
            difference, mean = apart.max(), apart.mean()
            if self.tolerance.relative:
                scale = np.maximum(1.0, np.abs(array).max())
                difference, mean = difference / scale, mean / scale
            worst[tensor] = float(np.maximum(worst.get(tensor, 0.0), difference))
            means[tensor] = means.get(tensor, 0.0) + float(mean) / self.clips

    def to_json(self) -> dict[str, Any]:
        return {
            "clips": self.clips,
            "precision": self.precision,
            "graphs": self.graphs,
            "map_difference": self.map_difference,
            "map_cc": self.map_cc,
            "ok": self.ok,
        }

    def require(self, what: str = EXPORTED, remedy: str = ANOTHER_EXPORT) -> None:
        """UserError that says `what`, the tensor furthest off and the `remedy`, unless all is within tolerance."""
        if self.ok:
            return
        flat = [(d, graph, tensor) for graph, tensors in self.graphs.items() for tensor, d in tensors.items()]
        difference, graph, tensor = flat[np.argmax([d for d, _, _ in flat])]
        raise UserError(
            f"{what}: {tensor} of {graph} by {difference:.1e} (at most "
            f"{self.tolerance.graph:.0e}), the map by {self.map_difference:.1e} (at most {self.tolerance.map:.0e}), "
            f"its CC {self.map_cc:.6f} (at least {self.tolerance.cc}); {remedy}"
        )


def random_clip(config: Config, seed: int, batch: int = 1) -> HostArrays:
    """VIDEO and AUDIO of uniform noise, seeded, as `graphs.pipeline` says."""
    rng = np.random.default_rng(seed)
    video, audio = graphs.video(config), graphs.audio()
    return {
        "VIDEO": rng.integers(0, 256, (batch, *video.shape), dtype=np.uint8),
        "AUDIO": rng.uniform(-1, 1, (batch, *audio.shape)).astype(np.float32),
    }


def allocated(allocate: Allocate, array: np.ndarray) -> np.ndarray:
    """A copy of an array, in what `allocate` makes."""
    out = allocate(array.shape, array.dtype)
    out[...] = array
    return out


def compare(
    config: Config,
    reference: Mapping[str, Engine],
    candidate: Mapping[str, Engine],
    clips: int = CLIPS,
    progress: Callable[[int], None] = lambda done: None,
    precision: str = FLOAT32,
    batch: int = 1,
    conditioner: Engine | None = None,
    allocate: Allocate = ALLOCATE,
) -> Parity:
    """Each graph on the reference's own intermediate tensors, and the final map of the whole chain, for `clips` batches
    of random clips. precision: of the candidate. `progress` hears how many are done. The sampler is compared if the
    candidate has one, and the chain with its loop; with the candidate's conditioner if it has one, which is compared
    with the graphs that it stands for. allocate: see `Pipeline`, of the clips that the chain gets."""
    whole("clips", clips, 1)
    result = Parity(clips=clips, precision=precision)
    progress(0)
    for seed in range(clips):
        clip = {name: allocated(allocate, array) for name, array in random_clip(config, seed, batch).items()}
        tensors: dict[str, Array] = {**clip}
        rng = np.random.default_rng(seed)
        tensors["S_T"] = rng.standard_normal((batch, 1, *config.map_size), np.float32)
        tensors["STEP"] = np.full((batch, 1), rng.integers(0, DIFFUSION_STEPS), np.int32)
        tensors["ALPHA_NOW"] = rng.uniform(0.01, 0.5, (batch, 1)).astype(np.float32)
        tensors["ALPHA_NEXT"] = rng.uniform(0.5, 1, (batch, 1)).astype(np.float32)
        for name, signature in graphs.signatures(config, precision, sampler=graphs.SAMPLER in candidate).items():
            given = {t.name: np.asarray(tensors[t.name]).astype(t.dtype) for t in signature.inputs}
            expected = {key: np.asarray(array) for key, array in reference[name](tensors).items()}
            got = {key: np.asarray(array) for key, array in candidate[name](given).items()}
            result.note(name, expected, got)
            tensors |= expected
        if conditioner is not None:
            singly = {k: np.array(x) for k, x in Pipeline(config, candidate).condition(clip).items()}
            conditioner(random_clip(config, seed + clips, batch))  # which the next one must not overtake
            result.note(CONDITIONER, singly, {k: np.asarray(x) for k, x in conditioner(clip).items()})
        chains = (Pipeline(config, reference), Pipeline(config, candidate, conditioner=conditioner))
        pairs = [chain.predict(clip["VIDEO"], clip["AUDIO"], seed)[0] for chain in chains]
        result.map_difference = float(np.maximum(result.map_difference, np.abs(pairs[0] - pairs[1]).max()))
        ccs = (1.0 if np.array_equal(a, b) else cc(a, b) for a, b in zip(*pairs, strict=True))  # flat maps have no CC
        result.map_cc = float(np.min([result.map_cc, *ccs]))
        progress(seed + 1)
    return result
