"""Gradients in closed form that refuse to be differentiated in their turn."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

Gradients = tuple[Tensor | None, ...]


def differentiable_once(
    mend: str,
) -> Callable[[Callable[..., Gradients]], Callable[..., Gradients]]:
    """A `torch.autograd.Function`'s backward of formulas that autograd does not see into: `backward(ctx, saved,
    *gradients)`, with what the forward saved beside what it is given.

    The results have no derivatives of their own. With `create_graph=True` they take part in the graph all the same, as
    depending on all that was saved and given: whoever goes back through them meets an error, and who does not, a norm
    that is only looked at, has the first derivatives as they are. torch's own `once_differentiable` makes constants of
    them where the incoming gradient is one (that of a sum), and leaves out what was saved: second derivatives came out
    wrong, and nobody was told. What the forward saves must be inputs, or have been made of them outside of it.

    Args:
        mend: what who wants second derivatives can do; the end of the error.
    """

    def decorate(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
        @wraps(backward)
        def run(ctx: FunctionCtx, *gradients: Tensor | None) -> Gradients:
            saved = ctx.saved_tensors  # once: activation checkpointing allows no second look
            with torch.no_grad():
                found = backward(ctx, saved, *gradients)
            if not torch.is_grad_enabled():
                return found
            return _Refusal.apply(mend, found, *saved, *gradients)

        return run

    return decorate


class _Refusal(torch.autograd.Function):
    """Tensors as they are, that depend on others in a way that is not known."""

    @staticmethod
    def forward(ctx: FunctionCtx, mend: str, found: Gradients, *sources: Tensor | None) -> Gradients:
        ctx.mend = mend
        return found

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Any) -> None:
        raise RuntimeError(
            "a second derivative was asked for (by create_graph=True) of what has a first one in closed form alone: "
            + ctx.mend
        )
