"""Parameters as wholes, of which ranks hold slices and ZeRO's shares: their shapes, and gathering them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.fragments import Fragment
from parallel.gradients import is_tied_copy
from parallel.mesh import Mesh
from parallel.slices import slice_of
from parallel.state_files import WEIGHT


def whole_shapes(module: nn.Module) -> dict[str, torch.Size]:
    """The shape of every parameter, by name. Not under ZeRO 3, where parameters are empty."""
    shapes = {}
    for name, parameter in module.named_parameters():
        part = slice_of(parameter)
        shapes[name] = parameter.shape if part is None else part.whole_shape(parameter.shape)
    return shapes


def gather_parameters(
    module: nn.Module,
    shapes: Mapping[str, torch.Size],
    held: Mapping[str, Fragment],
    optimizer_state: Mapping[Tensor, Mapping[str, Tensor]],
    zero_stage: int,
    mesh: Mesh,
) -> dict[str, Tensor]:
    """Every parameter, whole, fp32, on the CPU of rank 0 (an empty dict elsewhere). Every rank calls it.

    Args:
        shapes: of the whole parameters, in the same order on all ranks.
        held: what this rank's optimizer steps.
    """
    parameters = dict(module.named_parameters())
    whole: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        # Summed as integers, of which only one rank's is not 0: the exact bits, a negative zero included.
        bits = torch.zeros(shape, dtype=torch.int32, device=mesh.world.device)
        parameter = parameters.get(name)  # None where another stage of the pipeline holds it
        part = None if parameter is None else slice_of(parameter)
        is_only = (part is not None or mesh.tensor.index == 0) and (zero_stage > 0 or mesh.replicas.index == 0)
        if name in held and is_only and not is_tied_copy(parameter):
            fragment = held[name]
            values = fragment.values(WEIGHT, optimizer_state).to(torch.float32).contiguous()
            own = bits if part is None else torch.zeros(part.shape_of(shape), dtype=bits.dtype, device=bits.device)
            own.view(-1)[fragment.start : fragment.start + fragment.numel] = values.view(torch.int32)
            if part is not None:
                place = part.view_in(bits)
                place.copy_(own.view(place.shape))
        dist.reduce(bits, dst=0)
        if mesh.world.is_main:
            whole[name] = bits.view(torch.float32).cpu()
    return whole
