"""The engine that a layout asks for."""

from __future__ import annotations

from typing import Any

import torch

from model import TitansLM
from parallel.config import ParallelConfig
from parallel.engine import Engine
from parallel.mesh import Mesh
from parallel.pipeline_engine import PipelineEngine
from parallel.pipeline_stages import stage_layers


def make_engine(
    model: TitansLM,
    optimizer: torch.optim.AdamW,
    config: ParallelConfig,
    mesh: Mesh,
    *,
    sequence_length: int,
    **options: Any,
) -> Engine:
    """The `Engine` of a model, in a pipeline where the layout has one. Every rank calls it.

    Args:
        model: see `parallel.distribute`; all its layers, also where stages of a pipeline hold some each.
        sequence_length: tokens of a row, by which the work of layers and head is weighed.
        options: see `Engine`.
    """
    if mesh.pipeline.size == 1:
        return Engine(model, optimizer, config, mesh, **options)
    stages = stage_layers(model, mesh.pipeline.size, config.balance_stages, sequence_length)
    return PipelineEngine(model, optimizer, config, mesh, stages=stages, **options)
