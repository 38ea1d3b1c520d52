"""The random number generators of this rank, saved and restored, each in its own file's worth of tensors."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file


def seed_rank(seed: int, rank: int) -> None:
    """Give every generator of this process a seed of its own rank. Call it after the model is built, which all
    ranks do alike.
    """
    mixed = int(np.random.SeedSequence([seed, rank]).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)


def rng_file(rank: int, ranks: int) -> str:
    """The name of a rank's file in a checkpoint."""
    return f"rng-{rank:05d}-of-{ranks:05d}.safetensors"


def rng_tensors() -> dict[str, torch.Tensor]:
    """The state of Python's, NumPy's and torch's generators (and of this rank's GPU), as it is now."""
    _, python, _ = random.getstate()
    _, keys, position, _, _ = np.random.get_state(legacy=True)
    state = {
        "python": torch.tensor(python, dtype=torch.int64),
        "numpy": torch.from_numpy(np.append(keys, position).astype(np.int64)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def load_rng(path: Path) -> None:
    """Restore the generators from a file of `rng_tensors`."""
    state = load_file(path)
    random.setstate((3, tuple(state["python"].tolist()), None))
    numbers = state["numpy"].numpy()
    np.random.set_state(("MT19937", numbers[:-1].astype(np.uint32), int(numbers[-1])))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
