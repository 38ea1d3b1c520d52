"""One sequence as segments that hand their state on: exact or truncated gradients in the memory of one segment.

A stretch is a run of segments that gradients flow through. All its segments but the last run forward without a graph,
and only the states between them are kept; then, from the last to the first, each segment is run with a graph from its
state, and its backward pass takes the gradient that arrives for its outgoing state and gives that of its incoming one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from parallel.boundary_states import BoundaryStates, Place, State

Forward = Callable[..., tuple[Tensor, State, Any]]
"""(a piece's tensors, the state before them; empty at a beginning) to (sum of losses, the state after them, anything to
be handed back of the pass that has a graph)."""

Piece = tuple[Tensor | None, ...]
"""A segment: tokens, targets, and resets or None, [B, t] each; or whatever else `forward` takes."""


@dataclass(frozen=True)
class Segments:
    """How every row of a step is cut."""

    length: int
    """Tokens of a segment."""

    count: int
    """Segments of a row."""

    truncate_every: int | None = None
    """The gradient stops behind every so many segments; None: nowhere."""

    boundary_states: Place = "device"
    """Where states between segments wait for the backward pass."""

    folder: Path | None = None
    """Where `boundary_states` on disk makes its temporary folders."""

    def cut(self, tokens: Tensor, targets: Tensor, resets: Tensor | None = None) -> list[Piece]:
        """The segments of tokens, targets and resets [B, T]. Raises ValueError where T is not count x length."""
        if tokens.shape[1] != self.count * self.length:
            raise ValueError(
                f"rows of {tokens.shape[1]} tokens are not {self.count} segments of {self.length}: give the engine's "
                "segments the length of the rows"
            )
        none = (None,) * self.count
        parts = (none if rows is None else rows.split(self.length, 1) for rows in (tokens, targets, resets))
        return list(zip(*parts, strict=True))


class SegmentsResult(NamedTuple):
    """What running a sequence gave, outside any graph."""

    loss_sum: Tensor
    """The sum of the segments' losses: a scalar."""

    state: State
    """The state after the last token."""

    asides: list[Any]
    """What `forward` handed back, by segment."""


def run_segments(
    pieces: Sequence[Piece],
    forward: Forward,
    backward: Callable[[Tensor], None],
    *,
    boundaries: BoundaryStates,
    scale: Tensor | float = 1.0,
    state: State | None = None,
    truncate_every: int | None = None,
) -> SegmentsResult:
    """Forward and backward of `scale` times the loss of one sequence, once for each segment.

    Every segment but the last of a stretch is run twice; without a graph first. Tensors of the state that are not
    floating-point (counters, positions) carry no gradient.

    Args:
        pieces: the segments in order, of any lengths.
        forward: must be a function of its arguments alone: it is called again for the same segment.
        backward: called with a scalar for each segment, from last to first within a stretch; adds to the gradients of
            the parameters, and of leaves.
        boundaries: holds the states between segments; empty again afterwards.
        scale: what losses are multiplied by before the backward pass.
        state: before the first token; None at a beginning. Where it requires grad it receives it.
        truncate_every: the segments of a stretch; None: one stretch, the exact gradient.

    Raises:
        ValueError: no pieces, or truncate_every below 1.
    """
    count = len(pieces)
    stretch = count if truncate_every is None else truncate_every
    if count == 0 or stretch < 1:
        raise ValueError(f"{count} pieces in stretches of {stretch}: there must be at least one piece in each")
    beginning = current = state or {}
    passes: dict[int, tuple[Tensor, Any]] = {}
    for first in range(0, count, stretch):
        last = min(first + stretch, count) - 1
        with torch.no_grad():
            for index in range(first, last):
                if index > 0:
                    boundaries.put(index, current)
                _, current, _ = forward(*pieces[index], current)
        arriving: State = {}
        for index in range(last, first - 1, -1):
            # The state before the last one has never been away; the one before the first of all is the caller's.
            given = current if index == last else beginning if index == 0 else boundaries.take(index)
            if index > 0:
                given = state_leaves(given, with_gradient=index > first)
            loss, after, aside = _backward_of(pieces[index], given, arriving, forward, backward, scale)
            passes[index] = loss, aside
            if index == last:
                current = after
            del after
            arriving = {} if index == first else state_gradients(given)
    ordered = [passes[index] for index in range(count)]
    return SegmentsResult(torch.stack([loss for loss, _ in ordered]).sum(), current, [aside for _, aside in ordered])


def _backward_of(
    piece: Piece,
    given: State,
    arriving: State,
    forward: Forward,
    backward: Callable[[Tensor], None],
    scale: Tensor | float,
) -> tuple[Tensor, State, Any]:
    """One segment forward and backward; its graph ends here, and its loss and outgoing state come back without it."""
    loss, after, aside = forward(*piece, given)
    scalar = loss * scale
    for name, gradient in arriving.items():
        scalar = scalar + (after[name] * gradient).sum()
    backward(scalar)
    return loss.detach(), {name: tensor.detach() for name, tensor in after.items()}, aside


def state_leaves(state: State, *, with_gradient: bool) -> State:
    """The state's values as the beginning of a graph, or as constants."""
    return {
        name: tensor.detach().requires_grad_(with_gradient and tensor.is_floating_point())
        for name, tensor in state.items()
    }


def state_gradients(leaves: State) -> State:
    """What arrived at such leaves in a backward pass."""
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
