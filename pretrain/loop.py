"""The training loop, from a recipe to its last checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch

from model import TitansLM
from model.attention import explain_attention_backend
from model.compiled import compile_parts
from model.flops import flops_per_token
from parallel.boundary_states import BoundaryStatesError, remove_left_boundary_states
from parallel.engine import Engine, StepResult
from parallel.process import World
from pretrain.agreement import agreed
from pretrain.checkpoints import CHECKPOINTS_FOLDER, Checkpoints, loud
from pretrain.config import Batches, Recipe
from pretrain.data import Data, Division, Loader, Share, Source
from pretrain.devices import peak_flops, peak_memory_bytes
from pretrain.errors import UserError
from pretrain.evaluation import evaluate
from pretrain.finite import FiniteWatch
from pretrain.folder_lock import alone_in
from pretrain.metrics import RunLog, Stopwatch
from pretrain.optimizer import build_optimizer
from pretrain.resume import TrainerState, choose_checkpoint, restore, write_checkpoint
from pretrain.rng import seed_rank
from pretrain.schedule import learning_rate


def train(recipe: Recipe, world: World, *, resume: str = "auto") -> None:
    """Train as the recipe says, going on from where an earlier attempt stopped. Every rank calls it.

    Args:
        resume: "auto" (the newest whole checkpoint of the folder, if any), "never", or a checkpoint's folder.

    Raises:
        UserError: sizes that do not fit, shards or checkpoints that are missing, damaged or of another run, another
            run in the same folder, no disk space.
        FloatingPointError: the loss or the gradient of a step was not finite; the checkpoints from before are there.
    """
    with agreed():
        batches = recipe.batches(world.size)
        data = recipe.data.open(recipe.data_seed(), Share(world.local_rank, world.local_size))
        check_vocabulary(recipe, data.train)
    with alone_in(recipe.folder, world):
        _train_alone(recipe, world, batches, data, resume)


def _train_alone(recipe: Recipe, world: World, batches: Batches, data: Data, resume: str) -> None:
    checkpoints = Checkpoints(recipe.folder / CHECKPOINTS_FOLDER, recipe.checkpoint.keep, world)
    warnings: list[str] = []
    if world.is_main:  # the others make theirs behind the next barrier
        remove_left_boundary_states(recipe.folder)
    start_from = choose_checkpoint(checkpoints, resume, warnings.append)
    engine = build_engine(recipe, batches, world)
    if start_from is not None:
        state = restore(start_from, engine, recipe, data.train.tokenizer, world)
    else:
        seed_rank(recipe.seed, world.rank)
        tokenizer = data.train.tokenizer
        state = TrainerState(tokenizer_sha256=None if tokenizer is None else tokenizer.sha256, ranks=world.size)
    with ExitStack() as stack:
        with agreed():
            log = stack.enter_context(open_log(recipe, batches, world, state.step))
            loader = stack.enter_context(open_training_data(recipe, batches, world, data.train, state))
        announce(log, recipe, batches, world, start_from, state, warnings)
        run = Run(recipe, world, batches, engine, data, checkpoints, log)
        run.steps(loader, state)
    engine.destroy()


def check_vocabulary(recipe: Recipe, source: Source) -> None:
    """Raise UserError when the data holds tokens that the model has no row for."""
    have, need = recipe.model.vocab_size, source.vocab_size
    if need > have:
        raise UserError(
            f"model.vocab_size {have} is smaller than the {need} tokens of {source.place}: set model.vocab_size to "
            f"{need}"
        )


def build_engine(recipe: Recipe, batches: Batches, world: World) -> Engine:
    """The model with its initial weights (from the seed alone, whatever the layout), its optimizer, and the engine."""
    torch.manual_seed(recipe.seed)
    model = TitansLM(recipe.model)
    model.set_activation_checkpointing(recipe.parallel.activation_checkpointing)
    if recipe.parallel.compile:
        compile_parts(model)
    check_attention_backend(recipe, world)
    model.set_attention_backend(recipe.parallel.attention_backend)
    return Engine(
        model,
        build_optimizer(model, recipe.optimizer, world.device),
        recipe.parallel,
        world,
        micro_batch_size=recipe.training.micro_batch_size,
        accumulation=batches.accumulation,
        gradient_clip=recipe.optimizer.gradient_clip,
        segments=recipe.segments(),
    )


def check_attention_backend(recipe: Recipe, world: World) -> None:
    """Raise UserError when the attention backend that the recipe asks for can't compute the model's attention here."""
    parallel, training = recipe.parallel, recipe.training
    if parallel.attention_backend == "auto":
        return
    try:
        explain_attention_backend(
            recipe.model,
            parallel.attention_backend,
            rows=training.micro_batch_size,
            length=training.segment_length or training.sequence_length,
            device=world.device,
            dtype=torch.bfloat16 if parallel.precision == "bf16" else torch.float32,
        )
    except ValueError as error:
        raise UserError(f"parallel.attention_backend: {error}") from error


def open_training_data(recipe: Recipe, batches: Batches, world: World, source: Source, state: TrainerState) -> Loader:
    """The loader, standing where `state` left off. Raises UserError for a cursor of other data."""
    division = Division(
        sequence_length=recipe.training.sequence_length,
        micro_batch_size=recipe.training.micro_batch_size,
        accumulation=batches.accumulation,
        rank=world.rank,
        world_size=world.size,
    )
    return source.open_loader(division, state.cursor)


@contextmanager
def open_log(recipe: Recipe, batches: Batches, world: World, step: int) -> Iterator[RunLog]:
    """The run's log; an error that ends the run is its last event, and stays the error to show when the log cannot be
    written or closed either.
    """
    log = RunLog(recipe.folder, name=recipe.name, is_main=world.is_main, start_step=step, total_steps=batches.steps)
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
    recipe: Recipe,
    batches: Batches,
    world: World,
    start_from: Path | None,
    state: TrainerState,
    warnings: list[str],
) -> None:
    """Write and print how the run begins, and what was wrong with the checkpoints that it does not begin from."""
    for warning in warnings:
        log.event("damaged", message=warning)
        if world.is_main:
            loud(warning)
    where = {"step": state.step, "tokens": state.tokens, "ranks": world.size, "steps": batches.steps}
    if start_from is None:
        log.event("start", **where, recipe=recipe.model_dump(mode="json"))
        log.say(
            f"{recipe.name}: {batches.steps} steps of {recipe.training.batch_tokens:,} tokens on {world.size} rank(s)"
        )
    else:
        log.event("resume", **where, checkpoint=str(start_from), recipe=recipe.model_dump(mode="json"))
        log.say(f"{recipe.name}: resumed from {start_from} at step {state.step} of {batches.steps}")


@dataclasses.dataclass(frozen=True)
class Run:
    """The parts of a run, put together; `steps` is the loop."""

    recipe: Recipe
    world: World
    batches: Batches
    engine: Engine
    data: Data
    checkpoints: Checkpoints
    log: RunLog

    def steps(self, loader: Loader, state: TrainerState) -> None:
        """Take the steps that are left, evaluating and saving on the way and at the end."""
        recipe, batch_tokens = self.recipe, self.recipe.training.batch_tokens
        watch, finite = Stopwatch(), FiniteWatch(self.world.device)
        while state.tokens < recipe.training.tokens:
            step, tokens = state.step + 1, state.tokens + batch_tokens
            last = tokens >= recipe.training.tokens
            record = last or step % recipe.logging.every_steps == 0
            with_stats = record and (last or step % recipe.logging.memory_interval == 0)
            watch.start()
            rate = learning_rate(recipe.schedule, recipe.optimizer.lr, tokens, self.batches.total_tokens)
            try:
                result = self.engine.train_step(next(loader), rate, with_stats=with_stats)
            except BoundaryStatesError as error:
                raise UserError(str(error)) from error
            watch.stop()
            state = state.model_copy(update={"step": step, "tokens": tokens, "cursor": loader.cursor()})
            save = last or is_due(recipe.checkpoint.every_tokens, tokens, batch_tokens)
            finite.note(step, result.loss, result.grad_norm)
            evaluates = last or is_due(recipe.evaluation.every_tokens, tokens, batch_tokens)
            if record or evaluates or save:  # before anything is written
                finite.require_finite()
            if record:
                self.record(result, rate, state, watch)
            if evaluates:
                self.evaluate(state)
            if save:
                self.save(state)
        self.log.event("done", step=state.step, tokens=state.tokens, seconds_per_step=watch.mean)
        self.log.say(f"{recipe.name}: done, {state.tokens:,} tokens; checkpoint in {self.checkpoints.folder}")

    def record(self, result: StepResult, rate: float, state: TrainerState, watch: Stopwatch) -> None:
        """Write a step's loss, speed and memory, and the layers' statistics where the step took them."""
        watch.start()
        loss, norm = (
            float(result.loss),
            float(result.grad_norm),
        )  # waits for the device, which belongs to the steps' time
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
        }
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
        )
        left = (self.batches.steps - state.step) * watch.mean
        self.log.progress(state.step, loss, rate, speed, left)

    def evaluate(self, state: TrainerState) -> None:
        """Score the held-out data, if there is any."""
        if self.data.held_out is None:
            return
        result = evaluate(
            self.engine,
            self.data.held_out,
            self.world,
            sequence_length=self.recipe.training.sequence_length,
            batch_size=self.recipe.training.micro_batch_size,
            max_tokens=self.recipe.evaluation.tokens,
        )
        self.log.scalars(state.step, {f"evaluation/{name}": value for name, value in result.curves().items()})
        self.log.event("eval", step=state.step, tokens=state.tokens, **result.fields())
        self.log.say(f"held out: {result}")

    def save(self, state: TrainerState) -> None:
        """Write a checkpoint of the run as it stands."""
        write = partial(
            write_checkpoint,
            engine=self.engine,
            state=state,
            recipe=self.recipe,
            tokenizer=self.data.train.tokenizer,
            world=self.world,
        )
        folder = self.checkpoints.save(state.step, write)
        self.log.event("save", step=state.step, tokens=state.tokens, checkpoint=str(folder))


def is_due(every: int | None, tokens: int, batch_tokens: int) -> bool:
    """Whether the step that ended at `tokens` crossed a multiple of `every`."""
    return every is not None and tokens // every > (tokens - batch_tokens) // every
