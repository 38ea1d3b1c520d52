"""States that rows carry from one step into the next, by global row number, and their files in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from parallel.boundary_states import State
from parallel.process import World

_ROWS = "rows"
_WENT_BACK = "went_back"
_SHARED = "num_layers"
"""The tensor of a flat state that is not one entry a row."""
_RESTART = "restart"
"""The tensor of a flat state that is there where a row of the micro-batch was reset by hand alone: in files, always."""


class CarriedStates:
    """The state of each of this rank's rows behind the last step: a flat one for every micro-batch, empty at a
    beginning. States are values: an earlier one that was taken out can be put back.

    Row j of micro-batch m of rank r is number (m * ranks + r) * micro_batch_size + j of a step, as in the data loader.
    Rank r of n writes `carried-<r>-of-<n>.safetensors`: the numbers of its rows under `rows`, which of them `went_back`
    (bool), and each tensor of their states, each with the rows in that order along its first axis. All rows of a step
    have states of the same shapes, since they have read the same number of tokens.
    """

    def __init__(self, world: World, *, micro_batch_size: int, accumulation: int) -> None:
        self._world = world
        self._micro_batch_size = micro_batch_size
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
        first = (micro_batch * self._world.size + self._world.rank) * self._micro_batch_size
        return range(first, first + self._micro_batch_size)

    def write(self, folder: Path) -> Path:
        """Write this rank's file and return its path. Raises OSError or SafetensorError when the disk does."""
        held = [(self.rows(index), state) for index, state in enumerate(self._states) if state]
        numbers = [row for rows, _ in held for row in rows]
        tensors = {
            _ROWS: torch.tensor(numbers, dtype=torch.int64),
            _WENT_BACK: torch.tensor([row in self.went_back for row in numbers], dtype=torch.bool),
        }
        if held:
            states = [{_RESTART: torch.zeros(len(rows), dtype=torch.bool), **state} for rows, state in held]
            tensors[_SHARED] = states[0][_SHARED]
            for name in states[0].keys() - {_SHARED}:
                tensors[name] = torch.cat([state[name].cpu() for state in states])
        path = folder / f"carried-{self._world.rank:05d}-of-{self._world.size:05d}.safetensors"
        save_file(tensors, path)
        return path

    def read(self, folder: Path) -> None:
        """Take over the states that any number of ranks wrote, in micro-batches of any size.

        Raises:
            ValueError: the folder holds none, or those of another number of rows.
        """
        paths = sorted(folder.glob("carried-*.safetensors"))
        if not paths:
            raise ValueError(
                f"{folder} holds no carried states: it was written by a run whose rows did not go on from step to step"
            )
        places = {row: (path, at) for path in paths for at, row in enumerate(_numbers(path, _ROWS))}
        if not places:
            self.clear()
            return
        count = len(self._states) * self._world.size * self._micro_batch_size
        if sorted(places) != list(range(count)):
            raise ValueError(
                f"{folder} holds the states of {len(places)} rows, and a step has {count}: rows that go on from step "
                "to step must stay as many"
            )
        own = [self.rows(m) for m in range(len(self._states))]
        self._states = [self._read_rows([places[row] for row in rows]) for rows in own]
        went_back = {path: _numbers(path, _WENT_BACK) for path in paths}
        self.went_back = {row for rows in own for row in rows if went_back[places[row][0]][places[row][1]]}

    def _read_rows(self, places: list[tuple[Path, int]]) -> State:
        """The states at these places of files, one behind the other."""
        parts: list[State] = []
        for path, at in places:
            with safe_open(path, framework="pt") as file:
                names = [name for name in file.keys() if name not in (_ROWS, _WENT_BACK)]
                parts.append({name: _row(file, name, at) for name in names})
        whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0] if name != _SHARED}
        if not whole[_RESTART].any():
            del whole[_RESTART]
        return {_SHARED: parts[0][_SHARED]} | {n: tensor.to(self._world.device) for n, tensor in whole.items()}


def _row(file: safe_open, name: str, at: int) -> Tensor:
    return file.get_tensor(name) if name == _SHARED else file.get_slice(name)[at : at + 1]


def _numbers(path: Path, name: str) -> list[int]:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name).tolist()
