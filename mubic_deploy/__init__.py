"""MUBiC Deploy: audio-visual saliency prediction in production."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mubic_deploy.errors import UserError

if TYPE_CHECKING:
    from mubic_deploy.live.aio import AsyncStreamClient
    from mubic_deploy.live.client import StreamClient
    from mubic_deploy.pipeline import Pipeline
    from mubic_deploy.predict import predict_clips, predict_film

__all__ = ["AsyncStreamClient", "Pipeline", "StreamClient", "UserError", "predict_clips", "predict_film"]

_HOMES = {
    "AsyncStreamClient": "live.aio",
    "Pipeline": "pipeline",
    "StreamClient": "live.client",
    "predict_film": "predict",
    "predict_clips": "predict",
}


def __getattr__(name: str) -> Any:
    """Loads what is used: a model process of Triton needs no PyAV, a client no ONNX Runtime."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
