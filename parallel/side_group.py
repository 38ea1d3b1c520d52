"""A process group of all ranks beside those of the training: over gloo, on the host, whatever the training runs on."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist


class SideGroup:
    """For small numbers that the hosts exchange. What is sent here neither waits for a GPU nor holds one up.

    Every rank makes it, and makes the same calls in the same order.

    Args:
        timeout_minutes: after how long a call that waits for a lost rank is given up.
    """

    def __init__(self, timeout_minutes: float) -> None:
        self._group = dist.new_group(backend="gloo", timeout=timedelta(minutes=timeout_minutes))

    def largest(self, value: int) -> int:
        """The largest of all ranks' numbers, on every rank."""
        held = torch.tensor([value], dtype=torch.int64)
        dist.all_reduce(held, op=dist.ReduceOp.MAX, group=self._group)
        return int(held)
