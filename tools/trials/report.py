"""`python -m tools.trials report`: tables and plots of a suite's results, as a page, as a record, and in a text."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pretrain.errors import UserError
from tools.trials.findings import replace_tables
from tools.trials.page import html_page
from tools.trials.record import Record, gather, read_record, write_record
from tools.trials.results import replace_text
from tools.trials.tables import markdown_report, study_table

PAGE_FILE = "report.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tools.trials report`."""
    parser.add_argument(
        "source",
        type=Path,
        nargs="?",
        default=Path("runs/trials"),
        metavar="RUNS_OR_RECORD",
        help="output folder of `run`, or a record (default: runs/trials)",
    )
    parser.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help=f"page to write (default: {PAGE_FILE} in the folder; none of a record)",
    )
    parser.add_argument("--record", type=Path, metavar="FILE", help="JSON file to write all results to")
    parser.add_argument(
        "--findings", type=Path, metavar="FILE", help="markdown file whose tables to replace (<!-- table: STUDY -->)"
    )


def run(arguments: argparse.Namespace) -> None:
    """Prints the tables and writes what was asked for. Raises UserError, before it writes, for input that is wrong."""
    source: Path = arguments.source
    page: Path | None = arguments.html
    if source.is_dir():
        record, others = gather(source)
        page = page or source / PAGE_FILE
    elif source.is_file():
        record, others = read_record(source), []
    else:
        raise UserError(f"{source}: is neither a folder nor a record; run `python -m tools.trials run` first")
    findings = None if arguments.findings is None else new_findings(arguments.findings, record)
    if page is not None:
        replace_text(page, html_page(record))
    if arguments.record is not None:
        write_record(record, arguments.record)
    if findings is not None:
        replace_text(arguments.findings, findings)
    print(markdown_report(record))
    for what, runs in (("without a result", record.missing()), ("not of this suite, left out", others)):
        if runs:
            print(f"{what}: {', '.join(runs)}", file=sys.stderr)
    for what, path in (("page", page), ("record", arguments.record), ("findings", arguments.findings)):
        if path is not None:
            print(f"{what}: {path}", file=sys.stderr)


def new_findings(path: Path, record: Record) -> str:
    """The text of a markdown file with its tables made from the record. Raises UserError for one that cannot be read,
    and for markers that do not pair or name no study.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--findings {path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--findings {path}: is not UTF-8 text: {error}") from error
    tables = {name: study_table(record.of_study(name)).markdown() for name in record.studies}
    return replace_tables(text, tables, str(path))
