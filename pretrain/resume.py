"""Which checkpoint a run goes on from, what a checkpoint holds beside the engine's state, and which ones are
refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from model import ModelConfig
from parallel.engine import Engine
from parallel.host_copies import CopiedFile, HostCopies, SavedFile, TensorFile, TextFile
from parallel.process import World, barrier, broadcast_object
from pretrain.agreement import SharedUserError
from pretrain.checkpoint_store import CheckpointStore, StoreError
from pretrain.checkpoints import Checkpoints, NoneWholeError, checkpoint_step, list_checkpoints
from pretrain.data import Cursor, TokenizerInfo
from pretrain.errors import UserError, file_error
from pretrain.phases import ONLY_PHASE, Phase, Phases
from pretrain.rng import load_rng, rng_file, rng_tensors, seed_rank
from pretrain.spikes import SpikeState
from pretrain.uploads import download_newer

RECIPE_FILE = "recipe.yaml"
MODEL_FILE = "model.json"
TRAINER_FILE = "trainer.json"
TOKENIZER_FILE = "tokenizer.model"
_SELECTING = ("min_document_tokens", "long_documents")  # of a cursor, and of the data section of shards


class DonePhase(BaseModel):
    """A phase that the run has left behind."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str
    """Its name in the recipe."""

    asked_tokens: int
    """Its training.tokens."""

    tokens: int
    """Tokens trained on in it; a part of a step more than was asked for."""

    cursor: Cursor | None
    """Where it left its data."""


class TrainerState(BaseModel):
    """Where the run stands: with the engine's state and the generators, all that the next step depends on."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    step: int = 0
    """Steps, in all phases, the skipped ones too."""

    tokens: int = 0
    """Tokens trained on, in all phases; those behind a checkpoint that the run went back to do not count."""

    phase: str = ONLY_PHASE
    """The phase that these steps have led into, or to the end of."""

    done: tuple[DonePhase, ...] = ()
    """The phases before it."""

    cursor: Cursor | None = None
    """The place in the phase's data; None before its first step."""

    skipped_steps: int = 0
    """Those of the steps that were skipped, as their loss or gradient was not finite."""

    skipped_in_a_row: int = 0
    """Those of them behind the last step that was taken."""

    bad_states: int = 0
    """Times that the state of a row was not finite and went back."""

    spikes: SpikeState = SpikeState()
    """What the next step's loss and gradient norm are compared with, and the spikes so far."""

    tokenizer_sha256: str | None
    """The tokenizer that the shards were made with; None for data that stands for no text."""

    ranks: int
    """How many ranks wrote the checkpoint."""

    @property
    def phase_tokens(self) -> int:
        """Tokens trained on in the phase; its learning rate is a function of them."""
        return self.tokens - sum(phase.tokens for phase in self.done)

    def is_done(self, phase: Phase) -> bool:
        """Whether the phase, which it stands in, has had its tokens."""
        return self.phase_tokens >= phase.recipe.training.tokens

    def moved_on(self, phases: Phases) -> TrainerState:
        """The beginning of the next phase where the one that it stands in has had its tokens; itself otherwise, and
        behind the last phase.
        """
        phase = phases[len(self.done)]
        if phase.is_last or not self.is_done(phase):
            return self
        asked = phase.recipe.training.tokens
        left = DonePhase(name=phase.name, asked_tokens=asked, tokens=self.phase_tokens, cursor=self.cursor)
        entered = phases[len(self.done) + 1].name
        begins = {"cursor": None, "spikes": self.spikes.in_next_phase()}
        return self.model_copy(update={"phase": entered, "done": (*self.done, left), **begins})

    def total_steps(self, phases: Phases, ranks: int) -> int:
        """The step numbers that the run ends at."""
        running = phases[len(self.done)].recipe.training
        left = -(-max(running.tokens - self.phase_tokens, 0) // running.batch_tokens)
        return self.step + left + sum(phase.batches(ranks).steps for phase in phases.phases[len(self.done) + 1 :])


def checkpoint_files(
    engine: Engine,
    state: TrainerState,
    phases: Phases,
    phase: Phase,
    tokenizer: TokenizerInfo | None,
    world: World,
    copies: HostCopies | None,
) -> list[SavedFile]:
    """This rank's files of a checkpoint of the run as it stands, to be written.

    Args:
        copies: as `Engine.files` takes them.
    """
    files = [*engine.files(copies), TensorFile(rng_file(world.rank, world.size), rng_tensors())]
    if world.is_main:
        texts = {
            RECIPE_FILE: phases.to_yaml(),
            MODEL_FILE: phase.recipe.model.model_dump_json(indent=1) + "\n",
            TRAINER_FILE: state.model_dump_json(indent=1) + "\n",
        }
        files += [TextFile(name, text) for name, text in texts.items()]
        if tokenizer is not None:
            files.append(CopiedFile(TOKENIZER_FILE, tokenizer.path))
    return files


def choose_checkpoint(
    checkpoints: Checkpoints,
    resume: str,
    report: Callable[[str], None],
    store: CheckpointStore | None = None,
    feed: Callable[[str], None] = lambda _: None,
    rest: Callable[[], None] = lambda: None,
) -> Path | None:
    """The checkpoint to go on from, which rank 0 chooses by what it sees; None for a fresh start. Every rank calls it.

    Args:
        resume: "auto" (the newest whole one of the run's folder and of `store`, from where it is downloaded into the
            folder), "never", or the path of one.
        report: told of damaged ones.
        store: where checkpoints are uploaded to.
        feed, rest: see download_newer.

    Raises:
        SharedUserError: "never" in a folder that has checkpoints; a path that is no whole checkpoint, not the newest of
            this run, or another run's where this run's folder has checkpoints; a checkpoint that not all ranks see.
        SharedMachineError: the store cannot be read where it has to be.
    """
    barrier()  # a slower rank must not list the folder after a faster one began to write
    if resume == "auto":
        try:
            newest = checkpoints.newest_whole(report)
        except NoneWholeError:
            if store is None or (newest := download_newer(checkpoints, store, None, report, feed, rest)) is None:
                raise
            return newest
        return newest if store is None else download_newer(checkpoints, store, newest, report, feed, rest)
    refusal = broadcast_object(_refusal(checkpoints.folder, resume, store) if checkpoints.world.is_main else None)
    if refusal is not None:
        raise SharedUserError(f"--resume {resume}: {refusal}")
    if resume == "never":
        checkpoints.require_seen_alike(bool(list_checkpoints(checkpoints.folder)), checkpoints.folder)
        return None
    path = Path(resume)
    if found := checkpoints.check(path):
        raise SharedUserError(f"--resume {resume}: {'; '.join(found)}; --resume auto takes the newest that is whole")
    return path


def _refusal(folder: Path, resume: str, store: CheckpointStore | None) -> str | None:
    """Why a run whose checkpoints are in `folder` can't begin by "never", or by the path of a checkpoint."""
    existing = list_checkpoints(folder)
    try:
        copies = [] if store is None else [Path(name) for name in store.checkpoints()]
    except StoreError as error:
        return f"whether there are checkpoints of this run already is not known: {error}"
    if resume == "never":
        if existing:
            return (
                f"{folder} holds {len(existing)} checkpoint(s) of an earlier run, and this one would write among them; "
                "give another --folder, move them away, or resume with --resume auto"
            )
        if copies and store is not None:
            return (
                f"{store.location} holds {len(copies)} checkpoint(s) of an earlier run, and this one's would go among "
                "them; give another checkpoint.upload, or resume with --resume auto"
            )
        return None
    path = Path(resume)
    if not path.is_dir():
        return "no such folder; give auto, never, or a checkpoint's folder"
    if existing and path.resolve().parent != folder.resolve():
        return (
            f"{folder} holds {len(existing)} checkpoint(s) of another run already, and this one's would go among them; "
            "give a --folder without checkpoints, or --resume auto to go on with these"
        )
    if newer := [p.name for p in existing if is_newer(p, path)]:
        return (
            f"{folder} holds newer checkpoints ({', '.join(newer)}) that the run would meet again; move them away, or "
            "give another --folder"
        )
    if store is not None and (newer := [p.name for p in copies if is_newer(p, path)]):
        return (
            f"{store.location} holds newer checkpoints ({', '.join(newer)}) that the run would meet again; remove "
            "them, or give another checkpoint.upload"
        )
    return None


def is_newer(candidate: Path, path: Path) -> bool:
    """Whether a checkpoint folder holds a later step than another."""
    return (checkpoint_step(candidate) or 0) > (checkpoint_step(path.resolve()) or 0)


def read_trainer_state(folder: Path) -> TrainerState:
    """The trainer's state of a checkpoint. Raises UserError for one of another program version."""
    try:
        return TrainerState.model_validate_json((folder / TRAINER_FILE).read_text(encoding="utf-8"))
    except (OSError, ValidationError) as error:
        message = f"{folder / TRAINER_FILE} cannot be read ({error}); resume from another checkpoint"
        raise (file_error(error, message) if isinstance(error, OSError) else UserError(message)) from error


def check_fits(folder: Path, phases: Phases, tokenizer: TokenizerInfo | None) -> TrainerState:
    """The checkpoint's trainer state, after checking that it belongs to these phases, this model and this tokenizer.

    The data of the phase that it stands in, and their order, are checked by the cursor when the loader opens. Learning
    rate, schedule, segments and how far gradients flow through them, layout, precision and intervals may change: the
    recipe's hold. So may all of the phases to come.

    Raises:
        UserError: naming the phases or fields that differ.
    """
    state = read_trainer_state(folder)
    recipe = _phase_of(folder, state, phases).recipe
    saved = json.loads((folder / MODEL_FILE).read_text(encoding="utf-8"))
    differing = model_differences(saved, recipe.model, "the checkpoint")
    if differing:
        raise UserError(
            f"{folder} holds another model: {'; '.join(differing)}; set the recipe's model back, or start a new run in "
            "another --folder"
        )
    if (state.tokenizer_sha256 is None) != (tokenizer is None):
        had, has = ("without", "one") if tokenizer else ("with", "none")
        raise UserError(
            f"{folder} was trained {had} a tokenizer, and the recipe's data.kind {recipe.data.kind} has {has}: set "
            "data back, or start a new run in another --folder"
        )
    if tokenizer and state.tokenizer_sha256 != tokenizer.sha256:
        raise UserError(
            f"{folder} was trained with another tokenizer (sha256 {str(state.tokenizer_sha256)[:12]}, the shards' is "
            f"{tokenizer.sha256[:12]}): data.train must name shards made with {folder / TOKENIZER_FILE}"
        )
    rows = recipe.training.batch_tokens // recipe.training.sequence_length
    if recipe.data.carries_state and state.cursor is not None and state.cursor.rows_per_step != rows:
        had = state.cursor.rows_per_step or "no"
        raise UserError(
            f"{folder}: {had} rows of a step go on from the step before, and with this recipe's data.order streams "
            f"{rows} do: set data.order and training.batch_tokens back, or start a new run in another --folder"
        )
    return state


def _phase_of(folder: Path, state: TrainerState, phases: Phases) -> Phase:
    """The phase that a checkpoint stands in. Raises UserError where the recipe has another in its place, or asks
    something else of those that are done.
    """
    begun = [*(done.name for done in state.done), state.phase]
    names = [phase.name for phase in phases]
    if names[: len(begun)] != begun:
        raise UserError(
            f"{folder} stands in phase {state.phase} of the phases {', '.join(begun)}, and the recipe's are "
            f"{', '.join(names)}: those that were begun keep their names and places ({ONLY_PHASE} is that of a recipe "
            "without phases); set them back, or start a new run in another --folder"
        )
    problems = []
    # At a phase's last checkpoint that one too is done: the next checkpoint would be refused for it.
    for done, phase in zip(state.moved_on(phases).done, phases, strict=False):
        training, data, cursor = phase.recipe.training, phase.recipe.data, done.cursor
        then_and_now: dict[str, tuple[Any, Any]] = {"training.tokens": (done.asked_tokens, training.tokens)}
        if cursor is not None:
            then_and_now["training.sequence_length"] = (cursor.sequence_length, training.sequence_length)
            then_and_now["data.seed"] = (cursor.seed, phase.recipe.data_seed())
            then_and_now["data.order"] = (cursor.order, getattr(data, "order", "drawn"))
            then_and_now["data.packing"] = (cursor.packing, getattr(data, "packing", cursor.packing))
            then_and_now["data.reset_memory"] = (cursor.grid is not None, data.resets_at_documents)
            chosen = [name for name in _SELECTING if hasattr(data, name)]
            then_and_now |= {f"data.{name}": (getattr(cursor, name), getattr(data, name)) for name in chosen}
        problems += [
            f"phases.{phase.name}.{field} was {then}, and is {now} in the recipe"
            for field, (then, now) in then_and_now.items()
            if then != now
        ]
    if problems:
        raise UserError(
            f"{folder} has phases behind it that cannot change any more: {'; '.join(problems)}; set it back, or go on "
            "from the checkpoint before that phase in another --folder"
        )
    return phases[len(state.done)]


def restore(folder: Path, engine: Engine, state: TrainerState, seed: int, world: World) -> None:
    """Take over weights, optimizer and generators from a whole checkpoint that fits; every rank calls it.

    Args:
        state: the checkpoint's own.
        seed: the run's, for ranks that the checkpoint has no generators of.
    """
    engine.load(folder, with_carried=state.cursor is not None)  # rows of a phase that begins begin anew
    own = folder / rng_file(world.rank, state.ranks)
    if world.rank < state.ranks:
        load_rng(own)
    else:  # a rank that the run did not have before; seeded by the step, so that no earlier draws repeat
        seed_rank(seed + state.step, world.rank)


def model_differences(saved: dict[str, Any], model: ModelConfig, place: str) -> list[str]:
    """Each field of the model that is not what was saved in `place`, with both values."""
    return _differences(saved, model.model_dump(mode="json"), place)


def _differences(saved: Any, current: Any, place: str, prefix: str = "model") -> list[str]:
    if isinstance(saved, dict) and isinstance(current, dict):
        names = sorted(saved.keys() | current.keys())
        return [d for n in names for d in _differences(saved.get(n), current.get(n), place, f"{prefix}.{n}")]
    return [] if saved == current else [f"{prefix} is {saved} in {place}, {current} in the recipe"]
