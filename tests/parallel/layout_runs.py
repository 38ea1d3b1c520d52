"""Trainings in layouts, launched, and how far each is from the same training on one process."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.distributed_helper import run_ranks
from tests.parallel.layouts import Trial

AT_ONCE = 40
"""Trials of one launch."""


def run_trials(trials: Iterable[Trial], folder: Path, *, timeout: float = 300.0) -> dict[Trial, dict[str, Any]]:
    """What each saw, as `layout_worker` writes it: each launch runs trials of as many ranks, one after another."""
    by_ranks: dict[int, list[Trial]] = defaultdict(list)
    for trial in dict.fromkeys(trials):
        by_ranks[trial.ranks].append(trial)
    seen: dict[Trial, dict[str, Any]] = {}
    for ranks, listed in by_ranks.items():
        for first in range(0, len(listed), AT_ONCE):
            launched = listed[first : first + AT_ONCE]
            output = folder / f"{ranks}-{first}.pt"
            arguments = ["tests/parallel/layout_worker.py", str(output), *map(str, launched)]
            run_ranks(arguments, ranks=ranks, timeout=timeout)
            found = torch.load(output)
            seen |= {trial: found[str(trial)] for trial in launched}
    return seen


def differences(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    """The largest relative ones: of losses, gradient norms, statistics and the evaluation's numbers each by itself; of
    final parameters, against the largest of the parameter.
    """
    (nats, tokens, correct, positions), evaluated = found["evaluated"], expected["evaluated"]
    assert (tokens, correct) == evaluated[1:3]
    nats = [nats, *(part["loss"] for part in positions)]
    expected_nats = [evaluated[0], *(part["loss"] for part in evaluated[3])]
    assert found["parameters"].keys() == expected["parameters"].keys()
    assert all(whole.isfinite().all() for whole in found["parameters"].values())
    return {
        "loss": _largest(found["losses"], expected["losses"]),
        "norm": _largest(found["norms"], expected["norms"]),
        "statistics": _largest(found["stats"], expected["stats"]),
        "evaluation": _largest(torch.tensor(nats), torch.tensor(expected_nats)),
        "parameters": max(
            float((found["parameters"][name] - whole).abs().max() / whole.abs().max())
            for name, whole in expected["parameters"].items()
        ),
    }


def _largest(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape and expected.isfinite().all() and found.isfinite().all()
    return float(((found - expected) / expected).abs().max()) if len(expected) else 0.0
