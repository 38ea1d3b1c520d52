"""The model divided over the stages of a pipeline: which layers each holds, and the model cut down to them."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from model import TitansLM
from model.flops import flops_per_token, head_flops
from model.mixers import Mixed
from model.resets import Resets
from model.rope import Rotary
from model.state import LayerState

Balance = Literal["flops", "parameters"]
"""What is divided evenly."""


def divide_layers(layers: int, stages: int, *, layer: float, first: float = 0.0, last: float = 0.0) -> list[range]:
    """The layers of each stage, so that the costliest stage costs as little as it can; each holds at least one.

    Args:
        layer: what each layer costs.
        first, last: what the first stage (embedding) and the last one (head) cost beside their layers.

    Raises:
        ValueError: more stages than layers.
    """
    if stages > layers:
        raise ValueError(
            f"parallel.pipeline is {stages}, but the model has {layers} layers: each stage holds at least one; set it "
            f"to {layers} or less"
        )
    counts = [1] * stages
    costs = [layer] * stages
    costs[0] += first
    costs[-1] += last
    for _ in range(layers - stages):
        # Among equals the last one, which holds the activations of the fewest passes.
        cheapest = min(reversed(range(stages)), key=costs.__getitem__)
        counts[cheapest] += 1
        costs[cheapest] += layer
    ends = [sum(counts[: stage + 1]) for stage in range(stages)]
    return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]


def stage_layers(model: TitansLM, stages: int, by: Balance, context: int) -> list[range]:
    """The layers of each stage of a whole model.

    Args:
        by: "flops", operations when training on sequences of `context` tokens, or "parameters".

    Raises:
        ValueError: more stages than layers.
    """
    layers = model.config.num_layers
    if by == "flops":
        head = head_flops(model.config)
        layer = (flops_per_token(model.config, context).total - head) / layers
        return divide_layers(layers, stages, layer=layer, last=head)
    layer = sum(parameter.numel() for parameter in model.blocks[0].parameters())
    table = model.embedding.weight.numel()
    return divide_layers(layers, stages, layer=layer, first=table, last=table)


def cut_to_stage(model: TitansLM, stages: list[range], stage: int) -> None:
    """Make of a whole model, in place, one stage of it. What other stages hold is replaced by modules that hand on what
    they are given, so that the model's own forward runs the stage.

    Parameters keep their names. Before the forward of any but the first stage, `receive` gives it the activations that
    arrived; any but the last gives its own, [B, T, dim], in place of a loss. A tied embedding is on the first and on
    the last stage, under its one name.
    """
    for index in range(model.config.num_layers):
        if index not in stages[stage]:
            model.blocks[index] = _OtherStagesBlock()
    if stage > 0:
        is_tied_here = model.config.tie_embeddings and stage == len(stages) - 1
        model.embedding = ReceivedActivations(model.embedding.weight if is_tied_here else None)
    if stage < len(stages) - 1:
        model.norm = nn.Identity()
        model.head = _HandOver()


def receive(model: TitansLM, activations: Tensor) -> None:
    """Have a stage's next forward begin from what the stage before gave: [B, T, dim]."""
    model.embedding.activations = activations


class ReceivedActivations(nn.Module):
    """Stands where the first stage has its embedding."""

    def __init__(self, tied_weight: nn.Parameter | None) -> None:
        super().__init__()
        self.weight = tied_weight
        """The head's, where that is the embedding's."""
        self.activations: Tensor | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        """What arrived for these tokens."""
        activations, self.activations = self.activations, None
        if activations is None:
            raise RuntimeError("a stage of a pipeline was run without the activations of the one before")
        return activations


class _OtherStagesBlock(nn.Module):
    def forward(
        self, x: Tensor, rotary: Rotary | None, state: LayerState, resets: Resets | None, with_stats: bool
    ) -> Mixed:
        """As if the block were not there."""
        return x, state, {}


class _HandOver(nn.Module):
    def forward(self, x: Tensor, targets: Tensor | None, score: Any = None) -> Tensor:
        """The activations, whatever is asked of them."""
        return x
