"""What a run knows of its data, whatever kind it is: a section of the recipe, a source to train on, a held-out part.

The loop, resume, evaluation and the dry run use these three and name no kind. A new kind is a subclass of
`SourceConfig` and what its `open` returns, and an entry in `pretrain.data.config.DataConfig`.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, NonNegativeInt

from model import ModelConfig
from pretrain.data.cursor import Cursor
from pretrain.data.damage import Damage
from pretrain.data.loader import Agree, Batch, Division, Loader
from pretrain.data.shards import TokenizerInfo
from pretrain.quantities import Seed


class Share(NamedTuple):
    """A part of a work that several processes divide: every `of`-th piece, from `number` on."""

    number: int
    of: int


class Source(Protocol):
    """Rows without end to train on. A row is a pure function of the seed and its number."""

    @property
    def place(self) -> str:
        """Where the data comes from, as messages say it."""

    @property
    def vocab_size(self) -> int:
        """Smallest vocabulary that holds every token and target."""

    @property
    def tokenizer(self) -> TokenizerInfo | None:
        """The tokenizer that made the tokens; None where they stand for no text."""

    def close(self) -> None:
        """Closes the files that are open; may be called twice. The loaders have to be closed before."""

    @property
    def damage(self) -> list[Damage]:
        """What is left out as damaged, so far."""

    def share_damage(self, agree: Agree, known: Sequence[Damage]) -> None:
        """Makes what this rank has found damaged, of what is `known` of any data too, known to all where damage is left
        out; every rank calls it.
        """

    def open_loader(self, division: Division, cursor: Cursor | None, agree: Agree | None = None) -> Loader:
        """The iterator over a rank's steps, from `cursor` or from the beginning; `agree`: see `Loader`. Raises
        UserError for a cursor of other data.
        """

    def describe(self, total_tokens: int, *, sequence_length: int, rows_per_step: int) -> str:
        """A line about the data and what a run of `total_tokens` is beside it. Raises UserError for data that is too
        small.
        """


class HeldOut(Protocol):
    """Rows that no training row is made of, in an order that is always the same."""

    @property
    def token_bytes(self) -> np.ndarray | None:
        """int64 [vocab_size]: UTF-8 bytes that each token stands for; None where tokens stand for no text."""

    @property
    def has_answers(self) -> bool:
        """Whether each target is the one right answer, so that the share of right ones means something."""

    def batches(
        self, *, sequence_length: int, batch_size: int, max_tokens: int | None, rank: int, world_size: int
    ) -> Iterator[Batch]:
        """This rank's batches [batch_size, sequence_length] of the first `max_tokens` tokens, as many on every rank.
        What does not count has target -100.
        """

    def describe(self) -> str:
        """A line about the data."""

    def close(self) -> None:
        """Closes the files that are open; may be called twice."""


@dataclass(frozen=True)
class Data:
    """What a data section opens. Use it as a context manager, or call `close()`: open files, and the places that they
    keep in a cache, are let go then.
    """

    train: Source
    held_out: HeldOut | None

    def close(self) -> None:
        """Closes both parts; may be called twice."""
        self.train.close()
        if self.held_out is not None:
            self.held_out.close()

    def __enter__(self) -> "Data":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class SourceConfig(BaseModel, ABC):
    """The part of a data section that every kind has."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    kind: str
    """Kind of data."""

    num_workers: NonNegativeInt = 2
    """Threads that prepare steps ahead; 0 prepares them in line. Any number gives the same batches."""

    seed: Seed | None = None
    """Seed of the order of documents and rows, or of their content where it is drawn; none: the run's seed."""

    @property
    @abstractmethod
    def has_held_out(self) -> bool:
        """Whether there is a held-out part."""

    @property
    def carries_state(self) -> bool:
        """Whether each row of a step goes on where the same row of the step before ended."""
        return False

    @property
    def pads_documents(self) -> bool:
        """Whether some of what is read is padding behind documents, and all else has a target."""
        return False

    @property
    def resets_at_documents(self) -> bool:
        """Whether the model's state begins anew at documents inside of rows."""
        return False

    @abstractmethod
    def check_fits(self, *, sequence_length: int, vocab_size: int, held_out_tokens: int | None) -> None:
        """Raises ValueError where the section alone tells that rows or vocabulary are too small for the data, or that
        the held-out part has no `held_out_tokens` (None: all).
        """

    def check_resets(self, model: ModelConfig, *, sequence_length: int, segment_length: int | None) -> None:
        """Raises ValueError where the model's state cannot begin anew, or be carried, as the section asks for."""

    @abstractmethod
    def missing(self) -> Path | None:
        """A folder that the section names and that is not there."""

    def to_verify(self) -> dict[str, int]:
        """The places whose content `open` reads through where it is given a share, with their bytes. Raises
        UserError.
        """
        return {}

    def refuse_damage(self, known: Sequence[Damage]) -> None:
        """Raises UserError where one of these shards ends the run that reads this section."""

    @abstractmethod
    def open(self, seed: int, share: Share | None = None, *, grid: int, places: Collection[str] | None = None) -> Data:
        """Opens and checks the data; `seed` is the one to use (see Recipe.data_seed). Raises UserError.

        Args:
            grid: tokens at whose multiples the model's state may begin anew: ModelConfig.grid.
            share: this process's part in reading all content through, where the section asks for that; None: nothing is
                read through.
            places: those of `to_verify` that are read through, others have been; None: all.
        """
