"""Rows of whole documents: best-fit decreasing, so that no document is cut that fits into a row.

The documents' lengths are placed from the longest to the shortest, each into the row with the least room that still
takes it (Ding et al., "Fewer Truncations Improve Language Modeling", 2024). A document longer than a row gives rows of
its own, and what is left of it is placed as one of that length; these alone are cut. What no document fills is padding.

Only lengths decide, so the rows' shape is the same in every epoch, found once and by length instead of by document
(Krell et al., "Efficient Sequence Packing without Cross-contamination", 2021). The epoch's permutation decides which
of the documents of a length lies in which place.
"""

from bisect import bisect_left, insort
from collections import OrderedDict
from dataclasses import dataclass
from threading import Lock

import numpy as np

from pretrain.data.permutation import permutation
from pretrain.data.pieces import Pieces
from pretrain.data.shards import ShardSet
from pretrain.errors import UserError


@dataclass(frozen=True)
class _Shape:
    """The rows of every epoch: row r has the slots edges[r]..edges[r + 1], the longest first."""

    edges: np.ndarray  # int64 [rows + 1]
    sizes: np.ndarray  # int64 [slots]: places of a slot
    by_size: np.ndarray  # int64 [slots]: the slots by falling size


def pack(sizes: np.ndarray, counts: np.ndarray, room: int) -> list[tuple[list[int], int]]:
    """Best-fit decreasing of items of at most `room` places each.

    Args:
        sizes, counts: int64 [n]: different sizes of items, and how many there are of each.

    Returns:
        The contents of rows, by falling size, and how many rows have these; equal contents may come more than once.
    """
    open_rooms: list[int] = []  # what is left in rows that are not full, rising
    rows: dict[int, list[tuple[tuple, int]]] = {}  # by what is left: contents as (contents before, size, times), rows
    full: list[tuple[tuple, int]] = []

    def put(left: int, contents: tuple, count: int) -> None:
        if not left:
            full.append((contents, count))
            return
        if left not in rows:
            rows[left] = []
            insort(open_rooms, left)
        rows[left].append((contents, count))

    for size, count in sorted(zip(sizes.tolist(), counts.tolist(), strict=True), reverse=True):
        while count:
            found = bisect_left(open_rooms, size)
            if found == len(open_rooms):  # new rows, as many of this size in each as it holds
                times = min(room // size, count)
                number = count // times
                put(room - times * size, ((), size, times), number)
                count -= number * times
                continue
            left = open_rooms[found]
            contents, number = rows[left].pop()
            times = min(left // size, count)
            taken = min(number, count // times)
            if taken < number:
                rows[left].append((contents, number - taken))
            if not rows[left]:
                del rows[left], open_rooms[found]
            put(left - times * size, (contents, size, times), taken)
            count -= taken * times
    return [(_unrolled(contents), count) for contents, count in [*full, *(x for part in rows.values() for x in part)]]


def _unrolled(contents: tuple) -> list[int]:
    found: list[int] = []
    while contents:
        contents, size, times = contents
        found[:0] = [size] * times
    return found


class BestFit:
    """The rows of a shard set, or of its documents of at least some length, by epoch and number. Thread-safe.

    It takes about 60 bytes a document.
    """

    def __init__(
        self, shards: ShardSet, *, length: int, seed: int, at_least: int, grid: int | None, field: str, name: str
    ) -> None:
        """`length`: inputs of a row; for the others see `Stream`. Raises UserError when no document is long enough."""
        self.shards = shards
        self.at_least = at_least
        self.grid = grid
        self._length = length
        self._order = f"{name}documents {seed}"
        lengths = shards.document_tokens
        self._chosen = np.flatnonzero(lengths >= at_least)
        if not len(self._chosen):
            raise UserError(
                f"{field} {at_least}: no document of {shards.folder} has so many tokens, the longest has "
                f"{int(lengths.max())}; lower it"
            )
        lengths = lengths[self._chosen]
        self.documents, self.tokens = len(lengths), int(lengths.sum())
        self.cut = int((lengths > length).sum())
        """Documents that do not fit into a row."""
        self._shape = self._packed(lengths)
        self.rows = len(self._shape.edges) - 1
        """Rows of an epoch."""
        self.inputs = self.rows * length
        self._epochs: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._lock = Lock()

    @property
    def padding(self) -> float:
        """Share of the inputs that are padding."""
        return 1 - self.tokens / self.inputs

    def pieces(self, epoch: int, rows: np.ndarray) -> Pieces:
        """The pieces of rows, int64 [n], of an epoch."""
        documents, firsts = self._epoch(epoch)
        shape = self._shape
        first, counts = shape.edges[rows], shape.edges[rows + 1] - shape.edges[rows]
        ends = np.cumsum(counts)
        index = np.repeat(np.arange(len(rows)), counts)
        slot = np.arange(ends[-1]) + np.repeat(first - ends + counts, counts)
        size = shape.sizes[slot]
        before = np.cumsum(size) - size
        place = before - np.repeat(before[ends - counts], counts)
        document, offset = documents[slot], firsts[slot]
        tokens = np.clip(self.shards.document_tokens[document] - offset, 0, size)
        # What a row has behind its last slot is padding too.
        last = ends - 1
        padding = size - tokens
        padding[last] += self._length - place[last] - size[last]
        # A row that a document goes on in has the token before as its first input. Inside a row EOS stands before what
        # is left of a document, as before a whole one.
        goes_on = (offset > 0) & (place == 0)
        return Pieces(index, place + 1 - goes_on, document, offset - goes_on, tokens + goes_on, padding, ~goes_on)

    def _places(self, lengths: np.ndarray) -> np.ndarray:
        return lengths if self.grid is None else -(-lengths // self.grid) * self.grid

    def _packed(self, lengths: np.ndarray) -> _Shape:
        whole, rest = np.divmod(lengths, self._length)
        sizes, counts = np.unique(self._places(rest[rest > 0]), return_counts=True)
        packed = [([self._length], int(whole.sum())), *pack(sizes, counts, self._length)]
        slots = np.repeat([len(contents) for contents, _ in packed], [count for _, count in packed])
        parts = [np.tile(np.array(contents, np.int64), count) for contents, count in packed]
        size = np.concatenate(parts)
        edges = np.concatenate([[0], np.cumsum(slots)])
        return _Shape(edges, size, np.argsort(-size, kind="stable"))

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The document of each slot, and its first token in the slot, int64 [slots]."""
        # Two epochs are kept, the latest used, because threads read ahead across an epoch's end.
        with self._lock:
            found = self._epochs.pop(epoch, None)
            if found is None:
                if len(self._epochs) > 1:
                    self._epochs.popitem(last=False)
                found = self._new_epoch(epoch)
            self._epochs[epoch] = found
            return found

    def _new_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        documents = self._chosen[permutation(len(self._chosen), f"{self._order} {epoch}")]
        lengths = self.shards.document_tokens[documents]
        counts = -(-lengths // self._length)  # pieces of a document: whole rows, and what is left
        piece = np.repeat(np.arange(len(documents)), counts)
        first = (np.arange(len(piece)) - np.repeat(np.cumsum(counts) - counts, counts)) * self._length
        size = self._places(np.minimum(lengths[piece] - first, self._length))
        order = np.argsort(-size, kind="stable")
        slot_document, slot_first = np.empty(len(piece), np.int64), np.empty(len(piece), np.int64)
        slot_document[self._shape.by_size] = documents[piece[order]]
        slot_first[self._shape.by_size] = first[order]
        return slot_document, slot_first
