"""The repository for a GPU: its configurations by Triton's own schema, and its Python and ensemble parts in the real
server, with ONNX Runtime in the place of each TensorRT plan."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton
from google.protobuf import text_format
from triton_serving import FREE_PORTS, clips
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig, ModelInstanceGroup

from mubic_deploy import graphs
from mubic_deploy.artifacts import Artifacts
from mubic_deploy.config import DEMO, get_config
from mubic_deploy.engines.tensorrt import Plans
from mubic_deploy.errors import UserError
from mubic_deploy.pipeline import Pipeline
from mubic_deploy.sources import source_dir
from mubic_deploy.triton.client import TritonPredictor
from mubic_deploy.triton.parameters import GraphSettings
from mubic_deploy.triton.repository import GpuSettings, pool_bytes, write_gpu_repository
from mubic_deploy.triton.server import TritonServer

GRAPHS = ("visual_encoder", "audio_encoder", "fusion", "denoiser", "sampler")


@pytest.fixture(scope="module")
def plans(toy_artifacts: Artifacts, tmp_path_factory: pytest.TempPathFactory) -> Plans:
    """Plans by name only; the toy graphs are FP32."""
    folder = tmp_path_factory.mktemp("plans")
    for name in GRAPHS:
        (folder / f"{name}.plan").write_bytes(name.encode())
    manifest = {
        "precision": "float32",
        "fixed_steps": toy_artifacts.fixed_steps,
        "optimisations": [],
        "profile": {"min": 1, "best": 1, "max": 6},
        "plans": {name: {"file": f"{name}.plan"} for name in GRAPHS},
        "source": toy_artifacts.manifest["source"],
    }
    return Plans(folder, toy_artifacts.config, manifest)


@pytest.fixture(scope="module")
def written(plans: Plans, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gpu") / "repository"
    write_gpu_repository(plans, out)
    return out


def read(repository: Path, name: str) -> ModelConfig:
    return text_format.Parse((repository / name / "config.pbtxt").read_text(), ModelConfig())


# ---- the configurations


@pytest.mark.parametrize("name", GRAPHS)
def test_each_plan_is_a_model(written: Path, name: str) -> None:
    model = read(written, name)
    assert (model.platform, model.max_batch_size) == ("tensorrt_plan", 6)
    assert (written / name / "1" / "model.plan").read_bytes() == name.encode()
    assert [(g.kind, g.count) for g in model.instance_group] == [(ModelInstanceGroup.KIND_GPU, 1)]
    assert list(model.dynamic_batching.preferred_batch_size) == [6]
    assert model.dynamic_batching.max_queue_delay_microseconds == 0  # a lone client waits for nobody
    assert model.optimization.cuda.graphs
    assert [g.batch_size for g in model.optimization.cuda.graph_spec] == [1, 2, 3, 4, 5, 6]
    signature = graphs.signatures(DEMO, sampler=True)[name]
    assert [t.name for t in model.input] == signature.input_names
    assert [t.name for t in model.output] == signature.output_names
    assert [w.batch_size for w in model.model_warmup] == [1, 2, 3, 4, 5, 6]
    for warm_up in model.model_warmup:
        for tensor in signature.inputs:
            given = warm_up.inputs[tensor.name]
            assert tuple(given.dims) == tensor.shape
            assert given.WhichOneof("input_data_type") == (
                "zero_data" if tensor.name in ("STEP", "AUDIO") else "random_data"
            )


def test_the_loop_takes_tensors_where_they_are(written: Path) -> None:
    ddim = read(written, "ddim")
    assert ddim.parameters["FORCE_CPU_ONLY_INPUT_TENSORS"].string_value == "no"
    assert "ONNX" not in ddim.parameters  # it calls the denoiser
    assert ddim.instance_group[0].count == 4
    assert ddim.HasField("dynamic_batching")  # without a delay too
    assert ddim.dynamic_batching.max_queue_delay_microseconds == 0
    assert "FORCE_CPU_ONLY_INPUT_TENSORS" not in read(written, "host").parameters
    assert [t.name for t in read(written, "noise").input] == ["SEED"]  # for which nothing comes from the GPU


def test_settings(plans: Plans, tmp_path: Path) -> None:
    off = {"cuda_graphs": False, "warm_up": False}
    settings = GpuSettings(instances=2, loops=7, queue_delay_us=80, queue_timeout_s=0.5, **off)
    write_gpu_repository(plans, tmp_path / "r", settings)
    policies = {name: read(tmp_path / "r", name).dynamic_batching.default_queue_policy for name in (*GRAPHS, "ddim")}
    refusing = {n for n, policy in policies.items() if policy.default_timeout_microseconds == 500_000}
    assert refusing == {*GRAPHS, "ddim"} - {"audio_encoder", "denoiser"}
    fusion = read(tmp_path / "r", "fusion")
    assert fusion.instance_group[0].count == 2
    delays = {name: read(tmp_path / "r", name).dynamic_batching.max_queue_delay_microseconds for name in GRAPHS}
    assert delays == dict.fromkeys(GRAPHS, 80)
    assert read(tmp_path / "r", "ddim").dynamic_batching.max_queue_delay_microseconds == 80
    assert not fusion.optimization.cuda.graphs
    assert not fusion.model_warmup
    assert read(tmp_path / "r", "ddim").instance_group[0].count == 7
    for wrong in (
        lambda: GpuSettings(instances=0),
        lambda: GpuSettings(loops=0),
        lambda: GpuSettings(queue_delay_us=-1),
        lambda: GpuSettings(queue_timeout_s=-1.0),
    ):
        with pytest.raises(UserError, match="out of range"):
            wrong()


def test_a_large_batch_gets_graphs_of_powers_of_two(plans: Plans, tmp_path: Path) -> None:
    for largest, captured in ((16, list(range(1, 17))), (17, [1, 2, 4, 8, 16, 17])):
        large = Plans(plans.path, plans.config, {**plans.manifest, "profile": {"max": largest}})
        write_gpu_repository(large, tmp_path / "r")
        fusion = read(tmp_path / "r", "fusion")
        assert [g.batch_size for g in fusion.optimization.cuda.graph_spec] == captured
        assert list(fusion.dynamic_batching.preferred_batch_size) == [largest]


def test_half_precision_travels_between_the_plans(plans: Plans, tmp_path: Path) -> None:
    halves = Plans(plans.path, plans.config, {**plans.manifest, "precision": "float16"})
    write_gpu_repository(halves, tmp_path / "r")
    kinds = {t.name: DataType.Name(t.data_type) for t in read(tmp_path / "r", "denoiser").input}
    assert kinds["CONTEXT1"] == kinds["KEYS4"] == "TYPE_FP16"
    assert kinds["S_T"] == kinds["ALPHA_NOW"] == "TYPE_FP32"
    assert {DataType.Name(t.data_type) for t in read(tmp_path / "r", "mubic").output} == {"TYPE_FP32", "TYPE_INT32"}


@pytest.mark.parametrize("name", ["mubic", "mubic_fixed"])
def test_every_tensor_of_the_ensemble_has_one_maker(written: Path, name: str) -> None:
    ensemble = read(written, name)
    known = {t.name for t in ensemble.input}
    for step in ensemble.ensemble_scheduling.step:
        model = read(written, step.model_name)
        assert set(step.input_map) == {t.name for t in model.input}
        assert set(step.output_map) <= {t.name for t in model.output}
        assert set(step.input_map.values()) <= known
        assert not set(step.output_map.values()) & known
        known |= set(step.output_map.values())
    assert {t.name for t in ensemble.output} <= known


def test_the_command(run, toy_artifacts: Artifacts, tmp_path: Path) -> None:
    command = ("repository", toy_artifacts.path, "--out", tmp_path / "cpu")
    assert run(*command, "--instances", 2).code == 0

    def counts() -> dict[str, int]:
        return {name: read(tmp_path / "cpu", name).instance_group[0].count for name in ("fusion", "denoiser", "ddim")}

    assert counts() == {"fusion": 2, "denoiser": 1, "ddim": 2}  # nobody calls the denoiser
    assert run(*command, "--instances", 2, "--call-denoiser").code == 0
    assert counts() == {"fusion": 2, "denoiser": 2, "ddim": 2}
    options = ["--instances", 2, "--instances", "ddim=3", "--instances", "fusion=1", "--threads", 1, "--max-batch", 4]
    options += ["--queue-delay", 700, "--queue-timeout", 1.5, "--call-denoiser", "--engine", "onnxruntime"]
    options += ["--max-streams", 3]
    assert run(*command, *options).code == 0
    fusion, ddim = read(tmp_path / "cpu", "fusion"), read(tmp_path / "cpu", "ddim")
    assert (fusion.instance_group[0].count, ddim.instance_group[0].count) == (1, 3)
    assert (fusion.max_batch_size, ddim.max_batch_size) == (4, 4)
    assert fusion.dynamic_batching.max_queue_delay_microseconds == 700
    assert fusion.dynamic_batching.default_queue_policy.default_timeout_microseconds == 1_500_000
    assert {key: fusion.parameters[key].string_value for key in ("ENGINE", "THREADS")} == {
        "ENGINE": "onnxruntime",
        "THREADS": "1",
    }
    assert "ONNX" not in ddim.parameters  # it calls
    assert read(tmp_path / "cpu", "mubic_stream").parameters["MAX_STREAMS"].string_value == "3"


def test_the_command_says_how_to_serve(
    run, plans: Plans, toy_artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the guide and compose.yaml do, which `test_docker` holds against the memory that `full` wants."""
    shared, pool = "--backend-config=python,shm-default-byte-size=16777216", "--cuda-memory-pool-byte-size=0:2147483648"
    files = [(Path(__file__).parents[1] / name).read_text() for name in ("docs/deployment.md", "compose.yaml")]
    assert all(
        {shared, pool, "--model-load-thread-count=1"}
        <= set(text.replace("${MUBIC_POOL_BYTES:-2147483648}", "2147483648").split())
        for text in files
    )
    ran = run("repository", toy_artifacts.path, "--out", tmp_path / "a cpu")
    assert (shared in ran.out, "pool" in ran.out, "load-thread" in ran.out) == (True, False, False)
    assert f"'--model-repository={tmp_path / 'a cpu'}'" in ran.out  # for a shell
    for compatible in (False, True):
        built = Plans(plans.path, plans.config, {**plans.manifest, "version_compatible": compatible})
        monkeypatch.setattr(Plans, "open", lambda _, built=built: built)
        ran = run("repository", "engines", "--engine", "tensorrt", "--out", tmp_path / "gpu")
        assert ran.code == 0
        assert f"--model-repository={tmp_path / 'gpu'} {shared} {pool} --model-load-thread-count=1" in ran.out
        assert ("--backend-config=tensorrt,version-compatible=true" in ran.out) == compatible
    full = {"config": get_config("full").to_json(), "profile": {"max": 16}}
    large = Plans(plans.path, get_config("full"), {**plans.manifest, **full})
    assert pool_bytes(large, GpuSettings(loops=1)) == 2 << 30
    # 20 MB a clip in FP16, 40 in FP32 as here
    assert pool_bytes(large, GpuSettings(loops=8)) == pytest.approx(2 * 8 * 16 * 40e6, rel=0.05)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--instances", "fuson=2"), "there is no model 'fuson' to give instances to"),
        (("--instances", "fusion=0"), "argument --instances: 0 is too small"),
        (("--instances", "=2"), "=2 names no model: use COUNT or MODEL=COUNT"),
        (("--instances", "fusion=two"), "two is not a whole number"),
        (("--max-batch", 0), "argument --max-batch: 0 is too small"),
        (("--queue-delay", -1), "-1 is not a whole number"),
        (("--no-warm-up",), "are for --engine tensorrt"),
        (("--engine", "tensorrt"), "holds no engines.json"),
        (("--engine", "tensorrt", "--threads", 1), "are for a CPU"),
        (("--engine", "tensorrt", "--call-denoiser"), "are for a CPU"),
        (("--engine", "tensorrt", "--instances", "fusion=2"), "--instances fusion=2 is for exported graphs on a CPU"),
    ],
)
def test_the_command_refuses(run, toy_artifacts: Artifacts, tmp_path: Path, options: tuple, says: str) -> None:
    ran = run("repository", toy_artifacts.path, "--out", tmp_path / "r", *options)
    assert ran.code == 2
    assert says in ran.err
    assert ran.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


# ---- in the real server


@pytest.fixture(scope="module")
def server(written: Path, toy_artifacts: Artifacts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """The repository as it was written, but for the plans: a CPU stand-in of the same signature each."""
    folder = tmp_path_factory.mktemp("served")
    shutil.copytree(written, folder / "repository")
    for name in GRAPHS:
        model = read(folder / "repository", name)
        file = toy_artifacts.file(name).resolve()
        stand_in = GraphSettings("onnxruntime", file, toy_artifacts.manifest["graphs"][name]["sha256"], "float32", 1)
        model.platform, model.backend, model.default_model_filename = "", "python", ""
        model.ClearField("optimization")
        model.instance_group[0].kind = ModelInstanceGroup.KIND_CPU
        for key, value in stand_in.to_strings().items():
            model.parameters[key].string_value = value
        version = folder / "repository" / name / "1"
        (version / "model.plan").unlink()
        shutil.copyfile(source_dir("triton_models") / name / "1" / "model.py", version / "model.py")
        (version.parent / "config.pbtxt").write_text(text_format.MessageToString(model))
    with TritonServer(folder / "repository", log=folder / "triton.log", **FREE_PORTS) as running:
        yield running


@pytest.mark.parametrize("steps", [1, 4, 0])
def test_the_chain_is_the_pipelines(server: TritonServer, toy_pipeline: Pipeline, steps: int) -> None:
    video, audio = clips(DEMO, 3)
    expected, expected_used = toy_pipeline.predict(video, audio, np.arange(3), steps)
    with TritonPredictor(server.url) as remote:
        got, used = remote.predict(video, audio, np.arange(3), steps)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert used.tolist() == expected_used.tolist()


def test_clips_at_different_steps_go_side_by_side(server: TritonServer, toy_pipeline: Pipeline) -> None:
    video, audio = clips(DEMO, 6)
    steps = np.array([1, 12, 4, 0, 2, 8])
    expected, _ = toy_pipeline.predict(video, audio, np.arange(6), steps)
    with TritonPredictor(server.url) as remote:
        futures = [remote.predict_async(video[i : i + 1], audio[i : i + 1], i, int(steps[i])) for i in range(6)]
        got = np.concatenate([future.result()[0] for future in futures])
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_the_sampler_takes_the_place_of_the_loop(server: TritonServer, toy_pipeline: Pipeline) -> None:
    video, audio = clips(DEMO, 3)
    expected, _ = toy_pipeline.predict(video, audio, np.arange(3), 3)
    with TritonPredictor(f"{server.url}/mubic_fixed") as remote:
        got, used = remote.predict(video, audio, np.arange(3))
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert used.tolist() == [[3]] * 3


def test_host_hands_on_what_it_gets(server: TritonServer) -> None:
    values = np.array([[3], [12]], np.int32)
    given = triton.InferInput("ADAPTIVE_STEPS", values.shape, "INT32")
    given.set_data_from_numpy(values)
    client = triton.InferenceServerClient(server.url)
    assert client.infer("host", [given]).as_numpy("ON_HOST").tolist() == values.tolist()
    client.close()
