"""Modules of which only the shapes matter: on the meta device, and without drawing what they would start from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

M = TypeVar("M", bound=nn.Module)


def undrawn(build: Callable[[], M]) -> M:
    """What `build` makes, with parameters that have shapes and no numbers."""
    with torch.device("meta"), _NothingDrawn():
        return build()


class _NothingDrawn(TorchFunctionMode):
    """Leaves tensors as they are where they would be filled with random numbers. On the meta device nothing comes of
    it, but the first draw imports a compiler for seconds, and those of a large model take most of a second.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in ("normal_", "uniform_", "kaiming_uniform_"):
            return args[0] if args else kwargs["tensor"]
        return (torch.empty if func is torch.randn else func)(*args, **kwargs)
