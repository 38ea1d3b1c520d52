"""The persistent prefix as ONE extra key, the sink.

Its score is the log-sum-exp of the prefix scores: with p its weight in the softmax and y_p the prefix's own attention
output, the result is (output over the other keys) + p * y_p, exactly. The score reaches a kernel through two extra
components of the query and p comes back through an extra component of the values, so any fused kernel serves and its
ordinary backward is exact; merging two calls by their log-sum-exp is not, where a kernel drops the gradient of the
log-sum-exp. The price is a head `EXTRA` wider, not twice as wide.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels.attention.inputs import Prefix

EXTRA = 8
"""Components added to a head for the sink: three are used, eight keep a width that fused kernels take."""
_HIDDEN = -(2.0**15)
"""Component of a key that must not be seen: times the scale it is far below every score; fp16 can hold it."""


def prefix_summary(prefix: Prefix, scale: float) -> tuple[Tensor, Tensor]:
    """The prefix's log-sum-exp [B, H, Tq, 1] (fp32 or better) and its own attention output [B, H, Tq, D]."""
    scores = prefix.q @ prefix.k.mT
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scale
    return scores.logsumexp(-1, keepdim=True), scores.softmax(-1).to(prefix.v.dtype) @ prefix.v


def wide_queries(q: Tensor, score: Tensor) -> Tensor:
    """Queries [..., D + EXTRA] that give the sink its score [..., 1], which is before the scale."""
    # bf16 keeps 8 bits of a score: the rest goes into a second component. The gradient all goes through `high`.
    high = score.to(q.dtype)
    low = (score - high).to(q.dtype)
    return pad(torch.cat((q, high, low, torch.ones_like(high)), -1), (0, EXTRA - 3))


def wide_keys(keys: Tensor, hidden: Tensor | None = None) -> Tensor:
    """Keys [..., D + EXTRA]; those where `hidden` [..., 1] is True get a weight of exactly 0."""
    wide = pad(keys, (0, EXTRA))
    if hidden is None:
        return wide
    column = torch.zeros_like(hidden, dtype=keys.dtype).masked_fill(hidden, _HIDDEN)
    return wide + pad(column, (keys.shape[-1] + 2, EXTRA - 3))


def wide_values(values: Tensor) -> Tensor:
    """Values [..., D + EXTRA]."""
    return pad(values, (0, EXTRA))


def sink_of(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Key and value [D + EXTRA] of the sink, for widened keys and values."""
    width = keys.shape[-1] - EXTRA
    key, value = keys.new_zeros(keys.shape[-1]), values.new_zeros(values.shape[-1])
    key[width : width + 2] = 1
    value[width] = 1
    return key, value


def give_back(out: Tensor, own: Tensor) -> Tensor:
    """The result [..., D] from a widened output and the prefix's own [..., D]."""
    width = own.shape[-1]
    return out[..., :width] + out[..., width : width + 1] * own
