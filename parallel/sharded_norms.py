"""Norms and the residual stream of tensor ranks, divided by tokens: each rank holds a stretch of every row where all of
them would hold the same (Korthikanti et al., arXiv 2205.05198, section 4.2.2, where it is called sequence parallelism).

Behind a norm the stretches are gathered, for maps that are cut by their outputs; what maps that are cut by their inputs
give is summed and divided in one. Together they move as many bytes as the sums in whose place they stand. Where tokens
look at each other, every rank has all of them, as without. A norm's weight sees a stretch on each rank; its gradient is
the sum over them.

A mac goes by segments: what its attention and memory hand each other there stays whole on every rank. Its residual
stream, what it joins, and its feed-forward are divided.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from model import TitansLM
from model.attention import AttentionLayer
from model.join import Join
from model.memory import MemoryLayer
from model.mixers import AttentionMixer, MacMixer, MagMixer, MemoryMixer
from parallel.collectives import SumGradients, gather, gather_for_parts, share, share_of_sum, sum_gradients
from parallel.mesh import Group
from parallel.sequence_parallel import HEADS, TOKENS, exchange
from parallel.tensor_parallel import RowParallelLinear, TensorParallelJoin, VocabularyEmbedding


def shard_norms_over_tensor_ranks(model: TitansLM, group: Group) -> None:
    """Divide norms and residual stream of a model that `split_over_tensor_ranks` has cut, in place. Its parameters and
    their names stay. From then on it takes rows, or pieces of them, of a multiple of the ranks in tokens alone.
    """
    _give_stretch(model.embedding)
    for block in model.blocks:
        for mixer in block.mixer.modules():
            if isinstance(mixer, AttentionMixer | MemoryMixer | MagMixer):
                _gather_behind(mixer.norm, group, gather_for_parts)
                _take_gathered(mixer)
            elif isinstance(mixer, MacMixer):
                _gather_behind(mixer.norm, group, gather)
        if isinstance(block.mixer, MagMixer | MacMixer):
            block.mixer.join = StretchJoin(block.mixer.join, group, of_whole=isinstance(block.mixer, MacMixer))
        _gather_behind(block.norm, group, gather_for_parts)
        block.feed_forward.entry = nn.Identity()
        _give_stretch(block.feed_forward.down)
    _gather_behind(model.norm, group, gather_for_parts)
    model.head.entry = nn.Identity()


class StretchJoin(nn.Module):
    """A join of this rank's stretch of the tokens. Gates are computed for some channels of all tokens, and go over by
    an all-to-all to all channels of the stretch.

    Args:
        of_whole: whether attention, memory and tokens come whole, alike on all ranks; else as stretches, and the tokens
            gathered for parts.
    """

    def __init__(self, join: Join | TensorParallelJoin, group: Group, *, of_whole: bool) -> None:
        super().__init__()
        self.attention_norm, self.memory_norm = join.attention_norm, join.memory_norm
        self.attention_gate, self.memory_gate = join.attention_gate, join.memory_gate
        self.group, self.of_whole = group, of_whole
        for norm in (self.attention_norm, self.memory_norm):
            _sum_gradient(norm.weight, group)

    def forward(self, y: Tensor, m: Tensor, x: Tensor) -> Tensor:
        """y and m [B, T / ranks or T, dim] and the tokens x [B, T, dim] to [B, T / ranks, dim]."""
        if self.of_whole:
            y, m = (share(part, self.group, TOKENS) for part in (y, m))
            x = sum_gradients(x, self.group)
        y, m = self.attention_norm(y), self.memory_norm(m)
        if self.attention_gate is None:
            return y * m.sigmoid()
        return y * self._gate(self.attention_gate, x) + m * self._gate(self.memory_gate, x)

    def _gate(self, gate: nn.Module, x: Tensor) -> Tensor:
        return exchange(gate(x), self.group, TOKENS, HEADS).sigmoid()


class SumPersistent(SumGradients):
    """`SumGradients` of persistent tokens [N, dim], which are whole on all ranks; tokens [B, T, dim] that were gathered
    for parts pass.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x as it is."""
        return super().forward(x) if x.dim() == 2 else x


def _take_gathered(mixer: nn.Module) -> None:
    """Have a mixer's layers take tokens whose gradients are summed where they were gathered, and give stretches."""
    for layer in mixer.children():
        if isinstance(layer, AttentionLayer):
            layer.entry = SumPersistent(layer.entry.group)
            _give_stretch(layer.output)
        elif isinstance(layer, MemoryLayer):
            layer.entry = nn.Identity()
            _give_stretch(layer.output.project)


def _give_stretch(layer: RowParallelLinear | VocabularyEmbedding) -> None:
    layer.join = _stretch_of_sum


def _stretch_of_sum(x: Tensor, group: Group) -> Tensor:
    return share_of_sum(x, group, TOKENS)


def _gather_behind(norm: nn.Module, group: Group, way: Callable[[Tensor, Group, int], Tensor]) -> None:
    """Have a norm take this rank's stretch, and give all tokens. By a hook: what the norm computes stays its own, and
    may be compiled.
    """
    _sum_gradient(norm.weight, group)

    def gathered(module: nn.Module, arguments: Any, stretch: Tensor) -> Tensor:
        return way(stretch, group, TOKENS)

    norm.register_forward_hook(gathered)


def _sum_gradient(weight: nn.Parameter, group: Group) -> None:
    """Before it is added to `grad`, and before anything that looks at that."""
    weight.register_hook(lambda gradient: group.all_reduce(gradient.clone()))
