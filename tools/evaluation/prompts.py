"""Long prompts of an exact number of tokens, with facts at asked depths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pretrain.errors import UserError
from tools.encoding import Tokenizer
from tools.evaluation.haystack import Haystack


@dataclass(frozen=True)
class Fact:
    """A text among the haystack's sentences."""

    text: str
    depth: float
    """Where it was asked for: 0 at the haystack's beginning, 1 at its end."""
    start: int
    """Its first token's place in the prompt."""
    stop: int
    """The place behind its last one."""


@dataclass(frozen=True)
class Prompt:
    """A question about a long text."""

    task: str
    length: int
    """Tokens of the prompt and of the longest answer that is awaited."""
    depth: float | None
    """What was asked for; None: facts lie all over the text."""
    sample: int
    """Number among those of a task, length and depth."""
    tokens: np.ndarray
    """int32 [length - answer tokens]; begins with EOS, as texts in training do behind one."""
    context: slice
    """Where the haystack with its facts stands."""
    facts: tuple[Fact, ...]
    question: str
    answers: tuple[str, ...]
    left_out: int = 0
    """Stories that were drawn before this one and are too long for `length`."""

    def fields(self) -> dict[str, Any]:
        """JSON-ready, without the text."""
        facts = [{"text": fact.text, "depth": fact.depth, "token": fact.start} for fact in self.facts]
        return {
            "task": self.task, "length": self.length, "depth": self.depth, "sample": self.sample,
            "prompt_tokens": len(self.tokens), "question": self.question, "answers": list(self.answers), "facts": facts,
            "left_out": self.left_out,
        }  # fmt: skip


def require_answer_room(tokenizer: Tokenizer, answers: Sequence[str], answer_tokens: int, name: str) -> None:
    """Raises UserError where a right answer is longer than what a model may write."""
    needed = len(tokenizer.encode(f" {', '.join(answers)}", begins=False))
    if needed > answer_tokens:
        raise UserError(f"{name}: a right answer takes {needed} tokens, more than --answer-tokens {answer_tokens}")


def compose(
    tokenizer: Tokenizer,
    haystack: Haystack,
    *,
    before: str,
    facts: Sequence[tuple[float, str]],
    after: str,
    length: int,
    first_sentence: int,
    name: str,
) -> tuple[np.ndarray, slice, tuple[Fact, ...]]:
    """A prompt of exactly `length` tokens: `before`, the haystack with facts between its sentences, `after`.

    Facts stand between the sentences nearest to their depths, in the order given where those are equal. The last
    sentence breaks off where the length is reached.

    Args:
        facts: (depth, text), a depth from 0 to 1 of the haystack without its facts.
        first_sentence: of the haystack.
        name: what the prompt is, for errors.

    Returns:
        Its tokens, int32 [length]; where the haystack stands in them; the facts by place.

    Raises:
        UserError: there is no room for all facts.
    """
    head = np.array([tokenizer.eos_id, *tokenizer.encode(before)], np.int32)
    tail = np.array(tokenizer.encode(after, begins=False), np.int32)
    ordered = sorted(facts, key=lambda fact: fact[0])
    texts = tokenizer.encode_documents([text for _, text in ordered], begins=False)
    encoded = [np.array(tokens, np.int32) for tokens in texts]
    needed = len(head) + len(tail) + sum(map(len, encoded))
    room = length - needed
    if room < 0:
        raise UserError(f"{name}: {length:,} tokens are too few: the question and its facts alone take {needed:,}")
    tokens, places = haystack.take(room, first_sentence)
    spots = [int(places[np.abs(places - depth * room).argmin()]) for depth, _ in ordered]
    pieces, placed, at, read = [head], [], len(head), 0
    for (depth, text), own, spot in zip(ordered, encoded, spots, strict=True):
        pieces += [tokens[read:spot], own]
        at += spot - read
        placed.append(Fact(text.strip(), depth, at, at + len(own)))
        at, read = at + len(own), spot
    pieces += [tokens[read:], tail]
    return np.concatenate(pieces), slice(len(head), length - len(tail)), tuple(placed)
