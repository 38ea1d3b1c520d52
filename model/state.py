"""What a model carries from one piece of a sequence to the next: a value, never changed in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from kernels.memory import MemoryState

_Tree = TypeVar("_Tree")


@dataclass(frozen=True)
class AttentionCache:
    """Keys and values that later queries can see: the last window - 1 tokens, the running segment, or everything."""

    k: Tensor
    """[B, c, H, D], rotated to the tokens' absolute positions."""
    v: Tensor
    """[B, c, H, D]."""
    first_valid: Tensor
    """[B] int64: cached tokens with a smaller index belong to what the row held before its reset."""
    context_k: Tensor | None = None
    """mac: keys of the memory's reads h, [B, c, H, D]."""
    context_v: Tensor | None = None
    """mac: values of the memory's reads h, [B, c, H, D]."""


@dataclass(frozen=True)
class MemoryLayerState:
    """A memory layer between two tokens."""

    memory: MemoryState
    """Weights, momentum and the open chunk."""
    tails: tuple[Tensor, ...]
    """The last inputs of the convolutions: queries, keys, values, and for the mac the queries of the reads h;
    [B, width - 1, dim] each, none without convolutions."""
    segment_weights: tuple[Tensor, ...] | None = None
    """mac, inside a segment: the memory's weights at the segment's start, [B, H, d_in, d_out] a layer."""


@dataclass(frozen=True)
class LayerState:
    """One block's state; a part is None where the block lacks it or has seen nothing yet."""

    memory: MemoryLayerState | None = None
    attention: AttentionCache | None = None


@dataclass(frozen=True)
class ModelState:
    """The state of a model: all that the future of a sequence depends on (beside the weights).

    Its size doesn't depend on how many tokens it has seen, but for full attention's cache. Chunks and segments are
    counted from the state's beginning, alike for all rows; positions are each row's own.
    """

    position: Tensor
    """[B] int64: tokens each row has seen since its beginning or reset."""
    layers: tuple[LayerState, ...]
    """One entry per block."""
    restart: Tensor | None = None
    """[B] bool: rows whose memory goes back to W_0 at the next call; there, because only the layer that owns W_0 may
    use it (ZeRO-3 holds parameters together for their own module's forward only)."""

    @classmethod
    def initial(cls, batch_size: int, num_layers: int, device: torch.device | str = "cpu") -> ModelState:
        """The state before the first token."""
        position = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return cls(position, (LayerState(),) * num_layers)

    def detach(self) -> ModelState:
        """The same values, cut from the graph that made them."""
        return self.map(Tensor.detach)

    def clone(self) -> ModelState:
        """A copy that shares no storage; still differentiable."""
        return self.map(Tensor.clone)

    def to(self, device: torch.device | str) -> ModelState:
        """The state on another device."""
        return self.map(lambda tensor: tensor.to(device))

    def map(self, function: Callable[[Tensor], Tensor]) -> ModelState:
        """The state with `function` applied to every tensor, integer ones included."""
        return _map(self, function)

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor with its path, in a fixed order and in its graph: what gradients are asked for or fed to."""
        return _paths(self, "")

    def select_rows(self, rows: Tensor) -> ModelState:
        """The state of a batch of the rows `rows` [n] int64 of this one, in that order; a row may come twice."""
        return self.map(lambda tensor: tensor.index_select(0, rows.to(tensor.device)))

    def reset_rows(self, rows: Tensor) -> ModelState:
        """The state with the rows where `rows` [B] bool is True back at a beginning, the others untouched.

        The batch keeps its grid of chunks and segments: reset at a boundary of both, a row goes on exactly as a new
        sequence; reset inside, its first chunk (and segment) is the rest of the running one.

        Raises:
            ValueError: rows isn't bool [B].
        """
        if rows.dtype != torch.bool or rows.shape != self.position.shape:
            raise ValueError(f"rows is {rows.dtype} {list(rows.shape)}: it must be bool {list(self.position.shape)}")
        return ModelState(
            position=self.position.masked_fill(rows, 0),
            layers=tuple(_reset_layer(layer, rows) for layer in self.layers),
            restart=rows if self.restart is None else self.restart | rows,
        )

    def reset_memory(self) -> ModelState:
        """The state with every row's memory back at W_0, without momentum; attention's cache, the tails of convolutions
        and positions go on.

        At a boundary of chunks and segments the memory goes on as a new sequence's does.
        """
        return replace(self, restart=torch.ones_like(self.position, dtype=torch.bool))

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor under its path, contiguous and detached, as safetensors takes them; see `from_tensors`."""
        return {path: tensor.detach().contiguous().clone() for path, tensor in self.flat().items()}

    def flat(self) -> dict[str, Tensor]:
        """Every tensor under its path, in its graph, and all that `from_tensors` needs beside them."""
        return {**dict(self.named_tensors()), "num_layers": torch.tensor(len(self.layers))}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> ModelState:
        """The state that `tensors()` or `flat()` came from, bit for bit; of the latter, in its graph.

        Raises:
            ValueError: a tensor is missing or none of a state's.
        """
        left = dict(tensors)
        try:
            count = int(left.pop("num_layers"))
            layers = tuple(_layer_from(left, f"layers.{index}.") for index in range(count))
            state = cls(left.pop("position"), layers, left.pop("restart", None))
        except KeyError as error:
            raise ValueError(f"the state's tensors lack {error}: they were cut or come from something else") from error
        if left:
            raise ValueError(f"the state's tensors hold the unknown {sorted(left)[0]!r}: they come from something else")
        return state


_HEAD_AXES = {
    **dict.fromkeys(("weights", "momentum", "segment_weights"), 1),
    **dict.fromkeys(("k", "v", "alpha", "eta", "theta", "tails", "context_k", "context_v"), 2),
    **dict.fromkeys(("position", "restart", "first_valid", "num_layers")),
}


def head_axis(path: str) -> int | None:
    """The axis of a state's tensor along which its heads stand, or, of convolutions' tails, the heads' channels; None
    for what all heads share.

    Raises:
        KeyError: a state has no tensor of that path.
    """
    return _HEAD_AXES[path.rstrip("0123456789").rstrip(".").rsplit(".", 1)[-1]]


def _map(tree: _Tree, function: Callable[[Tensor], Tensor]) -> _Tree:
    """The tree of dataclasses and tuples with `function` applied to its tensors."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, tuple):
        return tuple(_map(item, function) for item in tree)
    if is_dataclass(tree):
        return replace(tree, **{field.name: _map(getattr(tree, field.name), function) for field in fields(tree)})
    return tree


def _paths(tree: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(tree, Tensor):
        yield prefix, tree
    elif isinstance(tree, tuple):
        for index, item in enumerate(tree):
            yield from _paths(item, f"{prefix}.{index}")
    elif is_dataclass(tree):
        for field in fields(tree):
            yield from _paths(getattr(tree, field.name), f"{prefix}.{field.name}" if prefix else field.name)


def _numbered(left: dict[str, Tensor], prefix: str) -> tuple[Tensor, ...]:
    names = (f"{prefix}.{index}" for index in range(len(left)))
    found = []
    for name in names:
        if name not in left:
            break
        found.append(left.pop(name))
    return tuple(found)


def _layer_from(left: dict[str, Tensor], prefix: str) -> LayerState:
    """Takes one layer's tensors out of `left`."""
    memory = attention = None
    if any(name.startswith(f"{prefix}memory.") for name in left):
        inner = f"{prefix}memory.memory."
        tokens = {name: left.pop(inner + name) for name in ("k", "v", "alpha", "eta", "theta")}
        weights, momentum = _numbered(left, f"{inner}weights"), _numbered(left, f"{inner}momentum")
        tails = _numbered(left, f"{prefix}memory.tails")
        start = _numbered(left, f"{prefix}memory.segment_weights") or None
        memory = MemoryLayerState(MemoryState(weights, momentum, **tokens), tails, start)
    if f"{prefix}attention.k" in left:
        required = {name: left.pop(f"{prefix}attention.{name}") for name in ("k", "v", "first_valid")}
        optional = {name: left.pop(f"{prefix}attention.{name}", None) for name in ("context_k", "context_v")}
        attention = AttentionCache(**required, **optional)
    return LayerState(memory, attention)


def _reset_layer(layer: LayerState, rows: Tensor) -> LayerState:
    """All of a row's reset that needs no parameter: convolution tails to zero, cached keys out of sight.

    The keys are cleared as well: a masked key that isn't finite would still spoil its row.
    """
    memory, attention = layer.memory, layer.attention

    def clear(tensor: Tensor) -> Tensor:
        return tensor.masked_fill(rows.view(-1, *(1,) * (tensor.dim() - 1)), 0)

    if memory is not None:
        memory = replace(memory, tails=_map(memory.tails, clear))
    if attention is not None:
        first_valid = attention.first_valid.masked_fill(rows, attention.k.shape[1])
        attention = replace(_map(attention, clear), first_valid=first_valid)
    return LayerState(memory, attention)
