"""How fast ranks talk to each other: an all-reduce over all of them, timed."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist


def all_reduce_bandwidth(device: torch.device, num_bytes: int, *, times: int = 3) -> float | None:
    """Bytes a second of an all-reduce of so many bytes in fp32 over all ranks, the best of `times` behind one that
    makes the connections; None for one rank. Every rank calls it.

    They are the bytes that a ring moves through each rank's link, `2 (n - 1) / n` times those of the tensor, over the
    time that this rank took ("bus bandwidth", as nccl-tests count it), so that it can be compared with the link's.
    """
    ranks = dist.get_world_size()
    if ranks == 1:
        return None
    tensor = torch.zeros(max(1, num_bytes // 4), dtype=torch.float32, device=device)
    seconds = []
    for _ in range(1 + times):
        _wait_for(device)
        started = time.perf_counter()
        dist.all_reduce(tensor)
        _wait_for(device)
        seconds.append(time.perf_counter() - started)
    return 2 * (ranks - 1) / ranks * tensor.numel() * 4 / min(seconds[1:])


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
