"""`tools.bench gpu`: everything that a GPU lets one prove, within a budget of minutes: checks, tests and benchmarks."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pretrain.errors import UserError
from tools.bench.cases import FAILED, NOT_RUN, REPOSITORY, Row, last_lines
from tools.bench.parts import PARTS, Part
from tools.bench.record import RIVAL, make_record, read_record, write_record
from tools.bench.tables import Column, Presentation, digits, terminal
from tools.command import positive_number

RESERVE_SECONDS = 8.0
"""Kept back from the budget for the record and the page."""
LEAST_SECONDS = 5.0
"""A part with less time than this is not started."""
GRACE = 0.9
"""Share of its time after which a part begins no more measurements; it is killed at the whole."""
RECORD_FILE, LOG_FILE, PAGE_FILE, TABLES_FILE = "gpu.json", "gpu.log", "gpu.html", "gpu.md"
RUNNING_FILE = "running.json"
"""Record of the part that is running."""
OK, TIMED_OUT, CUT_SHORT = "ok", "timed out", "ok, cut short"


def _with_last_line(results: Sequence[Row]) -> list[Row]:
    return [{**row, "last_line": row["last_lines"].splitlines()[-1] if row["last_lines"] else ""} for row in results]


PRESENTATION = Presentation(
    title="Everything that a GPU lets one prove",
    case=(Column("part", "part"),),
    found=(
        Column("outcome", "status"),
        Column("seconds", "seconds", digits),
        Column("limit s", "limit_seconds", digits),
        Column("last line", "last_line"),
    ),
    note="Each part ran in a process of its own. Cut short: its share of the minutes was used up before it had "
    "measured everything.",
    prepare=_with_last_line,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tools.bench gpu`."""
    parser.add_argument("--minutes", type=positive_number, default=9.0, help="budget for everything (default: 9)")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/gpu"), help="folder of the results (default: runs/gpu)"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: Triton runs in its interpreter")
    parser.add_argument("--small", action="store_true", help="toy sizes, to try the command out; a CPU takes no others")
    parser.add_argument(
        "--parts", nargs="+", choices=[part.name for part in PARTS], help="only these (default: all)", metavar="PART"
    )
    parser.add_argument("--dry-run", action="store_true", help="list what would be run, and for how long at most")
    parser.add_argument("--commit", help="commit to note where this is no git checkout")


def run(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    """Runs the parts and writes the folder; 1 if a part failed. Raises UserError where there is no GPU to run on."""
    parts = [part for part in PARTS if arguments.parts is None or part.name in arguments.parts]
    if arguments.dry_run:
        print(plan_text(parts, arguments))
        return 0
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("torch sees no GPU here; give --dry-run for a list, or --device cpu --small to try it out")
    if arguments.device == "cpu" and not arguments.small:
        raise UserError("--device cpu: a CPU takes no full sizes; give --small as well")
    results = run_parts(parts, arguments, argv)
    from tools.bench.report import write_report  # draws: not needed before

    record = make_record("gpu", argv, _settings(arguments), results, commit=arguments.commit)
    write_report([record], html=arguments.output / PAGE_FILE, markdown=arguments.output / TABLES_FILE)
    print(terminal(PRESENTATION.table(results)))
    for row in results:
        if row["status"] in (FAILED, TIMED_OUT):
            print(f"\n{row['part']}: {row['status']}\n{row['last_lines']}", file=sys.stderr)
    print(f"results: {arguments.output}", file=sys.stderr)
    return int(any(row["status"] in (FAILED, TIMED_OUT) for row in results))


def plan_text(parts: Sequence[Part], arguments: argparse.Namespace) -> str:
    """What would be run: name, purpose, share of the budget and command of every part."""
    lines, shares = [], shares_of(parts, arguments.minutes * 60 - RESERVE_SECONDS)
    for part, seconds in zip(parts, shares, strict=True):
        why = missing(part)
        limit = f"at most {seconds / 60:.1f} min" if why is None else f"not run: {why}"
        command = part.command(device=arguments.device, small=arguments.small)
        lines += [f"{part.name}: {part.purpose} ({limit})", f"  python {shlex.join(command[1:])}"]
    lines.append(
        f"together at most the budget of {arguments.minutes:g} min; what one leaves over goes to the later ones"
    )
    return "\n".join(lines)


def shares_of(parts: Sequence[Part], seconds: float) -> list[float]:
    """Each part's share of the time that is left, in proportion; none for one that cannot run."""
    weights = [0.0 if missing(part) else part.share for part in parts]
    total = sum(weights) or 1.0
    return [max(seconds, 0.0) * weight / total for weight in weights]


def missing(part: Part) -> str | None:
    """Why a part cannot run here; None if it can."""
    if part.name == "against" and importlib.util.find_spec("titans_pytorch") is None:
        return f"{RIVAL} is not installed"
    if part.name == "tests" and not (REPOSITORY / "tests").is_dir():
        return "the tests are not here"
    return None


def run_parts(parts: Sequence[Part], arguments: argparse.Namespace, argv: Sequence[str]) -> list[Row]:
    """Runs part after part, and writes the record after each; what earlier parts left over goes to the later ones."""
    end = time.monotonic() + arguments.minutes * 60 - RESERVE_SECONDS
    results: list[Row] = []
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / LOG_FILE).write_bytes(b"")
    for index, part in enumerate(parts):
        limit = shares_of(parts[index:], end - time.monotonic())[0]
        print(f"{part.name} ...", file=sys.stderr, flush=True)
        results.append(run_part(part, limit, arguments))
        record = make_record("gpu", argv, _settings(arguments), results, commit=arguments.commit)
        write_record(record, arguments.output / RECORD_FILE)
        print(f"{part.name}: {results[-1]['status']}, {results[-1]['seconds']:.0f} s", file=sys.stderr, flush=True)
    return results


def run_part(part: Part, limit: float, arguments: argparse.Namespace) -> Row:
    """One part's outcome: status, seconds, the last lines of its output, and its record with all that it measured."""
    row: Row = {"part": part.name, "purpose": part.purpose, "limit_seconds": limit, "seconds": 0.0}
    why = missing(part) or ("the minutes were used up" if limit < LEAST_SECONDS else None)
    if why is not None:
        return {**row, "status": NOT_RUN, "last_lines": why, "record": None}
    command = part.command(device=arguments.device, small=arguments.small)
    # In the folder, so that an interruption leaves what the part had measured.
    record_file = arguments.output.resolve() / RUNNING_FILE
    record_file.unlink(missing_ok=True)
    if part.has_record:
        command += ["--minutes", f"{GRACE * limit / 60:.3f}", "--record", str(record_file)]
        command += ["--commit", arguments.commit] if arguments.commit else []
    start = time.monotonic()
    code, output = _run(command, limit, arguments)
    row["seconds"] = time.monotonic() - start
    record = read_record(record_file) if record_file.exists() else None
    record_file.unlink(missing_ok=True)
    cut = record is not None and any(r.get("outcome") == NOT_RUN for r in record["results"])
    status = TIMED_OUT if code is None else FAILED if code else CUT_SHORT if cut else OK
    shown_command = shlex.join(["python", *command[1:]])
    return {**row, "status": status, "command": shown_command, "last_lines": last_lines(output), "record": record}


def _run(command: Sequence[str], limit: float, arguments: argparse.Namespace) -> tuple[int | None, str]:
    """Exit code and output of a command, which is killed with all its children at its limit: then the code is None."""
    interpreter = {"TRITON_INTERPRET": "1"} if arguments.device == "cpu" else {}
    log = arguments.output / LOG_FILE
    with log.open("ab") as file:
        file.write(f"\n$ {shlex.join(['python', *command[1:]])}\n".encode())
        file.flush()
        start = file.tell()
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **interpreter},
            start_new_session=True,
        )
        code: int | None = None
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            print(f"killed after {limit:.0f} s", file=sys.stderr)
        finally:  # its workers too, and after an interruption as well
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    with log.open("rb") as file:
        file.seek(start)
        return code, file.read().decode(errors="replace")


def records_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The records of the parts that made one."""
    return [row["record"] for row in record["results"] if row["record"] is not None]


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    return {"device": arguments.device, "small": arguments.small, "minutes": arguments.minutes}
