"""A bigram model of a shard set's tokens: what a trained model has to beat to have learned more than pairs of tokens.

Interpolated absolute discounting: p(b | a) = max(c(ab) - D, 0) / c(a) + D n(a) / c(a) * p0(b), with c the counts, n(a)
the number of different tokens seen after a, and p0 either the share of the token or, after Kneser and Ney (1995), the
share of the different tokens it was seen after. Discount and kind of p0 are chosen on the end of the training set,
never on held-out text.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pretrain.data import ShardSet
from pretrain.errors import UserError

Base = Literal["share", "continuation"]
DISCOUNTS = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
TAIL = 20  # one document in so many, at the end of the training set, chooses the smoothing
ADDED = 0.5  # count added to every token of p0, so that an unseen token keeps a probability


@dataclass(frozen=True)
class Smoothing:
    """How probability is moved from pairs that were seen to pairs that were not."""

    discount: float
    base: Base


class Bigram:
    """Bigram counts of a token stream under one smoothing."""

    def __init__(self, stream: np.ndarray, vocab_size: int, smoothing: Smoothing) -> None:
        """Count the pairs of `stream`, int64 [N] with N >= 2."""
        self.smoothing = smoothing
        self._vocab_size = vocab_size
        self._pairs, self._pair_counts = np.unique(stream[:-1] * vocab_size + stream[1:], return_counts=True)
        before, after = np.divmod(self._pairs, vocab_size)
        self._context_counts = np.bincount(before, weights=self._pair_counts, minlength=vocab_size)
        self._followers = np.bincount(before, minlength=vocab_size)
        if smoothing.base == "continuation":
            weights = np.bincount(after, minlength=vocab_size) + ADDED
        else:
            weights = np.bincount(after, weights=self._pair_counts, minlength=vocab_size) + ADDED
        self._base = weights / weights.sum()

    def probabilities(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        """p(after | before), float64, for int64 arrays of one shape."""
        key = before * self._vocab_size + after
        place = np.minimum(np.searchsorted(self._pairs, key), len(self._pairs) - 1)
        counts = np.where(self._pairs[place] == key, self._pair_counts[place], 0)
        seen = self._context_counts[before]
        discount = self.smoothing.discount
        kept = np.maximum(counts - discount, 0.0) / np.maximum(seen, 1)
        left = np.where(seen > 0, discount * self._followers[before] / np.maximum(seen, 1), 1.0)
        return kept + left * self._base[after]

    def bits(self, stream: np.ndarray) -> float:
        """-log2 p of all tokens of `stream` but the first, which only opens it."""
        return float(-np.log2(self.probabilities(stream[:-1], stream[1:])).sum())


def token_stream(shards: ShardSet, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Documents start..stop laid end to end behind one EOS, int64 [tokens + 1]: as held-out evaluation reads them."""
    documents = range(start, shards.documents if stop is None else stop)
    pieces = [np.array([shards.tokenizer.eos_id]), *(shards.read(document) for document in documents)]
    return np.concatenate([piece.astype(np.int64) for piece in pieces])


def fit_bigram(shards: ShardSet) -> Bigram:
    """The best bigram model of a training set: the smoothing that codes its last documents best after counting the
    others, then counted on all of it. Raises UserError for a set of fewer than two documents."""
    if shards.documents < 2:
        raise UserError(f"{shards.folder}: one document; a bigram model counts some and is tuned on others: at least 2")
    vocab_size = shards.tokenizer.vocab_size
    split = shards.documents - math.ceil(shards.documents / TAIL)
    counted, tail = token_stream(shards, 0, split), token_stream(shards, split)
    choices = [Smoothing(discount, base) for base in ("share", "continuation") for discount in DISCOUNTS]
    best = min(choices, key=lambda smoothing: Bigram(counted, vocab_size, smoothing).bits(tail))
    return Bigram(token_stream(shards), vocab_size, best)


def bits_per_byte(model: Bigram, shards: ShardSet) -> float:
    """What the model needs for each UTF-8 byte of a set's text."""
    return model.bits(token_stream(shards)) / shards.text_bytes
