"""Documents end to end as one long stream, in another order in every epoch: what rows are cut from.

Plain: the N tokens of the documents, of which every one but the first is a target once. Input p is token p, its target
token p + 1, so there are N - 1 inputs.

Padded to a grid: a document of n tokens, EOS the last, takes n inputs: the EOS that ended whatever was before it, and
all of its tokens but the last. Every one of its tokens is a target once, its first one predicted from EOS alone, as in
evaluation and generation, and none from the document before. Behind them stand EOS inputs without a target, up to a
multiple of the grid, so that every document begins on it.
"""

from dataclasses import dataclass
from threading import Lock

import numpy as np

from pretrain.data.permutation import permute
from pretrain.data.rows import IGNORE_INDEX, Rows
from pretrain.data.shards import ShardSet
from pretrain.errors import UserError


@dataclass(frozen=True)
class _Epoch:
    documents: np.ndarray  # int64 [documents]: the document at each place
    starts: np.ndarray  # int64 [documents + 1]: where it starts in the epoch's stream


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
    ) -> None:
        """`at_least`: tokens (EOS included) of the documents that are read; `grid`: what they are padded to, None: not
        at all; `name`: tells the orders of several streams of one seed apart.

        Raises UserError naming the recipe's `field` that `at_least` comes from when no document is long enough.
        """
        self.shards = shards
        self.grid = grid
        self.at_least = at_least
        self._order = f"{name}documents {seed}"
        lengths = shards.document_tokens
        self._chosen = None if at_least <= 1 else np.flatnonzero(lengths >= at_least)
        if self._chosen is not None:
            if not len(self._chosen):
                raise UserError(
                    f"{field} {at_least}: no document of {shards.folder} has so many tokens, the longest has "
                    f"{int(lengths.max())}; lower it"
                )
            lengths = lengths[self._chosen]
        self.documents = len(lengths)
        self.tokens = int(lengths.sum())
        self.inputs = self.tokens - 1 if grid is None else int(self._places(lengths).sum())
        """Positions of an epoch that rows are cut from."""
        self._epochs: dict[int, _Epoch] = {}
        self._lock = Lock()

    @property
    def padding(self) -> float:
        """Share of the inputs that are padding."""
        return 0.0 if self.grid is None else 1 - self.tokens / self.inputs

    def read(self, epoch: int, start: int, out: Rows, place: int) -> None:
        """Fills row `place` of `out` with inputs `start` and on of an epoch, which must hold as many."""
        length = out.tokens.shape[1]
        stream = self._epoch(epoch)
        number = int(np.searchsorted(stream.starts, start, side="right")) - 1
        if self.grid is None:
            row = np.empty(length + 1, np.int64)
            self._fill_plain(row, stream, start, number)
            out.tokens[place], out.targets[place] = row[:-1], row[1:]
            return
        filled = 0
        while filled < length:
            first = start + filled - int(stream.starts[number])
            size = min(length - filled, int(stream.starts[number + 1]) - int(stream.starts[number]) - first)
            span = slice(filled, filled + size)
            self._fill_padded(out, (place, span), int(stream.documents[number]), first)
            filled, number = filled + size, number + 1

    def _fill_plain(self, row: np.ndarray, stream: _Epoch, start: int, number: int) -> None:
        filled = 0
        while filled < len(row):
            first = start + filled - int(stream.starts[number])
            stop = min(first + len(row) - filled, int(stream.starts[number + 1] - stream.starts[number]))
            row[filled : filled + stop - first] = self.shards.read(int(stream.documents[number]), first, stop)
            filled += stop - first
            number += 1

    def _fill_padded(self, out: Rows, at: tuple[int, slice], document: int, first: int) -> None:
        """Inputs `first` and on of a document's places, as many as fit into the span `at` of `out`."""
        row, span = at
        size = span.stop - span.start
        last = min(first + size, int(self.shards.document_tokens[document]))
        tokens = self.shards.read(document, min(max(first - 1, 0), last), last)
        inputs = np.full(size, self.shards.tokenizer.eos_id, np.int64)
        targets = np.full(size, IGNORE_INDEX, np.int64)
        begins = first == 0
        shown, own = tokens[: size - begins], tokens if begins else tokens[1:]
        inputs[begins : begins + len(shown)] = shown
        targets[: len(own)] = own
        out.tokens[row, span], out.targets[row, span] = inputs, targets
        out.resets[row, span.start] = begins

    def _places(self, lengths: np.ndarray) -> np.ndarray:
        """Inputs that documents of these lengths take."""
        return lengths if self.grid is None else -(-lengths // self.grid) * self.grid

    def _epoch(self, epoch: int) -> _Epoch:
        # Two epochs are kept, the latest used, because threads read ahead across an epoch's end.
        with self._lock:
            found = self._epochs.pop(epoch, None)
            if found is None:
                documents = permute(np.arange(self.documents), self.documents, f"{self._order} {epoch}")
                if self._chosen is not None:
                    documents = self._chosen[documents]
                places = self._places(self.shards.document_tokens[documents])
                found = _Epoch(documents, np.concatenate([[0], np.cumsum(places)]))
            self._epochs[epoch] = found
            if len(self._epochs) > 2:
                del self._epochs[next(iter(self._epochs))]
            return found
