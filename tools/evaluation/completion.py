"""Greedy answers to prompts of any length."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from model.generation import TokenStream
from tools.model_directory import LoadedModel


def complete(
    loaded: LoadedModel, prompts: Tensor, *, max_new_tokens: int, until: Sequence[str] = ()
) -> list[str | None]:
    """The likeliest continuation of each prompt, as text; None where the model's logits are no finite numbers.

    A prompt is read in pieces with the state handed on: in the memory of a short one, but for full attention.

    Args:
        prompts: [B, T] int64.
        max_new_tokens: a text ends there, or before EOS.
        until: a text ends before the first of these that it would hold.
    """
    tokenizer, rows = loaded.tokenizer, len(prompts)
    stream = TokenStream(
        loaded.model,
        prompts.to(loaded.model.norm.weight.device),
        max_new_tokens=max_new_tokens,
        temperature=0,
        stop_token=tokenizer.eos_id,
    )
    made: list[list[int]] = [[] for _ in range(rows)]
    ended = [False] * rows
    for chosen in stream:
        for row, (token, finite) in enumerate(zip(chosen.tolist(), stream.finite.tolist(), strict=True)):
            made[row].append(token)
            ended[row] |= token == tokenizer.eos_id or not finite
            if until and not ended[row]:
                text = tokenizer.decode(made[row], begins=False)
                ended[row] = any(end in text for end in until)
        if all(ended):
            break
    return [
        _cut(tokenizer.decode(_before(tokens, tokenizer.eos_id), begins=False), until) if finite else None
        for tokens, finite in zip(made, stream.finite.tolist(), strict=True)
    ]


def _before(tokens: list[int], stop: int) -> list[int]:
    return tokens[: tokens.index(stop)] if stop in tokens else tokens


def _cut(text: str, until: Sequence[str]) -> str:
    places = [text.index(end) for end in until if end in text]
    return text[: min(places)] if places else text
