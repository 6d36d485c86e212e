"""Where `export/` and `triton_models/` are: beside the package in a checkout, inside it when installed as a wheel."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

_PACKAGE = Path(__file__).parent


def source_dir(name: str) -> Path:
    """The folder `name` ("export" or "triton_models") of the sources."""
    for parent in (_PACKAGE / "_sources", _PACKAGE.parent):  # beside a wheel's may lie another package of that name
        if (parent / name).is_dir():
            return parent / name
    raise FileNotFoundError(f"{name}/ is missing beside {_PACKAGE}: install mubic-deploy again")


def load_script(path: Path) -> ModuleType:
    """The script at `path` as a module, without running its `main`."""
    spec = importlib.util.spec_from_file_location(f"mubic_deploy_{path.parent.name}_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Of those that are installed: this package itself is not, in a bare checkout."""
    found = {}
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
