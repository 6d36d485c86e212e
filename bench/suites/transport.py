"""What a clip's way to a Triton server and the way of its map back take, over each protocol: the server's model has the
chain's tensors and computes nothing. On a GPU, whose engines take milliseconds, that is much of a request, and its CPU
time is what several clients have to share."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator

from google.protobuf import text_format

from bench import timing
from bench.load import interleaved, kept_up
from bench.results import Results, Row
from bench.serving import addresses, client, cpu_s
from bench.sides import Context, batches, call
from bench.timing import Rule
from mubic_deploy import graphs
from mubic_deploy.triton import parameters
from mubic_deploy.triton.repository import CONFIG_FILE, python_model
from mubic_deploy.triton.server import TritonServer

BATCHES = (1, 8)
CLIENTS = 4  # that ask again as soon as they are answered
ROUNDS, SECONDS = 6, 0.5  # and seconds of each: hundreds of answers
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
        _load(context, server, rule, results)


def _load(context: Context, server: TritonServer, rule: Rule, results: Results) -> None:
    """Clips a second, and the CPU time that each takes."""
    runs = {
        protocol: functools.partial(
            kept_up, functools.partial(client, where, protocol), functools.partial(call, context), CLIENTS
        )
        for protocol, where in addresses(server).items()
    }
    rounds, seconds = (1, rule.seconds) if rule.quick else (ROUNDS, SECONDS)
    used = functools.partial(cpu_s, server)
    for protocol, load in interleaved(runs, rounds * seconds, rounds, context.count, used=used).items():
        values = {"clips_per_s": load.clips_per_s, **{f"cpu_s_{who}": s for who, s in load.cpu_s.items()}}
        axes: dict[str, int | str] = {"protocol": protocol, "concurrency": CLIENTS}
        results.rows.append(Row("server", "our clients", axes, load.timing, values))


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
