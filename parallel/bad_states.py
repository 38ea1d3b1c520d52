"""Rows whose carried state is not finite go back, so that they do not spoil the gradient of all.

One number that is not finite in the state of one row makes the loss of its micro-batch, and with it the gradient of the
whole step on all ranks, not finite, in this step and in all that follow. So states are looked at before a step and
behind it; the rows that are well are never touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from model import ModelState
from parallel.boundary_states import State
from parallel.carried_states import CarriedStates

OnBadState = Literal["reset", "rollback"]
"""What a row does whose state is not finite: begin anew, or go on from the state before the step that spoiled it."""


class Mended(NamedTuple):
    """The numbers of the rows whose state was not finite."""

    begun_anew: list[int]
    rolled_back: list[int]


class StateGuard:
    """Looks after carried states.

    Args:
        on_bad_state: "rollback" holds the states before a step until it is over: the memory of a second state. A row
            begins anew all the same where there is none to go back to: before the first step, for states that are not
            finite when the step begins (loaded so, or damaged since), while an attention's cache is still growing,
            where a document began within the step, since the state before it is another document's, and where the row
            went back in the step before already: then what it went back to may be what spoils the steps.

    A row's state is not finite where a part of it on any rank is not.
    """

    def __init__(self, carried: CarriedStates, on_bad_state: OnBadState) -> None:
        self._carried = carried
        self._on_bad_state = on_bad_state
        self._before: list[State] = []

    def before_step(self) -> list[int]:
        """Mends the states that a step is about to begin from, and returns the numbers of the rows that were not
        finite, all of which begin anew. Waits for the device, which has nothing to do then.
        """
        found = self._mend([], []).begun_anew
        if self._on_bad_state == "rollback":
            self._before = [self._carried.get(index) for index in range(len(self._carried))]
        return found

    def after_step(self, resets: Sequence[Tensor | None]) -> Mended:
        """Mends the states that the step led to.

        Args:
            resets: of each micro-batch, [B, T] bool, where documents began; None where none did.
        """
        before, self._before = self._before, []
        mended = self._mend(before, resets)
        self._carried.went_back = set(mended.rolled_back)
        return mended

    def _mend(self, before: list[State], resets: Sequence[Tensor | None]) -> Mended:
        states = {index: state for index in range(len(self._carried)) if (state := self._carried.get(index))}
        found = Mended([], [])
        if not states:
            return found
        found_bad = torch.stack([~finite_rows(state) for state in states.values()]).int()
        self._carried.mesh.same_rows.all_reduce(found_bad, dist.ReduceOp.MAX)
        bad = dict(zip(states, found_bad.bool(), strict=True))
        for index, rows in zip(states, found_bad.tolist(), strict=True):
            if any(rows):
                numbers = self._carried.rows(index)
                state, earlier = states[index], before[index] if before else {}
                back = torch.zeros_like(bad[index])
                if earlier and _shapes(state) == _shapes(earlier):
                    back = bad[index] & ~torch.tensor([n in self._carried.went_back for n in numbers]).to(back.device)
                    if resets[index] is not None:
                        back &= ~resets[index].any(1).to(back.device)
                    state = _rolled_back(state, earlier, back)
                self._carried.put(index, _begun_anew(state, bad[index] & ~back))
                for number, is_bad, goes_back in zip(numbers, rows, back.tolist(), strict=True):
                    if is_bad:
                        (found.rolled_back if goes_back else found.begun_anew).append(number)
        return found


def finite_rows(state: State) -> Tensor:
    """Which rows of a flat state hold nothing but finite numbers: [B] bool, on the state's device."""
    finite = [torch.isfinite(tensor).flatten(1).all(1) for tensor in state.values() if tensor.is_floating_point()]
    return torch.stack(finite).all(0)


def _begun_anew(state: State, rows: Tensor) -> State:
    """The state with some rows at a beginning."""
    reset = ModelState.from_tensors(state).reset_rows(rows).flat()
    # The memory itself goes back to W_0 in the layers, at the next step; until then it must pass for well.
    return {
        name: tensor.masked_fill(_along(rows, tensor), 0) if tensor.is_floating_point() else tensor
        for name, tensor in reset.items()
    }


def _rolled_back(state: State, before: State, rows: Tensor) -> State:
    """The state with some rows as they were `before`."""
    before = _with_restart(before)
    return {
        name: torch.where(_along(rows, new), before[name], new) if new.dim() else new
        for name, new in _with_restart(state).items()
    }


def _with_restart(state: State) -> State:
    """Also those say which rows' memory begins anew in which none's does."""
    return {"restart": torch.zeros_like(state["position"], dtype=torch.bool)} | state


def _along(rows: Tensor, tensor: Tensor) -> Tensor:
    return rows.view(-1, *(1,) * (tensor.dim() - 1))


def _shapes(state: State) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in _with_restart(state).items()}
