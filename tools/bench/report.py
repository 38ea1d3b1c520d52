"""`tools.bench report`: records as tables on the terminal, as one HTML page with plots, and in a text's tables."""

from __future__ import annotations

import argparse
import html
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrain.errors import UserError
from tools.bench import gpu, memory, rival
from tools.bench.benchmarks import BENCHMARKS
from tools.bench.record import RECORDS, device_slug, read_record
from tools.bench.tables import Presentation
from tools.trials.findings import replace_tables
from tools.trials.results import replace_text
from tools.trials.tables import Table

PRESENTATIONS: Mapping[str, Presentation] = {
    name: module.PRESENTATION for name, module in {"memory": memory, "against": rival, **BENCHMARKS, "gpu": gpu}.items()
}
"""By a record's name, in the order of the page."""

Record = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tools.bench report`."""
    parser.add_argument(
        "records", type=Path, nargs="*", help="records, of `gpu` too (default: all in tools/bench/records)"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="page to write")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="markdown file to write, of tables alone")
    parser.add_argument(
        "--results",
        type=Path,
        metavar="FILE",
        help="markdown file whose tables to replace (<!-- table: NAME-DEVICE -->), such as tools/bench/RESULTS.md",
    )


def run(arguments: argparse.Namespace) -> None:
    """Prints the tables and writes what was asked for. Raises UserError, before it writes, for input that is wrong."""
    paths = arguments.records or sorted(RECORDS.glob("*.json"))
    records = [read_record(path) for path in paths]
    for path, record in zip(paths, records, strict=True):
        if record["name"] not in PRESENTATIONS:
            raise UserError(f"{path}: name is {record['name']!r}; it must be one of {', '.join(PRESENTATIONS)}")
    replaced = None if arguments.results is None else new_results(arguments.results, records)
    print(markdown_tables(records))
    write_report(records, html=arguments.html, markdown=arguments.markdown)
    if replaced is not None:
        replace_text(arguments.results, replaced)
    for what, path in (("page", arguments.html), ("tables", arguments.markdown), ("results", arguments.results)):
        if path is not None:
            print(f"{what}: {path}", file=sys.stderr)


def write_report(records: Sequence[Record], *, html: Path | None, markdown: Path | None) -> None:
    """Writes the page and the tables of records, where a file is named."""
    if html is not None:
        from tools.bench.page import html_page  # loads matplotlib

        replace_text(html, html_page(sections(records)))
    if markdown is not None:
        replace_text(markdown, markdown_tables(records) + "\n")


def sections(records: Sequence[Record]) -> dict[str, Record]:
    """Every record with results under `NAME-DEVICE`, in the order of the page, those inside of `gpu` records too."""
    flat = []
    for record in records:
        flat += [record, *(gpu.records_of(record) if record["name"] == "gpu" else [])]
    order = list(PRESENTATIONS)
    named: dict[str, Record] = {}
    for record in sorted(flat, key=lambda record: order.index(record["name"])):
        key = base = f"{record['name']}-{device_slug(record)}"
        number = 1
        while key in named:
            number += 1
            key = f"{base}-{number}"
        if record["results"]:
            named[key] = record
    return named


def table_of(record: Record) -> Table:
    """A record's results as text cells."""
    return PRESENTATIONS[record["name"]].table(record["results"])


def device_text(record: Record) -> str:
    """What a record was measured on, in words."""
    hardware, settings = record["hardware"], record["settings"]
    if settings.get("device") == "cuda":
        return str(hardware.get("gpu", "a GPU"))
    threads = f", {settings['threads']} threads" if "threads" in settings else ""
    return f"{hardware.get('processor', 'a CPU')}, {hardware['cores']} cores{threads}"


def origin_text(record: Record) -> str:
    """One line on how a record was made."""
    commit = record["commit"] or "unknown commit"
    changed = " with uncommitted changes" if record["uncommitted_changes"] else ""
    torch = record["versions"].get("torch", "?")
    return f"{device_text(record)}; torch {torch}; {record['date']}; {commit[:12]}{changed}"


def markdown_tables(records: Sequence[Record]) -> str:
    """All tables as markdown, each under its heading."""
    return "\n\n".join(
        f"## {PRESENTATIONS[record['name']].title}\n\n{markdown_table(record)}" for record in sections(records).values()
    )


def markdown_table(record: Record) -> str:
    """A record's table as markdown, with a line on how it was made."""
    return f"{table_of(record).markdown()}\n\nMeasured on {origin_text(record)}, by `{html.escape(record['command'])}`."


def new_results(path: Path, records: Sequence[Record]) -> str:
    """The text of a markdown file with its tables made from the records. Raises UserError for one that cannot be read,
    and for markers that do not pair or name no record.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--results {path}: cannot be read: {error}") from error
    return replace_tables(text, {key: markdown_table(record) for key, record in sections(records).items()}, str(path))
