"""An exported model: config.json, model.safetensors, tokenizer.model, and the recipe that it was trained with.

config.json holds a format version, the model's configuration, where the weights come from, and the sha256 of every
other file, so that a damaged or half-copied folder is refused by name. Nothing in the folder is unpickled.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from model import ModelConfig, TitansLM
from pretrain.durable import file_sha256, sync
from pretrain.errors import UserError
from tools.encoding import Tokenizer

FORMAT = "mnemosyne-model"
VERSION = 1
CONFIG, WEIGHTS, TOKENIZER, RECIPE = "config.json", "model.safetensors", "tokenizer.model", "recipe.yaml"
FILES = (WEIGHTS, TOKENIZER, RECIPE)
"""Every file beside config.json."""


class ModelDirectoryConfig(BaseModel):
    """Content of config.json."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())

    format: str = FORMAT
    """Names the kind of folder."""
    version: int = VERSION
    """Version of the format."""
    model: ModelConfig
    """The model's configuration."""
    sequence_length: int
    """Tokens of a training row: the length that evaluation uses when none is given."""
    step: int
    """Optimizer steps that the weights have seen."""
    tokens: int
    """Training tokens that the weights have seen."""
    data_fingerprint: str
    """Fingerprint of the training shards."""
    files: dict[str, str]
    """sha256 of every other file of the folder."""


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


def read_config(folder: Path) -> ModelDirectoryConfig:
    """Reads and checks config.json; raises UserError when it is missing, damaged, or of another format."""
    path = folder / CONFIG
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{folder}: holds no {CONFIG}; give a folder made by `python -m tools.export`") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); export the model again") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path}: is not an exported model; give a folder made by `python -m tools.export`")
    if content.get("version") != VERSION:
        raise UserError(f"{path}: format version {content.get('version')}; this program reads {VERSION}: export again")
    try:
        return ModelDirectoryConfig.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: field {'.'.join(map(str, first['loc']))}: {first['msg']}; export again") from None


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
    if set(config.files) != set(FILES):
        raise UserError(
            f"{folder / CONFIG}: field files names {sorted(config.files)}, not {sorted(FILES)}; export again"
        )
    for name, expected in config.files.items():
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: is missing; export the model again")
        found = file_sha256(folder / name)
        if found != expected:
            raise UserError(f"{folder / name}: sha256 is {found}, {CONFIG} says {expected}; export the model again")
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
