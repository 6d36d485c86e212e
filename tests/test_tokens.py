"""The model as products over tokens: each part computes what it stands for, and nothing else is left."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from half_fixtures import TINY
from torch import Tensor, nn
from torch._inductor.package import package_aoti
from torchvision.models.video.mvit import Pool

from mubic_deploy.config import ON_GPU, TOKENS, VARIANTS
from mubic_deploy.engines import eager
from mubic_deploy.engines.aotinductor import laid_out, loaded
from mubic_deploy.engines.lanes import in_turn
from mubic_deploy.graphs import parts, signatures
from mubic_deploy.model.denoiser import Context, NoiseStage
from mubic_deploy.model.layers import STC, Keys
from mubic_deploy.model.mubic import MUBiC, empty_inputs, random_model
from mubic_deploy.model.optimise import optimised
from mubic_deploy.model.precision import prepared
from mubic_deploy.model.tokens import (
    JointNorm,
    LinearReLU,
    PlacesProduct,
    ShiftedSum,
    TokenContext,
    TokenKeys,
    TokenMaxPool,
    TokenNoiseStage,
    WindowProduct,
    WindowSum,
    aligned,
    compression_tokens,
    with_relu,
)
from mubic_deploy.parity import compare
from mubic_deploy.sources import load_script, source_dir

packages_script = load_script(source_dir("export") / "aotinductor_packages.py")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(11)


def same(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)


def channels_first(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return function(x.movedim(1, -1)).movedim(-1, 1)


@pytest.mark.parametrize(
    ("conv", "shape"),
    [
        (nn.Conv2d(5, 7, 3, stride=2, padding=1), (2, 5, 9, 12)),
        (nn.Conv2d(1, 16, 3, padding=1), (2, 1, 8, 6)),
        (nn.Conv2d(4, 3, 3, padding=0), (1, 4, 5, 7)),
        (nn.Conv3d(3, 6, (3, 7, 7), stride=(2, 4, 4), padding=(1, 3, 3)), (2, 3, 16, 32, 48)),
        (nn.Conv3d(6, 6, (3, 1, 1), padding=(1, 0, 0)), (2, 6, 8, 3, 4)),
        (nn.Conv3d(6, 5, (8, 1, 1)), (3, 6, 8, 3, 4)),
    ],
    ids=str,
)
@torch.no_grad()
def test_windows_times_a_matrix_are_the_convolution(conv: nn.Conv2d | nn.Conv3d, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    same(WindowProduct(conv)(x), conv(x))


@torch.no_grad()
def test_rows_are_read_together() -> None:
    """Windows' rows are a multiple of 8 values, and so are those of what they are taken of."""
    conv, x = nn.Conv3d(3, 6, (3, 7, 7), (2, 4, 4), (1, 3, 3)), torch.randn(2, 3, 5, 10, 13)
    once = WindowProduct(conv, once=True)
    same(once(x), conv(x))
    assert once.kernel == (3, 7, 8)
    rows = aligned(x.movedim(1, -1))
    assert torch.equal(rows, x.movedim(1, -1))
    assert rows.stride(-3) == 48


@torch.no_grad()
def test_norms_as_one() -> None:
    norms = [nn.LayerNorm(6) for _ in range(3)]
    for parameter in nn.ModuleList(norms).parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 5, 3, 4, 6)
    same(JointNorm(*norms)(x), torch.stack([norm(y) for norm, y in zip(norms, x.unbind(2), strict=True)], 2))


@torch.no_grad()
def test_a_sum_over_windows_is_the_convolution_to_one_channel() -> None:
    conv, x = nn.Conv2d(24, 1, 3, padding=1), torch.randn(2, 24, 7, 9)
    same(WindowSum(conv)(x), conv(x))


@pytest.mark.parametrize("stride", [(1, 1, 1), (1, 2, 2), (1, 8, 8)])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_shifted_products_are_the_depthwise_convolution(stride: tuple[int, int, int], heads: int, bias: bool) -> None:
    conv = nn.Conv3d(6, 6, 3, stride=stride, padding=1, groups=6, bias=bias)
    x = torch.randn(2, heads * 6, 4, 8, 13)
    expected = torch.cat([conv(part) for part in x.chunk(heads, 1)], 1)
    same(channels_first(ShiftedSum(conv, repeats=heads), x), expected)


@pytest.mark.parametrize("kernel", [(1, 2, 2), (2, 3, 4)])
@torch.no_grad()
def test_a_matrix_of_places_is_the_transposed_convolution(kernel: tuple[int, int, int]) -> None:
    conv, x = nn.ConvTranspose3d(5, 6, kernel, kernel), torch.randn(2, 5, 4, 3, 2)
    assert conv.bias is not None
    same(channels_first(PlacesProduct(conv.weight, conv.bias), x), conv(x))


@torch.no_grad()
def test_relu_ends_a_product() -> None:
    layers = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4), nn.ReLU(), nn.Linear(4, 6))
    x = torch.randn(2, 3, 5, 6)
    expected = layers(x)
    joined = with_relu(layers)
    assert [type(layer) for layer in joined] == [LinearReLU, LinearReLU, nn.Linear]
    same(joined(x), expected)


@torch.no_grad()
def test_no_relu_of_fusion_is_left_but_of_the_adaptive_steps(tiny_model: MUBiC) -> None:
    fusion = optimised(tiny_model, [TOKENS]).fusion
    left = [name for name, module in fusion.named_modules() if isinstance(module, nn.ReLU)]
    assert left == ["adaptive.mlp.1"]  # which stay in FP32


@torch.no_grad()
def test_contexts_lie_as_they_are_computed(tiny_model: MUBiC) -> None:
    """Channels last, as packages want them: nothing is transposed between fusion and denoiser."""
    inputs = [torch.randn(x.shape) for x in empty_inputs(signatures(TINY)["fusion"], 1)]
    contexts = optimised(tiny_model, [TOKENS]).graph("fusion")(*inputs)[:4]
    assert all(x.is_contiguous(memory_format=torch.channels_last_3d) for x in contexts)
    assert all(laid_out(x, True).data_ptr() == x.data_ptr() for x in contexts)


@pytest.mark.parametrize("factor", [2, 4])
@torch.no_grad()
def test_compression_and_keys(factor: int) -> None:
    """The windows do not divide the grid."""
    stc, keys, x = STC(6, factor), Keys(6, 10, factor), torch.randn(2, 3, 5, 7, 6)
    expected = stc(x), *keys(x)
    for module in (stc, keys.stc):
        compression_tokens(module)
        weight = module.get_parameter("weight")
        assert weight.shape == (factor, 1, factor, 6)
        assert weight.is_contiguous()  # or a GPU's kernel has a race: see TokenSTC
    for got, wanted in zip((stc(x), *TokenKeys(keys)(x)), expected, strict=True):
        same(got, wanted)


@pytest.mark.parametrize("thw", [(2, 6, 8), (2, 5, 7)])
@torch.no_grad()
def test_the_largest_of_each_window(thw: tuple[int, int, int]) -> None:
    pool = Pool(nn.MaxPool3d((1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1)), None)
    x = torch.randn(2, 1 + int(np.prod(thw)), 5)
    expected, size = pool(x, thw)
    got, own = TokenMaxPool(pool.pool)(x, thw)
    same(got, expected)
    assert tuple(own) == tuple(size)


@pytest.mark.parametrize("gated", [False, True])
@torch.no_grad()
def test_a_context_of_one_product(gated: bool) -> None:
    """The finer grid is odd: the last row and column of what was upsampled are cut off."""
    context, coarse, a = Context(6, 4, gated), torch.randn(2, 3, 3, 4, 6), torch.randn(2, 3, 5, 7, 4)
    one = TokenContext(context)
    same(one(coarse, *one.condition(a)), context(coarse, *context.condition(a)))


@torch.no_grad()
def test_a_stage_whose_shortcut_is_part_of_its_convolution() -> None:
    stage = NoiseStage(3, 5, 7)
    for conv, norm in (("conv1", "norm1"), ("conv2", "norm2")):  # as where BatchNorm was folded
        old = getattr(stage, conv)
        setattr(stage, conv, nn.Conv2d(old.in_channels, 5, 3, stride=old.stride, padding=1))
        setattr(stage, norm, nn.Identity())
    x, modulation = torch.randn(2, 3, 8, 10), torch.randn(2, 10)
    same(TokenNoiseStage(stage)(x, modulation), stage(x, modulation))


# ---- the whole


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant(variant: str) -> None:
    config = replace(TINY, variant=variant)
    model = MUBiC(config).eval()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):  # else one is like the other
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, 0, 0.2)
    result = compare(config, eager.load_engines(model), eager.load_engines(optimised(model, ON_GPU)), 1, batch=2)
    assert max(d for tensors in result.graphs.values() for d in tensors.values()) <= 1e-5
    assert result.map_difference <= 1e-5


def test_half_precision_is_as_close_as_without(tiny_model: MUBiC) -> None:
    halved = prepared(tiny_model, "float16", ON_GPU)
    result = compare(
        TINY, eager.load_engines(tiny_model), eager.load_engines(halved, "float16"), clips=1, precision="float16"
    )
    result.require("half precision of the model as tokens")
    assert halved.visual_encoder.get_submodule("blocks.0.attn.heads_kv.conv").weight.dtype == torch.float16


@pytest.mark.parametrize("name", signatures(TINY, sampler=True))
def test_no_convolution_is_left_but_that_of_the_spectrum(tiny_model: MUBiC, name: str) -> None:
    inputs = empty_inputs(signatures(TINY, sampler=True)[name], 2)

    def slow(model: MUBiC) -> list[str]:
        with torch.no_grad():
            program = torch.export.export(model.graph(name, 2), inputs, strict=False).run_decompositions()
        called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        return [target for target in called if target.startswith(("aten.convolution", "aten.max_pool3d"))]

    assert slow(prepared(tiny_model, "float32", (TOKENS,))) == ["aten.convolution.default"] * (name == "audio_encoder")
    assert len(slow(prepared(tiny_model))) > 3


@pytest.mark.parametrize("name", ["visual_encoder", "fusion"])
def test_what_inductor_compiles_is_the_same(tiny_model: MUBiC, name: str, tmp_path: Path) -> None:
    """For this CPU, with the settings and in the parts of a GPU's packages, at other batches than it was traced
    with."""
    options = packages_script.Options(max_batch=4, optimisations=ON_GPU)
    assert options.inductor["unroll_reductions_threshold"] == 24
    signature, made_of = signatures(TINY)[name], parts(TINY)[name]
    modules = zip(made_of, prepared(tiny_model, "float32", ON_GPU).parts(name), strict=True)
    files = {part.name: packages_script.compile_part(module, part, options) for part, module in modules}
    package_aoti(str(tmp_path / "graph.pt2"), files)
    held = [loaded(tmp_path / "graph.pt2", part, torch.device("cpu"), channels_last=True) for part in made_of]
    package = in_turn(held, signature)
    for batch in (1, 3):
        inputs = [
            torch.randn(x.shape) if x.is_floating_point() else torch.randint(0, 256, x.shape, dtype=x.dtype)
            for x in empty_inputs(signature, batch)
        ]
        with torch.inference_mode():
            expected, got = tiny_model.graph(name)(*inputs), package(*inputs)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_what_no_step_changes_is_computed_once(tiny_model: MUBiC) -> None:
    inputs = empty_inputs(signatures(TINY, sampler=True)["sampler"], 2)
    sampler = prepared(tiny_model, "float32", ON_GPU).graph("sampler", 3)
    with torch.no_grad():
        program = torch.export.export(sampler, inputs, strict=False)
    users = {spec.target: 0 for spec in program.graph_signature.input_specs if spec.target is not None}
    for spec, node in zip(program.graph_signature.input_specs, program.graph.nodes, strict=False):
        if spec.target is not None:
            users[spec.target] = len(node.users)
    assert {users[f"denoiser.decoder.contexts.{i}.mix.weight"] for i in range(3)} == {1}
    assert {users[f"denoiser.decoder.contexts.{i}.places.linear.weight"] for i in range(3)} == {3}
    assert not [name for name in users if "step_embedding" in name and users[name]]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_parts_of_a_graph_are_the_graph(variant: str) -> None:
    """One after the other, to the last bit, and as their signatures say."""
    config = replace(TINY, variant=variant)
    model = prepared(random_model(config), "float32", ON_GPU)
    for name, whole in signatures(config).items():
        inputs = [torch.randn_like(x) if x.is_floating_point() else x for x in empty_inputs(whole, 2)]
        tensors = dict(zip(whole.input_names, inputs, strict=True))
        with torch.no_grad():
            expected = model.graph(name)(*inputs)
            for part, module in zip(parts(config)[name], model.parts(name), strict=True):
                outputs = module(*(tensors[given] for given in part.input_names))
                tensors |= zip(part.output_names, outputs, strict=True)
                assert [(*x.shape[1:],) for x in outputs] == [t.shape for t in part.outputs]
        for tensor, x in zip(whole.output_names, expected, strict=True):
            torch.testing.assert_close(tensors[tensor], x, rtol=0, atol=0, equal_nan=True)
