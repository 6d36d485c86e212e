"""The format of results: what is written is what the published schema says, and reading says what is wrong."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jsonschema import Draft202012Validator

from bench import machine, results
from bench.results import Results, Row
from bench.timing import Timing
from mubic_deploy import strict_json
from mubic_deploy.errors import UserError

SCHEMA = Path(results.__file__).with_name("schema.json")


@pytest.fixture
def validator() -> Draft202012Validator:
    schema = json.loads(SCHEMA.read_text())
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def plain(found: Results) -> dict[str, Any]:
    """As it is read from a file by anybody."""
    return json.loads(strict_json.dumps(found.to_json()))


def measured() -> Results:
    found = Results("engines", {"size": "demo"}, limits={"gemm_float32": 2e11, "copy": 1e10})
    sides = {"eager": Timing((0.3, 0.1, 0.2), 4, measurement=7), "onnxruntime": Timing((0.1,), 2, False)}
    found.add("whole", sides, batch=1)
    found.rows.append(Row("parity", "onnxruntime", {"graph": "fusion"}, values={"cc": math.nan, "sim": 0.5}))
    found.rows.append(Row("server", "our clients", timing=Timing((0.3, 0.1, 0.2), 4, rounds=(1, 2))))
    found.left_out["openvino"] = "not installed"
    found.finish()
    return found


@pytest.mark.parametrize(
    ("values", "share"),
    [
        ({"macs": 1e10}, 0.5),  # 0.1 s of 0.2 s
        ({"macs": 1e10, "bytes": 1e8}, 0.5),  # copies would be done in 0.01 s
        ({"macs": 1e8, "bytes": 1e9}, 0.5),  # here they take 0.1 s
        ({"bytes": 1e9}, None),
        ({}, None),
    ],
)
def test_share_of_the_limit(values: dict[str, float], share: float | None) -> None:
    row = Row("whole", "eager", timing=Timing((0.3, 0.1, 0.2)), values=values)
    assert measured().share_of_limit(row) == (None if share is None else pytest.approx(share))
    assert Results("engines", {}).share_of_limit(row) is None
    assert measured().share_of_limit(Row("whole", "eager", values=values)) is None


def test_what_is_written_fits_the_schema(tmp_path: Path, validator: Draft202012Validator) -> None:
    measured().write(tmp_path / "a.json")
    written = json.loads((tmp_path / "a.json").read_text())
    validator.validate(written)
    row = written["rows"][0]
    assert (row["seconds"]["median"], row["seconds"]["calls"], row["seconds"]["warm_ups"]) == (0.2, 3, 4)
    assert row["samples_s"] == [0.3, 0.1, 0.2]
    assert not row["seconds"].keys() & {"p90", "p95", "p99"}
    assert written["rows"][2]["values"] == {"cc": None, "sim": 0.5}
    assert written["rows"][3]["rounds"] == [1, 2]
    assert "rounds" not in row
    assert row["measurement"] == 7
    assert "measurement" not in written["rows"][1]
    back = [row.timing for row in results.read(tmp_path / "a.json").rows]
    assert back == [row.timing for row in measured().rows]


def test_percentiles_that_few_calls_cannot_tell_are_not_written(validator: Draft202012Validator) -> None:
    for calls, told in (
        (9, set()),
        (10, {"p90"}),
        (20, {"p90", "p95"}),
        (99, {"p90", "p95"}),
        (100, {"p90", "p95", "p99"}),
    ):
        found = Results("engines", {}, rows=[Row("whole", "eager", timing=Timing((0.1,) * calls))])
        written = plain(found)
        validator.validate(written)
        seconds = written["rows"][0]["seconds"]
        assert {name for name in seconds if name.startswith("p")} == told
        seconds |= {"p90": 0.1, "p95": 0.1, "p99": 0.1}  # as files had it that were written before
        validator.validate(written)


@pytest.mark.parametrize("path", sorted(results.FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_what_was_measured_fits_the_schema(path: Path, validator: Draft202012Validator) -> None:
    validator.validate(json.loads(path.read_text()))


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 2},
        {"extra": 1},
        {"limits": {"gemm_float32": "fast"}},
        {"limits": {"peak": 1.0}},
        {"commit": "main"},
        {"machine": {"cpu": "x", "cores": 0, "gpu": None}},
        {"rows": [{"what": "whole", "side": "eager", "axes": {}}]},
        {"rows": [{"what": "whole", "side": "eager", "axes": {"batch": 1.5}, "values": {}}]},
        {"rows": [{"what": "whole", "side": "eager", "axes": {}, "values": {}, "samples_s": [0.1]}]},
    ],
)
def test_the_schema_refuses(change: dict[str, Any], validator: Draft202012Validator) -> None:
    assert not validator.is_valid(plain(measured()) | change)


def test_reading_gives_back_what_was_written(tmp_path: Path) -> None:
    before = measured()
    before.write(tmp_path / "a.json")
    after = results.read(tmp_path / "a.json")
    assert after.rows[:2] == before.rows[:2]
    assert math.isnan(after.rows[2].values["cc"])
    assert (after.suite, after.limits, after.left_out) == (before.suite, before.limits, before.left_out)
    assert (after.machine, after.commit, after.created) == (before.machine, before.commit, before.created)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema": 7}, "is of schema 7, this reads 1"),
        ({"schema": None}, "has no schema"),
        ({"rows": {}}, "rows is no list"),
        ({"machine": {"cpu": "x", "cores": 1}}, "machine lacks gpu"),
        ({"rows": [{"what": "whole", "axes": {}, "values": {}}]}, "row 1 cannot be used (lacks 'side')"),
        (
            {"rows": [{"what": "a", "side": "b", "axes": {}, "values": {}, "samples_s": []}]},
            "row 1 cannot be used (samples_s is empty)",
        ),
        ({"rows": ["whole"]}, "row 1 cannot be used"),
        ({"rows": [{"what": "a", "side": "b", "axes": {}, "values": {"cc": "high"}}]}, "row 1 cannot be used"),
    ],
)
def test_reading_says_what_is_wrong(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(plain(measured()) | change))
    with pytest.raises(UserError) as raised:
        results.read(path)
    assert said in str(raised.value)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["", "[1", "[]", "3"])
def test_what_is_no_results_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError):
        results.read(tmp_path / "a.json")


def test_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no folder"):
        results.read_folder(tmp_path / "none")
    with pytest.raises(UserError, match="holds no results"):
        results.read_folder(tmp_path)
    measured().write(tmp_path / "engines.json")
    assert list(results.read_folder(tmp_path)) == ["engines.json"]
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(UserError, match=r"broken\.json cannot be read"):
        results.read_folder(tmp_path)


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    path.write_text("before")

    def full(self: Path, text: str) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match="No space left"):
        measured().write(path)
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_gpu_without_nvidias_library_is_named_by_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A result that says "no GPU" could not be told from one of another."""
    monkeypatch.setattr(machine, "_nvml", lambda _: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(name="NVIDIA H100", total_memory=85 * 10**9)
    )
    assert machine.gpu_facts() == {"name": "NVIDIA H100", "memory_gb": 85.0}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.gpu_facts() is None
