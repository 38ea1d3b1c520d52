"""Attention on torch's fused scaled-dot-product kernels; the prefix enters as one extra key (sink.py)."""

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from kernels.attention.inputs import AttentionInputs, indices, visible
from kernels.attention.sink import give_back, prefix_summary, sink_of, wide_keys, wide_queries, wide_values

_QUERY_BLOCK = 1024
"""Queries per call where the mask must be spelled out over all keys: bounds the mask, not the attention."""

_Streams = tuple[tuple[Tensor, Tensor], ...]


def attention_sdpa(inputs: AttentionInputs) -> Tensor:
    """[B, H, Tq, D], by fused kernels; memory beyond inputs and output is linear in Tq under a window."""
    scale = inputs.q.shape[-1] ** -0.5
    if inputs.prefix is None:
        return _streams_attention(inputs, inputs.q, inputs.streams, scale, sink=False)
    score, own = prefix_summary(inputs.prefix, scale)
    q = wide_queries(inputs.q, score / scale)
    return give_back(_streams_attention(inputs, q, _with_sink(inputs.streams), scale, sink=True), own)


def _with_sink(streams: _Streams) -> _Streams:
    """Widens the heads and puts the sink at key index 0 of the first stream."""
    (keys, values), *others = ((wide_keys(keys), wide_values(values)) for keys, values in streams)
    shape = (*keys.shape[:2], 1, -1)
    first = (
        torch.cat((sink.expand(shape), x), 2) for sink, x in zip(sink_of(keys, values), (keys, values), strict=True)
    )
    return (tuple(first), *others)


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
