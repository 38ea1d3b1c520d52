"""The processes of an evaluation: one alone, or several that torchrun started, which divide the work."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from parallel.process import World, exit_now, initialize, shutdown
from pretrain.errors import UserError

TIMEOUT_MINUTES = 60.0 * 24 * 14
"""Ranks meet when all is answered, and one may have hours more to do than another. A launcher ends all with the first
that fails."""


def join(device: str) -> World:
    """This process's place. Of several it waits for the others; alone it needs no group.

    Args:
        device: "cpu" or "cuda".

    Raises:
        UserError: the launcher's variables are incomplete, or this rank has no such device.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return World(0, 1, 0, torch.device(device))
    try:
        return initialize("cuda" if device == "cuda" else "cpu", timeout_minutes=TIMEOUT_MINUTES)
    except ValueError as error:
        raise UserError(str(error)) from None


def require_alone(option: str) -> None:
    """Raises UserError where several processes would each do all of it."""
    if (size := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise UserError(f"{option} is for one process, and WORLD_SIZE is {size}; start it without torchrun")


def leave(code: int) -> None:
    """Ends one of several processes with an exit code, in step with the others where all is well."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        if code == 0:
            shutdown()
        exit_now(code)
