"""The mesh's groups as DeepSpeed asks for them: by the methods of Megatron-LM's model-parallel unit."""

from __future__ import annotations

from types import ModuleType

import torch.distributed as dist

from parallel.mesh import Mesh


class DeepSpeedGroups:
    """An `mpu` of a model that is split over tensor ranks.

    To DeepSpeed all replicas are data-parallel ranks, those of a sequence too: told of sequences, it scales gradients
    otherwise in every ZeRO stage. It sums norms over the model-parallel group: those of parameters that are marked
    `model_parallel` on each of its ranks, those of the others on the first alone.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        # It needs a group also where this rank is the only replica.
        self._replicas = mesh.replicas.handle or dist.new_group([mesh.world.rank], use_local_synchronization=True)

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """Holds the same parameters."""
        return self._replicas

    def get_data_parallel_world_size(self) -> int:
        """Ranks of that."""
        return self._mesh.replicas.size

    def get_data_parallel_rank(self) -> int:
        """This one's place in it."""
        return self._mesh.replicas.index

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Their numbers among all."""
        return list(self._mesh.replicas.ranks)

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        """Holds one copy of the model together."""
        return self._mesh.tensor.handle

    def get_model_parallel_world_size(self) -> int:
        """Ranks of that."""
        return self._mesh.tensor.size

    def get_model_parallel_rank(self) -> int:
        """This one's place in it."""
        return self._mesh.tensor.index

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank


def forget_groups(deepspeed: ModuleType) -> None:
    """Let go of the groups that an earlier engine of this process left behind: DeepSpeed holds them globally, and the
    next engine would take them.
    """
    groups = deepspeed.utils.groups
    groups.mpu = None
    groups.mesh_device = None
    if groups._WORLD_GROUP not in dist.distributed_c10d._world.pg_group_ranks:
        groups._WORLD_GROUP = None  # of a world that was shut down
