"""The training loader: this rank's part of every step, read ahead by threads.

Global sample of (step s, micro-batch m, rank r, row j), with mb rows a micro-batch and G = mb * accumulation *
world_size:

    position at the start + s * G + (m * world_size + r) * mb + j

Each step is computed on its own from its number, so workers need no order among themselves: any number of them gives
the same steps.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pretrain.data.cursor import Cursor
from pretrain.data.damage import Damage, DamagedShard
from pretrain.data.rows import Rows
from pretrain.errors import UserError

# Enough that a worker is never idle while another's step waits to be taken.
STEPS_AHEAD_PER_WORKER = 2

Agree = Callable[[Any], list[Any]]
"""Gathers what every rank gives, by rank, on every rank."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank: `tokens` and `targets`, int64 [micro_batch_size, sequence_length] on the CPU, and
    `resets`, bool of the same shape, True where a row's state begins anew (see `pretrain.data.rows`), or None.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    resets: torch.Tensor | None = None


class RowReader(ABC):
    """Rows by number. Reading is thread-safe."""

    @abstractmethod
    def read(self, samples: np.ndarray) -> Rows:
        """The rows of global samples, int64 [n]."""

    def cursor_at(self, start: Cursor, position: int) -> Cursor:
        """The cursor of a run that began at `start` and has taken the rows up to `position`."""
        return start.model_copy(update={"position": position})

    def curves_at(self, position: int) -> dict[str, float]:
        """What is drawn of the data over the steps."""
        return {}

    def skip(self, damage: Sequence[Damage]) -> None:
        """Leaves out what these shards hold from now on."""
        raise NotImplementedError("rows without shards hold no damage")


def require_positive(**sizes: int) -> None:
    """Raises UserError for a size below 1."""
    for name, value in sizes.items():
        if value < 1:
            raise UserError(f"{name} {value}: must be at least 1")


def require_rank(rank: int, world_size: int) -> None:
    """Raises UserError for a rank outside its world."""
    if not 0 <= rank < world_size:
        raise UserError(f"rank {rank}: must be at least 0 and below world_size {world_size}")


@dataclass(frozen=True)
class Division:
    """How the rows of every step are dealt out, and whose part is meant. Raises UserError for a size that is not
    positive, and a rank outside its world.
    """

    sequence_length: int
    micro_batch_size: int
    accumulation: int
    rank: int
    world_size: int

    def __post_init__(self) -> None:
        require_positive(**{name: size for name, size in vars(self).items() if name != "rank"})
        require_rank(self.rank, self.world_size)

    @property
    def rows_per_step(self) -> int:
        """Rows of a step over all ranks."""
        return self.accumulation * self.world_size * self.micro_batch_size

    @property
    def layout(self) -> tuple[int, int, int]:
        """The shape in which a step's samples are dealt out: micro-batch, rank, row."""
        return self.accumulation, self.world_size, self.micro_batch_size


class Loader:
    """Iterates over steps: each `next()` gives the list, `accumulation` long, of this rank's Batches. Never ends.

    Use it as a context manager, or call `close()`: either ends its workers. One consumer at a time.
    """

    def __init__(
        self,
        rows: RowReader,
        start: Cursor,
        division: Division,
        num_workers: int,
        agree: Agree | None = None,
        changes: Sequence[str] = (),
    ) -> None:
        """`rows` are of `division.sequence_length`. Raises UserError for a negative number of workers.

        Args:
            agree: gathers what every rank gives, by rank, on every rank. With it a damaged shard is left out, by all
                ranks from the same step on; without it, it is an error.
            changes: what of the data is not as it was when the run began, which was allowed.
        """
        if num_workers < 0:
            raise UserError(f"data.num_workers {num_workers}: must be at least 0")
        self.changes = tuple(changes)
        self._rows = rows
        self._start = start
        self._agree = agree
        self._layout = division.layout
        self._rank = division.rank
        self._step_samples = division.rows_per_step
        self._taken = 0  # steps handed out
        self._pool = ThreadPoolExecutor(num_workers, "data") if num_workers else None
        self._ahead: deque[Future[list[Batch]]] = deque()
        self._num_ahead = num_workers * STEPS_AHEAD_PER_WORKER
        self._closed = False

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> list[Batch]:
        """The next step; raises what reading it raised, again at each call: a step is never left out."""
        if self._closed:
            raise RuntimeError("the data loader is closed")
        batches = self._prepared() if self._agree is None else self._agreed(self._agree)
        if self._ahead:
            self._ahead.popleft()
        self._taken += 1
        return batches

    def cursor(self) -> Cursor:
        """The place after the steps handed out so far; what was only read ahead does not count."""
        return self._rows.cursor_at(self._start, self._position)

    def curves(self) -> dict[str, float]:
        """What is drawn of the data over the steps: passes, shares of sources, shards that are left out."""
        return self._rows.curves_at(self._position)

    def close(self) -> None:
        """Ends the workers and waits for them; may be called twice."""
        self._closed = True
        self._ahead.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _position(self) -> int:
        return self._start.position + self._taken * self._step_samples

    def _prepared(self) -> list[Batch]:
        """The next step, which stays the next one."""
        if self._pool is None:
            return self._read_step(self._taken)
        while len(self._ahead) < self._num_ahead:
            self._ahead.append(self._pool.submit(self._read_step, self._taken + len(self._ahead)))
        return self._ahead[0].result()

    def _agreed(self, agree: Agree) -> list[Batch]:
        """The next step, without what is damaged for any rank."""
        while True:
            batches: list[Batch] = []
            damage = None
            try:
                batches = self._prepared()
            except DamagedShard as error:
                damage = error.damage
            found = [each for each in agree(damage) if each is not None]
            if not found:
                return batches
            self._rows.skip(found)
            for future in self._ahead:  # it was read with those shards, or failed for them
                future.cancel()
            self._ahead.clear()

    def _read_step(self, step: int) -> list[Batch]:
        first = self._start.position + step * self._step_samples
        samples = np.arange(first, first + self._step_samples).reshape(self._layout)[:, self._rank]
        rows = [x for x in self._rows.read(samples.ravel()) if x is not None]
        parts = (torch.from_numpy(x).view(*samples.shape, -1) for x in rows)
        return [Batch(*part) for part in zip(*parts, strict=True)]
