"""`python -m tools.export CHECKPOINT --output FOLDER`: a checkpoint as a model for transformers and for tools.*.

Any layout's checkpoint will do: the weights are put together from all ranks' files. Every byte is checked first. The
folder runs where there is nothing but transformers and torch, and a run can begin from it (`initialize_from`).

The folder's recipe.yaml and its card README.md hold the run's whole recipe, with the paths and URLs of its data and
folders: read them before you publish the folder.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import ValidationError

from model import ModelConfig
from parallel.state_files import read_parameters
from pretrain.checkpoints import CHECKPOINTS_FOLDER, MANIFEST, checkpoint_step, list_checkpoints, problems
from pretrain.errors import UserError
from pretrain.exported import weight_files
from pretrain.resume import MODEL_FILE, RECIPE_FILE, TOKENIZER_FILE, TRAINER_FILE, read_trainer_state
from tools.command import positive_int, run_command
from tools.huggingface.card import logged_evaluation, read_evaluation
from tools.huggingface.weights import MAX_SHARD_BYTES
from tools.model_directory import write_model_directory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that `path` means: itself, or the newest whole one of a run's folder.

    Raises:
        UserError: there is none, or the one that was named is damaged.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give a checkpoint, or the folder of a run")
    if (path / MANIFEST).is_file() or checkpoint_step(path) is not None:
        if found := _problems(path):
            raise UserError(f"{path} is not whole: {'; '.join(found)}; export another checkpoint")
        return path
    candidates = list_checkpoints(path / CHECKPOINTS_FOLDER) or list_checkpoints(path)
    if not candidates:
        raise UserError(f"{path}: holds no checkpoints; give a checkpoint, or the folder of a run")
    for candidate in candidates:
        if not (found := _problems(candidate)):
            return candidate
        print(f"warning: {candidate} is not whole and not used: {'; '.join(found)}", file=sys.stderr)
    raise UserError(f"{path}: no checkpoint in it is whole; restore one from a copy")


def _problems(checkpoint: Path) -> list[str]:
    try:
        return problems(checkpoint)
    except OSError as error:
        raise UserError(f"{error.filename or checkpoint}: cannot be read: {error.strerror}; try again") from error


def export(
    checkpoint: Path,
    output: Path,
    *,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
    evaluation: Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Writes the exported model of one whole checkpoint to `output` and returns `output`.

    Args:
        dtype: of the weights.
        overwrite: replace an exported model at `output`.
        evaluation: a text's loss by `python -m tools.evaluate --json` for the model card, measured at the checkpoint's
            step; None for what the run logged.
        max_shard_bytes: of a file of weights.

    Raises:
        UserError: the checkpoint or the evaluation can't be read, is of another step, or the folder can't be written.
    """
    try:
        config = ModelConfig.model_validate_json((checkpoint / MODEL_FILE).read_text(encoding="utf-8"))
        weights = read_parameters(checkpoint)
    except (OSError, ValidationError, ValueError) as error:
        raise UserError(f"{checkpoint}: cannot be read: {error}") from error
    state = read_trainer_state(checkpoint)
    if state.tokenizer_sha256 is None:
        raise UserError(
            f"{checkpoint}: was trained on data without a tokenizer (data.kind synthetic): an exported model reads and "
            "writes text, and this one knows none; its accuracy is in the run's run.jsonl"
        )
    if state.cursor is None:
        raise UserError(f"{checkpoint / TRAINER_FILE}: has seen no data; export a later checkpoint")
    measured = read_evaluation(evaluation, state.step) if evaluation else logged_evaluation(checkpoint, state.step)
    write_model_directory(
        output,
        {name: weight.to(dtype) for name, weight in weights.items()},
        tokenizer=checkpoint / TOKENIZER_FILE,
        recipe=checkpoint / RECIPE_FILE,
        overwrite=overwrite,
        evaluation=measured,
        max_shard_bytes=max_shard_bytes,
        model=config,
        sequence_length=state.cursor.sequence_length,
        step=state.step,
        tokens=state.tokens,
        data_fingerprint=state.cursor.fingerprint,
    )
    return output


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    result = argparse.ArgumentParser(prog="python -m tools.export", description=__doc__)
    result.add_argument("checkpoint", type=Path, help="a checkpoint, or a run's folder for its newest whole one")
    result.add_argument("--output", type=Path, required=True, help="folder to make")
    result.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="of the weights (default float32)")
    result.add_argument("--overwrite", action="store_true", help="replace an exported model at --output")
    result.add_argument(
        "--evaluation",
        type=Path,
        metavar="JSON",
        help="a text's loss as `python -m tools.evaluate --shards ... --json` wrote it, of an export of this very "
        "checkpoint, for the model card (default: what the run logged)",
    )
    result.add_argument(
        "--max-shard-bytes",
        type=positive_int,
        default=MAX_SHARD_BYTES,
        metavar="N",
        help="weights above this are cut into several files (default %(default)s)",
    )
    return result


def run(arguments: argparse.Namespace) -> None:
    """Exports and says what was written."""
    checkpoint = find_checkpoint(arguments.checkpoint)
    output = export(
        checkpoint,
        arguments.output,
        dtype=DTYPES[arguments.dtype],
        overwrite=arguments.overwrite,
        evaluation=arguments.evaluation,
        max_shard_bytes=arguments.max_shard_bytes,
    )
    files = weight_files(output)
    size = sum(path.stat().st_size for path in files)
    number = "1 file" if len(files) == 1 else f"{len(files)} files"
    print(f"{checkpoint} -> {output}: {number} of weights ({size:,} bytes, {arguments.dtype}), for transformers")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    arguments = parser().parse_args(argv)
    return run_command(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
