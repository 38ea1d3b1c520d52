"""What a checkpoint is made of, taken out of running ranks: values in the host's memory, and files that they are
written to later, while the ranks go on.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor


class SavedFile(Protocol):
    """A file of a checkpoint that is to be written."""

    @property
    def num_bytes(self) -> int:
        """How large it is, about: nothing that is small beside tensors counts."""

    def write(self, folder: Path) -> Path:
        """Write it into a folder and return its path. Raises OSError or SafetensorError when the disk does."""


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file of tensors on the host, each contiguous."""

    name: str
    tensors: Mapping[str, Tensor]

    @property
    def num_bytes(self) -> int:
        """Of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def write(self, folder: Path) -> Path:
        """Write it into a folder and return its path. Raises OSError or SafetensorError when the disk does."""
        path = folder / self.name
        save_file(dict(self.tensors), path)
        return path


@dataclass(frozen=True)
class TextFile:
    """A small text."""

    name: str
    text: str
    num_bytes: int = 0

    def write(self, folder: Path) -> Path:
        """Write it into a folder and return its path. Raises OSError."""
        path = folder / self.name
        path.write_text(self.text, encoding="utf-8")
        return path


@dataclass(frozen=True)
class CopiedFile:
    """A small file that is there already, and stays as it is."""

    name: str
    source: Path
    num_bytes: int = 0

    def write(self, folder: Path) -> Path:
        """Copy it into a folder and return its path. Raises OSError."""
        return Path(shutil.copyfile(self.source, folder / self.name))


class HostCopies:
    """Copies of tensors in the host's memory, in buffers that stay: copies of the same names that are made later go
    into the same memory. On a GPU the buffers are pinned, and the copies are there behind `wait`.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._devices: set[torch.device] = set()

    def copy(self, name: str, tensor: Tensor) -> Tensor:
        """The copy of a tensor of any device and shape; valid until the next one of this name is asked for."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[name] = buffer
        if tensor.is_cuda:
            self._devices.add(tensor.device)
        return buffer.copy_(tensor.detach(), non_blocking=True)

    def wait(self) -> None:
        """Returns when all copies that were asked for are made."""
        for device in self._devices:
            torch.cuda.current_stream(device).synchronize()
        self._devices.clear()
