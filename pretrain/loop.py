"""The training loop, from a recipe to its last checkpoint."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from model import TitansLM
from model.attention import explain_attention_backend
from model.compiled import check_compiler, compile_parts
from model.memory import explain_memory_backend
from parallel.boundary_states import remove_left_boundary_states
from parallel.distribute import distribute
from parallel.engine import Engine
from parallel.engines import make_engine
from parallel.mesh import Layout, Mesh
from parallel.process import World, gather_objects, side_group
from parallel.watchdog import Watchdog
from pretrain.agreement import agreed
from pretrain.boundary_place import BoundaryPlace, choose_boundary_place
from pretrain.checkpoint_store import CheckpointStore, StoreError
from pretrain.checkpoints import CHECKPOINTS_FOLDER, Checkpoints, loud
from pretrain.config import Batches, Recipe
from pretrain.data import Damage, Division, Loader, Share, Source, TokenizerInfo
from pretrain.errors import UserError, note_step
from pretrain.fence import FencedOffError, take_fence
from pretrain.fence_watch import FenceWatch
from pretrain.folder_lock import alone_in
from pretrain.initialization import check_initial_weights, open_initial_weights
from pretrain.metrics import RunLog
from pretrain.optimizer import build_optimizer
from pretrain.phase_data import check_data, open_data, verify_data
from pretrain.phases import Phase, Phases
from pretrain.preemption import Preempted, StopRequests
from pretrain.preflight import PreflightReport, preflight
from pretrain.resume import TrainerState, check_fits, choose_checkpoint, restore
from pretrain.rng import seed_rank
from pretrain.saver import Saver
from pretrain.shared_folder import require_shared
from pretrain.steps import Run
from pretrain.uploads import GROUP_MINUTES, Uploads


def train(phases: Phases, world: World, *, resume: str = "auto") -> None:
    """Train as the phases say, going on from where an earlier attempt stopped. Every rank calls it.

    Args:
        resume: "auto" (the newest whole checkpoint of the folder, if any), "never", or a checkpoint's folder.

    Raises:
        UserError: sizes that do not fit, shards or checkpoints that are missing, damaged or of another run, another
            run in the same folder.
        MachineError: a disk that is full or fails.
        DivergedError: too many steps in a row were not finite; there is a checkpoint of the weights before them.
        Preempted: a signal asked the run to stop; there is a checkpoint behind its last step.
        FencedOffError: another copy of the run has taken the folder over.
    """
    with startup_watchdog(phases, rank=world.rank, ranks=world.size) as startup:
        startup.feed("what is checked before the start")
        with agreed():
            phases.require_fit(world.size)
        report = preflight(phases, world) if phases.run.guards.preflight else None
        with agreed():
            tokenizer, descriptions = check_data(phases, world.size)
        with alone_in(phases.run.folder, world):
            _train_alone(phases, world, tokenizer, descriptions, resume, startup, report)


def startup_watchdog(phases: Phases, *, rank: int, ranks: int) -> Watchdog:
    """Watches what stands before the first step and between phases."""
    seconds = phases.run.parallel.startup_timeout_seconds
    return Watchdog(seconds, rank=rank, ranks=ranks, field="parallel.startup_timeout_seconds")


def _train_alone(
    phases: Phases,
    world: World,
    tokenizer: TokenizerInfo | None,
    descriptions: list[str],
    resume: str,
    startup: Watchdog,
    report: PreflightReport | None,
) -> None:
    run = phases.run
    folder = run.folder / CHECKPOINTS_FOLDER
    warnings: list[str] = []
    if world.is_main:  # the others make theirs behind the next barrier
        remove_left_boundary_states(run.folder)
    fence = take_fence(run.folder, world)
    require_shared(run.folder, fence, world)
    here = Checkpoints(folder, run.checkpoint.keep, world, fence)
    store = open_store(run)
    start_from = choose_checkpoint(here, resume, warnings.append, store, startup.feed, startup.rest)
    with agreed():
        if start_from is not None:
            state = check_fits(start_from, phases, tokenizer).moved_on(phases)
        else:
            check_initial_weights(run, tokenizer, every_byte=world.is_main)
            sha256 = None if tokenizer is None else tokenizer.sha256
            state = TrainerState(phase=phases[0].name, tokenizer_sha256=sha256, ranks=world.size)
    watch = None if fence is None else FenceWatch(fence)
    with ExitStack() as stack:
        with agreed():
            log = stack.enter_context(open_log(phases, world, state, watch))
            # Of all that is left: what a later phase can't have, or finds damaged, should not be found out days later.
            left = phases.phases[len(state.done) :]
            backends = [explain_backends(phase, world) for phase in left]
            with startup.resting("the beginning of the first phase"):
                damage = verify_data(left, Share(world.local_index, world.local_size), log.say)
        place = choose_boundary_place(left[0].recipe, world)
        announce(log, phases, world, descriptions[len(state.done)], start_from, state, warnings, backends[0], place)
        if report is not None:
            report.write(log)
        stop = StopRequests(world, timeout_minutes=run.parallel.timeout_minutes, watch=watch)
        copies = None
        if store is not None:
            alone = replace(here, group=side_group(GROUP_MINUTES))
            copies = stack.enter_context(Uploads(alone, store, run.checkpoint, log, startup.feed, stop.agreed))
        beside = side_group(run.parallel.timeout_minutes)
        checkpoint, meshes = start_from, dict[Layout, Mesh]()
        for phase in left:
            if phase is not left[0]:
                place = choose_boundary_place(phase.recipe, world)
            keep, staging = phase.recipe.checkpoint.keep, run.checkpoint.staging
            checkpoints = Checkpoints(folder, keep, world, fence, beside, staging, copies)
            layout = phase.recipe.parallel.layout(world.size)
            if layout not in meshes:  # process groups stay, and there can be but so many
                meshes[layout] = Mesh.build(world, layout)
            mesh = meshes[layout]
            state, checkpoint = run_phase(
                phases, phase, mesh, checkpoints, log, stop, state, checkpoint, place, damage, startup
            )
            state = state.moved_on(phases)
            gc.collect()  # an engine is full of cycles, and the next one needs its memory
            if world.device.type == "cuda":
                torch.cuda.empty_cache()  # in blocks of the sizes that the next one asks for


def open_store(run: Recipe) -> CheckpointStore | None:
    """Where copies of checkpoints go, if they do. Every rank calls it. Raises SharedUserError for no such place."""
    if run.checkpoint.upload is None:
        return None
    with agreed():
        try:
            return CheckpointStore(run.checkpoint.upload)
        except StoreError as error:
            raise UserError(f"checkpoint.upload: {error}") from error


def run_phase(
    phases: Phases,
    phase: Phase,
    mesh: Mesh,
    checkpoints: Checkpoints,
    log: RunLog,
    stop: StopRequests,
    state: TrainerState,
    checkpoint: Path | None,
    place: BoundaryPlace | None,
    damage: Sequence[Damage],
    startup: Watchdog,
) -> tuple[TrainerState, Path | None]:
    """A phase from where `state` stands in it to its end: the state there, and its checkpoint.

    A phase behind another takes over what that one saved, whether the run was stopped in between or not.

    Args:
        mesh: of the phase's layout.
        checkpoint: holds weights, optimizer and generators; None: they begin here.
        place: of the states between segments, where there are any.
        damage: what this rank found when it read data through.
        startup: watches what is not a step's.
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
        # Ahead of the steps' watchdog: a process has one last resort, which that one disarms where it ends.
        stack.enter_context(startup.resting(f"what stands behind the steps of {phase.title}"))
        watchdog = Watchdog(recipe.parallel.step_timeout_seconds, rank=world.rank, ranks=world.size)
        stack.enter_context(watchdog)
        saved = 0 if checkpoint is None else state.tokens
        saver = Saver(checkpoints, recipe.checkpoint, log, watchdog, last_tokens=saved)
        stack.enter_context(saver)
        run = Run(phases, phase, world, batches, engine, data, saver, log, watchdog, stop)
        reached = run.steps(loader, state, checkpoint)
    engine.destroy()
    return reached


def _placed(place: BoundaryPlace | None) -> dict[str, Any]:
    return {} if place is None else {"boundary_states": place.fields()}


def build_engine(recipe: Recipe, batches: Batches, mesh: Mesh, place: BoundaryPlace | None = None) -> Engine:
    """The model with its initial weights (from the seed alone, whatever the layout), its optimizer, and the engine."""
    torch.manual_seed(recipe.seed)
    model = TitansLM(recipe.model)
    distribute(model, mesh, shard_norms=recipe.parallel.tensor_shard_norms)
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
def open_log(phases: Phases, world: World, state: TrainerState, watch: FenceWatch | None = None) -> Iterator[RunLog]:
    """The run's log; an error that ends the run is its last event, and stays the error to show when the log cannot be
    written or closed either.
    """
    run, steps = phases.run, state.total_steps(phases, world.size)
    named = {"name": run.name, "is_main": world.is_main}
    log = RunLog(run.folder, **named, start_step=state.step, total_steps=steps, watch=watch)
    try:
        yield log
    except Preempted:  # no error: its event is written
        log.close()
        raise
    except BaseException as error:
        note_step(error, log.step)
        last_words = partial(log.event, "error", step=log.step, type=type(error).__name__, message=str(error))
        if isinstance(error, FencedOffError):  # the file is another copy's
            last_words = partial(log.say, f"error: {error}")
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
    log.restarted(state.step)
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
