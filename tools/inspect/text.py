"""A text as the tokens that a model reads, and the stretches of it that people see: tokens, sentences, an answer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import accumulate, pairwise

from pretrain.errors import UserError
from tools.encoding import Tokenizer

# A sentence goes to its closing mark, with the quotes and brackets behind it, before white space; or to a line's end.
_SENTENCE_END = re.compile(r"""[.!?…]+["'”’)\]]*(?=\s)|[。！？]+|\n+""")


@dataclass(frozen=True)
class Reading:
    """What a model reads: EOS, as between the documents of training, then the text, a query and an answer."""

    tokens: list[int]
    """EOS first; the tokens are those of text, query and answer as one text."""
    shown: list[str]
    """What each token stands for; of a character of several tokens the last one has it, the others nothing."""
    text: range
    """The tokens of the text itself."""
    answer: range
    """The tokens that hold any of the answer; empty where none is given."""
    words: str
    """The text itself, as far as it is read."""
    is_cut: bool
    """Whether it goes on."""
    offsets: list[int]
    """Where each token begins in the UTF-8 bytes of the text, and where the last one ends; EOS is at 0, of no bytes."""

    def of_bytes(self, start: int, stop: int) -> range:
        """The tokens that begin in bytes start..stop."""
        inside = [index for index in range(1, len(self.tokens)) if start <= self.offsets[index] < stop]
        return range(inside[0], inside[-1] + 1) if inside else range(0)


def read(tokenizer: Tokenizer, text: str, *, query: str = "", answer: str = "", max_tokens: int) -> Reading:
    """The text, cut after `max_tokens` tokens, and what follows it.

    Raises:
        UserError: there is no text, or the tokenizer has no token that ends documents.
    """
    if not text:
        raise UserError("the text is empty: there is nothing to read")
    if tokenizer.eos_id is None:
        raise UserError(f"{tokenizer.path}: has no EOS token, behind which a text begins; make it with tools.tokenizer")
    whole, text = text, _cut(tokenizer, text, max_tokens)
    data = (text + query + answer).encode()
    tokens, offsets = _offsets(tokenizer, text + query + answer)
    ends = [len(text.encode()), len((text + query).encode())]
    behind_text = next((i for i, start in enumerate(offsets[:-1]) if start >= ends[0]), len(tokens))
    answered = next((i for i, stop in enumerate(offsets[1:]) if stop > ends[1]), len(tokens))
    return Reading(
        tokens=[tokenizer.eos_id, *tokens],
        shown=[tokenizer.piece(tokenizer.eos_id), *_shown(data, offsets)],
        text=range(1, 1 + behind_text),
        answer=range(1 + answered, 1 + len(tokens)),
        words=text,
        is_cut=text != whole,
        offsets=[0, *offsets],
    )


def sentences(text: str) -> list[tuple[int, int]]:
    """Stretches of the UTF-8 bytes of a text, each a sentence with the white space before it; together the whole."""
    edges = sorted({0, *(match.end() for match in _SENTENCE_END.finditer(text)), len(text)})
    pieces = [text[first:last] for first, last in pairwise(edges)]
    joined: list[str] = []
    for piece in pieces:  # white space alone is no sentence
        if joined and (not piece.strip() or not joined[-1].strip()):
            joined[-1] += piece
        else:
            joined.append(piece)
    return list(pairwise(accumulate((len(piece.encode()) for piece in joined), initial=0)))


def _cut(tokenizer: Tokenizer, text: str, max_tokens: int) -> str:
    """The longest beginning of the text, in whole tokens and characters, of no more tokens."""
    tokens, offsets = _offsets(tokenizer, text)
    keep = max_tokens
    while len(tokens) > max_tokens:  # what is cut may become more tokens than it was in the whole
        text = text.encode()[: offsets[keep]].decode(errors="ignore")
        tokens, offsets = _offsets(tokenizer, text)
        keep = min(keep, len(tokens)) - 1
    return text


def _offsets(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[int]]:
    """The tokens of a text, and where each begins in its UTF-8 bytes, and where the last one ends."""
    tokens = tokenizer.encode(text)
    lengths = tokenizer.token_bytes()[tokens].astype(int).tolist()
    prefix = sum(lengths) - len(text.encode())  # the tokenizer's own space before every text, where it has one
    return tokens, [max(0, at - prefix) for at in accumulate(lengths, initial=0)]


def _shown(data: bytes, offsets: list[int]) -> list[str]:
    shown, begin = [], 0
    for stop in offsets[1:]:
        try:
            shown.append(data[begin:stop].decode())
            begin = stop
        except UnicodeDecodeError:  # inside a character
            shown.append("")
    return shown
