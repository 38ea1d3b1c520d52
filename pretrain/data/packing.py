"""The order of the training data: rows as a pure function of (seed, epoch, global sample).

In each epoch the documents are permuted and laid end to end (`pretrain.data.stream`), and row p of a length T is the
stream's inputs p*T and on. What is left over at the end, fewer than T inputs, differs with the permutation.

- Order "rows": a second permutation decides which row is read when.
- Order "documents": rows follow each other as they lie.
- Order "streams": with R rows a step, row r of step n + 1 goes on where row r of step n ended. Each of these R lanes
  has as many consecutive rows of an epoch's stream as the others, and when they are read, of the next epoch's: R
  neighbouring shares, whose first rows begin with a reset: a document across the edge of two is read in two parts. Rows
  that do not make up one more for every lane, fewer than R, are left out of the epoch beside what is left over of the
  stream.

With a share of long documents, two such orders are interleaved: one of the long documents alone, one of all.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from pretrain.data.permutation import permute
from pretrain.data.rows import Rows
from pretrain.data.shards import ShardSet
from pretrain.data.stream import Stream
from pretrain.errors import UserError
from pretrain.quantities import Tokens

Order = Literal["rows", "documents", "streams"]


class LongDocuments(BaseModel):
    """A share of the rows that is made of long documents alone."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    at_least: Tokens
    """Tokens of a document, EOS included, from which on it is long."""

    share: float = Field(gt=0, le=1)
    """Share of the rows that hold long documents only; the others hold all documents, long ones among them. With order
    streams, of the rows of a step, rounded down."""

    def before(self, row: int) -> int:
        """How many of the first `row` rows are of long documents."""
        share = Fraction(str(self.share))  # as it is written: 0.3 is no binary number
        return row * share.numerator // share.denominator


class Selection(BaseModel):
    """Which documents are read, and how they lie: all that the order depends on beside length, seed and rows a step."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    order: Order = "rows"
    """Order of the rows."""

    grid: int | None = None
    """Tokens that every document is padded to a multiple of, where a model's memory is reset at its start; None: it is
    not, and documents are packed without a gap."""

    min_document_tokens: int = 1
    """Shorter documents are left out."""

    long_documents: LongDocuments | None = None
    """The share of long documents."""


@dataclass(frozen=True)
class Pool:
    """A stream, and the rows that an epoch has of it."""

    stream: Stream
    rows: int
    lanes: int | None
    """Rows of every step that go on in the next one; None: rows stand for themselves."""

    @property
    def rows_per_lane(self) -> int:
        """Consecutive rows of an epoch that a lane reads."""
        return self.rows // self.lanes


class Packing:
    """The rows of a shard set for one length, seed and selection. Thread-safe."""

    def __init__(
        self, shards: ShardSet, *, sequence_length: int, seed: int, selection: Selection, rows_per_step: int
    ) -> None:
        """`rows_per_step`: rows of all ranks in a step, on which the order "streams" depends.

        Raises UserError when the set is too small: for one row, for a row in every lane, or without long documents.
        """
        self.shards = shards
        self.sequence_length = sequence_length
        self.seed = seed
        self.selection = selection
        self.rows_per_step = rows_per_step
        self._has_lanes = selection.order == "streams"
        long = selection.long_documents
        self._long_lanes = long.before(rows_per_step) if long is not None and self._has_lanes else 0
        if long is not None and self._has_lanes and not self._long_lanes:
            raise UserError(
                f"data.long_documents.share {long.share}: of {rows_per_step} rows a step that is none; raise it to "
                f"{1 / rows_per_step:.2g} or more, or training.batch_tokens"
            )
        self.pools = [None if self.long_share == 1 else self._pool(None), None if long is None else self._pool(long)]
        """Of all documents, and of long ones; None where no row is of it."""

    @property
    def long_share(self) -> float:
        """Share of the rows that are of long documents only, as it comes out."""
        long = self.selection.long_documents
        if long is None:
            return 0.0
        return self._long_lanes / self.rows_per_step if self._has_lanes else long.share

    def read(self, samples: np.ndarray) -> Rows:
        """Inputs, targets and resets of global samples, int64 [n]."""
        shape = (len(samples), self.sequence_length)
        resets = None if self.selection.grid is None and not self._has_lanes else np.zeros(shape, np.bool_)
        out = Rows(np.empty(shape, np.int64), np.empty(shape, np.int64), resets)
        for pool, places, numbers in self._pooled(samples.tolist()):
            for place, epoch, row, begins in zip(places, *self._find(pool, np.array(numbers)), strict=True):
                pool.stream.read(int(epoch), int(row) * self.sequence_length, out, place)
                if begins:
                    resets[place, 0] = True
        return out

    def _pool(self, long: LongDocuments | None) -> Pool:
        selection, length = self.selection, self.sequence_length
        at_least, field, name = selection.min_document_tokens, "data.min_document_tokens", ""
        if long is not None:
            at_least, field, name = long.at_least, "data.long_documents.at_least", "long "
        stream = Stream(self.shards, seed=self.seed, at_least=at_least, grid=selection.grid, field=field, name=name)
        lanes = None
        if self._has_lanes:
            lanes = self.rows_per_step - self._long_lanes if long is None else self._long_lanes
        rows = max(stream.inputs, 0) // length
        if rows < (lanes or 1):
            of = "" if at_least <= 1 else f" in documents of at least {at_least} ({field})"
            if stream.grid is not None:
                of += f", {stream.inputs} with padding"
            what = f"a row of training.sequence_length {length} takes {length + (stream.grid is None)}"
            mend = "add text or shorten the rows"
            if lanes is not None and lanes > 1:
                what, mend = f"{lanes} rows a step that each go on in the next: {what}", f"{mend}, or have fewer"
            raise UserError(f"{self.shards.folder}: holds {stream.tokens} tokens{of}, {what}; {mend}")
        return Pool(stream, rows, lanes)

    def _pooled(self, samples: list[int]) -> Iterator[tuple[Pool, list[int], list[int]]]:
        """Samples by pool: their places in the list, and their numbers among the rows of their pool.

        Of streams a number is (step) * lanes + lane, and a lane is of one pool for good.
        """
        everything, long = self.pools
        config = self.selection.long_documents
        if config is None:
            yield everything, list(range(len(samples))), samples
            return
        found: dict[bool, tuple[list[int], list[int]]] = {True: ([], []), False: ([], [])}
        for place, sample in enumerate(samples):
            step, row = divmod(sample, self.rows_per_step) if self._has_lanes else (0, sample)
            before = config.before(row)
            is_long = config.before(row + 1) > before
            number = before if is_long else row - before
            if self._has_lanes:
                number += step * (long if is_long else everything).lanes
            found[is_long][0].append(place)
            found[is_long][1].append(number)
        for is_long, (places, numbers) in found.items():
            if places:
                yield long if is_long else everything, places, numbers

    def _find(self, pool: Pool, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Epoch and row of a pool's rows by number, and whether a lane begins there."""
        if pool.lanes is not None:
            steps, lanes = np.divmod(numbers, pool.lanes)
            epochs, places = np.divmod(steps, pool.rows_per_lane)
            return epochs, lanes * pool.rows_per_lane + places, places == 0
        epochs, rows = np.divmod(numbers, pool.rows)
        if self.selection.order == "rows":
            prefix = "" if pool is self.pools[0] else "long "
            for epoch in np.unique(epochs):
                chosen = epochs == epoch
                rows[chosen] = permute(rows[chosen], pool.rows, f"{prefix}rows {self.seed} {epoch}")
        return epochs, rows, np.zeros(len(rows), np.bool_)
