"""Steps that were skipped because they were not finite, and rows whose state was not: counted, told, and, where too
many steps follow each other, the end of the run.
"""

from __future__ import annotations

import math

from parallel.engine import StepResult
from pretrain.agreement import DivergedError
from pretrain.config import TrainingConfig
from pretrain.metrics import RunLog
from pretrain.resume import TrainerState


def counted(state: TrainerState, result: StepResult) -> TrainerState:
    """The state with what the step's guards did added to its counts."""
    return state.model_copy(
        update={
            "skipped_steps": state.skipped_steps + result.skipped,
            "skipped_in_a_row": state.skipped_in_a_row + 1 if result.skipped else 0,
            "bad_states": state.bad_states + len(result.mended_rows),
        }
    )


def guard_curves(state: TrainerState) -> dict[str, float]:
    """What is drawn over the steps: the counts since the run's beginning."""
    return {"guard/skipped_steps": float(state.skipped_steps), "guard/bad_states": float(state.bad_states)}


def report(log: RunLog, state: TrainerState, result: StepResult, training: TrainingConfig, **phase: str) -> None:
    """Write and print what the guards did in the step that led to `state`, if anything.

    `phase`: its name, where there are several.
    """
    where = {"step": state.step, "tokens": state.tokens, **phase}
    ways = {
        "reset": (result.reset_rows, "begin anew"),
        "rollback": (result.rolled_back_rows, "go on from their last good one"),
    }
    for action, (rows, way) in ways.items():
        if rows:
            log.event("bad_state", **where, rows=rows, action=action, total=state.bad_states)
            log.say(f"step {state.step}: the state of rows {_listed(rows)} is not finite; they {way}")
    if result.skipped:
        log.event(
            "skip",
            **where,
            loss=_written(float(result.loss)),
            gradient_norm=_written(float(result.grad_norm)),
            rows=sorted({*result.bad_rows, *result.mended_rows}),
            in_a_row=state.skipped_in_a_row,
            total=state.skipped_steps,
        )
        log.say(
            f"step {state.step}: {_described(result)}: not finite, and skipped; weights and optimizer are as before "
            f"({state.skipped_in_a_row} in a row, {training.max_bad_steps} end the run)"
        )
    if result.skipped or result.mended_rows:
        log.scalars(state.step, guard_curves(state))


def too_many(state: TrainerState, training: TrainingConfig) -> bool:
    """Whether the run is to end for the steps that were skipped in a row."""
    return state.skipped_in_a_row >= training.max_bad_steps


def end_of_run(state: TrainerState, result: StepResult, checkpoint: str) -> DivergedError:
    """The error that says why, what is saved and what can be done."""
    return DivergedError(
        f"step {state.step}: {_described(result)}: not finite, the {_ordinal(state.skipped_in_a_row)} step in a row; "
        f"training.max_bad_steps of them end the run. {checkpoint} holds weights and optimizer as the last good step, "
        f"{state.step - state.skipped_in_a_row}, left them, and the place in the data behind these steps: lower "
        "optimizer.lr or optimizer.gradient_clip and give the same command again, or, where the weights are spoiled "
        "already, give an earlier checkpoint as --resume and move the newer ones away"
    )


def _described(result: StepResult) -> str:
    return f"loss {float(result.loss):.4f}, gradient norm {float(result.grad_norm):.4f}"


def _written(value: float) -> float | str:
    """As JSON has it: no number stands for what is not finite."""
    return value if math.isfinite(value) else str(value)


def _ordinal(number: int) -> str:
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def _listed(rows: list[int]) -> str:
    shown = ", ".join(map(str, rows[:8]))
    return shown if len(rows) <= 8 else f"{shown} and {len(rows) - 8} more"
