"""What a clip's way to a Triton server and the way of its map back take, over each protocol: the server's model has the
chain's tensors and computes nothing. On a GPU, whose engines take milliseconds, that is much of a request."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator

from google.protobuf import text_format

from bench import timing
from bench.results import Results
from bench.serving import addresses, client
from bench.sides import Context, batches
from bench.timing import Rule
from mubic_deploy import graphs
from mubic_deploy.triton import parameters
from mubic_deploy.triton.repository import CONFIG_FILE, python_model
from mubic_deploy.triton.server import TritonServer

BATCHES = (1, 8)
ANSWERS = '''
"""Triton's Python backend: black maps."""

import numpy as np

from mubic_deploy import graphs
from mubic_deploy.triton import parameters
from mubic_deploy.triton.graph_model import GraphModel


class TritonPythonModel(GraphModel):
    def initialize(self, args):
        values = parameters.from_model_config(args["model_config"])
        config = parameters.config_from_string(values[parameters.CONFIG])

        def answer(arrays):
            return {"SALIENCY": np.zeros((len(arrays["VIDEO"]), *config.map_size), np.float32),
                    "STEPS_USED": arrays["STEPS"]}

        answer.signature = graphs.pipeline(config)
        self.engine = answer
'''


def measure(context: Context, rule: Rule, results: Results) -> None:
    with _answering(context) as server, contextlib.ExitStack() as stack:
        clients = {
            protocol: stack.enter_context(contextlib.closing(client(where, protocol)))
            for protocol, where in addresses(server).items()
        }
        for batch in BATCHES:
            sides = {protocol: batches(context, each, batch) for protocol, each in clients.items()}
            timings = timing.measure(sides, rule, progress=context.count, in_step=True)
            results.add("transport", timings, batch=batch)


@contextlib.contextmanager
def _answering(context: Context) -> Iterator[TritonServer]:
    model = python_model(graphs.pipeline(context.config), max(BATCHES), context.config)
    model.parameters[parameters.SOURCE].string_value = json.dumps({})
    folder = context.folder / "repository" / model.name
    (folder / "1").mkdir(parents=True)
    (folder / CONFIG_FILE).write_text(text_format.MessageToString(model))
    (folder / "1" / "model.py").write_text(ANSWERS)
    with TritonServer(folder.parent, http_port=0, grpc_port=0, metrics_port=0) as server:
        yield server
