"""Loss on held-out data, and what else its kind allows: bits per byte of text, the share of right answers; loss by
position, with the memory carried and with it reset.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from parallel.engine import IGNORED, Engine
from parallel.mesh import Mesh
from parallel.process import gather_objects
from parallel.scoring import PositionLoss, mean_reset
from pretrain.data import Batch, HeldOut


@dataclass(frozen=True)
class Evaluation:
    """The result over all ranks."""

    nats: float
    """Sum over tokens of -log p."""

    tokens: int
    """Tokens scored."""

    text_bytes: int | None
    """UTF-8 bytes of their text; None where tokens stand for none."""

    correct: int | None
    """Tokens that the model finds most likely; None where a target is not the one right answer."""

    positions: list[PositionLoss] | None = None
    """The loss by position in the row; None unless asked for."""

    @property
    def loss(self) -> float:
        """Mean over tokens, in nats."""
        return self.nats / max(self.tokens, 1)

    @property
    def bits_per_byte(self) -> float | None:
        """Bits over the bytes of the text: comparable between tokenizers."""
        if self.text_bytes is None:
            return None
        return self.nats / math.log(2) / max(self.text_bytes, 1)

    @property
    def accuracy(self) -> float | None:
        """Share of right answers."""
        return None if self.correct is None else self.correct / max(self.tokens, 1)

    def curves(self) -> dict[str, float]:
        """What is drawn over the steps."""
        values = {"loss": self.loss, "bits_per_byte": self.bits_per_byte, "accuracy": self.accuracy}
        return {name: value for name, value in values.items() if value is not None}

    def fields(self) -> dict[str, float]:
        """What is written to run.jsonl."""
        counts = {"scored_tokens": self.tokens, "text_bytes": self.text_bytes, "correct": self.correct}
        return self.curves() | {name: value for name, value in counts.items() if value is not None}

    @property
    def loss_reset(self) -> float | None:
        """Mean over tokens, in nats, with the memory reset; None unless asked for."""
        return mean_reset(self.positions or ())

    def position_curves(self) -> dict[str, float]:
        """What is drawn over the steps of the loss by position: `position/<first>-<last>/carried` and `.../reset`."""
        found = {}
        for bucket in self.positions or ():
            name = f"position/{bucket.first}-{bucket.last}"
            found[f"{name}/carried"] = bucket.loss
            if bucket.loss_reset is not None:
                found[f"{name}/reset"] = bucket.loss_reset
        return found

    def position_rows(self) -> list[dict[str, Any]]:
        """What is written to run.jsonl of the loss by position."""
        return [bucket.fields() for bucket in self.positions or ()]

    def __str__(self) -> str:
        """The result as a line for people."""
        bits = "" if self.bits_per_byte is None else f", {self.bits_per_byte:.4f} bits per byte"
        right = "" if self.accuracy is None else f", {100 * self.accuracy:.2f} % right"
        reset = "" if self.loss_reset is None else f", with the memory reset {self.loss_reset:.4f}"
        return f"loss {self.loss:.4f}{reset}{bits}{right} ({self.tokens:,} tokens)"


def evaluate(
    engine: Engine,
    held_out: HeldOut,
    mesh: Mesh,
    *,
    sequence_length: int,
    batch_size: int,
    max_tokens: int | None,
    piece: int | None = None,
    by_position: bool = False,
    reset_window: int | None = None,
    begins: Callable[[], None] | None = None,
) -> Evaluation:
    """Score the first `max_tokens` held-out tokens (None: all) in rows of `sequence_length`; every rank calls it.

    Args:
        piece, by_position, reset_window: see `Engine.evaluate`.
        begins: called before each of this rank's batches.
    """
    bytes_of = None if held_out.token_bytes is None else torch.from_numpy(held_out.token_bytes)
    text_bytes = 0

    def counted() -> Iterator[Batch]:
        nonlocal text_bytes
        for batch in held_out.batches(
            sequence_length=sequence_length,
            batch_size=batch_size,
            max_tokens=max_tokens,
            rank=mesh.data.index,
            world_size=mesh.data.size,
        ):
            if begins is not None:
                begins()
            if bytes_of is not None:
                text_bytes += int(bytes_of[batch.targets[batch.targets != IGNORED]].sum())
            yield batch

    scored = engine.evaluate(
        counted(),
        with_correct=held_out.has_answers,
        piece=piece,
        by_position=by_position,
        reset_window=reset_window,
    )
    return Evaluation(
        nats=scored.nats,
        tokens=scored.tokens,
        text_bytes=None if bytes_of is None else sum(gather_objects(text_bytes if mesh.leads_rows else 0)),
        correct=scored.correct,
        positions=scored.positions,
    )
