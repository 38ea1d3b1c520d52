"""What a checkpoint holds, and whether it is whole."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from model import ModelConfig, TitansLM
from model.undrawn import undrawn
from parallel.carried_states import carried_rows, has_carried
from parallel.slices import Slice
from parallel.state_files import StateReader, require_same_parameters
from pretrain.checkpoints import CHECKPOINTS_FOLDER, MANIFEST, STAYS, checkpoint_step, list_checkpoints, problems
from pretrain.errors import UserError
from pretrain.phases import ONLY_PHASE, load_phases
from pretrain.quantities import size_text
from pretrain.resume import MODEL_FILE, RECIPE_FILE, TrainerState, read_trainer_state


def find_checkpoints(path: Path) -> list[Path]:
    """The checkpoint at `path`, or those of a run's folder, newest first, whole or not. Raises UserError for none."""
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give a checkpoint, or the folder of a run")
    if (path / MANIFEST).is_file() or checkpoint_step(path) is not None:
        return [path]
    found = list_checkpoints(path / CHECKPOINTS_FOLDER) or list_checkpoints(path)
    if not found:
        raise UserError(f"{path}: holds no checkpoints; give a checkpoint, or the folder of a run")
    return found


def damage(checkpoint: Path) -> list[str]:
    """What is wrong with a checkpoint, by file: bytes that are not those that were written, and, where all are, parts
    of the state that no file holds. Empty when it is whole.

    Raises UserError where it cannot be read now.
    """
    try:
        if found := problems(checkpoint):
            return found
        with StateReader(checkpoint) as reader:
            require_same_parameters(parameter_shapes(read_model(checkpoint)), reader.shapes, checkpoint)
        if has_carried(checkpoint):
            carried_rows(checkpoint)
    except OSError as error:
        raise UserError(f"{error.filename or checkpoint}: cannot be read: {error.strerror}; try again") from error
    except UserError:
        raise
    except ValueError as error:
        return [str(error)]
    return []


def read_model(checkpoint: Path) -> ModelConfig:
    """The model that a checkpoint is of. Raises UserError."""
    try:
        return ModelConfig.model_validate_json((checkpoint / MODEL_FILE).read_text(encoding="utf-8"))
    except (OSError, ValidationError) as error:
        raise UserError(f"{checkpoint / MODEL_FILE} cannot be read ({error})") from error


def parameter_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Every parameter's shape, without allocating any."""
    return {name: parameter.shape for name, parameter in undrawn(lambda: TitansLM(config)).named_parameters()}


def contents(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint holds, for people and as JSON. Raises UserError for one that cannot be read."""
    state, config = read_trainer_state(checkpoint), read_model(checkpoint)
    try:
        with StateReader(checkpoint) as reader:
            parameters = {
                name: {"shape": list(shape), "held": _held(reader.parts(name))} for name, shape in reader.shapes.items()
            }
            optimizer_steps, layout, ranks = reader.optimizer_step, reader.layout, reader.ranks
        rows = carried_rows(checkpoint) if has_carried(checkpoint) else 0
    except (OSError, ValueError) as error:
        raise UserError(f"{checkpoint}: {error}") from error
    numbers = sum(torch.Size(entry["shape"]).numel() for entry in parameters.values())
    return {
        "checkpoint": str(checkpoint),
        "step": state.step,
        "tokens": state.tokens,
        "phase": _phase(state),
        "skipped_steps": state.skipped_steps,
        "model": f"{config.variant}, {config.num_layers} layers of width {config.dim}, {config.num_heads} heads, "
        f"vocabulary {config.vocab_size:,}",
        "parameters": numbers,
        "optimizer_steps": optimizer_steps,
        "ranks": state.ranks,
        "state_files": ranks,
        "layout": "one that it does not name" if layout is None else str(layout),
        "parallel": _parallel(checkpoint, state),
        "data": "not begun" if state.cursor is None else _cursor(state),
        "tokenizer_sha256": state.tokenizer_sha256,
        "carried_rows": rows,
        "stays": (checkpoint / STAYS).exists(),
        "files": _files(checkpoint),
        "tensors": parameters,
    }


def lines(found: dict[str, Any], *, with_parameters: bool) -> list[str]:
    """The contents as text."""
    files = found["files"]
    total = sum(entry["bytes"] for entry in files.values())
    kinds = ", ".join(f"{e['count']} {kind} ({size_text(e['bytes'])})" for kind, e in files.items())
    values = {
        "step": f"{found['step']:,} ({found['skipped_steps']} of them skipped)",
        "tokens": f"{found['tokens']:,}",
        "phase": found["phase"],
        "model": found["model"],
        "parameters": f"{found['parameters']:,} in {len(found['tensors'])} tensors",
        "optimizer": f"{found['optimizer_steps']:,} steps; two moments, fp32",
        "written by": f"{found['ranks']} rank(s); its state files by {found['layout']}",
        "parallel": ", ".join(f"{name} {value}" for name, value in found["parallel"].items()),
        "data": found["data"],
        "tokenizer": found["tokenizer_sha256"] or "none",
        "carried rows": str(found["carried_rows"]),
        "files": f"{size_text(total)}: {kinds}{'; stays when newer ones come' if found['stays'] else ''}",
    }
    text = [found["checkpoint"], *(f"{name:19} {value}" for name, value in values.items())]
    if with_parameters:
        text += [f"  {name:48} {entry['shape']!s:20} {entry['held']}" for name, entry in found["tensors"].items()]
    return text


def _phase(state: TrainerState) -> str:
    if state.phase == ONLY_PHASE and not state.done:
        return "the only one"
    done = ", ".join(f"{phase.name} ({phase.tokens:,} tokens)" for phase in state.done)
    return f"{state.phase}, {state.phase_tokens:,} tokens in it" + (f"; behind {done}" if done else "")


def _cursor(state: TrainerState) -> str:
    cursor = state.cursor
    streams = f", {cursor.rows_per_step} rows that go on" if cursor.rows_per_step else ""
    return (
        f"row {cursor.position:,} of {cursor.sequence_length:,} tokens each, order {cursor.order}, seed {cursor.seed}"
        f"{streams}, data {cursor.fingerprint[:12]}"
    )


def _parallel(checkpoint: Path, state: TrainerState) -> dict[str, Any]:
    phases = load_phases(checkpoint / RECIPE_FILE)
    parallel = phases[len(state.done)].recipe.parallel
    return {"zero_stage": parallel.zero_stage, "precision": parallel.precision}


def _held(parts: set[Slice | None]) -> str:
    axes = Counter((part.axis, part.count, part.groups) for part in parts if part is not None)
    if not axes:
        return "whole"
    return ", ".join(f"{count} slices along axis {axis}" for axis, count, _ in axes)


def _files(checkpoint: Path) -> dict[str, dict[str, int]]:
    """Number and bytes of the files, by their kind."""
    found: dict[str, dict[str, int]] = {}
    for path in sorted(checkpoint.iterdir()):
        kind = path.name.split("-")[0] if path.name.endswith(".safetensors") else "other"
        entry = found.setdefault(kind, {"count": 0, "bytes": 0})
        entry["count"] += 1
        entry["bytes"] += path.stat().st_size
    return found


def as_json(found: list[dict[str, Any]]) -> str:
    """The contents of checkpoints as a list of objects."""
    return json.dumps(found, indent=1)
