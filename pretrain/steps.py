"""The steps of a phase: what is done in each of them, and what between them."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NoReturn

from model.flops import flops_per_token
from parallel.boundary_states import BoundaryStatesError
from parallel.engine import Engine, StepResult
from parallel.pipeline_schedule import expected_bubble
from parallel.process import World
from parallel.watchdog import Watchdog
from pretrain import rollback
from pretrain.agreement import DivergedError
from pretrain.checkpoints import Checkpoints, SaveError, checkpoint_step, loud
from pretrain.config import Batches, Recipe
from pretrain.data import Data, Loader
from pretrain.devices import peak_flops, peak_memory_bytes
from pretrain.errors import UserError
from pretrain.evaluation import evaluate
from pretrain.guard import counted, end_of_run, guard_curves, judged, report, report_spike, too_many
from pretrain.metrics import RunLog, Stopwatch
from pretrain.phases import Phase, Phases
from pretrain.preemption import Preempted, StopRequests
from pretrain.resume import TrainerState, checkpoint_files, restore
from pretrain.saver import Saver
from pretrain.schedule import learning_rate
from pretrain.stragglers import Stragglers

SHARE = "data/share/"
"""Curves of the realised shares of sources begin so."""


@dataclasses.dataclass(frozen=True)
class Run:
    """The parts of a phase that is being run, put together; `steps` is the loop."""

    phases: Phases
    phase: Phase
    world: World
    batches: Batches
    engine: Engine
    data: Data
    saver: Saver
    log: RunLog
    watchdog: Watchdog
    stop: StopRequests

    @property
    def recipe(self) -> Recipe:
        """The phase's."""
        return self.phase.recipe

    @property
    def checkpoints(self) -> Checkpoints:
        """The run's."""
        return self.saver.checkpoints

    @property
    def phase_field(self) -> dict[str, str]:
        """What events say of the phase: nothing where it is the only one."""
        return {"phase": self.phase.name} if len(self.phases) > 1 else {}

    def steps(self, loader: Loader, state: TrainerState, checkpoint: Path | None) -> tuple[TrainerState, Path | None]:
        """Take the steps that are left of the phase, evaluating and saving on the way and at its end; the state there
        and the newest checkpoint, `checkpoint` where no step was left.
        """
        recipe, batch_tokens = self.recipe, self.recipe.training.batch_tokens
        watch, waiting, reported, begun_from = Stopwatch(), Stopwatch(), set(), checkpoint
        stragglers = Stragglers(recipe.guards, self.engine.mesh)
        while not state.is_done(self.phase):
            step, tokens = state.step + 1, state.phase_tokens + batch_tokens
            last = tokens >= recipe.training.tokens
            record = last or step % recipe.logging.every_steps == 0
            with_stats = record and (last or step % recipe.logging.memory_interval == 0)
            self.log.step = step
            self.watchdog.feed(f"step {step}")
            if (asked := self.stop.agreed()) is not None:
                self.preempt(state, checkpoint, asked)
            watch.start()
            stragglers.begin()
            rate = learning_rate(recipe.schedule, recipe.optimizer.lr, tokens, self.batches.total_tokens)
            limits = state.spikes.limits(recipe.guards) if recipe.guards.on_spike == "skip" else None
            try:
                waiting.start()
                batches = next(loader)
                waiting.stop()
                result = self.engine.train_step(batches, rate, with_stats=with_stats, skip_above=limits)
            except BoundaryStatesError as error:
                raise UserError(str(error)) from error
            watch.stop()
            stragglers.end()
            update = {"step": step, "tokens": state.tokens + batch_tokens, "cursor": loader.cursor()}
            state = counted(state.model_copy(update=update | {"ranks": self.world.size}), result)
            self.report_damage(state, reported)
            report(self.log, state, result, recipe.training, **self.phase_field)
            if too_many(state, recipe.training):
                self.give_up(state, partial(end_of_run, state, result))
            state, verdict = judged(state, result, recipe.guards, self.batches.rows)
            report_spike(self.log, state, result, verdict, (self.batches.rows, batch_tokens), **self.phase_field)
            if record and not result.skipped:
                curves = {"speed/data_seconds": (waited := waiting.lap()), **guard_curves(state, verdict)}
                curves |= stragglers.look(waited, self.log, state, **self.phase_field)
                self.record(result, rate, state, watch, loader.curves() | curves)
            elif verdict is not None and verdict.is_spike:
                self.log.scalars(state.step, guard_curves(state, verdict))
            if rollback.is_due(state, recipe.guards):
                state, checkpoint = self.roll_back(state, begun_from)
                continue
            if last or is_due(recipe.evaluation.every_tokens, tokens, batch_tokens):
                self.evaluate(state)
            self.saver.look()
            if last or is_due(recipe.checkpoint.every_tokens, tokens, batch_tokens):
                checkpoint = self.save(state, stays=last, wait=last)
        if self.phase.is_last:
            self.log.event("done", step=state.step, tokens=state.tokens, seconds_per_step=watch.mean)
            self.log.say(f"{recipe.name}: done, {state.tokens:,} tokens; checkpoint in {self.checkpoints.folder}")
        return state, checkpoint

    def report_damage(self, state: TrainerState, reported: set[tuple[str, str]]) -> None:
        """Write which shards are left out that are not among those `reported`, by source and file; add them there."""
        for shard in () if state.cursor is None else state.cursor.skipped:
            if (shard.source, shard.shard) in reported:
                continue
            reported.add((shard.source, shard.shard))
            lost = {"documents_lost": shard.documents, "tokens_lost": shard.tokens}
            of_shard = shard.model_dump(include={"source", "shard", "expected", "found"})
            self.log.event("damage", step=state.step, tokens=state.tokens, **of_shard, **lost)
            self.log.say(f"skipped as damaged: {shard}")

    def record(
        self, result: StepResult, rate: float, state: TrainerState, watch: Stopwatch, others: dict[str, float | None]
    ) -> None:
        """Write a step's loss, speed and memory, and the layers' statistics where the step took them.

        Args:
            others: curves of the data and of guards.
        """
        watch.start()
        loss, norm = float(result.loss), float(result.grad_norm)  # waits for the device, a part of the steps' time
        watch.stop(steps=0)
        seconds = watch.lap()
        speed = self.recipe.training.batch_tokens / seconds
        flops = flops_per_token(self.recipe.model, self.recipe.training.sequence_length)
        peak = peak_flops(self.world.device, self.recipe.parallel.precision)
        capacity = None if peak is None else peak * self.world.size
        values = {
            "train/loss": loss,
            "train/learning_rate": rate,
            "train/gradient_norm": norm,
            "train/tokens": float(state.tokens),
            "speed/tokens_per_second": speed,
            "speed/seconds_per_step": seconds,
            "speed/flops": speed * flops.total,
            "speed/flops_without_memory": speed * flops.model,
            "speed/mfu": None if capacity is None else speed * flops.total / capacity,
            "speed/mfu_without_memory": None if capacity is None else speed * flops.model / capacity,
            "run/seconds_left": self.tokens_left(state) / speed,
            "device/peak_memory_gigabytes": peak_memory_bytes(self.world.device) / 1e9,
            **others,
        }
        if self.phase_field:
            values["train/phase"] = float(self.phase.number)
        padded = {}
        if self.recipe.data.pads_documents:  # all else has a target
            padded["padded_tokens"] = self.recipe.training.batch_tokens - int(result.tokens)
            values["data/padded_tokens"] = float(padded["padded_tokens"])
        if result.bubble is not None:
            padded["bubble"] = values["speed/pipeline_bubble"] = result.bubble
            self.say_bubble(result.bubble)
        if (mfu := values["speed/mfu"]) is not None:
            padded["mfu"] = mfu
        shares = {name.removeprefix(SHARE): value for name, value in others.items() if name.startswith(SHARE)}
        self.log.scalars(state.step, values)
        if result.stats is not None:
            layers = [{name: float(value) for name, value in layer.items()} for layer in result.stats]
            self.log.layers(state.step, layers)
        self.log.event(
            "step",
            step=state.step,
            tokens=state.tokens,
            loss=loss,
            learning_rate=rate,
            gradient_norm=norm,
            tokens_per_second=speed,
            **self.phase_field,
            **padded,
            **({"shares": shares} if shares else {}),
        )
        left = -(-max(self.recipe.training.tokens - state.phase_tokens, 0) // self.recipe.training.batch_tokens)
        self.log.progress(state.step, loss, rate, speed, left * watch.mean, **self.phase_field)

    def tokens_left(self, state: TrainerState) -> int:
        """Of this phase and those behind it."""
        later = self.phases.phases[len(state.done) + 1 :]
        left = max(self.recipe.training.tokens - state.phase_tokens, 0)
        return left + sum(phase.recipe.training.tokens for phase in later)

    def say_bubble(self, measured: float) -> None:
        """Print how long the stages of a pipeline wait for each other, and how long they must."""
        passes = self.batches.accumulation * self.recipe.training.num_segments
        expected = expected_bubble(self.engine.mesh.pipeline.size, passes)
        self.log.say(
            f"pipeline: stages stand idle {measured:.1%} of the time of their passes; {expected:.1%} is the least that "
            f"{passes} passes a step allow"
        )

    def evaluate(self, state: TrainerState) -> None:
        """Score the held-out data, if there is any."""
        if self.data.held_out is None:
            return
        asked, training = self.recipe.evaluation, self.recipe.training
        result = evaluate(
            self.engine,
            self.data.held_out,
            self.engine.mesh,
            sequence_length=asked.context or training.sequence_length,
            batch_size=training.micro_batch_size,
            max_tokens=asked.tokens,
            piece=training.segment_length or training.sequence_length,  # what a rank has the memory for
            by_position=asked.by_position,
            reset_window=asked.reset_window,
            begins=lambda: self.watchdog.feed(f"a batch of the evaluation behind step {state.step}"),
        )
        curves = result.curves() | result.position_curves()
        self.log.scalars(state.step, {f"evaluation/{name}": value for name, value in curves.items()})
        where = {"step": state.step, "tokens": state.tokens}
        self.log.event("eval", **where, **result.fields())
        if asked.by_position:
            self.log.event("positions", **where, reset_window=asked.reset_window, losses=result.position_rows())
        self.log.say(f"held out: {result}")

    def roll_back(self, state: TrainerState, begun_from: Path | None) -> tuple[TrainerState, Path | None]:
        """Go back to before the row of spikes that the run stands behind, and on with the data behind it; where the run
        stands then, and its newest checkpoint that is written.

        Raises DivergedError where there is nothing to go back to, or it went back too often.
        """
        self.saver.finish()
        self.watchdog.feed(f"going back behind the spikes of step {state.step}")
        found = rollback.checkpoint_before_spikes(self.saver.checkpoints, state, begun_from, self.log)
        guards = self.recipe.guards
        if found is None or state.spikes.rollbacks >= guards.max_rollbacks:
            self.give_up(state, partial(rollback.end_of_run, state, guards, found is not None))
        folder, earlier = found
        # What rows carry belongs to the data that are left out: they begin anew.
        restore(folder, self.engine, earlier.model_copy(update={"cursor": None}), self.recipe.seed, self.world)
        after = rollback.gone_back(state, earlier)
        rollback.report(self.log, state, after, folder, **self.phase_field)
        self.log.expect(after.total_steps(self.phases, self.world.size))
        return after, self.save(after, stays=False, wait=False)

    def give_up(self, state: TrainerState, explain: Callable[[str], DivergedError]) -> NoReturn:
        """Save the run as it stands and raise the error that explains it, given the checkpoint's folder."""
        # One more than are kept otherwise: the weights may be spoiled, and those of before must not go for them. The
        # counts begin anew, so that the resumed run may skip as many.
        anew = {"skipped_in_a_row": 0, "spikes": state.spikes.without_row().model_copy(update={"rollbacks": 0})}
        folder = self.save(state.model_copy(update=anew), stays=state.is_done(self.phase), spare=1)
        raise explain(str(folder))

    def preempt(self, state: TrainerState, checkpoint: Path | None, asked: signal.Signals) -> NoReturn:
        """Save the run as it stands, unless `checkpoint` or one that is being written is that, and raise Preempted.

        Where that fails the run goes on from the newest checkpoint that is whole: the next attempt may find another
        node, or room. Raises SaveError where there is none.
        """
        failure = None
        try:
            self.saver.finish()
        except SaveError as error:  # told already
            failure = error
        held = self.saver.newest or checkpoint
        if state.step > 0 and (held is None or checkpoint_step(held) != state.step):
            try:
                held, failure = self.save(state, stays=False), None
            except SaveError as error:
                failure = error
        self.checkpoints.require_no_newer_copy()  # whose log it is then
        self.log_preemption(state, held, asked, failure)
        raise Preempted(asked.name)

    def log_preemption(
        self, state: TrainerState, checkpoint: Path | None, asked: signal.Signals, failure: SaveError | None
    ) -> None:
        """Tell of a stop on request, behind which the run goes on from `checkpoint`.

        Args:
            failure: why that is not of the last step; raised where there is no checkpoint at all.
        """
        if failure is not None:
            if checkpoint is None:
                raise failure
            if self.world.is_main:
                loud(f"step {state.step}: {failure}. The run stops all the same, and goes on from {checkpoint.name}")
        where = {"step": state.step, "tokens": state.tokens, **self.phase_field}
        held = None if checkpoint is None else str(checkpoint)
        self.log.event("preempt", **where, signal=asked.name, checkpoint=held)
        self.log.say(f"{self.recipe.name}: stopped by {asked.name} at step {state.step}; checkpoint: {held or 'none'}")

    def save(self, state: TrainerState, *, stays: bool, wait: bool = True, spare: int = 0) -> Path | None:
        """Save a checkpoint of the run as it stands.

        Args:
            stays: whether it is kept for good.
            wait: until it is written, or that ends the run; otherwise steps may go on meanwhile, and behind a failure.
            spare: how many more than `checkpoint.keep` are left.

        Returns the newest checkpoint that is written: with `wait`, this one; None where there is none yet.
        """
        self.watchdog.feed(f"the checkpoint of step {state.step}")
        files = partial(
            checkpoint_files, self.engine, state, self.phases, self.phase, self.data.train.tokenizer, self.world
        )
        self.saver.save(state, files, stays=stays, wait=wait, spare=spare)
        return self.saver.newest

    def finish_saves(self) -> None:
        """Wait for the checkpoint that is being written, if there is one. Raises SaveError where it fails."""
        self.saver.finish(must_succeed=True)


def is_due(every: int | None, tokens: int, batch_tokens: int) -> bool:
    """Whether the step that ended at `tokens` crossed a multiple of `every`."""
    return every is not None and tokens // every > (tokens - batch_tokens) // every
