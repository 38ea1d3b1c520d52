"""Runs on every rank of test_spike_guard_ranks.py: trains recipes one after another, with spikes in each.

Arguments: SEEN.json RECIPE.yaml...
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from parallel.process import initialize
from pretrain.loop import train
from pretrain.phases import load_phases
from tests.pretrain.spikes_by_place import spikes_at
from tests.worker_results import hand_over

SPIKES = (13, 14)


def main(output: str, recipes: list[str]) -> None:
    torch.set_num_threads(1)
    world = initialize("cpu")
    seen = {}
    for path in recipes:
        with spikes_at(*SPIKES) as place:
            train(load_phases(path), world)
        seen[Path(path).stem] = place.seen
    hand_over(world, output, seen)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
