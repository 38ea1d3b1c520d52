"""What a device could do at best: the operations and bytes of a call, and the time that its peaks allow for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from model import MemoryConfig, ModelConfig
from model.flops import flops_per_token
from pretrain.devices import peak_flops

# Bytes a second of the device's memory, from the makers' data sheets; the first name that occurs in torch's counts.
_BANDWIDTHS = {
    "H200": 4.8e12,
    "H100 PCIe": 2.0e12,
    "H100 NVL": 3.9e12,
    "H100": 3.35e12,
    "B200": 8.0e12,
    "A100-SXM4-80GB": 2.039e12,
    "L40S": 0.864e12,
    "RTX 4090": 1.008e12,
}


def peak_bandwidth(device: torch.device) -> float | None:
    """Peak bytes a second of a device's memory; None for a device that is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((bandwidth for part, bandwidth in _BANDWIDTHS.items() if part in name), None)


def roofline_seconds(flops: float, moved_bytes: float, device: torch.device, dtype: str) -> float | None:
    """The least seconds that operations and memory traffic take at the device's peaks; None for an unknown device."""
    rate, bandwidth = peak_flops(device, dtype), peak_bandwidth(device)
    if rate is None or bandwidth is None:
        return None
    return max(flops / rate, moved_bytes / bandwidth)


def rates(
    found: Mapping[str, Any], tokens: int, flops: float, moved_bytes: float, device: torch.device, dtype: str
) -> dict[str, float | None]:
    """Speed and memory for each token, and the shares of the device's peak and of its roofline."""
    seconds = found["forward_s"] + found["backward_s"]
    peak, least = peak_flops(device, dtype), roofline_seconds(flops, moved_bytes, device, dtype)
    return {
        "us_per_token": seconds / tokens * 1e6,
        "tflops": flops / seconds / 1e12,
        "of_peak": None if peak is None else flops / seconds / peak,
        "of_roofline": None if least is None else least / seconds,
        "kb_per_token": found["peak_bytes"] / tokens / 1e3,
    }


def memory_config(depth: int, expansion: int, chunk_size: int) -> MemoryConfig:
    """A memory with the models' defaults in all else."""
    hidden = {} if depth == 1 else {"expansion": expansion}
    return MemoryConfig(depth=depth, chunk=chunk_size, **hidden)


def memory_flops(heads: int, head_dim: int, memory: MemoryConfig, batch: int, length: int) -> float:
    """Operations of the neural memory, forward and backward, as training counts them (model/flops.py): backward is
    twice forward, and nothing that is computed again counts.
    """
    config = ModelConfig(
        variant="lmm", vocab_size=2, dim=heads * head_dim, num_layers=1, num_heads=heads, ffn_dim=1, memory=memory
    )
    return batch * length * flops_per_token(config, length).memory


def memory_bytes(heads: int, head_dim: int, batch: int, length: int, element_bytes: int) -> float:
    """Bytes that forward and backward cannot do without: q, k, v, the gates and y; then those again with y's gradient,
    and the gradients of the first four. Weights and states, which could stay on the chip, do not count.
    """
    token = 3 * head_dim * element_bytes + 3 * 4
    forward = token + head_dim * element_bytes
    return batch * length * heads * (forward + forward + token)


def visible_pairs(length: int, window: int | None, prefix: int) -> int:
    """Pairs of a query and a key that it sees, in a row of `length` tokens with `prefix` keys that all see."""
    span = min(window or length, length)
    return span * (span + 1) // 2 + (length - span) * span + prefix * length


def attention_flops(heads: int, head_dim: int, batch: int, pairs: int) -> float:
    """Operations of attention's two products, forward and backward; backward counts twice the forward."""
    return 3.0 * 4.0 * batch * heads * head_dim * pairs


def attention_bytes(heads: int, head_dim: int, batch: int, length: int, element_bytes: int) -> float:
    """Bytes that forward and backward cannot do without: q, k, v and y; those again with y's gradient, and three
    gradients.
    """
    return float(batch * length * heads * head_dim * element_bytes * (4 + 5 + 3))
