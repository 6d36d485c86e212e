"""Optimisations: each alone and all together compute what the model computes, and are really there."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tensorrt_operators
import torch
import torch.nn.functional as F
from half_fixtures import TINY
from onnx import numpy_helper
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mubic_deploy import checkpoint
from mubic_deploy.artifacts import Artifacts
from mubic_deploy.config import OPTIMISATIONS, REWRITES, SPLIT_DEPTHWISE, TOKENS
from mubic_deploy.engines import cpu, eager
from mubic_deploy.errors import UserError
from mubic_deploy.graphs import signatures
from mubic_deploy.model.mubic import MUBiC, empty_inputs
from mubic_deploy.model.optimise import SplitDepthwise, optimised
from mubic_deploy.model.precision import half
from mubic_deploy.parity import compare
from mubic_deploy.sources import load_script, source_dir

onnx_graphs = load_script(source_dir("export") / "onnx_graphs.py")

# heads of 12 (audio), 4, 4, 4, 2 (fusion) and 12, 12, 4, 12 values (denoiser); the visual encoder's positions make
# 32 + 8 + 2 + 3 or 32 + 8 + 4 + 6 of 32
ODD = replace(TINY, audio_heads=8, beca_heads=(8, 16, 32, 64), decoder_heads=(2, 4, 16, 8))
GRAPHS = tuple(signatures(ODD))
WITHOUT_TOKENS, WITH_TOKENS = (tuple(x for x in REWRITES if x != other) for other in (TOKENS, SPLIT_DEPTHWISE))
SETS = [*((name,) for name in REWRITES), WITHOUT_TOKENS, WITH_TOKENS]
CONVOLUTIONS = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose3d)


@pytest.fixture(scope="module")
def model(tiny_model: MUBiC) -> MUBiC:
    """The tiny model's weights and statistics: heads only share them out."""
    out = MUBiC(ODD).eval()
    out.load_state_dict(tiny_model.state_dict())
    return out


def inputs(name: str, batch: int) -> tuple[Tensor, ...]:
    """Normal noise for one graph, and for the video bytes."""
    generator = torch.Generator().manual_seed(batch)
    shapes = empty_inputs(signatures(ODD)[name], batch)
    if name == "denoiser":  # alphas lie in (0, 1)
        *tensors, step, now, following = shapes
        return (*(torch.randn(x.shape, generator=generator) for x in tensors), step + 499, now + 0.5, following + 0.8)
    if name == "visual_encoder":
        return tuple(torch.randint(0, 256, x.shape, dtype=x.dtype, generator=generator) for x in shapes)
    return tuple(torch.randn(x.shape, generator=generator) for x in shapes)


def outputs(module: Callable[..., tuple[Tensor, ...]], tensors: tuple[Tensor, ...]) -> list[np.ndarray]:
    with torch.no_grad():
        return [x.numpy() for x in module(*tensors)]


# ---- the same result


@pytest.mark.parametrize("names", SETS, ids="+".join)
def test_same_result_to_rounding(model: MUBiC, names: Collection[str]) -> None:
    result = compare(ODD, eager.load_engines(model), eager.load_engines(optimised(model, names)), clips=1, batch=2)
    assert tuple(result.graphs) == GRAPHS
    for graph, tensors in result.graphs.items():
        for tensor, difference in tensors.items():
            assert difference <= 1e-5, f"{tensor} of {graph}"
    assert result.map_difference <= 1e-5


def test_half_precision_after_them_is_as_close_as_without(model: MUBiC) -> None:
    halved = half(optimised(model, WITHOUT_TOKENS))
    result = compare(
        ODD, eager.load_engines(model), eager.load_engines(halved, "float16"), clips=1, precision="float16"
    )
    result.require("half precision of the optimised model")
    split = halved.fusion.get_submodule("blocks.0.local_v.conv.offsets.1")
    assert {x.dtype for x in split.parameters()} == {torch.float16}


def test_nothing_is_changed_without_names(model: MUBiC) -> None:
    assert repr(optimised(model, ())) == repr(model)


def test_the_model_stays_as_it_was(model: MUBiC) -> None:
    clip = inputs("visual_encoder", 1)
    before = {key: (x.clone(), x.stride()) for key, x in model.state_dict().items()}
    classes = {name: type(module) for name, module in model.named_modules()}
    expected = outputs(model.visual_encoder, clip)  # fills what attention keeps

    random_state = torch.get_rng_state()
    out = optimised(model.train(), WITHOUT_TOKENS)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.training
    assert not any(module.training for module in out.modules())
    model.eval()

    assert {name: type(module) for name, module in model.named_modules()} == classes
    for key, x in model.state_dict().items():
        assert torch.equal(x, before[key][0]), key
        assert x.stride() == before[key][1], key
    assert not any(module._forward_pre_hooks for module in model.modules())
    outputs(out.visual_encoder, clip)
    for a, b in zip(outputs(model.visual_encoder, clip), expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_unknown_name_is_refused(model: MUBiC) -> None:
    with pytest.raises(UserError) as error:
        optimised(model, ["pad_heads", "int4"])
    assert (
        str(error.value) == "unknown optimisation 'int4': choose from pad_heads, split_depthwise, tokens, channels_last"
    )
    with pytest.raises(UserError, match="leave out split_depthwise"):
        optimised(model, REWRITES)


# ---- pad_heads


class Products(TorchFunctionMode):
    """Notes the head sizes of query, key and value of every attention product."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[int, ...]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.sizes.append(tuple(x.shape[-1] for x in args[:3]))
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(
    ("name", "sizes", "padded"),
    [
        ("visual_encoder", [(45, 45, 32), *[(50, 50, 32)] * 3], [48, 56, 56, 56]),
        ("audio_encoder", [(12,) * 3], [16]),
        ("fusion", [(n,) * 3 for n in (4, 4, 4, 4, 4, 4, 2, 2)], [8] * 8),
        ("denoiser", [(n,) * 3 for n in (12, 4, 12, 12)], [16, 8, 16, 16]),
    ],
)
def test_attention_sees_one_head_size(model: MUBiC, name: str, sizes: list[tuple], padded: list[int]) -> None:
    for candidate, expected in (
        (model, sizes),
        (optimised(model, ["pad_heads"]), [(n,) * 3 for n in padded]),
        (optimised(model, ["split_depthwise", "channels_last"]), sizes),
    ):
        with Products() as seen:
            outputs(candidate.graph(name), inputs(name, 1))
        assert seen.sizes == expected


def test_heads_of_the_right_size_are_left(tiny_model: MUBiC) -> None:
    """The shipped sizes: only the visual encoder's positions need zeros, and those are no weights."""
    out = optimised(tiny_model, ["pad_heads"])
    expected = tiny_model.state_dict()
    assert out.state_dict().keys() == expected.keys()
    assert all(torch.equal(x, expected[key]) for key, x in out.state_dict().items())
    assert not any(module._forward_pre_hooks for module in out.modules())


# ---- split_depthwise


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("stride", [(1, 1, 1), (1, 2, 2), (1, 8, 8), (1, 2, 3)])
def test_split_convolution_is_the_3d_one(stride: tuple[int, int, int], bias: bool) -> None:
    torch.manual_seed(0)
    conv = nn.Conv3d(6, 6, 3, stride=stride, padding=1, groups=6, bias=bias)
    x = torch.randn(2, 6, 5, 7, 11)
    split = SplitDepthwise(conv, 5)
    with torch.no_grad():
        torch.testing.assert_close(split(x), conv(x), atol=1e-6, rtol=0)
        # as it comes from tokens
        x = x.contiguous(memory_format=torch.channels_last_3d)
        torch.testing.assert_close(split(x), conv(x), atol=1e-6, rtol=0)


def test_depthwise_3d_convolutions_are_split_and_no_others(model: MUBiC) -> None:
    split = optimised(model, ["split_depthwise"])
    expected = {f"visual_encoder.blocks.{i}.attn.pool_{x}.pool" for i in range(4) for x in "qkv"}
    expected |= {f"fusion.blocks.{i}.local_{x}.conv" for i in range(4) for x in "va"}
    modules = dict(split.named_modules())
    assert {name for name, module in modules.items() if isinstance(module, SplitDepthwise)} == expected
    assert not [name for name, module in modules.items() if isinstance(module, nn.Conv3d) and module.groups > 1]

    for name, module in model.named_modules():
        if name not in expected:
            assert type(modules[name]) is type(module), name
            for key, x in module.named_parameters(recurse=False):
                assert torch.equal(x, modules[name].get_parameter(key)), f"{name}.{key}"
    added = modules.keys() - dict(model.named_modules()).keys()
    offsets = {f"{name}.offsets" for name in expected}
    assert added == offsets | {f"{name}.{i}" for name in offsets for i in range(3)}


# ---- channels_last


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_dense_convolutions_are_channels_last(model: MUBiC, precision: str) -> None:
    out = optimised(model, ["channels_last"])
    if precision == "float16":
        out = half(out)
    dense = [m for m in out.modules() if isinstance(m, CONVOLUTIONS) and m.groups == 1]
    # patch; VGGish; upsampled sound; noise encoder; contexts, temporal, collapse, head
    assert len(dense) == 1 + 6 + 4 + 4 * 3 + 3 + 4 + 1 + 1
    for conv in dense:
        layout = torch.channels_last if conv.weight.dim() == 4 else torch.channels_last_3d
        assert conv.weight.is_contiguous(memory_format=layout), conv
    for name, module in out.named_modules():
        if isinstance(module, CONVOLUTIONS) and module.groups > 1:
            assert module.weight.stride() == model.get_submodule(name).get_parameter("weight").stride(), name


def test_activations_are_channels_last(model: MUBiC) -> None:
    """From the second stage on: the first has one channel, where both layouts are the same."""
    for names, expected in (((), False), (["channels_last"], True)):
        denoiser = optimised(model, names).denoiser
        with torch.no_grad():
            modulations = denoiser.modulations(torch.tensor([[3], [700]]))
            _, *features = denoiser.noise_encoder(torch.randn(2, 1, *ODD.map_size), modulations)
        assert {x.is_contiguous(memory_format=torch.channels_last) for x in features} == {expected}


# ---- the compilers


@pytest.fixture(scope="module", params=[WITHOUT_TOKENS, WITH_TOKENS], ids="+".join)
def everything(model: MUBiC, request: pytest.FixtureRequest) -> MUBiC:
    return optimised(model, request.param)


def test_an_export_carries_them(run, model: MUBiC, tmp_path: Path) -> None:
    checkpoint.save(model, tmp_path / "odd.safetensors")
    options = [x for name in OPTIMISATIONS for x in ("--optimise", name)]
    ran = run("export", tmp_path / "odd.safetensors", "--out", tmp_path / "graphs", *options, "--json")
    assert ran.code == 0, ran.err
    artifacts = Artifacts.open(tmp_path / "graphs")
    assert artifacts.optimisations == OPTIMISATIONS
    assert compare(ODD, eager.load_engines(model), cpu.load_engines("onnxruntime", artifacts), 1, batch=3).ok

    exported = onnx.load(artifacts.file("visual_encoder"))
    assert not list(tensorrt_operators.problems(exported))
    constants = {i.name: numpy_helper.to_array(i) for i in exported.graph.initializer}
    kernels = [(constants[n.input[1]], n) for n in exported.graph.node if n.op_type == "Conv"]
    assert sorted({w.ndim for w, _ in kernels}) == [4, 5]
    assert sum(w.ndim == 5 for w, _ in kernels) == 1  # the patch embedding
    for node in exported.graph.node:
        if node.op_type == "Pad":  # TensorRT's parser refuses less than zero
            assert constants[node.input[1]].min() >= 0, node.name


@pytest.mark.parametrize("name", ["audio_encoder", "fusion", "denoiser"])
def test_it_exports_with_a_dynamic_batch(model: MUBiC, everything: MUBiC, name: str) -> None:
    batch = torch.export.Dim("batch", min=1, max=64)
    given = inputs(name, 2)
    shapes: Any = tuple({0: batch} for _ in given)
    with torch.no_grad():
        program = torch.export.export(
            everything.graph(name), given, dynamic_shapes=(shapes,) if name == "denoiser" else shapes, strict=False
        )
    for n in (1, 3):
        tensors = inputs(name, n)
        for a, b in zip(outputs(program.module(), tensors), outputs(model.graph(name), tensors), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("name", ["visual_encoder", "denoiser"])
def test_it_compiles_in_one_graph(model: MUBiC, everything: MUBiC, name: str) -> None:
    """Traced as for Inductor; its kernels would take a C++ compiler."""
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(everything.graph(name)), fullgraph=True, backend="aot_eager")
    tensors = inputs(name, 1)
    for a, b in zip(outputs(compiled, tensors), outputs(model.graph(name), tensors), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
