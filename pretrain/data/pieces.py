"""Rows as pieces of documents: where each piece lies in its document and in its row, and the rows that come of it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pretrain.data.rows import IGNORE_INDEX, Rows
from pretrain.data.shards import ShardSet


@dataclass(frozen=True)
class Pieces:
    """Pieces of documents in windows, all arrays int64 [pieces]. A window is one place longer than a row: input p of a
    row stands at place p, its target at place p + 1.
    """

    row: np.ndarray
    """The window."""
    place: np.ndarray
    """The first place in it."""
    document: np.ndarray
    first: np.ndarray
    """The first token in the document."""
    count: np.ndarray
    """Tokens; 0 where all is padding."""
    padding: np.ndarray
    """Places behind them without a token."""
    begins: np.ndarray | None
    """bool: whether a document begins here with an EOS of its own, and the model's state anew where it does at
    documents; None: every document is predicted from what stands before it."""

    @classmethod
    def joined(cls, parts: Sequence["Pieces"]) -> "Pieces":
        """All of them, in order."""
        if len(parts) == 1:
            return parts[0]
        columns = zip(*(vars(part).values() for part in parts), strict=True)
        return cls(*(None if column[0] is None else np.concatenate(column) for column in columns))


def fill(shards: ShardSet, pieces: Pieces, out: Rows, rows: np.ndarray) -> None:
    """Writes the windows of `pieces` into the rows `rows`, int64 [windows], of `out`.

    A token of a document is an input and a target. Padding has EOS as input and no target, and so has what lies in
    shards that are skipped. Where a document begins with an EOS of its own the input is EOS. Raises as
    `ShardSet.gather` does.
    """
    width = out.tokens.shape[1] + 1
    eos = shards.tokenizer.eos_id
    start = pieces.row * width + pieces.place
    skipped = shards.is_skipped(pieces.document)
    # Every place is a token's, but for padding and shards that are skipped: only then must EOS stand there before.
    blank, size = start + pieces.count, pieces.padding
    if skipped is not None:
        blank = np.where(skipped, start, blank)
        size = np.where(skipped, pieces.count + pieces.padding, size)
    read = pieces.count > 0 if skipped is None else (pieces.count > 0) & ~skipped
    columns = (pieces.document, pieces.first, pieces.count, start)
    document, first, count, place = columns if read.all() else (x[read] for x in columns)
    windows = shards.gather(document, first, count, place, len(rows) * width, fill=eos).reshape(len(rows), width)
    # A slice is copied faster than rows by number.
    straight = len(rows) == len(out.tokens) and np.array_equal(rows, np.arange(len(rows)))
    chosen = slice(None) if straight else rows
    out.tokens[chosen] = windows[:, :-1]
    out.targets[chosen] = windows[:, 1:]
    if size.any():
        row, column = np.divmod(_runs(blank, size), width)
        inside = column > 0
        out.targets[rows[row[inside]], column[inside] - 1] = IGNORE_INDEX
    if pieces.begins is not None:
        here = pieces.begins & (pieces.place > 0)
        row, column = rows[pieces.row[here]], pieces.place[here] - 1
        out.tokens[row, column] = eos
        if out.resets is not None:
            out.resets[row, column] = True


def _runs(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """start, start + 1, ... start + size - 1 of every run, one behind the other."""
    ends = np.cumsum(sizes)
    return np.arange(ends[-1]) + np.repeat(starts - ends + sizes, sizes)
