"""Shard sets as a source of training rows and of held-out text."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pretrain.data.cursor import Cursor
from pretrain.data.loader import Batch, Division, Loader
from pretrain.data.packing import Order, Packing
from pretrain.data.shards import ShardSet, TokenizerInfo
from pretrain.data.validation import sequential_batches


@dataclass(frozen=True)
class ShardSource:
    """Packed rows of a shard set (see `pretrain.data.packing`), pass after pass."""

    shards: ShardSet
    seed: int
    order: Order
    num_workers: int

    @property
    def place(self) -> str:
        """Where the data comes from, as messages say it."""
        return f"the tokenizer of {self.shards.folder}"

    @property
    def vocab_size(self) -> int:
        """Pieces of the tokenizer."""
        return self.shards.tokenizer.vocab_size

    @property
    def tokenizer(self) -> TokenizerInfo | None:
        """The tokenizer that made the shards."""
        return self.shards.tokenizer

    def open_loader(self, division: Division, cursor: Cursor | None) -> Loader:
        """The iterator over a rank's steps. Raises UserError for a set too small for one row, and a cursor of other
        data, length, seed or order.
        """
        length = division.sequence_length
        packing = Packing(self.shards, sequence_length=length, seed=self.seed, order=self.order)
        start = Cursor(
            position=0,
            sequence_length=length,
            seed=self.seed,
            order=self.order,
            fingerprint=self.shards.fingerprint,
        )
        changed = (
            f"the data in {self.shards.folder} changed: give the shards that the run began with as data.train, or "
            "start a new run on these"
        )
        return Loader(packing, start.moved_to(cursor, changed), division, self.num_workers)

    def describe(self, total_tokens: int) -> str:
        """Documents, tokens, and passes over them."""
        shards = self.shards
        return (
            f"{shards.documents:,} documents, {shards.tokens:,} tokens: {total_tokens / shards.tokens:.2f} passes over "
            "them"
        )


@dataclass(frozen=True)
class HeldOutShards:
    """A shard set read in stored order, every token a target once."""

    shards: ShardSet
    has_answers = False

    @property
    def token_bytes(self) -> np.ndarray | None:
        """int64 [vocab_size]: UTF-8 bytes of text that each token stands for."""
        return self.shards.token_bytes

    def batches(
        self, *, sequence_length: int, batch_size: int, max_tokens: int | None, rank: int, world_size: int
    ) -> Iterator[Batch]:
        """See `pretrain.data.validation.sequential_batches`."""
        return sequential_batches(
            self.shards,
            sequence_length=sequence_length,
            batch_size=batch_size,
            max_tokens=max_tokens,
            rank=rank,
            world_size=world_size,
        )

    def describe(self) -> str:
        """Documents and tokens."""
        return f"{self.shards.documents:,} documents, {self.shards.tokens:,} tokens"
