"""Fusion and decoder, part by part: what each must do whatever its weights are."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from mubic_deploy.config import DEMO, get_config
from mubic_deploy.model.audio import TemporalRefinement
from mubic_deploy.model.denoiser import Context, NoiseAttention, TemporalConv
from mubic_deploy.model.fusion import MMI, AdaptiveSteps, AudioUpsample, CrossAttention, GatedFusion
from mubic_deploy.model.layers import attend, product


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def last_bias(module: torch.nn.Module, value: float) -> None:
    """The last layer says `value` whatever comes in."""
    layer = [m for m in module.modules() if isinstance(m, torch.nn.Linear)][-1]
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.constant_(layer.bias, value)


def test_attention_by_hand():
    """One query, two keys, width 4: weights softmax([8, 0] / sqrt 4) = [0.98201, 0.01799]."""
    q = torch.tensor([[[4.0, 0, 0, 0]]])
    keys = torch.tensor([[[2.0, 0, 0, 0], [0, 2.0, 0, 0]]])
    values = torch.tensor([[[1.0, 0, 0, 0], [0, 1.0, 0, 0]]])
    expected = torch.tensor([[[0.9820138, 0.0179862, 0, 0]]])
    assert torch.allclose(attend(q, (keys, values), 1), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("queries", "keys", "head", "dtype", "training", "flash"),
    [
        (43_008, 192, 32, torch.float16, False, True),
        (673, 2_689, 144, torch.float16, False, True),
        (2_689, 673, 128, torch.float16, False, False),  # cuDNN's kernel is worth its start
        (43_008, 192, 12, torch.float16, False, False),  # a head that no flash kernel takes as it is
        (43_008, 192, 32, torch.float32, False, False),
        (43_008, 192, 32, torch.float16, True, False),  # older GPUs train too
    ],
)
def test_a_short_attention_on_a_gpu_is_a_flash_kernels(
    queries: int, keys: int, head: int, dtype: torch.dtype, training: bool, flash: bool
):
    """Traced with tensors that only claim to be on a GPU."""
    with FakeTensorMode(), torch.set_grad_enabled(training):
        q, k = (torch.empty(1, 2, n, head, dtype=dtype, device="cuda") for n in (queries, keys))
        traced = make_fx(lambda q, k: product(q, k, k))(q, k)
    called = {node.target for node in traced.graph.nodes}
    assert (torch.ops.aten._scaled_dot_product_flash_attention.default in called) == flash


@pytest.mark.parametrize(("bias", "chosen"), [(100.0, 0), (-100.0, 1)])
def test_gate_of_the_fusion_chooses(bias: float, chosen: int):
    """alpha = 1 gives F_va, alpha = 0 gives F_av (eq. 3.39)."""
    gate = GatedFusion(6, 4)
    last_bias(gate, bias)
    streams = torch.randn(2, 1, 2, 3, 4, 6)
    assert torch.allclose(gate(*streams), streams[chosen], atol=1e-6)


@pytest.mark.parametrize("bias", [100.0, -100.0])
def test_gate_of_the_decoder_chooses(bias: float):
    """gate = 1 gives A_i, gate = 0 gives B_i of the coarser output (eq. 3.46)."""
    context = Context(8, 4, gated=True)
    last_bias(context.mix, bias)
    coarse, other, a = torch.randn(1, 2, 2, 3, 8), torch.randn(1, 2, 2, 3, 8), torch.randn(1, 2, 4, 5, 4)
    out = context(coarse, a)
    assert torch.allclose(out, a, atol=1e-6) == (bias > 0)
    assert torch.allclose(out, context(coarse, 2 * a), atol=1e-6) == (bias < 0)
    assert torch.allclose(out, context(other, a), atol=1e-6) == (bias > 0)


def test_values_and_keys_come_from_the_other_stream():
    """With the values' projection at zero, the other stream has no say; x itself still has."""
    beca = CrossAttention(8, 8, 2, 2)
    x, other = torch.randn(1, 2, 4, 4, 8), torch.randn(1, 2, 4, 4, 8)
    assert not torch.allclose(beca(x, other), beca(x, 2 * other), atol=1e-4)
    torch.nn.init.zeros_(beca.keys.v.weight)
    torch.nn.init.zeros_(beca.keys.v.bias)
    assert torch.allclose(beca(x, other), beca(x, torch.randn_like(other)), atol=1e-6)
    alone = beca.norm(x + beca.project.bias)
    assert torch.allclose(beca(x, other), alone, atol=1e-6)


def gate_open_for(block: MMI, stream: str) -> None:
    last_bias(block.fuse, 100.0 if stream == "va" else -100.0)
    torch.nn.init.zeros_(block.get_parameter("beta"))


@pytest.mark.parametrize("variant", ["full", "no_beca"])
def test_without_beca_only_sight_hears(variant: str):
    """F_va depends on both streams; F_av, without BECA, on sound alone."""
    config = get_config("demo", variant)
    block = MMI(config, 3).eval()
    v, a = torch.randn(1, 192, 8, 4, 6), torch.randn(1, 96, 4, 4, 6)
    gate_open_for(block, "av")
    assert torch.allclose(block(v, a), block(torch.randn_like(v), a), atol=1e-4) == (variant == "no_beca")
    assert not torch.allclose(block(v, a), block(v, torch.randn_like(a)), atol=1e-4)
    gate_open_for(block, "va")
    assert not torch.allclose(block(v, a), block(v, torch.randn_like(a)), atol=1e-5)
    assert not torch.allclose(block(v, a), block(torch.randn_like(v), a), atol=1e-4)


def test_skip_adds_beta_times_the_visual_feature():
    block = MMI(DEMO, 3).eval()
    v, a = torch.randn(1, 192, 8, 4, 6), torch.randn(1, 96, 4, 4, 6)
    beta, skip = block.get_parameter("beta"), block.get_submodule("skip")
    assert beta.item() == 1.0
    with torch.no_grad():
        with_skip = block(v, a)
        beta.fill_(0.0)
        without = block(v, a)
    assert torch.allclose(with_skip - without, skip(v.permute(0, 2, 3, 4, 1)), atol=1e-5)


def test_audio_upsampling_keeps_place_and_time():
    """Slice 2 of 4 is frames 4 and 5 of 8; row 1, column 2 of 4 x 6 is a block of the visual grid (7 x 12)."""
    up = AudioUpsample(DEMO, 2)
    silent = torch.zeros(1, 96, 4, 4, 6)
    sound = silent.clone()
    sound[0, :, 2, 1, 2] = 1
    changed = (up(sound) != up(silent)).any(-1)[0].nonzero()
    assert up(silent).shape == (1, 8, 7, 12, 128)
    assert changed.min(0).values.tolist() == [4, 2, 4]
    assert changed.max(0).values.tolist() == [5, 3, 5]


def test_entropy_and_adaptive_steps():
    adaptive = AdaptiveSteps(DEMO)
    even = torch.ones(1, 2, 3, 4, 5)
    peaked = torch.zeros(1, 2, 3, 4, 5)
    peaked[0, 1, 2, 3] = 7
    two = torch.zeros(1, 2, 3, 4, 5)
    two[0, 0, 0, 0] = two[0, 1, 1, 1] = -3
    entropy, steps = adaptive(torch.cat([even, peaked, two]))
    # two places of 24 alike: log 2 / log 24
    assert entropy[:, 0].tolist() == pytest.approx([1.0, 0.0, 0.218104], abs=1e-5)
    assert steps[:, 0].tolist() == [4, 4, 4]
    assert steps.dtype == torch.int32
    for value, expected in ((2.4, 2), (2.6, 3), (-5.0, 1), (40.0, 12)):
        last_bias(adaptive, value)
        assert adaptive(even)[1].item() == expected


def test_temporal_convolution_reaches_one_frame_each_way():
    conv = TemporalConv(3)
    x = torch.randn(1, 8, 2, 2, 3)
    y = x.clone()
    y[0, 4, 1, 0] += 1
    changed = ((conv(x) - conv(y)).abs().sum(-1) > 1e-6)[0].nonzero().tolist()
    assert {tuple(row[1:]) for row in changed} == {(1, 0)}
    assert {row[0] for row in changed} <= {3, 4, 5}
    assert [4, 1, 0] in changed


def test_noise_steers_the_decoder_through_its_queries():
    attention = NoiseAttention(DEMO, 3)
    x, context = torch.randn(1, 128, 4, 6), torch.randn(1, 8, 4, 6, 96)
    keys = torch.randn(1, 48, 96), torch.randn(1, 48, 96)
    assert not torch.allclose(attention(x, context, keys), attention(-x, context, keys), atol=1e-4)
    uniform = keys[0], keys[1][:, :1].expand_as(keys[1])  # equal values: the queries do not matter
    assert torch.allclose(attention(x, context, uniform), attention(-x, context, uniform), atol=1e-5)


def test_temporal_refinement_mixes_slices_and_not_places():
    refine = TemporalRefinement(8, 2, 16)
    x = torch.randn(1, 4, 8, 2, 3)
    y = x.clone()
    y[0, 3, :, 1, 2] += 1
    changed = ((refine(x) - refine(y)).abs().sum(1) > 1e-6)[0].nonzero().tolist()
    assert {tuple(row[1:]) for row in changed} == {(1, 2)}
    assert {row[0] for row in changed} == {0, 1, 2, 3}


def test_sizes_of_another_aspect():
    """Nothing is tied to the two sizes that ship."""
    from mubic_deploy.graphs import signatures
    from mubic_deploy.model.mubic import empty_inputs, random_model

    config = replace(DEMO, height=96, width=80, audio_patch=(32, 48))
    model = random_model(config)
    for name, signature in signatures(config).items():
        with torch.no_grad():
            outputs = model.graph(name)(*empty_inputs(signature, 1))
        for tensor, output in zip(signature.outputs, outputs, strict=True):
            tensor.check(output.numpy())
