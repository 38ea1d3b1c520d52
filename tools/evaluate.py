"""`python -m tools.evaluate MODEL --shards FOLDER | --input FILES`: loss, perplexity, bits per byte, by position.

The text is cut into rows of `--context` tokens; in each the memory starts from what training gave it. A row is read in
pieces with the state handed on, so that memory use does not grow with the context.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from model import TitansLM
from pretrain.data import ShardSet, sequential_batches
from pretrain.errors import UserError
from tools.command import Progress, positive_int, run_command, writing
from tools.documents import DocumentReader, add_document_arguments, changed_document_options, reader_from_arguments
from tools.encoding import Tokenizer
from tools.model_directory import LoadedModel, load_model_directory

PIECE = 1024
"""Tokens of a row that are read at a time."""


class EncodedText:
    """Documents encoded in memory, readable like a shard set."""

    def __init__(self, reader: DocumentReader, tokenizer: Tokenizer) -> None:
        encoded = [[*tokenizer.encode(document.text), tokenizer.eos_id] for document in reader]
        if not encoded:
            raise UserError(f"--input {', '.join(map(str, reader.inputs))}: holds no text")
        self.tokenizer = tokenizer
        self.token_bytes = tokenizer.token_bytes().astype(np.int64)
        self.document_tokens = np.array([len(tokens) for tokens in encoded], np.int64)
        self.tokens = int(self.document_tokens.sum())
        self._encoded = [np.array(tokens) for tokens in encoded]

    def read(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens start..stop of a document."""
        return self._encoded[document][start:stop]


@dataclass
class Score:
    """Sums over scored tokens: nats, tokens and text bytes, and nats and tokens by bucket of position."""

    nats: float = 0.0
    tokens: int = 0
    text_bytes: int = 0
    buckets: dict[int, tuple[float, int]] = field(default_factory=dict)

    def add(self, losses: Tensor, targets: Tensor, start: int, token_bytes: Tensor) -> None:
        """Adds the losses [B, T] of targets [B, T] (-100: not scored) that stand at `start` and on in their rows."""
        scored = targets != -100
        losses = losses.double().masked_fill(~scored, 0.0)
        self.nats += float(losses.sum())
        self.tokens += int(scored.sum())
        self.text_bytes += int(token_bytes[targets.clamp(min=0)].masked_fill(~scored, 0).sum())
        positions = torch.arange(start, start + targets.shape[1])
        for bucket in bucket_of(positions).unique().tolist():
            here = bucket_of(positions) == bucket
            nats, tokens = self.buckets.get(bucket, (0.0, 0))
            self.buckets[bucket] = (nats + float(losses[:, here].sum()), tokens + int(scored[:, here].sum()))

    def report(self) -> dict[str, Any]:
        """JSON-ready results; a bucket covers targets at positions first..last of their rows, counted from 0."""
        by_position = [
            {"first": first_of(bucket), "last": first_of(bucket + 1) - 1, "tokens": tokens, "loss": nats / tokens}
            for bucket, (nats, tokens) in sorted(self.buckets.items())
            if tokens
        ]
        loss = self.nats / self.tokens
        return {
            "loss": loss,
            "perplexity": math.exp(loss) if loss < 700 else math.inf,
            "bits_per_byte": self.nats / math.log(2) / self.text_bytes if self.text_bytes else None,
            "tokens": self.tokens,
            "text_bytes": self.text_bytes,
            "by_position": by_position,
        }


def bucket_of(positions: Tensor) -> Tensor:
    """Log-spaced bucket of a position: 0..63, 64..127, 128..255, and so on."""
    return (positions.double() / 32).clamp(min=1).log2().floor().long()


def first_of(bucket: int) -> int:
    """First position of a bucket."""
    return 0 if bucket == 0 else 32 << bucket


@torch.no_grad()
def evaluate(
    model: TitansLM, source: ShardSet | EncodedText, *, context: int, batch_size: int, max_tokens: int | None
) -> Iterator[Score]:
    """Scores the source row by row; yields the running score after each batch."""
    device = next(model.parameters()).device
    token_bytes = torch.from_numpy(np.asarray(source.token_bytes))
    score = Score()
    batches = sequential_batches(source, sequence_length=context, batch_size=batch_size, max_tokens=max_tokens)
    for batch in batches:
        state = None
        for start in range(0, context, PIECE):
            tokens, targets = (x[:, start : start + PIECE] for x in (batch.tokens, batch.targets))
            losses, state = model.token_losses(tokens.to(device), targets.to(device), state)
            score.add(losses.cpu(), targets, start, token_bytes)
        yield score


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    result = argparse.ArgumentParser(prog="python -m tools.evaluate", description=__doc__.splitlines()[0])
    result.add_argument("model", type=Path, help="folder made by `python -m tools.export`")
    result.add_argument("--shards", type=Path, help="shard set made by `python -m tools.shards build`; or give --input")
    add_document_arguments(result, required=False)
    result.add_argument("--context", type=positive_int, help="tokens in a row (default: the training length)")
    result.add_argument("--batch-size", type=positive_int, default=8, help="rows at a time (default 8)")
    result.add_argument("--max-tokens", type=positive_int, help="stop after this many tokens (default: all)")
    result.add_argument("--json", type=Path, help="file to write the results to")
    result.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute (default cpu)")
    result.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the arithmetic")
    return result


def open_source(arguments: argparse.Namespace, loaded: LoadedModel) -> ShardSet | EncodedText:
    """The text to score. Raises UserError for none or two sources, and for shards of another tokenizer."""
    if (arguments.input is None) == (arguments.shards is None):
        raise UserError("give either --shards or --input: what is to be scored")
    if arguments.shards is not None and (unused := changed_document_options(arguments)):
        raise UserError(f"{', '.join(unused)} with --shards: shards are scored as they are; drop it, or give --input")
    if arguments.input is not None:
        return EncodedText(reader_from_arguments(arguments), loaded.tokenizer)
    shards = ShardSet.open(arguments.shards)
    if shards.tokenizer.sha256 != loaded.tokenizer.sha256:
        raise UserError(
            f"{arguments.shards}: was encoded with another tokenizer (sha256 {shards.tokenizer.sha256}) than the "
            f"model's ({loaded.tokenizer.sha256}); build it with --tokenizer {loaded.tokenizer.path}"
        )
    return shards


def print_report(report: dict[str, Any]) -> None:
    """The results as tables."""
    console = Console()
    summary = Table("loss", "perplexity", "bits per byte", "tokens", "text bytes")
    per_byte = report["bits_per_byte"]
    summary.add_row(
        f"{report['loss']:.4f}", f"{report['perplexity']:.3f}", "n/a" if per_byte is None else f"{per_byte:.4f}",
        f"{report['tokens']:,}", f"{report['text_bytes']:,}",
    )  # fmt: skip
    console.print(summary)
    positions = Table("position in the row", "tokens", "loss")
    for row in report["by_position"]:
        positions.add_row(f"{row['first']}..{row['last']}", f"{row['tokens']:,}", f"{row['loss']:.4f}")
    console.print(positions)


def run(arguments: argparse.Namespace) -> None:
    """Evaluates, prints and writes."""
    if arguments.json is not None:
        with writing(arguments.json):  # before the work, not after it
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            open(arguments.json, "a").close()
    loaded = load_model_directory(arguments.model, device=arguments.device, dtype=getattr(torch, arguments.dtype))
    source = open_source(arguments, loaded)
    context = arguments.context or loaded.config.sequence_length
    total = min(source.tokens, arguments.max_tokens or source.tokens)
    progress = Progress(total)
    score = Score()
    for score in evaluate(
        loaded.model, source, context=context, batch_size=arguments.batch_size, max_tokens=arguments.max_tokens
    ):
        progress.update(score.tokens, f"{score.tokens:,} of {total:,} tokens, loss {score.nats / score.tokens:.4f}")
    progress.close()
    report = {"model": str(arguments.model), "context": context, **score.report()}
    print_report(report)
    if arguments.json is not None:
        with writing(arguments.json):
            arguments.json.write_text(json.dumps(report, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    arguments = parser().parse_args(argv)
    return run_command(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
