"""`python -m tools.bench NAME [options]`: measures, prints a table, writes a record; `report` shows records."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tools.bench import gpu, report
from tools.bench.benchmark import Benchmark
from tools.bench.benchmarks import BENCHMARKS
from tools.bench.cases import FAILED, Row
from tools.bench.record import RECORDS, device_slug, make_record, write_record
from tools.bench.report import PRESENTATIONS
from tools.bench.tables import terminal
from tools.command import positive_number, run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 1 where a measurement failed, 2 for wrong input."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="python -m tools.bench", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="name", required=True, metavar="COMMAND")
    for name, module in {**BENCHMARKS, "gpu": gpu, "report": report}.items():
        help_text = (module.__doc__ or "").splitlines()[0]
        command = commands.add_parser(name, help=help_text, description=help_text, allow_abbrev=False)
        module.add_arguments(command)
        if name in BENCHMARKS:
            _add_record_arguments(command)
    arguments = parser.parse_args(argv)
    status = [0]

    def execute() -> None:
        if arguments.name == "report":
            report.run(arguments)
        elif arguments.name == "gpu":
            status[0] = gpu.run(arguments, argv)
        else:
            status[0] = measure(BENCHMARKS[arguments.name].prepare(arguments), arguments, argv)

    return run_command(execute) or status[0]


def _add_record_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--minutes",
        type=positive_number,
        help="begin nothing after so many minutes, and cut off what runs then; what is left out is noted",
    )
    parser.add_argument(
        "--record", type=Path, help="JSON file to write (default: NAME-DEVICE.json in tools/bench/records)"
    )
    parser.add_argument("--commit", help="commit to note where this is no git checkout")


def measure(benchmark: Benchmark, arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    """Measures, writes the record after every row, prints the table; 1 if a measurement failed."""
    deadline = None if arguments.minutes is None else time.monotonic() + 60 * arguments.minutes
    record = make_record(benchmark.name, argv, benchmark.settings, [], commit=arguments.commit)
    path = arguments.record or RECORDS / f"{benchmark.name}-{device_slug(record)}.json"
    rows: list[Row] = []
    for row in benchmark.rows(deadline):
        rows.append(row)
        record["results"] = benchmark.results(rows)
        write_record(record, path)
    print(terminal(PRESENTATIONS[benchmark.name].table(record["results"])))
    failures = [row for row in record["results"] if row.get("outcome") == FAILED]
    for row in failures:
        case = ", ".join(f"{name} {value}" for name, value in row.items() if name not in ("outcome", "why"))
        print(f"\nfailed: {case}\n{row['why']}", file=sys.stderr)
    print(f"record: {path}", file=sys.stderr)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
