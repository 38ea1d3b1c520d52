"""The memory of each rank of a layout."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from model import ModelConfig, TitansLM
from model.undrawn import undrawn
from parallel.mesh import Layout, Place
from parallel.pipeline_stages import Balance, stage_layers
from parallel.rank_model import model_of_rank
from parallel.shares import Held
from parallel.slices import slice_of
from pretrain.config import Recipe
from pretrain.plan import MemoryEstimate, estimate_memory


@dataclass(frozen=True)
class RankMemory(MemoryEstimate):
    """As the dry run's estimate, and what collectives need."""

    buckets: int
    """What gradients are summed, and parameters gathered, in."""


def held_parameters(recipe: Recipe, layout: Layout, rank: int) -> tuple[tuple[Held, ...], ...]:
    """What a rank's replicas hold, by the optimizer's groups: what decays, and what does not. Raises ValueError for a
    layout that the model does not have.
    """
    place = layout.place(rank)
    # Replicas hold alike.
    alike = Layout(pipeline=layout.pipeline, tensor=layout.tensor)
    balance, context = recipe.parallel.balance_stages, recipe.training.sequence_length
    return _held(recipe.model, alike, alike.rank(Place(place.pipeline, 0, 0, place.tensor)), balance, context)


@lru_cache(maxsize=256)
def _held(
    config: ModelConfig, layout: Layout, rank: int, balance: Balance, context: int
) -> tuple[tuple[Held, ...], ...]:
    model = model_of_rank(config, layout, rank, context=context, balance=balance)
    decayed = model.decay_parameters()
    parameters = list(model.named_parameters())
    return tuple(
        tuple(Held(n, slice_of(p), p.numel()) for n, p in parameters if (n in decayed) == decays)
        for decays in (True, False)
    )


def rank_memory(recipe: Recipe, layout: Layout, rank: int) -> RankMemory:
    """The memory of a rank. Raises ValueError for a layout that the model does not have, UserError for one that the
    batch does not divide over.
    """
    parallel, stage = recipe.parallel, layout.place(rank).pipeline
    held = sum(h.numel for group in held_parameters(recipe, layout, rank) for h in group)
    layers = len(layers_of_stages(recipe, layout)[stage])
    estimate = estimate_memory(recipe, held, layout.ranks, stage=stage, layers=layers)
    buckets = 4 * min(parallel.bucket_elements, held) if layout.data * layout.sequence > 1 else 0
    if parallel.zero_stage == 3:
        buckets += number_bytes(recipe) * min(parallel.gather_ahead_elements, held)
    return RankMemory(**vars(estimate), buckets=buckets)


def layers_of_stages(recipe: Recipe, layout: Layout) -> list[range]:
    """The layers of each stage."""
    return _stages(recipe.model, layout.pipeline, recipe.parallel.balance_stages, recipe.training.sequence_length)


@lru_cache(maxsize=256)
def _stages(config: ModelConfig, stages: int, balance: Balance, context: int) -> list[range]:
    return stage_layers(undrawn(lambda: TitansLM(config)), stages, balance, context)


def number_bytes(recipe: Recipe) -> int:
    """Of a number that the model computes with."""
    return 2 if recipe.parallel.precision == "bf16" else 4
