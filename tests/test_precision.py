"""Half precision: the policy in the graphs themselves, its cost in accuracy, what TensorRT's parser takes of it."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import tensorrt_operators
import torch
from google.protobuf import text_format
from half_fixtures import TINY
from onnx import TensorProto, helper, shape_inference
from torch import nn
from triton_serving import clips, serving
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig

from mubic_deploy import checkpoint
from mubic_deploy.artifacts import MANIFEST, Artifacts
from mubic_deploy.engines import cpu, eager
from mubic_deploy.errors import UserError
from mubic_deploy.graphs import signatures
from mubic_deploy.metrics import cc
from mubic_deploy.model.mubic import MUBiC
from mubic_deploy.model.optimise import fold_batch_norm
from mubic_deploy.model.precision import LARGEST, half, prepared, recorded, require_small
from mubic_deploy.parity import random_clip
from mubic_deploy.pipeline import Pipeline
from mubic_deploy.scenes.film import write_film
from mubic_deploy.sources import load_script, source_dir
from mubic_deploy.triton.client import TritonPredictor

onnx_graphs = load_script(source_dir("export") / "onnx_graphs.py")

GRAPHS = ("visual_encoder", "audio_encoder", "fusion", "denoiser", "sampler")
PRODUCTS = ("MatMul", "Gemm", "Conv", "ConvTranspose")
# products that stay: the log-mel's Fourier and mel filters, the adaptive steps' MLP, the step embedding's
KEPT = {"audio_encoder": {"Conv": 1, "MatMul": 1}, "fusion": {"Gemm": 2}, "denoiser": {"Gemm": 2}}


def element_types(graph: onnx.GraphProto) -> dict[str, int]:
    values = [*graph.value_info, *graph.input, *graph.output]
    return {v.name: v.type.tensor_type.elem_type for v in values} | {i.name: i.data_type for i in graph.initializer}


# ---- the policy in the graphs


@pytest.mark.parametrize("name", GRAPHS)
def test_products_are_fp16_and_norms_and_softmax_fp32(half_artifacts: Artifacts, name: str) -> None:
    graph = shape_inference.infer_shapes(onnx.load(half_artifacts.file(name)), strict_mode=True).graph
    types = element_types(graph)
    kept, made = Counter[str](), Counter[str]()
    for node in graph.node:
        kinds = {types[n] for n in (*node.input, *node.output) if n}
        if node.op_type in PRODUCTS:
            assert len(kinds) == 1, node.name
            (kept if kinds == {TensorProto.FLOAT} else made)[node.op_type] += 1
        elif node.op_type in ("Softmax", "LayerNormalization"):
            assert kinds == {TensorProto.FLOAT}, node.name
        elif node.op_type == "BatchNormalization":
            pytest.fail(f"{node.name} is not folded")
    assert kept == KEPT.get(name, {})
    assert made.total() > 10


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("batch", [1, 8])
def test_shapes_and_types_are_the_signatures(half_artifacts: Artifacts, name: str, batch: int) -> None:
    """ONNX's own inference, from the inputs at this batch on."""
    model = onnx.load(half_artifacts.file(name))
    signature = signatures(TINY, "float16", sampler=True)[name]
    for value in model.graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = batch
    for value in model.graph.output:
        value.type.tensor_type.shape.dim[0].ClearField("value")
    inferred = shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True).graph
    for tensors, values in ((signature.inputs, inferred.input), (signature.outputs, inferred.output)):
        for tensor, value in zip(tensors, values, strict=True):
            assert value.name == tensor.name
            kind = value.type.tensor_type
            assert helper.tensor_dtype_to_np_dtype(kind.elem_type) == tensor.dtype
            assert [d.dim_value for d in kind.shape.dim] == [batch, *tensor.shape]


def test_what_people_see_stays_fp32() -> None:
    whole, halves = signatures(TINY, sampler=True), signatures(TINY, "float16", sampler=True)
    changed = {
        t.name
        for name in GRAPHS
        for s, t in zip(whole[name].outputs, halves[name].outputs, strict=True)
        if s.dtype != t.dtype
    }
    assert changed == {"V1", "V2", "V3", "V4", "A", "CONTEXT1", "CONTEXT2", "CONTEXT3", "CONTEXT4", "KEYS4", "VALUES4"}


def test_what_depends_on_the_step_alone_is_folded_in_the_sampler(half_artifacts: Artifacts) -> None:
    """Two steps are not two denoisers: the embedding's MLP and the four modulations are constants."""
    products = {}
    for name in ("denoiser", "sampler"):
        ops = Counter(node.op_type for node in onnx.load(half_artifacts.file(name)).graph.node)
        products[name] = sum(ops[kind] for kind in ("MatMul", "Gemm"))
        assert (ops["Sin"] > 0) == (name == "denoiser")
    assert products["sampler"] == 2 * (products["denoiser"] - 2 - 4)


# ---- accuracy


@pytest.mark.parametrize("steps", [1, 4, 12, 0])
def test_maps_are_those_of_fp32(tiny_model: MUBiC, half_artifacts: Artifacts, steps: int) -> None:
    reference = Pipeline(TINY, eager.load_engines(tiny_model))
    candidate = Pipeline(TINY, cpu.load_engines("onnxruntime", half_artifacts))
    clip = random_clip(TINY, 11, batch=2)
    (expected, n), (got, m) = (p.predict(clip["VIDEO"], clip["AUDIO"], 3, steps) for p in (reference, candidate))
    assert n.tolist() == m.tolist()
    assert got.dtype == np.float32
    assert 0 < np.abs(expected - got).max() < 0.02
    assert all(cc(a, b) >= 0.999 for a, b in zip(expected, got, strict=True))


def test_eager_computes_what_the_graphs_compute(tiny_model: MUBiC, half_artifacts: Artifacts) -> None:
    in_torch = Pipeline(TINY, eager.load_engines(half(tiny_model), "float16"))
    in_onnx = Pipeline(TINY, cpu.load_engines("onnxruntime", half_artifacts))
    clip = random_clip(TINY, 5)
    maps = [p.predict(clip["VIDEO"], clip["AUDIO"])[0][0] for p in (in_torch, in_onnx)]
    assert np.abs(maps[0] - maps[1]).max() < 5e-3


def test_folding_changes_nothing(tiny_model: MUBiC) -> None:
    folded = copy.deepcopy(tiny_model)
    fold_batch_norm(folded)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    x, step = torch.randn(2, 1, *TINY.map_size), torch.tensor([[3], [700]], dtype=torch.int32)
    with torch.no_grad():
        found = (m.denoiser.noise_encoder(x, m.denoiser.modulations(step)) for m in (tiny_model, folded))
        pairs = zip(*found, strict=True)
        for expected, got in pairs:
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_the_model_that_is_halved_stays_as_it_is(tiny_model: MUBiC) -> None:
    before = {k: v.clone() for k, v in tiny_model.state_dict().items()}
    half(tiny_model)
    assert all(torch.equal(v, before[k]) for k, v in tiny_model.state_dict().items())
    assert {p.dtype for p in tiny_model.parameters()} == {torch.float32}


# ---- ranges


def test_the_manifest_lists_the_largest_activations(half_artifacts: Artifacts) -> None:
    largest = half_artifacts.manifest["largest_activations"]
    assert len(largest) == 10
    assert list(largest.values()) == sorted(largest.values(), reverse=True)
    assert 1 < max(largest.values()) < LARGEST


def test_a_weight_that_is_too_large_is_named(tiny_model: MUBiC, tmp_path: Path) -> None:
    large = copy.deepcopy(tiny_model)
    large.get_parameter("fusion.contexts.2.weight").data[0, 0] = 1e5
    with pytest.raises(UserError, match=r"fusion.contexts.2.weight reaches 1e\+05, too large for FP16"):
        onnx_graphs.export(large, checkpoint.Source("test", 3), tmp_path / "out", precision="float16")
    assert not list(tmp_path.iterdir())


def test_what_no_module_computes_is_recorded_where_it_goes(tiny_model: MUBiC) -> None:
    """The patches' queries, keys and values are a bare product, the pooling's input; the residual sum is the norm's."""
    largest = dict[str, float]()
    names = ("visual_encoder.blocks.1.attn.pool_q.pool", "visual_encoder.blocks.1.norm2")
    watched = copy.deepcopy(tiny_model)

    def note(name: str, x: torch.Tensor) -> None:
        largest[name] = float(x.abs().max())

    for name in names:
        watched.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: note(name, args[0]))
    clip = random_clip(TINY, 0)
    with recorded(watched) as activations:
        Pipeline(TINY, eager.load_engines(watched)).predict(clip["VIDEO"], clip["AUDIO"], 0, 1)
    assert all(activations[name] >= largest[name] > 0 for name in names)


def test_an_activation_that_is_too_large_is_named(tiny_model: MUBiC) -> None:
    large = copy.deepcopy(tiny_model)
    weight = large.get_parameter("fusion.contexts.3.weight")
    weight.data.mul_(1e4 / float(weight.detach().abs().max()))
    clip = random_clip(TINY, 0)
    with recorded(large) as activations:
        Pipeline(TINY, eager.load_engines(large)).predict(clip["VIDEO"], clip["AUDIO"])
    with pytest.raises(UserError, match=r"activations of fusion.*too large for FP16: use --precision float32"):
        require_small(activations)
    with pytest.raises(UserError, match="activations of x reach nan"):
        require_small({"x": float("nan")})


def test_the_trained_weights_are_far_from_the_limit(tmp_path: Path) -> None:
    """On a scene with its sound, which is what they were trained on."""
    from mubic_deploy.predict import predict_film

    write_film(tmp_path / "scene.mp4", 1001, seconds=1)
    trained, _ = checkpoint.load("demo")
    with recorded(trained) as activations:
        predictor = Pipeline(trained.config, eager.load_engines(trained))
        predict_film(predictor, tmp_path / "scene.mp4", maps=tmp_path / "maps.npz", stride=8)
    require_small(activations)
    assert 1 < max(activations.values()) < LARGEST / 4


# ---- TensorRT's parser


@pytest.mark.parametrize("name", GRAPHS)
def test_tensorrts_parser_takes_the_graphs(half_artifacts: Artifacts, name: str) -> None:
    model = onnx.load(half_artifacts.file(name))
    assert not list(tensorrt_operators.problems(model))
    assert not {node.op_type for node in model.graph.node} & {"ScatterND", "ScatterElements", "STFT", "DFT", "Loop"}


@pytest.mark.parametrize("name", GRAPHS)
def test_int64_is_only_for_shapes(half_artifacts: Artifacts, name: str) -> None:
    """Which the parser wants as INT64; whatever else counts does so in INT32."""
    graph = shape_inference.infer_shapes(onnx.load(half_artifacts.file(name)), strict_mode=True).graph
    types = element_types(graph)
    wide = {n.op_type for n in graph.node if any(types.get(o) == TensorProto.INT64 for o in n.output)}
    assert wide <= {"Shape", "Concat"}


def test_the_parser_takes_what_is_deployed(tiny_model: MUBiC, tmp_path: Path) -> None:
    """In FP16 and with the padded heads that docs/deployment.md exports: at batch 1 and 8."""
    exported, signature = prepared(tiny_model, "float16", ["pad_heads"]), signatures(TINY, "float16")["visual_encoder"]
    path = tmp_path / "visual_encoder.onnx"
    onnx_graphs.trace(exported.graph("visual_encoder"), signature, path)
    model = onnx.load(path)
    assert not list(tensorrt_operators.problems(model))
    for batch in (1, 8):
        for value in model.graph.input:
            value.type.tensor_type.shape.dim[0].dim_value = batch
        for value in model.graph.output:
            value.type.tensor_type.shape.dim[0].ClearField("value")
        inferred = shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True).graph
        for tensor, value in zip(signature.outputs, inferred.output, strict=True):
            assert [d.dim_value for d in value.type.tensor_type.shape.dim] == [batch, *tensor.shape]


def test_what_the_parser_does_not_take_is_named() -> None:
    info = helper.make_tensor_value_info
    nodes = [
        helper.make_node("Transpose", ["X"], ["Y"], "turn"),
        helper.make_node("Cast", ["Y"], ["F"], "convert", to=TensorProto.FLOAT),
        helper.make_node("BitwiseNot", ["X"], ["Z"], "flip"),
        helper.make_node("Relu", ["F"], ["R"], "fine"),
    ]
    outputs = [info("R", TensorProto.FLOAT, [3, 2]), info("Z", TensorProto.UINT8, [2, 3])]
    graph = helper.make_graph(nodes, "g", [info("X", TensorProto.UINT8, [2, 3])], outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    assert list(tensorrt_operators.problems(model)) == [
        "Transpose turn of UINT8",
        "Transpose turn of UINT8",
        "BitwiseNot flip",
    ]
    model.opset_import[0].version = 8
    assert next(tensorrt_operators.problems(model)) == "opset 8 of ai.onnx"


# ---- served


def test_half_precision_is_served(half_artifacts: Artifacts, tmp_path: Path) -> None:
    video, audio = clips(TINY, 2)
    with serving(half_artifacts, tmp_path) as server, TritonPredictor(server.url) as remote:
        served, _ = remote.predict(video, audio, seed=1)
    expected, _ = Pipeline(TINY, cpu.load_engines(cpu.ENGINES[0], half_artifacts)).predict(video, audio, seed=1)
    np.testing.assert_allclose(served, expected, atol=1e-5)
    fusion = text_format.Parse((tmp_path / "repository" / "fusion" / "config.pbtxt").read_text(), ModelConfig())
    assert {t.name: DataType.Name(t.data_type) for t in fusion.input}["V1"] == "TYPE_FP16"
    assert {t.name: DataType.Name(t.data_type) for t in fusion.output}["ENTROPY"] == "TYPE_FP32"


def test_an_unknown_precision_is_refused(half_artifacts: Artifacts, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text((half_artifacts.path / MANIFEST).read_text().replace('"float16"', '"float8"'))
    with pytest.raises(UserError, match="the precision 'float8' is not known: make it with mubic-deploy export"):
        Artifacts.open(tmp_path)
