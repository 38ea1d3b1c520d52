"""Rows scored in pieces, the state handed on: sums, and the loss by position with the memory carried and with it reset.

A position is a target's place in its row, from 0. Rows may be cut from documents laid end to end; then it says how much
the model has read since the row's beginning, not where in its document the target stands.

The comparison of a carried memory with one that is reset every `reset_window` tokens changes the memory alone: at
positions that are a multiple of the window its weights go back to what training gave them, its momentum to none.
Attention's cache, the tails of convolutions and positions go on, so that the difference is what the memory gives. (What
the cache still shows of the tokens before, it was made of under the memory of then.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from model import ModelConfig, ModelState
from parallel.mesh import Mesh

IGNORED = -100
"""The target of a token that does not count."""

_FIRST_POSITIONS = (0, *(64 << number for number in range(40)))
"""Where buckets of positions begin: 0..63, 64..127, 128..255, and so on."""


class Batch(Protocol):
    """One rank's micro-batch: tokens and targets, int64 [B, T], targets of -100 do not count; and resets, bool [B, T]
    on the CPU, True where a row begins a document and its state begins anew, or None.
    """

    @property
    def tokens(self) -> Tensor: ...

    @property
    def targets(self) -> Tensor: ...

    @property
    def resets(self) -> Tensor | None: ...


class Rows(NamedTuple):
    """A batch, or a part of one."""

    tokens: Tensor
    targets: Tensor
    resets: Tensor | None = None


Read = Callable[[Rows, ModelState | None, bool], tuple[Any, ModelState | None]]
"""(a piece of rows, the state before it or None at a beginning, whether more follows) to what is made of it, and the
state after it where more follows."""


class Piece(NamedTuple):
    """A piece of all rows of a batch."""

    start: int
    """Position of its first target."""

    targets: Tensor
    """int64 [B, t]."""

    carried: Any
    """What `read` made of it with the memory carried from the row's beginning."""

    reset: Any
    """What it made of it with the memory reset; None unless asked for."""


def read_in_pieces(
    batch: Batch, read: Read, *, length: int | None, reset_window: int | None = None, end: int | None = None
) -> Iterator[Piece]:
    """Reads rows from left to right, so that the memory in use does not grow with their length.

    Rows behind the last one with a target that counts are left out.

    Args:
        length: most tokens of a row in a piece; None: no limit.
        reset_window: also read with the memory reset every so many tokens (see the module's docstring). The first
            window, which is the same in both, is read once.
        end: how far to read; None: to the last target that counts. Beyond the rows stand targets that do not.
    """
    rows, last = _extent(batch.targets)
    end = last if end is None else end
    whole = Rows(
        _columns(batch.tokens[:rows], end, 0),
        _columns(batch.targets[:rows], end, IGNORED),
        None if batch.resets is None else _columns(batch.resets[:rows], end, False),
    )
    start, carried, reset = 0, None, None
    while start < end:
        stop = end if length is None else min(start + length, end)
        if reset_window is not None:
            stop = min(stop, (start // reset_window + 1) * reset_window)
        piece, more = Rows(*(x if x is None else x[:, start:stop] for x in whole)), stop < end
        made, after = read(piece, carried, more)
        made_reset = None
        if reset_window is not None and start < reset_window:
            made_reset, reset = made, after
        elif reset_window is not None:
            reset = reset.reset_memory() if start % reset_window == 0 else reset
            made_reset, reset = read(piece, reset, more)
        yield Piece(start, piece.targets, made, made_reset)
        start, carried = stop, after


def _extent(targets: Tensor) -> tuple[int, int]:
    """How many rows, at least one, and columns hold all targets that count."""
    counted = targets != IGNORED
    if not counted.any():
        return 1, 0
    rows, columns = (int(counted.any(dim).nonzero()[-1]) + 1 for dim in (1, 0))
    return rows, columns


def _columns(rows: Tensor, count: int, filling: int) -> Tensor:
    """The first `count` columns, filled up where there are fewer."""
    return pad(rows, (0, count - rows.shape[1]), value=filling) if count > rows.shape[1] else rows[:, :count]


@dataclass(frozen=True)
class PositionLoss:
    """The loss of targets at some positions of their rows."""

    first: int
    """First position of the bucket."""

    last: int
    """Its last one; rows may end before."""

    tokens: int
    """Targets that count."""

    loss: float
    """Mean over them in nats, with the memory carried from the row's beginning."""

    loss_reset: float | None = None
    """The same with the memory reset; None unless asked for."""

    def fields(self) -> dict[str, float]:
        """JSON-ready. `difference` is how much a token costs more with the memory reset: what carrying it gives."""
        named = {"first": self.first, "last": self.last, "tokens": self.tokens, "loss": self.loss}
        if self.loss_reset is not None:
            named |= {"loss_reset": self.loss_reset, "difference": self.loss_reset - self.loss}
        return named


def mean_reset(positions: Iterable[PositionLoss]) -> float | None:
    """The mean loss over all positions with the memory reset; None unless that was asked for."""
    found = [(p.tokens, p.loss_reset) for p in positions if p.loss_reset is not None]
    return sum(tokens * loss for tokens, loss in found) / sum(tokens for tokens, _ in found) if found else None


class PositionSums:
    """Sums of losses and of targets that count, by bucket of their positions; they stay on their device."""

    def __init__(self, device: torch.device, *, with_reset: bool) -> None:
        self.sums = torch.zeros(3 if with_reset else 2, len(_FIRST_POSITIONS), dtype=torch.float64, device=device)
        """Tokens, nats and, with the memory reset, nats; float64 [2 or 3, buckets]."""
        self._begins = torch.tensor(_FIRST_POSITIONS[1:], device=device)

    def add(self, start: int, targets: Tensor, *losses: Tensor) -> None:
        """Adds losses [B, t] of targets [B, t], the first of which stand at position `start`: with the memory carried
        and, if that is summed too, with it reset.
        """
        targets = targets.to(self.sums.device)
        counted = targets != IGNORED
        nats = [loss.to(self.sums.device, torch.float64).masked_fill(~counted, 0.0).sum(0) for loss in losses]
        positions = torch.arange(start, start + targets.shape[1], device=self.sums.device)
        buckets = torch.bucketize(positions, self._begins, right=True)
        self.sums.index_add_(1, buckets, torch.stack([counted.sum(0).double(), *nats]))

    def losses(self) -> list[PositionLoss]:
        """The means of all buckets that have a target; waits for the device."""
        found = []
        for bucket, (tokens, *nats) in enumerate(self.sums.T.tolist()):
            if tokens:
                last = _FIRST_POSITIONS[bucket + 1] - 1
                means = (value / tokens for value in nats)
                found.append(PositionLoss(_FIRST_POSITIONS[bucket], last, int(tokens), *means))
        return found


def require_reset_window(model: ModelConfig, window: int, context: int, option: str) -> None:
    """Raise ValueError, naming `option`, where a memory cannot be reset every `window` tokens in rows of `context`."""
    if model.memory is None:
        raise ValueError(
            f"{option} is {window}, but a {model.variant} has no memory: there is nothing to reset; leave it out"
        )
    kind, unit = ("chunk", model.memory.chunk) if model.segment is None else ("segment", model.segment)
    if window % unit:
        below = window // unit * unit
        fitting = f"{below} or {below + unit}" if below else f"{unit}"
        raise ValueError(
            f"{option} {window} is not a multiple of the model's {kind} of {unit} tokens: {fitting} would be"
        )
    if window >= context:
        raise ValueError(
            f"{option} {window} resets nothing in rows of {context} tokens: make it shorter, or the rows longer"
        )


class PieceScores(NamedTuple):
    """What a model says of a piece's targets [B, t]."""

    loss_sum: Tensor
    """Sum of -log p over those that count: 0-d."""

    losses: Tensor | None
    """-log p of each, [B, t]; None unless asked for."""

    correct: Tensor | None
    """Which of them have the largest logit, bool [B, t]; None unless asked for."""


class Scored(NamedTuple):
    """Sums over all ranks' batches."""

    nats: float
    """Of -log p of the targets that count."""

    tokens: int
    """Targets that count."""

    correct: int | None
    """Those among them that have the largest logit; None unless asked for."""

    positions: list[PositionLoss] | None = None
    """The loss by position; None unless asked for."""


@torch.no_grad()
def score(
    batches: Iterable[Batch],
    read: Read,
    mesh: Mesh,
    *,
    piece: int | None,
    with_correct: bool,
    by_position: bool,
    reset_window: int | None,
    stretches: int = 1,
) -> Scored:
    """Score all ranks' batches. Every rank calls it; ranks may have different numbers of batches, of any sizes.

    Args:
        read: gives PieceScores of this rank's part of the rows, zeros elsewhere, with `losses` and `correct` where
            those are asked for here. A collective.
        piece, reset_window: see `read_in_pieces`. Multiples of `stretches`.
        stretches: that ranks divide the tokens of a row into.
    """
    device = mesh.world.device
    counted, totals = (
        torch.zeros((), dtype=torch.int64, device=device),
        torch.zeros(2, dtype=torch.float64, device=device),
    )
    positions = PositionSums(device, with_reset=reset_window is not None) if by_position else None
    for batch, end in _in_step(batches, mesh, stretches):
        for part in read_in_pieces(batch, read, length=piece, reset_window=reset_window, end=end):
            totals[0] += part.carried.loss_sum
            counted += (part.targets != IGNORED).sum().to(device)
            if with_correct:
                totals[1] += part.carried.correct.sum()
            if positions is not None:
                both = [part.carried.losses] if part.reset is None else [part.carried.losses, part.reset.losses]
                positions.add(part.start, part.targets, *both)
    # Rows are as many as the data ranks read; nats and right answers are of each replica's part of them.
    mesh.data.all_reduce(counted)
    for group in (mesh.replicas, mesh.pipeline):
        group.all_reduce(totals)
    if positions is not None:
        mesh.data.all_reduce(positions.sums[0])
        for group in (mesh.replicas, mesh.pipeline):
            group.all_reduce(positions.sums[1:])
    return Scored(
        nats=float(totals[0]),
        tokens=int(counted),
        correct=int(totals[1]) if with_correct else None,
        positions=None if positions is None else positions.losses(),
    )


def _in_step(batches: Iterable[Batch], mesh: Mesh, stretches: int) -> Iterator[tuple[Batch, int]]:
    """This rank's batches, and how far every rank reads.

    Under ZeRO 3 each layer's forward is a collective, and how often a layer runs depends on where a piece begins and
    ends (the mac cuts it at its segments). So a rank that has run out, or has shorter rows, keeps the others company.
    Ranks that share rows read stretches of one length.
    """
    source = iter(batches)
    while True:
        batch = next(source, None)
        end = 0 if batch is None else _extent(batch.targets)[1]
        furthest = torch.tensor([float(batch is not None), float(end)], dtype=torch.float64, device=mesh.world.device)
        mesh.data.all_reduce(furthest, dist.ReduceOp.MAX)
        running, end = (int(number) for number in furthest.tolist())
        if not running:
            return
        end = -(-end // stretches) * stretches
        yield Rows(*torch.zeros(2, 1, 0, dtype=torch.int64)) if batch is None else batch, end
