"""The suites: each takes a `sides.Context`, a `timing.Rule` and the results that it fills."""

from __future__ import annotations

from collections.abc import Callable

from bench.results import Results
from bench.sides import Context
from bench.suites import batch, engines, growth, parity, server, steps, transport, waterfall
from bench.timing import Rule

SUITES: dict[str, Callable[[Context, Rule, Results], None]] = {
    "engines": engines.measure,
    "steps": steps.measure,
    "batch": batch.measure,
    "server": server.measure,
    "transport": transport.measure,
    "parity": parity.measure,
    "waterfall": waterfall.measure,
    "growth": growth.measure,
}
