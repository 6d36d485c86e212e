"""The model repository's files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import toy_graphs
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from mubic_deploy.artifacts import Artifacts
from mubic_deploy.config import get_config
from mubic_deploy.errors import UserError
from mubic_deploy.live.settings import StreamSettings
from mubic_deploy.triton.repository import write_repository

pytest_plugins = ("triton_fixtures",)


def read(repository: Path, name: str) -> ModelConfig:
    return text_format.Parse((repository / name / "config.pbtxt").read_text(), ModelConfig())


def files(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_ensemble_runs_the_encoders_side_by_side(toy_artifacts: Artifacts, tmp_path: Path) -> None:
    write_repository(toy_artifacts, tmp_path / "r", max_batch=4)
    ensemble = read(tmp_path / "r", "mubic")
    assert (ensemble.platform, ensemble.max_batch_size) == ("ensemble", 4)
    assert {t.name: list(t.dims) for t in ensemble.input} == {
        "VIDEO": [16, 112, 192, 3],
        "AUDIO": [16608],
        "SEED": [1],
        "STEPS": [1],
    }
    assert {t.name: list(t.dims) for t in ensemble.output} == {"SALIENCY": [56, 96], "STEPS_USED": [1]}
    needs = {s.model_name: set(s.input_map.values()) for s in ensemble.ensemble_scheduling.step}
    makes = {s.model_name: set(s.output_map.values()) for s in ensemble.ensemble_scheduling.step}
    assert needs["visual_encoder"] == {"VIDEO"}
    assert needs["audio_encoder"] == {"AUDIO"}
    assert needs["fusion"] == {"V1", "V2", "V3", "V4", "A", "AUDIO"}  # at which it looks
    assert "ENTROPY" not in makes["fusion"]  # nobody reads it: it would only be copied
    assert needs["ddim"] == makes["fusion"] | {"SEED", "STEPS"}


def test_visual_only_has_no_audio(tmp_path: Path) -> None:
    artifacts = toy_graphs.write(get_config("demo", "visual_only"), tmp_path / "toy")
    write_repository(artifacts, tmp_path / "r")
    names = {"visual_encoder", "fusion", "denoiser", "ddim", "mubic", "mubic_stream"}
    assert {p.name for p in (tmp_path / "r").iterdir()} == names
    assert {t.name for t in read(tmp_path / "r", "mubic").input} == {"VIDEO", "SEED", "STEPS"}


def test_streams(toy_artifacts: Artifacts, tmp_path: Path) -> None:
    write_repository(toy_artifacts, tmp_path / "r", streams=StreamSettings(max_streams=3, idle_s=7.5))
    stream = read(tmp_path / "r", "mubic_stream")
    assert stream.sequence_batching.max_sequence_idle_microseconds == 7_500_000
    assert stream.parameters["MAX_STREAMS"].string_value == "3"
    assert stream.model_transaction_policy.decoupled
    assert (stream.max_batch_size, stream.instance_group[0].count) == (0, 1)
    assert all(given.optional for given in stream.input)
    assert {t.name: list(t.dims) for t in stream.input}["FRAMES"] == [-1, 112, 192, 3]
    for wrong, message in (({"max_streams": 0}, "max_streams 0 is out"), ({"idle_s": 0.0}, r"idle_s 0\.0 is out")):
        with pytest.raises(UserError, match=message):
            StreamSettings(**wrong)


def test_instances(toy_artifacts: Artifacts, tmp_path: Path) -> None:
    write_repository(toy_artifacts, tmp_path / "r", instances={"fusion": 3})
    assert read(tmp_path / "r", "fusion").instance_group[0].count == 3
    assert read(tmp_path / "r", "ddim").instance_group[0].count == 1


def test_queue_delay(toy_artifacts: Artifacts, tmp_path: Path) -> None:
    """Where requests are batched, and nowhere else: `ddim` batches them only when it calls the denoiser."""
    graphs = ("visual_encoder", "audio_encoder", "fusion", "denoiser", "sampler")
    for calls in (False, True):
        write_repository(toy_artifacts, tmp_path / "r", queue_delay_us=1500, call_denoiser=calls)
        batched = (*graphs, "ddim") if calls else graphs
        delays = {p.name: read(tmp_path / "r", p.name) for p in (tmp_path / "r").iterdir()}
        found = {n: m.dynamic_batching.max_queue_delay_microseconds for n, m in delays.items()}
        assert {name: delay for name, delay in found.items() if delay} == dict.fromkeys(batched, 1500)
        assert {n for n, m in delays.items() if m.HasField("dynamic_batching")} == set(batched)
    write_repository(toy_artifacts, tmp_path / "r")
    fusion = read(tmp_path / "r", "fusion")
    assert fusion.HasField("dynamic_batching")
    assert fusion.dynamic_batching.max_queue_delay_microseconds == 0


def test_queue_timeout(toy_artifacts: Artifacts, tmp_path: Path) -> None:
    """Where a request may wait, but for the encoder that is done soon and for the steps of the loop."""
    for calls in (False, True):
        write_repository(toy_artifacts, tmp_path / "r", queue_timeout_s=2.5, call_denoiser=calls)
        models = {p.name: read(tmp_path / "r", p.name) for p in (tmp_path / "r").iterdir()}
        policies = {n: m.dynamic_batching.default_queue_policy for n, m in models.items()}
        found = {n: (p.timeout_action, p.default_timeout_microseconds) for n, p in policies.items()}
        refusing = ["visual_encoder", "fusion", "sampler", "ddim"]
        assert {n: value for n, value in found.items() if value[1]} == dict.fromkeys(refusing, (0, 2_500_000))
        assert list(models["ddim"].dynamic_batching.preferred_batch_size) == ([] if calls else [1])
        # after the sound: what is refused leaves nothing of its request at work
        assert [given.name for given in models["visual_encoder"].input] == ["VIDEO", "A"]
    write_repository(toy_artifacts, tmp_path / "r")
    assert not read(tmp_path / "r", "fusion").dynamic_batching.HasField("default_queue_policy")
    assert [given.name for given in read(tmp_path / "r", "visual_encoder").input] == ["VIDEO"]


def test_same_settings_same_files(toy_artifacts: Artifacts, tmp_path: Path) -> None:
    write_repository(toy_artifacts, tmp_path / "a")
    write_repository(toy_artifacts, tmp_path / "b", max_batch=2)
    assert files(tmp_path / "a") != files(tmp_path / "b")
    write_repository(toy_artifacts, tmp_path / "b")  # replaces the other one
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_batch": 0}, "max_batch 0 is out of range"),
        ({"threads": -1}, "threads -1 is out of range"),
        ({"queue_delay_us": -1}, "queue delay -1 is out of range: use 0 or more microseconds"),
        ({"queue_timeout_s": 0.0}, "queue timeout 0 is out of range: use seconds above 0"),
        ({"queue_timeout_s": 1e300}, r"queue timeout 1e\+300 is out of range"),
        ({"instances": {"fusion": 0}}, "instances of fusion 0 is out of range"),
        ({"max_batch": 3_000_000_000}, "max_batch 3000000000 is out of range: use 1 to 2147483647"),
        ({"threads": 10**14}, "threads 100000000000000 is out of range"),
        ({"instances": {"fusion": 3_000_000_000}}, "instances of fusion 3000000000 is out of range"),
        (
            {"instances": {"fuson": 1}},
            "there is no model 'fuson' to give instances to: choose from audio",
        ),
    ],
)
def test_wrong_settings(toy_artifacts: Artifacts, tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        write_repository(toy_artifacts, tmp_path / "r", **options)
    assert not list(tmp_path.iterdir())


def test_other_folders_are_left_alone(toy_artifacts: Artifacts, tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "one.txt").write_text("dear")
    with pytest.raises(UserError, match="letters exists and is no model repository"):
        write_repository(toy_artifacts, tmp_path / "letters")
    assert files(tmp_path) == {"letters/one.txt": b"dear"}


def test_another_model_in_the_repository_is_left_alone(toy_artifacts: Artifacts, tmp_path: Path) -> None:
    write_repository(toy_artifacts, tmp_path / "models")
    write_repository(toy_artifacts, tmp_path / "models")  # ours alone is replaced
    (tmp_path / "models" / "resnet").mkdir()
    with pytest.raises(UserError, match="models would be replaced, but holds resnet too"):
        write_repository(toy_artifacts, tmp_path / "models")
    assert (tmp_path / "models" / "resnet").is_dir()
    assert (tmp_path / "models" / "mubic" / "config.pbtxt").is_file()


def test_nothing_half_written(toy_artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\): make room"):
        write_repository(toy_artifacts, tmp_path / "r")
    assert not list(tmp_path.iterdir())


def test_shapes_follow_the_configuration(tmp_path: Path) -> None:
    config = replace(get_config("demo"), name="small", height=64, width=96)
    write_repository(toy_graphs.write(config, tmp_path / "toy"), tmp_path / "r")
    ddim = read(tmp_path / "r", "ddim")
    assert list(ddim.output[0].dims) == [32, 48]
    assert list(ddim.output[0].reshape.shape) == [1, 32, 48]
