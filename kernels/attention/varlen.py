"""torch's own attention over packed sequences, torch.nn.attention.varlen."""

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

name = "varlen"
misfit = packed.misfit


def refusal(problem: Problem) -> str | None:
    """Why varlen_attn does not take a problem; None if it does."""
    return packed.refusal(problem) or _missing()


def run(inputs: AttentionInputs) -> Tensor:
    """[B, H, Tq, D]."""
    return attention_packed(inputs, _kernel)


@functools.cache
def _missing() -> str | None:
    try:
        module = _module()
    except ImportError as error:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen: {error}"
    if not {"window_size", "scale"} <= inspect.signature(module.varlen_attn).parameters.keys():
        return f"the varlen_attn of torch {torch.__version__} has no window_size"
    return None


def _module() -> ModuleType:
    import torch.nn.attention.varlen as module  # its import registers operators

    return module


def _kernel(call: Packed) -> Tensor:
    sequences = call.sequences
    return _module().varlen_attn(
        call.q, call.k, call.v, sequences.cu_q, sequences.cu_k, sequences.max_q, sequences.max_k,
        scale=call.scale,
        # Both ends count the keys beside the query's own; (-1, 0) is causal without a window.
        window_size=(-1 if call.window is None else call.window - 1, 0),
    )  # fmt: skip
