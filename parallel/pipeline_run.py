"""The passes of one step on one stage of a pipeline: forward, backward, and what waits in between.

The last pass of a stretch runs forward once, with its graph. Of any other only the state before it and the activations
that arrived are kept, in a store for boundary states; it is run again, with its graph, when its backward pass is due.
So a stage holds the graphs of the passes that end a stretch and are in flight, as many as there are stages behind it at
most, and one more; besides, of each other pass in flight, its boundary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from parallel.boundary_states import BoundaryStates, State
from parallel.pipeline_links import Links
from parallel.pipeline_schedule import Pass, plan_passes, steps_of_stage
from parallel.segments import Piece, state_gradients, state_leaves
from parallel.stage_clock import StageClock

_ACTIVATIONS = "activations"
"""Under which those that arrived wait beside the state, none of whose tensors is called so."""

StageForward = Callable[[Tensor | None, Piece, State, bool], tuple[Tensor, State, Any]]
"""(activations that arrived, None on the first stage; a piece's tokens and so on; the state before it, of this stage's
layers, empty at a beginning; whether statistics are wanted) to (activations [B, t, dim], on the last stage the sum of
losses; the state after it; the statistics). It is called again for the same piece."""


class StageResult(NamedTuple):
    """What a step gave on one stage, outside any graph."""

    losses: list[Tensor]
    """The sum of losses of each sequence, on the last stage; empty on the others."""

    states: list[State]
    """The state behind each sequence, where it was to be kept."""

    asides: list[Any]
    """The last sequence's statistics, by segment."""


@dataclass
class _Graph:
    """A pass between its forward and its backward."""

    arrived: Tensor | None
    given: State
    output: Tensor
    after: State
    aside: Any


@dataclass
class StageRun:
    """One step.

    Args:
        sequences: each one's pieces in order, of which all have as many.
        beginnings: the state before each sequence, as values.
        empty_activations: a tensor for what arrives for a piece.
        boundaries: holds what waits; empty again afterwards.
        scale: what losses are multiplied by before the backward pass.
        keeps_states: whether the states behind sequences are wanted.
    """

    links: Links
    forward: StageForward
    empty_activations: Callable[[Piece], Tensor]
    sequences: Sequence[Sequence[Piece]]
    beginnings: Sequence[State]
    boundaries: BoundaryStates
    clock: StageClock
    scale: Tensor | float = 1.0
    truncate_every: int | None = None
    with_stats: bool = False
    keeps_states: bool = False
    _plan: list[Pass] = field(init=False)
    _current: State = field(init=False, default_factory=dict)
    _arriving: State = field(init=False, default_factory=dict)
    _graphs: dict[int, _Graph] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        segments = len(self.sequences[0])
        self._plan = plan_passes(len(self.sequences), segments, self.truncate_every)
        self._losses: list[list[Tensor]] = [[] for _ in self.sequences]
        self._asides: list[Any] = [None] * segments
        self._states: list[State] = []

    def run(self) -> StageResult:
        """All passes, forward and backward; gradients are added to the parameters'. Every stage calls it."""
        for kind, number in steps_of_stage(self._plan, self.links.stages, self.links.stage):
            if kind == "forward":
                self._go_forward(number)
            else:
                self._go_backward(number)
        self.links.flush()
        losses = [torch.stack(parts).sum() for parts in self._losses] if self.links.is_last else []
        return StageResult(losses, self._states, self._asides)

    def _go_forward(self, number: int) -> None:
        one = self._plan[number]
        piece = self._piece(one)
        arrived = None if self.links.is_first else self.links.receive_activations(self.empty_activations(piece))
        given = self.beginnings[one.sequence] if one.segment == 0 else self._current
        if one.ends_stretch:
            with self.clock.busy():
                graph = self._with_graph(one, arrived, given)
            self._graphs[number], output, after = graph, graph.output, graph.after
        else:
            # The state before the first segment is the caller's, and need not be kept twice.
            kept = given if one.segment > 0 else {}
            self.boundaries.put(number, kept if arrived is None else {**kept, _ACTIVATIONS: arrived})
            with self.clock.busy(), torch.no_grad():
                output, after, _ = self.forward(arrived, piece, given, False)
        self._current = {name: tensor.detach() for name, tensor in after.items()}
        if one.segment == len(self.sequences[0]) - 1 and self.keeps_states:
            self._states.append(self._current)
        if not self.links.is_last:
            self.links.send_activations(output)

    def _go_backward(self, number: int) -> None:
        one = self._plan[number]
        graph = self._graphs.pop(number, None) or self._again(number)
        if self.links.is_last:
            self._losses[one.sequence].append(graph.output.detach())
            outputs, gradients = [graph.output * self.scale], [None]
        else:
            outputs = [graph.output]
            arrives = torch.empty_like(graph.output, memory_format=torch.contiguous_format)
            gradients = [self.links.receive_gradients(arrives)]
        for name, gradient in self._arriving.items():
            if graph.after[name].requires_grad:
                outputs.append(graph.after[name])
                gradients.append(gradient)
        with self.clock.busy():
            torch.autograd.backward(outputs, gradients)
        if graph.arrived is not None:
            self.links.send_gradients(graph.arrived.grad)
        self._arriving = {} if one.begins_stretch else state_gradients(graph.given)
        if self.with_stats and one.sequence == len(self.sequences) - 1:
            self._asides[one.segment] = graph.aside

    def _again(self, number: int) -> _Graph:
        """The forward pass of a boundary once more, with its graph."""
        one = self._plan[number]
        kept = self.boundaries.take(number)
        arrived = kept.pop(_ACTIVATIONS, None)
        with self.clock.busy(again=True):
            return self._with_graph(one, arrived, kept if one.segment > 0 else self.beginnings[one.sequence])

    def _with_graph(self, one: Pass, arrived: Tensor | None, given: State) -> _Graph:
        leaf = None if arrived is None else arrived.detach().requires_grad_()
        given = state_leaves(given, with_gradient=not one.begins_stretch)
        wanted = self.with_stats and one.sequence == len(self.sequences) - 1
        return _Graph(leaf, given, *self.forward(leaf, self._piece(one), given, wanted))

    def _piece(self, one: Pass) -> Piece:
        return self.sequences[one.sequence][one.segment]
