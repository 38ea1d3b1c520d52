"""Random numbers go on where the checkpoint left them, on each rank from its own seed."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from pretrain.rng import load_rng, rng_tensors, seed_rank


def draw() -> tuple[list[float], list[float], list[float]]:
    return [random.random() for _ in range(3)], np.random.rand(3).tolist(), torch.rand(3).tolist()


def test_a_restored_generator_repeats_what_followed(tmp_path: Path) -> None:
    seed_rank(3, 1)
    draw()
    path = tmp_path / "rng.safetensors"
    save_file(rng_tensors(), path)
    expected = draw()
    seed_rank(4, 0)
    load_rng(path)
    assert draw() == expected


def test_ranks_and_seeds_differ_and_repeat() -> None:
    seen = []
    for seed, rank in ((0, 0), (0, 1), (1, 0), (0, 0)):
        seed_rank(seed, rank)
        seen.append(draw())
    assert seen[0] == seen[3]
    assert seen[0] != seen[1]
    assert seen[0] != seen[2]
    assert seen[1] != seen[2]
