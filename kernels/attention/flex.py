"""FlexAttention (arXiv 2412.05496), compiled: every mask, skipping the blocks of which nothing is seen.

The prefix is a softmax of its own, merged by the log-sum-exp, through which FlexAttention has a gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels.attention.inputs import AttentionInputs, indices
from kernels.attention.packed import DTYPES, FIRST_CAPABILITY
from kernels.attention.problem import Problem
from kernels.attention.sink import prefix_summary

name = "flex"
BLOCK = 128
"""Queries and keys of a block that is computed or skipped as a whole; FlexAttention's own."""
MAX_PAIRS = 2**22
"""Pairs of blocks in a row, of 262,144 queries and keys: their lists grow with the square of the length."""
WIDTHS = range(16, 257)
RECOMPILE_LIMITS = {"recompile_limit": 256, "accumulated_recompile_limit": 1024}
"""Graphs that the compiler keeps of the one function that all models and masks of a process are compiled from. Of its
own 8 a run with its evaluations uses more (dtypes, rows, heads, gradients, prefixes), and the next is an error."""
_BEYOND = 2**40
"""Larger than any index; exact as the double that padding makes of it."""


def refusal(problem: Problem) -> str | None:
    """Why FlexAttention does not take a problem; None if it does."""
    if problem.queries != "many":
        return "a row has no more queries than the block of them that is computed at least"
    if problem.head_dim not in WIDTHS:
        return f"a head has {problem.head_dim} dimensions, the kernels take {WIDTHS[0]} to {WIDTHS[-1]}"
    return hardware_refusal(problem)


def hardware_refusal(problem: Problem) -> str | None:
    """Why the kernels can't be compiled for a device and such tensors; None if they can."""
    if problem.device.type == "cpu":
        if problem.dtype not in (torch.float32, *DTYPES):
            return f"the tensors are {problem.dtype or 'of several dtypes'}, the kernels take fp32 and shorter ones"
        if problem.has_prefix:
            return "on a CPU, FlexAttention gives no log-sum-exp, by which the prefix is merged"
        return "on a CPU, FlexAttention has no backward" if problem.needs_gradient else None
    if problem.device.type != "cuda":
        return f"the tensors are on {problem.device.type}, the kernels are for a GPU or CPU"
    if problem.dtype not in DTYPES:
        return f"the tensors are {problem.dtype or 'of several dtypes'}, the kernels take float16 and bfloat16"
    if torch.version.hip is None:
        capability = torch.cuda.get_device_capability(problem.device)
        if capability < FIRST_CAPABILITY:
            return f"the GPU has compute capability {capability}, the kernels need {FIRST_CAPABILITY} or later"
    return None


def misfit(inputs: AttentionInputs) -> str | None:
    """Why rows of a call's length are not taken; None if they are."""
    queries, keys = inputs.q.shape[2], inputs.streams[0][0].shape[2] * len(inputs.streams)
    if (pairs := -(-queries // BLOCK) * -(-keys // BLOCK)) > MAX_PAIRS:
        return (
            f"a row has {pairs:,} pairs of blocks; the lists of them, a number each, are made for up to {MAX_PAIRS:,}"
        )
    return None


def run(inputs: AttentionInputs) -> Tensor:
    """[B, H, Tq, D]."""
    return attention_flex(inputs, _compiled())


@functools.cache
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention  # its import takes the compiler's with it

    # Whole, since what is not compiled holds all scores; dynamic, or every length would be compiled for itself.
    compiled = torch.compile(flex_attention, dynamic=True, fullgraph=True)

    def call(*arguments: Any, **options: Any) -> Any:
        with torch._dynamo.config.patch(RECOMPILE_LIMITS):
            return compiled(*arguments, **options)

    return call


def attention_flex(inputs: AttentionInputs, flex_attention: Callable[..., Any]) -> Tensor:
    """[B, H, Tq, D] by `flex_attention`, compiled or not."""
    from torch.nn.attention.flex_attention import AuxRequest

    q, (keys, values) = inputs.q, inputs.streams[0]
    if len(inputs.streams) > 1:
        keys, values = (torch.cat(parts, 2) for parts in zip(*inputs.streams, strict=True))
    scale, has_prefix = q.shape[-1] ** -0.5, inputs.prefix is not None
    out = flex_attention(
        q, keys, values, block_mask=_block_mask(inputs), scale=scale,
        return_aux=AuxRequest(lse=True) if has_prefix else None,
    )  # fmt: skip
    if not has_prefix:
        return out
    out, aux = out
    score, own = prefix_summary(inputs.prefix, scale)
    weight = (score - aux.lse[..., None]).sigmoid()
    return (out * (1 - weight) + own * weight).to(q.dtype)


def _block_mask(inputs: AttentionInputs) -> Any:
    """What each query sees, by pairs and by blocks. The pairs' rule reads tensors alone: no number compiles it anew."""
    from torch.nn.attention.flex_attention import BlockMask

    batch, length, offset = inputs.q.shape[0], inputs.q.shape[2], inputs.offset
    own = indices(offset, offset + length, inputs.q.device)
    lower = (own - inputs.window + 1).clamp(min=0)[None]
    if inputs.first_visible is not None:
        lower = torch.maximum(lower, inputs.first_visible)
    position = indices(0, offset + length, inputs.q.device).repeat(len(inputs.streams))
    some, all_ = _blocks(own, lower, position)
    lower = lower.expand(batch, -1).contiguous()

    def sees(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (position[key] <= own[query]) & (position[key] >= lower[row, query])

    return BlockMask.from_kv_blocks(
        *_listed(some & ~all_), *_listed(all_), BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(length, len(position))
    )


def _blocks(own: Tensor, lower: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """Which blocks of keys hold some key that a block of queries sees, and which hold only keys that all of it see.

    Both [B or 1, 1, blocks of queries, blocks of keys] bool; of the first, some may hold none.

    Args:
        own: [Tq], the queries' own key indices, increasing.
        lower: [B or 1, Tq], the first key that each sees.
        position: [Nk], the key index of each key.
    """
    first_key, last_key = _extremes(position[None])
    earliest, latest = _extremes(lower)
    first_own, last_own = _extremes(own[None])
    reaches = (last_key >= earliest[..., None]) & (first_key <= last_own[..., None])
    whole = (first_key >= latest[..., None]) & (last_key <= first_own[..., None])
    # The last block may be a part of one: its pairs are looked at one by one.
    whole[..., len(position) // BLOCK :] = False
    return reaches[:, None], (whole & reaches)[:, None]


def _extremes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest element of each block, [rows, blocks], of x [rows, n]."""
    missing = -x.shape[1] % BLOCK
    low, high = (pad(x, (0, missing), value=fill).unflatten(1, (-1, BLOCK)) for fill in (_BEYOND, -1))
    return low.amin(-1), high.amax(-1)


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks each row has, and which: True ones first, in order."""
    order = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1).to(torch.int32), order.to(torch.int32)
