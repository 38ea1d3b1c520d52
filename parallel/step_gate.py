"""What stands between a step's global gradient norm and the optimizer: a step whose loss or norm is too large is left
out, as DeepSpeed leaves out one that is not finite.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Limits:
    """The largest loss and gradient norm with which a step is taken; inf: whatever it is."""

    loss: float = math.inf
    """In nats, as `StepResult.loss`."""

    gradient_norm: float = math.inf
    """Before clipping, as `StepResult.grad_norm`."""


class StepGate:
    """Judges each step where its loss and norm are known and nothing has been stepped yet.

    DeepSpeed brings the norm to the host there in any case, to see whether it is finite: the loss comes with it, in the
    one transfer. It is told that the norm of a step to be left out is infinite, and does what it then does: drops the
    gradients, and leaves weights, moments and counts as they are.
    """

    def __init__(self) -> None:
        self._loss = torch.zeros(())
        self._limits: Limits | None = None
        self.seen: Tensor | None = None
        """The step's loss and norm: fp32 [2] on the host. None before they were judged, as where the gradient is not
        finite."""
        self.held_back = False
        """Whether the step was left out for them."""

    def attach(self, optimizer: Any) -> None:
        """Stand before the steps of DeepSpeed's optimizer. Raises RuntimeError for one that is not known."""
        if hasattr(optimizer, "scaled_global_norm"):  # ZeRO 1 and 2
            norm = optimizer.scaled_global_norm
            optimizer.scaled_global_norm = lambda *given, **named: self._passed_on(norm(*given, **named))
        elif hasattr(optimizer, "_get_norm_groups"):  # ZeRO 3
            self._attach_to_groups(optimizer)
        elif type(optimizer).__name__ == "BF16_Optimizer":  # ZeRO 1 with sums in fp32
            self._attach_to_function(optimizer)
        else:
            raise RuntimeError(f"{type(optimizer).__name__} takes its gradient norm in a way that is not known here")

    def begin(self, loss: Tensor, limits: Limits | None) -> None:
        """The step that is to be judged next.

        Args:
            loss: of all ranks, fp32, 0-d.
            limits: alike on all ranks; None: every step is taken.
        """
        self._loss, self._limits, self.seen, self.held_back = loss.detach(), limits, None, False

    def holds_back(self, norm: Tensor | float) -> bool:
        """Whether the step is left out, alike on all ranks; every rank calls it.

        Args:
            norm: the global gradient norm. One that is not finite is not judged here.
        """
        norm = torch.as_tensor(norm, dtype=torch.float32).to(self._loss.device).detach()
        seen = torch.stack([self._loss, norm])
        if self._limits is None:
            self.seen = seen.cpu()
            return False
        above = (seen[0].double() > self._limits.loss) | (seen[1].double() > self._limits.gradient_norm)
        agreed = torch.cat([seen, above.to(seen.dtype).view(1)])
        # What one rank finds holds for all: groups that sum in other orders may differ in the last bit.
        dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
        agreed = agreed.cpu()
        self.seen, is_finite = agreed[:2], bool(agreed[1].isfinite() and agreed[1] >= 0)
        self.held_back = is_finite and bool(agreed[2])
        return self.held_back

    def _passed_on(self, norm: Any) -> Any:
        return math.inf if self.holds_back(norm) else norm

    def _attach_to_groups(self, optimizer: Any) -> None:
        combine = importlib.import_module("deepspeed.runtime.utils").combine_grad_norm_groups
        norms = optimizer._get_norm_groups

        def judged() -> list[Any]:
            groups = norms()
            return [math.inf] if self.holds_back(combine(groups)) else groups

        optimizer._get_norm_groups = judged

    def _attach_to_function(self, optimizer: Any) -> None:
        # Its norm is a local variable of its step, the result of a function of its module.
        module = importlib.import_module(type(optimizer).__module__)
        step = optimizer.step

        def judged(*given: Any, **named: Any) -> Any:
            norm = module.get_global_norm_of_tensors
            module.get_global_norm_of_tensors = lambda *of, **how: self._passed_on(norm(*of, **how))
            try:
                return step(*given, **named)
            finally:
                module.get_global_norm_of_tensors = norm

        optimizer.step = judged
