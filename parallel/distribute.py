"""From the whole model to this rank's part of it."""

from __future__ import annotations

from model import TitansLM
from parallel.mesh import Mesh
from parallel.sequence_parallel import split_over_sequence_ranks
from parallel.sharded_norms import shard_norms_over_tensor_ranks
from parallel.tensor_parallel import split_over_tensor_ranks


def distribute(model: TitansLM, mesh: Mesh, *, shard_norms: bool = False) -> None:
    """Make of a whole model, in place, this rank's part of it. Its parameters keep their names, and those that are cut
    their `Slice`.

    Args:
        shard_norms: whether tensor ranks divide norms and the residual stream (`parallel.sharded_norms`).

    Weights drawn before it from one seed are the same in every layout. To be called before the optimizer is built.

    Raises:
        ValueError: a layout that cannot be built.
    """
    layout = mesh.layout
    if layout.tensor > 1:
        split_over_tensor_ranks(model, mesh.tensor)
        if shard_norms:
            shard_norms_over_tensor_ranks(model, mesh.tensor)
    if layout.sequence > 1:
        split_over_sequence_ranks(model, mesh.sequence)
