"""States that rows carry from one step into the next, by global row, layer and head, and their files in checkpoints."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.state import head_axis
from parallel.boundary_states import State
from parallel.host_copies import TensorFile
from parallel.mesh import Mesh

_ROWS = "rows"
_WENT_BACK = "went_back"
_HEADS = "heads"
_NUM_LAYERS = "num_layers"
"""The tensor of a flat state that is not one entry a row."""
_ABOUT_FILE = (_ROWS, _WENT_BACK, _HEADS, _NUM_LAYERS)
_RESTART = "restart"
"""The tensor of a flat state that is there where a row of the micro-batch was reset by hand alone: in files, always."""
_FILE = re.compile(r"carried-(\d+)-of-(\d+)\.safetensors")
_LAYER = re.compile(r"layers\.(\d+)\.")


def carried_file(rank: int, ranks: int) -> str:
    """The name of one rank's file."""
    return f"carried-{rank:05d}-of-{ranks:05d}.safetensors"


class CarriedStates:
    """The state of each of this rank's rows behind the last step: a flat one for every micro-batch, empty at a
    beginning. States are values: an earlier one that was taken out can be put back.

    Row j of micro-batch m of data rank d of n is number (m * n + d) * micro_batch_size + j of a step, as in the data
    loader. Of its state a rank holds the heads that it computes (part tensor * sequence ranks + sequence of all), and,
    in a pipeline, its stage's layers.

    Rank r of n writes `carried-<r>-of-<n>.safetensors`: the numbers of its rows under `rows`, which of them `went_back`
    (bool), which part of how many of the heads it holds under `heads`, and each tensor of their states, with the rows
    in that order along its first axis. What ranks hold alike is in the file of the first of them alone. All rows of a
    step have states of the same shapes, since they have read the same number of tokens.

    Args:
        layers: the numbers of those that this rank computes, of the whole model's; None for all.
    """

    def __init__(self, mesh: Mesh, *, micro_batch_size: int, accumulation: int, layers: range | None = None) -> None:
        self.mesh = mesh
        self._micro_batch_size = micro_batch_size
        self._layers = layers
        layout, place = mesh.layout, mesh.place
        self._heads = _Part(place.tensor * layout.sequence + place.sequence, layout.tensor * layout.sequence)
        self._states: list[State] = [{} for _ in range(accumulation)]
        self.went_back: set[int] = set()
        """This rank's rows whose state behind the last step is the one before it, as the step spoiled it."""

    def __len__(self) -> int:
        """Micro-batches of a step."""
        return len(self._states)

    def get(self, micro_batch: int) -> State:
        """The flat state of a micro-batch's rows, outside any graph."""
        return self._states[micro_batch]

    def put(self, micro_batch: int, state: Mapping[str, Tensor]) -> None:
        """Keep the values of a micro-batch's state, whatever becomes of its tensors and their graph."""
        # Copies: a view would keep all of its storage alive, such as the parameters that ZeRO 3 gathered.
        self._states[micro_batch] = {name: tensor.detach().clone() for name, tensor in state.items()}

    def clear(self) -> None:
        """Back to beginnings."""
        self._states = [{} for _ in self._states]
        self.went_back = set()

    def rows(self, micro_batch: int) -> range:
        """The global numbers of a micro-batch's rows."""
        data, place = self.mesh.layout.data, self.mesh.place.data
        first = (micro_batch * data + place) * self._micro_batch_size
        return range(first, first + self._micro_batch_size)

    def file(self) -> TensorFile:
        """This rank's file, to be written: of values that steps to come leave as they are."""
        held = [(self.rows(index), state) for index, state in enumerate(self._states) if state]
        numbers = [row for rows, _ in held for row in rows]
        tensors = {
            _ROWS: torch.tensor(numbers, dtype=torch.int64),
            _WENT_BACK: torch.tensor([row in self.went_back for row in numbers], dtype=torch.bool),
            _HEADS: torch.tensor([self._heads.index, self._heads.count]),
        }
        if held:
            states = [{_RESTART: torch.zeros(len(rows), dtype=torch.bool), **state} for rows, state in held]
            tensors[_NUM_LAYERS] = states[0][_NUM_LAYERS].cpu()
            for name in states[0].keys() - {_NUM_LAYERS}:
                if self._writes(name):
                    tensors[name] = torch.cat([state[name].cpu() for state in states])
        return TensorFile(carried_file(self.mesh.world.rank, self.mesh.world.size), tensors)

    def read(self, folder: Path) -> None:
        """Take over the states that any layout wrote, in micro-batches of any size.

        Raises:
            ValueError: the folder holds none, or those of another number of rows, or a file is missing or lacks a part.
        """
        with ExitStack() as stack:
            files = [stack.enter_context(_CarriedFile(path)) for path in _paths(folder)]
            numbers = {row for file in files for row in file.places}
            if not numbers:
                self.clear()
                return
            count = len(self._states) * self.mesh.layout.data * self._micro_batch_size
            if numbers != set(range(count)):
                raise ValueError(
                    f"{folder} holds the states of {len(numbers)} rows, and a step has {count}: rows that go on from "
                    "step to step must stay as many"
                )
            own = [self.rows(index) for index in range(len(self._states))]
            self._states = [self._read_rows(folder, files, rows) for rows in own]
            self.went_back = {row for rows in own for row in rows if any(row in file.went_back for file in files)}

    def _writes(self, name: str) -> bool:
        """Whether this rank is the one to write a tensor, of those that hold the same."""
        if head_axis(name) is not None:
            return True
        return self._heads.index == 0 and (name.startswith("layers.") or self.mesh.place.pipeline == 0)

    def _is_own(self, name: str) -> bool:
        """Whether a tensor is of no layer, or of one that this rank computes."""
        match = _LAYER.match(name)
        return match is None or self._layers is None or int(match[1]) in self._layers

    def _read_rows(self, folder: Path, files: list[_CarriedFile], rows: range) -> State:
        """The states of these rows, one behind the other."""
        state = {_NUM_LAYERS: next(file.num_layers for file in files if file.names)}
        for name in sorted({name for file in files for name in file.names}):
            if self._is_own(name):
                parts = [_row(folder, files, name, row, self._heads) for row in rows]
                state[name] = torch.cat(parts).to(self.mesh.world.device)
        if not state[_RESTART].any():
            del state[_RESTART]
        return state


@dataclass(frozen=True)
class _Part:
    """Part `index` of `count` equal ones."""

    index: int
    count: int

    def of(self, length: int) -> tuple[int, int]:
        """Where it begins and ends in so many."""
        return self.index * length // self.count, (self.index + 1) * length // self.count


class _CarriedFile:
    """One rank's file. A context manager: it keeps the file open."""

    def __init__(self, path: Path) -> None:
        self._stack = ExitStack()
        try:
            self._file: Any = self._stack.enter_context(safe_open(path, framework="pt"))
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error})") from error
        names = set(self._file.keys())
        self.names = names - set(_ABOUT_FILE)
        numbers = self._file.get_tensor(_ROWS).tolist()
        self.places = {row: at for at, row in enumerate(numbers)}
        back = self._file.get_tensor(_WENT_BACK).tolist()
        self.went_back = {row for row, went in zip(numbers, back, strict=True) if went}
        self.num_layers = self._file.get_tensor(_NUM_LAYERS) if _NUM_LAYERS in names else None
        # The first version of the format knew whole states alone.
        self.heads = _Part(*self._file.get_tensor(_HEADS).tolist()) if _HEADS in names else _Part(0, 1)

    def __enter__(self) -> _CarriedFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def shape(self, name: str) -> list[int]:
        return self._file.get_slice(name).get_shape()

    def row(self, name: str, row: int, axis: int | None, start: int, stop: int) -> Tensor:
        """A row's tensor [1, ...], or elements `start` to `stop` along an axis."""
        at = self.places[row]
        saved = self._file.get_slice(name)
        if axis is None:
            return saved[at : at + 1]
        return saved[(slice(at, at + 1), *[slice(None)] * (axis - 1), slice(start, stop))]


def _paths(folder: Path) -> Iterator[Path]:
    """The files of all ranks that wrote. Raises ValueError where there are none, or not all."""
    found = {int(match[1]): int(match[2]) for path in folder.iterdir() if (match := _FILE.fullmatch(path.name))}
    if not found:
        raise ValueError(
            f"{folder} holds no carried states: it was written by a run whose rows did not go on from step to step"
        )
    ranks = max(found.values())
    for rank in range(ranks):
        if found.get(rank) != ranks:
            raise ValueError(f"{folder / carried_file(rank, ranks)} is missing: the rows' states are not whole")
        yield folder / carried_file(rank, ranks)


def _row(folder: Path, files: list[_CarriedFile], name: str, row: int, heads: _Part) -> Tensor:
    """A row's tensor [1, ...]: those of its heads that are asked for, whatever parts of them the files hold."""
    axis = head_axis(name)
    pieces = [file.row(name, row, axis, *span) for file, span in _holding(folder, files, name, row, heads)]
    return pieces[0] if axis is None else torch.cat(pieces, axis)


def _holding(
    folder: Path, files: list[_CarriedFile], name: str, row: int, heads: _Part
) -> list[tuple[_CarriedFile, tuple[int, int]]]:
    """The files that together hold these heads of a row's tensor, and where in each they are. Raises ValueError where
    a part of them is in none.
    """
    axis = head_axis(name)
    found, end, last = [], 0, 1
    for file in sorted((f for f in files if row in f.places and name in f.names), key=lambda f: f.heads.index):
        if axis is None:
            return [(file, (0, 0))]
        length = file.shape(name)[axis] * file.heads.count
        if length % heads.count:
            raise ValueError(f"{folder}: {name} has {length} heads or channels, which {heads.count} ranks cannot share")
        (first, last), (start, stop) = heads.of(length), file.heads.of(length)
        end = max(end, first)
        if start <= end < min(stop, last):
            found.append((file, (end - start, min(stop, last) - start)))
            end = min(stop, last)
    if not found or end != last:
        raise ValueError(f"{folder}: {name} of row {row} is not whole: a rank's file lacks it")
    return found


def has_carried(folder: Path) -> bool:
    """Whether a checkpoint holds states that rows carry."""
    return any(_FILE.fullmatch(path.name) for path in folder.iterdir())


def carried_rows(folder: Path) -> int:
    """Of how many rows a checkpoint holds the states: all heads of all layers. Raises ValueError where parts are
    missing.
    """
    with ExitStack() as stack:
        files = [stack.enter_context(_CarriedFile(path)) for path in _paths(folder)]
        rows = {row for file in files for row in file.places}
        for name in {name for file in files for name in file.names}:
            for row in rows:
                _holding(folder, files, name, row, _Part(0, 1))
        return len(rows)
