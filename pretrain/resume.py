"""Which checkpoint a run goes on from, what a checkpoint holds beside the engine's state, and which ones are
refused.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from parallel.engine import Engine
from parallel.process import World, barrier
from pretrain.agreement import SharedUserError, agreed
from pretrain.checkpoints import Checkpoints, checkpoint_step, list_checkpoints
from pretrain.config import Recipe
from pretrain.data import Cursor, TokenizerInfo
from pretrain.errors import UserError
from pretrain.rng import load_rng, rng_file, save_rng, seed_rank

RECIPE_FILE = "recipe.yaml"
MODEL_FILE = "model.json"
TRAINER_FILE = "trainer.json"
TOKENIZER_FILE = "tokenizer.model"


class TrainerState(BaseModel):
    """Where the run stands: with the engine's state and the generators, all that the next step depends on."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    step: int = 0
    """Optimizer steps taken."""

    tokens: int = 0
    """Tokens trained on; the learning rate is a function of it."""

    cursor: Cursor | None = None
    """The place in the data; None before the first step."""

    tokenizer_sha256: str | None
    """The tokenizer that the shards were made with; None for data that stands for no text."""

    ranks: int
    """How many ranks wrote the checkpoint."""


def write_checkpoint(
    folder: Path, engine: Engine, state: TrainerState, recipe: Recipe, tokenizer: TokenizerInfo | None, world: World
) -> list[Path]:
    """Write this rank's files of a checkpoint and return them: the argument of `Checkpoints.save`."""
    written = [*engine.save(folder), save_rng(folder / rng_file(world.rank, world.size))]
    if world.is_main:
        texts = {
            RECIPE_FILE: recipe.to_yaml(),
            MODEL_FILE: recipe.model.model_dump_json(indent=1) + "\n",
            TRAINER_FILE: state.model_dump_json(indent=1) + "\n",
        }
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
            written.append(folder / name)
        if tokenizer is not None:
            written.append(Path(shutil.copyfile(tokenizer.path, folder / TOKENIZER_FILE)))
    return written


def choose_checkpoint(checkpoints: Checkpoints, resume: str, report: Callable[[str], None]) -> Path | None:
    """The checkpoint to go on from; None for a fresh start.

    Args:
        resume: "auto" (the newest whole one of the run's folder), "never", or the path of one.

    Raises:
        UserError: "never" in a folder that has checkpoints; a path that is no whole checkpoint, not the newest of
            this run, or another run's where this run's folder has checkpoints.
    """
    barrier()  # a slower rank must not list the folder after a faster one began to write
    existing = list_checkpoints(checkpoints.folder)
    if resume == "auto":
        return checkpoints.newest_whole(report)
    if resume == "never":
        if existing:
            raise SharedUserError(
                f"{checkpoints.folder} holds {len(existing)} checkpoint(s) of an earlier run, and --resume never would "
                "write among them; give another --folder, move them away, or resume with --resume auto"
            )
        return None
    path = Path(resume)
    if not path.is_dir():
        raise SharedUserError(f"--resume {resume}: no such folder; give auto, never, or a checkpoint's folder")
    if existing and path.resolve().parent != checkpoints.folder.resolve():
        raise SharedUserError(
            f"--resume {resume}: {checkpoints.folder} holds {len(existing)} checkpoint(s) of another run already, and "
            "this one's would go among them; give a --folder without checkpoints, or --resume auto to go on with these"
        )
    newer = [p.name for p in existing if is_newer(p, path)]
    if newer:
        raise SharedUserError(
            f"--resume {resume}: {checkpoints.folder} holds newer checkpoints ({', '.join(newer)}) that the run would "
            "meet again; move them away, or give another --folder"
        )
    if found := checkpoints.check(path):
        raise SharedUserError(f"--resume {resume}: {'; '.join(found)}; --resume auto takes the newest that is whole")
    return path


def is_newer(candidate: Path, path: Path) -> bool:
    """Whether a checkpoint folder holds a later step than another."""
    return (checkpoint_step(candidate) or 0) > (checkpoint_step(path.resolve()) or 0)


def read_trainer_state(folder: Path) -> TrainerState:
    """The trainer's state of a checkpoint. Raises UserError for one of another program version."""
    try:
        return TrainerState.model_validate_json((folder / TRAINER_FILE).read_text(encoding="utf-8"))
    except (OSError, ValidationError) as error:
        raise UserError(f"{folder / TRAINER_FILE} cannot be read ({error}); resume from another checkpoint") from error


def check_fits(folder: Path, recipe: Recipe, tokenizer: TokenizerInfo | None) -> TrainerState:
    """The checkpoint's trainer state, after checking that it belongs to this model and this tokenizer.

    The data and its order are checked by the cursor when the loader opens. Learning rate, schedule, segments and how
    far gradients flow through them, layout, precision and intervals may change: the recipe's hold.

    Raises:
        UserError: naming the fields that differ.
    """
    saved = json.loads((folder / MODEL_FILE).read_text(encoding="utf-8"))
    differing = _differences(saved, recipe.model.model_dump(mode="json"))
    if differing:
        raise UserError(
            f"{folder} holds another model: {'; '.join(differing)}; set the recipe's model back, or start a new run in "
            "another --folder"
        )
    state = read_trainer_state(folder)
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


def restore(
    folder: Path, engine: Engine, recipe: Recipe, tokenizer: TokenizerInfo | None, world: World
) -> TrainerState:
    """Take over everything a whole checkpoint holds; every rank calls it. Raises UserError for one of another run."""
    with agreed():
        state = check_fits(folder, recipe, tokenizer)
    engine.load(folder)
    own = folder / rng_file(world.rank, state.ranks)
    if world.rank < state.ranks:
        load_rng(own)
    else:  # a rank that the run did not have before; seeded by the step, so that no earlier draws repeat
        seed_rank(recipe.seed + state.step, world.rank)
    return state


def _differences(saved: Any, current: Any, prefix: str = "model") -> list[str]:
    if isinstance(saved, dict) and isinstance(current, dict):
        names = sorted(saved.keys() | current.keys())
        return [d for name in names for d in _differences(saved.get(name), current.get(name), f"{prefix}.{name}")]
    return [] if saved == current else [f"{prefix} is {saved} in the checkpoint, {current} in the recipe"]
