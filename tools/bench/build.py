"""`tools.bench build`: tokens a second of building shards from text, by the number of encoding processes."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pretrain.errors import UserError
from tools.bench.benchmark import Benchmark
from tools.bench.cases import Row, run_cases
from tools.bench.tables import Column, Presentation, digits, times, whole
from tools.command import positive_int, positive_number
from tools.documents import DocumentReader, location
from tools.shards.build import build

PRESENTATION = Presentation(
    title="Building shards",
    case=(
        Column("processes", "workers", whole),
        Column("MB of text", "megabytes", digits),
    ),
    found=(
        Column("tokens/s", "tokens_per_second", whole),
        Column("MB/s", "megabytes_per_second", digits),
        Column("seconds", "seconds", digits),
        Column("over one process", "speed_over_one", times),
    ),
    note="From a .jsonl file to shards on the disk, hashes included; the start of the processes counts. The fastest of "
    "the rounds, which take the numbers of processes in turn. One process encodes in itself, with one thread; else one "
    "more reads and writes.",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tools.bench build`."""
    parser.add_argument(
        "--input",
        nargs="+",
        type=location,
        required=True,
        metavar="PATH",
        help="texts, as for tools.shards build; repeated, or cut, to --megabytes",
    )
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="FILE.model", help="a SentencePiece model")
    parser.add_argument("--megabytes", type=positive_number, default=100.0, help="10^6 bytes of text to build from")
    parser.add_argument(
        "--workers",
        type=positive_int,
        nargs="+",
        default=sorted({1, len(os.sched_getaffinity(0))}),
        help="numbers of processes that encode (default: 1, and one for each core)",
    )
    parser.add_argument("--rounds", type=positive_int, default=2, help="how often each is measured")


def prepare(arguments: argparse.Namespace) -> Benchmark:
    """The benchmark that the options describe. Raises UserError for input that cannot be read."""
    reader = DocumentReader(arguments.input)
    if not arguments.tokenizer.is_file():
        raise UserError(f"--tokenizer {arguments.tokenizer}: no such file")
    settings = {"device": "cpu", "tokenizer": str(arguments.tokenizer), "rounds": arguments.rounds}
    shape = {"megabytes": arguments.megabytes}

    def rows(deadline: float | None) -> Iterator[Row]:
        with tempfile.TemporaryDirectory(prefix="mnemosyne-bench-build-") as folder:
            text = Path(folder) / "text.jsonl"
            write_text(reader, text, int(arguments.megabytes * 1e6))
            cases = [{"workers": workers, **shape} for _ in range(arguments.rounds) for workers in arguments.workers]
            fixed = {"device": "cpu", "tokenizer": str(arguments.tokenizer.resolve()), "text": str(text)}
            yield from run_cases("tools.bench.build:measure", cases, fixed, deadline=deadline)

    return Benchmark("build", {**settings, **shape}, rows, fastest_beside_one)


def write_text(reader: DocumentReader, path: Path, size: int) -> None:
    """Writes so many bytes of text as records of jsonl, from the beginning again where the documents end."""
    left = size
    with open(path, "w", encoding="utf-8") as file:
        while left > 0:
            before = left
            for document in reader:
                data = document.text.encode()[:left]
                file.write(json.dumps({"text": data.decode(errors="ignore")}) + "\n")
                left -= len(data)
                if left <= 0:
                    return
            if left == before:
                raise UserError(f"{', '.join(map(str, reader.inputs))}: no document with text")


def measure(*, workers: int, megabytes: float, text: str, tokenizer: str, device: str) -> dict[str, Any]:
    """Builds once; seconds from the opened files to the finished set, and rates."""
    with tempfile.TemporaryDirectory(dir=Path(text).parent) as folder:
        start = time.perf_counter()
        built = build(
            DocumentReader([Path(text)]),
            Path(tokenizer),
            Path(folder) / "out",
            validation_fraction=0.0,
            workers=workers,
        )
        seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "tokens_per_second": built.tokens / seconds,
        "megabytes_per_second": built.manifests["train"].text_bytes / 1e6 / seconds,
    }


def fastest_beside_one(rows: Sequence[Row]) -> list[Row]:
    """The fastest round of each number of processes, with its speed over that of one process; what failed as it is."""
    best: dict[int, Row] = {}
    failed = [row for row in rows if "outcome" in row]
    for row in rows:
        known = best.get(row["workers"])
        if "outcome" not in row and (known is None or row["seconds"] < known["seconds"]):
            best[row["workers"]] = row
    one = best.get(1)
    return [
        row if one is None else {**row, "speed_over_one": one["seconds"] / row["seconds"]} for row in best.values()
    ] + failed
