"""ZeRO 3 with gradients that are summed over ranks once a step, however many backward passes the step has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def sum_in_fp32(parameters: Iterable[nn.Parameter]) -> None:
    """Have autograd add up the gradients of several backward passes in fp32, whatever the parameters' own dtype."""
    for parameter in parameters:
        parameter.grad_dtype = torch.float32


@contextmanager
def reduced_once(engine: Any) -> Iterator[None]:
    """The backward passes of a ZeRO 3 engine in this block leave their gradients whole on each rank, in `grad`; at its
    end they are summed over ranks and cut into shares. Those of parameters which the last pass did not reach are too.

    `engine.step()` comes behind the block. DeepSpeed's own `coalesce_grad_reduction` does the same, but reduces also
    where an error ends the block: this rank would then wait for the others, which wait for it, instead of ending.
    """
    optimizer = engine.optimizer
    optimizer._coalesce_grad_reduction = engine.inside_no_sync_ctxt = True
    try:
        yield
    finally:
        optimizer._coalesce_grad_reduction = engine.inside_no_sync_ctxt = False
    engine._flush_coalesced_reduction_zero3(optimizer)
