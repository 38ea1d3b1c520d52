"""Weights and optimizer state of running ranks to files and back: for any layout and any engine that says which
fragments of which parameters each rank steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from parallel.fragments import Fragment, make_optimizer_state, optimizer_step
from parallel.host_copies import HostCopies, SavedFile
from parallel.mesh import Mesh
from parallel.state_files import (
    KINDS,
    MOMENTS,
    WEIGHT,
    StateReader,
    Stretch,
    WeightReader,
    index_file,
    rank_file,
    require_same_parameters,
)

Shapes = Mapping[str, torch.Size]


def files_of_state(
    held: Sequence[Fragment],
    optimizer: torch.optim.Optimizer,
    mesh: Mesh,
    *,
    zero_stage: int,
    shapes: Shapes,
    copies: HostCopies | None = None,
) -> list[SavedFile]:
    """This rank's share of weights and optimizer state, to be written; every rank calls it.

    Of ranks that hold the same, one writes it: without ZeRO the first replica, of what is no slice the first of the
    tensor ranks, and of what two stages of a pipeline hold the first of them.

    Args:
        held: what this rank steps.
        shapes: of all parameters of the model, whole, by their names in the whole model.
        copies: where the values are copied to; None: they are not to change until the files are written.
    """
    if any(moment not in optimizer.state.get(f.flat, {}) for f in held for moment in MOMENTS):
        make_optimizer_state(optimizer, list(held), 0)
    stretches: Iterator[Stretch] = (
        Stretch(kind, f.parameter, f.start, f.values(kind, optimizer.state), f.part)
        for f in written_here(held, mesh, zero_stage)
        for kind in KINDS
    )
    files: list[SavedFile] = [rank_file(mesh.world.rank, mesh.world.size, stretches, copies)]
    if mesh.world.is_main:
        step = optimizer_step(optimizer)
        files.append(index_file(ranks=mesh.world.size, optimizer_step=step, shapes=shapes, layout=mesh.layout))
    return files


def written_here(held: Sequence[Fragment], mesh: Mesh, zero_stage: int) -> Iterator[Fragment]:
    """Those fragments that this rank is the one to write, or to count, of all ranks that hold them."""
    if zero_stage > 0 or mesh.replicas.index == 0:
        yield from (f for f in held if (f.part is not None or mesh.place.tensor == 0) and not f.is_tied_copy)


def read_state(
    folder: Path, held: Sequence[Fragment], optimizer: torch.optim.Optimizer, mesh: Mesh, shapes: Shapes
) -> None:
    """Take over weights and optimizer state that any layout saved; every rank calls it. The copies that the model
    computes with are not brought in line: `spread_masters`.

    Raises:
        ValueError: the folder is not whole, or holds another model.
    """
    with StateReader(folder, nearest=mesh.world.rank / max(mesh.world.size - 1, 1)) as reader, torch.no_grad():
        require_same_parameters(shapes, reader.shapes, folder)
        make_optimizer_state(optimizer, list(held), reader.optimizer_step)
        for fragment in held:
            for kind in KINDS:
                _read(reader, fragment, kind, optimizer)


def read_weights(
    reader: WeightReader, held: Sequence[Fragment], optimizer: torch.optim.Optimizer, shapes: Shapes
) -> None:
    """Take over weights alone, as `read_state` does. Raises ValueError where they are another model's."""
    require_same_parameters(shapes, reader.shapes, reader.folder)
    with torch.no_grad():
        for fragment in held:
            _read(reader, fragment, WEIGHT, optimizer)


def _read(reader: WeightReader, fragment: Fragment, kind: str, optimizer: torch.optim.Optimizer) -> None:
    saved = reader.read(kind, fragment.parameter, fragment.start, fragment.numel, fragment.part)
    fragment.values(kind, optimizer.state).copy_(saved)
