"""One process among many: the process group, this rank's device, and an end that leaves no rank hanging.

Start-up follows the variables that torchrun, the DeepSpeed launcher and Slurm scripts set (RANK, WORLD_SIZE,
LOCAL_RANK, MASTER_ADDR, MASTER_PORT). Without them the process is alone, and gets a group of one, so that nothing
above has to know the difference.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist

from parallel.watchdog import show_stacks_when_asked

DeviceName = Literal["auto", "cpu", "cuda"]
SideGroup = dist.ProcessGroup
T = TypeVar("T")

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK")


@dataclass(frozen=True)
class World:
    """Where this process stands: its rank among `size`, its place among the ranks of its node, and the device that it
    computes on.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    local_size: int = 1
    """Ranks whose host has this one's name."""
    local_index: int = 0
    """This rank's number among these, by rank: `local_rank` is the launcher's word, which picks the GPU."""

    @property
    def is_main(self) -> bool:
        """True on the one rank that prints and writes the logs."""
        return self.rank == 0


def rank_from_environment() -> int:
    """This process's rank as its launcher set it (0 when there is no launcher). Needs no process group."""
    return int(os.environ.get("RANK", "0"))


def choose_device(name: DeviceName, local_rank: int) -> torch.device:
    """`auto` is this rank's GPU where there is one. Raises ValueError where `cuda` is asked for and this rank has
    none.
    """
    count = torch.cuda.device_count() if name != "cpu" and torch.cuda.is_available() else 0
    if count == 0 and name == "cuda":
        raise ValueError("parallel.device: 'cuda', but torch sees no GPU here; set parallel.device to cpu or auto")
    if count == 0:
        return torch.device("cpu")
    if local_rank >= count:
        raise ValueError(
            f"LOCAL_RANK {local_rank} has no GPU: this node shows {count}; start at most {count} processes on a node"
        )
    return torch.device("cuda", local_rank)


def initialize(device: DeviceName = "auto", *, timeout_minutes: float = 30.0, deterministic: bool = False) -> World:
    """Join the process group (gloo on CPU, NCCL on GPUs) and take this rank's device.

    Args:
        device: what to compute on.
        timeout_minutes: after how long a collective that waits for a lost rank is given up.
        deterministic: allow only kernels that repeat every bit; an operation that has none raises RuntimeError.

    Raises:
        ValueError: some but not all of the launcher's variables are set, or the device does not exist.
    """
    show_stacks_when_asked()  # first: joining may hang too
    present = [name for name in _VARIABLES if name in os.environ]
    if present == ["LOCAL_RANK"]:  # left by an earlier call in this process
        present = []
    if present and len(present) < len(_VARIABLES):
        missing = [name for name in _VARIABLES if name not in os.environ]
        raise ValueError(
            f"{', '.join(present)} are set but {', '.join(missing)} are not: start through `python -m launch`, "
            "torchrun or srun with all five, or unset them all for one process"
        )
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = choose_device(device, local_rank)
    if deterministic or torch.are_deterministic_algorithms_enabled():  # the call imports a compiler, for a second
        torch.use_deterministic_algorithms(deterministic)
    if deterministic:  # cuBLAS reads it when it starts
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    options: dict[str, Any] = {"timeout": timedelta(minutes=timeout_minutes)}
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        options["device_id"] = chosen
    if not present:
        options.update(store=dist.HashStore(), rank=0, world_size=1)
        os.environ["LOCAL_RANK"] = "0"  # DeepSpeed reads it, also where nobody launched this process
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", **options)
    if size > 1:
        install_abort_hook(rank)
    return World(rank, size, local_rank, chosen, *_place_on_node(rank, size))


def _place_on_node(rank: int, size: int) -> tuple[int, int]:
    """How many ranks are on this rank's host, and its number among them. By the hosts' names and not by the launcher's
    variables: torchrun, DeepSpeed's launcher and srun each say it otherwise, or don't.
    """
    if size == 1:
        return 1, 0
    hosts = gather_objects(socket.gethostname())
    return hosts.count(hosts[rank]), hosts[:rank].count(hosts[rank])


def install_abort_hook(rank: int) -> None:
    """Make an exception that nobody caught end this process at once, its traceback first.

    An ordinary exit waits in the process group's destructor for peers that wait for this rank: the job hangs until the
    collective's timeout. The launcher ends the others as soon as one process is gone.
    """

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        print(f"rank {rank} failed:", file=sys.stderr)
        traceback.print_exception(kind, error, trace)
        exit_now(1)

    def thread_hook(arguments: threading.ExceptHookArgs) -> None:
        if arguments.exc_value is not None:
            hook(arguments.exc_type, arguments.exc_value, arguments.exc_traceback)

    sys.excepthook = hook
    threading.excepthook = thread_hook


def exit_now(code: int) -> None:
    """Flush the streams and end the process without destructors, which abort (gloo) or wait (NCCL) when a peer is
    gone.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def shutdown() -> None:
    """Leave the process group in step with the other ranks. Call `exit_now` after it: in 1 of 8 runs gloo's
    destructor aborts.
    """
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def side_group(timeout_minutes: float) -> SideGroup | None:
    """A group of all ranks of its own, on gloo, for another thread than the one that trains: what the functions below
    do in it needs no GPU and meets none of training's collectives. None where this rank is alone. Every rank calls it.

    Args:
        timeout_minutes: after how long a rank that waits there for another gives up.
    """
    if dist.get_world_size() == 1:
        return None
    return dist.new_group(backend="gloo", timeout=timedelta(minutes=timeout_minutes))


def barrier() -> None:
    """Wait for all ranks."""
    dist.barrier()


def gather_objects(value: T, group: SideGroup | None = None) -> list[T]:
    """Every rank's `value`, by rank, on every rank. For small things: messages and lists of files.

    Args:
        group: a side group; None: the one that trains.
    """
    ranks = dist.get_world_size()
    if ranks == 1:  # nobody to ask: also where a GPU would have to
        return [value]
    gathered: list[Any] = [None] * ranks
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def broadcast_object(value: T, group: SideGroup | None = None) -> T:
    """Rank 0's `value` on every rank; `group` as above."""
    if dist.get_world_size() == 1:
        return value
    held: list[Any] = [value]
    dist.broadcast_object_list(held, src=0, group=group)
    return held[0]


def lowest(value: int, device: torch.device, group: SideGroup | None = None) -> int:
    """The least of all ranks' values, on every rank: a single small collective, on the device. `group` as above; a side
    group's is on the CPU.
    """
    if dist.get_world_size() == 1:
        return value
    held = torch.tensor(value, device=device)
    dist.all_reduce(held, op=dist.ReduceOp.MIN, group=group)
    return int(held)


def first_error(message: str | None, group: SideGroup | None = None) -> str | None:
    """The error of the lowest rank that has one, on every rank; None when no rank has one. `group` as above."""
    return _first(gather_objects(message, group))


def _first(messages: Sequence[str | None]) -> str | None:
    for rank, message in enumerate(messages):
        if message is not None:
            return message if len(set(messages)) == 1 else f"rank {rank}: {message}"
    return None
