"""Tensor parallelism: every layer of a model shared by ranks that read the same tokens.

Heads of attention and memory, columns of the feed-forward and rows of the vocabulary are divided; maps from the model's
width are cut by their outputs, maps back to it by their inputs, and their results summed (Megatron-LM, arXiv
1909.08053). Between them stand activations that are alike on all ranks: the residual stream and what is normalised of
it. Memories are separate for every head, and so are their gates, convolutions, states and learned beginnings.

A block talks twice for each of its mixers and its feed-forward: a sum forward, a sum of gradients backward.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from kernels.cross_entropy import VocabularyPart, linear_cross_entropy
from model import TitansLM
from model.attention import AttentionLayer
from model.gates import GateProjection
from model.join import Join
from model.language_model import LMHead
from model.layers import SwiGLU
from model.memory import MemoryLayer
from parallel.collectives import SumGradients, gather, share, sum_gradients, sum_over
from parallel.mesh import Group
from parallel.slices import Slice, mark


def split_over_tensor_ranks(model: TitansLM, group: Group) -> None:
    """Make of a whole model, in place, this rank's part of it. Parameters keep their names, and carry their `Slice`.

    Raises:
        ValueError: heads, feed-forward or vocabulary do not divide (`parallel.layout_rules` says so of a recipe).
    """
    for module in list(model.modules()):
        if isinstance(module, AttentionLayer):
            _split_attention(module, group)
        elif isinstance(module, MemoryLayer):
            _split_memory(module, group)
        elif isinstance(module, SwiGLU):
            _split_feed_forward(module, group)
    for block in model.blocks:
        _split_join(block.mixer, group)
    _cut(model.embedding, "weight", group, 0)
    model.embedding = VocabularyEmbedding(model.embedding.weight, group)
    if not model.config.tie_embeddings:
        _cut(model.head, "weight", group, 0)
    weight = model.embedding.weight if model.config.tie_embeddings else model.head.weight
    model.head = VocabularyHead(weight, group)


class RowParallelLinear(nn.Linear):
    """A linear map of which each rank holds the part of some inputs [out, in / ranks]: from these to the sum of all
    ranks' results, alike on all of them (or what else `join` makes of the results).
    """

    def __init__(self, weight: nn.Parameter, group: Group) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight = weight
        self.group = group
        self.join = sum_over

    def forward(self, x: Tensor) -> Tensor:
        """[..., in / ranks] to [..., out]."""
        return self.join(linear(x, self.weight), self.group)


class VocabularyEmbedding(nn.Module):
    """An embedding of which each rank holds some tokens' rows [V / ranks, dim]."""

    def __init__(self, weight: nn.Parameter, group: Group) -> None:
        super().__init__()
        self.weight = weight
        self.group = group
        self.join = sum_over

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, T] to [B, T, dim], alike on all ranks (or what else `join` makes of the ranks' rows)."""
        rows = tokens - self.group.index * len(self.weight)
        elsewhere = (rows < 0) | (rows >= len(self.weight))
        own = embedding(rows.masked_fill(elsewhere, 0), self.weight)
        return self.join(own.masked_fill(elsewhere[..., None], 0), self.group)


class VocabularyHead(LMHead):
    """A head of which each rank holds some tokens' rows [V / ranks, dim]."""

    def __init__(self, weight: nn.Parameter, group: Group) -> None:
        super().__init__(weight)
        self.group = group
        self.entry = SumGradients(group)

    def forward(self, x: Tensor, targets: Tensor | None, score: Callable[..., Any] = linear_cross_entropy) -> Any:
        """As of the whole head; losses, scores and logits are alike on all ranks."""
        x = self.entry(x)
        if targets is None:
            return gather(linear(x, self.weight), self.group)
        part = VocabularyPart(
            start=self.group.index * len(self.weight),
            maximum=partial(self.group.all_reduce, op=dist.ReduceOp.MAX),
            total=self.group.all_reduce,
        )
        return score(x.flatten(0, 1), self.weight, targets.flatten(), vocabulary=part)


class TensorParallelJoin(nn.Module):
    """A gated join whose gates are cut by their outputs: each rank joins some channels of attention and memory, which
    are normalised over all.
    """

    def __init__(self, join: Join, group: Group) -> None:
        super().__init__()
        self.attention_norm, self.memory_norm = join.attention_norm, join.memory_norm
        self.attention_gate, self.memory_gate = join.attention_gate, join.memory_gate
        self.group = group

    def forward(self, y: Tensor, m: Tensor, x: Tensor) -> Tensor:
        """y, m and the tokens x, [B, T, dim] each, to [B, T, dim], all alike on all ranks."""
        y, m = (share(part, self.group) for part in (self.attention_norm(y), self.memory_norm(m)))
        x = sum_gradients(x, self.group)
        return gather(y * self.attention_gate(x).sigmoid() + m * self.memory_gate(x).sigmoid(), self.group)


def _split_attention(layer: AttentionLayer, group: Group) -> None:
    layer.entry = SumGradients(group)
    for maps in (layer.q, layer.k, layer.v):
        _cut_outputs(maps, group)
    layer.output = _cut_inputs(layer.output, group)
    layer.num_heads //= group.size


def _split_memory(layer: MemoryLayer, group: Group) -> None:
    layer.entry = SumGradients(group)
    for stream in (layer.q, layer.k, layer.v):
        _cut_outputs(stream.project, group)
        if stream.convolution is not None:
            _cut(stream.convolution, "weight", group, 1)
        stream.activation.num_heads //= group.size
    _split_gates(layer.gates, group)
    for name, _ in list(layer.core.named_parameters()):
        _cut(layer.core, name, group, 0)
    _cut(layer.output.norm, "weight", group, 0)
    if layer.output.gate is not None:
        _cut_outputs(layer.output.gate, group)
    layer.output.project = _cut_inputs(layer.output.project, group)


def _split_gates(gates: GateProjection, group: Group) -> None:
    for name in ("weight", "bias"):
        _cut(gates, name, group, 0, stretches=len(gates.offsets))  # one behind the other, each for every head
    gates.num_heads //= group.size


def _split_feed_forward(layer: SwiGLU, group: Group) -> None:
    layer.entry = SumGradients(group)
    _cut_outputs(layer.gate, group)
    _cut_outputs(layer.up, group)
    layer.down = _cut_inputs(layer.down, group)


def _split_join(mixer: nn.Module, group: Group) -> None:
    """Where it joins by gates; the paper's product has nothing to cut."""
    join = getattr(mixer, "join", None)
    if isinstance(join, Join) and join.attention_gate is not None:
        _cut_outputs(join.attention_gate, group)
        _cut_outputs(join.memory_gate, group)
        mixer.join = TensorParallelJoin(join, group)


def _cut_outputs(layer: nn.Linear, group: Group) -> None:
    _cut(layer, "weight", group, 0)
    layer.out_features //= group.size


def _cut_inputs(layer: nn.Linear, group: Group) -> RowParallelLinear:
    _cut(layer, "weight", group, 1)
    return RowParallelLinear(layer.weight, group)


def _cut(module: nn.Module, name: str, group: Group, axis: int, *, stretches: int = 1) -> None:
    """Replace a parameter by this rank's slice of it."""
    part = Slice(axis, group.index, group.size, stretches)
    with torch.no_grad():
        parameter = nn.Parameter(part.of(getattr(module, name)).clone())
    mark(parameter, part)
    # DeepSpeed counts its norm on every tensor rank, and that of all others on one.
    parameter.model_parallel = parameter.tensor_model_parallel = True
    setattr(module, name, parameter)
