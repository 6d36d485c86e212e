"""python -m bench: run, compare, report, tune."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from bench import compare, report, run, tune
from bench.suites import SUITES
from mubic_deploy.arguments import Parser
from mubic_deploy.cli import guarded


def build_parser() -> Parser:
    parser = Parser(prog="python -m bench", description="Latency, throughput and parity of the engines.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    run.add_arguments(commands.add_parser("run", help="measure a suite"), list(SUITES))
    compare.add_arguments(commands.add_parser("compare", help="which differences between two runs are real"))
    report.add_arguments(commands.add_parser("report", help="a page and pictures of a folder of results"))
    tune.add_arguments(commands.add_parser("tune", help="find the server's settings for a latency target"))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """As `mubic_deploy.cli.main`: 0 only on success, 2 with one line for wrong input, 130 after Ctrl-C."""

    def work() -> int:
        arguments = build_parser().parse_args(argv)
        does = {"run": run.run, "compare": compare.run, "report": report.run, "tune": tune.run}
        return does[arguments.command](arguments)

    return guarded(work)


if __name__ == "__main__":
    sys.exit(main())
