"""A model as one rank of a layout holds it, without memory for its parameters and without other ranks."""

from __future__ import annotations

from dataclasses import fields

import torch

from model import ModelConfig, TitansLM
from model.undrawn import undrawn
from parallel.distribute import distribute
from parallel.mesh import AXES, Group, Layout, Mesh
from parallel.pipeline_stages import Balance, cut_to_stage, stage_layers
from parallel.process import World


def model_of_rank(
    config: ModelConfig, layout: Layout, rank: int, *, context: int, balance: Balance = "flops"
) -> TitansLM:
    """The part of the model that a rank holds, on the meta device.

    Args:
        context: tokens of a training row, which a pipeline's stages are balanced for.
        balance: see `parallel.pipeline_stages.stage_layers`.

    Raises:
        ValueError: the model has no such layout.
    """
    model = undrawn(lambda: TitansLM(config))
    distribute(model, lone_mesh(layout, rank))
    if layout.pipeline > 1:
        stages = stage_layers(model, layout.pipeline, balance, context)
        cut_to_stage(model, stages, layout.place(rank).pipeline)
    return model


def lone_mesh(layout: Layout, rank: int) -> Mesh:
    """A rank's place, with nobody to talk to."""
    world = World(rank, layout.ranks, 0, torch.device("meta"))
    groups = {field.name: Group((rank,), 0, None) for field in fields(Mesh)}
    for axis in AXES:
        ranks = next(ranks for ranks in layout.groups(axis) if rank in ranks)
        groups[axis] = Group(ranks, ranks.index(rank), None)
    return Mesh(**{**groups, "world": world, "layout": layout, "place": layout.place(rank)})
