"""Steps that were skipped because they were not finite, rows whose state was not, and spikes: counted, told, and, where
too many bad steps follow each other, the end of the run.
"""

from __future__ import annotations

import math

from parallel.engine import StepResult
from pretrain.agreement import DivergedError
from pretrain.config import TrainingConfig
from pretrain.guards_config import GuardsConfig
from pretrain.metrics import RunLog
from pretrain.resume import TrainerState
from pretrain.spikes import Verdict


def counted(state: TrainerState, result: StepResult) -> TrainerState:
    """The state with what the step's guards did added to its counts."""
    return state.model_copy(
        update={
            "skipped_steps": state.skipped_steps + result.skipped,
            "skipped_in_a_row": state.skipped_in_a_row + 1 if result.skipped else 0,
            "bad_states": state.bad_states + len(result.mended_rows),
        }
    )


def judged(
    state: TrainerState, result: StepResult, guards: GuardsConfig, rows: int
) -> tuple[TrainerState, Verdict | None]:
    """The state with the step, the last of `rows` rows, compared with those before it, and what is said of it: nothing
    while steps are not judged, or of one that is not finite, which leaves a row of spikes as it is.
    """
    if result.skipped:
        return state, None
    loss, norm = float(result.loss), float(result.grad_norm)
    verdict, spikes = state.spikes.verdict(guards, loss, norm), state.spikes
    if verdict is not None and guards.on_spike == "skip":
        verdict = verdict._replace(is_spike=result.held_back)  # on which all ranks agree
    if verdict is not None and verdict.is_spike:
        position = 0 if state.cursor is None else state.cursor.position
        spikes = spikes.with_spike(state.step, position - rows)
    else:
        spikes = spikes.without_row()
    if not result.held_back:
        spikes = spikes.with_taken(loss, norm, guards.window)
    return state.model_copy(update={"spikes": spikes}), verdict


def report_spike(
    log: RunLog, state: TrainerState, result: StepResult, verdict: Verdict | None, batch: tuple[int, int], **phase: str
) -> None:
    """Write and print that the step which led to `state` was a spike, if it was.

    Args:
        batch: its rows and tokens.
    """
    if verdict is None or not verdict.is_spike:
        return
    rows, tokens = batch
    position = 0 if state.cursor is None else state.cursor.position
    log.event(
        "spike",
        step=state.step,
        tokens=state.tokens,
        **phase,
        loss=float(result.loss),
        gradient_norm=float(result.grad_norm),
        z={"loss": _written(verdict.loss_z), "gradient_norm": _written(verdict.gradient_norm_z)},
        action="skip" if result.held_back else "log",
        of_tokens=(state.tokens - tokens, state.tokens),
        of_rows=(position - rows, position),
        in_a_row=state.spikes.in_a_row,
        total=state.spikes.total,
    )
    if result.held_back or state.spikes.in_a_row == 1:
        way = "skipped; weights and optimizer are as before" if result.held_back else "taken all the same"
        log.say(
            f"step {state.step}: {_described(result)}: a spike (z {verdict.loss_z:.1f} and "
            f"{verdict.gradient_norm_z:.1f}), {way} ({state.spikes.in_a_row} in a row)"
        )


def guard_curves(state: TrainerState, verdict: Verdict | None = None) -> dict[str, float | None]:
    """What is drawn over the steps: the counts since the run's beginning, and what is said of the step."""
    judged = {
        "guard/loss_z": None if verdict is None else verdict.loss_z,
        "guard/gradient_norm_z": None if verdict is None else verdict.gradient_norm_z,
    }
    counts = {"skipped_steps": state.skipped_steps, "bad_states": state.bad_states, "spikes": state.spikes.total}
    return {f"guard/{name}": float(count) for name, count in counts.items()} | judged


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
