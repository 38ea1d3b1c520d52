"""Arithmetic that keeps its dtypes under `torch.autocast`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

R = TypeVar("R")


def outside_autocast(function: Callable[..., R]) -> Callable[..., R]:
    """The function in the dtypes of its tensors: autocast would take products of fp32 states in half precision, and,
    where only the forward is inside it, leave those of the gradient in fp32.
    """

    @wraps(function)
    def run(*arguments: Any, **options: Any) -> R:
        with ExitStack() as stack:
            for device in {x.device.type for x in arguments if isinstance(x, Tensor)}:
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            return function(*arguments, **options)

    return run
