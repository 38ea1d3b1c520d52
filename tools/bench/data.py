"""`tools.bench data`: tokens a second read into rows, beside stock webdataset on the same tars; seconds to resume."""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset

from pretrain.data import Cursor, Division, ShardsConfig, ShardSet
from pretrain.data.format import EOS_SEPARATOR, INDEX_DTYPE, TOKENS_SUFFIX, ShardEntry, SplitEntry
from pretrain.devices import peak_memory_bytes
from tools.bench.benchmark import Benchmark
from tools.bench.cases import Row, run_cases
from tools.bench.tables import Column, Presentation, megabytes, milliseconds, times, whole
from tools.command import positive_int
from tools.documents import DocumentReader
from tools.encoding import Tokenizer
from tools.shards.writer import SetWriter, write_beside
from tools.tokenizer import train

ROWS, RESUME = "rows", "resume"
VOCABULARY = 400
STEP_TOKENS = 1 << 18
SPLIT = SplitEntry(part="train", validation_fraction=0.0)

PRESENTATION = Presentation(
    title="Reading shards",
    case=(
        Column("what", "what"),
        Column("tokens a row", "sequence_length", whole),
        Column("tokens a document", "document_tokens", whole),
        Column("documents", "documents", whole),
        Column("packing", "packing"),
        Column("order", "order"),
    ),
    found=(
        Column("tokens/s", "tokens_per_second", whole),
        Column("webdataset tokens/s", "webdataset_tokens_per_second", whole),
        Column("over webdataset", "speed_over_webdataset", times),
        Column("ms to open", "open_s", milliseconds),
        Column("ms to the first step", "first_step_s", milliseconds),
        Column("MB at the most", "peak_bytes", megabytes),
    ),
    note="One process and one thread, from the page cache. Rows: the loader's steps of int64 inputs and targets, "
    "beside stock webdataset reading the same tars in stored order as arrays of 2-byte tokens, no shuffle, no packing; "
    "the two took turns in one process, and the fastest turn of each counts. Resume: a process opens an index (whose "
    "sha256 is checked) and goes to a position; MB are all of that process.",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tools.bench data`."""
    parser.add_argument(
        "--lengths", type=positive_int, nargs="+", default=[4096, 2097152], metavar="TOKENS", help="tokens of a row"
    )
    parser.add_argument(
        "--document-tokens",
        type=positive_int,
        nargs="+",
        default=[1000, 300, 10_000],
        metavar="TOKENS",
        help="mean tokens of a document; lengths are log-normal (default: 1000 300 10000)",
    )
    parser.add_argument("--packing", nargs="+", choices=("stream", "best_fit"), default=["stream"], help="of rows")
    parser.add_argument("--tokens", type=positive_int, default=1 << 25, help="tokens of the shards")
    parser.add_argument("--rounds", type=positive_int, default=3, help="turns of each")
    parser.add_argument(
        "--resume-documents",
        type=positive_int,
        nargs="*",
        default=[10_000_000],
        metavar="DOCUMENTS",
        help="documents of indexes to resume with (default: 10000000; none: no resume)",
    )
    parser.add_argument("--resume-position", type=positive_int, default=10**9, help="rows that were read before")


def prepare(arguments: argparse.Namespace) -> Benchmark:
    """The benchmark that the options describe."""
    order = {"order": "rows"}
    cases = [
        {"what": ROWS, "sequence_length": length, "document_tokens": mean, "packing": packing, **order}
        for packing in arguments.packing
        for mean in arguments.document_tokens
        for length in arguments.lengths
    ]
    cases += [
        {"what": RESUME, "sequence_length": 4096, "documents": documents, "packing": "stream", **order}
        for documents in arguments.resume_documents
    ]
    settings = {"device": "cpu", "tokens": arguments.tokens, "rounds": arguments.rounds}
    settings["position"] = arguments.resume_position

    def rows(deadline: float | None) -> Iterator[Row]:
        return run_cases("tools.bench.data:measure", cases, settings, deadline=deadline)

    return Benchmark("data", settings, rows)


def measure(
    *,
    what: str,
    sequence_length: int,
    packing: str,
    order: str,
    tokens: int,
    rounds: int,
    position: int,
    device: str,
    document_tokens: int = 0,
    documents: int = 0,
) -> dict[str, Any]:
    """One case, on shards made for it in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="mnemosyne-bench-data-") as folder:
        tokenizer = _tokenizer(Path(folder))
        options = {"packing": packing, "order": order}
        if what == RESUME:
            # In a process of its own, whose memory does not count.
            writer = multiprocessing.get_context("fork").Process(
                target=_write_index, args=(Path(folder) / "set", tokenizer.path, documents)
            )
            writer.start()
            writer.join()
            if writer.exitcode:
                raise RuntimeError(f"the index was not written: exit code {writer.exitcode}")
            return _resume(Path(folder) / "set", sequence_length, position, options)
        _write_shards(Path(folder) / "set", tokenizer, document_tokens, tokens)
        return _beside_webdataset(Path(folder) / "set", sequence_length, rounds, options)


def _beside_webdataset(folder: Path, length: int, rounds: int, options: dict[str, str]) -> dict[str, Any]:
    tars = [str(path) for path in sorted(folder.glob("*.tar"))]
    ours, stock = [], []
    with _loader(folder, length, options) as (loader, step_tokens, epoch_tokens):
        for _ in range(rounds):
            stock.append(_rate(lambda: sum(len(part) for part in _stock_documents(tars))))
            steps = max(1, epoch_tokens // step_tokens)
            ours.append(_rate(lambda steps=steps: sum(x.tokens.numel() for _ in range(steps) for x in next(loader))))
    return {
        "documents": ShardSet.open(folder).documents,
        "tokens_per_second": max(ours),
        "webdataset_tokens_per_second": max(stock),
        "speed_over_webdataset": max(ours) / max(stock),
        "turns_tokens_per_second": ours,
        "turns_webdataset_tokens_per_second": stock,
    }


@contextmanager
def _loader(folder: Path, length: int, options: dict[str, str]) -> Iterator[tuple[Any, int, int]]:
    """A loader without workers, the tokens of its steps, and of an epoch."""
    rows = max(1, STEP_TOKENS // length)
    source = ShardsConfig(train=folder, num_workers=0, verify="sizes", **options).open(0, grid=1).train
    with source.open_loader(Division(length, rows, 1, 0, 1), None) as loader:
        yield loader, rows * length, source.shards.tokens


def _rate(read: Callable[[], int]) -> float:
    start = time.perf_counter()
    count = read()
    return count / (time.perf_counter() - start)


def _stock_documents(tars: Sequence[str]) -> Iterator[np.ndarray]:
    suffix = TOKENS_SUFFIX.removeprefix(".")
    for sample in webdataset.WebDataset(list(tars), shardshuffle=False):
        yield np.frombuffer(sample[suffix], np.uint16)


def _resume(folder: Path, length: int, position: int, options: dict[str, str]) -> dict[str, Any]:
    division = Division(length, 1, 1, 0, 1)
    start = time.perf_counter()
    source = ShardsConfig(train=folder, num_workers=0, verify="sizes", **options).open(0, grid=1).train
    opened = time.perf_counter()
    order = {"order": options["order"], "packing": options["packing"]}
    fingerprint = source.shards.fingerprint
    cursor = Cursor(position=position, sequence_length=length, seed=0, fingerprint=fingerprint, **order)
    with source.open_loader(division, cursor) as loader:
        next(loader)
    done = time.perf_counter()
    return {
        "open_s": opened - start,
        "first_step_s": done - opened,
        "peak_bytes": peak_memory_bytes(torch.device("cpu")),
    }


def _tokenizer(folder: Path) -> Tokenizer:
    text = folder / "tokenizer.txt"
    text.write_text("\n".join(path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.py"))))
    model = folder / "tokenizer.model"
    model.write_bytes(train(DocumentReader([text]), VOCABULARY))
    return Tokenizer.open(model)


def _lengths(mean: int, count: int) -> np.ndarray:
    """Log-normal, as those of web text are: most documents are shorter than the mean."""
    drawn = np.random.default_rng(0).lognormal(np.log(mean) - 0.5, 1.0, count)
    return np.clip(drawn, 2, 100 * mean).astype(np.int64)


def _write_shards(folder: Path, tokenizer: Tokenizer, mean: int, tokens: int) -> None:
    lengths = _lengths(mean, max(1, 2 * tokens // mean))
    lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), tokens)) + 1]
    drawn = np.random.default_rng(1).integers(3, VOCABULARY, int(lengths.max()), dtype=np.uint16)
    writer = SetWriter(folder, tokenizer, "uint16", shard_tokens=1 << 23)
    for length in lengths.tolist():
        drawn[length - 1], kept = tokenizer.eos_id, drawn[length - 1]
        data = drawn[:length].tobytes()
        drawn[length - 1] = kept
        writer.add(data, length, hashlib.sha256(data).digest())
    writer.finish(SPLIT)


def _write_index(folder: Path, tokenizer: Path, documents: int) -> None:
    """A set of so many documents whose tars are holes: what is read of them is zeros."""
    folder.mkdir()
    per_shard = 100_000
    index = np.zeros(documents, INDEX_DTYPE)
    index["tokens"] = _lengths(500, documents)
    index["shard"] = np.arange(documents) // per_shard
    shards = []
    for number in range(-(-documents // per_shard)):
        part = index[number * per_shard : (number + 1) * per_shard]
        sizes = 512 - (-2 * part["tokens"] // 512) * 512  # a header, and the tokens in whole blocks
        part["offset"] = np.cumsum(sizes) - sizes + 512
        name, size = f"shards-{number:06d}.tar", int(sizes.sum()) + 1024
        with open(folder / name, "wb") as file:
            file.truncate(size)
        total = int(part["tokens"].sum())
        shards.append(ShardEntry(name=name, sha256="0" * 64, bytes=size, documents=len(part), tokens=total))
    write_beside(
        folder, Tokenizer.open(tokenizer), index, tuple(shards), dtype="uint16", split=SPLIT, separator=EOS_SEPARATOR
    )
