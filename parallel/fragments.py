"""Which elements of which parameter this rank's optimizer steps, for every ZeRO stage.

DeepSpeed keeps each rank's share in flat fp32 tensors. A `Fragment` ties a stretch of such a tensor to the
parameter it belongs to, or, where ranks hold slices of parameters, to the slice that this rank holds, which is all that
saving by parameter, loading into another layout, and gathering whole weights need.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from parallel.gradients import is_tied_copy
from parallel.slices import Slice, slice_of
from parallel.state_files import MOMENTS, WEIGHT


@dataclass(frozen=True)
class Fragment:
    """Elements `start` to `start + numel` of a flattened parameter, or of a part of it, held in `flat` from `offset`
    on.
    """

    parameter: str
    start: int
    numel: int
    flat: Tensor
    offset: int
    part: Slice | None = None
    """What the elements are counted in; None: in the whole parameter."""
    is_tied_copy: bool = False
    """Whether another stage of a pipeline holds it too, and is the one to write it."""

    def values(self, kind: str, state: Mapping[Tensor, Mapping[str, Tensor]]) -> Tensor:
        """A view [numel] of the weight, or of an optimizer moment, that writing to changes."""
        whole = self.flat.data if kind == WEIGHT else state[self.flat][kind]
        return whole.view(-1).narrow(0, self.offset, self.numel)


def fragments(module: nn.Module, zero_optimizer: Any, stage: int, rank: int) -> Iterator[Fragment]:
    """This rank's fragments of what its module holds. Without ZeRO it steps all of that.

    Args:
        zero_optimizer: the optimizer that DeepSpeed wrapped around the torch one (unused at stage 0).
        rank: this rank's place among the replicas, which ZeRO divides the parameters among.
    """
    for name, parameter in module.named_parameters():
        if stage == 0:
            part, is_copy = slice_of(parameter), is_tied_copy(parameter)
            yield Fragment(name, 0, parameter.numel(), parameter, 0, part, is_copy)
        elif stage == 3:
            yield from _partition(name, parameter, zero_optimizer, rank)
        elif parameter._hp_mapping is not None:
            link = parameter._hp_mapping
            flat = _owner(link.hp_fragment, zero_optimizer)
            yield Fragment(
                name,
                link.lp_fragment_address.start,
                link.lp_fragment_address.numel,
                flat,
                link.hp_fragment_address.start,
                slice_of(parameter),
                is_tied_copy(parameter),
            )


def _owner(view: Tensor, zero_optimizer: Any) -> Tensor:
    storage = view.untyped_storage().data_ptr()
    for group in zero_optimizer.optimizer.param_groups:
        for flat in group["params"]:
            if flat.untyped_storage().data_ptr() == storage:
                return flat
    raise RuntimeError("a ZeRO fragment belongs to no tensor of the optimizer: DeepSpeed's layout has changed")


def _partition(name: str, parameter: Any, zero_optimizer: Any, rank: int) -> Iterator[Fragment]:
    group, offset, size = zero_optimizer.grad_position[zero_optimizer.get_param_id(parameter)]
    start = rank * size
    numel = min(size, parameter.ds_numel - start)  # the last ranks' partitions end in padding
    if numel > 0:
        flat = zero_optimizer.fp32_partitioned_groups_flat[group]
        yield Fragment(name, start, numel, flat, offset, slice_of(parameter))


def make_optimizer_state(optimizer: torch.optim.Optimizer, held: list[Fragment], step: int) -> None:
    """Give AdamW its state for every tensor that it steps here, with zero moments, as its first step would."""
    for flat in {id(fragment.flat): fragment.flat for fragment in held}.values():
        on_device = {"device": flat.device} if optimizer.defaults["fused"] else {}
        optimizer.state[flat] = {
            "step": torch.tensor(float(step), dtype=torch.float32, **on_device),
            **{moment: torch.zeros_like(flat.data) for moment in MOMENTS},
        }


def optimizer_step(optimizer: torch.optim.Optimizer) -> int:
    """How many steps AdamW has taken (0 before the first)."""
    return max((int(state["step"]) for state in optimizer.state.values() if "step" in state), default=0)


def spread_masters(zero_optimizer: Any, stage: int) -> None:
    """After the fp32 weights were written to: bring the copies that the model computes with in line, on all ranks."""
    if stage in (1, 2):
        zero_optimizer.update_lp_params()
    elif stage == 3:
        zero_optimizer.checkpoint_event_prologue()
        for group in range(len(zero_optimizer.fp32_partitioned_groups_flat)):
            zero_optimizer._reassign_or_swap_out_partitioned_parameters(group)
        zero_optimizer.checkpoint_event_epilogue()
