"""Where the states at the boundaries of segments wait for the backward pass: on the device, in host memory, on disk."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

State = dict[str, Tensor]
"""A state as flat tensors under their paths: what a model hands from one segment to the next."""

Place = Literal["device", "host", "disk"]
PLACES: tuple[Place, ...] = get_args(Place)
"""From the fastest to the roomiest."""

_FOLDER_PREFIX = "boundary-states-"


class BoundaryStatesError(OSError):
    """The disk did not take, or not give back, a state. The message names the option, the place, and the fix."""


class BoundaryStates(ABC):
    """Holds states by the number of the segment that they lead into. A state is taken once, and is gone then."""

    @abstractmethod
    def put(self, segment: int, state: State) -> None:
        """Keep the values of a state, whatever becomes of its tensors. Raises BoundaryStatesError where that fails."""

    @abstractmethod
    def take(self, segment: int) -> State:
        """The values that were put, bit for bit, outside any graph, each tensor on the device that it came from.

        Raises BoundaryStatesError where reading them fails.
        """


class DeviceStates(BoundaryStates):
    """Keeps states where they are."""

    def __init__(self) -> None:
        self._states: dict[int, State] = {}

    def put(self, segment: int, state: State) -> None:
        """See BoundaryStates."""
        # Copies: a view would keep all of its storage alive, such as the parameters that ZeRO 3 gathered for a segment.
        self._states[segment] = {name: tensor.detach().clone() for name, tensor in state.items()}

    def take(self, segment: int) -> State:
        """See BoundaryStates."""
        return self._states.pop(segment)


class HostStates(BoundaryStates):
    """Keeps states in host memory: page-locked where they come from a GPU, so that the copies overlap its work."""

    def __init__(self) -> None:
        self._states: dict[int, dict[str, tuple[Tensor, torch.device]]] = {}

    def put(self, segment: int, state: State) -> None:
        """See BoundaryStates."""
        self._states[segment] = {name: (_host_copy(tensor), tensor.device) for name, tensor in state.items()}

    def take(self, segment: int) -> State:
        """See BoundaryStates."""
        # In the order of the device's one stream, the copy there was made before this one back begins.
        held = self._states.pop(segment)
        return {name: tensor.to(device, non_blocking=True) for name, (tensor, device) in held.items()}


class DiskStates(BoundaryStates):
    """Keeps each state in a safetensors file of a folder, which it expects to have for itself."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._devices: dict[int, dict[str, torch.device]] = {}

    def put(self, segment: int, state: State) -> None:
        """See BoundaryStates."""
        # Copies: safetensors refuses tensors that share memory.
        tensors = {name: torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor) for name, tensor in state.items()}
        with _explained(self._path(segment)):
            save_file(tensors, self._path(segment))
        self._devices[segment] = {name: tensor.device for name, tensor in state.items()}

    def take(self, segment: int) -> State:
        """See BoundaryStates."""
        path, devices = self._path(segment), self._devices.pop(segment)
        with _explained(path):
            held = load_file(path)
            path.unlink()
        return {name: held[name].to(device) for name, device in devices.items()}

    def _path(self, segment: int) -> Path:
        return self.folder / f"{segment}.safetensors"


@contextmanager
def open_boundary_states(place: Place, folder: Path | None) -> Iterator[BoundaryStates]:
    """A store for the time of a `with` block; nothing of it is left afterwards, whatever happened.

    Args:
        folder: where the temporary folder of "disk" is made; it must exist. The others need none.

    Raises:
        BoundaryStatesError: no temporary folder can be made.
    """
    if place == "disk":
        with _explained(folder):
            # What cannot be removed does no harm, and must not hide the error that ended the block.
            temporary = TemporaryDirectory(prefix=_FOLDER_PREFIX, dir=folder, ignore_cleanup_errors=True)
        with temporary as path:
            yield DiskStates(Path(path))
    else:
        yield HostStates() if place == "host" else DeviceStates()


def remove_left_boundary_states(folder: Path) -> None:
    """Remove what a killed process left in `folder`; for when nobody else trains there."""
    for path in folder.glob(f"{_FOLDER_PREFIX}*"):
        shutil.rmtree(path, ignore_errors=True)  # it takes room, and harms nothing


@contextmanager
def _explained(path: Path | None) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise BoundaryStatesError(
            f"training.boundary_states: disk failed at {path} ({error}); free disk space there, or set it to host"
        ) from error


def _host_copy(tensor: Tensor) -> Tensor:
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return copy.copy_(tensor.detach(), non_blocking=tensor.is_cuda)
