"""The time of a step, divided into what it is spent on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from model.flops import flops_per_token, head_flops
from parallel.mesh import Layout
from pretrain.config import Recipe
from pretrain.plan import stretch_segments
from tools.plan.cluster import Cluster
from tools.plan.memory import layers_of_stages
from tools.plan.rates import Rates
from tools.plan.traffic import (
    Messages,
    along_pipeline,
    along_sequence,
    along_tensor,
    of_gradients,
    of_parameters,
    over_tied_stages,
    sent_bytes,
)


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
    slowest = max((_of_stage(step, number, rates) for number in range(layout.pipeline)), key=lambda each: sum(each))
    bubble = (layout.pipeline - 1) / step.passes * (slowest.compute + slowest.memory + slowest.activations)
    exposed = slowest.activations + slowest.replicas + _pipeline_seconds(step) + _tied_seconds(step)
    return StepTime(slowest.compute, slowest.memory, exposed, bubble)


class _StageSeconds(NamedTuple):
    """What a stage does in a step."""

    compute: float
    memory: float
    activations: float
    """Between the ranks that divide its layers."""
    replicas: float


def _of_stage(step: _Step, stage: int, rates: Rates) -> _StageSeconds:
    compute, memory = _computing(step, _stages(step)[stage], rates)
    activations = _tensor_seconds(step, stage) + _sequence_seconds(step, stage)
    return _StageSeconds(compute, memory, activations, _replica_seconds(step, stage, compute + memory))


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


def _replica_seconds(step: _Step, stage: int, computing: float) -> float:
    """ZeRO: gradients are summed behind the last pass or every one, or beside its backward; parameters are gathered
    behind the step, or, in stage 3, before every use, beside the computing.
    """
    layout, parallel = step.layout, step.recipe.parallel
    replicas = layout.data * layout.sequence
    reductions = step.passes if parallel.reduce_gradients == "backward" else 1
    summed, gathered = (
        _seconds(step, messages(step.recipe, layout, stage), replicas, span=replicas * layout.tensor)
        for messages in (of_gradients, of_parameters)
    )
    backward = computing / step.passes * 2 / 3 if parallel.sums_beside_backward(step.passes) else 0.0
    exposed = reductions * max(0.0, summed - backward)
    if parallel.zero_stage == 3:
        return exposed + max(0.0, step.passes * (step.forwards + 1) * gathered - computing)
    return exposed + gathered


def _seconds(step: _Step, messages: Messages, ranks: int, *, span: int) -> float:
    """Of messages among so many ranks, which lie within `span` neighbouring ones."""
    return sent_bytes(messages, ranks) / step.cluster.link_bytes(span)


def _tensor_seconds(step: _Step, stage: int) -> float:
    """Sums, gatherings and exchanges of activations, forward and backward."""
    ranks = step.layout.tensor
    return _seconds(step, along_tensor(step.recipe, step.layout, stage), ranks, span=ranks)


def _sequence_seconds(step: _Step, stage: int) -> float:
    """All-to-alls between stretches of rows and heads, forward and backward."""
    ranks = step.layout.sequence
    messages = along_sequence(step.recipe, step.layout, stage)
    return _seconds(step, messages, ranks, span=ranks * step.layout.tensor)


def _pipeline_seconds(step: _Step) -> float:
    """Activations to the next stage, and as many gradients back."""
    sent = along_pipeline(step.recipe, step.layout, stage=0)
    return 2 * _seconds(step, sent, step.layout.pipeline, span=step.layout.ranks)


def _tied_seconds(step: _Step) -> float:
    """The sum of a tied embedding's gradients, of its two stages."""
    return _seconds(step, over_tied_stages(step.recipe, step.layout, 0), 2, span=step.layout.ranks)
