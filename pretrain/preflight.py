"""What is looked at on every rank before the first step: that all of them run the same program on machines that are fit
for it. What would spoil the run ends it, with the rank, the host and the fix; what may only slow it is warned of.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from parallel import process
from parallel.bandwidth import all_reduce_bandwidth
from parallel.process import World
from pretrain.agreement import SharedMachineError, SharedUserError
from pretrain.checkpoints import CHECKPOINTS_FOLDER, list_checkpoints
from pretrain.gpu_health import memory_errors, wrong_products
from pretrain.guards_config import GuardsConfig
from pretrain.metrics import RunLog
from pretrain.phases import Phases
from pretrain.plan import num_parameters

_PACKAGES = ("torch", "deepspeed", "triton")
_SOURCES = ("kernels", "model", "parallel", "pretrain")
_VARIABLES = ("NCCL_", "GLOO_", "TORCH_NCCL_", "OMP_", "MKL_", "CUBLAS_", "PYTORCH_")
_OF_THE_NODE = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "NCCL_IB_HCA")
"""Variables that name a node's own parts, and may differ."""

BYTES_PER_PARAMETER = 12
"""Of a checkpoint: weights and two moments in fp32."""

_MEGABYTES = {"cuda": 256.0, "cpu": 4.0}


@dataclass(frozen=True)
class Facts:
    """What one rank finds on itself."""

    host: str
    versions: dict[str, str]
    clock: float
    """Seconds since 1970, right behind a barrier."""
    free_bytes: int
    """Of the disk that the run's folder is on, with what killed saves left there, which the first save removes."""
    variables: dict[str, str]
    device: str
    wrong: str | None
    """What is wrong with the device."""
    memory_errors: int | None
    bandwidth: float | None
    """Bytes a second."""


@dataclass(frozen=True)
class PreflightReport:
    """What was found on all ranks, and is no error."""

    facts: list[Facts]
    """By rank."""
    checkpoint_bytes: int
    megabytes: float
    """Of the all-reduce that was timed."""
    warnings: list[str]
    seconds: float

    @property
    def bandwidth(self) -> float | None:
        """The lowest of all ranks, in gigabytes a second."""
        found = [fact.bandwidth for fact in self.facts if fact.bandwidth is not None]
        return min(found) / 1e9 if found else None

    @property
    def clock_skew(self) -> float:
        """Seconds between the first and the last clock of all ranks."""
        clocks = [fact.clock for fact in self.facts]
        return max(clocks) - min(clocks)

    def fields(self) -> dict[str, Any]:
        """As the event of the log has it."""
        return {
            "ranks": len(self.facts),
            "hosts": dict(Counter(fact.host for fact in self.facts)),
            "devices": dict(Counter(fact.device for fact in self.facts)),
            "versions": self.facts[0].versions,
            "variables": self.facts[0].variables,
            "bandwidth_gigabytes_per_second": self.bandwidth,
            "all_reduce_megabytes": self.megabytes,
            "clock_skew_seconds": self.clock_skew,
            "free_gigabytes": min(fact.free_bytes for fact in self.facts) / 1e9,
            "checkpoint_gigabytes": self.checkpoint_bytes / 1e9,
            "warnings": self.warnings,
            "seconds": self.seconds,
        }

    def lines(self) -> list[str]:
        """As people read it."""
        hosts = len({fact.host for fact in self.facts})
        speed = "" if self.bandwidth is None else f", all-reduce of {self.megabytes:g} MB at {self.bandwidth:.2f} GB/s"
        free, size = min(fact.free_bytes for fact in self.facts) / 1e9, self.checkpoint_bytes / 1e9
        return [
            f"preflight: {len(self.facts)} rank(s) on {hosts} host(s), versions equal{speed}, clocks within "
            f"{self.clock_skew:.2f} s, {free:.1f} GB free for checkpoints of {size:.3g} GB",
            *(f"preflight: warning: {warning}" for warning in self.warnings),
        ]

    def write(self, log: RunLog) -> None:
        """Into the run's log and on the screen."""
        log.event("preflight", **self.fields())
        for line in self.lines():
            log.say(line)


def preflight(phases: Phases, world: World, *, clock: Callable[[], float] = time.time) -> PreflightReport:
    """Look at all ranks. Every rank calls it.

    Args:
        clock: this rank's.

    Raises:
        SharedUserError: versions that differ, a device that computes wrong, no space for one checkpoint (a
            SharedMachineError): with every rank that it holds for, its host, and the fix.
    """
    started = time.monotonic()
    run, guards = phases.run, phases.run.guards
    on_gpu = world.device.type == "cuda"
    megabytes = guards.preflight_megabytes or _MEGABYTES[world.device.type]
    versions = versions_here(phases)
    wrong = wrong_products(world.device) if on_gpu else None
    found_wrong = process.gather_objects((socket.gethostname(), versions, wrong))
    # First, as ranks of other versions, and GPUs that fail, may hang in what follows.
    _raise(_differing([(host, versions) for host, versions, _ in found_wrong]))
    _raise([f"rank {n} on {host}: {each}" for n, (host, _, each) in enumerate(found_wrong) if each], _GPU_FIX)
    bandwidth = all_reduce_bandwidth(world.device, round(megabytes * 1e6))
    checkpoints = run.folder / CHECKPOINTS_FOLDER
    left = process.broadcast_object(left_bytes(checkpoints))
    process.barrier()
    own = Facts(
        host=socket.gethostname(),
        versions=versions,
        clock=clock(),
        free_bytes=shutil.disk_usage(_existing(run.folder)).free + left,
        variables={name: value for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)},
        device=torch.cuda.get_device_name(world.device) if on_gpu else platform.machine(),
        wrong=wrong,
        memory_errors=memory_errors(world.device) if on_gpu else None,
        bandwidth=bandwidth,
    )
    facts = process.gather_objects(own)
    size = BYTES_PER_PARAMETER * num_parameters(run.model)
    _raise(_without_space(facts, size, run.folder), kind=SharedMachineError)
    wanted = max(phase.recipe.checkpoint.keep for phase in phases) + 1
    wanted -= len(process.broadcast_object(list_checkpoints(checkpoints)))
    warnings = [
        *_short_of_space(facts, size * max(wanted, 1), run.folder),
        *warnings_of(facts, guards),
    ]
    return PreflightReport(facts, size, megabytes, warnings, time.monotonic() - started)


_GPU_FIX = "take that GPU or node out of the job (nvidia-smi -q and the kernel's log say more), and start again"


def versions_here(phases: Phases) -> dict[str, str]:
    """What must be the same on all ranks: of python, packages, this program's source, and the recipe."""
    found = {name: _installed(name) for name in _PACKAGES}
    recipe = hashlib.sha256(phases.to_yaml().encode()).hexdigest()[:12]
    return {"python": platform.python_version(), **found, "source": source_hash(), "recipe": recipe}


@cache
def source_hash() -> str:
    """Of the program's own files, names and bytes: the first digits of their sha256."""
    root, digest = Path(__file__).resolve().parents[1], hashlib.sha256()
    for path in sorted(file for folder in _SOURCES for file in (root / folder).rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:12]


def warnings_of(facts: Sequence[Facts], guards: GuardsConfig) -> list[str]:
    """What may slow a run down, or mislead those who read its logs, and does not end it."""
    found = []
    first = min(range(len(facts)), key=lambda rank: facts[rank].clock)
    last = max(range(len(facts)), key=lambda rank: facts[rank].clock)
    skew = facts[last].clock - facts[first].clock
    if skew > guards.clock_tolerance_seconds:
        found.append(
            f"the clock of rank {last} on {facts[last].host} is {skew:.1f} s ahead of that of rank {first} on "
            f"{facts[first].host} (guards.clock_tolerance_seconds {guards.clock_tolerance_seconds:g}): times in logs "
            "can't be compared; let chrony or ntpd set them"
        )
    speeds = [(fact.bandwidth, rank) for rank, fact in enumerate(facts) if fact.bandwidth is not None]
    if speeds and guards.min_bandwidth is not None and min(speeds)[0] < guards.min_bandwidth * 1e9:
        speed, rank = min(speeds)
        found.append(
            f"an all-reduce takes rank {rank} on {facts[rank].host} at {speed / 1e9:.2f} GB/s, below "
            f"guards.min_bandwidth {guards.min_bandwidth:g}: look at the network interface that is used "
            "(NCCL_DEBUG=INFO, NCCL_SOCKET_IFNAME) and at the links"
        )
    for rank, fact in enumerate(facts):
        if fact.memory_errors:
            found.append(
                f"the GPU of rank {rank} on {fact.host} has counted {fact.memory_errors} memory error(s) that could "
                "not be corrected since its driver was loaded: reset it, or take it out of the job"
            )
    for name in sorted({name for fact in facts for name in fact.variables} - {*_OF_THE_NODE}):
        values = [fact.variables.get(name) for fact in facts]
        if len(set(values)) > 1:
            other = next(rank for rank, value in enumerate(values) if value != values[0])
            found.append(
                f"{name} is {values[other]} on rank {other} ({facts[other].host}), and {values[0]} on rank 0 "
                f"({facts[0].host}): set it alike"
            )
    return found


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _raise(problems: Sequence[str], fix: str = "", kind: type[SharedUserError] = SharedUserError) -> None:
    if problems:
        raise kind("\n".join(["preflight:", *(f"  {problem}" for problem in problems), *([fix] if fix else [])]))


def _differing(ranks: Sequence[tuple[str, dict[str, str]]]) -> list[str]:
    """Each version that is not rank 0's, with its rank and host."""
    fixes = {
        "source": "give all nodes the same copy of this program",
        "recipe": "start all ranks with the same recipe and options",
    }
    (host0, expected), found = ranks[0], []
    for rank, (host, versions) in enumerate(ranks):
        for name, value in versions.items():
            if value != expected[name]:
                fix = fixes.get(name, f"install the same {name} on all nodes")
                found.append(
                    f"rank {rank} on {host}: {name} is {value}, and {expected[name]} on rank 0 ({host0}): {fix}"
                )
    return found


def _existing(folder: Path) -> Path:
    """The folder, or the one that it will be made in."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def _without_space(facts: Sequence[Facts], size: int, folder: Path) -> list[str]:
    return [
        f"rank {rank} on {fact.host}: {folder} has {fact.free_bytes / 1e9:.3g} GB free, and one checkpoint takes about "
        f"{size / 1e9:.3g} GB: free some, or give another --folder"
        for rank, fact in enumerate(facts)
        if fact.free_bytes < size
    ]


def left_bytes(checkpoints: Path) -> int:
    """What saves and removals that were killed have left of checkpoints, in bytes on the disk."""
    found = 0
    for path in (*checkpoints.glob(".partial-*/**/*"), *checkpoints.glob(".removed-*/**/*")):
        with suppress(FileNotFoundError):  # removed meanwhile
            found += path.stat().st_blocks * 512
    return found


def _short_of_space(facts: Sequence[Facts], wanted: int, folder: Path) -> list[str]:
    free, rank = min((fact.free_bytes, rank) for rank, fact in enumerate(facts))
    if free >= wanted:
        return []
    return [
        f"{folder} has {free / 1e9:.3g} GB free on {facts[rank].host}, and the checkpoints that are still to come "
        f"until older ones are removed take about {wanted / 1e9:.3g} GB: free some, or lower checkpoint.keep"
    ]
