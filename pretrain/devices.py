"""Peak arithmetic rates, for the share of them that a run uses. A device that is not listed has no share, never a
guessed one.
"""

from __future__ import annotations

import resource
from pathlib import Path

import torch

# Dense peak in FLOP/s, without sparsity, from the makers' data sheets: (bf16 on tensor cores, fp32 outside them).
# The first name that occurs in torch's name for the device counts, so longer names stand first.
_PEAKS: dict[str, tuple[float, float]] = {
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
    name = torch.cuda.get_device_name(device)
    for part, (bf16, fp32) in _PEAKS.items():
        if part in name:
            return bf16 if precision == "bf16" else fp32
    return None


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that this process has held: on the GPU where it has one, else resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident_bytes()


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
