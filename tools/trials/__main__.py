"""`python -m tools.trials run|report`: trains and probes a suite of small models; its tables and plots."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence

from tools.command import run_command
from tools.trials import report, run

COMMANDS = {"run": run, "report": report}


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="python -m tools.trials", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="name", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        help_text = (module.__doc__ or "").splitlines()[0]
        command = commands.add_parser(name, help=help_text, description=help_text, allow_abbrev=False)
        module.add_arguments(command)
    arguments = parser.parse_args(argv)
    arguments.command = shlex.join(["python", "-m", "tools.trials", *argv])
    status = [0]

    def execute() -> None:
        status[0] = COMMANDS[arguments.name].run(arguments) or 0

    return run_command(execute) or status[0]


if __name__ == "__main__":
    sys.exit(main())
