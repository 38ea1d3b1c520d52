"""Shard sets as a source of training rows and of held-out text."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pretrain.data.cursor import Cursor
from pretrain.data.loader import Batch, Division, Loader
from pretrain.data.packing import Packing, Pool, Selection
from pretrain.data.shards import ShardSet, TokenizerInfo
from pretrain.data.validation import sequential_batches


@dataclass(frozen=True)
class ShardSource:
    """Packed rows of a shard set (see `pretrain.data.packing`), pass after pass."""

    shards: ShardSet
    seed: int
    selection: Selection
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
        packing = self._packing(division.sequence_length, division.rows_per_step)
        start = Cursor(
            position=0,
            sequence_length=division.sequence_length,
            seed=self.seed,
            fingerprint=self.shards.fingerprint,
            rows_per_step=division.rows_per_step if self.selection.order == "streams" else None,
            **dict(self.selection),
        )
        changed = (
            f"the data in {self.shards.folder} changed: give the shards that the run began with as data.train, or "
            "start a new run on these"
        )
        return Loader(packing, start.moved_to(cursor, changed), division, self.num_workers)

    def describe(self, total_tokens: int, *, sequence_length: int, rows_per_step: int) -> str:
        """Documents, tokens, passes over them, padding, and what of the rows is of long documents."""
        packing = self._packing(sequence_length, rows_per_step)
        return "; ".join(
            _describe(packing, pool, share * total_tokens)
            for pool, share in zip(packing.pools, (1 - packing.long_share, packing.long_share), strict=True)
            if pool is not None
        )

    def _packing(self, sequence_length: int, rows_per_step: int) -> Packing:
        return Packing(
            self.shards,
            sequence_length=sequence_length,
            seed=self.seed,
            selection=self.selection,
            rows_per_step=rows_per_step,
        )


def _describe(packing: Packing, pool: Pool, tokens: float) -> str:
    """One pool, of which a run reads so many tokens, padding included."""
    stream = pool.stream
    text = f"{stream.documents:,} documents, {stream.tokens:,} tokens: {tokens / stream.inputs:.2f} passes over them"
    if stream.at_least > 1:
        text = text.replace("documents", f"documents of at least {stream.at_least:,} tokens", 1)
    if pool is packing.pools[1]:
        text = f"{100 * packing.long_share:.3g} % of the rows: {text}"
    if stream.grid is not None:
        text += f", padded to multiples of {stream.grid}: {100 * stream.padding:.2f} % of what is read is padding"
    return text


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
