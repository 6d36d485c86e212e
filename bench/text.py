"""Figures as people read them: a unit that suits, three digits, the same everywhere."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from mubic_deploy.errors import UserError

METRICS = ("cc", "sim", "nss", "auc_judd", "auc")
HIGHER_IS_BETTER = (*METRICS, "gain")
LOWER_IS_BETTER = ("seconds", "_s", "_ms", "_mb", "_bytes", "difference", "share_besides_engines", "growth", "lost")
IN_PROCESS = "over_in_process"  # of a load the rate over another's, of a clip the time
CPU = "cpu_s_"  # seconds, and then whose
UNSURE = "unsure"  # of a gain that may be none
PER_S = re.compile("_per_s($|_)")
PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def seconds(value: float, figures: int = 3) -> str:
    """1.81 s, 88.2 ms, 350 µs; - for none."""
    if not math.isfinite(value):
        return "-"
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if abs(value) * scale >= 0.9995 or unit == "µs":
            return f"{digits(value * scale, figures)} {unit}"
    raise AssertionError(value)


def ends(low: float, high: float, form: str = ".3f") -> str:
    """1.021 to 1.034; 1.021 to ? where the upper end is not known; - of what has no interval."""
    if math.isfinite(high):
        return f"{low:{form}} to {high:{form}}"
    return f"{low:{form}} to ?" if math.isfinite(low) and low > 0 else "-"


def gain(times: float, low: float, high: float) -> str:
    """1.02 x (0.95 to 1.08), unsure: whose interval includes 1."""
    if not math.isfinite(high):
        return f"{times:.2f} x"
    return f"{times:.2f} x ({ends(low, high, '.2f')})" + (f", {UNSURE}" if low <= 1 <= high else "")


def interval(low: float, high: float) -> str:
    """81.6 to 82.4 ms; both units where they differ; - of what has none."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return "-"
    (a, unit), (b, other) = (seconds(value).split(" ") for value in (low, high))
    return f"{a} to {b} {unit}" if unit == other else f"{a} {unit} to {b} {other}"


def reason(error: Exception) -> str:
    """Why something failed, in a line: a UserError says it, of others the type and the first line they have."""
    said = " ".join(str(error).strip().splitlines()[:1])
    return said if isinstance(error, UserError) and said else ": ".join(filter(None, (type(error).__name__, said)))


def slug(name: str) -> str:
    """A name as a part of a file's."""
    return "_".join(re.findall("[a-z0-9]+", name.lower()))


def tick(written: str) -> str:
    """A round figure at an axis, without zeros that say nothing: 2 s for 2.00 s."""
    number, space, unit = written.partition(" ")
    return (number.rstrip("0").rstrip(".") if "." in number else number) + space + unit


def digits(value: float, figures: int = 3) -> str:
    """So many significant digits, none lost before the point: 0.0123, 1.81, 88.2, 1524."""
    if not math.isfinite(value):
        return "-"
    rounded = float(f"{value:.{figures}g}")
    if rounded == 0:
        return "0"
    after = max(0, figures - 1 - math.floor(math.log10(abs(rounded))))
    return f"{value:.{after}f}"


def scaled(value: float, unit: str) -> str:
    """With a prefix of thousands: 210 GFLOP/s."""
    for size, prefix in PREFIXES:
        if abs(value) >= 0.9995 * size:
            return f"{digits(value / size)} {prefix}{unit}"
    return f"{digits(value)} {unit}".strip()


def figure(name: str, value: float) -> str:
    """A row's value, by the unit that its name ends with; - for none."""
    if not math.isfinite(value):
        return "-"
    if _metric(name):  # four digits would make every CC of an engine 1
        return f"{value:.8f}" if 0.9999 < value < 1 else f"{value:.4f}"
    if "difference" in name:
        return f"{value:.1e}".replace("e-0", "e-") if value else "0"
    if name.startswith("share"):
        return f"{100 * value:.1f} %"
    if name == "gain":
        return f"{value:.2f} x"
    if PER_S.search(name):
        return f"{digits(value)} /s"
    if name.endswith("_s") or name == "seconds" or name.startswith(CPU):
        return seconds(value)
    if name.endswith("_ms"):
        return seconds(value / 1e3)
    if name.endswith("_mb"):
        return f"{digits(value)} MB"
    if name.endswith("bytes"):
        return scaled(value, "B")
    if name == "copy":
        return scaled(value, "B/s")
    if name.endswith("macs"):
        return scaled(value, "MAC")
    if name.startswith("gemm_") or name.endswith(("rate", "flop_s")):
        return scaled(value, "FLOP/s")
    return f"{value:.0f}" if value == int(value) else digits(value)


def heading(name: str) -> str:
    """A value's name without the unit that `figure` gives: peak_mb is peak, clips_per_s is clips."""
    if name == "seconds":
        return "time"
    name = PER_S.sub(r"\1", name.replace(CPU, "cpu_"))
    for unit in ("_mb", "_ms", "_bytes", "_s"):
        name = name.removesuffix(unit)
    return name.replace("_", " ")


def better(name: str, what: str = "") -> int:
    """1 if more of it is better, -1 if less is, 0 if it is neither. what: the row's."""
    if name == IN_PROCESS:
        return 1 if what == "server" else -1
    if _metric(name) or name in HIGHER_IS_BETTER or name.startswith("share_of") or name.endswith("rate"):
        return 1
    if PER_S.search(name):
        return 1
    return -1 if name.endswith((*LOWER_IS_BETTER, "dropped")) or name.startswith(CPU) else 0


def setting(axes: Mapping[str, object]) -> str:
    """batch 1, steps 4."""
    return ", ".join(f"{name} {value}" for name, value in axes.items())


def _metric(name: str) -> bool:
    return name.startswith(METRICS) and "difference" not in name
