"""The order of the training data: rows as a pure function of (seed, epoch, global sample).

In each epoch the documents are permuted and laid end to end as one stream of N tokens. Row p of a length T is the
stream's tokens p*T .. p*T + T inclusive: T inputs and, one further, T targets, so that neighbouring rows share a
token and every token but the first is a target once. An epoch has (N - 1) // T rows; what is left over, fewer than T
tokens, differs with the permutation. With order "rows", a second permutation decides which row is read when.

The permutations are generalised Feistel networks (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002):
any entry is computed on its own in O(1), the definition is a few lines of integer arithmetic, and so the order does
not depend on the version of a random number library.
"""

import hashlib
from dataclasses import dataclass
from math import isqrt
from threading import Lock
from typing import Literal

import numpy as np

from pretrain.data.shards import ShardSet
from pretrain.errors import UserError

Order = Literal["rows", "documents"]

# Entries are permuted in blocks of this many, which stay in the processor's cache.
_BLOCK = 1 << 15


def permute(index: np.ndarray, size: int, key: str) -> np.ndarray:
    """Where a permutation of range(size), chosen by `key`, sends each entry of `index`: int64 [n] -> int64 [n]."""
    if index.size > _BLOCK:
        blocks = np.array_split(index, -(-index.size // _BLOCK))
        return np.concatenate([permute(block, size, key) for block in blocks])
    rounds = np.frombuffer(hashlib.sha512(key.encode()).digest(), "<u8")
    rows = np.uint64(isqrt(size - 1) + 1)
    columns = np.uint64(-(-size // int(rows)))
    out = _feistel(index.astype(np.uint64), rows, columns, rounds)
    # The network permutes rows * columns >= size entries: those that leave the range walk on until they are back.
    while (outside := out >= np.uint64(size)).any():
        out[outside] = _feistel(out[outside], rows, columns, rounds)
    return out.astype(np.int64)


def _feistel(value: np.ndarray, rows: np.uint64, columns: np.uint64, rounds: np.ndarray) -> np.ndarray:
    left, right = np.divmod(value, columns)
    for number, key in enumerate(rounds):
        if number % 2:
            right = _shifted(right, _mixed(left, key), columns)
        else:
            left = _shifted(left, _mixed(right, key), rows)
    return left * columns + right


def _shifted(value: np.ndarray, mixed: np.ndarray, size: np.uint64) -> np.ndarray:
    """(value + a number in range(size) drawn from the upper 32 bits of `mixed`) modulo size, for size < 2^32."""
    value = value + (((mixed >> np.uint64(32)) * size) >> np.uint64(32))
    return np.where(value >= size, value - size, value)


def _mixed(value: np.ndarray, key: np.uint64) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014)."""
    value = value ^ key
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


@dataclass(frozen=True)
class _Epoch:
    documents: np.ndarray  # int64 [documents]: the document at each place
    starts: np.ndarray  # int64 [documents + 1]: where it starts in the epoch's stream


class Packing:
    """The rows of a shard set for one length, seed and order. Thread-safe."""

    def __init__(self, shards: ShardSet, *, sequence_length: int, seed: int, order: Order) -> None:
        """Raises UserError when the set is too small for one row."""
        if shards.tokens < sequence_length + 1:
            raise UserError(
                f"{shards.folder}: holds {shards.tokens} tokens, a row of training.sequence_length {sequence_length} "
                f"takes {sequence_length + 1}; add text or shorten the rows"
            )
        self.shards = shards
        self.sequence_length = sequence_length
        self.seed = seed
        self.order = order
        self.rows_per_epoch = (shards.tokens - 1) // sequence_length
        self._epochs: dict[int, _Epoch] = {}
        self._lock = Lock()

    def read(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and targets, one further, of global samples: int64 [n] -> two int64 [n, sequence_length]."""
        rows = self.rows(samples)
        return np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:])

    def rows(self, samples: np.ndarray) -> np.ndarray:
        """The rows of global samples, int64 [n] -> int64 [n, sequence_length + 1]."""
        out = np.empty((len(samples), self.sequence_length + 1), np.int64)
        epochs, rows = np.divmod(samples, self.rows_per_epoch)
        for epoch in np.unique(epochs):
            places = np.flatnonzero(epochs == epoch)
            numbers = rows[places]
            if self.order == "rows":
                numbers = permute(numbers, self.rows_per_epoch, f"rows {self.seed} {epoch}")
            stream = self._epoch(int(epoch))
            positions = numbers * self.sequence_length
            first = np.searchsorted(stream.starts, positions, side="right") - 1
            for place, position, document in zip(places, positions.tolist(), first.tolist(), strict=True):
                self._fill(out[place], stream, position, document)
        return out

    def _fill(self, out: np.ndarray, epoch: _Epoch, position: int, place: int) -> None:
        """Fills `out` from `position` of the epoch's stream, which lies in the document at `place`."""
        filled = 0
        while filled < len(out):
            start = position + filled - int(epoch.starts[place])
            stop = min(start + len(out) - filled, int(epoch.starts[place + 1] - epoch.starts[place]))
            out[filled : filled + stop - start] = self.shards.read(int(epoch.documents[place]), start, stop)
            filled += stop - start
            place += 1

    def _epoch(self, epoch: int) -> _Epoch:
        # Two epochs are kept, the latest used, because threads read ahead across an epoch's end.
        with self._lock:
            found = self._epochs.pop(epoch, None)
            if found is None:
                everything = np.arange(self.shards.documents)
                documents = permute(everything, self.shards.documents, f"documents {self.seed} {epoch}")
                starts = np.concatenate([[0], np.cumsum(self.shards.document_tokens[documents])])
                found = _Epoch(documents, starts)
            self._epochs[epoch] = found
            if len(self._epochs) > 2:
                del self._epochs[next(iter(self._epochs))]
            return found
