"""Random numbers of one row: a pure function of (seed, split, sample), by the counter-based generator Philox.

Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) turns a key and a counter into random
bits. Here the key is (seed, split) and the counter's second word the sample, so that any row is reached at once, no two
rows share a block of bits, and the splits are different streams. Only the raw bits are taken from numpy, as they alone
are the same in all its versions.
"""

from typing import Literal

import numpy as np

Split = Literal["train", "held-out"]
_SPLITS: dict[Split, int] = {"train": 1, "held-out": 2}
_WORD = (1 << 64) - 1


class Draws:
    """The draws of one row, in the order in which they are asked for."""

    def __init__(self, seed: int, split: Split, sample: int) -> None:
        key = np.array([seed & _WORD, _SPLITS[split]], np.uint64)
        self._bits = np.random.Philox(key=key, counter=np.array([0, sample, 0, 0], np.uint64))

    def below(self, bound: int | np.ndarray, count: int) -> np.ndarray:
        """`count` independent numbers from range(bound), bound (one, or one for each) at most 2^31: int64 [count]."""
        bits = self._bits.random_raw(count) >> np.uint64(32)
        return ((bits * np.asarray(bound, np.uint64)) >> np.uint64(32)).astype(np.int64)

    def between(self, low: int, high: int) -> int:
        """A number from low to high, both included."""
        return low + int(self.below(high - low + 1, 1)[0])

    def distinct(self, bound: int, count: int) -> np.ndarray:
        """`count` different numbers from range(bound) in random order: int64 [count]."""
        places = np.arange(count)
        picks = places + self.below(bound - places, count)
        moved: dict[int, int] = {}  # the entries of range(bound) that the shuffle has moved so far
        chosen = []
        for place, pick in enumerate(picks.tolist()):
            chosen.append(moved.get(pick, pick))
            moved[pick] = moved.get(place, place)
        return np.array(chosen, np.int64)
