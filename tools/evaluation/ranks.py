"""The processes of an evaluation: one alone, or several that torchrun started, which divide the work."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from parallel import process
from parallel.process import SideGroup, World
from pretrain import agreement
from pretrain.errors import UserError
from tools.command import run_command

JOIN_MINUTES = 30.0
"""After how long a rank that waits for the others to start gives up; as in training (`parallel.timeout_minutes`)."""
TIMEOUT_MINUTES = 60.0 * 24 * 14
"""Ranks meet when all is answered, and one may have hours more to do than another. The connection to one that has ended
is closed, which those that wait for it find at once."""
_TIMED_OUT = re.compile(r"timed out|timeout", re.IGNORECASE)
"""In what torch says where ranks have not come in time: the kind of its error does not tell."""
T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The processes of an evaluation, as one of them sees them."""

    world: World
    """Its place."""
    group: SideGroup | None = None
    """Where they meet; None where it is alone. On gloo on GPUs too, as NCCL does not notice that a rank has ended."""

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """Run a block on all ranks at about the same time: a UserError of one becomes every one's. Raises UserError
        where one has ended.
        """
        if self.world.size == 1:
            yield
            return
        own: RuntimeError | None = None
        try:
            with agreement.agreed(self.group):
                try:
                    yield
                except RuntimeError as error:  # the block's, such as a GPU without room
                    own = error
                    raise
        except RuntimeError as error:
            if error is own:
                raise
            raise _lost_error(error) from error

    def gather(self, value: T) -> list[T]:
        """Every rank's `value`, by rank, on every rank; waits for the slowest. Raises UserError where one has ended."""
        if self.world.size == 1:
            return [value]
        with _lost():
            return process.gather_objects(value, self.group)

    def from_main(self, value: T) -> T:
        """The first rank's `value`, on every rank. Raises UserError where it has ended."""
        if self.world.size == 1:
            return value
        with _lost():
            return process.broadcast_object(value, self.group)


@contextmanager
def _lost() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise _lost_error(error) from error


def _lost_error(error: RuntimeError) -> UserError:
    return UserError(
        f"{_name()}: waited for the other ranks, of which one has ended; what it printed says why ({error})"
    )


def _name() -> str:
    return f"rank {process.rank_from_environment()} on {socket.gethostname()}"


def join(device: str) -> Ranks:
    """This process's place. Of several it waits for the others, `JOIN_MINUTES` at most; alone it needs no group.

    Args:
        device: "cpu" or "cuda".

    Raises:
        UserError: the launcher's variables are incomplete, this rank has no such device, others have not come, or what
            joins them failed, such as a port in use.
    """
    if (size := int(os.environ.get("WORLD_SIZE", "1"))) == 1:
        return Ranks(World(0, 1, 0, torch.device(device)))
    try:
        world = process.initialize("cuda" if device == "cuda" else "cpu", timeout_minutes=JOIN_MINUTES)
        return Ranks(world, process.side_group(TIMEOUT_MINUTES))
    except ValueError as error:  # this rank's alone, such as a GPU that is missing
        raise UserError(f"{_name()}: {error}") from None
    except RuntimeError as error:
        if not _TIMED_OUT.search(str(error)):
            raise UserError(f"{_name()}: could not join the other ranks: {error}") from error
        raise UserError(
            f"{_name()}: not all of {size} ranks have joined within {JOIN_MINUTES:g} minutes; what the others printed "
            f"says why, if they started and can reach {os.environ.get('MASTER_ADDR')} ({error})"
        ) from error


def require_alone(option: str) -> None:
    """Raises UserError where several processes would each do all of it."""
    if (size := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise UserError(f"{option} is for one process, and WORLD_SIZE is {size}; start it without torchrun")


def _leave() -> None:
    with _lost():
        process.shutdown()


def run_and_leave(command: Callable[[], None]) -> int:
    """Runs `command` and returns its exit code, as `run_command` does; one of several processes ends with it.

    Where all is well, or all ranks have agreed on an error, they leave in step, and the first rank says what it was.
    Else this one ends at once: its launcher ends the others, or they find it gone when they meet.
    """
    agreed = False

    def said_once() -> None:
        nonlocal agreed
        try:
            command()
        except agreement.SharedUserError:
            agreed = True
            if process.rank_from_environment() == 0:
                raise

    code = run_command(said_once)
    if agreed:
        code = 2
    if dist.is_initialized() and dist.get_world_size() > 1:
        if agreed or code == 0:
            code = run_command(_leave) or code
        process.exit_now(code)
    return code
