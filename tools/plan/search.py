"""The layouts that a recipe could have on a cluster, the fastest that fit first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

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


def plan_layout(recipe: Recipe, cluster: Cluster, rates: Rates, overrides: Overrides = ()) -> Candidate:
    """A recipe's layout on a cluster. Raises UserError where it has none there."""
    try:
        layout = recipe.parallel.layout(cluster.gpus)
        recipe.batches(cluster.gpus)
        # Ranks of one stage hold alike, and the first tensor rank of the first replica the most.
        ranks = [layout.rank(layout.place(0)._replace(pipeline=stage)) for stage in range(layout.pipeline)]
        memory = max((rank_memory(recipe, layout, rank) for rank in ranks), key=lambda each: each.total)
        return Candidate(recipe, overrides, memory, step_time(recipe, layout, cluster, rates))
    except ValueError as error:
        raise UserError(str(error)) from error


def search(load: Callable[[Overrides], Recipe], cluster: Cluster, rates: Rates) -> Search:
    """Every layout of the model on the cluster's GPUs.

    Args:
        load: the recipe with fields set; it raises UserError for those that do not fit together.
    """
    candidates, refused = [], Counter[str]()
    for overrides in _layouts(load(()), cluster):
        try:
            candidates.append(plan_layout(load(overrides), cluster, rates, overrides))
        except UserError as error:
            refused[str(error)] += 1
    fitting = [candidate for candidate in candidates if candidate.fits(cluster)]
    return Search(
        sorted(fitting, key=lambda candidate: (candidate.time.total, candidate.memory.total)),
        sorted((c for c in candidates if not c.fits(cluster)), key=lambda candidate: candidate.memory.total),
        refused,
    )


def _layouts(recipe: Recipe, cluster: Cluster) -> Iterator[Overrides]:
    def divisors(number: int) -> list[int]:
        return [n for n in range(1, number + 1) if number % n == 0]

    heads, layers = recipe.model.num_heads, recipe.model.num_layers
    tensor = [n for n in divisors(heads) if n <= cluster.gpus_per_node]  # these talk the most
    stages = [n for n in divisors(cluster.gpus) if n <= layers]
    for t, s, p, zero, again in product(tensor, divisors(heads), stages, (1, 2, 3), (False, True)):
        if cluster.gpus % (t * s * p) == 0 and (p == 1 or zero == 1) and (s == 1 or recipe.model.variant != "mac"):
            yield (
                *([("parallel.tensor_shard_norms", str(t > 1).lower())] if recipe.parallel.tensor_shard_norms else []),
                ("parallel.tensor", str(t)),
                ("parallel.sequence", str(s)),
                ("parallel.pipeline", str(p)),
                ("parallel.zero_stage", str(zero)),
                ("parallel.activation_checkpointing", str(again).lower()),
            )
