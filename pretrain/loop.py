"""The training loop, from a recipe to its last checkpoint."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from model import TitansLM
from model.attention import explain_attention_backend
from model.compiled import check_compiler, compile_parts
from model.flops import flops_per_token
from model.memory import explain_memory_backend
from parallel.boundary_states import BoundaryStatesError, remove_left_boundary_states
from parallel.distribute import distribute
from parallel.engine import Engine, StepResult
from parallel.engines import make_engine
from parallel.mesh import Layout, Mesh
from parallel.pipeline_schedule import expected_bubble
from parallel.process import World, gather_objects
from parallel.watchdog import Watchdog
from pretrain.agreement import agreed
from pretrain.boundary_place import BoundaryPlace, choose_boundary_place
from pretrain.checkpoints import CHECKPOINTS_FOLDER, Checkpoints, loud
from pretrain.config import Batches, Recipe
from pretrain.data import Damage, Data, Division, Loader, Share, Source, TokenizerInfo
from pretrain.devices import peak_flops, peak_memory_bytes
from pretrain.errors import UserError
from pretrain.evaluation import evaluate
from pretrain.folder_lock import alone_in
from pretrain.guard import counted, end_of_run, guard_curves, report, too_many
from pretrain.initialization import check_initial_weights, open_initial_weights
from pretrain.metrics import RunLog, Stopwatch
from pretrain.optimizer import build_optimizer
from pretrain.phase_data import check_data, open_data, verify_data
from pretrain.phases import Phase, Phases
from pretrain.resume import TrainerState, check_fits, choose_checkpoint, restore, write_checkpoint
from pretrain.rng import seed_rank
from pretrain.schedule import learning_rate

SHARE = "data/share/"
"""Curves of the realised shares of sources begin so."""


def train(phases: Phases, world: World, *, resume: str = "auto") -> None:
    """Train as the phases say, going on from where an earlier attempt stopped. Every rank calls it.

    Args:
        resume: "auto" (the newest whole checkpoint of the folder, if any), "never", or a checkpoint's folder.

    Raises:
        UserError: sizes that do not fit, shards or checkpoints that are missing, damaged or of another run, another
            run in the same folder, no disk space.
        DivergedError: too many steps in a row were not finite; there is a checkpoint of the weights before them.
    """
    with agreed():
        phases.require_fit(world.size)
        tokenizer, descriptions = check_data(phases, world.size)
    with alone_in(phases.run.folder, world):
        _train_alone(phases, world, tokenizer, descriptions, resume)


def _train_alone(
    phases: Phases, world: World, tokenizer: TokenizerInfo | None, descriptions: list[str], resume: str
) -> None:
    run = phases.run
    folder = run.folder / CHECKPOINTS_FOLDER
    warnings: list[str] = []
    if world.is_main:  # the others make theirs behind the next barrier
        remove_left_boundary_states(run.folder)
    start_from = choose_checkpoint(Checkpoints(folder, run.checkpoint.keep, world), resume, warnings.append)
    with agreed():
        if start_from is not None:
            state = check_fits(start_from, phases, tokenizer).moved_on(phases)
        else:
            check_initial_weights(run, tokenizer, every_byte=world.is_main)
            sha256 = None if tokenizer is None else tokenizer.sha256
            state = TrainerState(phase=phases[0].name, tokenizer_sha256=sha256, ranks=world.size)
    with ExitStack() as stack:
        with agreed():
            log = stack.enter_context(open_log(phases, world, state))
            # Of all that is left: what a later phase can't have, or finds damaged, should not be found out days later.
            left = phases.phases[len(state.done) :]
            backends = [explain_backends(phase, world) for phase in left]
            damage = verify_data(left, Share(world.local_index, world.local_size), log.say)
        place = choose_boundary_place(left[0].recipe, world)
        announce(log, phases, world, descriptions[len(state.done)], start_from, state, warnings, backends[0], place)
        checkpoint, meshes = start_from, dict[Layout, Mesh]()
        for phase in left:
            if phase is not left[0]:
                place = choose_boundary_place(phase.recipe, world)
            checkpoints = Checkpoints(folder, phase.recipe.checkpoint.keep, world)
            layout = phase.recipe.parallel.layout(world.size)
            if layout not in meshes:  # process groups stay, and there can be but so many
                meshes[layout] = Mesh.build(world, layout)
            mesh = meshes[layout]
            state, checkpoint = run_phase(phases, phase, mesh, checkpoints, log, state, checkpoint, place, damage)
            state = state.moved_on(phases)
            gc.collect()  # an engine is full of cycles, and the next one needs its memory
            if world.device.type == "cuda":
                torch.cuda.empty_cache()  # in blocks of the sizes that the next one asks for


def run_phase(
    phases: Phases,
    phase: Phase,
    mesh: Mesh,
    checkpoints: Checkpoints,
    log: RunLog,
    state: TrainerState,
    checkpoint: Path | None,
    place: BoundaryPlace | None,
    damage: Sequence[Damage],
) -> tuple[TrainerState, Path | None]:
    """A phase from where `state` stands in it to its end: the state there, and its checkpoint.

    A phase behind another takes over what that one saved, whether the run was stopped in between or not.

    Args:
        mesh: of the phase's layout.
        checkpoint: holds weights, optimizer and generators; None: they begin here.
        place: of the states between segments, where there are any.
        damage: what this rank found when it read data through.
    """
    recipe, world = phase.recipe, mesh.world
    batches = phase.batches(world.size)
    with agreed(), phase.named_in_errors():
        data = open_data(phase)
    data.train.share_damage(gather_objects, damage)
    engine = build_engine(recipe, batches, mesh, place)
    if checkpoint is not None:
        restore(checkpoint, engine, state, recipe.seed, world)
    else:
        if recipe.initialize_from is not None:
            nearest = world.rank / max(world.size - 1, 1)
            with open_initial_weights(recipe.initialize_from, nearest=nearest) as weights:
                engine.load_weights(weights)
        seed_rank(recipe.seed, world.rank)
    with ExitStack() as stack:
        stack.enter_context(data)  # closed behind the loader, which reads from it
        with agreed(), phase.named_in_errors():
            loader = stack.enter_context(open_training_data(recipe, batches, mesh, data.train, state))
        if len(phases) > 1:
            backends = explain_backends(phase, world)
            where = {"step": state.step, "tokens": state.tokens, "phase": phase.name, "number": phase.number}
            log.event("phase", **where, backends=backends, **_placed(place))
            log.say(f"{phase.title}: {batches.steps} steps of {recipe.training.batch_tokens:,} tokens")
        if place is not None:
            log.say(f"states between segments: {place}")
        if loader.changes:
            log.event("data_changed", step=state.step, tokens=state.tokens, changes=loader.changes)
            log.say("the data changed: " + "; ".join(loader.changes))
        watchdog = Watchdog(recipe.parallel.step_timeout_seconds, rank=world.rank, ranks=world.size)
        stack.enter_context(watchdog)
        run = Run(phases, phase, world, batches, engine, data, checkpoints, log, watchdog)
        reached = run.steps(loader, state, checkpoint)
    engine.destroy()
    return reached


def _placed(place: BoundaryPlace | None) -> dict[str, Any]:
    return {} if place is None else {"boundary_states": place.fields()}


def build_engine(recipe: Recipe, batches: Batches, mesh: Mesh, place: BoundaryPlace | None = None) -> Engine:
    """The model with its initial weights (from the seed alone, whatever the layout), its optimizer, and the engine."""
    torch.manual_seed(recipe.seed)
    model = TitansLM(recipe.model)
    distribute(model, mesh)
    model.set_activation_checkpointing(recipe.parallel.activation_checkpointing)
    if recipe.parallel.compile:
        compile_parts(model)
    model.set_attention_backend(recipe.parallel.attention_backend)
    model.set_memory_backend(recipe.parallel.memory_backend)
    return make_engine(
        model,
        build_optimizer(model, recipe.optimizer, mesh.world.device),
        recipe.parallel,
        mesh,
        sequence_length=recipe.training.sequence_length,
        micro_batch_size=recipe.training.micro_batch_size,
        accumulation=batches.accumulation,
        gradient_clip=recipe.optimizer.gradient_clip,
        segments=recipe.segments("device" if place is None else place.place),
        carry_state=recipe.data.carries_state,
        on_bad_state=recipe.training.on_bad_state,
    )


def explain_backends(phase: Phase, world: World) -> dict[str, str]:
    """What computes a phase's attention and memory here, and why; attention over rows in which documents begin, too.

    Raises UserError when a backend that the recipe asks for can't compute one of them, or nothing can be compiled.
    """
    recipe, found = phase.recipe, {}
    model, parallel, training = recipe.model, recipe.parallel, recipe.training
    where = {"device": world.device, "dtype": torch.bfloat16 if parallel.precision == "bf16" else torch.float32}
    sizes = {"rows": training.micro_batch_size, "length": training.segment_length or training.sequence_length}
    explain = partial(explain_attention_backend, model, parallel.attention_backend, **sizes, **where)
    with phase.named_in_errors():
        field = "compile"
        try:
            if parallel.compile:
                check_compiler(world.device)
            field = "attention_backend"
            if model.has_attention:
                found["attention"] = explain()
                if recipe.data.resets_at_documents or recipe.data.carries_state:
                    found["attention_over_documents"] = explain(documents=True)
            field = "memory_backend"
            if model.memory is not None:
                found["memory"] = explain_memory_backend(model, parallel.memory_backend, **where)
        except ValueError as error:
            raise UserError(f"parallel.{field}: {error}") from error
    return found


def open_training_data(recipe: Recipe, batches: Batches, mesh: Mesh, source: Source, state: TrainerState) -> Loader:
    """The loader, standing where `state` left off. Raises UserError for a cursor of other data."""
    division = Division(
        sequence_length=recipe.training.sequence_length,
        micro_batch_size=recipe.training.micro_batch_size,
        accumulation=batches.accumulation,
        rank=mesh.data.index,
        world_size=mesh.data.size,
    )
    return source.open_loader(division, state.cursor, gather_objects)


@contextmanager
def open_log(phases: Phases, world: World, state: TrainerState) -> Iterator[RunLog]:
    """The run's log; an error that ends the run is its last event, and stays the error to show when the log cannot be
    written or closed either.
    """
    run, steps = phases.run, state.total_steps(phases, world.size)
    log = RunLog(run.folder, name=run.name, is_main=world.is_main, start_step=state.step, total_steps=steps)
    try:
        yield log
    except BaseException as error:
        last_words = partial(log.event, "error", type=type(error).__name__, message=str(error))
        for action in (last_words, log.close):
            try:
                action()
            except UserError as second:  # the disk is full, say
                error.add_note(str(second))
        raise
    log.close()


def announce(
    log: RunLog,
    phases: Phases,
    world: World,
    data: str,
    start_from: Path | None,
    state: TrainerState,
    warnings: list[str],
    backends: dict[str, str],
    place: BoundaryPlace | None,
) -> None:
    """Write and print how the run begins, by which backends it computes, where states between segments wait, and what
    was wrong with the checkpoints that it does not begin from.
    """
    for warning in warnings:
        log.event("damaged", message=warning)
        if world.is_main:
            loud(warning)
    name, steps = phases.run.name, state.total_steps(phases, world.size)
    where = {"step": state.step, "tokens": state.tokens, "ranks": world.size, "steps": steps, "data": data}
    where |= {"backends": backends, **_placed(place)}
    if start_from is None:
        log.event("start", **where, recipe=phases.fields())
        batch = f" of {phases.run.training.batch_tokens:,} tokens" if len(phases) == 1 else f" in {len(phases)} phases"
        log.say(f"{name}: {steps} steps{batch} on {world.size} rank(s)")
        if phases.run.initialize_from is not None:
            log.say(f"{name}: weights from {phases.run.initialize_from}")
    else:
        log.event("resume", **where, checkpoint=str(start_from), recipe=phases.fields())
        log.say(f"{name}: resumed from {start_from} at step {state.step} of {steps}")


@dataclasses.dataclass(frozen=True)
class Run:
    """The parts of a phase that is being run, put together; `steps` is the loop."""

    phases: Phases
    phase: Phase
    world: World
    batches: Batches
    engine: Engine
    data: Data
    checkpoints: Checkpoints
    log: RunLog
    watchdog: Watchdog

    @property
    def recipe(self) -> Recipe:
        """The phase's."""
        return self.phase.recipe

    @property
    def phase_field(self) -> dict[str, str]:
        """What events say of the phase: nothing where it is the only one."""
        return {"phase": self.phase.name} if len(self.phases) > 1 else {}

    def steps(self, loader: Loader, state: TrainerState, checkpoint: Path | None) -> tuple[TrainerState, Path | None]:
        """Take the steps that are left of the phase, evaluating and saving on the way and at its end; the state there
        and the newest checkpoint, `checkpoint` where no step was left.
        """
        recipe, batch_tokens = self.recipe, self.recipe.training.batch_tokens
        watch, waiting, reported = Stopwatch(), Stopwatch(), set()
        while not state.is_done(self.phase):
            step, tokens = state.step + 1, state.phase_tokens + batch_tokens
            last = tokens >= recipe.training.tokens
            record = last or step % recipe.logging.every_steps == 0
            with_stats = record and (last or step % recipe.logging.memory_interval == 0)
            self.watchdog.feed(f"step {step}")
            watch.start()
            rate = learning_rate(recipe.schedule, recipe.optimizer.lr, tokens, self.batches.total_tokens)
            try:
                waiting.start()
                batches = next(loader)
                waiting.stop()
                result = self.engine.train_step(batches, rate, with_stats=with_stats)
            except BoundaryStatesError as error:
                raise UserError(str(error)) from error
            watch.stop()
            update = {"step": step, "tokens": state.tokens + batch_tokens, "cursor": loader.cursor()}
            state = counted(state.model_copy(update=update | {"ranks": self.world.size}), result)
            self.report_damage(state, reported)
            report(self.log, state, result, recipe.training, **self.phase_field)
            if too_many(state, recipe.training):
                self.give_up(state, result)
            if record and not result.skipped:
                self.record(result, rate, state, watch, loader.curves() | {"speed/data_seconds": waiting.lap()})
            if last or is_due(recipe.evaluation.every_tokens, tokens, batch_tokens):
                self.evaluate(state)
            if last or is_due(recipe.checkpoint.every_tokens, tokens, batch_tokens):
                checkpoint = self.save(state, stays=last)
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
        self, result: StepResult, rate: float, state: TrainerState, watch: Stopwatch, of_data: dict[str, float]
    ) -> None:
        """Write a step's loss, speed and memory, and the layers' statistics where the step took them.

        Args:
            of_data: curves of the data.
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
            "device/peak_memory_gigabytes": peak_memory_bytes(self.world.device) / 1e9,
            **guard_curves(state),
            **of_data,
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
        shares = {name.removeprefix(SHARE): value for name, value in of_data.items() if name.startswith(SHARE)}
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

    def give_up(self, state: TrainerState, result: StepResult) -> NoReturn:
        """Save the run as it stands and raise DivergedError."""
        # One more than are kept otherwise: the weights may be spoiled, and those of before must not go for them. The
        # counts begin anew, so that the resumed run may skip as many.
        checkpoints = dataclasses.replace(self.checkpoints, keep=self.checkpoints.keep + 1)
        saving = dataclasses.replace(self, checkpoints=checkpoints)
        folder = saving.save(state.model_copy(update={"skipped_in_a_row": 0}), stays=state.is_done(self.phase))
        raise end_of_run(state, result, str(folder))

    def save(self, state: TrainerState, *, stays: bool) -> Path:
        """Write a checkpoint of the run as it stands, and return its folder."""
        self.watchdog.feed(f"the checkpoint of step {state.step}")
        write = partial(
            write_checkpoint,
            engine=self.engine,
            state=state,
            phases=self.phases,
            phase=self.phase,
            tokenizer=self.data.train.tokenizer,
            world=self.world,
        )
        folder = self.checkpoints.save(state.step, write, stays=stays)
        self.log.event("save", step=state.step, tokens=state.tokens, checkpoint=str(folder))
        return folder


def is_due(every: int | None, tokens: int, batch_tokens: int) -> bool:
    """Whether the step that ended at `tokens` crossed a multiple of `every`."""
    return every is not None and tokens // every > (tokens - batch_tokens) // every
