"""Sampling from a model, a token at a time, on its state."""

import math
from collections.abc import Iterator
from functools import partial
from typing import TypedDict, Unpack

import torch
from torch import Tensor

from model.language_model import TitansLM
from model.state import ModelState

MIN_TEMPERATURE = 1e-5
"""Of those above 0: logits divided by less overflow."""
PREFILL_TOKENS = 1024
"""Tokens of a prompt that are read at a time: bounds the activations of a long one."""


class SamplingOptions(TypedDict, total=False):
    """What `generate` and `TokenStream` may be told beside the prompt and the length."""

    temperature: float
    """Divides the logits (default 1.0); 0 takes the likeliest token."""
    top_k: int | None
    """Sample among the k likeliest tokens only."""
    top_p: float | None
    """Sample among the fewest tokens whose probability reaches p."""
    generator: torch.Generator | None
    """Source of randomness, on the model's device; None for torch's global one."""
    state: ModelState | None
    """What the model has read before the prompt."""
    stop_token: int | None
    """Ends a row, whose remaining tokens repeat it; generation ends when all rows have."""


def generate(model: TitansLM, tokens: Tensor, *, max_new_tokens: int, **options: Unpack[SamplingOptions]) -> Tensor:
    """Continues each row of a prompt.

    Args:
        tokens: [B, T] int64, T >= 1: what the model reads first, after what `state` has seen.
        max_new_tokens: length of the continuation, at least 1.
        options: those of `SamplingOptions`.

    Returns:
        [B, n] int64, the new tokens alone, n <= max_new_tokens.

    Raises:
        ValueError: an option out of its range.
        FloatingPointError: logits that are no finite numbers, of which nothing can be chosen.
    """
    stream = TokenStream(model, tokens, max_new_tokens=max_new_tokens, **options)
    made = torch.stack(list(stream), dim=1)
    if not bool(stream.finite.all()):
        rows = (~stream.finite).nonzero()[:, 0].tolist()
        raise FloatingPointError(f"the model's logits are not finite in rows {rows}")
    return made


class TokenStream(Iterator[Tensor]):
    """`generate`, giving each new token [B] as soon as it is chosen.

    Attributes:
        state: what the model has read so far: every token but the one that was chosen last. None before the first.
        finite: [B] bool, whether all logits that a row's tokens were chosen by were finite numbers. A token behind
            others is chosen as if all were as likely, and means nothing.
    """

    def __init__(
        self,
        model: TitansLM,
        tokens: Tensor,
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        state: ModelState | None = None,
        stop_token: int | None = None,
    ) -> None:
        """Arguments and errors are those of `generate`; options are checked here, before anything runs."""
        _check(max_new_tokens, temperature, top_k, top_p)
        self.state = state
        self.finite = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
        self._model, self._unread = model, tokens
        self._left, self._stop_token = max_new_tokens, stop_token
        self._stopped = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        self._choose = partial(_choose, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)

    @torch.no_grad()
    def __next__(self) -> Tensor:
        if self._left == 0 or (self._stop_token is not None and bool(self._stopped.all())):
            raise StopIteration
        self._left -= 1
        for piece in self._unread.split(PREFILL_TOKENS, dim=1):
            output = self._model(piece, self.state, num_logits=1)
            self.state = output.state
        logits = output.logits[:, -1].float()
        finite = logits.isfinite().all(-1)
        self.finite &= finite | self._stopped
        chosen = self._choose(logits.masked_fill(~finite[:, None], 0.0))
        if self._stop_token is not None:
            chosen = chosen.masked_fill(self._stopped, self._stop_token)
            self._stopped |= chosen == self._stop_token
        self._unread = chosen[:, None]
        return chosen


def _choose(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    """A token for each row of logits [B, V]."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        smallest = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    probabilities = logits.softmax(-1)
    if top_p is not None:
        ordered, order = probabilities.sort(-1, descending=True)
        # A token stays while those before it have not reached p: the likeliest always does.
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def _check(max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}: it must be at least 1")
    if temperature != 0 and not MIN_TEMPERATURE <= temperature < math.inf:
        raise ValueError(
            f"temperature is {temperature}: it must be 0 (the likeliest token), or a number from {MIN_TEMPERATURE} on"
        )
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}: it must be at least 1, or none for all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}: it must be above 0 and at most 1, or none for all tokens")
