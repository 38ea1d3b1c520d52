"""Attention by kernels for packed sequences, flash-attn's and torch's: what they take, and how a call becomes theirs.

They know sequences one after another, causal (aligned at the end where there are fewer queries than keys) and in a
window. The rest is laid out so that this suffices, and so that their ordinary backward is exact:

- A row that was reset: its hidden keys become a sequence without queries; documents become sequences of their own.
- The prefix is one extra key, the sink (sink.py). Without a window it stands before a row's first key. In a window of
  W tokens a sink stands before every W-th key: any W + 1 places in a row then hold W tokens and one sink, so a window
  of W + 1 shows each query its own W tokens and the prefix once. A place of a sink among the queries is an idle query.
  Hidden keys are told by a component of theirs, since a sequence that began behind them could begin behind its sink.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels.attention.documents import Sequences, document_sequences, rows_behind, whole_rows
from kernels.attention.inputs import AttentionInputs
from kernels.attention.problem import Problem
from kernels.attention.sink import EXTRA, give_back, prefix_summary, sink_of, wide_keys, wide_queries, wide_values

MAX_WIDTH = 256
DTYPES = (torch.float16, torch.bfloat16)
FIRST_CAPABILITY = (8, 0)


class Packed(NamedTuple):
    """One call of a kernel for packed sequences."""

    q: Tensor
    """[Nq, H, D]: all sequences' queries, one sequence after another."""
    k: Tensor
    """[Nk, H, D]."""
    v: Tensor
    """[Nk, H, D]."""
    sequences: Sequences
    window: int | None
    """Keys that a query sees, its own included; None for all before it."""
    scale: float


Kernel = Callable[[Packed], Tensor]
"""From a packed call to its output [Nq, H, D]."""


def refusal(problem: Problem) -> str | None:
    """Why kernels for packed sequences do not take a problem; None if they do."""
    if problem.has_context:
        return "there is a second stream of keys (the MAC's), for which the kernels have no mask"
    if problem.has_prefix and problem.bound == "query":
        return "there are documents and a prefix, which every document would need for itself"
    return hardware_refusal(problem)


def hardware_refusal(problem: Problem) -> str | None:
    """Why the kernels do not run on a device with such tensors; None if they do."""
    if problem.device.type != "cuda":
        return f"the tensors are on {problem.device.type}, the kernels run on a GPU"
    if problem.dtype not in DTYPES:
        found = "of several dtypes" if problem.dtype is None else f"{problem.dtype}"
        return f"the tensors are {found}, the kernels take float16 and bfloat16"
    width = problem.head_dim + (EXTRA if problem.has_prefix else 0)
    if width % 8 or width > MAX_WIDTH:
        wide = f", {width} with the prefix" if problem.has_prefix else ""
        return f"a head has {problem.head_dim} dimensions{wide}; the kernels take multiples of 8 up to {MAX_WIDTH}"
    if torch.version.hip is None:
        capability = torch.cuda.get_device_capability(problem.device)
        if capability < FIRST_CAPABILITY:
            return f"the GPU has compute capability {capability}, the kernels need {FIRST_CAPABILITY} or later"
    return None


def misfit(inputs: AttentionInputs) -> str | None:
    """Why the values of a call's bounds can't be sequences; None if they can."""
    if inputs.has_documents and document_sequences(inputs) is None:
        return "documents overlap: a query's first key is neither the one before's nor its own"
    return None


def attention_packed(inputs: AttentionInputs, kernel: Kernel) -> Tensor:
    """[B, H, Tq, D] by a kernel for packed sequences; memory is linear in Tq."""
    start = 0 if inputs.has_documents else max(0, inputs.offset - inputs.window + 1)
    q, keys, values = (x.transpose(1, 2) for x in (inputs.q, *inputs.streams[0]))
    keys, values = keys[:, start:], values[:, start:]
    first = inputs.first_visible
    first = first if first is None or inputs.has_documents else (first - start).clamp(min=0)
    window = inputs.window if inputs.window < keys.shape[1] else None
    if inputs.prefix is not None:
        return _with_prefix(inputs, q, keys, values, first, window, kernel)
    batch, queries, total = q.shape[0], q.shape[1], keys.shape[1]
    if inputs.has_documents:
        sequences = document_sequences(inputs)
    elif first is not None:
        sequences = rows_behind(first, queries, total)
    else:
        sequences = whole_rows(batch, queries, total, q.device)
    return _run(kernel, q, keys, values, sequences, window, q.shape[-1] ** -0.5).transpose(1, 2)


def _with_prefix(
    inputs: AttentionInputs,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    first: Tensor | None,
    window: int | None,
    kernel: Kernel,
) -> Tensor:
    """[B, H, Tq, D] from q [B, Tq, H, D] and keys and values [B, Tk, H, D]."""
    batch, queries, total = q.shape[0], q.shape[1], keys.shape[1]
    scale = q.shape[-1] ** -0.5
    score, own = (x.transpose(1, 2) for x in prefix_summary(inputs.prefix, scale))
    hidden = None
    if first is not None:
        hidden = (torch.arange(total, device=q.device) < first)[:, :, None, None]
    q, keys, values = wide_queries(q, score / scale), wide_keys(keys, hidden), wide_values(values)
    sink_key, sink_value = sink_of(keys, values)
    if window is None:
        keys, values = _in_front(sink_key, keys), _in_front(sink_value, values)
        sequences = whole_rows(batch, queries, total + 1, q.device)
        return give_back(_run(kernel, q, keys, values, sequences, None, scale), own).transpose(1, 2)
    keys, values = _spread(sink_key, keys, window, 0), _spread(sink_value, values, window, 0)
    phase = (total - queries) % window
    # The first query's place holds a token; what stands before it in its block does not exist.
    before = phase + 1
    spread = _spread(q.new_zeros(q.shape[-1]), q, window, phase)[:, before:]
    sequences = whole_rows(batch, spread.shape[1], keys.shape[1], q.device)
    out = _run(kernel, spread, keys, values, sequences, window + 1, scale)
    return give_back(_gathered(out, window, before, queries), own).transpose(1, 2)


def _run(
    kernel: Kernel, q: Tensor, keys: Tensor, values: Tensor, sequences: Sequences, window: int | None, scale: float
) -> Tensor:
    """[B, Tq, H, D], of rows laid one after another."""
    flat = (x.flatten(0, 1).contiguous() for x in (q, keys, values))
    return kernel(Packed(*flat, sequences, window, scale)).unflatten(0, q.shape[:2])


def _in_front(sink: Tensor, x: Tensor) -> Tensor:
    """x [B, T, H, E] behind a sink [E]."""
    return torch.cat((sink.expand(x.shape[0], 1, x.shape[2], -1), x), 1)


def _spread(sink: Tensor, x: Tensor, window: int, phase: int) -> Tensor:
    """x [B, T, H, E] with a sink [E] before every element whose index + phase is a multiple of the window.

    Before it stand, `phase` of them and a sink, the places of the elements that would fill its first block; behind its
    last element stands nothing.
    """
    batch, length, heads, width = x.shape
    count = -(-(phase + length) // window)
    missing = count * window - phase - length
    blocks = pad(x, (0, 0, 0, 0, phase, missing)).unflatten(1, (count, window))
    blocks = torch.cat((sink.expand(batch, count, 1, heads, width), blocks), 2).flatten(1, 2)
    return blocks[:, : blocks.shape[1] - missing]


def _gathered(x: Tensor, window: int, before: int, length: int) -> Tensor:
    """The elements of `_spread` without sinks, where the first `before` places were left out: [B, length, H, E]."""
    places = before + x.shape[1]
    count = -(-places // (window + 1))
    blocks = pad(x, (0, 0, 0, 0, before, count * (window + 1) - places)).unflatten(1, (count, window + 1))
    return blocks[:, :, 1:].flatten(1, 2)[:, before - 1 : before - 1 + length]
