"""Weights to begin a run from: those of an exported model or of a checkpoint, and nothing else of it."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from parallel.state_files import StateReader, WeightReader
from pretrain.checkpoints import CHECKPOINTS_FOLDER, MANIFEST, list_checkpoints, problems
from pretrain.config import Recipe
from pretrain.data import TokenizerInfo
from pretrain.errors import UserError
from pretrain.exported import CONFIG, ExportedWeights, check_files, read_config
from pretrain.phases import MODEL_FIELDS
from pretrain.resume import MODEL_FILE, model_differences, read_trainer_state


def check_initial_weights(recipe: Recipe, tokenizer: TokenizerInfo | None, *, every_byte: bool) -> None:
    """Raises UserError when `initialize_from` is no exported model or checkpoint, is not whole, or belongs to another
    model or tokenizer.

    Args:
        recipe: the first phase's.
        tokenizer: that of its data.
        every_byte: whether the files' sha256 are checked too.
    """
    folder = recipe.initialize_from
    if folder is None:
        return
    if not folder.is_dir():
        raise UserError(f"initialize_from {folder}: no such folder; give an exported model or a checkpoint")
    exported = is_exported(folder)
    if not exported and not (folder / MANIFEST).is_file():
        inside = list_checkpoints(folder / CHECKPOINTS_FOLDER) or list_checkpoints(folder)
        instead = (
            f"one of the checkpoints in it, such as {inside[0]}" if inside else "an exported model or a checkpoint"
        )
        raise UserError(f"initialize_from {folder}: holds no weights; give {instead}")
    try:
        model, tokenizer_sha256 = _exported(folder, every_byte) if exported else _checkpoint(folder, every_byte)
    except UserError as error:
        raise UserError(f"initialize_from {error}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"initialize_from {folder}: cannot be read: {error}") from error
    same = {field: getattr(recipe.model, field) for field in MODEL_FIELDS}
    if differing := model_differences(model | same, recipe.model, "it"):
        raise UserError(
            f"initialize_from {folder} holds another model: {'; '.join(differing)}; set the recipe's model to it, or "
            "give another initialize_from"
        )
    own = None if tokenizer is None else tokenizer.sha256
    if tokenizer_sha256 != own:
        then, now = ("none" if sha256 is None else f"sha256 {sha256[:12]}" for sha256 in (tokenizer_sha256, own))
        raise UserError(
            f"initialize_from {folder} was trained with another tokenizer ({then}; the data's: {now}): its embeddings "
            "stand for other tokens; build the shards with its tokenizer.model, or give another initialize_from"
        )


def open_initial_weights(folder: Path, *, nearest: float | None = None) -> AbstractContextManager[WeightReader]:
    """The weights of a folder that was checked, to be read while the context lasts.

    Args:
        nearest: of a checkpoint's files, as `StateReader` takes it: those that are not needed are not opened.
    """
    return ExportedWeights(folder) if is_exported(folder) else StateReader(folder, nearest=nearest)


def is_exported(folder: Path) -> bool:
    """Whether it looks like an exported model."""
    return (folder / CONFIG).is_file()


def _exported(folder: Path, every_byte: bool) -> tuple[dict[str, Any], str | None]:
    config = read_config(folder)
    if every_byte:
        check_files(folder)
    return config.model.model_dump(mode="json"), config.tokenizer_sha256


def _checkpoint(folder: Path, every_byte: bool) -> tuple[dict[str, Any], str | None]:
    if every_byte and (found := problems(folder)):
        raise UserError(f"{folder} is not whole: {'; '.join(found)}; give another checkpoint")
    model = json.loads((folder / MODEL_FILE).read_text(encoding="utf-8"))
    return model, read_trainer_state(folder).tokenizer_sha256
