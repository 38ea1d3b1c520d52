"""Documents as sequences of a packed call: where in all rows' queries and keys each of them begins and ends."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.attention.inputs import AttentionInputs


@dataclass(frozen=True)
class Sequences:
    """Sequences one after another, as the kernels for packed sequences take them."""

    cu_q: Tensor
    """[n + 1] int32: where each sequence's queries begin, and where the last one's end."""
    cu_k: Tensor
    """[n + 1] int32: the same of keys."""
    max_q: int
    """Queries of the longest."""
    max_k: int
    """Keys of the longest."""


def whole_rows(batch: int, queries: int, keys: int, device: torch.device) -> Sequences:
    """Every row is a sequence."""
    rows = torch.arange(batch + 1, dtype=torch.int32, device=device)
    return Sequences(rows * queries, rows * keys, queries, keys)


def rows_behind(first: Tensor, queries: int, keys: int) -> Sequences:
    """Every row is a sequence whose keys begin at `first` [B, 1]; the keys before are one without queries."""
    rows = torch.arange(len(first) + 1, device=first.device)
    cu_q = torch.stack((rows[:-1], rows[1:]), 1) * queries
    cu_k = torch.stack((rows[:-1] * keys + first[:, 0], rows[1:] * keys), 1)
    return Sequences(*(_with_zero(x.flatten()) for x in (cu_q, cu_k)), queries, keys)


def document_sequences(inputs: AttentionInputs) -> Sequences | None:
    """Every document of every row is a sequence; hidden keys before a row's first one are, too, without queries.

    None where a document's keys reach into the one before, which sequences can't say. Reads the bounds on the host:
    once, for all calls in turn that are given the same tensors.
    """
    return _LAST.get(inputs)


def _read(inputs: AttentionInputs) -> Sequences | None:
    bound, offset = inputs.first_visible.cpu(), inputs.offset
    length, total = bound.shape[1], offset + bound.shape[1]
    begins = torch.ones_like(bound, dtype=torch.bool)
    begins[:, 1:] = bound[:, 1:] != bound[:, :-1]
    rows, queries = begins.nonzero(as_tuple=True)
    keys = bound[rows, queries]
    if not torch.equal(keys[queries > 0], queries[queries > 0] + offset):
        return None
    # A row whose first document begins at its key 0 has an empty sequence before it, which costs nothing.
    firsts = queries == 0
    repeats = 1 + firsts.long()
    cu_q = (rows * length + queries).repeat_interleave(repeats)
    cu_k = (rows * total + keys).repeat_interleave(repeats)
    cu_k[repeats.cumsum(0)[firsts] - 2] -= keys[firsts]
    cu_q, cu_k = (_closed(x, len(bound) * size) for x, size in ((cu_q, length), (cu_k, total)))
    max_q, max_k = (int(x.diff().max()) for x in (cu_q, cu_k))
    return Sequences(cu_q.to(inputs.q.device), cu_k.to(inputs.q.device), max_q, max_k)


def _closed(starts: Tensor, end: int) -> Tensor:
    return torch.cat((starts, starts.new_tensor([end]))).to(torch.int32)


def _with_zero(ends: Tensor) -> Tensor:
    return torch.cat((ends.new_zeros(1), ends)).to(torch.int32)


class _Last:
    """The sequences of the last bounds that were read: all layers of a model are given the same."""

    def __init__(self) -> None:
        # Weak: an id alone may come back as another tensor's.
        self._bounds: list[weakref.ref | None] = []
        self._rest: tuple = ()
        self._sequences: Sequences | None = None

    def get(self, inputs: AttentionInputs) -> Sequences | None:
        given = inputs.given_bounds
        if any(x is not None and x.is_inference() for x in given):  # they don't say when they were changed
            return _read(inputs)
        versions = tuple(None if x is None else x._version for x in given)
        rest = (versions, inputs.offset, inputs.q.shape[2], inputs.q.device)
        known = [None if x is None else x() for x in self._bounds]
        if self._rest != rest or any(a is not b for a, b in zip(known, given, strict=True)):
            self._sequences = _read(inputs)
            self._bounds = [None if x is None else weakref.ref(x) for x in given]
            self._rest = rest
        return self._sequences


_LAST = _Last()
