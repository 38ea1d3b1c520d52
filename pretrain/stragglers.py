"""Ranks that are slower than those that do the same: each one's own work is measured, apart from waiting for others.

All ranks of a step end it together, so the step's time says nothing of which one was slow. What is compared:
- On CPUs, the processor time of the thread that trains, which stands still while the rank waits in a collective. A rank
  that does more, or whose core is slow, shows; one whose core is taken by other programs does not.
- On GPUs, where the time of kernels holds that of collectives in it, how long a matrix product of fixed size takes at
  each record: a GPU that is throttled or shared shows, one that has more to compute does not.
- On both, how long the rank waited for its data, over the time of a step. With data.on_damage skip ranks take their
  data in step, and all of them wait as long.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from statistics import median_low
from typing import NamedTuple

import torch

from parallel.mesh import Mesh
from parallel.process import gather_objects
from pretrain.guards_config import GuardsConfig
from pretrain.metrics import RunLog
from pretrain.resume import TrainerState

_SIZE, _PRODUCTS, _TIMES = 2048, 8, 3
"""Of the products that are timed on GPUs."""


class Work(NamedTuple):
    """A rank's own work since the last record, in seconds a step."""

    host: str
    stage: int
    """Of the pipeline: ranks of a stage have the same work."""
    compute: float
    data: float
    """Waited for data."""
    step: float
    """The whole step, waiting for others included."""


def slowness(ranks: Sequence[Work]) -> list[float]:
    """How many times as long each rank takes as the median of its stage: the ratio of their computing, and what it
    waits longer for data, in steps.
    """
    found = []
    for work in ranks:
        peers = [other for other in ranks if other.stage == work.stage]
        compute, data = (median_low([getattr(peer, name) for peer in peers]) for name in ("compute", "data"))
        computing = work.compute / compute if compute > 0 else 1.0
        found.append(computing + (max(0.0, work.data - data) / work.step if work.step > 0 else 0.0))
    return found


class Stragglers:
    """Compares the ranks of a phase at each record. Every rank makes it, and makes the same calls."""

    def __init__(self, guards: GuardsConfig, mesh: Mesh) -> None:
        self._ratio, self._records = guards.straggler_ratio, guards.straggler_records
        self._mesh, self._device = mesh, mesh.world.device
        self._compute = self._step = 0.0
        self._steps = 0
        self._began = (0.0, 0.0)
        self._in_a_row = [0] * mesh.world.size
        self._matrix: torch.Tensor | None = None

    def begin(self) -> None:
        """A step begins, its data included."""
        self._began = (time.thread_time(), time.perf_counter())

    def end(self) -> None:
        """It is over."""
        self._compute += time.thread_time() - self._began[0]
        self._step += time.perf_counter() - self._began[1]
        self._steps += 1

    def look(self, data_seconds: float, log: RunLog, state: TrainerState, **phase: str) -> dict[str, float]:
        """Compare the ranks by their steps since the last look, and tell of those that were slow often enough; the
        curve of the slowest.

        Args:
            data_seconds: that this rank waited for its data in each of these steps, on the mean.
        """
        steps, compute, step = max(self._steps, 1), self._compute, self._step
        self._compute = self._step = 0.0
        self._steps = 0
        if self._ratio is None or self._mesh.world.size == 1:
            return {}
        own = compute / steps if self._device.type == "cpu" else self._seconds_of_products()
        host, stage = socket.gethostname(), self._mesh.place.pipeline
        ranks = gather_objects(Work(host, stage, own, data_seconds, step / steps))
        ratios = slowness(ranks)
        for rank, (work, ratio) in enumerate(zip(ranks, ratios, strict=True)):
            self._in_a_row[rank] = self._in_a_row[rank] + 1 if ratio > self._ratio else 0
            if self._in_a_row[rank] == self._records:
                where = {"step": state.step, "tokens": state.tokens, **phase, "rank": rank, "host": work.host}
                seconds = {"compute_seconds": work.compute, "data_seconds": work.data, "step_seconds": work.step}
                log.event("straggler", **where, ratio=ratio, records=self._records, **seconds)
                log.say(
                    f"step {state.step}: rank {rank} on {work.host} is a straggler: its own work takes {ratio:.2f} "
                    f"times as long as the others' ({self._records} records in a row)"
                )
        return {"speed/slowest_rank_ratio": max(ratios)}

    def _seconds_of_products(self) -> float:
        if self._matrix is None:
            self._matrix = torch.ones(_SIZE, _SIZE, dtype=torch.bfloat16, device=self._device)
        best = float("inf")
        for _ in range(_TIMES):
            started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            started.record()
            for _ in range(_PRODUCTS):
                self._matrix @ self._matrix
            ended.record()
            ended.synchronize()
            best = min(best, started.elapsed_time(ended) / 1e3)
        return best
