"""bench/tiles.py without a GPU: what it finds that clips launch, with tensors that have no values; and how it times and
compares tiles, with Triton's interpreter, in a process of its own."""

from __future__ import annotations

import math
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from half_fixtures import TINY
from interpreted import interpreted, report
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver

from bench import results, tiles, timing
from bench.stages import weights
from mubic_deploy.cli import guarded
from mubic_deploy.config import ON_GPU, get_config
from mubic_deploy.graphs import FLOAT16
from mubic_deploy.model import products, windows
from mubic_deploy.model.precision import prepared

OWN = products.Tile(16, 32, 16, 1, 1)
WRONG, BROKEN = OWN._replace(m=32), OWN._replace(n=16)


class Unlaunched:
    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert all(size > 0 for size in grid)
        return lambda *given, **more: None


def test_all_that_clips_launch_is_found() -> None:
    """One clip's and more clips', of one graph and of four steps."""
    model = prepared(weights(get_config("full"), True, "cpu"), FLOAT16, ON_GPU).to("meta")
    for batch in (1, 3):
        with tiles.without_values(Unlaunched):
            found = {launch.name: launch for launch in tiles.launches(model, batch, "meta")}
            again = sum(launch.times for launch in tiles.launches(model, batch, "meta"))
            macs = {name: launch.values()["macs"] for name, launch in found.items()}
        assert found["product 384 to 1536, norm, its moments given, GELU"].times == 11  # the third scale's blocks
        assert found["depth-wise 4 and 8 x 96, 8 x 14 x 24, strides 1 and 2"].times == 10
        steps = "windows 1152 to 128, 28 x 48, kernel 3 x 3, stride 1 x 1, residual"
        assert (found[steps].times, found[steps].tile) == (4, windows.TILES[128, 1152])
        assert macs[steps] == batch * 28 * 48 * 128 * 1152
        assert again == sum(launch.times for launch in found.values())


class Hopper:
    """Triton's driver, as far as a compiler asks it."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def test_all_tiles_are_compiled_before_they_are_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """For a GPU, without one: of tensors without values, and then found by launches of those that have some."""

    class Products(tiles.Compiled):
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            compiles = self.kernel is products._product  # the others take long
            return super().__getitem__(grid) if compiles else lambda *_, **__: None

    def compiled() -> int:
        return sum(len(caches[0]) for caches in products._product.device_caches.values())

    ran: list[CompiledKernel] = []
    monkeypatch.setattr(driver, "_active", Hopper())
    monkeypatch.setattr(CompiledKernel, "run", property(lambda kernel: lambda *_: ran.append(kernel)))
    monkeypatch.setattr(CompiledKernel, "launch_metadata", lambda *_: None)
    monkeypatch.setattr(tiles, "KINDS", (tiles.of_products(),))
    monkeypatch.setattr(tiles, "Compiled", Products)
    monkeypatch.setattr(tiles, "neighbours", lambda tile: [tile, tile._replace(stages=2)])
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    model = prepared(weights(get_config("full"), True, "cpu"), FLOAT16, ON_GPU)
    try:
        products._product.device_caches.clear()
        tiles.compile_all(model, 1)
        assert compiled() == 2 * 7
        x, weight, bias, sums = (torch.zeros(size) for size in ((1, 5, 96), (384, 96), 384, 384))
        given = (None, products.TILES[384, 96], x.half(), weight.half(), bias.half(), None, sums, None, 1e-6, True)
        launch = tiles.Launch(tiles.KINDS[0], given, {"moments": False})
        for tile in tiles.neighbours(launch.tile):
            launch(tile)
        assert (compiled(), len({*map(id, ran)})) == (2 * 7, 2)
        launch(launch.tile._replace(stages=1))
        assert (compiled(), len({*map(id, ran)})) == (2 * 7 + 1, 3)
    finally:
        products._product.device_caches.clear()


def made_by(launch: Any) -> tiles.Launch:
    """A launch in OWN of what is made by this."""
    return tiles.Launch(tiles.Kind(products, "launched", lambda: OWN, launch, lambda: ["a launch"], lambda: 1), (), {})


def test_a_gpu_replays_a_graph_of_many_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or what its start and end take would be most of the figure."""
    did: list[str] = []

    def captured(repeated: Any, places: list[Tensor], _stream: object) -> tuple[Any, Any]:
        assert places == []
        return SimpleNamespace(replay=lambda: did.append("replayed")), repeated()

    monkeypatch.setattr(tiles, "captured", captured)
    monkeypatch.setattr(torch.cuda, "Stream", object)
    replay = tiles.side(made_by(lambda _tile: did.append("launched")), OWN, "cuda")
    assert did == ["launched"] * tiles.REPEATS
    replay(0)
    replay(1)
    assert did[tiles.REPEATS :] == ["replayed"] * 2
    for seconds in (10e-6, 800e-6):  # of a launch: some 300 tiles are timed in minutes
        assert timing.AT_LEAST <= tiles.RULE.calls(tiles.REPEATS * seconds) <= 20


def test_what_is_no_number_is_not_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the second result of two. And a GPU that one tile broke is not asked for more."""
    told: dict[Any, str] = {}

    def launch(tile: products.Tile) -> tuple[Tensor, Tensor]:
        if tile == BROKEN:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return torch.ones(3), torch.full((3,), torch.nan if tile == WRONG else 1.0)

    able = tiles.sides(made_by(launch), "cpu", told.__setitem__)
    assert {*able} | {*told} == {*tiles.neighbours(OWN)}
    assert told == {
        WRONG: "differs by 0, nan of the largest value",
        BROKEN: "RuntimeError: CUDA error: an illegal memory access was encountered",
    }

    def broken() -> None:
        raise torch.AcceleratorError("CUDA error")

    told.clear()
    monkeypatch.setattr(tiles, "side", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    with pytest.raises(torch.AcceleratorError):
        tiles.sides(made_by(launch), "cuda", told.__setitem__)
    assert BROKEN in told


def test_a_launch_whose_own_tile_fails_does_not_end_the_run() -> None:
    def launch(tile: products.Tile) -> tuple[Tensor, ...]:
        raise RuntimeError("out of resource: shared memory")

    made = made_by(launch)
    vars(made)["values"] = lambda: {"macs": 1, "bytes": 1, "times": 1}
    found = results.Results("tiles", {})
    tiles.measure([made], 2, found, "cpu", math.inf, lambda _: None)
    assert found.rows == []
    assert [*found.left_out.values()] == ["RuntimeError: out of resource: shared memory"]
    assert tiles.written(OWN) in next(iter(found.left_out))


def test_what_differs_in_one_number() -> None:
    near = tiles.neighbours(products.Tile(64, 16, 512, 1, 2))
    assert near[0] == (64, 16, 512, 1, 2)
    assert sorted(near[1:]) == [
        (32, 16, 512, 1, 2),
        (64, 16, 256, 1, 2),
        (64, 16, 512, 1, 1),
        (64, 16, 512, 1, 3),
        (64, 16, 512, 2, 2),
        (64, 32, 512, 1, 2),
        (128, 16, 512, 1, 2),
    ]


def test_the_fastest_tile_is_told_with_what_it_saves(tmp_path: Path) -> None:
    found = results.Results("tiles", {"precision": FLOAT16}, limits={"gemm_float16": 1e12, "copy": 1e12})
    values = {"macs": 1e6, "bytes": 3e6, "times": 10.0}
    for side, seconds in (("m 64", 8e-6), ("m 32", 6e-6), ("m 16", 9e-6)):
        timed = timing.Timing((seconds,) * 9, measurement=1)
        found.rows.append(results.Row("product", side, {"batch": 1, "own": "m 64"}, timed, values))
    table = tiles.summary(found)
    cells = [next(iter(column.cells)) for column in table.columns]
    assert cells == ["1", "product", "10", "3.0", "8.0", "6.0", "m 32", "20.0", "20.0"]


def test_it_wants_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["tiles.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert guarded(tiles.main) == 2
    assert capsys.readouterr().err == (
        "mubic-deploy: PyTorch finds no NVIDIA GPU here: run this on a machine with one\n"
    )


@pytest.fixture(scope="module")
def ran() -> dict[str, Any]:
    return interpreted(__file__)


def test_tiles_that_compute_the_same_are_timed_and_others_named(ran: dict[str, Any]) -> None:
    timed, left_out, what = ran["timed"], ran["left_out"], "product 16 to 32, GELU, batch 2"
    assert timed[0] == tiles.written(OWN)
    assert {*timed} == {tiles.written(tile) for tile in tiles.neighbours(OWN)} - {*map(tiles.written, (WRONG, BROKEN))}
    assert left_out == {
        f"{what}, {tiles.written(BROKEN)}": "RuntimeError: out of resource: shared memory",
        f"{what}, {tiles.written(WRONG)}": left_out[f"{what}, {tiles.written(WRONG)}"],
        "product 32 to 16, no bias, batch 2": "there was no time",
    }
    assert left_out[f"{what}, {tiles.written(WRONG)}"].startswith("differs by ")
    assert ran["median"] == 0.25  # of a launch: a call is four
    assert ran["values"] == {"macs": 24 * 32 * 16, "bytes": 2 * (24 * 16 + 32 * 16 + 32 + 24 * 32), "times": 3}


def _interpreted() -> dict[str, Any]:
    """Two products, one of them launched three times. Of the first one tile computes something else, and one is too
    large for the GPU. After the first the time is over."""
    launched, clock = products.launched, iter((0.0, 0.0, 0.0, 1.0, 1e9))
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).half()

    def spoilt(kernel: Any, tile: products.Tile, *given: Any, **more: Any) -> tuple[Tensor, Tensor | None]:
        if tile == BROKEN:
            raise RuntimeError("out of resource: shared memory\nHardware limit")
        out, moments = launched(kernel, tile, *given, **more)
        return (out + 1 if tile == WRONG else out), moments

    def clips(*_given: Any) -> list[tiles.Launch]:
        with tiles.noted() as found:
            small = (drawn(2, 12, 32), drawn(16, 32), None, None, None, None, 1e-6, False)
            products.launched(products._product, OWN, *small, moments=False)
            x, weight, bias = drawn(2, 12, 16), drawn(32, 16), drawn(32)
            for _ in range(3):
                products.launched(products._product, OWN, x, weight, bias, None, None, None, 1e-6, True, moments=False)
        return list(found.values())

    rule = timing.Rule(repeats=5, seconds=0.01, short_s=0.0, warm_up_s=0.01, quick=True)
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(products, "launched", spoilt)
        patch.setattr(products, "wrap_triton", lambda kernel: kernel)
        patch.setattr(tiles, "KINDS", (tiles.of_products(),))
        patch.setattr(tiles, "launches", clips)
        patch.setattr(tiles, "compile_all", lambda *_: None)
        patch.setattr(tiles.machine, "limits", lambda _: {})
        patch.setattr(tiles, "RULE", rule)
        patch.setattr(tiles, "REPEATS", 4)
        patch.setattr(timing, "wall", lambda call: (call(), 1.0)[1])
        patch.setattr(tiles, "time", SimpleNamespace(monotonic=lambda: next(clock)))
        tiles.run(TINY, [2], 1.0, Path(folder), "cpu")
        found = results.read(Path(folder) / "tiles_tiny_cpu.json")
    timed, row = [row.side for row in found.rows], found.rows[0]
    assert row.timing is not None
    return {"timed": timed, "left_out": found.left_out, "values": row.values, "median": row.timing.median}


if __name__ == "__main__":
    report(_interpreted)
