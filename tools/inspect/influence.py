"""What a later answer owes to what was written of a span: the answer's log-likelihood with and without its writes.

A span's influence is `log p(answer | all) - log p(answer | the span's tokens not written)`, in nats, summed over the
answer's tokens. "Not written" means theta = 0 at the span's tokens in the memory of every layer, as if their surprise
had been nothing. All else is as before: the tokens are there for attention and convolutions, forgetting and momentum go
on, the other tokens are written: those behind the span in its chunk with larger steps than before, where the step bound
had divided them by what the span asked for. To remove the text instead would also take it from attention and
move what follows to other positions and chunks, and so say nothing of the memory. Positive: the span's writes made the
answer likelier.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from model import TitansLM
from tools.inspect.memories import token_losses, writes_left_out


@dataclass(frozen=True)
class Influence:
    """Of one span."""

    span: range
    """Its tokens."""
    nats: float
    """How much likelier its writes make the answer."""


@torch.no_grad()
def answer_likelihoods(
    model: TitansLM, tokens: Sequence[int], answer: range, spans: Sequence[range], *, batch_size: int
) -> Iterator[list[float]]:
    """log p of the answer in nats with each span's tokens not written, `batch_size` spans at a time."""
    device = model.norm.weight.device
    row = torch.tensor([list(tokens)], device=device)
    for first in range(0, len(spans), batch_size):
        some = spans[first : first + batch_size]
        left_out = torch.zeros(len(some), len(tokens), dtype=torch.bool, device=device)
        for index, span in enumerate(some):
            left_out[index, span.start : span.stop] = True
        with writes_left_out(model, left_out):
            losses = token_losses(model, row.expand(len(some), -1))
        yield (-losses[:, answer.start : answer.stop].double().sum(1)).tolist()
