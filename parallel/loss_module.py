"""The model as the engine runs it: from tokens, and the state before them, to a loss and the state after them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from model import ModelState
from parallel.boundary_states import State

FlatState = tuple[tuple[str, ...], tuple[Tensor, ...]]
"""A state's paths and its tensors; both empty at a beginning."""

Output = tuple[Tensor, list[dict[str, Tensor]] | None, tuple[Tensor, Tensor] | None, FlatState | None]
"""The sum of losses; if asked for the layers' statistics, and each target's loss and whether it is right; the state if
one was given."""


class LossModule(nn.Module):
    """What DeepSpeed wraps.

    It starts its backward pass from hooks on the tensors that it finds in arguments and output, and it looks into
    plain containers only. With the model's own output class the hooks are missing, and gradients accumulated in bf16
    were counted twice. Into a dict of arguments it would write, so states are tuples.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor,
        with_stats: bool = False,
        with_scores: bool = False,
        before: FlatState | None = None,
        resets: Tensor | None = None,
    ) -> Output:
        """tokens and targets [B, T]; `before`: the state before them, None where none is to come back either;
        `resets` [B, T]: where documents begin.
        """
        options = {"targets": targets, "with_stats": with_stats, "with_correct": with_scores}
        if resets is not None:
            options["resets"] = resets
        if before is None:
            output = self.model(tokens, **options)
            return output.loss_sum, output.stats, _scores(output, with_scores), None
        state = ModelState.from_tensors(unflattened(before)) if before[0] else None
        output = self.model(tokens, state, **options)
        return output.loss_sum, output.stats, _scores(output, with_scores), flattened(output.state.flat())


def _scores(output: Any, asked: bool) -> tuple[Tensor, Tensor] | None:
    return (output.losses, output.correct) if asked else None


def flattened(state: State) -> FlatState:
    """The state in tuples."""
    return tuple(state), tuple(state.values())


def unflattened(flat: FlatState) -> State:
    """The state as a dict."""
    return dict(zip(*flat, strict=True))
