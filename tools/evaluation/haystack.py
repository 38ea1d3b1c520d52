"""Text that facts are hidden in, as tokens in which the beginning of every sentence is known.

Sentences are encoded one by one, as they stand behind other text: a prompt put together of them has an exact length.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from pretrain.errors import UserError
from tools.encoding import Tokenizer

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
"""RULER's noise (arXiv 2404.06654), repeated."""
_SENTENCE_END = re.compile(r"(?<=[.!?]) |(?<=[.!?][\"'”’)]) ")
_BATCH = 4096
_SHORT_SENTENCE = 16
"""Tokens."""


@dataclass(frozen=True)
class Haystack:
    """Sentences end to end; a prompt takes as many of their tokens as it has room for, over again where they end."""

    tokens: np.ndarray
    """int32 [N]."""
    starts: np.ndarray
    """int64 [S]: where sentences begin; the first is 0."""

    def take(self, room: int, first: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """`room` tokens from the beginning of sentence `first` (counted modulo S) on, and where facts may stand.

        Returns:
            int32 [room] and int64: the beginnings of sentences in them, in order, from 0 to `room` itself.
        """
        size, begin = len(self.tokens), int(self.starts[first % len(self.starts)])
        turns = max(1, -(-(begin + room) // size))
        tokens = np.tile(self.tokens, turns)[begin : begin + room] if turns > 1 else self.tokens[begin : begin + room]
        places = np.concatenate([self.starts + size * turn for turn in range(turns)]) - begin
        return tokens, np.append(places[(places >= 0) & (places < room)], room)


def encode_sentences(tokenizer: Tokenizer, sentences: Iterable[str], *, joint: str, most: int | None) -> Haystack:
    """A haystack of sentences, each with `joint` before it; no more are read once there are `most` tokens.

    Raises:
        UserError: there are no sentences.
    """
    parts: list[np.ndarray] = []
    lengths: list[int] = []
    total = 0
    source = iter(sentences)
    # Not many more than are needed: a sentence is seldom shorter.
    size = _BATCH if most is None else min(_BATCH, most // _SHORT_SENTENCE + 1)
    while group := list(islice(source, size)):
        for tokens in tokenizer.encode_documents([joint + sentence for sentence in group], begins=False):
            parts.append(np.array(tokens, np.int32))
            lengths.append(len(tokens))
            total += len(tokens)
        if most is not None and total >= most:
            break
    if not total:
        raise UserError("--haystack: holds no sentence; give files with running text")
    return Haystack(np.concatenate(parts), np.concatenate([[0], np.cumsum(lengths[:-1])]).astype(np.int64))


def split_sentences(texts: Iterable[str]) -> Iterator[str]:
    """The sentences of texts, by their punctuation; line breaks and runs of spaces become one space."""
    for text in texts:
        for sentence in _SENTENCE_END.split(re.sub(r"\s+", " ", text).strip()):
            if sentence:
                yield sentence
