"""Documents end to end as one long stream, in another order in every epoch: what rows are cut from.

Plain: the N tokens of the documents, of which every one but the first is a target once. Input p is token p, its target
token p + 1, so there are N - 1 inputs.

Padded to a grid: a document of n tokens, EOS the last, takes n inputs: the EOS that ended whatever was before it, and
all of its tokens but the last. Every one of its tokens is a target once, its first one predicted from EOS alone, as in
evaluation and generation, and none from the document before. Behind them stand EOS inputs without a target, up to a
multiple of the grid, so that every document begins on it.

Fewer than 10 M documents are permuted all together. Of more, the shards are permuted, groups of shards that then follow
each other hold about 2 M documents (`GROUP_DOCUMENTS`), and these are permuted within their group: two groups at a time
are held in memory, whatever the number of documents, and a run is resumed by making one.
"""

from collections import OrderedDict
from dataclasses import dataclass
from threading import Lock

import numpy as np

from pretrain.data.permutation import permutation
from pretrain.data.pieces import Pieces
from pretrain.data.shards import ShardSet
from pretrain.errors import UserError

GROUP_DOCUMENTS = 2_000_000
_FEWEST_GROUPS = 5  # of fewer documents than these hold one permutation is quick, and mixes them better


@dataclass(frozen=True)
class _Epoch:
    """The groups of an epoch."""

    shards: np.ndarray  # int64 [shards]: in the epoch's order
    first: np.ndarray  # int64 [groups + 1]: each group's first place in `shards`
    starts: np.ndarray  # int64 [groups + 1]: where it starts in the epoch's stream


@dataclass(frozen=True)
class _Group:
    documents: np.ndarray  # int [documents]: the document at each place
    starts: np.ndarray  # int64 [documents + 1]: where it starts in the group's stream


class Stream:
    """The inputs of a shard set, or of its documents of at least some length, by epoch and position. Thread-safe."""

    def __init__(
        self,
        shards: ShardSet,
        *,
        seed: int,
        at_least: int = 1,
        grid: int | None = None,
        field: str = "",
        name: str = "",
        group_documents: int | None = GROUP_DOCUMENTS,
    ) -> None:
        """`at_least`: tokens (EOS included) of the documents that are read; `grid`: what they are padded to, None: not
        at all; `name`: tells the orders of several streams of one seed apart; `group_documents`: of a group, about;
        None: one group, whatever it holds.

        Raises UserError naming the recipe's `field` that `at_least` comes from when no document is long enough.
        """
        self.shards = shards
        self.grid = grid
        self.at_least = at_least
        self._order = f"{name}documents {seed}"
        self._group_documents = group_documents
        documents, tokens, places = _totals(shards, at_least, grid)
        self._shard_documents, self._shard_places = documents, places
        self.documents = int(documents.sum())
        self.tokens = int(tokens.sum())
        if not self.documents:
            raise UserError(
                f"{field} {at_least}: no document of {shards.folder} has so many tokens, the longest has "
                f"{int(shards.document_tokens.max())}; lower it"
            )
        self.inputs = int(places.sum()) - (grid is None)
        """Positions of an epoch that rows are cut from."""
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._groups: OrderedDict[tuple[int, int], _Group] = OrderedDict()
        self._lock = Lock()

    @property
    def padding(self) -> float:
        """Share of the inputs that are padding."""
        return 0.0 if self.grid is None else 1 - self.tokens / self.inputs

    def groups(self, epoch: int) -> np.ndarray:
        """int64 [groups + 1]: the input that each group of an epoch starts at."""
        return self._epoch(epoch).starts

    def pieces(self, epoch: int, starts: np.ndarray, length: int) -> Pieces:
        """The pieces of rows of `length` inputs that start at inputs `starts`, int64 [n], of an epoch, which holds as
        many.
        """
        # A window's first place is that of input 0; where documents begin with an EOS of their own, one before it.
        starts = starts - (self.grid is not None)
        edges = self._epoch(epoch).starts
        stops = starts + length + 1
        low = int(np.searchsorted(edges, max(int(starts.min()), 0), side="right")) - 1
        high = int(np.searchsorted(edges, int(stops.max()), side="left"))
        found = []
        for number in range(low, high):
            rows = np.flatnonzero((starts < edges[number + 1]) & (stops > edges[number]))
            if len(rows):
                found.append(self._of_group(self._group(epoch, number), rows, starts[rows] - edges[number], length + 1))
        return Pieces.joined(found)

    def _of_group(self, group: _Group, rows: np.ndarray, starts: np.ndarray, width: int) -> Pieces:
        low, high = np.maximum(starts, 0), np.minimum(starts + width, group.starts[-1])
        first = np.searchsorted(group.starts, low, side="right") - 1
        counts = np.searchsorted(group.starts, high, side="left") - first
        ends = np.cumsum(counts)
        index = np.repeat(np.arange(len(rows)), counts)
        number = np.arange(ends[-1]) + np.repeat(first - ends + counts, counts)
        begin = group.starts[number]
        left, right = np.maximum(begin, low[index]), np.minimum(group.starts[number + 1], high[index])
        document = group.documents[number].astype(np.int64)
        offset = left - begin
        if self.grid is None:
            tokens, begins = right - left, None
        else:
            tokens = np.clip(self.shards.document_tokens[document] - offset, 0, right - left)
            begins = offset == 0
        padding = right - left - tokens
        return Pieces(rows[index], left - starts[index], document, offset, tokens, padding, begins)

    def _epoch(self, epoch: int) -> _Epoch:
        with self._lock:
            found = self._epochs.pop(epoch, None)
            if found is None:
                found = self._new_epoch(epoch)
            self._epochs[epoch] = found
            if len(self._epochs) > 2:
                self._epochs.popitem(last=False)
            return found

    def _new_epoch(self, epoch: int) -> _Epoch:
        shards, limit = np.arange(len(self._shard_documents)), self._group_documents
        first = np.array([0, len(shards)])
        if limit is not None and self.documents >= _FEWEST_GROUPS * limit:
            shards = permutation(len(shards), f"{self._order} {epoch} shards")
            before = np.cumsum(self._shard_documents[shards]) - self._shard_documents[shards]
            first = np.append(np.unique(before // limit, return_index=True)[1], len(shards))
        places = np.concatenate([[0], np.cumsum(self._shard_places[shards], dtype=np.int64)])
        return _Epoch(shards, first, places[first])

    def _group(self, epoch: int, number: int) -> _Group:
        # Two groups are kept, the latest used, because threads read ahead across a group's end, and rows across it.
        parts = self._epoch(epoch)
        with self._lock:
            found = self._groups.pop((epoch, number), None)
            if found is None:
                if len(self._groups) > 1:
                    self._groups.popitem(last=False)
                key = f"{self._order} {epoch}" if len(parts.first) == 2 else f"{self._order} {epoch} group {number}"
                found = self._new_group(parts.shards[parts.first[number] : parts.first[number + 1]], key)
            self._groups[epoch, number] = found
            return found

    def _new_group(self, shards: np.ndarray, key: str) -> _Group:
        edges = self.shards.shard_documents
        lengths = self.shards.document_tokens
        if len(shards) == len(edges) - 1:
            chosen = None if self.at_least <= 1 else np.flatnonzero(lengths >= self.at_least)
        else:
            ranges = [np.arange(edges[shard], edges[shard + 1]) for shard in shards]
            chosen = np.concatenate([part[lengths[part[0] : part[-1] + 1] >= self.at_least] for part in ranges])
        documents = permutation(self.shards.documents if chosen is None else len(chosen), key)
        if chosen is not None:
            documents = chosen[documents]
        places = _places(lengths[documents], self.grid)
        starts = np.empty(len(documents) + 1, np.int64)
        starts[0] = 0
        np.cumsum(places, out=starts[1:])
        return _Group(documents, starts)


def _places(lengths: np.ndarray, grid: int | None) -> np.ndarray:
    """Inputs that documents of these lengths take."""
    return lengths if grid is None else -(-lengths // grid) * grid


def _totals(shards: ShardSet, at_least: int, grid: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Documents, tokens and places of each shard, int64 [shards], of documents of at least so many tokens."""
    if at_least <= 1 and grid is None:
        documents, tokens = np.diff(shards.shard_documents), shards.shard_tokens
        return documents, tokens, tokens
    found = np.zeros((3, len(shards.shard_tokens)), np.int64)
    for number, (first, last) in enumerate(zip(shards.shard_documents[:-1], shards.shard_documents[1:], strict=True)):
        lengths = shards.document_tokens[first:last]
        lengths = lengths[lengths >= at_least]
        found[:, number] = len(lengths), lengths.sum(), _places(lengths, grid).sum()
    return found[0], found[1], found[2]
