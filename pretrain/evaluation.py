"""Loss and bits per byte on held-out shards: every token scored once, in documents' order."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from parallel.engine import IGNORED, Engine
from parallel.process import World, gather_objects
from pretrain.data import Batch, ShardSet, sequential_batches


@dataclass(frozen=True)
class Evaluation:
    """The result over all ranks."""

    loss: float
    """Mean over tokens, in nats."""

    bits_per_byte: float
    """Bits over the UTF-8 bytes of the scored tokens' text: comparable between tokenizers."""

    tokens: int
    """Tokens scored."""

    text_bytes: int
    """Bytes of their text."""


def evaluate(
    engine: Engine, shards: ShardSet, world: World, *, sequence_length: int, batch_size: int, max_tokens: int | None
) -> Evaluation:
    """Score the first `max_tokens` held-out tokens (None: all); every rank calls it."""
    bytes_of = torch.from_numpy(shards.token_bytes)
    text_bytes = 0

    def counted() -> Iterator[Batch]:
        nonlocal text_bytes
        for batch in sequential_batches(
            shards,
            sequence_length=sequence_length,
            batch_size=batch_size,
            max_tokens=max_tokens,
            rank=world.rank,
            world_size=world.size,
        ):
            text_bytes += int(bytes_of[batch.targets[batch.targets != IGNORED]].sum())
            yield batch

    nats, tokens = engine.evaluate(counted())
    total_bytes = sum(gather_objects(text_bytes))
    return Evaluation(
        loss=nats / max(tokens, 1),
        bits_per_byte=nats / math.log(2) / max(total_bytes, 1),
        tokens=tokens,
        text_bytes=total_bytes,
    )
