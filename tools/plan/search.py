"""The layouts that a recipe could have on a cluster, the fastest that fit first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

from parallel.config import ParallelConfig
from pretrain.config import Recipe
from pretrain.errors import UserError
from tools.plan.cluster import Cluster
from tools.plan.memory import RankMemory, rank_memory
from tools.plan.rates import Rates
from tools.plan.timing import StepTime, step_time

USABLE = 0.9
"""Of a device's memory: the rest is left to what allocators lose and libraries take."""

Overrides = tuple[tuple[str, str], ...]
"""Fields by dotted name and their values, as on the command line."""


@dataclass(frozen=True)
class Candidate:
    """A layout, with what it would need and take."""

    recipe: Recipe
    overrides: Overrides
    memory: RankMemory
    """Of the rank that needs the most."""
    time: StepTime
    dropped: tuple[str, ...] = ()
    """Options that the recipe sets and this layout does not have, with what they belong to."""

    def fits(self, cluster: Cluster) -> bool:
        """Whether every rank has the memory."""
        return self.memory.total <= USABLE * cluster.device.memory_bytes


@dataclass(frozen=True)
class Search:
    """What a search found."""

    fitting: list[Candidate]
    """The fastest first."""
    too_large: list[Candidate]
    """Those that take more memory than there is, the smallest first."""
    refused: Counter[str]
    """Why the others are not possible, and how many for that reason."""


def plan_layout(
    recipe: Recipe, cluster: Cluster, rates: Rates, overrides: Overrides = (), dropped: tuple[str, ...] = ()
) -> Candidate:
    """A recipe's layout on a cluster. Raises UserError where it has none there."""
    try:
        layout = recipe.parallel.layout(cluster.gpus)
        recipe.batches(cluster.gpus)
        # Ranks of one stage hold alike, and the first tensor rank of the first replica the most.
        ranks = [layout.rank(layout.place(0)._replace(pipeline=stage)) for stage in range(layout.pipeline)]
        memory = max((rank_memory(recipe, layout, rank) for rank in ranks), key=lambda each: each.total)
        return Candidate(recipe, overrides, memory, step_time(recipe, layout, cluster, rates), dropped)
    except ValueError as error:
        raise UserError(str(error)) from error


def search(load: Callable[[Overrides], Recipe], cluster: Cluster, rates: Rates) -> Search:
    """Every layout of the model on the cluster's GPUs.

    Args:
        load: the recipe with fields set; it raises UserError for those that do not fit together.
    """
    candidates, refused = [], Counter[str]()
    for overrides, dropped in _layouts(load(()), cluster):
        try:
            candidates.append(plan_layout(load(overrides), cluster, rates, overrides, dropped))
        except UserError as error:
            refused[str(error)] += 1
    fitting = [candidate for candidate in candidates if candidate.fits(cluster)]
    return Search(
        sorted(fitting, key=lambda candidate: (candidate.time.total, candidate.memory.total)),
        sorted((c for c in candidates if not c.fits(cluster)), key=lambda candidate: candidate.memory.total),
        refused,
    )


class _Option(NamedTuple):
    """A field of `parallel` that some layouts alone have."""

    name: str
    belongs_to: str
    is_there: Callable[[int, int], bool]
    """Of so many stages of a pipeline, and a ZeRO stage."""


_OPTIONS = (
    _Option("balance_stages", "a pipeline", lambda stages, zero: stages > 1),
    _Option("reduce_gradients", "zero_stage 2 and 3", lambda stages, zero: zero >= 2),
    _Option("offload_optimizer", "zero_stage 3", lambda stages, zero: zero == 3),
    _Option("offload_parameters", "zero_stage 3", lambda stages, zero: zero == 3),
    _Option("gather_ahead_elements", "zero_stage 3", lambda stages, zero: zero == 3),
    _Option("keep_gathered_below", "zero_stage 3", lambda stages, zero: zero == 3),
)


def _layouts(recipe: Recipe, cluster: Cluster) -> Iterator[tuple[Overrides, tuple[str, ...]]]:
    """The fields of each layout, and which of the recipe's options they set back because the layout has no use for
    them. All others stay as the recipe has them.
    """

    def divisors(number: int) -> list[int]:
        return [n for n in range(1, number + 1) if number % n == 0]

    heads, layers = recipe.model.num_heads, recipe.model.num_layers
    tensor = [n for n in divisors(heads) if n <= cluster.gpus_per_node]  # these talk the most
    stages = [n for n in divisors(cluster.gpus) if n <= layers]
    for t, s, p, zero, again in product(tensor, divisors(heads), stages, (1, 2, 3), (False, True)):
        if cluster.gpus % (t * s * p) or (p > 1 and zero > 1) or (s > 1 and recipe.model.variant == "mac"):
            continue
        back, dropped = _set_back(recipe.parallel, p, zero)
        for sharded in _sharded_norms(recipe.parallel, t):
            lost = ("tensor_shard_norms true: it belongs to tensor ranks",)
            yield (
                (
                    ("parallel.tensor", str(t)),
                    ("parallel.tensor_shard_norms", _word(sharded)),
                    ("parallel.sequence", str(s)),
                    ("parallel.pipeline", str(p)),
                    ("parallel.zero_stage", str(zero)),
                    ("parallel.activation_checkpointing", _word(again)),
                    *back,
                ),
                (*(lost if recipe.parallel.tensor_shard_norms and not sharded else ()), *dropped),
            )


def _sharded_norms(parallel: ParallelConfig, tensor: int) -> tuple[bool, ...]:
    if tensor == 1:
        return (False,)
    return (True,) if parallel.tensor_shard_norms else (False, True)


def _set_back(parallel: ParallelConfig, stages: int, zero: int) -> tuple[Overrides, tuple[str, ...]]:
    """The options that a layout has no use for, as they are where nothing is said; and what is lost by that."""
    defaults = ParallelConfig.model_fields
    idle = [each for each in _OPTIONS if not each.is_there(stages, zero)]
    lost = [each for each in idle if getattr(parallel, each.name) != defaults[each.name].default]
    return (
        tuple((f"parallel.{each.name}", _word(defaults[each.name].default)) for each in lost),
        tuple(f"{each.name} {_word(getattr(parallel, each.name))}: it belongs to {each.belongs_to}" for each in lost),
    )


def _word(value: Any) -> str:
    """As on the command line."""
    return str(value).lower() if isinstance(value, bool) else str(value)
