"""The process groups that a training of a test's rank leaves behind."""

from __future__ import annotations

import gc

import torch.distributed as dist


def leave_groups() -> None:
    """Behind one of several trainings of a process: each rank ends all groups but the first, which is all ranks'.

    Each has three threads and more, and one of them wakes a hundred times a second: of forty trainings of eight ranks
    they take more of two cores than the trainings do.
    """
    world = dist.group.WORLD
    for group in [*dist.distributed_c10d._world.pg_map]:
        if group is not world:
            dist.destroy_process_group(group)
    gc.collect()  # engines and their groups hold each other
