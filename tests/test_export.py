"""The exported graphs: what they are, that they are checked, and that nothing unchecked is left behind."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from mubic_deploy import checkpoint, sources
from mubic_deploy.artifacts import MANIFEST, Artifacts, sha256
from mubic_deploy.config import DEMO, DEMO_FILE, get_config
from mubic_deploy.engines import cpu, eager, openvino
from mubic_deploy.errors import UserError
from mubic_deploy.graphs import signatures
from mubic_deploy.metrics import cc
from mubic_deploy.model.mubic import random_model
from mubic_deploy.parity import Parity, compare, random_clip
from mubic_deploy.pipeline import Pipeline
from mubic_deploy.sources import load_script, source_dir

onnx_graphs = load_script(source_dir("export") / "onnx_graphs.py")


def types(graph: onnx.GraphProto, values: list) -> list[tuple]:
    names = {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.UINT8: "uint8", onnx.TensorProto.INT32: "int32"}
    rows = []
    for value in values:
        tensor = value.type.tensor_type
        rows.append((value.name, names[tensor.elem_type], [d.dim_value or d.dim_param for d in tensor.shape.dim]))
    return rows


@pytest.mark.parametrize("name", ["visual_encoder", "audio_encoder", "fusion", "denoiser"])
def test_graphs_are_as_their_signatures_say(demo_artifacts: Artifacts, name: str) -> None:
    model = onnx.load(demo_artifacts.file(name))
    onnx.checker.check_model(model, full_check=True)
    assert next(o.version for o in model.opset_import if o.domain == "") >= 20
    signature = signatures(DEMO)[name]
    for tensors, values in ((signature.inputs, model.graph.input), (signature.outputs, model.graph.output)):
        expected = [(t.name, t.dtype, ["batch", *t.shape]) for t in tensors]
        assert types(model.graph, list(values)) == expected
    ops = {node.op_type for node in model.graph.node}
    assert not ops & {"ScatterND", "ScatterElements", "STFT", "DFT", "Loop", "If", "Einsum"}
    assert {o.domain for o in model.opset_import} == {""}


def test_position_tables_are_weights(demo_artifacts: Artifacts) -> None:
    """Nothing that depends on the weights alone is computed in the graph: every node needs an input."""
    graph = onnx.load(demo_artifacts.file("visual_encoder")).graph
    known = {value.name for value in graph.input}
    for node in graph.node:
        depends = any(name in known for name in node.input)
        if depends:
            known.update(node.output)
        else:
            assert node.op_type == "Constant", f"{node.op_type} {node.name} is computed at every call"


@pytest.mark.parametrize("engine", cpu.ENGINES)
def test_batches_of_every_size(demo_artifacts: Artifacts, engine: str) -> None:
    """Only the batch is dynamic: eight clips in one call give what each gives alone."""
    pipeline = Pipeline(DEMO, cpu.load_engines(engine, demo_artifacts))
    clip = random_clip(DEMO, 0, batch=8)
    together, _ = pipeline.predict(clip["VIDEO"], clip["AUDIO"], np.arange(8))
    for i in (0, 3, 7):
        alone, _ = pipeline.predict(clip["VIDEO"][i : i + 1], clip["AUDIO"][i : i + 1], i)
        assert np.abs(together[i] - alone[0]).max() < 1e-5


@pytest.mark.parametrize("engine", cpu.ENGINES)
@pytest.mark.parametrize("steps", [1, 4, 12, 0])
def test_same_maps_as_eager(demo_artifacts: Artifacts, steps: int, engine: str) -> None:
    reference = Pipeline.open(engine="eager")
    candidate = Pipeline.open(demo_artifacts.path, engine)
    clip = random_clip(DEMO, 11)
    (expected, n), (got, m) = (p.predict(clip["VIDEO"], clip["AUDIO"], 3, steps) for p in (reference, candidate))
    assert n.tolist() == m.tolist()
    assert np.abs(expected - got).max() < 1e-3
    assert cc(expected[0], got[0]) >= 0.9999


def test_a_checkout_that_is_not_installed_has_no_version() -> None:
    assert sources.versions(["torch", "mubic-deploy-that-is-not-installed"]) == {"torch": metadata.version("torch")}


def test_what_is_not_known_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_graphs, "trace", lambda *_: pytest.fail("a graph is traced"))
    for options, message in (
        ({"precision": "fp16"}, "unknown precision 'fp16': choose float32 or float16"),
        ({"optimisations": ("tokens",)}, "unknown optimisation 'tokens': choose from pad_heads, split_depthwise"),
    ):
        with pytest.raises(UserError, match=message):
            onnx_graphs.export(random_model(DEMO), checkpoint.Source("test", 0), tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_wheels_sources_come_before_a_stranger_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """site-packages may hold another package that is called export."""
    package = tmp_path / "mubic_deploy"
    for folder in (tmp_path / "export", package / "_sources" / "export"):
        folder.mkdir(parents=True)
    monkeypatch.setattr(sources, "_PACKAGE", package)
    assert source_dir("export") == package / "_sources" / "export"


def test_manifest_says_what_was_made(demo_artifacts: Artifacts) -> None:
    manifest = demo_artifacts.manifest
    assert manifest["source"] == {"name": "demo", "seed": None, "sha256": sha256(DEMO_FILE)}
    assert manifest["config"]["variant"] == "full"
    assert manifest["versions"]["torch"] == torch.__version__.split("+")[0]
    assert list(manifest["graphs"]) == ["visual_encoder", "audio_encoder", "fusion", "denoiser"]
    assert manifest["parity"]["clips"] == 3
    assert 0 < max(manifest["parity"]["graphs"]["visual_encoder"].values()) < 1e-4


CHANGED = {  # the graphs in which a variant differs from the full model
    "no_beca": ["fusion"],
    "no_skip": ["fusion"],
    "concat": ["fusion", "denoiser"],
    "no_diffusion": ["fusion", "denoiser"],
    "visual_only": ["fusion"],
}


@pytest.mark.parametrize("variant", CHANGED)
def test_every_variant_exports(variant: str, tmp_path: Path) -> None:
    config = replace(get_config("demo", variant), height=64, width=96, audio_patch=(32, 48))
    model = random_model(config)
    reference = eager.load_engines(model)
    tensors: dict[str, Any] = {**random_clip(config, 0)}
    tensors |= {"S_T": np.ones((1, 1, 32, 48), np.float32), "STEP": np.full((1, 1), 499, np.int32)}
    tensors |= {"ALPHA_NOW": np.full((1, 1), 0.5, np.float32), "ALPHA_NEXT": np.full((1, 1), 0.8, np.float32)}
    for name, signature in signatures(config).items():
        expected = reference[name](tensors)
        if name in CHANGED[variant]:
            onnx_graphs.trace(model.graph(name), signature, tmp_path / name)
            got = cpu.load_engine("onnxruntime", tmp_path / name, signature)(tensors)
            assert all(np.abs(got[t] - expected[t]).max() < 1e-4 for t in expected)
        tensors |= expected


def test_a_graph_that_differs_is_not_written(
    demo_artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tracer hands out the graphs of other weights, as a wrong rewrite would."""
    monkeypatch.setattr(onnx_graphs, "trace", lambda _, s, path: shutil.copy(demo_artifacts.file(s.name), path))
    with pytest.raises(UserError, match=r"the exported graphs differ from eager PyTorch: .* of .*; export them with"):
        onnx_graphs.export(random_model(DEMO, 1), checkpoint.Source("test", 1), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("engine", cpu.ENGINES)
def test_parity_sees_a_difference(demo_artifacts: Artifacts, engine: str) -> None:
    engines = cpu.load_engines(engine, demo_artifacts)
    result = compare(DEMO, eager.load_engines(random_model(DEMO, 1)), engines, clips=1)
    assert not result.ok
    with pytest.raises(UserError, match="differ from eager PyTorch"):
        result.require()


@pytest.mark.parametrize(("steps", "ok"), [(1, True), (2, False)])
def test_adaptive_steps_may_round_to_the_next(steps: int, ok: bool) -> None:
    """Its entropy may lie between two numbers; in FP32 too."""
    engines = eager.load_engines(random_model(DEMO))

    def rounded(inputs):
        outputs = engines["fusion"](inputs)
        return {**outputs, "ADAPTIVE_STEPS": np.asarray(outputs["ADAPTIVE_STEPS"]) + steps}

    candidate: dict = {**engines, "fusion": rounded}
    assert compare(DEMO, engines, candidate, clips=1).ok == ok


@pytest.mark.parametrize(("graph", "tensor"), [("fusion", "CONTEXT2"), ("denoiser", "S_0")])
def test_nan_is_a_difference(graph: str, tensor: str) -> None:
    engines = eager.load_engines(random_model(DEMO))

    def broken(inputs):
        outputs = dict(engines[graph](inputs))
        outputs[tensor] = np.full_like(outputs[tensor], np.nan)
        return outputs

    candidate: dict = {**engines, graph: broken}
    result = compare(DEMO, engines, candidate, clips=1)
    assert not result.ok
    with pytest.raises(UserError, match=f"{tensor} of {graph}"):
        result.require()


def test_openvino_is_asked_for_when_it_is_missing(
    demo_artifacts: Artifacts, run, monkeypatch: pytest.MonkeyPatch
) -> None:
    openvino.core.cache_clear()
    monkeypatch.setitem(sys.modules, "openvino", None)
    ran = run("parity", demo_artifacts.path)
    assert ran.code == 2
    assert ran.err.startswith("mubic-deploy: OpenVINO cannot be used (")
    assert ran.err.endswith("): pip install openvino, or --engine onnxruntime\n")


def test_openvino_keeps_to_fp32_and_to_its_threads(demo_artifacts: Artifacts) -> None:
    signature = demo_artifacts.signatures["denoiser"]
    engine = openvino.OpenVinoEngine(demo_artifacts.file("denoiser"), signature, threads=1)
    compiled = engine._request.get_compiled_model()
    assert compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name() == "f32"
    assert compiled.get_property("INFERENCE_NUM_THREADS") == 1
    assert [next(iter(i.shape)) for i in compiled.inputs] == [1] * len(signature.inputs)


def test_openvino_takes_a_batch_clip_by_clip(demo_artifacts: Artifacts) -> None:
    engines = cpu.load_engines("openvino", demo_artifacts)
    reference = cpu.load_engines("onnxruntime", demo_artifacts)
    clips = random_clip(DEMO, 0, 3)
    maps = [Pipeline(DEMO, e).predict(clips["VIDEO"], clips["AUDIO"], np.arange(3))[0] for e in (engines, reference)]
    np.testing.assert_allclose(maps[0], maps[1], atol=1e-4)
    for i in range(3):
        (alone,), _ = Pipeline(DEMO, engines).predict(clips["VIDEO"][i : i + 1], clips["AUDIO"][i : i + 1], i)
        np.testing.assert_array_equal(maps[0][i], alone)
    first, *others = demo_artifacts.signatures["fusion"].inputs
    feed = {t.name: np.zeros((3, *t.shape), t.dtype) for t in others}
    feed[first.name] = np.zeros((1, *first.shape), first.dtype)
    with pytest.raises(UserError, match=r"the tensors of fusion must have the same batch size"):
        engines["fusion"](feed)


def test_maps_of_one_value_that_are_equal_have_a_cc() -> None:
    """A model that has collapsed can be exported: its CC with itself is undefined, and nothing differs."""
    engines = eager.load_engines(random_model(DEMO))

    def flat(inputs):
        return {name: np.zeros_like(x) for name, x in engines["denoiser"](inputs).items()}

    collapsed: dict = {**engines, "denoiser": flat}
    result = compare(DEMO, collapsed, collapsed, clips=1)
    assert (result.map_difference, result.map_cc, result.ok) == (0, 1, True)


def test_what_fails_is_in_the_message() -> None:
    close = Parity({"fusion": {"CONTEXT2": 1e-6}}, map_difference=1e-6, map_cc=0.9, clips=1)
    with pytest.raises(UserError, match=r"the map by 1.0e-06 \(at most .*\), its CC 0.900000 \(at least 0.9999\)"):
        close.require()


def test_other_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="is not an earlier export"):
        onnx_graphs.export(random_model(DEMO), checkpoint.Source("test", 0), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("manifest", ['{"name": "an app"}', "[]", '{"graphs": {"a": {"file": "a.onnx"}}}'])
def test_a_manifest_is_not_enough(tmp_path: Path, manifest: str) -> None:
    """Many programs call a file so; and a folder of ours may have got something else since."""
    (tmp_path / MANIFEST).write_text(manifest)
    (tmp_path / "app.js").write_text("mine")
    with pytest.raises(UserError, match=r"is not an earlier export|would be replaced, but holds app\.js too"):
        onnx_graphs.export(random_model(DEMO), checkpoint.Source("test", 0), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["app.js", MANIFEST]


def damage(folder: Path, what: str) -> None:
    manifest = folder / MANIFEST
    data = json.loads(manifest.read_text())
    if what == "edited":
        graph = folder / "fusion.onnx"
        content = bytearray(graph.read_bytes())
        content[len(content) // 2] ^= 1
        graph.write_bytes(content)
    elif what == "missing":
        (folder / "denoiser.onnx").unlink()
    elif what == "unfinished":
        manifest.unlink()
    elif what == "no json":
        manifest.write_text("{")
    elif what == "other format":
        manifest.write_text(json.dumps(data | {"format": 99}))
    elif what == "other optimisation":
        manifest.write_text(json.dumps(data | {"optimisations": ["pad_heads", "int4"]}))
    elif what == "no graphs":
        manifest.write_text(json.dumps(data | {"graphs": {}}))
    elif what == "no source":
        del data["source"]
        manifest.write_text(json.dumps(data))
    elif what == "three scales":
        data["config"]["visual_channels"] = [1, 2, 3]
        manifest.write_text(json.dumps(data))
    elif what == "other size":
        data["config"]["height"] = 224
        manifest.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("edited", r"fusion\.onnx is not the file that the manifest means"),
        ("missing", r"denoiser\.onnx is missing"),
        ("unfinished", r"holds no manifest\.json"),
        ("no json", "cannot be read"),
        ("other format", "is not of format 3"),
        ("other optimisation", "the optimisation 'int4' is not known: make it with mubic-deploy export"),
        ("no graphs", "lacks 'visual_encoder'"),
        ("no source", "lacks 'source'"),
        ("three scales", "cannot be used"),
        ("other size", "the signature of visual_encoder is not this version's"),
    ],
)
def test_damaged_artifacts_are_refused(demo_artifacts: Artifacts, tmp_path: Path, what: str, message: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(demo_artifacts.path, folder)
    damage(folder, what)
    (tmp_path / "file").touch()
    for path, says in (
        (tmp_path / "gone", "gone does not exist: make it"),
        (tmp_path / "file", "is a file, not a folder"),
    ):
        with pytest.raises(UserError, match=says):
            Artifacts.open(path)
    with pytest.raises(UserError, match=message) as caught:
        Artifacts.open(folder)
    assert "\n" not in str(caught.value)
