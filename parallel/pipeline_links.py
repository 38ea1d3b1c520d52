"""Between neighbouring stages of a pipeline: activations to the next, their gradients to the one before."""

from __future__ import annotations

from collections import deque

import torch.distributed as dist
from torch import Tensor

from parallel.mesh import Mesh


class Links:
    """This stage's ends. Sending does not wait for the neighbour, receiving does; every rank of the mesh makes one.

    Each direction has a group of its own: NCCL runs what two ranks exchange within a group one after the other, and a
    stage may have sent two activations before it asks for the first gradient, which its neighbour sends between them.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._ranks = mesh.pipeline.ranks
        self.stage = mesh.pipeline.index
        """This one's number."""
        self.stages = mesh.pipeline.size
        """How many there are."""
        made = [[dist.new_group(ranks) for ranks in mesh.layout.groups("pipeline")] for _ in range(2)]
        own = mesh.layout.groups("pipeline").index(self._ranks)
        self._forward, self._backward = (groups[own] for groups in made)
        self._sent: deque[tuple[dist.Work, Tensor]] = deque()

    @property
    def is_first(self) -> bool:
        """Whether it begins from tokens."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """Whether it ends in a loss."""
        return self.stage == self.stages - 1

    def send_activations(self, activations: Tensor) -> None:
        """To the next stage."""
        self._send(activations, self.stage + 1, self._forward)

    def receive_activations(self, into: Tensor) -> Tensor:
        """Fill a tensor with what the stage before sent."""
        dist.recv(into, self._ranks[self.stage - 1], self._forward)
        return into

    def send_gradients(self, gradients: Tensor) -> None:
        """To the stage before."""
        self._send(gradients, self.stage - 1, self._backward)

    def receive_gradients(self, into: Tensor) -> Tensor:
        """Fill a tensor with what the next stage sent."""
        dist.recv(into, self._ranks[self.stage + 1], self._backward)
        return into

    def flush(self) -> None:
        """Wait until all that was sent is gone."""
        while self._sent:
            self._sent.popleft()[0].wait()

    def close(self) -> None:
        """Let go of the groups; every rank of them calls it."""
        self.flush()
        for group in (self._forward, self._backward):
            dist.destroy_process_group(group)

    def _send(self, tensor: Tensor, stage: int, group: dist.ProcessGroup) -> None:
        tensor = tensor.detach().contiguous()
        work = dist.isend(tensor, self._ranks[stage], group)
        if work is None:
            raise RuntimeError("this rank is not among those of its own pipeline")
        self._sent.append((work, tensor))  # the tensor must live until it is gone
        if len(self._sent) > 2:  # the memory of what waits stays bounded
            self._sent.popleft()[0].wait()
