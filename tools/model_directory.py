"""Writing an exported model, and loading it for use. What the folder holds: `pretrain.exported`."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from model import TitansLM
from pretrain.durable import file_sha256, sync
from pretrain.errors import UserError
from pretrain.exported import (
    CONFIG,
    MANIFEST,
    RECIPE,
    TOKENIZER,
    ExportedWeights,
    ModelDirectoryConfig,
    check_files,
    read_config,
    weight_files,
)
from tools.encoding import Tokenizer
from tools.huggingface.card import CARD, model_card
from tools.huggingface.files import config_files
from tools.huggingface.package import remote_files
from tools.huggingface.tokenizer import UNBOUNDED, refusal, tokenizer_files
from tools.huggingface.weights import MAX_SHARD_BYTES, write_weights

NOT_FINITE = "its training diverged, or --dtype has too few bits for it; try --dtype float32, or an earlier checkpoint"
"""For errors of a model that gives no numbers."""


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for use, its tokenizer, and where it came from."""

    model: TitansLM
    tokenizer: Tokenizer
    config: ModelDirectoryConfig
    folder: Path


def write_model_directory(
    output: Path,
    tensors: Mapping[str, Tensor],
    *,
    tokenizer: Path,
    recipe: Path,
    overwrite: bool,
    evaluation: dict[str, Any] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    **fields: Any,
) -> ModelDirectoryConfig:
    """Writes an exported model, complete or not at all.

    Args:
        tensors: every parameter, all of one dtype.
        tokenizer, recipe: files to copy.
        overwrite: replace an exported model at `output`.
        evaluation: for the model card; see `tools.huggingface.card`.
        max_shard_bytes: of a file of weights.
        fields: those of `ModelDirectoryConfig` but `tokenizer_sha256`.

    Raises:
        UserError: `output` exists and holds something, unless `overwrite` and it is an exported model itself; no space.
    """
    _check_output(output, overwrite)
    building: Path | None = None
    try:
        config = ModelDirectoryConfig(tokenizer_sha256=file_sha256(tokenizer), **fields)
        output.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
        write_weights(building, tensors, max_shard_bytes)
        shutil.copyfile(tokenizer, building / TOKENIZER)
        shutil.copyfile(recipe, building / RECIPE)
        texts = remote_files() | _tokenizer_files(building / TOKENIZER, config)
        texts |= config_files(config, Tokenizer.open(tokenizer), next(iter(tensors.values())).dtype)
        for name, text in texts.items():
            (building / name).write_text(text, encoding="utf-8")
        # The card is for its readers to change: nothing vouches for it.
        files = {path.name: file_sha256(path) for path in sorted(building.iterdir())}
        (building / MANIFEST).write_text(json.dumps({"files": files}, indent=1) + "\n")
        card = model_card(
            config,
            recipe.read_text(encoding="utf-8"),
            sum(tensor.numel() for tensor in tensors.values()),
            evaluation,
            "tokenizer.json" in texts,
        )
        (building / CARD).write_text(card, encoding="utf-8")
        building.chmod(0o755)
        _replace(building, output)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{output}: cannot be written: {error}; free space or give another --output") from error
    finally:
        if building is not None:
            shutil.rmtree(building, ignore_errors=True)
    return config


def _tokenizer_files(path: Path, config: ModelDirectoryConfig) -> dict[str, str]:
    """tokenizer.json and its settings; nothing, and a warning, for a tokenizer that has no exact one."""
    if (reason := refusal(path)) is not None:
        print(f"warning: no tokenizer.json, as the tokenizer can't be converted exactly: {reason}", file=sys.stderr)
        return {}
    return tokenizer_files(path, config.context_limit or UNBOUNDED)


def _replace(building: Path, output: Path) -> None:
    """Puts a finished folder in the place of an older one, which is removed only when the new one is there, and put
    back where that fails.
    """
    for path in (*building.iterdir(), building):
        sync(path)
    old = building.with_name(f"{building.name}.old")
    if output.exists():
        os.replace(output, old)
    try:
        os.replace(building, output)
    except OSError as error:
        if old.exists():
            _put_back(old, output, error)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _put_back(old: Path, output: Path, error: OSError) -> None:
    try:
        os.replace(old, output)
    except OSError as again:
        raise OSError(f"{error}; what was there is in {old} now, as it can't be moved back: {again}") from error


def _check_output(output: Path, overwrite: bool) -> None:
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"{output}: is a file; --output names a folder")
    if not any(output.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{output}: is not empty; give another --output, or --overwrite to replace an exported model")
    if not (output / CONFIG).is_file() or not (output / MANIFEST).is_file():
        raise UserError(
            f"{output}: does not hold an exported model, so --overwrite won't remove it; give another --output"
        )


def require_device(device: str) -> None:
    """Raises UserError for "cuda" where there is no GPU."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; use --device cpu")


def load_model_directory(folder: Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> LoadedModel:
    """The exported model in evaluation mode.

    Args:
        device: "cpu" or "cuda".

    Raises:
        UserError: the machine has no such device; a file is missing or differs from its recorded sha256; or the weights
            are not those of the model.
    """
    require_device(device)
    config = read_config(folder)
    check_files(folder)
    if not (folder / TOKENIZER).is_file():
        raise UserError(
            f"{folder / TOKENIZER}: is missing; copy it from the exported model that the folder was made from"
        )
    # Not on the meta device: giving it memory afterwards would untie tied weights.
    with torch.device(device):
        model = TitansLM(config.model)
    try:
        with ExportedWeights(folder) as weights:
            _copy_weights(weights, model, folder)
    except (safetensors.SafetensorError, ValueError) as error:
        raise UserError(f"{folder}: its weights cannot be read: {error}; export again") from error
    tokenizer = Tokenizer.open(folder / TOKENIZER)
    if tokenizer.sha256 != config.tokenizer_sha256:
        raise UserError(
            f"{tokenizer.path}: sha256 is {tokenizer.sha256}, {CONFIG} says {config.tokenizer_sha256}: the model was "
            "trained with another tokenizer; put that one there"
        )
    return LoadedModel(model.to(dtype).eval(), tokenizer, config, folder)


def _copy_weights(weights: ExportedWeights, model: TitansLM, folder: Path) -> None:
    """Fills the model; raises UserError where the weights are not its own."""
    names = {name: parameter.shape for name, parameter in model.named_parameters()}
    wrong = [name for name in names.keys() | weights.shapes.keys() if names.get(name) != weights.shapes.get(name)]
    if wrong:
        where = ", ".join(path.name for path in weight_files(folder))
        raise UserError(f"{folder}: {where} does not fit {CONFIG}: {', '.join(sorted(wrong)[:5])}; export again")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights.tensor(name))
