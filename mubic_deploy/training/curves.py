"""Loss, learning rate and validation metrics of each epoch as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mubic_deploy.folders import replacing_file

PANELS = (("loss", "training loss"), ("learning_rate", "learning rate"), ("cc", "CC"), ("sim", "SIM"), ("nss", "NSS"))


def draw(history: list[dict[str, Any]] | dict[str, list[dict[str, Any]]], path: Path) -> None:
    """A PNG with a panel a quantity. history: entries as in history.json, or several runs' by name.

    Whole or not at all. OSError if it cannot be written."""
    from matplotlib.figure import Figure

    runs = history if isinstance(history, dict) else {"": history}
    figure = Figure(figsize=(3.2 * len(PANELS), 3.2), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        for marker, (name, entries) in zip("os^vDx*" * len(runs), runs.items(), strict=False):
            axes.plot([e["epoch"] for e in entries], [e[key] for e in entries], marker=marker, ms=4, label=name)
        axes.set_title(title)
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        if key == "learning_rate":
            axes.set_yscale("log")
    if len(runs) > 1:
        figure.axes[0].legend(fontsize="small")
    with replacing_file(path) as part:
        figure.savefig(part, dpi=110, format="png")
