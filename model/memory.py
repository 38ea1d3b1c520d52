"""The memory layer: projections, gates, the neural memory, output (Titans, arXiv 2501.00663, sections 3.1 and 4.4)."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.memory import MemoryState, explain_backend, memory_read, neural_memory
from model.config import MemoryConfig, ModelConfig
from model.gates import GateProjection, Gates
from model.layers import READ_NORM_EPS, CausalConvolution, HeadNorm, UnitSilu, linear
from model.resets import Resets
from model.state import MemoryLayerState
from model.undrawn import undrawn

Stats = dict[str, Tensor]


def activation_scale(config: MemoryConfig, hidden: int) -> float:
    """What hidden activations are multiplied by, so that unit-norm inputs and N(0, 1) weights give unit-norm features.

    From E[SiLU(z)^2] = 0.3557 and E[GELU(z)^2] = 0.4252 at z ~ N(0, 1), and sum of squares e / h for a softmax over
    many.
    """
    if config.parametrisation == "standard":
        return 1.0
    return {"silu": (0.3557 * hidden) ** -0.5, "gelu": (0.4252 * hidden) ** -0.5, "softmax": (hidden / math.e) ** 0.5}[
        config.activation
    ]


class Write(NamedTuple):
    """What the tokens write: keys and values [B, T, H, D], and their gates."""

    k: Tensor
    v: Tensor
    gates: Gates


class _ArrivingTogether(torch.autograd.Function):
    """The same tensors, whose gradients arrive all at once and in this order, zeros where there are none, whatever the
    tensors were used for.

    ZeRO 2 sums gradients over ranks in the order in which they arrive on each: parameters that came in another order
    on a rank whose documents end elsewhere would be summed with others.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients


class MemoryCore(nn.Module):
    """Owns the learned W_0 and applies the neural memory from it; all uses of W_0 are inside this module's forward."""

    def __init__(self, num_heads: int, head_dim: int, config: MemoryConfig) -> None:
        super().__init__()
        self.config = config
        self.backend = "auto"
        self.own = slice(None)
        """The heads that queries are of, of those that there are initial weights for."""
        hidden = config.expansion * head_dim
        widths = [head_dim, *[hidden] * (config.depth - 1), head_dim]
        self.scale = activation_scale(config, hidden)
        # Registered on this module itself, not in a ParameterList: a list has no forward for ZeRO-3 to gather them at.
        for layer in range(config.depth):
            weight = torch.zeros(num_heads, widths[layer], widths[layer + 1])
            if config.parametrisation == "standard":
                nn.init.normal_(weight, std=widths[layer] ** -0.5)
            elif layer < config.depth - 1:
                nn.init.normal_(weight)
            self.register_parameter(f"initial_{layer}", nn.Parameter(weight))

    def learned(self) -> tuple[Tensor, ...]:
        """W_0, [H, d_in, d_out] a layer."""
        return tuple(getattr(self, f"initial_{layer}") for layer in range(self.config.depth))

    def forward(
        self,
        q: Tensor,
        write: Write | None,
        state: MemoryState | None,
        segment_weights: tuple[Tensor, ...] | None,
        resets: Resets | None,
        with_surprise: bool,
    ) -> tuple[Tensor, MemoryState, tuple[Tensor, ...], Tensor | None]:
        """Reads at q [B, T, H, D]: after each token's write, or, where `write` is None, at the segment's start.

        Args:
            state: None at the beginning of every row.
            segment_weights: where a read without write reads; None for where the state stands.
            resets: where rows start from W_0; at the first token alone for a read without write.

        Returns:
            y [B, T, H, D]; the state; the weights a read without write used; the surprise [B, T, H] if asked for.
        """
        # With the queries, so that W_0 is in the graph of every call, not of those alone in which a row begins anew.
        q, *weights = _ArrivingTogether.apply(q, *self.learned())
        weights = [weight[self.own] for weight in weights]
        rows = {} if resets is None else resets.rows
        if state is None:
            state = MemoryState.initial(weights, q.shape[0], q.dtype)
        elif 0 in rows:
            state = state.reset_rows(rows[0], weights)
            if segment_weights is not None:
                segment_weights = tuple(
                    torch.where(rows[0][:, None, None, None], start.to(now.dtype), now)
                    for start, now in zip(weights, segment_weights, strict=True)
                )
        config = self.config
        if write is None:
            start = state.weights if segment_weights is None else segment_weights
            y = memory_read(q, start, activation=config.activation, activation_scale=self.scale)
            return y, state, start, None
        # From reset to reset. All in one call of this module: ranks, whose documents end elsewhere, would otherwise
        # call it, and so gather its parameters under ZeRO 3, different numbers of times.
        outputs: list[tuple[Tensor, ...]] = []
        edges = [0, *(index for index in rows if index > 0), q.shape[1]]
        for first, last in pairwise(edges):
            if first > 0:
                state = state.reset_rows(rows[first], weights)
            pieces = (x[:, first:last] for x in (q, write.k, write.v, *write.gates))
            y, state, *surprise = neural_memory(
                *pieces, weights, state,
                chunk_size=config.chunk, activation=config.activation, forget_to=config.forget_to,
                objective=config.objective, step_bound=config.bound, activation_scale=self.scale,
                return_surprise=with_surprise, backend=self.backend,
            )  # fmt: skip
            outputs.append((y, *surprise))
        y, *surprise = (parts[0] if len(parts) == 1 else torch.cat(parts, 1) for parts in zip(*outputs, strict=True))
        return y, state, state.weights, surprise[0] if surprise else None


def explain_memory_backend(config: ModelConfig, backend: str, *, device: torch.device, dtype: torch.dtype) -> str:
    """What computes the memories of a model in training, and why: `kernels.memory.explain_backend`.

    Raises:
        ValueError: the backend does not take these memories; the message says why.
    """
    memory, number = config.memory, torch.zeros((), device=device, dtype=dtype)
    core = undrawn(lambda: MemoryCore(1, config.head_dim, memory))
    x = number.expand(1, 1, 1, config.head_dim)
    return explain_backend(
        x, x, x, list(core.parameters()),
        chunk_size=memory.chunk, activation=memory.activation, forget_to=memory.forget_to, objective=memory.objective,
        step_bound=memory.bound, activation_scale=core.scale, backend=backend,
    )  # fmt: skip


def _recomputed(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's result, of which the backward computes again what it needs. Nothing in it is random."""
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def _is_watched(module: nn.Module) -> bool:
    """Whether something of the module's own is called when it is, or when its gradient passes; or in its place."""
    hooks: tuple[Mapping[int, Any], ...] = (
        module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks,
    )  # fmt: skip
    return any(hooks) or "forward" in vars(module)


class Stream(nn.Module):
    """Queries, keys or values of a memory: linear, causal convolution, SiLU, and division by the l2 norm by choice."""

    def __init__(self, dim: int, num_heads: int, width: int, normalize: bool) -> None:
        super().__init__()
        self.project = linear(dim, dim)
        self.to_heads = nn.Identity()
        """Projected tokens pass here before tokens look at each other: a place to go from all heads of some tokens to
        all tokens of some heads."""
        self.convolution = CausalConvolution(dim, width) if width > 1 else None
        self.activation = UnitSilu(num_heads, normalize)

    def forward(self, x: Tensor, tail: Tensor | None, resets: Resets | None) -> tuple[Tensor, Tensor | None]:
        """x [B, T, dim] and the convolution's tail to [B, T, H, D] and the next tail.

        For the backward only the projected tokens are kept, or x alone where the projection may be computed again:
        what follows is cheap to compute again, and would take three times their room, in fp32 more. What is computed
        again is given its weights: those of the forward, whose change before the backward autograd notices.
        """
        weight = None
        if self.convolution is not None and not _is_watched(self.convolution):  # ZeRO 3 brings it when it is called
            weight = self.convolution.weight
        if x.requires_grad and torch.is_grad_enabled() and self._projects_again():
            return _recomputed(self._project_and_shape, x, self.project.weight, weight, tail, resets)
        x = self.to_heads(self.project(x))
        if x.requires_grad and torch.is_grad_enabled():
            return _recomputed(self._shape, x, weight, tail, resets)
        return self._shape(x, weight, tail, resets)

    def _projects_again(self) -> bool:
        """Whether the backward may call the projection a second time.

        Not where hooks would see it twice (ZeRO 3 gathers the weight in them: once more over all ranks), nor where its
        result goes to other ranks on the way, nor where another map has been put in its place, which might draw random
        numbers. And on a CPU alone: what a product more costs, and its room gains, has not been measured elsewhere.
        """
        is_own = type(self.project) is nn.Linear and type(self.to_heads) is nn.Identity
        is_watched = _is_watched(self.project) or _is_watched(self.to_heads)
        return is_own and not is_watched and self.project.weight.device.type == "cpu"

    def _project_and_shape(
        self, x: Tensor, projection: Tensor, weight: Tensor | None, tail: Tensor | None, resets: Resets | None
    ) -> tuple[Tensor, Tensor | None]:
        return self._shape(nn.functional.linear(x, projection), weight, tail, resets)

    def _shape(
        self, x: Tensor, weight: Tensor | None, tail: Tensor | None, resets: Resets | None
    ) -> tuple[Tensor, Tensor | None]:
        if self.convolution is not None:
            x, tail = self.convolution(x, tail, None if resets is None else resets.begins, weight)
        return self.activation(x), tail


class MemoryOutput(nn.Module):
    """Reads to the model's width: normalised per head, gated by a linear of the tokens, projected.

    In the mac and the mag the join does the gating: a second gate here would cost a matrix and add nothing.
    """

    def __init__(self, config: ModelConfig, scale: float) -> None:
        super().__init__()
        self.to_tokens = nn.Identity()
        """Reads pass here: the way back from all tokens of some heads to all heads of some tokens."""
        self.norm = HeadNorm(config.num_heads, config.head_dim, READ_NORM_EPS)
        self.gate = None if config.variant in ("mac", "mag") else linear(config.dim, config.dim)
        self.project = linear(config.dim, config.dim, scale)

    def forward(self, reads: Tensor, x: Tensor) -> Tensor:
        """Reads [B, T, H, D] at tokens x [B, T, dim] to [B, T, dim]."""
        heads = self.norm(self.to_tokens(reads)).flatten(2)
        return self.project(heads if self.gate is None else heads * self.gate(x).sigmoid())


class MemoryLayer(nn.Module):
    """A neural memory on a stream of model-width tokens."""

    def __init__(self, config: ModelConfig, scale: float) -> None:
        super().__init__()
        memory = config.memory
        self.config = memory
        self.entry = nn.Identity()
        """What the layer's maps read passes here, each tensor once: a place to act on all of their gradients."""
        for name, normalize in (("q", True), ("k", True), ("v", memory.normalize_values)):
            self.add_module(name, Stream(config.dim, config.num_heads, memory.convolution, normalize))
        self.gates = GateProjection(config.dim, config.num_heads, memory)
        self.gates_to_heads = nn.Identity()
        """The tokens' gates pass here, as projected tokens pass a stream's `to_heads`."""
        self.core = MemoryCore(config.num_heads, config.head_dim, memory)
        self.output = MemoryOutput(config, scale)

    def forward(
        self,
        x: Tensor,
        state: MemoryLayerState | None,
        resets: Resets | None,
        with_stats: bool,
        *,
        is_at_start: bool = False,
    ) -> tuple[Tensor, MemoryLayerState, Stats]:
        """Writes x [B, T, dim] and reads it back: [B, T, dim], the state, and means over tokens when asked for.

        Tails beyond the first three (the mac's) pass through untouched.

        Args:
            is_at_start: the memory of rows that `resets` has at the first token is at its start already, as
                `read_segment` leaves it.
        """
        tails, x = _tails(state, 3), self.entry(x)
        q, q_tail = self.q(x, tails[0], resets)
        k, k_tail = self.k(x, tails[1], resets)
        v, v_tail = self.v(x, tails[2], resets)
        gates = self.gates_to_heads(self.gates(x))
        old = None if state is None else state.memory
        to_start = None if is_at_start else resets
        reads, memory, _, surprise = self.core(q, Write(k, v, gates), old, None, to_start, with_stats)
        stats = _statistics(gates, surprise, memory) if with_stats else {}
        new_tails = () if q_tail is None else (q_tail, k_tail, v_tail, *tails[3:])
        start = None if state is None else state.segment_weights
        return self.output(reads, x), MemoryLayerState(memory, new_tails, start), stats

    def read_segment(
        self, x: Tensor, state: MemoryLayerState | None, resets: Resets | None
    ) -> tuple[Tensor, MemoryLayerState]:
        """The mac's h_i = M(q_i; W at the segment's start) for x [B, T, dim]: [B, T, dim], in the model's width.

        Queries and output share the layer's own maps, and differ from them in the convolution's tail alone. Rows begin
        anew at the first token or not at all.
        """
        tails, x = _tails(state, 4), self.entry(x)
        q, tail = self.q(x, tails[3], resets)
        old, start = (None, None) if state is None else (state.memory, state.segment_weights)
        reads, memory, start, _ = self.core(q, None, old, start, resets, False)
        if tail is None:
            return self.output(reads, x), MemoryLayerState(memory, (), start)
        zeros = torch.zeros_like(tail)
        new_tails = tuple(zeros if old_tail is None else old_tail for old_tail in tails[:3])
        return self.output(reads, x), MemoryLayerState(memory, (*new_tails, tail), start)


def _tails(state: MemoryLayerState | None, count: int) -> tuple[Tensor | None, ...]:
    """The convolutions' tails, at least `count` entries, None where there is nothing before."""
    tails = () if state is None else state.tails
    return (*tails, *(None,) * (count - len(tails)))


@torch.no_grad()
def _statistics(gates: Gates, surprise: Tensor, memory: MemoryState) -> Stats:
    """Means over rows, tokens and heads, fp32 0-d: gates, surprise, norm of a row's and head's final weights."""
    norm = torch.stack([weight.float().square().sum((-2, -1)) for weight in memory.weights]).sum(0).sqrt()
    named = {**gates._asdict(), "surprise": surprise, "weight_norm": norm}
    return {name: value.float().mean() for name, value in named.items()}


def mean_statistics(parts: Sequence[tuple[int, Stats]]) -> Stats:
    """A layer's statistics over pieces, (length, statistics) in order: means, but of the weights' norm the last."""
    total, last = sum(length for length, _ in parts), parts[-1][1]
    return {
        name: value if name == "weight_norm" else sum(length * stats[name] for length, stats in parts) / total
        for name, value in last.items()
    }


def end_segment(state: MemoryLayerState) -> MemoryLayerState:
    """The state when a segment is full: the next one starts from where the memory then stands."""
    return replace(state, segment_weights=None)
