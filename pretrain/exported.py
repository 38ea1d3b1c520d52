"""An exported model: a folder as transformers has it, which everything here reads too.

- `config.json`: the model's configuration under `titans`, where the weights come from under `mnemosyne`, and what
  transformers needs.
- `model.safetensors`, or shards of it with an index: the weights, named as in the model behind `model.`.
- `tokenizer.model`: the SentencePiece model that the data was made with; `recipe.yaml`: what it was trained by.
- `mnemosyne.json`: the sha256 of these and of the other files, so that a damaged or half-copied folder is refused by
  name. A folder that transformers wrote again (`save_pretrained`) has none, and nothing to compare with.

Nothing in the folder is unpickled.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import safe_open
from torch import Tensor

from model import ModelConfig
from parallel.slices import Slice
from parallel.state_files import WEIGHT
from pretrain.durable import file_sha256
from pretrain.errors import UserError

MODEL_TYPE = "mnemosyne_titans"
VERSION = 2
CONFIG, MANIFEST, TOKENIZER, RECIPE = "config.json", "mnemosyne.json", "tokenizer.model", "recipe.yaml"
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
PREFIX = "model."
"""Of the names of the weights: transformers' class holds the model under this name."""
_HEAD, _EMBEDDING = "head.weight", "embedding.weight"


class Provenance(BaseModel):
    """Where the weights come from, beside the model's configuration: `mnemosyne` in config.json."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    version: int = VERSION
    """Version of the format."""
    sequence_length: int
    """Tokens of a training row: the length that evaluation uses when none is given."""
    step: int
    """Optimizer steps that the weights have seen."""
    tokens: int
    """Training tokens that the weights have seen."""
    data_fingerprint: str
    """Fingerprint of the training shards; of several phases' the last one's."""
    tokenizer_sha256: str
    """The tokenizer that the shards were made with."""


class ModelDirectoryConfig(Provenance):
    """What a folder says of its model."""

    model_config = ConfigDict(protected_namespaces=())

    model: ModelConfig
    """The model's configuration."""

    @property
    def context_limit(self) -> int | None:
        """Most tokens of a text: those of a training row for a transformer, None for a model with a memory."""
        return self.sequence_length if self.model.variant == "transformer" else None

    @property
    def provenance(self) -> Provenance:
        """All but the model's configuration."""
        return Provenance(**self.model_dump(exclude={"model"}))


def read_config(folder: Path) -> ModelDirectoryConfig:
    """Reads and checks config.json; raises UserError when it is missing, damaged, or of another format."""
    path = folder / CONFIG
    content = _read_json(path, f"{folder}: holds no {CONFIG}; give a folder made by `python -m tools.export`")
    if content.get("format") == "mnemosyne-model":
        raise UserError(f"{path}: was exported by an earlier version; export its checkpoint again")
    if content.get("model_type") != MODEL_TYPE:
        raise UserError(f"{path}: is not an exported Titans model; give a folder made by `python -m tools.export`")
    origin = content.get("mnemosyne")
    version = origin.get("version") if isinstance(origin, dict) else None
    if version != VERSION:
        raise UserError(f"{path}: format version {version}; this program reads {VERSION}: export again")
    try:
        return ModelDirectoryConfig.model_validate({**origin, "model": content.get("titans")})
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: field {'.'.join(map(str, first['loc']))}: {first['msg']}; export again") from None


def _read_json(path: Path, missing: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(missing) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); export the model again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: does not hold a JSON object; export the model again")
    return content


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights; raises UserError when one is missing."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / WEIGHTS_INDEX
    content = _read_json(index, f"{folder / WEIGHTS}: is missing; export the model again")
    names = content.get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) and "/" not in name for name in names.values()):
        raise UserError(f"{index}: field weight_map does not say which file holds which weight; export again")
    files = [folder / name for name in sorted(set(names.values()))]
    for path in files:
        if not path.is_file():
            raise UserError(f"{path}: is missing; export the model again")
    return files


def check_files(folder: Path) -> None:
    """Raises UserError for a file that is missing or differs from its recorded sha256.

    A folder without a manifest was written by transformers: there is nothing to compare with.
    """
    used = [CONFIG, *(path.name for path in weight_files(folder))]
    path = folder / MANIFEST
    if not path.is_file():
        return
    files = _read_json(path, "").get("files")
    if not isinstance(files, dict) or not {*used, TOKENIZER, RECIPE} <= files.keys():
        raise UserError(f"{path}: field files does not name every file that the model is made of; export again")
    for name, expected in files.items():
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: is missing; export the model again")
        found = file_sha256(folder / name)
        if found != expected:
            raise UserError(
                f"{folder / name}: sha256 is {found}, {MANIFEST} says {expected}; export the model again, or, where "
                f"the change is meant, remove {MANIFEST}"
            )


class ExportedWeights:
    """An exported model's weights as `Engine.load_weights` takes them. A context manager: it keeps the files open.

    Raises ValueError for a weight whose name is none of an exported model's, and for a tied model's head that is not
    its embedding.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = ExitStack()
        self._places: dict[str, Any] = {}
        tied, head = read_config(folder).model.tie_embeddings, None
        for path in weight_files(folder):
            file = self._files.enter_context(safe_open(path, framework="pt"))
            for key in file.keys():
                if not key.startswith(PREFIX):
                    raise ValueError(f"{path}: holds {key}, which is no weight of a Titans model")
                if tied and key == PREFIX + _HEAD:  # the embedding once more
                    head = file
                else:
                    self._places[key.removeprefix(PREFIX)] = file
        if head is not None and _EMBEDDING in self._places:
            if not torch.equal(head.get_tensor(PREFIX + _HEAD), self.tensor(_EMBEDDING)):
                raise ValueError(
                    f"{folder}: {CONFIG} says that the head is the embedding, but {PREFIX}{_HEAD} and {PREFIX}"
                    f"{_EMBEDDING} differ; set tie_embeddings to false in its titans section, or drop one of them"
                )
        self.shapes = {
            name: torch.Size(file.get_slice(PREFIX + name).get_shape()) for name, file in self._places.items()
        }

    def __enter__(self) -> ExportedWeights:
        return self

    def __exit__(self, *exception: object) -> None:
        self._files.close()

    def tensor(self, name: str) -> Tensor:
        """A whole parameter on the CPU, in the precision that it is stored in."""
        return self._places[name].get_tensor(PREFIX + name)

    def read(self, kind: str, name: str, start: int, numel: int, part: Slice | None = None) -> Tensor:
        """Elements `start` to `start + numel` of a flattened parameter, or of a part of it: fp32 [numel] on the CPU.

        Raises ValueError for another `kind` than weights, which is all that is exported.
        """
        if kind != WEIGHT:
            raise ValueError(f"{self.folder}: an exported model holds no {kind}")
        weight = self.tensor(name)
        held = weight if part is None else part.of(weight)
        return held.flatten()[start : start + numel].to(torch.float32)
