"""The order of the training data: rows as a pure function of (seed, epoch, global sample).

In each epoch the documents are permuted and laid end to end (`pretrain.data.stream`), and row p of a length T is the
stream's inputs p*T and on. What is left over at the end, fewer than T inputs, differs with the permutation.

- Order "rows": a second permutation decides which row is read when (of more documents than are permuted together,
  among the rows that begin in one group of them).
- Order "documents": rows follow each other as they lie.
- Order "streams": with R rows a step, row r of step n + 1 goes on where row r of step n ended. Each of these R lanes
  has as many consecutive rows of an epoch's stream as the others, and when they are read, of the next epoch's: R
  neighbouring shares, whose first rows begin with a reset: a document across the edge of two is read in two parts. Rows
  that do not make up one more for every lane, fewer than R, are left out of the epoch beside what is left over of the
  stream.

With packing "best_fit" documents are not laid end to end, but into rows of whole documents (`pretrain.data.best_fit`),
and order "rows" permutes these.

Several such orders are interleaved row by row (`pretrain.data.interleave`): those of a mixture's sources, each with the
weight that it has; or, with a share of long documents, one of the long documents alone and one of all. With order
"streams" a lane is of one of them for good.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from pretrain.data.best_fit import BestFit
from pretrain.data.interleave import Interleave
from pretrain.data.permutation import permute
from pretrain.data.pieces import Pieces, fill
from pretrain.data.rows import Rows
from pretrain.data.shards import ShardSet
from pretrain.data.stream import GROUP_DOCUMENTS, Stream
from pretrain.errors import UserError
from pretrain.quantities import Tokens

Order = Literal["rows", "documents", "streams"]
PackingName = Literal["stream", "best_fit"]


class LongDocuments(BaseModel):
    """A share of the rows that is made of long documents alone."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    at_least: Tokens
    """Tokens of a document, EOS included, from which on it is long."""

    share: float = Field(gt=0, le=1)
    """Share of the rows that hold long documents only; the others hold all documents, long ones among them. With order
    streams, of the rows of a step, rounded down."""


class Selection(BaseModel):
    """Which documents are read, and how they lie: all that the order depends on beside length, seed and rows a step."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    order: Order = "rows"
    """Order of the rows."""

    packing: PackingName = "stream"
    """How documents lie in rows."""

    grid: int | None = None
    """Tokens that every document is padded to a multiple of, where a model's memory is reset at its start; None: it is
    not, and documents are packed without a gap."""

    min_document_tokens: int = 1
    """Shorter documents are left out."""

    long_documents: LongDocuments | None = None
    """The share of long documents."""


@dataclass(frozen=True)
class Part:
    """One of the orders that are interleaved: a set's documents of at least some length."""

    name: str
    """Tells the orders of one seed apart, and parts in messages; "" where there is one alone."""
    shards: ShardSet
    weight: Fraction
    """Of the rows, beside the other parts'."""
    at_least: int = 1
    """Tokens of the documents that are read."""
    field: str = "data.min_document_tokens"
    """Of the recipe, that `at_least` comes from."""
    max_epochs: Fraction | None = None
    """Passes after which the part is read no more; None: any number, as it has to be with order "streams"."""


def parts_of(shards: ShardSet, selection: Selection) -> list[Part]:
    """The parts of one set: its long documents, where they have a share, and all."""
    long, everything = selection.long_documents, Fraction(1)
    parts = []
    if long is not None:
        share = as_written(long.share)
        everything -= share
        parts = [Part("long", shards, share, long.at_least, "data.long_documents.at_least")]
    if everything:
        parts.append(Part("", shards, everything, selection.min_document_tokens))
    return parts


def as_written(number: float) -> Fraction:
    """The number that was written: 0.3 is no binary number."""
    return Fraction(str(number))


@dataclass(frozen=True)
class Pool:
    """A part with the rows that an epoch has of it."""

    part: Part
    stream: Stream | BestFit
    rows: int
    lanes: int | None
    """Rows of every step that go on in the next one; None: rows stand for themselves."""

    @property
    def rows_per_lane(self) -> int:
        """Consecutive rows of an epoch that a lane reads."""
        return self.rows // self.lanes

    @property
    def rows_per_epoch(self) -> int:
        """Rows that are read of an epoch."""
        return self.rows if self.lanes is None else self.rows_per_lane * self.lanes

    @property
    def limit(self) -> int | None:
        """Rows that are read of it at the most; None: any number."""
        epochs = self.part.max_epochs
        return None if epochs is None else int(epochs * self.rows_per_epoch)


class Packing:
    """The rows of a shard set, or of several, for one length, seed and selection. Thread-safe."""

    def __init__(
        self,
        parts: Sequence[Part],
        *,
        sequence_length: int,
        seed: int,
        selection: Selection,
        rows_per_step: int,
        origin: int = 0,
        before: Sequence[int] = (),
        group_documents: int = GROUP_DOCUMENTS,
    ) -> None:
        """
        Args:
            rows_per_step: rows of all ranks in a step, on which the order "streams" depends.
            origin: the row from which on these parts are read in these proportions.
            before: rows of each part that were read before that; none: none.
            group_documents: see `pretrain.data.stream`; with order "streams", whose rows lie all over an epoch, and
                packing "best_fit" all documents are one group.

        Raises UserError when a set is too small: for one row, for a row in every lane, or without long documents.
        """
        self.sequence_length = sequence_length
        self.seed = seed
        self.selection = selection
        self.rows_per_step = rows_per_step
        self.origin = origin
        self._has_lanes = selection.order == "streams"
        self._group_documents = None if self._has_lanes else group_documents
        lanes = self._lanes(parts) if self._has_lanes else [None] * len(parts)
        before = tuple(before) or (0,) * len(parts)
        self.before = tuple(-(-x // (count or 1)) * (count or 1) for x, count in zip(before, lanes, strict=True))
        self.pools = [self._pool(part, count) for part, count in zip(parts, lanes, strict=True)]
        """One for each part."""
        weights = [part.weight for part in parts]
        if self._has_lanes:
            self._interleave = Interleave([Fraction(count) for count in lanes])
        else:
            self._interleave = Interleave(weights, [pool.limit for pool in self.pools], self.before)

    @property
    def shares(self) -> list[float]:
        """Share of the rows of each pool, as it comes out where no limit is reached."""
        of = [pool.part.weight if pool.lanes is None else pool.lanes for pool in self.pools]
        return [float(x / sum(of)) for x in of]

    @property
    def end(self) -> int | None:
        """The row that there is none of any more, as every part has been read as often as it may be; None: there is no
        end.
        """
        return None if self._interleave.end is None else self.origin + self._interleave.end

    def counts(self, position: int) -> list[int]:
        """Rows of each pool among the first `position`."""
        rows = position - self.origin
        if not self._has_lanes:
            return self._interleave.counts(rows)
        steps = rows // self.rows_per_step
        return [x + steps * pool.lanes for x, pool in zip(self.before, self.pools, strict=True)]

    def read(self, samples: np.ndarray) -> Rows:
        """Inputs, targets and resets of global samples, int64 [n]. Raises UserError for a sample behind the end, and
        for shards that cannot be read (see `ShardSet.gather`).
        """
        shape = (len(samples), self.sequence_length)
        resets = None if self.selection.grid is None and not self._has_lanes else np.zeros(shape, np.bool_)
        # One array for both: from 4 MB on numpy asks for huge pages, and without these touching new memory takes longer
        # than all else here.
        tokens, targets = np.empty((2, *shape), np.int64)
        out = Rows(tokens, targets, resets)
        for pool, places, numbers in self._pooled(samples):
            epochs, rows, begins = self._find(pool, numbers)
            for epoch in np.unique(epochs).tolist():
                chosen = epochs == epoch
                fill(pool.part.shards, self._pieces(pool, epoch, rows[chosen]), out, places[chosen])
            if begins is not None:
                resets[places[begins], 0] = True
        if self.origin and self._has_lanes:  # no lane goes on from what it read of other data
            resets[samples < self.origin + self.rows_per_step, 0] = True
        return out

    def _pieces(self, pool: Pool, epoch: int, rows: np.ndarray) -> Pieces:
        if isinstance(pool.stream, BestFit):
            return pool.stream.pieces(epoch, rows)
        return pool.stream.pieces(epoch, rows * self.sequence_length, self.sequence_length)

    def _lanes(self, parts: Sequence[Part]) -> list[int]:
        """How many rows of a step each part has: rounded down, and those that are left to the parts that lost most."""
        total = sum(part.weight for part in parts)
        exact = [part.weight * self.rows_per_step / total for part in parts]
        lanes = [int(x) for x in exact]
        long = self.selection.long_documents is not None
        left = [len(parts) - 1] if long else sorted(range(len(parts)), key=lambda i: lanes[i] - exact[i])
        for i in (left * self.rows_per_step)[: self.rows_per_step - sum(lanes)]:
            lanes[i] += 1
        for part, count in zip(parts, lanes, strict=True):
            if part.weight and not count:
                share = float(part.weight / total)
                field = "data.long_documents.share" if long else f"data.sources.{part.name}.weight"
                raise UserError(
                    f"{field} {share:.3g}: of {self.rows_per_step} rows a step that is none; raise it to "
                    f"{1 / self.rows_per_step:.2g} or more, or training.batch_tokens"
                )
        return lanes

    def _pool(self, part: Part, lanes: int | None) -> Pool:
        selection, length = self.selection, self.sequence_length
        name = f"{part.name} " if part.name else ""
        options = {"seed": self.seed, "at_least": part.at_least, "grid": selection.grid, "field": part.field}
        if selection.packing == "best_fit":
            fitted = BestFit(part.shards, length=length, name=name, **options)
            return Pool(part, fitted, fitted.rows, None)
        stream = Stream(part.shards, name=name, group_documents=self._group_documents, **options)
        rows = max(stream.inputs, 0) // length
        if rows < (lanes or 1):
            of = "" if part.at_least <= 1 else f" in documents of at least {part.at_least} ({part.field})"
            if stream.grid is not None:
                of += f", {stream.inputs} with padding"
            what = f"a row of training.sequence_length {length} takes {length + (stream.grid is None)}"
            mend = "add text or shorten the rows"
            if lanes is not None and lanes > 1:
                what, mend = f"{lanes} rows a step that each go on in the next: {what}", f"{mend}, or have fewer"
            raise UserError(f"{part.shards.folder}: holds {stream.tokens} tokens{of}, {what}; {mend}")
        return Pool(part, stream, rows, lanes)

    def _pooled(self, samples: np.ndarray) -> list[tuple[Pool, np.ndarray, np.ndarray]]:
        """Samples by pool: their places among the samples, and their numbers among the rows of their pool.

        Of streams a number is (step) * lanes + lane.
        """
        if len(self.pools) == 1 and not self.origin and self.end is None:
            return [(self.pools[0], np.arange(len(samples)), samples)]
        found: dict[int, tuple[list[int], list[int]]] = {}
        end = self.end
        for place, sample in enumerate(samples.tolist()):
            if end is not None and sample >= end:
                raise UserError(
                    f"row {sample} of the run is behind the last one, {end - 1}: each of data.sources has been read "
                    "max_epochs times; raise one, or train on fewer tokens"
                )
            index, number = self._number(sample - self.origin)
            places, numbers = found.setdefault(index, ([], []))
            places.append(place)
            numbers.append(number)
        return [(self.pools[i], np.array(places), np.array(numbers)) for i, (places, numbers) in found.items()]

    def _number(self, row: int) -> tuple[int, int]:
        if not self._has_lanes:
            return self._interleave.locate(row)
        step, lane = divmod(row, self.rows_per_step)
        index, number = self._interleave.locate(lane)
        return index, self.before[index] + step * self.pools[index].lanes + number

    def _find(self, pool: Pool, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Epoch and row of a pool's rows by number, and of streams whether a lane begins there."""
        if pool.lanes is not None:
            steps, lanes = np.divmod(numbers, pool.lanes)
            epochs, places = np.divmod(steps, pool.rows_per_lane)
            return epochs, lanes * pool.rows_per_lane + places, places == 0
        epochs, rows = np.divmod(numbers, pool.rows)
        if self.selection.order == "rows":
            prefix = f"{pool.part.name} " if pool.part.name else ""
            for epoch in np.unique(epochs).tolist():
                chosen = epochs == epoch
                rows[chosen] = self._permuted(pool, rows[chosen], epoch, f"{prefix}rows {self.seed} {epoch}")
        return epochs, rows, None

    def _permuted(self, pool: Pool, rows: np.ndarray, epoch: int, key: str) -> np.ndarray:
        """Which rows of an epoch are read at places `rows`."""
        edges = np.array([0]) if isinstance(pool.stream, BestFit) else pool.stream.groups(epoch)
        if len(edges) <= 2:
            return permute(rows, pool.rows, key)
        first = np.minimum(-(-edges // self.sequence_length), pool.rows)  # the rows that begin in each group
        group = np.searchsorted(first, rows, side="right") - 1
        out = np.empty_like(rows)
        for number in np.unique(group).tolist():
            chosen, start = group == number, int(first[number])
            size = int(first[number + 1]) - start
            out[chosen] = start + permute(rows[chosen] - start, size, f"{key} group {number}")
        return out
