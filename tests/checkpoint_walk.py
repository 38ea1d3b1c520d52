"""A walk that is saved as training is: what faults and kills of saves are tried on, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from parallel.host_copies import HostCopies, SavedFile, TensorFile, TextFile
from pretrain.metrics import RunLog
from pretrain.rng import load_rng, rng_tensors, seed_rank

NUMBERS = 300_000
"""Of the walk: two writes of its file."""


@dataclass
class Walk:
    """In place of training, a rank's: each step depends on all numbers and on the generator."""

    rank: int = 0
    weights: torch.Tensor = field(default_factory=lambda: torch.zeros(NUMBERS))
    number: int = 0

    def __post_init__(self) -> None:
        seed_rank(5, self.rank)

    def step(self) -> None:
        self.weights.add_(torch.rand(NUMBERS)).mul_(0.9)
        self.number += 1

    def files(self, copies: HostCopies | None) -> Sequence[SavedFile]:
        weights = self.weights if copies is None else copies.copy("weights", self.weights)
        state = TensorFile(self._file("state"), {"weights": weights})
        text = [TextFile("trainer.json", f"{self.number}\n")] if self.rank == 0 else []
        return [state, TensorFile(self._file("rng"), rng_tensors()), *text]

    def load(self, checkpoint: Path) -> None:
        self.weights.copy_(load_file(checkpoint / self._file("state"))["weights"])
        self.number = int((checkpoint / "trainer.json").read_text())
        load_rng(checkpoint / self._file("rng"))

    def _file(self, kind: str) -> str:
        return f"{kind}-{self.rank}.safetensors"


class Silent(RunLog):
    """Counts failures."""

    def __init__(self) -> None:
        self.failures = 0

    def event(self, kind: str, **fields: Any) -> None:
        self.failures += kind == "save_failed"

    def scalars(self, step: int, values: Any) -> None:
        pass
