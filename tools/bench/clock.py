"""What every measurement shares: the device and its precision, seconds, and the growth of memory."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pretrain.errors import UserError
from tools.bench.live_tensors import LiveTensors
from tools.command import positive_int

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ENOUGH_SECONDS = 5.0
"""A measurement that has taken this long is not repeated any more."""


def add_device_arguments(parser: argparse.ArgumentParser, *, repeats: int = 3) -> None:
    """The options that all measurements of time take."""
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU where there is")
    parser.add_argument(
        "--dtype", choices=("auto", *DTYPES), default="auto", help="of the inputs; auto: bf16 on a GPU, fp32 on a CPU"
    )
    parser.add_argument("--threads", type=positive_int, default=2, help="CPU threads")
    parser.add_argument(
        "--repeats",
        type=positive_int,
        default=repeats,
        help=f"runs of which the fastest counts; fewer where they have taken {ENOUGH_SECONDS:.0f} s",
    )


def chosen_device(name: str) -> torch.device:
    """The device that `--device` means. Raises UserError for a GPU that is not there."""
    present = name != "cpu" and torch.cuda.is_available()
    if name == "cuda" and not present:
        raise UserError("--device cuda: torch sees no GPU here; leave it out, or give --device cpu")
    return torch.device("cuda" if present else "cpu")


def chosen_dtype(name: str, device: torch.device) -> str:
    """The precision that `--dtype` means on a device."""
    if name != "auto":
        return name
    return "bf16" if device.type == "cuda" else "fp32"


def device_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_device_arguments`, decided, as keyword arguments of a measurement."""
    device = chosen_device(arguments.device)
    return {
        "device": device.type,
        "dtype": chosen_dtype(arguments.dtype, device),
        "threads": arguments.threads,
        "repeats": arguments.repeats,
    }


def wait_for(device: torch.device) -> None:
    """Returns when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(function: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Wall seconds of a call, until the device has done it, and what it returned."""
    wait_for(device)
    start = time.perf_counter()
    result = function()
    wait_for(device)
    return time.perf_counter() - start, result


def peak_growth(function: Callable[[], Any], device: torch.device) -> int:
    """The most bytes that tensors held during a call over what they held before it."""
    if device.type != "cuda":
        with LiveTensors() as live:
            function()
        return live.peak_bytes
    wait_for(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    wait_for(device)
    return torch.cuda.max_memory_allocated(device) - before


def forward_and_backward(
    forward: Callable[[], Tensor], inputs: Sequence[Tensor], device: torch.device, repeats: int
) -> dict[str, Any]:
    """Times of a differentiable function and the memory that it takes over its inputs.

    Args:
        forward: gives a tensor that depends on `inputs`.
        inputs: tensors whose gradients are taken.
        repeats: runs of which the fastest forward and the fastest backward count; at least one, and no further one
            once they have taken `ENOUGH_SECONDS`.

    Returns:
        forward_s, backward_s (seconds), peak_bytes (growth of tensors' memory in a run of its own, gradients included),
        runs.
    """
    forwards, backwards = [], []

    def backward(y: Tensor) -> None:
        # Its own numbers as their gradient: they take no memory, and differ (a constant makes some kernels less work).
        torch.autograd.grad(y, inputs, y.detach(), allow_unused=True)

    while len(forwards) < repeats and sum(forwards) + sum(backwards) < ENOUGH_SECONDS:
        seconds, y = seconds_of(forward, device)
        forwards.append(seconds)
        backwards.append(seconds_of(partial(backward, y), device)[0])
        del y
    return {
        "forward_s": min(forwards),
        "backward_s": min(backwards),
        "peak_bytes": peak_growth(lambda: backward(forward()), device),
        "runs": len(forwards),
    }
