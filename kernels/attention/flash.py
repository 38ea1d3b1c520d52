"""flash-attn (FlashAttention-2, arXiv 2307.08691), where it is installed."""

from __future__ import annotations

import functools
import inspect
from types import ModuleType

import torch
from torch import Tensor

from kernels.attention import packed
from kernels.attention.inputs import AttentionInputs
from kernels.attention.packed import Packed, attention_packed
from kernels.attention.problem import Problem

name = "flash"
misfit = packed.misfit


def refusal(problem: Problem) -> str | None:
    """Why flash-attn does not take a problem; None if it does."""
    return packed.refusal(problem) or _missing()


def run(inputs: AttentionInputs) -> Tensor:
    """[B, H, Tq, D]."""
    problem = Problem.of(inputs)
    if problem.queries == "one" and not problem.has_prefix and not problem.needs_gradient:
        return _decode(inputs)
    return attention_packed(inputs, _kernel)


@functools.cache
def _missing() -> str | None:
    try:
        module = _module()
    except (ImportError, OSError) as error:  # one that was built for another torch ends in either
        return f"flash_attn can't be imported: {error}"
    version = getattr(module, "__version__", "of an unknown version")
    for function, needed in (
        ("flash_attn_varlen_func", "window_size"),
        ("flash_attn_with_kvcache", "cache_leftpad"),
    ):
        if needed not in inspect.signature(getattr(module, function, lambda: None)).parameters:
            return f"flash_attn {version} has no {function} with {needed}; 2.7 or later has"
    return None


def _module() -> ModuleType:
    import flash_attn  # optional, and slow to import

    return flash_attn


def _kernel(call: Packed) -> Tensor:
    sequences = call.sequences
    return _module().flash_attn_varlen_func(
        call.q, call.k, call.v, sequences.cu_q, sequences.cu_k, sequences.max_q, sequences.max_k,
        softmax_scale=call.scale,
        causal=True,
        # Both ends count the keys beside the query's own.
        window_size=(-1, -1) if call.window is None else (call.window - 1, 0),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip


def _decode(inputs: AttentionInputs) -> Tensor:
    """One query a row: the kernel that divides a long cache among the GPU's processors. It has no backward."""
    start = max(0, inputs.offset - inputs.window + 1)
    q, keys, values = (x.transpose(1, 2) for x in (inputs.q, *inputs.streams[0]))
    first = inputs.first_visible
    out = _module().flash_attn_with_kvcache(
        q, keys[:, start:], values[:, start:],
        cache_seqlens=keys.shape[1] - start,
        cache_leftpad=None if first is None else (first[:, 0] - start).clamp(min=0).to(torch.int32),
        softmax_scale=q.shape[-1] ** -0.5,
        causal=True,
    )  # fmt: skip
    return out.transpose(1, 2)
