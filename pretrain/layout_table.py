"""The dry run's table of ranks: where each stands, what it reads, holds and is estimated to take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from parallel.mesh import AXES
from pretrain.config import Recipe
from pretrain.quantities import size_text

_LISTED_RANKS = 64
"""Of more, those that differ in the tokens alone that they read share a line."""


class Memory(Protocol):
    """An estimate."""

    @property
    def total(self) -> int:
        """Bytes."""


def layout_lines(
    recipe: Recipe, ranks: int, parts: Mapping[tuple[int, int], tuple[int, Memory]], *, whole_gradients: bool
) -> list[str]:
    """How the ranks are laid out, what each reads and holds its share of, and a line for every rank.

    Args:
        parts: the parameters that a rank has of the model, and its memory, by its place along pipeline and tensor.
        whole_gradients: whether ranks hold the gradients of all these parameters, whatever the ZeRO stage.
    """
    parallel = recipe.parallel
    layout, micro_batch = parallel.layout(ranks), recipe.training.micro_batch_size
    replicas, reader = layout.data * layout.sequence, "rank r" if layout.data == ranks else "data rank r"
    kept = {"optimizer": 1, "gradients": 2, "parameters": 3}
    shared = [name for name, first in kept.items() if parallel.zero_stage >= first]
    if "gradients" in shared and whole_gradients:
        shared.remove("gradients")
    header: tuple[str, ...] = ("rank", *AXES, "parameters", "memory (estimate)")
    rows: list[tuple[str, ...]] = []
    for rank, place in enumerate(map(layout.place, range(ranks))):
        rows.append((str(rank), *map(str, place), *_columns(parts[place.pipeline, place.tensor])))
    if ranks > _LISTED_RANKS:
        header = ("ranks", "pipeline", "tensor", "parameters", "memory (estimate)")
        rows = [(str(replicas), *map(str, place), *_columns(part)) for place, part in parts.items()]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return [
        f"ranks               {ranks}: {layout}; ZeRO {parallel.zero_stage}, {parallel.precision}",
        f"  {reader:<17} rows {micro_batch} x ({layout.data} m + r) and on for micro-batch m",
        f"  every rank        holds 1/{replicas} of its part's {', '.join(shared) or 'nothing'}",
        *("  " + "  ".join(map(str.rjust, row, widths)) for row in (header, *rows)),
    ]


def _columns(part: tuple[int, Memory]) -> tuple[str, str]:
    parameters, memory = part
    return f"{parameters:,}", size_text(memory.total)
