"""The one format of results: a JSON file a run, as `bench/schema.json` describes it."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench import machine as here
from bench.timing import Timing
from mubic_deploy import strict_json
from mubic_deploy.errors import UserError

SCHEMA = 1
FOLDER = Path(__file__).parent / "results"
LOOKS = Path("out") / "looks"  # the default of what is no measurement of this machine, or a short one
MACHINE = ("cpu", "cores", "gpu")  # without which it cannot be said to be the same
REQUIRED = ("schema", "suite", "created", "commit", "settings", "machine", "state", "limits", "rows", "left_out")


@dataclass
class Row:
    """One thing that was measured.

    what    the group whose sides compare: "whole", a graph's name, "steps 8" ...
    side    who was measured: an engine or a baseline
    axes    what else was set: batch, steps, concurrency ...
    timing  its calls, where time was measured
    values  other figures by name, in units that the name ends with (_s, _bytes, _per_s ...)"""

    what: str
    side: str
    axes: dict[str, int | str] = field(default_factory=dict)
    timing: Timing | None = None
    values: dict[str, float] = field(default_factory=dict)

    @property
    def key(self) -> tuple:
        return (self.what, self.side, *sorted(self.axes.items()))

    def to_json(self) -> dict[str, Any]:
        out: dict[str, Any] = {"what": self.what, "side": self.side, "axes": self.axes, "values": self.values}
        if self.timing is not None:
            out["seconds"] = self.timing.summary()
            out["samples_s"] = [float(f"{s:.6g}") for s in self.timing.samples]
            if self.timing.rounds:
                out["rounds"] = list(self.timing.rounds)
            if self.timing.measurement is not None:
                out["measurement"] = self.timing.measurement
        return out

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Row:
        """KeyError, TypeError, ValueError or AttributeError if it is no row. A value that is null becomes NaN."""
        timing = None
        if "samples_s" in data:
            samples = tuple(float(s) for s in data["samples_s"])
            if not samples:
                raise ValueError("samples_s is empty")
            rounds = tuple(int(n) for n in data.get("rounds", ()))
            if rounds and (sum(rounds) != len(samples) or min(rounds) < 1):
                raise ValueError("rounds do not add up to samples_s")
            seconds, measurement = data["seconds"], data.get("measurement")
            timing = Timing(samples, seconds["warm_ups"], seconds["settled"], rounds, measurement)
        values = {name: math.nan if v is None else float(v) for name, v in data["values"].items()}
        return cls(str(data["what"]), str(data["side"]), dict(data["axes"]), timing, values)


@dataclass
class Results:
    """A run of one suite. Build it when the run begins; `finish` notes the machine's state at its end."""

    suite: str
    settings: dict[str, Any]
    limits: dict[str, float] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)  # side -> why
    notes: dict[str, Any] = field(default_factory=dict)  # tables that are no rows: kernels, warnings
    machine: dict[str, Any] = field(default_factory=here.facts)
    commit: str | None = field(default_factory=here.commit)
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    state: dict[str, Any] = field(default_factory=lambda: {"before": here.state()})

    def add(self, what: str, timings: dict[str, Timing], **axes: int | str) -> None:
        """A row for each side."""
        self.rows += [Row(what, side, dict(axes), timing) for side, timing in timings.items()]

    def row(self, what: str, side: str, **axes: int | str) -> Row:
        """KeyError if there is none."""
        for row in self.rows:
            if (row.what, row.side) == (what, side) and axes.items() <= row.axes.items():
                return row
        raise KeyError(f"{what}, {side}, {axes}")

    def precision(self, row: Row) -> str:
        """The axis or the setting of that name, or FP16 if the side says so."""
        named = row.axes.get("precision") or self.settings.get("precision")
        if named:
            return str(named)
        return "float16" if "FP16" in row.side else "float32"

    def least_s(self, row: Row) -> dict[str, float] | None:
        """The seconds that this machine's limits allow at best: of the matrix products (2 FLOPs for each of `macs` at
        the rate of the row's precision) and, where `bytes` are known, of the copies. None without rate or `macs`."""
        gemm = self.limits.get(f"gemm_{self.precision(row)}")
        if gemm is None or not row.values.get("macs", math.nan) > 0:
            return None
        least = {"matrix products": 2 * row.values["macs"] / gemm}
        if "copy" in self.limits and row.values.get("bytes", math.nan) > 0:
            least["copies"] = row.values["bytes"] / self.limits["copy"]
        return least

    def share_of_limit(self, row: Row) -> float | None:
        """The longest of `least_s` over the time that the row took. None if either is not known."""
        least = self.least_s(row)
        return None if least is None or row.timing is None else max(least.values()) / row.timing.median

    def finish(self) -> None:
        self.state["after"] = here.state()

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "suite": self.suite,
            "created": self.created,
            "commit": self.commit,
            "settings": self.settings,
            "machine": self.machine,
            "state": self.state,
            "limits": self.limits,
            "rows": [row.to_json() for row in self.rows],
            "left_out": self.left_out,
            "notes": self.notes,
        }

    def write(self, path: Path) -> None:
        """Whole or not at all; a file that is there is replaced. UserError if it cannot be written."""
        text = strict_json.dumps(self.to_json(), indent=1)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(text + "\n")
            part.replace(path)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise UserError(f"{path} cannot be written ({error.strerror or error}): choose another --out") from None


def read(path: Path) -> Results:
    """A results file. UserError if it is none, or of another schema."""
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: name a file that `bench run` wrote") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): name a file that `bench run` wrote") from None
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        found = data.get("schema") if isinstance(data, dict) else None
        said = "has no schema" if found is None else f"is of schema {found}"
        raise UserError(f"{path} {said}, this reads {SCHEMA}: measure again with `bench run`")
    if missing := [key for key in REQUIRED if key not in data]:
        raise UserError(f"{path} lacks {missing[0]}: measure again with `bench run`")
    for key, kind in {
        "rows": list,
        **dict.fromkeys(("settings", "machine", "state", "limits", "left_out"), dict),
    }.items():
        if not isinstance(data[key], kind):
            raise UserError(f"{path}: {key} is no {kind.__name__}: measure again with `bench run`")
    if missing := [key for key in MACHINE if key not in data["machine"]]:
        raise UserError(f"{path}: machine lacks {missing[0]}: measure again with `bench run`")
    rows = []
    for i, row in enumerate(data["rows"]):
        try:
            rows.append(Row.from_json(row))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            raise UserError(f"{path}, row {i + 1} cannot be used ({what}): measure again with `bench run`") from None
    kept = {key: data[key] for key in REQUIRED if key not in ("schema", "rows")}
    return Results(rows=rows, notes=data.get("notes", {}), **kept)


def read_folder(folder: Path) -> dict[str, Results]:
    """The results files of a folder by name. UserError if there is no folder, or nothing in it, or a file that is no
    results file of this schema."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: name one that `bench run` wrote to")
    found = {path.name: read(path) for path in sorted(folder.glob("*.json"))}
    if not found:
        raise UserError(f"{folder} holds no results: measure with `bench run` first")
    return found
