"""What every synthetic task is: a config that says its vocabulary and longest row, and draws rows."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict

from pretrain.data.rows import IGNORE_INDEX
from pretrain.data.synthetic.draws import Draws
from pretrain.quantities import TokensOrZero

PAD, ASK, MARK = range(3)
"""Tokens that every task has: what stands after a row's end; what is asked from here on; what follows is to be kept."""
NUM_SPECIAL = 3


def _as_range(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else (value, value)


def _in_order(span: tuple[int, int]) -> tuple[int, int]:
    if span[0] > span[1]:
        raise ValueError(f"the range begins at {span[0]} and ends before, at {span[1]}: swap them")
    return span


TokenRange = Annotated[tuple[TokensOrZero, TokensOrZero], BeforeValidator(_as_range), AfterValidator(_in_order)]
"""A number of tokens, or [low, high], from which it is drawn for each row, both included."""


class Task(BaseModel, ABC):
    """A task: the same draws give the same row."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    kind: str
    """Kind of task."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of different tokens, the special ones included."""

    @property
    @abstractmethod
    def row_tokens(self) -> int:
        """Tokens of the longest row."""

    @property
    @abstractmethod
    def chance(self) -> float:
        """Share of the answers that guessing gets right for one who knows the task and none of the row."""

    @abstractmethod
    def draw(self, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
        """A row: tokens and targets, int64 [n] with n at most row_tokens; targets that don't count are -100."""


def next_token_row(
    parts: Sequence[tuple[np.ndarray | int, np.ndarray | bool]],
) -> tuple[np.ndarray, np.ndarray]:
    """The row of the parts' tokens, end to end, in which the tokens marked True are to be predicted.

    A part is its tokens, int64 of any shape, and their marks, of a shape that broadcasts to it. The last token is a
    target only, so n + 1 tokens give a row of n.
    """
    stream = np.concatenate([np.ravel(tokens) for tokens, _ in parts])
    answers = np.concatenate([np.where(marks, tokens, IGNORE_INDEX).ravel() for tokens, marks in parts])
    return stream[:-1], answers[1:]
