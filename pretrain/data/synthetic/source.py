"""A synthetic task as a source of training rows and of held-out rows."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pretrain.data.cursor import Cursor
from pretrain.data.damage import Damage
from pretrain.data.loader import Agree, Batch, Division, Loader, RowReader, require_positive, require_rank
from pretrain.data.rows import IGNORE_INDEX, Rows
from pretrain.data.synthetic.draws import Draws, Split
from pretrain.data.synthetic.task import PAD, Task
from pretrain.errors import UserError

_GENERATION = 1
"""Part of the fingerprint: raised when the same task begins to give other rows."""


def fingerprint(task: Task) -> str:
    """sha256 over all that the rows of one seed depend on."""
    content = {"synthetic": _GENERATION, "task": task.model_dump(mode="json")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class DrawnRows(RowReader):
    """Rows of a task by number, padded to one length."""

    task: Task
    seed: int
    split: Split
    sequence_length: int

    def read(self, samples: np.ndarray) -> Rows:
        """Tokens and targets of samples, int64 [n]."""
        tokens = np.full((len(samples), self.sequence_length), PAD, np.int64)
        targets = np.full((len(samples), self.sequence_length), IGNORE_INDEX, np.int64)
        for place, sample in enumerate(samples.tolist()):
            row, answers = self.task.draw(Draws(self.seed, self.split, sample))
            tokens[place, : len(row)] = row
            targets[place, : len(row)] = answers
        return Rows(tokens, targets)


@dataclass(frozen=True)
class SyntheticSource:
    """Training rows of a task, drawn one by one."""

    task: Task
    seed: int
    num_workers: int
    tokenizer = None

    @property
    def place(self) -> str:
        """Where the data comes from, as messages say it."""
        return f"data.task {self.task.kind}"

    @property
    def vocab_size(self) -> int:
        """Tokens of the task."""
        return self.task.vocab_size

    def open_loader(self, division: Division, cursor: Cursor | None, agree: Agree | None = None) -> Loader:
        """The iterator over a rank's steps; nothing of it can be damaged. Raises UserError for a cursor of other
        data.
        """
        rows = DrawnRows(self.task, self.seed, "train", division.sequence_length)
        start = Cursor(
            position=0,
            sequence_length=division.sequence_length,
            seed=self.seed,
            order="drawn",
            fingerprint=fingerprint(self.task),
        )
        if cursor is not None:
            cursor.require_order_of(start)
            if changed := cursor.data_differences(start):
                raise UserError(
                    f"the checkpoint's data cursor does not fit this run: {'; '.join(changed)}: data.task is not what "
                    "the run began with: set it back, or start a new run"
                )
        return Loader(rows, start if cursor is None else cursor, division, self.num_workers)

    @property
    def damage(self) -> list[Damage]:
        """None: no file is read."""
        return []

    def share_damage(self, agree: Agree, known: Sequence[Damage]) -> None:
        """Nothing: there is none."""

    def close(self) -> None:
        """Nothing: no file is open."""

    def describe(self, total_tokens: int, *, sequence_length: int, rows_per_step: int) -> str:
        """The task's numbers."""
        task = self.task
        return (
            f"{task.kind}, {task.vocab_size:,} different tokens, rows of up to {task.row_tokens:,}; guessing gets "
            f"{100 * task.chance:.2g} % right"
        )


@dataclass(frozen=True)
class HeldOutDraws:
    """Rows of a task from a stream that training never draws from."""

    task: Task
    seed: int
    token_bytes = None
    has_answers = True

    def batches(
        self, *, sequence_length: int, batch_size: int, max_tokens: int | None, rank: int = 0, world_size: int = 1
    ) -> Iterator[Batch]:
        """Batches of the first rows, so many that they hold `max_tokens` tokens.

        Each row is on one rank; every rank gets the same number of batches; rows left over have no targets. Raises
        UserError for a size that is not positive, and where all tokens are asked for: there is no end of them.
        """
        if max_tokens is None:
            raise UserError("evaluation.tokens: none, which means all, but drawn rows have no end: give a number")
        require_positive(
            sequence_length=sequence_length, batch_size=batch_size, max_tokens=max_tokens, world_size=world_size
        )
        require_rank(rank, world_size)
        return self._batches(sequence_length, batch_size, -(-max_tokens // sequence_length), rank, world_size)

    def describe(self) -> str:
        """Where the rows come from."""
        return "rows of the same task from another stream"

    def close(self) -> None:
        """Nothing: no file is open."""

    def _batches(self, length: int, batch_size: int, total: int, rank: int, world_size: int) -> Iterator[Batch]:
        rows = DrawnRows(self.task, self.seed, "held-out", length)
        rows_a_step = batch_size * world_size
        for step in range(-(-total // rows_a_step)):
            start = step * rows_a_step + rank * batch_size
            tokens, targets, _ = rows.read(np.arange(start, start + batch_size))
            targets[max(total - start, 0) :] = IGNORE_INDEX
            yield Batch(torch.from_numpy(tokens), torch.from_numpy(targets))
