"""Cross-entropy of a linear head, in chunks of tokens: the [tokens, vocabulary] logits never exist as a whole.

The head's weight may be held in parts by several who all call with the same tokens (`VocabularyPart`): each works on
the logits of its own part of the vocabulary, and what comes back is of the whole.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from kernels.closed_form import differentiable_once

CHUNK_TOKENS = 1024
"""Default tokens per chunk: at a vocabulary of 32,000 the logits in flight take 131 MB in fp32."""


@dataclass(frozen=True)
class VocabularyPart:
    """Which rows of a head's weight are the ones given, and how numbers of all parts are brought together."""

    start: int
    """The token of the first row."""

    maximum: Callable[[Tensor], Tensor]
    """A tensor's largest over all parts, element by element."""

    total: Callable[[Tensor], Tensor]
    """Its sum over all parts."""


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
        vocabulary: VocabularyPart | None,
        with_gradients: bool,
        *origins: Tensor,
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        # Under no_grad ctx says that parameters need gradients all the same, and grad mode is off in here.
        needs_hidden, needs_weight = (with_gradients and needs for needs in ctx.needs_input_grad[:2])
        total = torch.zeros((), dtype=wide, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        for start in range(0, len(hidden), chunk_tokens):
            part = slice(start, start + chunk_tokens)
            logits, losses, log_sum, kept, index, own = _chunk(
                hidden[part], weight, targets[part], ignore_index, vocabulary
            )
            total += losses.sum()
            if not (needs_hidden or needs_weight):
                continue
            logits.sub_(log_sum).exp_().scatter_add_(1, index, -own).mul_(kept)
            slope = logits.to(hidden.dtype)
            if needs_hidden:
                torch.mm(slope, weight, out=grad_hidden[part])
            if needs_weight:
                grad_weight += slope.T @ hidden[part]
        ctx.save_for_backward(grad_hidden, grad_weight, *origins)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @differentiable_once("take torch.nn.functional.cross_entropy of the logits, hidden @ weight.T")
    def backward(ctx: FunctionCtx, saved: tuple[Tensor | None, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, *_ = saved
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * grad).to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, *(None,) * 7


def _chunk(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, vocabulary: VocabularyPart | None
) -> tuple[Tensor, ...]:
    """Logits [n, V] of the rows given, and, [n, 1] each: losses, 0 for targets that don't count; the log-sum-exp of all
    logits; 1 where a target counts; the target's row, 0 where it is none of these; 1 where it is one of them.
    """
    logits = hidden @ weight.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    kept = (targets != ignore_index)[:, None]
    index = targets[:, None].where(kept, 0)
    if vocabulary is None:
        log_sum, own = logits.logsumexp(1, keepdim=True), torch.ones_like(kept)
        target = logits.gather(1, index)
    else:
        index = index - vocabulary.start
        own = (index >= 0) & (index < len(weight))
        index = index.where(own, 0)
        largest = vocabulary.maximum(logits.amax(1, keepdim=True))
        sums = torch.cat(((logits - largest).exp().sum(1, keepdim=True), logits.gather(1, index).where(own, 0)), 1)
        exponentials, target = vocabulary.total(sums).split(1, 1)
        log_sum = largest + exponentials.log()
    kept = kept.to(logits.dtype)
    return logits, (log_sum - target) * kept, log_sum, kept, index, own.to(logits.dtype)


def _most_likely(logits: Tensor, vocabulary: VocabularyPart | None) -> Tensor:
    """The token of the largest of all logits: [n] int64."""
    if vocabulary is None:
        return logits.argmax(1)
    value, token = logits.max(1)
    is_largest = value == vocabulary.maximum(value.clone())
    # The lowest of the parts' candidates; largest of what is counted down from 0.
    return -vocabulary.maximum((-(token + vocabulary.start)).where(is_largest, torch.iinfo(token.dtype).min))


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
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    chunk_tokens: int = CHUNK_TOKENS,
    vocabulary: VocabularyPart | None = None,
) -> Tensor:
    """Sum over counted tokens of -log softmax(hidden @ weight.T)[target]; differentiable in hidden and weight, once.

    Args:
        hidden: [N, d]; weight: [V, d] of the same float dtype. Log-sum-exp and sum are fp32 (float64 for float64).
        targets: [N] int64 in 0..V-1, or `ignore_index` for a token that doesn't count.
        chunk_tokens: tokens whose logits exist at a time.
        vocabulary: `weight` is a part of the head's; None: it is the whole. The gradient in hidden is what this part
            gives to it: their sum over all parts is the whole.

    Returns:
        A scalar in fp32 (float64 for float64 inputs): the sum in nats, not the mean; 0 when no token counts.

    Raises:
        ValueError: shapes or dtypes that don't fit.
    """
    _check(hidden, weight, targets, chunk_tokens)
    # What the backward keeps is gradients, not the inputs that they depend on: for these stand empty pieces of them.
    origins = (hidden[:0].clone(), weight[:0].clone())
    return _LinearCrossEntropy.apply(
        hidden, weight, targets, ignore_index, chunk_tokens, vocabulary, torch.is_grad_enabled(), *origins
    )


@torch.no_grad()
def token_losses(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    chunk_tokens: int = CHUNK_TOKENS,
    vocabulary: VocabularyPart | None = None,
) -> Tensor:
    """-log p of each target: [N] fp32 (float64 for float64), 0 where ignored, without gradients; arguments as above."""
    return _score(hidden, weight, targets, ignore_index, chunk_tokens, vocabulary, None)


@torch.no_grad()
def token_scores(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    chunk_tokens: int = CHUNK_TOKENS,
    vocabulary: VocabularyPart | None = None,
) -> tuple[Tensor, Tensor]:
    """`token_losses`, and whether each target is the token of the largest logit: [N] bool, False where ignored.

    One of several equal logits is taken, so that a model that prefers nothing is not right everywhere.
    """
    correct = torch.zeros_like(targets, dtype=torch.bool)
    return _score(hidden, weight, targets, ignore_index, chunk_tokens, vocabulary, correct), correct


def _score(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    chunk_tokens: int,
    vocabulary: VocabularyPart | None,
    correct: Tensor | None,
) -> Tensor:
    """Losses [N]; fills `correct` [N] where it is given."""
    _check(hidden, weight, targets, chunk_tokens)
    losses = hidden.new_zeros(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
    for start in range(0, len(hidden), chunk_tokens):
        part = slice(start, start + chunk_tokens)
        logits, of_part, *_ = _chunk(hidden[part], weight, targets[part], ignore_index, vocabulary)
        losses[part] = of_part[:, 0]
        if correct is not None:
            likely = _most_likely(logits, vocabulary)
            correct[part] = (likely == targets[part]) & (targets[part] != ignore_index)
    return losses
