"""The time of a step, divided into what it is spent on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from model.flops import flops_per_token, head_flops
from parallel.mesh import Layout
from pretrain.config import Recipe
from pretrain.plan import stretch_segments
from tools.plan.cluster import Cluster
from tools.plan.memory import held_parameters, layers_of_stages, number_bytes
from tools.plan.rates import Rates


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on the slowest stage."""

    compute: float
    """The model's products, recomputed ones included."""
    memory_updates: float
    """The neural memory's inner forward, backward, updates and reads."""
    collectives: float
    """Waiting for other ranks' tensors, where nothing can be computed meanwhile."""
    bubble: float
    """A pipeline's stages waiting for their turn."""

    @property
    def total(self) -> float:
        """Their sum."""
        return sum(vars(self).values())


class _Step(NamedTuple):
    """Sizes that all parts of the estimate share."""

    recipe: Recipe
    layout: Layout
    cluster: Cluster
    passes: int
    """Backward passes of a step: micro-batches times segments."""
    tokens: int
    """Of a data rank's step."""
    forwards: float
    """Of each pass, in the mean: more than one where activations, or whole segments, are computed again."""

    @property
    def split(self) -> int:
        """Ranks that divide a layer's work."""
        return self.layout.tensor * self.layout.sequence

    @property
    def stretches(self) -> int:
        """Ranks that divide a row's tokens between layers."""
        return self.split if self.recipe.parallel.tensor_shard_norms else self.layout.sequence


def step_time(recipe: Recipe, layout: Layout, cluster: Cluster, rates: Rates) -> StepTime:
    """The time of one step. Raises UserError where the batch does not divide over the layout."""
    training = recipe.training
    stretch = stretch_segments(recipe)  # of which all but the last are computed again
    step = _Step(
        recipe,
        layout,
        cluster,
        passes=recipe.batches(layout.ranks).accumulation * training.num_segments,
        tokens=training.batch_tokens // layout.data,
        forwards=1 + (stretch - 1) / stretch + recipe.parallel.activation_checkpointing,
    )
    compute, memory = max((_computing(step, stage, rates) for stage in _stages(step)), key=sum)
    exposed = _replica_seconds(step, compute + memory) + _tensor_seconds(step) + _sequence_seconds(step)
    bubble = (layout.pipeline - 1) / step.passes * (compute + memory + exposed)
    return StepTime(compute, memory, exposed + _pipeline_seconds(step), bubble)


class _Stage(NamedTuple):
    layers: int
    has_head: bool


def _stages(step: _Step) -> list[_Stage]:
    stages = layers_of_stages(step.recipe, step.layout)
    return [_Stage(len(layers), number == len(stages) - 1) for number, layers in enumerate(stages)]


def _computing(step: _Step, stage: _Stage, rates: Rates) -> tuple[float, float]:
    """Seconds of a stage's model and of its memory, in a step."""
    model = step.recipe.model
    flops, head = flops_per_token(model, step.recipe.training.sequence_length), head_flops(model)
    again = (2 + step.forwards) / 3  # a backward costs two forwards
    part = again * step.tokens / step.split * stage.layers / model.num_layers
    own_head = step.tokens / step.split * head if stage.has_head else 0.0
    return rates.seconds(model.variant, part * (flops.model - head) + own_head, part * flops.memory)


def _replica_seconds(step: _Step, computing: float) -> float:
    """ZeRO: gradients are summed behind the last pass or every one, or beside its backward; parameters are gathered
    behind the step, or, in stage 3, before every use, beside the computing.
    """
    layout, parallel = step.layout, step.recipe.parallel
    replicas = layout.data * layout.sequence
    if replicas == 1:
        return 0.0
    held = held_parameters(step.recipe, layout, 0)
    elements = sum(h.numel for group in held for h in group)
    link = step.cluster.link_bytes(replicas * layout.tensor)
    way = (replicas - 1) / replicas / link
    width, stage = number_bytes(step.recipe), parallel.zero_stage
    reductions = step.passes if parallel.reduce_gradients == "backward" else 1
    summed = 4 * elements * way * (2 if stage == 0 else 1)
    backward = computing / step.passes * 2 / 3 if parallel.sums_beside_backward(step.passes) else 0.0
    exposed = reductions * max(0.0, summed - backward)
    gathered = width * elements * way
    if stage == 3:
        return exposed + max(0.0, step.passes * (step.forwards + 1) * gathered - computing)
    return exposed + (gathered if stage else 0.0)


_JOINED = {"transformer": 2, "lmm": 2, "mag": 3, "mal": 3, "mac": 4}
"""Row-parallel maps of a layer, whose outputs are summed over the tensor ranks."""
_EXCHANGED = {"transformer": 4, "lmm": 4, "mag": 8, "mal": 8}
"""Tensors of the model's width that a layer hands from stretches of rows to heads, or back."""


def _tensor_seconds(step: _Step) -> float:
    """All-reduces of activations: in each forward behind row-parallel maps, in the backward before column-parallel
    ones. Sharded norms move about as much, to and from stretches.
    """
    ranks, model = step.layout.tensor, step.recipe.model
    if ranks == 1:
        return 0.0
    size = number_bytes(step.recipe) * step.tokens / step.layout.sequence * model.dim
    times = (step.forwards + 1) * _JOINED[model.variant] * model.num_layers / step.layout.pipeline + 2
    return times * size * 2 * (ranks - 1) / ranks / step.cluster.link_bytes(ranks)


def _sequence_seconds(step: _Step) -> float:
    """All-to-alls between stretches of rows and heads, forward and backward."""
    ranks, model = step.layout.sequence, step.recipe.model
    if ranks == 1:
        return 0.0
    size = number_bytes(step.recipe) * step.tokens / ranks * model.dim / step.layout.tensor
    times = (step.forwards + 1) * _EXCHANGED[model.variant] * model.num_layers / step.layout.pipeline
    return times * size * (ranks - 1) / ranks / step.cluster.link_bytes(ranks * step.layout.tensor)


def _pipeline_seconds(step: _Step) -> float:
    """Activations to the next stage, and their gradients back."""
    if step.layout.pipeline == 1:
        return 0.0
    size = number_bytes(step.recipe) * step.tokens / step.stretches * step.recipe.model.dim
    return 2 * size / step.cluster.link_bytes(step.layout.ranks)
