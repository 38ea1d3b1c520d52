"""Attention on torch's fused scaled-dot-product kernels.

The prefix enters as ONE extra key, the sink, whose score is the log-sum-exp of the prefix scores: with p its weight in
the softmax and y_p the prefix's own attention output, the result is (output over the other keys) + p * y_p, exactly.
The score reaches the kernel through two extra components of the query and p comes back through an extra component of
the values, so any fused kernel serves and its ordinary backward is exact; merging two calls by their log-sum-exp would
not be, since the fused kernels drop the gradient of the log-sum-exp. The price is a head 8 wider, not twice as wide.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from kernels.attention.inputs import AttentionInputs, Prefix, indices, visible

_EXTRA = 8
"""Components added to a head for the sink: two are used, eight keep a width that fused kernels take."""
_QUERY_BLOCK = 1024
"""Queries per call where the mask must be spelled out over all keys: bounds the mask, not the attention."""

_Streams = tuple[tuple[Tensor, Tensor], ...]


def attention_sdpa(inputs: AttentionInputs) -> Tensor:
    """[B, H, Tq, D], by fused kernels; memory beyond inputs and output is linear in Tq under a window."""
    width, scale = inputs.q.shape[-1], inputs.q.shape[-1] ** -0.5
    if inputs.prefix is None:
        return _streams_attention(inputs, inputs.q, inputs.streams, scale, sink=False)
    score, own = _prefix_summary(inputs.prefix, scale)
    q, streams = _with_sink(inputs.q, inputs.streams, score / scale)
    out = _streams_attention(inputs, q, streams, scale, sink=True)
    return out[..., :width] + out[..., width : width + 1] * own


def _prefix_summary(prefix: Prefix, scale: float) -> tuple[Tensor, Tensor]:
    """The prefix's log-sum-exp [B, H, Tq, 1] (fp32 or better) and its own attention output [B, H, Tq, D]."""
    scores = prefix.q @ prefix.k.mT
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scale
    return scores.logsumexp(-1, keepdim=True), scores.softmax(-1).to(prefix.v.dtype) @ prefix.v


def _with_sink(q: Tensor, streams: _Streams, score: Tensor) -> tuple[Tensor, _Streams]:
    """Widens the heads and puts the sink at key index 0 of the first stream; `score` is before the scale."""
    # bf16 keeps 8 bits of a score: the rest goes into a second component. The gradient all goes through `high`.
    high = score.to(q.dtype)
    low = (score - high).to(q.dtype)
    q = pad(torch.cat((q, high, low), -1), (0, _EXTRA - 2))
    (keys, values), *others = ((pad(keys, (0, _EXTRA)), pad(values, (0, _EXTRA))) for keys, values in streams)
    width = keys.shape[-1] - _EXTRA
    sink_key, sink_value = keys.new_zeros(keys.shape[-1]), values.new_zeros(values.shape[-1])
    sink_key[width : width + 2] = 1
    sink_value[width] = 1
    shape = (*keys.shape[:2], 1, -1)
    first = (torch.cat((sink_key.expand(shape), keys), 2), torch.cat((sink_value.expand(shape), values), 2))
    return q, (first, *others)


def _streams_attention(inputs: AttentionInputs, q: Tensor, streams: _Streams, scale: float, sink: bool) -> Tensor:
    """Attention over streams whose first may start with a sink key; picks the cheapest exact form."""
    length, total = q.shape[2], inputs.offset + q.shape[2]
    plain = len(streams) == 1 and inputs.first_visible is None
    if plain and inputs.window == total and inputs.offset == 0:
        return _full_causal(q, *streams[0], scale, sink)
    if plain and length == 1:
        keys, values = (_select(tensor, total - inputs.window, total, sink) for tensor in streams[0])
        return scaled_dot_product_attention(q, keys, values, scale=scale)
    if inputs.window == total or (inputs.has_documents and inputs.window > _QUERY_BLOCK):
        return _by_blocks(inputs, q, streams, scale, sink)
    # Only the first window of queries can see cached, reset or missing keys; behind it all blocks look alike, but for
    # the documents' beginnings.
    head = _masked(inputs, q, streams, 0, inputs.window, scale, sink)
    if length <= inputs.window:
        return head
    return torch.cat((head, _alike_blocks(inputs, q, streams, scale, sink)), 2)


def _full_causal(q: Tensor, keys: Tensor, values: Tensor, scale: float, sink: bool) -> Tensor:
    """All queries on all keys before them, no mask in memory. The sink gets a query of its own to keep the diagonal."""
    if not sink:
        return scaled_dot_product_attention(q, keys, values, is_causal=True, scale=scale)
    return scaled_dot_product_attention(pad(q, (0, 0, 1, 0)), keys, values, is_causal=True, scale=scale)[:, :, 1:]


def _select(tensor: Tensor, start: int, stop: int, sink: bool) -> Tensor:
    """Keys start..stop-1, with the sink in front when there is one."""
    if not sink:
        return tensor[:, :, start:stop]
    return torch.cat((tensor[:, :, :1], tensor[:, :, start + 1 : stop + 1]), 2)


def _by_blocks(inputs: AttentionInputs, q: Tensor, streams: _Streams, scale: float, sink: bool) -> Tensor:
    """Blocks of queries in turn, each with its mask spelled out, and made again for the backward: kept, the masks of
    all blocks would together be as large as the one that is avoided."""
    length = q.shape[2]
    if length <= _QUERY_BLOCK:
        return _masked(inputs, q, streams, 0, length, scale, sink)
    blocks = [
        checkpoint(
            _masked, inputs, q, streams, start, start + _QUERY_BLOCK, scale, sink,
            use_reentrant=False, preserve_rng_state=False,
        )
        for start in range(0, length, _QUERY_BLOCK)
    ]  # fmt: skip
    return torch.cat(blocks, 2)


def _masked(
    inputs: AttentionInputs, q: Tensor, streams: _Streams, start: int, stop: int, scale: float, sink: bool
) -> Tensor:
    """Queries start..stop-1 on the keys their windows reach, with the mask spelled out."""
    stop = min(stop, q.shape[2])
    first, last = max(0, inputs.offset + start - inputs.window + 1), inputs.offset + stop
    rows, columns = indices(inputs.offset + start, last, q.device), indices(first, last, q.device)
    bound = inputs.first_visible[:, start:stop] if inputs.has_documents else inputs.first_visible
    mask = _joined_mask(visible(rows, columns, inputs.window, bound), len(streams), sink)
    keys, values = _joined([
        [_select(x, first, last, sink and number == 0) for x in pair] for number, pair in enumerate(streams)
    ])  # fmt: skip
    return scaled_dot_product_attention(q[:, :, start:stop], keys, values, attn_mask=mask, scale=scale)


def _joined_mask(mask: Tensor, count: int, sink: bool) -> Tensor:
    """The same mask for each of `count` streams side by side, behind a column for the sink."""
    return torch.cat([pad(mask, (1, 0), value=True) if sink else mask, *[mask] * (count - 1)], -1)


def _joined(parts: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
    """Keys and values of all streams, one after another along the key axis."""
    keys, values = zip(*parts, strict=True)
    return torch.cat(keys, 2), torch.cat(values, 2)


def _alike_blocks(inputs: AttentionInputs, q: Tensor, streams: _Streams, scale: float, sink: bool) -> Tensor:
    """The queries after the first window: blocks of `window` queries on two blocks of keys, folded into the batch."""
    window, batch, heads = inputs.window, q.shape[0], q.shape[1]
    count = -(-(q.shape[2] - window) // window)
    rows, columns = indices(window, 2 * window, q.device), indices(0, 2 * window, q.device)
    bound = _bound_in_blocks(inputs, count) if inputs.has_documents else None
    mask = _joined_mask(visible(rows, columns, window, bound), len(streams), sink)

    def fold(blocks: Tensor) -> Tensor:
        return blocks.transpose(1, 2).flatten(0, 1)

    def keys_of(tensor: Tensor, has_sink: bool) -> Tensor:
        body = tensor[:, :, inputs.offset + has_sink :]
        body = pad(body, (0, 0, 0, (count + 1) * window - body.shape[2])).unflatten(2, (count + 1, window))
        pair = torch.cat((body[:, :, :-1], body[:, :, 1:]), 3)
        if has_sink:
            pair = torch.cat((tensor[:, :, None, :1].expand(-1, -1, count, -1, -1), pair), 3)
        return fold(pair)

    blocks = pad(q[:, :, window:], (0, 0, 0, (count + 1) * window - q.shape[2])).unflatten(2, (count, window))
    keys, values = _joined([[keys_of(x, sink and number == 0) for x in pair] for number, pair in enumerate(streams)])
    out = scaled_dot_product_attention(fold(blocks), keys, values, attn_mask=mask, scale=scale)
    out = out.unflatten(0, (batch, count)).transpose(1, 2)
    return out.reshape(batch, heads, count * window, -1)[:, :, : q.shape[2] - window]


def _bound_in_blocks(inputs: AttentionInputs, count: int) -> Tensor:
    """First visible key of the queries behind the first window, [B * count, window], in the keys of their block."""
    window, length = inputs.window, inputs.q.shape[2]
    bound = pad(inputs.first_visible[:, window:], (0, (count + 1) * window - length)).unflatten(1, (count, window))
    beginnings = inputs.offset + window * indices(0, count, bound.device)
    return (bound - beginnings[:, None]).flatten(0, 1)
