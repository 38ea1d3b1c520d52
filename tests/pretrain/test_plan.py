"""The dry run's estimates of segments and of the states between them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from model import ModelConfig, TitansLM
from parallel.config import ParallelConfig
from parallel.pipeline_schedule import plan_passes, steps_of_stage
from pretrain.config import Recipe, load_recipe
from pretrain.phases import Phases
from pretrain.plan import (
    boundary_bytes,
    carried_bytes,
    describe,
    estimate_memory,
    memory_by_part,
    num_parameters,
    state_bytes,
)
from pretrain.quantities import size_text
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
    by_room = described(tmp_path, segment_length=8)
    needed = size_text(boundary_bytes(recipe_with(tmp_path, segment_length=8)))
    assert f"{needed} at a time, on the device, in the host's memory or on disk, by the room there" in by_room
    assert f"{needed}, where they wait on the device, estimated" in by_room


def test_memory_is_that_of_a_segment_and_of_the_states_that_wait_on_the_device(tmp_path: Path) -> None:
    whole, on_disk = recipe_with(tmp_path), recipe_with(tmp_path, segment_length=8, boundary_states="disk")
    on_device = recipe_with(tmp_path, segment_length=8)
    assert boundary_bytes(whole) == 0 < boundary_bytes(on_disk) == boundary_bytes(on_device)
    of_whole, of_disk, of_device = (estimate_memory(recipe, 1000, 1) for recipe in (whole, on_disk, on_device))
    assert of_disk.activations == of_device.activations < of_whole.activations
    assert of_disk.boundary_states == of_whole.boundary_states == 0
    assert of_device.total == of_disk.total + boundary_bytes(on_device)


def test_gradients_that_wait_for_one_reduction_are_whole(tmp_path: Path) -> None:
    """Under ZeRO 2 and 3 where a step has several backward passes: its four rows are in micro-batches of two."""
    for stage in (1, 2, 3):
        for fields, ranks, at_once in (({}, 2, True), ({}, 1, False), ({"segment_length": 8}, 2, False)):
            recipe = recipe_with(tmp_path, **fields)
            once = recipe.model_copy(update={"parallel": ParallelConfig(zero_stage=stage)})
            shared = at_once and stage > 1
            expected = 4000 // ranks if shared else 4000 + (4000 // ranks if stage == 3 else 0)
            assert estimate_memory(once, 1000, ranks).gradients == expected
            text = describe(Phases.alone(once), ranks)
            assert ("gradients" in next(line for line in text.splitlines() if " holds 1/" in line)) == shared
            if stage > 1:
                parallel = ParallelConfig(zero_stage=stage, reduce_gradients="backward")
                every = recipe.model_copy(update={"parallel": parallel})
                assert estimate_memory(every, 1000, ranks).gradients == 4000 // ranks


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


def test_memory_is_also_that_of_the_states_that_rows_carry(tmp_path: Path) -> None:
    """Four rows, with rollback those of the step before beside them."""
    alone = recipe_with(tmp_path)
    streams = alone.model_copy(update={"data": alone.data.model_copy(update={"order": "streams"})})
    back = streams.training.model_copy(update={"on_bad_state": "rollback"})
    rollback = streams.model_copy(update={"training": back})
    state = state_bytes(alone.model, 4, 32)
    for recipe, states in ((alone, 0), (streams, 4), (rollback, 8)):
        for ranks in (1, 2):
            estimate, without = (estimate_memory(each, 1000, ranks) for each in (recipe, alone))
            assert estimate.carried_states == states * state // ranks
            assert estimate.total - without.total == states * state // ranks
    text = describe(Phases.alone(rollback), 2)
    assert f"# memory of a rank    {size_text(estimate_memory(rollback, num_parameters(alone.model), 2).total)}" in text
    assert f"#   carried states    {size_text(4 * state)}, estimated" in text
    assert f"#   carried states    4 rows that go on from step to step: {size_text(8 * state)} over all" in text
    assert "carried states" not in describe(Phases.alone(alone), 2)


def test_a_carried_window_is_full_behind_the_first_steps(tmp_path: Path) -> None:
    alone = recipe_with(tmp_path)
    data = alone.data.model_copy(update={"order": "streams"})
    streams = alone.model_copy(update={"model": ModelConfig.preset("mag-tiny"), "data": data})
    assert streams.model.window == 64
    assert carried_bytes(streams, 1) == state_bytes(streams.model, 4, 10_000) > state_bytes(streams.model, 4, 32)


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


def test_a_dry_run_lists_every_ranks_place_parameters_and_memory(tmp_path: Path) -> None:
    alone = recipe_with(tmp_path)
    split = alone.model_copy(update={"parallel": alone.parallel.model_copy(update={"tensor": 2})})
    text = describe(Phases.alone(split), 4)
    assert "# ranks               4: pipeline 1 x data 2 x sequence 1 x tensor 2; ZeRO" in text
    assert "rank  pipeline  data  sequence  tensor  parameters  memory (estimate)" in text
    whole, parts = num_parameters(alone.model), memory_by_part(split, 4)
    assert parts.keys() == {(0, 0), (0, 1)}
    for rank, (data, tensor) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
        assert re.search(rf"#  +{rank} +0 +{data} +0 +{tensor} +[\d,]+ ", text)
    for held, memory in parts.values():
        assert whole / 2 < held < 0.55 * whole
        assert f"{held:,}  " in text and size_text(memory.total) in text
        assert memory.parameters == 4 * held


def test_many_ranks_share_lines_where_they_hold_the_same_part(tmp_path: Path) -> None:
    alone = recipe_with(tmp_path, batch_tokens=32 * 2 * 256)
    split = alone.model_copy(update={"parallel": alone.parallel.model_copy(update={"tensor": 2})})
    text = describe(Phases.alone(split), 512)
    assert text.count(" 256 ") >= 2 and "ranks  pipeline  tensor  parameters" in text


def test_heads_and_channels_of_states_and_activations_are_divided(tmp_path: Path) -> None:
    alone = recipe_with(tmp_path, segment_length=8)
    split = alone.model_copy(update={"parallel": alone.parallel.model_copy(update={"tensor": 2})})
    whole, half = estimate_memory(alone, 1000, 1), estimate_memory(split, 1000, 2)
    assert 2 * half.boundary_states == whole.boundary_states > 0
    assert whole.activations / 2 < half.activations < whole.activations


@pytest.mark.parametrize("recomputed", [False, True])
def test_sharded_norms_leave_less_of_activations_whole(tmp_path: Path, recomputed: bool) -> None:
    recipe = recipe_with(tmp_path, segment_length=8)
    found = []
    for sharded in (False, True):
        fields = {"tensor": 2, "tensor_shard_norms": sharded, "activation_checkpointing": recomputed}
        parallel = recipe.parallel.model_copy(update=fields)
        found.append(estimate_memory(recipe.model_copy(update={"parallel": parallel}), 1000, 2))
    whole, sharded = found
    assert whole.activations / 2 < sharded.activations < 0.95 * whole.activations
    assert whole.boundary_states == sharded.boundary_states


def test_what_is_kept_on_the_host_is_not_on_the_device(tmp_path: Path) -> None:
    alone = recipe_with(tmp_path)
    fields = {"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True}
    away = alone.model_copy(update={"parallel": alone.parallel.model_copy(update=fields)})
    estimate, whole = estimate_memory(away, 1000, 2), estimate_memory(alone, 1000, 2)
    assert estimate.parameters == estimate.optimizer == whole.host == 0 < estimate.gradients
    assert estimate.host == 500 * 4 + 500 * 12
    assert estimate.total == estimate.gradients + estimate.activations
    assert "offloaded" in describe(Phases.alone(away), 2)
    assert "offloaded" not in describe(Phases.alone(alone), 2)


@pytest.mark.parametrize("fields", [{}, {"segment_length": 8}, {"segment_length": 4}], ids=str)
def test_a_stage_holds_what_is_in_flight(tmp_path: Path, fields: dict[str, int]) -> None:
    """As many activations as its order of passes keeps graphs, and one more where passes are run again."""
    training = {"micro_batch_size": 1, **fields}
    recipe = load_recipe(
        write_recipe(tmp_path / "shards", tmp_path / "run", training=training, parallel={"pipeline": 2})
    )
    passes = plan_passes(4, recipe.training.num_segments, None)
    alone = estimate_memory(recipe, 1000, 2, stage=1, layers=1)
    for stage in (0, 1):
        graphs = most = waiting = 0
        for kind, number in steps_of_stage(passes, 2, stage):
            change = 1 if kind == "forward" else -1
            graphs += change * passes[number].ends_stretch
            waiting = max(waiting, graphs + (kind == "backward" and not passes[number].ends_stretch))
            most = max(most, waiting)
        found = estimate_memory(recipe, 1000, 2, stage=stage, layers=1)
        assert found.activations == most * alone.activations
        assert (found.boundary_states > 0) == bool(fields)
