"""The trained state on disk, by parameter and not by rank: readable by any layout, without DeepSpeed and without
unpickling.

Rank r of n writes `state-<r>-of-<n>.safetensors`. Each tensor in it is a stretch of one flattened fp32 quantity of
one parameter and is called `<kind>:<parameter>:<start>`, kind being `weight`, `exp_avg` or `exp_avg_sq` and start
its first element. Together the files hold every element; `state.json` says which parameters there are, their
shapes, and how many steps the optimizer has taken.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = (WEIGHT, *MOMENTS)
INDEX_FILE = "state.json"
_VERSION = 1


@dataclass(frozen=True)
class Stretch:
    """Elements `start` to `start + len(values)` of the flattened `kind` of `parameter`; values is 1-D fp32."""

    kind: str
    parameter: str
    start: int
    values: Tensor


def state_file(rank: int, ranks: int) -> str:
    """The name of one rank's file."""
    return f"state-{rank:05d}-of-{ranks:05d}.safetensors"


def write_rank(folder: Path, rank: int, ranks: int, stretches: Iterable[Stretch]) -> Path:
    """Write one rank's file and return its path. Raises OSError or SafetensorError when the disk does."""
    tensors = {f"{s.kind}:{s.parameter}:{s.start}": s.values.detach().cpu().contiguous() for s in stretches}
    path = folder / state_file(rank, ranks)
    save_file(tensors, path)
    return path


def write_index(folder: Path, *, ranks: int, optimizer_step: int, shapes: Mapping[str, torch.Size]) -> Path:
    """Write `state.json` (one rank does) and return its path."""
    index = {
        "version": _VERSION,
        "ranks": ranks,
        "optimizer_step": optimizer_step,
        "parameters": {name: list(shape) for name, shape in shapes.items()},
    }
    path = folder / INDEX_FILE
    path.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return path


class WeightReader(Protocol):
    """Weights by parameter, wherever they were saved."""

    @property
    def folder(self) -> Path:
        """Where they are."""

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        """Every parameter."""

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Elements `start` to `start + numel` of the flattened quantity, of which `weight` is one: fp32 [numel]."""


class StateReader:
    """Reads any stretch of a saved state, whatever layout wrote it. Use as a context manager: it keeps the files open.

    Raises ValueError for a folder whose files do not hold every element of every parameter.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index: dict[str, Any] = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
        if index.get("version") != _VERSION:
            raise ValueError(f"{folder / INDEX_FILE}: version {index.get('version')}, this program reads {_VERSION}")
        self.optimizer_step: int = index["optimizer_step"]
        self.shapes = {name: torch.Size(shape) for name, shape in index["parameters"].items()}
        self._files = ExitStack()
        self._stretches: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = defaultdict(list)
        for rank in range(index["ranks"]):
            self._open(folder / state_file(rank, index["ranks"]))
        self._check_whole()

    def __enter__(self) -> StateReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self._files.close()

    def _open(self, path: Path) -> None:
        if not path.is_file():
            raise ValueError(f"{path} is missing: the state in {self.folder} is not whole")
        handle = self._files.enter_context(safe_open(path, framework="pt"))
        for key in handle.keys():
            kind, rest = key.split(":", 1)
            name, start = rest.rsplit(":", 1)
            (numel,) = handle.get_slice(key).get_shape()
            self._stretches[kind, name].append((int(start), numel, handle, key))

    def _check_whole(self) -> None:
        for name, shape in self.shapes.items():
            for kind in KINDS:
                stretches = sorted(self._stretches[kind, name], key=lambda stretch: stretch[0])
                end = 0
                for start, numel, _, _ in stretches:
                    if start != end:
                        break
                    end += numel
                if end != math.prod(shape):
                    raise ValueError(
                        f"{self.folder}: {kind} of {name} is not whole (has {end} of {math.prod(shape)} elements)"
                    )
                self._stretches[kind, name] = stretches

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Elements `start` to `start + numel` of the flattened quantity: fp32 [numel] on the CPU."""
        pieces = []
        for first, length, handle, key in self._stretches[kind, name]:
            low, high = max(start, first), min(start + numel, first + length)
            if low < high:
                pieces.append(handle.get_slice(key)[low - first : high - first])
        return torch.cat(pieces) if pieces else torch.empty(0)

    def weight(self, name: str) -> Tensor:
        """The whole fp32 weight of a parameter, in its shape."""
        shape = self.shapes[name]
        return self.read(WEIGHT, name, 0, math.prod(shape)).reshape(shape)


def read_parameters(folder: Path) -> dict[str, Tensor]:
    """Every parameter of a saved state: name -> fp32 tensor on the CPU. One process, no group: for export.

    A tied parameter appears once, under the name that `nn.Module.named_parameters` gives it.
    """
    with StateReader(folder) as reader:
        return {name: reader.weight(name) for name in reader.shapes}


def load_parameters(model: nn.Module, folder: Path) -> None:
    """Copy the saved fp32 weights into `model`. Raises ValueError naming the parameters that differ in name or
    shape.
    """
    with StateReader(folder) as reader, torch.no_grad():
        require_same_parameters({n: p.shape for n, p in model.named_parameters()}, reader.shapes, folder)
        for name, parameter in model.named_parameters():
            parameter.copy_(reader.weight(name))


def require_same_parameters(model: Mapping[str, torch.Size], saved: Mapping[str, torch.Size], folder: Path) -> None:
    """Raise ValueError when the two differ, naming up to five of the parameters."""
    differing = [
        f"{name}: {tuple(saved[name]) if name in saved else 'absent'} in the checkpoint, "
        f"{tuple(model[name]) if name in model else 'absent'} in the model"
        for name in sorted(model.keys() | saved.keys())
        if model.get(name) != saved.get(name)
    ]
    if differing:
        more = f" (and {len(differing) - 5} more)" if len(differing) > 5 else ""
        raise ValueError(f"{folder} holds another model: {'; '.join(differing[:5])}{more}")
