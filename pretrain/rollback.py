"""Going back after spikes in a row: to the newest checkpoint of before the first of them, and on with the data behind
the last (as PaLM's training did, arXiv 2204.02311, section 5.1).
"""

from __future__ import annotations

from pathlib import Path

from parallel import process
from pretrain.agreement import DivergedError, agreed
from pretrain.checkpoints import Checkpoints, checkpoint_step, list_checkpoints
from pretrain.guards_config import GuardsConfig
from pretrain.metrics import RunLog
from pretrain.resume import TrainerState, read_trainer_state


def is_due(state: TrainerState, guards: GuardsConfig) -> bool:
    """Whether so many steps in a row were spikes, and skipped, that the run is to go back."""
    return guards.on_spike == "skip" and state.spikes.in_a_row >= guards.max_spikes


def checkpoint_before_spikes(
    checkpoints: Checkpoints, state: TrainerState, begun_from: Path | None, log: RunLog
) -> tuple[Path, TrainerState] | None:
    """The newest whole checkpoint of before the row of spikes that `state` ends in, and what it says of the run; None
    where there is none of this phase or its beginning. Every rank calls it.

    Args:
        begun_from: the checkpoint that the phase began from, where there is one, whatever folder it is in.

    Raises:
        SharedUserError: one cannot be read.
    """
    first = state.spikes.first_step
    assert first is not None, "a row of spikes has a beginning"
    candidates = process.broadcast_object(list_checkpoints(checkpoints.folder))
    if begun_from is not None and begun_from not in candidates:
        candidates.append(begun_from)
    phase_begins = state.tokens - state.phase_tokens
    for folder in candidates:
        if (checkpoint_step(folder) or 0) >= first:
            continue
        if found := checkpoints.check(folder):
            log.say(f"checkpoint {folder.name} is damaged, and not gone back to: {'; '.join(found)}")
            continue
        with agreed():
            earlier = read_trainer_state(folder)
        if earlier.tokens >= phase_begins:
            return folder, earlier
    return None


def gone_back(state: TrainerState, earlier: TrainerState) -> TrainerState:
    """Where the run stands when it has gone back: weights, optimizer and tokens of then, the place in the data and the
    counts of now.

    Steps go on counting, so that no number stands for two steps, and the newest checkpoint is that with the largest.
    """
    spikes = earlier.spikes if earlier.phase == state.phase else earlier.spikes.in_next_phase()
    return state.model_copy(
        update={"tokens": earlier.tokens, "spikes": state.spikes.gone_back(spikes), "skipped_in_a_row": 0}
    )


def report(log: RunLog, state: TrainerState, after: TrainerState, folder: Path, **phase: str) -> None:
    """Write and print that the run went back from `state` to a checkpoint, and stands as `after` says."""
    rows = (state.spikes.first_row, None if state.cursor is None else state.cursor.position)
    log.event(
        "rollback",
        step=state.step,
        tokens=state.tokens,
        **phase,
        from_step=state.step,
        to_step=checkpoint_step(folder),
        to_tokens=after.tokens,
        checkpoint=str(folder),
        spikes=state.spikes.in_a_row,
        first_spike=state.spikes.first_step,
        rows=rows,
        rollbacks=after.spikes.rollbacks,
    )
    log.say(
        f"step {state.step}: {state.spikes.in_a_row} spikes in a row; weights and optimizer are those of "
        f"{folder.name} again, at {after.tokens:,} tokens, and the data go on behind row {rows[1]}"
    )


def end_of_run(state: TrainerState, guards: GuardsConfig, has_earlier: bool, checkpoint: str) -> DivergedError:
    """The error that says why the run can't go back, what is saved and what can be done.

    Args:
        has_earlier: whether there is a checkpoint to go back to.
    """
    why = (
        f"the phase went back {state.spikes.rollbacks} time(s) already, as often as guards.max_rollbacks allows"
        if has_earlier
        else "there is no whole checkpoint of this phase from before the first of them (checkpoint.every_tokens says "
        "how often one is written)"
    )
    return DivergedError(
        f"step {state.step}: {state.spikes.in_a_row} steps in a row, from step {state.spikes.first_step} on, had a "
        f"loss or gradient norm far above those before (guards.loss_z {guards.loss_z}, guards.gradient_norm_z "
        f"{guards.gradient_norm_z}), and {why}. {checkpoint} holds weights and optimizer as the last step that was "
        "taken left them, and the place in the data behind the spikes: lower optimizer.lr or optimizer.gradient_clip, "
        "or raise guards.loss_z and guards.gradient_norm_z if such steps are as they should be, and give the same "
        "command again"
    )
