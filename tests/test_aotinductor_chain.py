"""Encoders and fusion in parts, a CUDA graph each, with a double of torch.cuda, and in the packages' place the model's
own modules: of what happens in a package the double sees nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from fake_torch_cuda import Gpu, host
from half_fixtures import TINY
from torch import Tensor

from mubic_deploy import graphs
from mubic_deploy.config import Config
from mubic_deploy.engines import Array, Arrays, DeviceArray, Engine, Fetch, aotinductor, eager
from mubic_deploy.engines.aotinductor import Packages, load_conditioner, load_engines
from mubic_deploy.engines.eager import load_engines as load_eager
from mubic_deploy.engines.lanes import Part
from mubic_deploy.errors import UserError
from mubic_deploy.graphs import Signature
from mubic_deploy.model.mubic import MUBiC, random_model
from mubic_deploy.parity import compare, random_clip
from mubic_deploy.pipeline import Pipeline

DEAF = replace(TINY, variant="visual_only")


def to_torch(array: Array, device: torch.device) -> Tensor:
    """As the engine's, where the CPU is the GPU and what stays on the host says so."""
    if isinstance(array, DeviceArray):
        return array.value
    return host(torch.from_numpy(array)) if device.type == "cpu" else torch.from_numpy(array)


@pytest.fixture
def packages(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> Callable[[MUBiC], tuple[Packages, list[str]]]:
    """Of a model, as if they were compiled for a GPU, and the names of those that were loaded."""
    loaded: list[str] = []

    def packages(model: MUBiC) -> tuple[Packages, list[str]]:
        def load(path: Path, part: Signature, device: torch.device, channels_last: bool) -> Part:
            assert not channels_last
            loaded.append(part.name)
            if part.name == path.stem:
                return Part(part, model.eval().graph(part.name))
            modules = zip(graphs.parts(model.config)[path.stem], model.eval().parts(path.stem), strict=True)
            return Part(part, next(module for signature, module in modules if signature.name == part.name))

        monkeypatch.setattr(aotinductor, "loaded", load)
        manifest: dict[str, Any] = {
            "precision": "float32",
            "fixed_steps": None,
            "source": {},
            "device": {"type": "cuda"},
            "optimisations": [],
            "profile": {"max": 2},
            "packages": {name: {"file": f"{name}.pt2"} for name in graphs.signatures(model.config)},
        }
        return Packages(Path("compiled"), model.config, manifest), loaded

    monkeypatch.setattr(Packages, "require", lambda _: None)
    monkeypatch.setattr(aotinductor, "to_torch", to_torch)
    return packages


Make = Callable[[MUBiC], tuple[Packages, list[str]]]


def opened(packages: Packages, monkeypatch: pytest.MonkeyPatch, cuda_graphs: bool = True) -> Pipeline:
    monkeypatch.setattr(Packages, "open", lambda path, variant: packages)
    return Pipeline.open(packages.path, "aotinductor", cuda_graphs=cuda_graphs)


@pytest.mark.parametrize("config", [TINY, DEAF], ids=lambda c: c.variant)
def test_a_pipeline_computes_what_eager_pytorch_does(
    packages: Make, gpu: Gpu, monkeypatch: pytest.MonkeyPatch, config: Config
) -> None:
    model = random_model(config)
    pipeline = opened(packages(model)[0], monkeypatch)
    assert pipeline.conditioner is not None
    assert pipeline.allocate is eager.pinned_array
    reference = Pipeline(config, load_eager(model))
    for seed, batch in ((0, 1), (1, 3), (2, 1)):  # 3 in two parts
        clip = random_clip(config, seed, batch)
        expected, n = reference.predict(clip["VIDEO"], clip["AUDIO"], seed, 0)
        got, m = pipeline.predict(clip["VIDEO"], clip["AUDIO"], seed, 0)
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
        assert n.tolist() == m.tolist()
    shapes = [t.shape for t in graphs.media(config)]
    assert [x.shape for x in gpu.pinned[: len(shapes)]] == [(1, *shape) for shape in shapes]  # what the first clip took
    runs = [engine.run for engine in pipeline.engines.values()]  # type: ignore[attr-defined]
    assert [len(run._captured) for run in runs] == [0] * (len(runs) - 1) + [2]  # the denoiser's, of two batch sizes


@pytest.mark.parametrize("newest_first", [False, True])
def test_the_next_part_of_a_batch_is_computed_while_one_is_fetched(
    packages: Make, gpu: Gpu, monkeypatch: pytest.MonkeyPatch, tiny_model: MUBiC, newest_first: bool
) -> None:
    """However late the GPU is: what is fetched was not written again by the next part."""
    did: list[str] = []

    def on_gpu(x: Tensor) -> DeviceArray:
        def begin() -> Fetch:
            did.append("begun")
            fetch = eager.begun(x)
            return lambda: did.append("fetched") or fetch()  # type: ignore[func-returns-value]

        return DeviceArray(x, tuple(x.shape), x.numpy().dtype, lambda: pytest.fail("the GPU was waited for"), begin)

    monkeypatch.setattr(aotinductor, "from_torch", on_gpu)
    pipeline = opened(packages(tiny_model)[0], monkeypatch)
    clip, seeds = random_clip(TINY, 0, 7), np.arange(7)
    expected, _ = Pipeline(TINY, load_eager(tiny_model)).predict(clip["VIDEO"], clip["AUDIO"], seeds, 4)
    pipeline.predict(clip["VIDEO"][:3], clip["AUDIO"][:3], 0, 4)  # captures both batch sizes
    did.clear()
    with gpu.late(newest_first):
        got, used = pipeline.predict(clip["VIDEO"], clip["AUDIO"], seeds, 4)
    assert did == ["begun", "begun", "fetched", "begun", "fetched", "begun", "fetched", "fetched"]
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
    assert used.tolist() == [[4]] * 7


def test_a_package_is_loaded_once(packages: Make, monkeypatch: pytest.MonkeyPatch, tiny_model: MUBiC) -> None:
    made, loaded = packages(tiny_model)
    opened(made, monkeypatch)
    scales = [[f"{graph}_{i}" for i in range(1, 5)] for graph in ("visual_encoder", "fusion")]
    assert loaded == [*scales[0], "audio_encoder", *scales[1], "denoiser"]


def test_it_gives_what_the_engines_give_one_by_one(packages: Make, tiny_model: MUBiC) -> None:
    """From arrays on the host and on the GPU."""
    made, _ = packages(tiny_model)
    engines = load_engines(made)
    conditioner = load_conditioner(made, engines)
    assert conditioner is not None
    singly = Pipeline(TINY, engines)
    for seed in range(2):
        clip = random_clip(TINY, seed)
        on_gpu = {k: DeviceArray(torch.from_numpy(x), x.shape, x.dtype, x.copy) for k, x in clip.items()}
        expected = {name: np.array(x) for name, x in singly.condition(clip).items()}
        for arrays in (clip, on_gpu):
            got = conditioner(arrays)
            assert list(got) == list(expected) == engines["fusion"].signature.output_names
            for name, x in expected.items():
                np.testing.assert_allclose(np.asarray(got[name]), x, rtol=0, atol=1e-6)


def test_without_cuda_graphs_there_is_no_chain(
    packages: Make, monkeypatch: pytest.MonkeyPatch, tiny_model: MUBiC
) -> None:
    made, _ = packages(tiny_model)
    assert opened(made, monkeypatch, cuda_graphs=False).conditioner is None
    made.manifest["device"]["type"] = "cpu"
    pipeline = opened(made, monkeypatch)
    assert pipeline.conditioner is None
    assert pipeline.allocate is np.empty


def test_arrays_that_do_not_fit_are_refused(packages: Make, tiny_model: MUBiC) -> None:
    made, _ = packages(tiny_model)
    conditioner = load_conditioner(made, load_engines(made))
    assert conditioner is not None
    with pytest.raises(UserError, match=r"a batch of 3 is above the package's 2: .*--max-batch 3"):
        conditioner(random_clip(TINY, 0, 3))
    with pytest.raises(UserError, match="the tensors of conditioner must have the same batch size"):
        conditioner({**random_clip(TINY, 0), "AUDIO": random_clip(TINY, 0, 2)["AUDIO"]})
    with pytest.raises(UserError, match="tensor VIDEO must be uint8"):
        conditioner({**random_clip(TINY, 0), "VIDEO": random_clip(TINY, 0)["VIDEO"].astype(np.float32)})


def test_memory_that_is_short_is_said(packages: Make, monkeypatch: pytest.MonkeyPatch, tiny_model: MUBiC) -> None:
    made, _ = packages(tiny_model)
    engines = load_engines(made)

    def fails(*_: Tensor) -> Sequence[Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    engines["fusion"].parts = [Part(part.signature, fails) for part in engines["fusion"].parts]
    conditioner = load_conditioner(made, engines)
    assert conditioner is not None
    with pytest.raises(UserError, match=r"^the GPU has not enough memory for conditioner \(CUDA out of memory.\)"):
        conditioner(random_clip(TINY, 0))


def test_a_chain_that_computes_something_else_is_found(packages: Make, tiny_model: MUBiC) -> None:
    """Though every graph by itself is right."""
    made, _ = packages(tiny_model)
    engines, reference = load_engines(made), load_eager(tiny_model)
    conditioner = load_conditioner(made, engines)
    assert conditioner is not None
    assert compare(TINY, reference, engines, 1, conditioner=conditioner).ok

    def wrong(arrays: Arrays) -> Arrays:
        outputs = reference["fusion"]({**reference["audio_encoder"](arrays), **reference["visual_encoder"](arrays)})
        return {**outputs, "CONTEXT1": np.zeros_like(np.asarray(outputs["CONTEXT1"]))}

    found = compare(TINY, reference, engines, 1, conditioner=cast(Engine, wrong))
    assert not found.ok
    of_chain = found.graphs.pop("conditioner")
    assert of_chain.pop("CONTEXT1") > 0.1
    assert max(max(graph.values()) for graph in [*found.graphs.values(), of_chain]) < 1e-4
