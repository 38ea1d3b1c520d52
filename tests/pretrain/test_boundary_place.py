"""Where states between segments wait: by their size and the room that is left, the same on every rank."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from parallel.process import World
from pretrain import boundary_place
from pretrain.boundary_place import SHARE, choose_boundary_place
from pretrain.config import Recipe, load_recipe
from pretrain.plan import boundary_bytes, estimate_memory, memory_by_part, num_parameters
from tests.training_cases import write_recipe

CPU, GPU = (World(0, 2, 0, torch.device(device), 2) for device in ("cpu", "cuda"))


def recipe_with(folder: Path, parallel: dict[str, object] | None = None, **training: object) -> Recipe:
    fields = {"segment_length": 8, **training}
    return load_recipe(write_recipe(folder / "shards", folder / "run", training=fields, parallel=parallel or {}))


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch):
    """Sets what is free: on the device, in the host's memory of two ranks, and what the other rank gathers."""

    def put(device: int, host: int, other: dict[str, int] | None = None) -> None:
        monkeypatch.setattr(boundary_place, "free_device_bytes", lambda _: device)
        monkeypatch.setattr(boundary_place, "available_host_bytes", lambda: host)
        monkeypatch.setattr(boundary_place, "gather_objects", lambda own: [own, other or own])

    return put


def engine_bytes(recipe: Recipe) -> int:
    memory = estimate_memory(recipe, num_parameters(recipe.model), 2)
    return memory.parameters + memory.gradients + memory.optimizer + memory.activations


def test_the_fastest_place_that_has_room_is_taken(tmp_path: Path, room) -> None:
    recipe = recipe_with(tmp_path)
    engine, enough = engine_bytes(recipe), round(boundary_bytes(recipe) / SHARE)
    assert enough > 0
    for device, host, expected in (
        (engine + enough, 0, "device"),
        (engine + enough - 2, 2 * enough, "host"),
        (engine // 2, 2 * enough, "host"),
        (engine + enough - 2, 2 * enough - 4, "disk"),
    ):
        room(device, host)
        chosen = choose_boundary_place(recipe, GPU)
        assert chosen is not None and chosen.place == expected, (device, host)
        assert chosen.bytes == boundary_bytes(recipe)
        assert str(chosen.fields()["why"]) in str(chosen)


def test_on_a_cpu_the_device_is_the_hosts_memory(tmp_path: Path, room) -> None:
    recipe = recipe_with(tmp_path)
    enough = engine_bytes(recipe) + round(boundary_bytes(recipe) / SHARE)
    for host, expected in ((2 * enough, "device"), (2 * enough - 4, "disk")):
        room(0, host)
        chosen = choose_boundary_place(recipe, CPU)
        assert chosen is not None and chosen.place == expected


def test_the_stage_of_a_pipeline_that_holds_most_decides(tmp_path: Path, room) -> None:
    """It holds half of the layers, but the states of two stretches and what the stage before sent."""
    recipe = recipe_with(tmp_path, {"pipeline": 2}, gradient="truncated", truncate_every=2)
    parts = [memory for _, memory in memory_by_part(recipe, 2).values()]
    needed = max(memory.boundary_states for memory in parts)
    assert needed != boundary_bytes(recipe)
    engine = max(memory.total - memory.boundary_states for memory in parts)
    enough = round(needed / SHARE)
    for device, expected in ((engine + enough, "device"), (engine + enough - 2, "host")):
        room(device, 10**15)
        chosen = choose_boundary_place(recipe, GPU)
        assert chosen is not None and (chosen.place, chosen.bytes) == (expected, needed)
    on_disk = recipe_with(tmp_path, {"pipeline": 2}, gradient="truncated", truncate_every=2, boundary_states="disk")
    chosen = choose_boundary_place(on_disk, GPU)
    assert chosen is not None and (chosen.place, chosen.bytes) == ("disk", needed)


@pytest.mark.parametrize("parts", [["optimizer"], ["optimizer", "parameters"]], ids="+".join)
def test_what_is_offloaded_is_set_aside_of_the_hosts_memory(tmp_path: Path, room, parts: list[str]) -> None:
    recipe = recipe_with(tmp_path, {"zero_stage": 3, **{f"offload_{part}": True for part in parts}})
    # A share of the fp32 weights that are stepped, of two moments, and of the weights.
    offloaded = num_parameters(recipe.model) * 4 * (3 + len(parts) - 1) // 2
    enough = round(boundary_bytes(recipe) / SHARE)
    for host, expected in ((offloaded + enough, "host"), (offloaded + enough - 2, "disk")):
        room(0, 2 * host)
        chosen = choose_boundary_place(recipe, GPU)
        assert chosen is not None and chosen.place == expected
    (estimate,) = (memory for _, memory in memory_by_part(recipe, 2).values())
    for host, expected in ((offloaded + estimate.total, "device"), (offloaded + engine_bytes(recipe), "disk")):
        room(0, 2 * (host + boundary_bytes(recipe)))
        chosen = choose_boundary_place(recipe, CPU)
        assert chosen is not None and chosen.place == expected


def test_all_ranks_go_where_the_one_with_the_least_room_does(tmp_path: Path, room) -> None:
    recipe = recipe_with(tmp_path)
    room(10**15, 10**15, other={"device": 0, "host": 10**15})
    chosen = choose_boundary_place(recipe, GPU)
    assert chosen is not None and chosen.place == "host"
    assert "0 B free on the device" not in chosen.why, "of the host, where they are"


def test_what_the_recipe_says_holds_and_whole_rows_have_none(tmp_path: Path, room) -> None:
    room(10**15, 10**15)
    chosen = choose_boundary_place(recipe_with(tmp_path, boundary_states="disk"), GPU)
    assert chosen is not None and (chosen.place, chosen.why) == ("disk", "as training.boundary_states says")
    assert choose_boundary_place(recipe_with(tmp_path, segment_length=None), GPU) is None
