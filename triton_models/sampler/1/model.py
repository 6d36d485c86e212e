"""Triton's Python backend: the graph `sampler` in an engine on the CPU."""

from mubic_deploy.triton.graph_model import GraphModel


class TritonPythonModel(GraphModel):
    """Everything is in `GraphModel`; config.pbtxt says which graph it runs."""
