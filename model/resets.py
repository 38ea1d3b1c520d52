"""Where rows begin a new document inside the tokens of one call, as the layers use it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

BEFORE = -(2**40)
"""In `Resets.begins`: the token's document began before the call. Far enough from 0 that no lag reaches it."""


@dataclass(frozen=True)
class Resets:
    """Beginnings of documents within T tokens of B rows."""

    rows: Mapping[int, Tensor]
    """[B] bool, which rows begin there, for each index at which one does; in ascending order."""
    begins: Tensor | None
    """[B, T] int64: the index at which each token's document begins, or BEFORE; None where no row of the call does,
    and `rows` holds those whose memory alone has to be brought to its start."""
    _first_visible: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def first_visible(self, offset: int) -> Tensor | None:
        """[B, T] int64: the first key that each token sees, behind `offset` cached ones (see `kernels.attention`).

        One tensor for all layers, by which attention knows that it has read these bounds.
        """
        if self.begins is None:
            return None
        if offset not in self._first_visible:
            self._first_visible[offset] = self.begins + offset
        return self._first_visible[offset]

    def piece(self, start: int, stop: int) -> Resets | None:
        """Those of tokens start..stop-1, as a call on these alone would have them; None where there are none."""
        rows = {index - start: rows for index, rows in self.rows.items() if start <= index < stop}
        if not rows:
            return None
        begins = None
        if self.begins is not None:
            inside = self.begins[:, start:stop]
            begins = torch.where(inside < start, BEFORE, inside - start)
        return Resets(rows, begins)


def find_resets(resets: Tensor | None, restart: Tensor | None, device: torch.device) -> Resets | None:
    """What the layers need of the rows' resets; None where no row begins anew.

    Args:
        resets: [B, T] bool, True at the first token of a document; on the CPU this waits for no device.
        restart: [B] bool, rows whose memory begins anew at the call's first token (see ModelState.restart).
    """
    indices = [] if resets is None else resets.any(0).nonzero().flatten().tolist()
    if not indices:
        return None if restart is None else Resets({0: restart}, None)
    rows = {index: resets[:, index].to(device) for index in indices}
    if restart is not None:
        rows = {0: rows[0] | restart if 0 in rows else restart, **{i: found for i, found in rows.items() if i > 0}}
    columns = torch.arange(resets.shape[1], device=resets.device)
    begins = torch.where(resets, columns, BEFORE).cummax(1).values
    return Resets(rows, begins.to(device))
