"""Cross-entropy of a linear head, in chunks of tokens: the [tokens, vocabulary] logits never exist as a whole."""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

CHUNK_TOKENS = 1024
"""Default tokens per chunk: at a vocabulary of 32,000 the logits in flight take 131 MB in fp32."""


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of -log p. The gradients come out of forward, where each chunk's logits still exist; backward scales them."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        ignore_index: int,
        chunk_tokens: int,
        with_gradients: bool,
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        # Under no_grad ctx says that parameters need gradients all the same, and grad mode is off in here.
        needs_hidden, needs_weight = (with_gradients and needs for needs in ctx.needs_input_grad[:2])
        total = torch.zeros((), dtype=wide, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        for start in range(0, len(hidden), chunk_tokens):
            part = slice(start, start + chunk_tokens)
            logits, log_sum, kept, index = _chunk(hidden[part], weight, targets[part], ignore_index)
            total += ((log_sum - logits.gather(1, index)) * kept).sum()
            if not (needs_hidden or needs_weight):
                continue
            logits.sub_(log_sum).exp_().scatter_add_(1, index, torch.full_like(log_sum, -1)).mul_(kept)
            slope = logits.to(hidden.dtype)
            if needs_hidden:
                torch.mm(slope, weight, out=grad_hidden[part])
            if needs_weight:
                grad_weight += slope.T @ hidden[part]
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * grad).to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None


def _chunk(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits [n, V], their log-sum-exp [n, 1], 1 where a target counts [n, 1], and targets safe to gather [n, 1]."""
    logits = hidden @ weight.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    kept = (targets != ignore_index)[:, None]
    return logits, logits.logsumexp(1, keepdim=True), kept.to(logits.dtype), targets[:, None].where(kept, 0)


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {list(hidden.shape)} and weight {list(weight.shape)} must be [N, d] and [V, d]")
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype} and weight {weight.dtype}: cast one of them")
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(f"targets are {targets.dtype} {list(targets.shape)}: they must be int64 [{hidden.shape[0]}]")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}: it must be at least 1")


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -100, chunk_tokens: int = CHUNK_TOKENS
) -> Tensor:
    """Sum over counted tokens of -log softmax(hidden @ weight.T)[target]; differentiable in hidden and weight, once.

    Args:
        hidden: [N, d]; weight: [V, d] of the same float dtype. Log-sum-exp and sum are fp32 (float64 for float64).
        targets: [N] int64 in 0..V-1, or `ignore_index` for a token that doesn't count.
        chunk_tokens: tokens whose logits exist at a time.

    Returns:
        A scalar in fp32 (float64 for float64 inputs): the sum in nats, not the mean; 0 when no token counts.

    Raises:
        ValueError: shapes or dtypes that don't fit.
    """
    _check(hidden, weight, targets, chunk_tokens)
    return _LinearCrossEntropy.apply(hidden, weight, targets, ignore_index, chunk_tokens, torch.is_grad_enabled())


@torch.no_grad()
def token_losses(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -100, chunk_tokens: int = CHUNK_TOKENS
) -> Tensor:
    """-log p of each target: [N] fp32 (float64 for float64), 0 where ignored, without gradients; arguments as above."""
    return _score(hidden, weight, targets, ignore_index, chunk_tokens, None)


@torch.no_grad()
def token_scores(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -100, chunk_tokens: int = CHUNK_TOKENS
) -> tuple[Tensor, Tensor]:
    """`token_losses`, and whether each target is the token of the largest logit: [N] bool, False where ignored.

    One of several equal logits is taken, so that a model that prefers nothing is not right everywhere.
    """
    correct = torch.zeros_like(targets, dtype=torch.bool)
    return _score(hidden, weight, targets, ignore_index, chunk_tokens, correct), correct


def _score(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, chunk_tokens: int, correct: Tensor | None
) -> Tensor:
    """Losses [N]; fills `correct` [N] where it is given."""
    _check(hidden, weight, targets, chunk_tokens)
    losses = hidden.new_zeros(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
    for start in range(0, len(hidden), chunk_tokens):
        part = slice(start, start + chunk_tokens)
        logits, log_sum, kept, index = _chunk(hidden[part], weight, targets[part], ignore_index)
        losses[part] = ((log_sum - logits.gather(1, index)) * kept)[:, 0]
        if correct is not None:
            correct[part] = (logits.argmax(1) == targets[part]) & (targets[part] != ignore_index)
    return losses
