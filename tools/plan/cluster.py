"""The cluster that a plan is for: its devices, how much they hold and compute, and the links between them."""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.devices import PEAKS
from pretrain.errors import UserError

GB = 1e9


@dataclass(frozen=True)
class Device:
    """A kind of GPU, from its maker's data sheet."""

    name: str
    """As `pretrain.devices.PEAKS` has it."""
    memory_bytes: float
    link_bytes: float
    """Bytes a second to the other GPUs of its node, in one direction."""


DEVICES = {
    "h100": Device("H100", 80 * GB, 450 * GB),
    "h200": Device("H200", 141 * GB, 450 * GB),
    "b200": Device("B200", 180 * GB, 900 * GB),
    "a100": Device("A100", 80 * GB, 300 * GB),
    "l40s": Device("L40S", 48 * GB, 32 * GB),
}
"""NVLink, but for the L40S, which has PCIe 4."""

NODE_LINK_BYTES = 50 * GB
"""Of each GPU to other nodes, in one direction, where nothing is said: a network card of 400 Gb/s for each."""


@dataclass(frozen=True)
class Cluster:
    """So many nodes of equal GPUs."""

    device: Device
    nodes: int
    gpus_per_node: int
    node_link_bytes: float = NODE_LINK_BYTES
    """Bytes a second of each GPU to other nodes, in one direction."""

    @property
    def gpus(self) -> int:
        """All of them, each with a rank."""
        return self.nodes * self.gpus_per_node

    def peak_flops(self, precision: str) -> float:
        """Of one GPU."""
        bf16, fp32 = PEAKS[self.device.name]
        return bf16 if precision == "bf16" else fp32

    def link_bytes(self, span: int) -> float:
        """Bytes a second that a rank gets where those that it talks to lie within `span` neighbouring ranks: what the
        slowest link on the way gives.
        """
        if span <= self.gpus_per_node:
            return self.device.link_bytes
        return min(self.device.link_bytes, self.node_link_bytes)


def find_device(name: str) -> Device:
    """The device of that name, in any case. Raises UserError naming those that are known."""
    if name.lower() not in DEVICES:
        raise UserError(f"--gpu {name}: nothing is known of it; choose one of {', '.join(DEVICES)}")
    return DEVICES[name.lower()]
