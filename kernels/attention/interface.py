"""The entry to attention: checks the arguments, chooses the backend, never changes the semantics."""

from torch import Tensor

from kernels.attention.choice import choose
from kernels.attention.inputs import Prefix, prepare


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    prefix: Prefix | None = None,
    context: tuple[Tensor, Tensor] | None = None,
    first_valid: Tensor | None = None,
    first_visible: Tensor | None = None,
    backend: str = "auto",
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
        first_visible: [B, Tq] int64; the index of the first key (of k, cache included, and of the context alike) that
            each query may see: where its document begins. Along Tq it must not decrease (not checked: that would wait
            for the device). A value beyond the query's own index counts as the own index: every query sees its own
            key, and the prefix, which belongs to no document. Beside `first_valid` the later of the two holds.
        backend: "flash" (flash-attn), "varlen" (torch's kernels for packed sequences), "flex" (FlexAttention,
            compiled), "sdpa" (torch's scaled-dot-product kernels; masks are made for a block of queries at a time),
            "math" (the plain formula; quadratic), or "auto": on a GPU the first of them that takes the call and agrees
            with the formula there, elsewhere "sdpa". `explain_attention` says which and why. But for "math", memory
            is linear in Tq under a window, and no mask of all pairs is made without one.

    Returns:
        [B, Tq, H, D] in the dtype of q.

    Raises:
        ValueError: a shape that doesn't fit, an unknown backend, or one that does not take the call.
    """
    inputs = prepare(q, k, v, window, prefix, context, first_valid, first_visible)
    return choose(inputs, backend).backend.run(inputs).transpose(1, 2)


def explain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    prefix: Prefix | None = None,
    context: tuple[Tensor, Tensor] | None = None,
    first_valid: Tensor | None = None,
    first_visible: Tensor | None = None,
    backend: str = "auto",
) -> str:
    """Which backend a call of `attention` with these arguments runs on, and why: "sdpa: the first that takes this".

    Then, a line each, the backends that were passed over, and why: "not flash: the tensors are on cpu, ...".

    Raises:
        ValueError: as `attention` does.
    """
    choice = choose(prepare(q, k, v, window, prefix, context, first_valid, first_visible), backend)
    return "\n".join([
        f"{choice.backend.name}: {choice.reason}", *(f"not {name}: {reason}" for name, reason in choice.refused)
    ])  # fmt: skip
