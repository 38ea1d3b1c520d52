"""Floating-point operations of training, counted from the matrix products; the memory's inner updates apart."""

from typing import NamedTuple

from model.config import ModelConfig


class Flops(NamedTuple):
    """Forward and backward for one token, averaged over the sequence. A multiply-add is two operations."""

    model: float
    """Linear maps, attention's scores and values, feed-forward and head."""
    memory: float
    """The neural memory: its reads, the inner forward and backward, and the updates of weights and momentum."""

    @property
    def total(self) -> float:
        """All of them."""
        return self.model + self.memory


def flops_per_token(config: ModelConfig, context: int) -> Flops:
    """Operations per token when training on sequences of `context` tokens.

    Backward counts twice the forward. Masked pairs of tokens don't count, nor do recomputed activations, norms, gates,
    convolutions and embeddings' look-ups.

    Raises:
        ValueError: context is less than a token.
    """
    if context < 1:
        raise ValueError(f"context is {context}: it must be at least one token")
    per_layer = _linear_maps(config) + _attention(config, context)
    layers = 3.0 * config.num_layers * per_layer
    return Flops(model=layers + head_flops(config), memory=3.0 * config.num_layers * _memory(config, context))


def head_flops(config: ModelConfig) -> float:
    """The head's share in them."""
    return 3.0 * 2 * config.dim * config.vocab_size


def _linear_maps(config: ModelConfig) -> float:
    square, feed_forward = config.dim**2, 3 * config.dim * config.ffn_dim
    attention = 4 if config.has_attention else 0
    memory = 0 if config.memory is None else 4 + (config.variant not in ("mac", "mag"))
    join = 2 if config.variant in ("mac", "mag") and config.join == "sum" else 0
    # The mac reads h besides: its queries and output map, and its keys and values for the attention.
    reads = 4 if config.variant == "mac" else 0
    return 2.0 * ((attention + memory + join + reads) * square + feed_forward)


def _attention(config: ModelConfig, context: int) -> float:
    if not config.has_attention:
        return 0.0
    if config.variant == "mac":
        keys = 2 * _mean_visible(config.segment, context, restarts=True)
    else:
        keys = _mean_visible(config.window or context, context, restarts=False)
    return 4.0 * config.dim * (keys + config.num_persistent)


def _mean_visible(span: int, context: int, restarts: bool) -> float:
    """Mean number of tokens in sight, the token's own included, over a sequence of `context` tokens.

    Args:
        restarts: a segment of `span` tokens starts afresh; a window of `span` slides.
    """
    if context <= span:
        return (context + 1) / 2
    ramp = span * (span + 1) / 2
    if not restarts:
        return (ramp + (context - span) * span) / context
    segments, rest = divmod(context, span)
    return (segments * ramp + rest * (rest + 1) / 2) / context


def _memory(config: ModelConfig, context: int) -> float:
    """Forward of the chunked dual form (inner forward, inner backward, reads, products in the chunk, end of chunk)."""
    memory = config.memory
    if memory is None:
        return 0.0
    head, hidden = config.head_dim, memory.expansion * config.head_dim
    widths = [head, *[hidden] * (memory.depth - 1), head]
    layers = list(zip(widths, widths[1:], strict=False))
    weights = sum(fan_in * fan_out for fan_in, fan_out in layers)
    inner_backward = weights - layers[0][0] * layers[0][1]
    carried = 2 if memory.momentum else 1
    pairs = _mean_visible(memory.chunk, context, restarts=True) * sum(fan_in + fan_out for fan_in, fan_out in layers)
    own_reads = weights if config.variant == "mac" else 0
    per_head = weights + inner_backward + carried * weights + pairs + carried * weights + own_reads
    return 2.0 * config.num_heads * per_head
