"""`python -m tools.bench NAME [options]`: measures, prints a table, writes a record."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tools.bench import long, memory
from tools.bench.record import RECORDS, make_record, write_record

BENCHMARKS = {"long": long, "memory": memory}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one benchmark; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="python -m tools.bench", description=__doc__)
    commands = parser.add_subparsers(dest="benchmark", required=True)
    for name, module in BENCHMARKS.items():
        command = commands.add_parser(name, help=(module.__doc__ or "").splitlines()[0])
        module.add_arguments(command)
        command.add_argument("--record", type=Path, help=f"JSON file to write (default: {name}.json beside the others)")
    arguments = parser.parse_args(argv)
    settings, results = BENCHMARKS[arguments.benchmark].run(arguments)
    record = make_record(arguments.benchmark, argv, settings, results)
    write_record(record, arguments.record or RECORDS / f"{arguments.benchmark}.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
