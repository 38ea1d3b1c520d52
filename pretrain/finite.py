"""Notice the first step whose loss or gradient is not finite, without waiting for the device at every step."""

from __future__ import annotations

import torch
from torch import Tensor

_NONE = -1.0


class FiniteWatch:
    """Holds the first bad step, its loss and its gradient norm on the device.

    An optimizer may leave a step out silently when the gradient is not finite, and the next loss is finite again; so
    every step counts, not only those that are recorded.
    """

    def __init__(self, device: torch.device) -> None:
        self._first = torch.tensor([_NONE, 0.0, 0.0], dtype=torch.float64, device=device)

    def note(self, step: int, loss: Tensor, norm: Tensor) -> None:
        """Look at a step's loss and gradient norm (0-d); nothing waits for them here."""
        device = self._first.device
        loss, norm = (value.detach().to(device, torch.float64, non_blocking=True) for value in (loss, norm))
        seen = torch.stack([torch.full_like(loss, step), loss, norm])
        bad = ~(torch.isfinite(loss) & torch.isfinite(norm))
        self._first = torch.where((self._first[0] == _NONE) & bad, seen, self._first)

    def require_finite(self) -> None:
        """Wait for the device, and raise FloatingPointError naming the first bad step, if there was one."""
        step, loss, norm = self._first.tolist()
        if step != _NONE:
            raise FloatingPointError(
                f"step {step:.0f}: loss {loss}, gradient norm {norm}: not finite. The checkpoints from before are "
                "whole; lower optimizer.lr or optimizer.gradient_clip and resume"
            )
