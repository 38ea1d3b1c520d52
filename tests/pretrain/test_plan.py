"""The dry run's estimates of segments and of the states between them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model import ModelConfig, TitansLM
from pretrain.config import Recipe, load_recipe
from pretrain.phases import Phases
from pretrain.plan import boundary_bytes, describe, estimate_memory, state_bytes
from tests.training_cases import write_recipe


def recipe_with(folder: Path, **fields: object) -> Recipe:
    """A recipe whose data is not there yet, with fields of its training."""
    return load_recipe(write_recipe(folder / "shards", folder / "run", training=fields))


def described(folder: Path, **fields: object) -> str:
    """The dry run on two ranks."""
    return describe(Phases.alone(recipe_with(folder, **fields)), 2)


def test_a_dry_run_says_how_rows_are_cut(tmp_path: Path) -> None:
    text = described(tmp_path, segment_length=8, boundary_states="disk")
    for line in ("4 segment(s) of 8 tokens", "exact: through the whole row", "on disk, in the run's folder"):
        assert line in text
    truncated = {"segment_length": 16, "gradient": "truncated", "truncate_every": 1}
    assert "truncated: it stops every 1 segment(s)" in described(tmp_path, **truncated)
    assert "segment(s)" not in described(tmp_path)


def test_memory_is_that_of_a_segment_and_of_the_states_that_wait_on_the_device(tmp_path: Path) -> None:
    whole, on_disk = recipe_with(tmp_path), recipe_with(tmp_path, segment_length=8, boundary_states="disk")
    on_device = recipe_with(tmp_path, segment_length=8)
    assert boundary_bytes(whole) == 0 < boundary_bytes(on_disk) == boundary_bytes(on_device)
    of_whole, of_disk, of_device = (estimate_memory(recipe, 1000, 1) for recipe in (whole, on_disk, on_device))
    assert of_disk.activations == of_device.activations < of_whole.activations
    assert of_disk.boundary_states == of_whole.boundary_states == 0
    assert of_device.total == of_disk.total + boundary_bytes(on_device)


def test_as_many_states_wait_as_gradients_flow_through(tmp_path: Path) -> None:
    lmm = ModelConfig.preset("lmm-tiny")
    for fields, states in (
        ({"segment_length": 2}, 15),
        ({"segment_length": 2, "gradient": "truncated", "truncate_every": 4}, 4),
        ({"segment_length": 2, "gradient": "truncated", "truncate_every": 100}, 15),
        ({"segment_length": 32}, 0),
    ):
        recipe = recipe_with(tmp_path, **fields).model_copy(update={"model": lmm})
        assert boundary_bytes(recipe) == 2 * states * state_bytes(lmm, 4, 2), fields


@pytest.mark.parametrize("variant", ["mac", "mag", "mal", "lmm", "transformer"])
@pytest.mark.parametrize("seen", [64, 72, 200])
def test_the_size_of_a_state_is_the_models_own(variant: str, seen: int) -> None:
    """But for convolutions' tails and open chunks."""
    config = ModelConfig.model_validate({**ModelConfig.preset(f"{variant}-tiny").model_dump(), "vocab_size": 32})
    with torch.no_grad():
        state = TitansLM(config)(torch.zeros(1, seen, dtype=torch.int64)).state
    counted = ("weights", "momentum", "attention.k", "attention.v", "context_k", "context_v")
    sizes = [tensor.nbytes for name, tensor in state.flat().items() if any(part in name for part in counted)]
    assert state_bytes(config, 4, seen) == sum(sizes)
