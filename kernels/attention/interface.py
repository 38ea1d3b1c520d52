"""The one entry to attention: checks the arguments and picks a backend."""

from typing import Literal

from torch import Tensor

from kernels.attention.inputs import Prefix, prepare
from kernels.attention.reference import attention_reference
from kernels.attention.sdpa import attention_sdpa

_BACKENDS = {"auto": attention_sdpa, "sdpa": attention_sdpa, "math": attention_reference}
BACKENDS = tuple(_BACKENDS)
"""What `attention` can be told to run on."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    prefix: Prefix | None = None,
    context: tuple[Tensor, Tensor] | None = None,
    first_valid: Tensor | None = None,
    backend: Literal["auto", "sdpa", "math"] = "auto",
) -> Tensor:
    """Causal softmax attention with scale D^-0.5; every argument is differentiable (first order).

    Args:
        q: [B, Tq, H, D], any float dtype.
        k, v: [B, Tk, H, D] with Tk >= Tq; query i stands at key index Tk - Tq + i (the keys before it are a cache).
        window: number of tokens a query sees, its own included; None for all of them.
        prefix: keys every query sees (`Prefix`).
        context: keys and values [B, Tk, H, D] of a second stream under the same mask: the MAC's h_j, j <= i, of Titans
            (arXiv 2501.00663) section 4.1, without the future that the concatenation there would leak.
        first_valid: [B] int64; keys with a smaller index are invisible to that row (it was reset in mid-window).
            Values above Tk - Tq, the first query's own index, count as Tk - Tq.
        backend: "sdpa" (torch's fused kernels; memory linear in Tq under a window), "math" (the plain formula;
            quadratic), or "auto" (sdpa).

    Returns:
        [B, Tq, H, D] in the dtype of q.

    Raises:
        ValueError: a shape that doesn't fit, or an unknown backend.
    """
    if backend not in _BACKENDS:
        raise ValueError(f"backend is {backend!r}: choose one of {', '.join(_BACKENDS)}")
    return _BACKENDS[backend](prepare(q, k, v, window, prefix, context, first_valid)).transpose(1, 2)
