"""An exported model: config.json, model.safetensors, tokenizer.model, and the recipe that it was trained with.

config.json holds a format version, the model's configuration, where the weights come from, and the sha256 of every
other file, so that a damaged or half-copied folder is refused by name. Nothing in the folder is unpickled.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import safe_open
from torch import Tensor

from model import ModelConfig
from parallel.state_files import WEIGHT
from pretrain.durable import file_sha256
from pretrain.errors import UserError

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


def check_files(folder: Path, config: ModelDirectoryConfig) -> None:
    """Raises UserError for a file that is missing or differs from its recorded sha256."""
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


class ExportedWeights:
    """An exported model's weights as `Engine.load_weights` takes them. A context manager: it keeps the file open."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = ExitStack()
        self._file = self._files.enter_context(safe_open(folder / WEIGHTS, framework="pt"))
        self.shapes = {name: torch.Size(self._file.get_slice(name).get_shape()) for name in self._file.keys()}

    def __enter__(self) -> ExportedWeights:
        return self

    def __exit__(self, *exception: object) -> None:
        self._files.close()

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Elements `start` to `start + numel` of a flattened parameter: fp32 [numel] on the CPU.

        Raises ValueError for another `kind` than weights, which is all that is exported.
        """
        if kind != WEIGHT:
            raise ValueError(f"{self.folder}: an exported model holds no {kind}")
        return self._file.get_tensor(name).flatten()[start : start + numel].to(torch.float32)
