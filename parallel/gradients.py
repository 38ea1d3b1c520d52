"""Gradients looked at as a whole: their global norm and clipping without ZeRO, and parameters that get none."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.mesh import Mesh
from parallel.slices import slice_of

TIED_COPY = "ds_pipe_replicated"
"""DeepSpeed's attribute of a parameter that an earlier stage of the pipeline holds, too."""


def is_tied_copy(parameter: Tensor) -> bool:
    """Whether an earlier stage of the pipeline holds the same parameter, and counts for it."""
    return getattr(parameter, TIED_COPY, False)


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float, mesh: Mesh) -> Tensor:
    """Scale gradients to a global l2 norm of at most `limit` (0: whatever it is), and give the norm before: fp32, 0-d.

    Of slices all tensor ranks' count, of whole parameters one rank's, and of both those of every stage. For gradients
    that are alike on all replicas.
    """
    held = [parameter for parameter in parameters if parameter.grad is not None]
    counted = [parameter for parameter in held if not is_tied_copy(parameter)]
    slices = [p.grad for p in counted if slice_of(p) is not None]
    norm = nn.utils.get_total_norm([p.grad for p in counted if slice_of(p) is None])
    if slices or mesh.pipeline.size > 1:
        squares = norm.square()
        if slices:
            squares += mesh.tensor.all_reduce(nn.utils.get_total_norm(slices).square())
        norm = mesh.pipeline.all_reduce(squares).sqrt()
    nn.utils.clip_grads_with_norm_(held, limit if limit > 0 else float("inf"), norm)
    return norm


class GradientWatch:
    """Finds parameters that no gradient reaches in the first step.

    ZeRO's flat tensors would apply weight decay to such a parameter without ever training it.
    """

    def __init__(self, module: nn.Module) -> None:
        self._ungraded = {name for name, _ in module.named_parameters()}

        def watch(name: str) -> Any:
            return lambda _: self._ungraded.discard(name)

        self._hooks = [p.register_post_accumulate_grad_hook(watch(n)) for n, p in module.named_parameters()]

    def end(self) -> None:
        """Stop watching. Raises ValueError that names parameters without a gradient."""
        for hook in self._hooks:
            hook.remove()
        if self._ungraded:
            raise ValueError(
                f"no gradient reaches {', '.join(sorted(self._ungraded)[:5])}: remove the parameter or freeze it "
                "(requires_grad=False) before the optimizer is built"
            )


def mean_over(mesh: Mesh, stats: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The layers' statistics, fp32, averaged over the ranks that read rows or hold heads of these layers; of a
    pipeline, all stages' layers.
    """
    values = [value.detach().to(torch.float32).reshape(()) for layer in stats for value in layer.values()]
    if values:
        means = torch.stack(values)
        for group in (mesh.tensor, mesh.replicas):
            means = group.all_reduce(means) / group.size
        supply = iter(means.unbind())
        stats = [{name: next(supply) for name in layer} for layer in stats]
    if mesh.pipeline.size == 1:
        return stats
    of_stages: list[Any] = [None] * mesh.pipeline.size
    own = [{name: value.cpu() for name, value in layer.items()} for layer in stats]
    dist.all_gather_object(of_stages, own, group=mesh.pipeline.handle)
    return [{name: value for part in parts for name, value in part.items()} for parts in zip(*of_stages, strict=True)]
