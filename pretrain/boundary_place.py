"""Where the states between segments wait for the backward pass: as the recipe says, or by their size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from parallel.boundary_states import PLACES, Place
from parallel.process import World, gather_objects
from pretrain.config import Recipe
from pretrain.devices import available_host_bytes, free_device_bytes
from pretrain.plan import memory_by_part
from pretrain.quantities import size_text

SHARE = 0.5
"""Of the memory that is free for them at a phase's beginning, what the states may take to wait there. The rest is for
what the estimates miss."""

_WORDS = {"device": "on the device", "host": "in the host's memory", "disk": "on disk"}


@dataclass(frozen=True)
class BoundaryPlace:
    """Where they wait, and why."""

    place: Place
    bytes: int
    """The most that a rank's take at a time, estimated from the shapes."""
    why: str

    def __str__(self) -> str:
        return f"{size_text(self.bytes)} {_WORDS[self.place]} ({self.why})"

    def fields(self) -> dict[str, Any]:
        """For an event."""
        return vars(self)


def choose_boundary_place(recipe: Recipe, world: World) -> BoundaryPlace | None:
    """Where a phase's states wait, the same on every rank; None where there are none. Every rank calls it, before it
    builds the phase's engine: what that is estimated to take is set aside.
    """
    asked = recipe.training.boundary_states
    if recipe.training.segment_length is None:
        return None
    # Of all stages of a pipeline, as all ranks take the same place; counted as if they waited on the device.
    training = recipe.training.model_copy(update={"boundary_states": "auto"})
    parts = memory_by_part(recipe.model_copy(update={"training": training}), world.size).values()
    needed = max(memory.boundary_states for _, memory in parts)
    if asked != "auto":
        return BoundaryPlace(asked, needed, "as training.boundary_states says")
    engine = max(memory.total - memory.boundary_states for _, memory in parts)
    host = available_host_bytes() // world.local_size - max(memory.host for _, memory in parts)
    if world.device.type == "cuda":
        free = {"device": free_device_bytes(world.device) - engine, "host": host}
    else:
        free = {"device": host - engine}  # which is the host's memory
    # The same everywhere, so that no rank has to wait for another one's disk.
    return max((_by_size(needed, each) for each in gather_objects(free)), key=lambda at: PLACES.index(at.place))


def _by_size(needed: int, free: dict[Place, int]) -> BoundaryPlace:
    """The first place of which they take no more than `SHARE`."""
    parts = {
        place: f"{SHARE:.0%} of the {size_text(max(room, 0))} free {_WORDS[place]}" for place, room in free.items()
    }
    for place, room in free.items():
        if needed <= SHARE * room:
            return BoundaryPlace(place, needed, f"auto: no more than {parts[place]}")
    return BoundaryPlace("disk", needed, f"auto: more than {' and '.join(parts.values())}")
