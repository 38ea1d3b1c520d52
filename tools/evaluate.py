"""`python -m tools.evaluate MODEL --shards FOLDER | --input FILES`: loss, perplexity, bits per byte, by position.

The documents are laid end to end and cut into rows of `--context` tokens; in each the memory starts from what training
gave it. A row is read in pieces with the state handed on, so that rows of millions of tokens take the memory of short
ones (but for full attention, which keeps all keys and values). A position is a token's place in its row: rows cross
documents, so it says how much has been read since the row's beginning, not where in its document a token stands.

`--compare-reset WINDOW` shows what the memory gives: the same targets are scored a second time with the memory set
back to its start every WINDOW tokens, all else (attention, convolutions, positions) going on as in the first reading.

`--tasks`: downstream tasks through lm-eval. `--ruler`, `--babi`: needles and facts in long texts. Both in
tools/evaluation; torchrun divides them over several processes.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from model import ModelState, TitansLM
from parallel.scoring import IGNORED, Piece, PositionSums, Rows, mean_reset, read_in_pieces, require_reset_window
from pretrain.data import ShardSet, sequential_batches
from pretrain.errors import UserError
from tools.command import Progress, positive_int
from tools.documents import (
    DocumentReader,
    add_document_arguments,
    changed_document_options,
    location,
    reader_from_arguments,
)
from tools.encoding import Tokenizer
from tools.evaluation.options import add_benchmark_arguments, add_long_arguments, add_task_arguments, kind_of
from tools.evaluation.ranks import join, require_alone, run_and_leave
from tools.model_directory import LoadedModel, load_model_directory
from tools.result_files import require_writable, write_json

PIECE = 1024
"""Tokens of a row that are read at a time."""


class EncodedText:
    """Documents encoded in memory, readable like a shard set."""

    def __init__(self, reader: DocumentReader, tokenizer: Tokenizer) -> None:
        eos = tokenizer.eos_id
        self._encoded = [np.array([*tokenizer.encode(document.text), eos], np.int32) for document in reader]
        if not self._encoded:
            raise UserError(f"--input {', '.join(map(str, reader.inputs))}: holds no text")
        self.tokenizer = tokenizer
        self.token_bytes = tokenizer.token_bytes().astype(np.int64)
        self.document_tokens = np.array([len(tokens) for tokens in self._encoded], np.int64)
        self.tokens = int(self.document_tokens.sum())

    def read(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens start..stop of a document."""
        return self._encoded[document][start:stop]


@dataclass
class Score:
    """Sums over scored tokens: nats, tokens and text bytes, and losses by position."""

    positions: PositionSums
    nats: float = 0.0
    tokens: int = 0
    text_bytes: int = 0

    def add(self, piece: Piece, token_bytes: Tensor) -> None:
        """Adds a piece, of which the losses [B, t] were made."""
        scored = piece.targets != IGNORED
        self.nats += float(piece.carried.double().masked_fill(~scored, 0.0).sum())
        self.tokens += int(scored.sum())
        self.text_bytes += int(token_bytes[piece.targets.clamp(min=0)].masked_fill(~scored, 0).sum())
        self.positions.add(piece.start, piece.targets, *(x for x in (piece.carried, piece.reset) if x is not None))

    def report(self) -> dict[str, Any]:
        """JSON-ready results; a bucket covers targets at positions first..last of their rows, counted from 0."""
        positions = self.positions.losses()
        loss, reset = self.nats / self.tokens, mean_reset(positions)
        return {
            "loss": loss,
            **({} if reset is None else {"loss_reset": reset, "difference": reset - loss}),
            "perplexity": math.inf if loss >= 700 else math.exp(loss),
            "bits_per_byte": self.nats / math.log(2) / self.text_bytes if self.text_bytes else None,
            "tokens": self.tokens,
            "text_bytes": self.text_bytes,
            "by_position": [bucket.fields() for bucket in positions],
        }


@torch.no_grad()
def evaluate(
    model: TitansLM,
    source: ShardSet | EncodedText,
    *,
    context: int,
    batch_size: int,
    max_tokens: int | None,
    reset_window: int | None = None,
) -> Iterator[Score]:
    """Scores the source row by row; yields the running score after each piece of the rows.

    reset_window: also score with the memory reset every so many tokens (`parallel.scoring` says how).
    """
    device = next(model.parameters()).device
    token_bytes = torch.from_numpy(np.asarray(source.token_bytes))
    score = Score(PositionSums(torch.device("cpu"), with_reset=reset_window is not None))

    def read(rows: Rows, state: ModelState | None, _: bool) -> tuple[Tensor, ModelState]:
        losses, state = model.token_losses(rows.tokens.to(device), rows.targets.to(device), state)
        return losses.cpu(), state

    batches = sequential_batches(source, sequence_length=context, batch_size=batch_size, max_tokens=max_tokens)
    for batch in batches:
        for piece in read_in_pieces(batch, read, length=PIECE, reset_window=reset_window):
            score.add(piece, token_bytes)
            yield score


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    result = argparse.ArgumentParser(
        prog="python -m tools.evaluate",
        description="An exported model's loss on text, its results on downstream tasks, or what it finds in long ones.",
    )
    result.add_argument("model", type=Path, help="folder made by `python -m tools.export`")
    add_text_arguments(result)
    add_task_arguments(result)
    add_long_arguments(result)
    add_benchmark_arguments(result)
    result.add_argument(
        "--batch-size",
        type=positive_int,
        help="rows at a time (default: 8, or fewer where a text has fewer rows; of each rank)",
    )
    result.add_argument("--json", "--output", type=Path, metavar="FILE", help="file to write the results to")
    result.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute (default cpu)")
    result.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the arithmetic")
    return result


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of --shards and --input."""
    result = parser.add_argument_group("a text's loss")
    result.add_argument(
        "--shards",
        type=location,
        help="folder or URL of a shard set made by `python -m tools.shards build`; or give --input",
    )
    add_document_arguments(parser, required=False)
    result.add_argument("--context", type=positive_int, help="tokens in a row (default: the training length)")
    result.add_argument(
        "--compare-reset",
        type=positive_int,
        metavar="WINDOW",
        help="also score with the memory reset every WINDOW tokens of a row, attention, convolutions and positions "
        "going on: the difference is what the memory gives. A multiple of the model's chunk (mac: segment), below "
        "--context",
    )
    result.add_argument("--max-tokens", type=positive_int, help="stop after this many tokens (default: all)")


def open_source(arguments: argparse.Namespace, loaded: LoadedModel) -> ShardSet | EncodedText:
    """The text to score. Raises UserError for two sources, and for shards of another tokenizer."""
    if arguments.input is not None and arguments.shards is not None:
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
    console = Console(width=max(100, Console().width))
    summary = Table("loss", "perplexity", "bits per byte", "tokens", "text bytes")
    per_byte = report["bits_per_byte"]
    summary.add_row(
        f"{report['loss']:.4f}", f"{report['perplexity']:.3f}", "n/a" if per_byte is None else f"{per_byte:.4f}",
        f"{report['tokens']:,}", f"{report['text_bytes']:,}",
    )  # fmt: skip
    console.print(summary)
    window = report.get("reset_window")
    compared = () if window is None else ("loss carried", f"loss reset every {window:,}", "difference")
    positions = Table("position in the row", "tokens", *(compared or ("loss",)))
    for row in report["by_position"]:
        losses = [f"{row[name]:.4f}" for name in ("loss", "loss_reset", "difference") if name in row]
        positions.add_row(f"{row['first']:,}..{row['last']:,}", f"{row['tokens']:,}", *losses)
    if compared:
        losses = [f"{report[name]:.4f}" for name in ("loss", "loss_reset", "difference")]
        positions.add_row("all", f"{report['tokens']:,}", *losses)
    console.print(positions)


def run(arguments: argparse.Namespace) -> None:
    """Does what the options ask for."""
    kind = kind_of(arguments, add_text_arguments)
    if kind == "text":
        require_alone("a text's loss (--shards, --input)")
    ranks = join(arguments.device)
    with ranks.agreed():
        if ranks.world.is_main:
            require_writable(arguments.json, arguments.plot)
    if kind == "tasks":
        from tools.evaluation import downstream  # with lm-eval, which the rest has no use for

        downstream.run(arguments, ranks)
    elif kind == "long":
        from tools.evaluation import long_context

        long_context.run(arguments, ranks)
    else:
        score_text(arguments)


def score_text(arguments: argparse.Namespace) -> None:
    """Scores a text, writes and prints."""
    loaded = load_model_directory(arguments.model, device=arguments.device, dtype=getattr(torch, arguments.dtype))
    context = arguments.context or loaded.config.sequence_length
    if arguments.compare_reset is not None:
        try:
            require_reset_window(loaded.config.model, arguments.compare_reset, context, "--compare-reset")
        except ValueError as error:
            raise UserError(str(error)) from None
    source = open_source(arguments, loaded)
    window = arguments.compare_reset
    total = min(source.tokens, arguments.max_tokens or source.tokens)
    progress = Progress(total)
    for score in evaluate(
        loaded.model,
        source,
        context=context,
        batch_size=arguments.batch_size or min(8, -(-total // context)),
        max_tokens=arguments.max_tokens,
        reset_window=window,
    ):
        progress.update(score.tokens, f"{score.tokens:,} of {total:,} tokens, loss {score.nats / score.tokens:.4f}")
    progress.close()
    compared = {} if window is None else {"reset_window": window}
    report = {
        "model": str(arguments.model),
        "step": loaded.config.step,
        "context": context,
        **compared,
        **score.report(),
    }
    if arguments.json is not None:
        write_json(arguments.json, report, indent=1)
    print_report(report)  # last: whoever reads it may have gone


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    arguments = parser().parse_args(argv)
    return run_and_leave(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
