"""The reader for held-out evaluation: every token a target exactly once, in stored order, on any number of ranks."""

from collections.abc import Iterator

import numpy as np
import torch

from pretrain.data.loader import Batch, require_positive, require_rank
from pretrain.data.rows import IGNORE_INDEX
from pretrain.data.shards import ShardSet


def sequential_batches(
    shards: ShardSet,
    *,
    sequence_length: int,
    batch_size: int,
    max_tokens: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """Batches of [batch_size, sequence_length] over the first `max_tokens` tokens of the set (None: all).

    The stream of documents is preceded by one EOS, which stands before a document in training too, so that its first
    token is predicted as well: each of the tokens is a target once, on one rank. Row n covers the targets n *
    sequence_length and on. Every rank gets the same number of batches; what is left over is EOS with target -100.
    Raises UserError for a size that is not positive.
    """
    require_positive(sequence_length=sequence_length, batch_size=batch_size, world_size=world_size)
    if max_tokens is not None:
        require_positive(max_tokens=max_tokens)
    require_rank(rank, world_size)
    total = shards.tokens if max_tokens is None else min(max_tokens, shards.tokens)
    return _batches(shards, sequence_length, batch_size, total, rank, world_size)


def _batches(shards: ShardSet, length: int, batch_size: int, total: int, rank: int, world_size: int) -> Iterator[Batch]:
    starts = np.concatenate([[0], np.cumsum(shards.document_tokens)])
    eos = shards.tokenizer.eos_id
    targets_a_step = batch_size * world_size * length
    for step in range(-(-total // targets_a_step)):
        tokens = np.full((batch_size, length), eos, np.int64)
        targets = np.full((batch_size, length), IGNORE_INDEX, np.int64)
        for row in range(batch_size):
            first = step * targets_a_step + (rank * batch_size + row) * length
            scored = min(length, total - first)
            if scored <= 0:
                break
            stream = _stream(shards, starts, max(first - 1, 0), first + scored)
            targets[row, :scored] = stream[-scored:]
            # The first row of all keeps the EOS that it was filled with as its first input.
            before = len(stream) - 1 if first else scored - 1
            tokens[row, scored - before : scored] = stream[:before]
        yield Batch(torch.from_numpy(tokens), torch.from_numpy(targets))


def _stream(shards: ShardSet, starts: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Tokens start..stop of the documents laid end to end in stored order, int64."""
    pieces = []
    document = int(np.searchsorted(starts, start, side="right")) - 1
    while start < stop:
        end = min(stop, int(starts[document + 1]))
        pieces.append(
            shards.read(document, start - int(starts[document]), end - int(starts[document])).astype(np.int64)
        )
        start, document = end, document + 1
    return np.concatenate(pieces)
