"""Rows that go on from step to step, trained on by hand: every document by itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from model import ModelState, TitansLM


def train_by_hand(
    model: TitansLM,
    optimizer: torch.optim.Optimizer,
    tokens: Tensor,
    targets: Tensor,
    resets: Tensor,
    *,
    steps: int,
    clip: float = float("inf"),
) -> list[float]:
    """The loss of each step on streams [rows, steps * length]; `resets` says where documents begin, and no state is
    handed on there. Elsewhere it is, and detached at the end of a step.
    """
    length = tokens.shape[1] // steps
    states: list[ModelState | None] = [None] * len(tokens)
    losses = []
    for step in range(steps):
        span = slice(step * length, (step + 1) * length)
        total, count = torch.zeros(()), int((targets[:, span] != -100).sum())
        for row in range(len(tokens)):
            starts = resets[row, span].nonzero().flatten().tolist()
            edges = sorted({0, *starts, length})
            for start, stop in zip(edges, edges[1:], strict=False):
                piece, wanted = (x[row : row + 1, span][:, start:stop] for x in (tokens, targets))
                output = model(piece, None if start in starts else states[row])
                total = total + cross_entropy(output.logits[0], wanted[0], reduction="sum")
                states[row] = output.state
            states[row] = states[row].detach()
        optimizer.zero_grad()
        (total / count).backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        losses.append(float(total.detach()) / count)
    return losses
