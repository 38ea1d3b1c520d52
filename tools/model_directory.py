"""Writing an exported model, and loading it for use. What the folder holds: `pretrain.exported`."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model import TitansLM
from pretrain.durable import file_sha256, sync
from pretrain.errors import UserError
from pretrain.exported import (
    CONFIG,
    FILES,
    RECIPE,
    TOKENIZER,
    WEIGHTS,
    ModelDirectoryConfig,
    check_files,
    read_config,
)
from tools.encoding import Tokenizer


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for use, its tokenizer, and where it came from."""

    model: TitansLM
    tokenizer: Tokenizer
    config: ModelDirectoryConfig
    folder: Path


def write_model_directory(
    output: Path, tensors: dict[str, Tensor], *, tokenizer: Path, recipe: Path, overwrite: bool, **fields: Any
) -> ModelDirectoryConfig:
    """Writes an exported model, complete or not at all; `fields` are those of `ModelDirectoryConfig` but `files`.

    Raises:
        UserError: `output` exists and holds something, unless `overwrite` and it is an exported model itself; no space.
    """
    _check_output(output, overwrite)
    building: Path | None = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, building / WEIGHTS, {"format": "pt"})
        shutil.copyfile(tokenizer, building / TOKENIZER)
        shutil.copyfile(recipe, building / RECIPE)
        files = {name: file_sha256(building / name) for name in FILES}
        config = ModelDirectoryConfig(files=files, **fields)
        (building / CONFIG).write_text(config.model_dump_json(indent=1) + "\n")
        building.chmod(0o755)
        _replace(building, output)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{output}: cannot be written: {error}; free space or give another --output") from error
    finally:
        if building is not None:
            shutil.rmtree(building, ignore_errors=True)
    return config


def _replace(building: Path, output: Path) -> None:
    """Puts a finished folder in the place of an older one, which is removed only when the new one is there."""
    for path in (*building.iterdir(), building):
        sync(path)
    old = building.with_name(f"{building.name}.old")
    if output.exists():
        os.replace(output, old)
    os.replace(building, output)
    shutil.rmtree(old, ignore_errors=True)


def _check_output(output: Path, overwrite: bool) -> None:
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"{output}: is a file; --output names a folder")
    if not any(output.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{output}: is not empty; give another --output, or --overwrite to replace an exported model")
    if not (output / CONFIG).is_file() or not (output / WEIGHTS).is_file():
        raise UserError(
            f"{output}: does not hold an exported model, so --overwrite won't remove it; give another --output"
        )


def load_model_directory(folder: Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> LoadedModel:
    """The exported model in evaluation mode.

    Args:
        device: "cpu" or "cuda".

    Raises:
        UserError: the machine has no such device; a file is missing or differs from its recorded sha256; or the weights
            are not those of the model.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; use --device cpu")
    config = read_config(folder)
    check_files(folder, config)
    # Not on the meta device: giving it memory afterwards would untie tied weights.
    with torch.device(device):
        model = TitansLM(config.model)
    tensors = load_file(folder / WEIGHTS, device=str(device))
    names = {name: parameter.shape for name, parameter in model.named_parameters()}
    wrong = [
        name for name in names.keys() | tensors.keys() if name not in tensors or names.get(name) != tensors[name].shape
    ]
    if wrong:
        raise UserError(f"{folder / WEIGHTS}: does not fit {CONFIG}: {', '.join(sorted(wrong)[:5])}; export again")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[name])
    return LoadedModel(model.to(dtype).eval(), Tokenizer.open(folder / TOKENIZER), config, folder)
