"""The tasks: associative recall, pass-key, copying, and products of permutations."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from functools import cache
from math import factorial
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from pretrain.data.rows import IGNORE_INDEX
from pretrain.data.synthetic.draws import Draws
from pretrain.data.synthetic.task import ASK, MARK, NUM_SPECIAL, Task, TokenRange, next_token_row


class FillerTask(Task):
    """A task that writes, waits and asks: filler stands between."""

    filler: TokenRange = (64, 64)
    """Tokens of filler in a row, a number or [low, high] to draw it from."""

    num_filler: int = Field(default=16, ge=1)
    """Different filler tokens; they follow all others in the vocabulary."""

    @property
    @abstractmethod
    def num_content(self) -> int:
        """Different tokens that are written and asked; they follow the special ones."""

    @property
    def vocab_size(self) -> int:
        """Special tokens, content, filler."""
        return NUM_SPECIAL + self.num_content + self.num_filler

    def draw_filler(self, draws: Draws) -> np.ndarray:
        """The filler of a row."""
        count = draws.between(*self.filler)
        return NUM_SPECIAL + self.num_content + draws.below(self.num_filler, count)


class Recall(FillerTask):
    """Associative recall of several pairs: `key value key value ... filler ASK key value key value ...`, with the
    values after ASK as targets (multi-query associative recall, Arora et al., arXiv 2312.04927). A row's keys differ.
    """

    kind: Literal["recall"] = "recall"
    """Key-value pairs are written, then the values of some keys asked, at least `filler` tokens later."""

    num_pairs: int = Field(default=8, ge=1)
    """Pairs written."""

    num_queries: int = Field(default=8, ge=1)
    """Keys asked, each once, in an order of their own: at most num_pairs."""

    num_keys: int = Field(default=32, ge=1)
    """Different keys, from which each row draws its own."""

    num_values: int = Field(default=32, ge=2)
    """Different values."""

    @model_validator(mode="after")
    def _keys_are_enough(self) -> Recall:
        if self.num_queries > self.num_pairs:
            raise ValueError(
                f"num_queries {self.num_queries} is above num_pairs {self.num_pairs}: a key asked twice has its answer "
                "in the row; ask fewer, or write more"
            )
        if self.num_pairs > self.num_keys:
            raise ValueError(f"num_pairs {self.num_pairs} is above num_keys {self.num_keys}: raise num_keys")
        return self

    @property
    def num_content(self) -> int:
        """Keys, then values."""
        return self.num_keys + self.num_values

    @property
    def row_tokens(self) -> int:
        """Pairs, filler, ASK, queries and all answers but the last."""
        return 2 * self.num_pairs + self.filler[1] + 2 * self.num_queries

    @property
    def chance(self) -> float:
        """One of the values."""
        return 1 / self.num_values

    def draw(self, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
        """See Task."""
        keys = NUM_SPECIAL + draws.distinct(self.num_keys, self.num_pairs)
        values = NUM_SPECIAL + self.num_keys + draws.below(self.num_values, self.num_pairs)
        asked = draws.distinct(self.num_pairs, self.num_queries)
        pairs = np.stack([keys, values], 1)
        questions = pairs[asked]
        written = [(pairs, False), (self.draw_filler(draws), False)]
        return next_token_row([*written, (ASK, False), (questions, np.array([False, True]))])


class Passkey(FillerTask):
    """A pass-key in filler: `filler MARK digits filler ASK digits`, with the digits after ASK as targets."""

    kind: Literal["passkey"] = "passkey"
    """A pass-key is written once within the filler, and asked at its end."""

    length: int = Field(default=5, ge=1)
    """Digits of the pass-key."""

    num_digits: int = Field(default=10, ge=2)
    """Different digits."""

    depth: float | None = Field(default=None, ge=0, le=1)
    """Where it is written: the share of the filler that stands before it; none: drawn for each row."""

    @property
    def num_content(self) -> int:
        """Digits."""
        return self.num_digits

    @property
    def row_tokens(self) -> int:
        """Filler, MARK, digits, ASK, all digits but the last."""
        return self.filler[1] + 2 * self.length + 1

    @property
    def chance(self) -> float:
        """One of the digits."""
        return 1 / self.num_digits

    def draw(self, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
        """See Task."""
        digits = NUM_SPECIAL + draws.below(self.num_digits, self.length)
        filler = self.draw_filler(draws)
        before = draws.between(0, len(filler)) if self.depth is None else round(self.depth * len(filler))
        written = [(filler[:before], False), (MARK, False), (digits, False), (filler[before:], False)]
        return next_token_row([*written, (ASK, False), (digits, True)])


class Copy(FillerTask):
    """Copying: `symbols filler ASK symbols`, with the symbols after ASK as targets."""

    kind: Literal["copy"] = "copy"
    """A sequence is written, and asked as a whole after the filler."""

    length: int = Field(default=16, ge=1)
    """Symbols of the sequence."""

    num_symbols: int = Field(default=16, ge=2)
    """Different symbols."""

    @property
    def num_content(self) -> int:
        """Symbols."""
        return self.num_symbols

    @property
    def row_tokens(self) -> int:
        """Symbols, filler, ASK, all symbols but the last."""
        return 2 * self.length + self.filler[1]

    @property
    def chance(self) -> float:
        """One of the symbols."""
        return 1 / self.num_symbols

    def draw(self, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
        """See Task."""
        symbols = NUM_SPECIAL + draws.below(self.num_symbols, self.length)
        filler = self.draw_filler(draws)
        return next_token_row([(symbols, False), (filler, False), (ASK, False), (symbols, True)])


class Permutations(Task):
    """State tracking: a word in a symmetric group, with the product so far as target. From degree 5 on, the word
    problem is complete for NC1, which transformers of constant depth and linear state-space models are believed not to
    reach (Merrill et al., arXiv 2404.08819).

    Permutation number i of the lexicographic order is the token NUM_SPECIAL + i, as a letter and as a product. The
    product of p_1 .. p_t is the permutation that applies p_1 first and p_t last.
    """

    kind: Literal["permutations"] = "permutations"
    """A word of permutations is read, and their product so far asked at each letter or at each few."""

    degree: int = Field(default=5, ge=2, le=6)
    """Things permuted: 5 for S5, with 120 letters."""

    length: TokenRange = (32, 32)
    """Letters of the word, a number or [low, high] to draw it from."""

    every: int = Field(default=1, ge=1)
    """Letters from one target to the next: 1 asks at each letter, the word's length at the last alone."""

    @model_validator(mode="after")
    def _something_is_asked(self) -> Permutations:
        if self.every > self.length[0]:
            raise ValueError(
                f"every {self.every} is above length {self.length[0]}: a word of that length would have no target; "
                "lower every"
            )
        return self

    @property
    def vocab_size(self) -> int:
        """Special tokens and permutations."""
        return NUM_SPECIAL + factorial(self.degree)

    @property
    def row_tokens(self) -> int:
        """The longest word."""
        return self.length[1]

    @property
    def chance(self) -> float:
        """One of the permutations."""
        return 1 / factorial(self.degree)

    def draw(self, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
        """See Task."""
        word = draws.below(factorial(self.degree), draws.between(*self.length))
        table = products(self.degree)
        running = np.fromiter(itertools.accumulate(word.tolist(), lambda first, then: table[first][then]), np.int64)
        targets = np.full(len(word), IGNORE_INDEX, np.int64)
        asked = slice(self.every - 1, None, self.every)
        targets[asked] = NUM_SPECIAL + running[asked]
        return NUM_SPECIAL + word, targets


@cache
def products(degree: int) -> list[list[int]]:
    """The group's table: entry [a][b] is the number of the permutation that applies number a, then number b."""
    group = np.array(list(itertools.permutations(range(degree))))
    place_values = degree ** np.arange(degree)
    numbers = np.zeros(degree**degree, np.int64)
    numbers[group @ place_values] = np.arange(len(group))
    return [numbers[group[:, first] @ place_values].tolist() for first in group]
