"""Peak arithmetic rates, for the share of them that a run uses, and memory: the most that was held, and what is free.
A device that is not listed has no share of a peak, never a guessed one.
"""

from __future__ import annotations

import os
import resource
from pathlib import Path

import torch

# Dense peak in FLOP/s, without sparsity, from the makers' data sheets: (bf16 on tensor cores, fp32 outside them).
# The first name that occurs in torch's name for the device counts, so longer names stand first.
PEAKS: dict[str, tuple[float, float]] = {
    "H200": (989.4e12, 66.9e12),
    "H100 PCIe": (756e12, 51.2e12),
    "H100 NVL": (835e12, 60.0e12),
    "H100": (989.4e12, 66.9e12),
    "B200": (2250e12, 75e12),
    "A100": (312e12, 19.5e12),
    "L40S": (362e12, 91.6e12),
    "RTX 4090": (165.2e12, 82.6e12),
}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak FLOP/s of a device at a precision ("bf16" or "fp32"); None for a device that is not in the table."""
    if device.type != "cuda":
        return None
    part = listed_device(torch.cuda.get_device_name(device))
    if part is None:
        return None
    bf16, fp32 = PEAKS[part]
    return bf16 if precision == "bf16" else fp32


def listed_device(name: str) -> str | None:
    """Which of `PEAKS` a device is that torch calls so; None where it is not listed."""
    return next((part for part in PEAKS if part in name), None)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that this process has held: on the GPU where it has one, else resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident_bytes()


def free_device_bytes(device: torch.device) -> int:
    """What this process could still take on a GPU: what the driver has free, and what torch keeps without using it."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def available_host_bytes(groups: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> int:
    """What all processes of this node could still take of its memory, without swapping: of the machine's, or of the
    control group's (a container's, a Slurm job's) where that leaves less. File caches count as free.
    """
    least = _available_in_machine()
    lines = groups.read_text().splitlines() if groups.exists() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "memory":  # version 1
            names, root = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"), mount / "memory"
        elif not controllers:  # version 2
            names, root = ("memory.max", "memory.current", "inactive_file"), mount
        else:
            continue
        own = root / path.lstrip("/")
        for folder in (own, *own.parents):
            left = _left_in_group(folder, *names)
            least = least if left is None else min(least, left)
            if folder == root:
                break
    return max(least, 0)


def _available_in_machine(memory: Path = Path("/proc/meminfo")) -> int:
    lines = memory.read_text().splitlines() if memory.exists() else []
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")  # all of it, where nothing says what is free


def _left_in_group(folder: Path, limit: str, usage: str, cache: str) -> int | None:
    try:
        most, used = (folder / limit).read_text().strip(), int((folder / usage).read_text())
        fields = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:  # not this version's, or not to be seen from inside the container
        return None
    return None if most == "max" else int(most) - used + int(fields.get(cache, 0))


def peak_resident_bytes(status: Path = Path("/proc/self/status")) -> int:
    """The most host memory that this process has had resident.

    From /proc where it says so (some sandboxes' does not): ru_maxrss begins with what the process that started this
    one had.
    """
    lines = status.read_text().splitlines() if status.exists() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
